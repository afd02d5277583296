"""The table of docs/costs.md: cost of every recipe on TPU topologies, from the compiled programs; no TPU is needed.

    python benchmarks/recipe_costs.py --json=costs.jsonl > table.md

Compiles the programs of each config and topology that the file lacks, in one to five minutes each, and then prints the
table. Sampling is compiled for the first topology only, and once for recipes that sample alike. Needs libtpu:
pip install -e ".[tpu]".
"""

import functools
import json
import pathlib
import sys

from absl import app, flags

JSON = flags.DEFINE_string("json", "costs.jsonl", "File of results, to which new ones are appended.")
TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:4x4", "v5e:16x16", "v5p:4x4x4"], "TPU topologies, or local.")
CONFIGS = flags.DEFINE_list("configs", None, "Names of configs; default: all.")
SAMPLES = flags.DEFINE_integer("samples", 16, "Images per chip and sampling call, on the first topology.", 0)
ROOT = pathlib.Path(__file__).parent.parent
STAGES_OF_CELEBAHQ = {"celebahq_pretrain", "celebahq_pretrain_50", "celebahq_finetune"}  # in `celebahq`


def main(_):
    from maskdm_jax.parallel import runtime

    recipes = {path.stem for path in (ROOT / "configs").glob("*.py")} - STAGES_OF_CELEBAHQ
    configs = CONFIGS.value or sorted(recipes)
    with runtime.program(distributed=False):
        for config in configs:
            for topology in TOPOLOGIES.value:
                samples = SAMPLES.value if topology == TOPOLOGIES.value[0] and is_first(config, configs) else 0
                add(config, topology, samples)
    print(table([row for row in rows() if row["config"] in configs and row["topology"] in TOPOLOGIES.value]))


def rows() -> list[dict]:
    """All rows of the file."""
    path = pathlib.Path(JSON.value)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@functools.cache
def read(name: str):
    """The settings of a recipe."""
    import maskdm_jax
    from maskdm_jax.config import parse

    return parse(maskdm_jax.recipe(name))


def is_first(name: str, names: list[str]) -> bool:
    """Whether no recipe before this one samples as it does."""
    about = lambda c: (c.model, c.diffusion, c.sampling, c.data.image_size, c.data.channels)
    return not any(about(read(name)) == about(read(other)) for other in names[: names.index(name)])


def add(name: str, topology: str, samples: int) -> None:
    """Compile the programs of a config that the file lacks, and append a row for each to the file."""
    import jax
    import roofline

    from maskdm_jax.errors import CostError
    from maskdm_jax.tools import cost

    if topology != "local":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # programs for absent chips cannot be read back
    config = read(name)
    known = {row["stage"] for row in rows() if (row["config"], row["topology"]) == (name, topology)}
    for program in [*config.stages, *["sampling"] * bool(samples)]:
        if program in known:
            continue
        devices = cost.topology_devices(topology)
        batch = samples * len(devices)
        if program == "sampling":
            compile_it = functools.partial(roofline.sampling, config, devices, samples)
        else:
            batch = cost.round_up_batch(config, program, len(devices))
            compile_it = functools.partial(roofline.training_step, config, program, devices, batch)
        row = dict(config=name, topology=topology, stage=program, batch=batch)
        try:
            row |= numbers(compile_it())
            over = row["hbm_bytes"] / row["least_hbm_bytes"]
            told = f"{over:.2f} times the bytes of matrix products and state that access HBM once"
        except CostError as error:
            row |= dict(fits=False)
            told = f"does not fit ({error})"
        print(f"{name}, {program} on {topology}: {told}", file=sys.stderr, flush=True)
        with open(JSON.value, "a") as file:
            file.write(json.dumps(row) + "\n")


def numbers(found) -> dict:
    """A `roofline.Roofline` for JSON; bytes and FLOPs per chip."""
    names = ("fits", "chips", "kind", "state", "temporary", "memory", "flops", "compile_seconds")
    row = {name: getattr(found.cost, name) for name in names}
    row |= dict(hbm_bytes=found.hbm_bytes, least_hbm_bytes=found.least_hbm_bytes, collectives=found.collectives)
    return row | dict(bounds=found.bounds())


def table(found: list[dict]) -> str:
    """Markdown table with a row per program, ordered by recipe."""
    columns = ("recipe", "program", "topology", "images", "memory, GiB", "TFLOP", "HBM, GB", "of minimum")
    columns += ("interconnect, MB", "ms at best", "images/s")
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---|" + "--:|" * 8]
    for row in sorted(found, key=lambda row: (row["config"], TOPOLOGIES.value.index(row["topology"]))):
        cells = [row["config"], row["stage"], row["topology"], f"{row['batch']:,}"]
        if row["fits"] is False:
            cells += ["does not fit", *[""] * 6]
        else:
            sent = sum(size for _, size in row["collectives"].values())
            cells += [f"{row['memory'] / 2**30:.2f}", f"{row['flops'] / 1e12:,.2f}", f"{row['hbm_bytes'] / 1e9:,.1f}"]
            cells += [f"{row['hbm_bytes'] / row['least_hbm_bytes']:.2f}", f"{sent / 1e6:,.0f}", *at_best(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_best(row: dict) -> list[str]:
    """The largest bound with its name, and the corresponding images per second."""
    if not row["bounds"]:
        return ["", ""]
    binding = max(row["bounds"], key=row["bounds"].get)
    seconds, names = row["bounds"][binding], dict(hbm="HBM")
    return [f"{1e3 * seconds:,.1f} ({names.get(binding, binding)})", f"{row['batch'] / seconds:,.0f}"]


if __name__ == "__main__":
    app.run(main)
