"""What a recipe costs: python launch/compile.py --config=configs/NAME.py --topology=v5e:16x16

Compiles the real training steps and the sampling program for a TPU topology, on a machine without TPUs, or for the
devices that are here (--topology=local), and prints per chip: memory, arithmetic, traffic, what chips tell each other,
and the time that these allow at best. --find_batch looks for the largest batch that fits.
"""

import dataclasses
import json
import math
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the run.")
TOPOLOGY = flags.DEFINE_string("topology", "local", "TPU topology such as v5e:4x4, v5p:4x4x4, 2*v6e:16x16; or local.")
STAGES = flags.DEFINE_list("stages", None, "Stages to compile; all of the config when not given.")
SAMPLES = flags.DEFINE_integer("samples", 16, "Images per chip that are sampled together; 0 leaves sampling out.", 0)
FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Find the largest batch of each stage that fits.")
JSON = flags.DEFINE_string("json", None, "Write the numbers to this file too, a JSON object a line, appended.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are given as --config.key=value")
    if CONFIG.value is None:
        raise app.UsageError("which recipe? give --config=configs/NAME.py")
    logging.set_verbosity(logging.ERROR)
    if TOPOLOGY.value != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"
        # libtpu would ask Google's machines where it is, and waits long for an answer elsewhere.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a compiler alone holds no chip
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from maskdm_jax import config
    from maskdm_jax.errors import ConfigError, CostError
    from maskdm_jax.parallel.runtime import keep_compiled_programs
    from maskdm_jax.tools import cost

    if TOPOLOGY.value == "local":  # programs for absent chips cannot be read back
        keep_compiled_programs()
    try:
        settings = config.parse(CONFIG.value)
        sys.exit(0 if report(settings, cost.devices_of(TOPOLOGY.value)) else 1)
    except (ConfigError, CostError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def report(config, devices) -> bool:
    """Print what every program costs; whether all fit."""
    from maskdm_jax.tools import cost

    n, total, good = len(devices), 0.0, True
    name_of_config = os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"])).removesuffix(".py")
    print(f"{name_of_config} on {n} x {devices[0].device_kind}", flush=True)
    for name in STAGES.value or config.stages:
        if name not in config.stages:
            raise CostError(f"{name!r} is not a stage of the config; it has {', '.join(config.stages)}")
        wanted, batch = config.stage[name].batch_size, cost.full_batch(config, name, n)
        if FIND_BATCH.value:
            tried = lambda size, found: print(f"  {size:,} images: {'fits' if found else 'does not fit'}", flush=True)
            batch = cost.largest_batch(config, name, devices, tried)
            print(f"{name}: {batch:,} images, {batch // n:,} per chip, are the largest batch that fits")
        elif batch != wanted:
            print(f"{name}: a batch of {wanted} does not divide over {n} chips; {batch} is taken")
        what = f"{name}, a step of {batch:,} images"
        advice = f"raise micro_batches or mesh.fsdp, or set --config.{name}.remat=True"
        found = attempt(what, advice, lambda name=name, batch=batch: cost.of_training(config, name, devices, batch))
        good &= found is not None and found.fits is not False
        steps = config.stage[name].steps
        if found and found.bounds():
            hours = found.seconds * steps * n / 3600
            total += hours
            print(f"  {steps:,} such steps are {hours:,.1f} chip-hours at best")
        write(name_of_config, name, batch, found)
    if total and len(config.stages) > 1:
        print(f"all stages: {total:,.1f} chip-hours at best")
    if SAMPLES.value:
        what = f"sampling {SAMPLES.value * n:,} images by {config.sampling.method}"
        found = attempt(what, "lower --samples", lambda: cost.of_sampling(config, devices, SAMPLES.value))
        good &= found is not None and found.fits is not False
        write(name_of_config, "sampling", SAMPLES.value * n, found)
    return good


def attempt(what: str, advice: str, compile):
    """What `compile` gives, printed; None, and the advice, if it does not fit."""
    try:
        found = compile()
    except CostError as error:
        print(f"{what}: does not fit ({error}); {advice}", flush=True)
        return None
    limit = f" of {found.limit / 2**30:.0f}" if found.limit else ""
    print(f"{what} (compiled in {found.compile_seconds:.0f} s), per chip:")
    print(
        f"  memory      {found.memory / 2**30:8.2f}{limit} GiB: {found.state / 2**30:.2f} for the state, "
        f"{found.temporary / 2**30:.2f} besides" + (f"; does not fit, {advice}" if found.fits is False else "")
    )
    bounds = {key: f", {1e3 * seconds:10.2f} ms" for key, seconds in found.bounds().items()}
    print(f"  arithmetic  {scaled(found.flops)}FLOP{bounds.get('arithmetic', '')}")
    over = f"; {found.traffic / found.streamed_traffic:.1f} times what products and state would move, each once"
    print(f"  traffic     {scaled(found.traffic)}B   {bounds.get('memory', '')}{over}")
    sent = ", ".join(
        f"{number} {kind} of {scaled(size).strip()}B" for kind, (number, size) in found.collectives.items()
    )
    print(f"  links       {sent or 'none'}{bounds.get('links', '')}")
    if found.bounds():
        binding = max(found.bounds(), key=found.bounds().get)
        rate = found.batch / found.seconds
        print(f"  at best     {1e3 * found.seconds:8.2f} ms, {rate:,.0f} images/s over all chips; {binding} binds")
    sys.stdout.flush()
    return found


def scaled(value: float) -> str:
    """1.23e9 -> '    1.23 G'."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(int(math.log10(max(value, 1)) // 3), len(prefixes) - 1)
    return f"{value / 1000**power:8.2f} {prefixes[power]}"


def write(config: str, stage: str, batch: int, found) -> None:
    """Append the numbers to --json."""
    if not JSON.value:
        return
    numbers = dict(config=config, topology=TOPOLOGY.value, stage=stage, batch=batch, fits=False)
    if found is not None:
        numbers |= dataclasses.asdict(found) | dict(memory=found.memory, bounds=found.bounds(), fits=found.fits)
    with open(JSON.value, "a") as file:
        file.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    app.run(main)
