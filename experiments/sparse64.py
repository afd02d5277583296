"""Do sleeping patches pay? Dense training, MaskDM, TREAD and SPRINT at equal compute, on emoji at 64 x 64.

    python experiments/run_study.py --config=experiments/sparse64.py:search --config.sets.noto=NOTO.zip
    python experiments/run_study.py --config=experiments/sparse64.py:final --config.sets.noto=NOTO.zip

`search` tries three shares of the budget for the sparse phase, at a fifth of the budget of `final`, and samples in half
of the steps. `final` takes the best share of each method, and three seeds of dense training. Networks, process and the
budget of `final` are those of `emoji64.py`. By its FLOPs, a run takes about 20 minutes (`search`) or 70 (`final`) of
one core with its evaluation; no result is recorded yet.
"""

import functools
import operator

from emoji64 import JIT, PROCESSES, UVIT, base
from ml_collections import ConfigDict

SHARES = (0.5, 0.8, 0.95)  # of the budget, for the sparse phase
OUTER = {"model.outer_blocks": 1}
TOKEN = OUTER | {"model.returning": "token"}
NETWORKS = {"U-ViT": UVIT, "JiT": JIT}
METHODS = {  # settings of both phases, and the mask of the first
    "MaskDM 50%": ({}, dict(kind="patch", rate=0.5)),
    "MaskDM 75%": ({}, dict(kind="patch", rate=0.75)),
    "TREAD 50%": (OUTER, dict(kind="patch", rate=0.5)),
    "SPRINT 75%": (TOKEN, dict(kind="patch", rate=0.75)),
    "SPRINT 75%, strided": (TOKEN, dict(kind="strided", block=2)),
}
BEST = dict.fromkeys(METHODS, 0.8)  # share of each method, to be set to the best of `search`


def phase(share, points, *settings):
    return dict(share=share, points=points, data="noto", settings=functools.reduce(operator.or_, settings))


def sparse(common: dict, method: str, share: float, points: int) -> tuple:
    """The sparse phase of a method, and the dense one, which goes on with its optimizer and EMA."""
    both, mask = METHODS[method]
    hidden = {f"train.mask.{key}": value for key, value in mask.items()}
    return phase(share, 0, common, both, hidden), phase(1 - share, points, common, both) | dict(continues=True)


def get_config(name="search"):
    """The study of that name."""
    final = name == "final"
    if name not in ("search", "final"):
        raise ValueError(f"there is no study {name!r} here; choose search or final")
    c, runs = ConfigDict(), []
    points = 4 if final else 1
    for network, settings in NETWORKS.items():
        common = settings | PROCESSES["flow, x0"] | ({} if final else {"sampling.steps": 25})
        seeds = (0, 1, 2) if final else (0,)
        runs.append(dict(name=f"{network}, dense", seeds=seeds, phases=(phase(1.0, points, common),)))
        for method in METHODS:
            for share in (BEST[method],) if final else SHARES:
                told = "" if final else f", {share:.0%} sparse"
                phases = sparse(common, method, share, points)
                runs.append(dict(name=f"{network}, {method}{told}", seeds=(0,), phases=phases))
    c.base = base()
    c.sets = dict(noto="data/emoji64_noto.zip")
    c.budget = dict(flops=2e14, seconds=3600.0) if final else dict(flops=4e13, seconds=720.0)
    c.evaluation = dict(samples=1000, on="noto", held_out=400, levels=10)
    c.runs = tuple(runs)
    return c
