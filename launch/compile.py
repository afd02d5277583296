"""Cost of a recipe: python launch/compile.py --config=configs/NAME.py --topology=v5e:16x16

Compiles the training steps and the sampling program and prints, per chip, memory, FLOPs, and the time of the FLOPs at
the chip's peak. It compiles for a TPU topology, on a machine without TPUs, or for the devices of this machine
(--topology=local). --find_batch finds the largest batch that fits, to within 1/8; not on CPU. --price, in dollars per
chip-hour, prints a lower bound of the price. HBM or the interconnect can make a step slower;
benchmarks/recipe_costs.py computes their bounds, too.
"""

import json
import math
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from maskdm_jax.parallel import runtime

CONFIG = runtime.config_flag("Config file of the run.")
TOPOLOGY = flags.DEFINE_string("topology", "local", "TPU topology such as v5e:4x4, v5p:4x4x4, 2*v6e:16x16; or local.")
STAGES = flags.DEFINE_list("stages", None, "Stages to compile; default: all of the config.")
SAMPLES = flags.DEFINE_integer("samples", 16, "Images per chip and sampling call; 0: no sampling.", 0)
PRICE = flags.DEFINE_float("price", None, "Price of a chip-hour in dollars; prints the least price of the run.", 0.0)
FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Find the largest batch of each stage that fits.")
JSON = flags.DEFINE_string("json", None, "Also append the numbers to this file, one JSON object per line.")


def main(_):
    if CONFIG.value is None:
        raise app.UsageError("which recipe? give --config=configs/NAME.py")
    logging.set_verbosity(logging.ERROR)
    import jax

    from maskdm_jax import config
    from maskdm_jax.tools import cost

    with runtime.program(distributed=False):
        if TOPOLOGY.value != "local":
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_enable_compilation_cache", False)  # programs for absent chips cannot be read back
        settings = config.parse(CONFIG.value)
        fine = report(settings, cost.topology_devices(TOPOLOGY.value))
    sys.exit(0 if fine else 1)


def report(config, devices) -> bool:
    """Print the cost of every program; return whether all fit."""
    from maskdm_jax.errors import ConfigError
    from maskdm_jax.tools import cost

    n, hours, fine = len(devices), {}, True
    if PRICE.value is not None and devices[0].device_kind not in cost.CHIPS:
        raise ConfigError(f"--price: the speed of {devices[0].device_kind} is not known; give a --topology of TPUs")
    print(f"{recipe()} on {n} x {devices[0].device_kind}", flush=True)
    for name in STAGES.value or config.stages:
        if name not in config.stages:
            raise ConfigError(f"{name!r} is not a stage of the config; it has {', '.join(config.stages)}")
        batch = choose_batch(config, name, devices)
        advice = f"raise micro_batches or mesh.fsdp, or set --config.{name}.remat=True"
        compile_it = lambda name=name, batch=batch: cost.training_step(config, name, devices, batch)
        found = attempt(f"{name}, a step of {batch:,} images", advice, compile_it)
        fine &= found is not None and found.fits is not False
        if found and found.seconds:
            steps = config.stage[name].steps
            hours[name] = found.seconds * steps * n / 3600
            print(f"  {steps:,} steps take at least {hours[name]:,.1f} chip-hours")
        write(name, batch, found)
    if hours:
        total = sum(hours.values())
        price = "" if PRICE.value is None else f", ${total * PRICE.value:,.2f} at ${PRICE.value:,.2f} per chip-hour"
        print(f"{' + '.join(hours)}: at least {total:,.1f} chip-hours{price}")
    if SAMPLES.value:
        what = f"sampling {SAMPLES.value * n:,} images by {config.sampling.method}"
        found = attempt(what, "lower --samples", lambda: cost.sampling(config, devices, SAMPLES.value))
        fine &= found is not None and found.fits is not False
        write("sampling", SAMPLES.value * n, found)
    return fine


def choose_batch(config, name: str, devices) -> int:
    """The stage's batch size, rounded up to divide over the chips, or with --find_batch the largest that fits."""
    from maskdm_jax.tools import cost

    n, wanted = len(devices), config.stage[name].batch_size
    if FIND_BATCH.value:
        tried = lambda size, found: print(f"  {size:,} images: {'fits' if found else 'does not fit'}", flush=True)
        batch = cost.largest_batch(config, name, devices, tried)
        print(f"{name}: {batch:,} images, {batch // n:,} per chip, are the largest batch that fits")
        return batch
    batch = cost.round_up_batch(config, name, n)
    if batch != wanted:
        print(f"{name}: a batch of {wanted} does not divide over {n} chips; {batch} is taken")
    return batch


def attempt(what: str, advice: str, compile_it):
    """Print and return the `cost.Cost` from `compile_it`. If it does not fit, print `advice` and return None."""
    from maskdm_jax.errors import CostError

    try:
        found = compile_it()
    except CostError as error:
        print(f"{what}: does not fit ({error}); {advice}", flush=True)
        return None
    limit = f" of {found.limit / 2**30:.0f}" if found.limit else ""
    print(f"{what} (compiled in {found.compile_seconds:.0f} s), per chip:")
    print(
        f"  memory      {found.memory / 2**30:8.2f}{limit} GiB: {found.state / 2**30:.2f} for the state, "
        f"{found.temporary / 2**30:.2f} temporary" + (f"; does not fit, {advice}" if found.fits is False else "")
    )
    print(f"  arithmetic  {scaled(found.flops)}FLOP")
    if found.seconds:
        rate = found.batch / found.seconds
        print(f"  at best     {1e3 * found.seconds:8.2f} ms by arithmetic, {rate:,.0f} images/s over all chips")
    sys.stdout.flush()
    return found


def scaled(value: float) -> str:
    """1.23e9 -> '    1.23 G'."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(int(math.log10(max(value, 1)) // 3), len(prefixes) - 1)
    return f"{value / 1000**power:8.2f} {prefixes[power]}"


def recipe() -> str:
    """Name of the config file."""
    return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name.replace(".py", "")


def write(stage: str, batch: int, found) -> None:
    """Append the numbers to --json."""
    if not JSON.value:
        return
    numbers = dict(config=recipe(), topology=TOPOLOGY.value, stage=stage, batch=batch, fits=False)
    if found is not None:
        names = "fits chips kind limit state temporary memory flops seconds compile_seconds"
        numbers |= {name: getattr(found, name) for name in names.split()}
    with open(JSON.value, "a") as file:
        file.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    runtime.start(main)
