"""Does token routing pay? Dense training, MaskDM, TREAD and SPRINT at equal compute, on emoji at 64 x 64.

    python experiments/run_study.py --config=experiments/sparse64.py --config.sets.noto=NOTO.zip

A sparse phase takes 50, 80 or 95% of the budget, and a dense phase the rest, with the same optimizer and EMA. The three
runs of a method have one sparse phase, of which they branch off, so that it is trained once. Networks and process are
those of `emoji64.py`, and its dense runs have twice the budget.

`sparse64.py:seeds` repeats dense training and the runs in `BEST` with two more seeds.
"""

import itertools

from emoji64 import JIT, PROCESSES, UVIT, base
from ml_collections import ConfigDict

SHARES = (0.5, 0.8, 0.95)  # of the budget, for the sparse phase
OUTER = {"model.outer_blocks": 1}
TOKEN = OUTER | {"model.returning": "token"}
NETWORKS = {"JiT": JIT, "U-ViT": UVIT}
METHODS = {  # settings of both phases, and the mask of the sparse one
    "MaskDM 50%": ({}, dict(kind="patch", rate=0.5)),
    "MaskDM 75%": ({}, dict(kind="patch", rate=0.75)),
    "TREAD 50%": (OUTER, dict(kind="patch", rate=0.5)),
    "SPRINT 75%": (TOKEN, dict(kind="patch", rate=0.75)),
    "SPRINT 75%, strided": (TOKEN, dict(kind="strided", block=2)),
}
BEST = ()  # (network, method, share) of the two best runs of each network


def phases(common: dict, both: dict, mask: dict, share: float) -> tuple:
    """The phases of a run. The sparse one is cut where runs with a lower share branch off."""
    hidden = {f"train.mask.{key}": value for key, value in mask.items()}
    cuts = [0.0] + [cut for cut in SHARES if cut <= share]
    sparse = [
        dict(share=end - begin, points=0, data="noto", settings=common | both | hidden, continues=begin > 0)
        for begin, end in itertools.pairwise(cuts)
    ]
    return (*sparse, dict(share=1 - share, points=1, data="noto", settings=common | both, continues=True))


def run(network: str, method: str, share: float, seeds: tuple) -> dict:
    """A run of the study; "dense" is a method with the share 0."""
    common = NETWORKS[network] | PROCESSES["flow, x0"] | {"sampling.steps": 12}
    if method == "dense":
        one = dict(share=1.0, points=4, data="noto", settings=common)
        return dict(name=f"{network}, dense", seeds=seeds, phases=(one,))
    name = f"{network}, {method}, {share:.0%} sparse"
    return dict(name=name, seeds=seeds, phases=phases(common, *METHODS[method], share))


def get_config(name=""):
    """The study, or its repetition with more `seeds`."""
    if name not in ("", "seeds"):
        raise ValueError(f"there is no study {name!r} here; choose seeds, or none")
    c = ConfigDict()
    c.base = base()
    c.sets = dict(noto="data/emoji64_noto.zip")
    c.budget = dict(flops=1e14, seconds=1800.0)
    c.evaluation = dict(samples=1000, on="noto", held_out=400, levels=10)
    dense = [(network, "dense", 0.0) for network in NETWORKS]
    every = [(network, *rest) for network in NETWORKS for rest in itertools.product(METHODS, SHARES)]
    wanted, seeds = (dense + list(BEST), (1, 2)) if name else (dense + every, (0,))
    c.runs = tuple(run(*which, seeds) for which in wanted)
    return c
