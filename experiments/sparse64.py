"""Does token routing pay? Dense training, MaskDM, TREAD and SPRINT at equal compute, on emoji at 64 x 64.

    python experiments/run_study.py --config=experiments/sparse64.py:gpu --config.sets.both=EMOJI64.zip --seeds=0
    python experiments/run_study.py --config=experiments/sparse64.py:cpu --config.sets.noto=NOTO.zip --seeds=0

A sparse phase, with hidden patches, takes 50, 80 or 95% of the budget, and a dense phase, without, the rest, with the
same optimizer and EMA. The three runs of a method share the sparse phase, from which they branch off, so that it is
trained once. Each seed repeats all runs; `--only=PATTERN --seeds=1,2` repeats the most interesting ones.

`cpu` has the networks, the process and the images of `emoji64.py`, whose dense runs have twice the budget. `rates` has
dense training and the best sparse one at learning rates above the 1e-3 of `cpu`, which their names state. `gpu` has
larger networks and budgets, and the images of both makers. Several processes use a GPU better than one, because each
also compiles, saves and evaluates; after an interruption, the same command goes on:

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.07 JAX_COMPILATION_CACHE_DIR=~/.cache/jax
    for network in U-ViT JiT; do
      for method in dense "MaskDM 50%*" "MaskDM 75%*" "TREAD*" "SPRINT 75%, strided*" "SPRINT 75%, [!s]*"; do
        timeout 540 python experiments/run_study.py --config=experiments/sparse64.py:gpu \\
          --config.sets.both=EMOJI64.zip --seeds=0 --only="$network, $method" &
      done
    done; wait
"""

import itertools

from emoji64 import JIT, PROCESSES, UVIT, base
from ml_collections import ConfigDict

SHARES = (0.5, 0.8, 0.95)  # of the budget, for the sparse phase
OUTER = {"model.outer_blocks": 1}
TOKEN = OUTER | {"model.returning": "token"}
METHODS = {  # settings of both phases, and the mask of the sparse one
    "MaskDM 50%": ({}, dict(kind="patch", rate=0.5)),
    "MaskDM 75%": ({}, dict(kind="patch", rate=0.75)),
    "TREAD 50%": (OUTER, dict(kind="patch", rate=0.5)),
    "SPRINT 75%": (TOKEN, dict(kind="patch", rate=0.75)),
    "SPRINT 75%, strided": (TOKEN, dict(kind="strided", block=2)),
}
RATES = (2e-3, 4e-3)
LARGER = {  # 6 and 22 million parameters
    "U-ViT": UVIT | {"model.width": 256, "model.depth": 7},
    "JiT": JIT | {"model.width": 384, "model.depth": 8},
}


def phases(settings: dict, mask: dict, share: float, data: str) -> tuple:
    """The phases of a run. The sparse one is cut where runs with a lower share branch off."""
    hidden = {f"train.mask.{key}": value for key, value in mask.items()}
    cuts = [0.0] + [cut for cut in SHARES if cut <= share]
    sparse = [
        dict(share=end - begin, points=0, data=data, settings=settings | hidden, continues=begin > 0)
        for begin, end in itertools.pairwise(cuts)
    ]
    return (*sparse, dict(share=1 - share, points=1, data=data, settings=settings, continues=True))


def runs_of(name: str, network: dict, data: str) -> list[dict]:
    """The runs of a network: dense, then each method with each share."""
    common = network | PROCESSES["flow, x0"] | {"sampling.steps": 12}
    dense = dict(name=f"{name}, dense", phases=(dict(share=1.0, points=4, data=data, settings=common),))
    sparse = [
        dict(name=f"{name}, {method}, {share:.0%} sparse", phases=phases(common | more, mask, share, data))
        for method, (more, mask) in METHODS.items()
        for share in SHARES
    ]
    return [run | dict(seeds=(0, 1, 2)) for run in (dense, *sparse)]


def at_rate(run: dict, rate: float) -> dict:
    """A run with another learning rate."""
    phases = tuple(phase | dict(settings=phase["settings"] | {"train.learning_rate": rate}) for phase in run["phases"])
    return run | dict(name=f"{run['name']}, {rate}", phases=phases)


def get_config(size="cpu"):
    """The study, for a machine of this size, or the `rates` on a CPU."""
    if size not in ("cpu", "gpu", "rates"):
        raise ValueError(f"there is no size {size!r}; choose cpu, gpu or rates")
    c, data, networks = ConfigDict(), "noto", {"JiT": JIT, "U-ViT": UVIT}
    c.base = base()
    c.budget = dict(flops=1e14, seconds=1800.0)
    if size == "gpu":
        data, networks = "both", LARGER
        c.base.model.dtype = "bfloat16"
        c.base.data.update(flip=0.5, workers=2)  # in a process that trains, reading would delay short steps
        c.base.train.update(batch_size=128, learning_rate=5e-4, ema_decay=0.995)
        c.budget = dict(flops=2e15, seconds=60.0)
    c.sets = {data: "data/emoji64.zip" if data == "both" else "data/emoji64_noto.zip"}
    c.evaluation = dict(samples=1000, on=data, held_out=400, levels=10)
    runs = [run for name, network in networks.items() for run in runs_of(name, network, data)]
    if size == "rates":
        best = [run for run in runs if run["name"].endswith(("dense", "MaskDM 75%, 50% sparse"))]
        runs = [at_rate(run, rate) for rate in RATES for run in best]
    c.runs = tuple(runs)
    return c
