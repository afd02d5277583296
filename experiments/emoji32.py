"""Does masking pay? Studies at 32 x 32 on two sets of emoji, sized for two CPU cores.

    python launch/study.py --config=experiments/emoji32.py:convergence --config.sets.noto=NOTO.zip --judge=JUDGE.py

`convergence` trains on one set, `transfer` goes from that to a tenth of the other, `rates` looks for learning rates and
batch sizes, alike for masked and unmasked training. A run is a row of legs, each with a share of the budget; settings
are those of `base()` but for what a leg says. The first run is what the others are compared with.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

RATES = ((5e-4, 16), (1e-3, 16), (2e-3, 16), (1e-3, 32))  # learning rates and batch sizes tried
HIGHER = {"train.learning_rate": 2e-3}  # of those tried the best without masks; with them the best is that of `base()`
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def base():
    """A U-ViT of 1.1 million parameters on 64 patches, trained unmasked: the settings of every leg."""
    c = runpy.run_path(str(CONFIGS / "own_images.py"))["get_config"]()
    c.data.image_size, c.data.fraction, c.data.flip, c.data.threads = 32, 0.9, 0.0, 2
    c.model.width, c.model.depth, c.model.heads = 128, 5, 4
    c.train = c.finetune
    del c.pretrain, c.finetune
    c.stages = ("train",)
    c.train.batch_size, c.train.learning_rate, c.train.warmup_steps = 16, 1e-3, 200
    c.diffusion.objective = "x0"  # with "noise", samples are patches that do not fit together for far longer
    c.sampling.method, c.sampling.steps = "dpm_solver", 25
    return c


def leg(share, points=1, data="noto", hidden=0.0, block=1, **settings):
    """A share of the budget, judged at so many evenly spaced points of it, with so much hidden."""
    kind = "none" if not hidden else "patch" if block == 1 else "block"
    mask = {"train.mask.kind": kind, "train.mask.rate": hidden, "train.mask.block": block}
    return dict(share=share, points=points, data=data, settings=mask | settings)


def run(name, *legs, seeds=(0, 1, 2)):
    """Runs of that name, one for each seed."""
    return dict(name=name, seeds=seeds, legs=legs)


def get_config(name="convergence"):
    """The study of that name."""
    c = ConfigDict()
    c.base = base()
    c.sets = dict(noto="data/emoji64_noto.zip", twemoji="data/emoji64_twemoji.zip")
    c.budget = dict(flops=1.5e14, seconds=1800.0)  # of a run; half an hour of one core
    c.judged = dict(samples=2000, on="noto", held_out=400, levels=10)
    c.runs = ()
    if name == "convergence":
        c.runs = (
            run("unmasked", leg(1.0, points=4, **HIGHER)),
            run("half hidden", leg(0.5, hidden=0.5, block=2), leg(0.5, points=2)),
            run("90-50-0", leg(0.25, hidden=0.9, block=2), leg(0.25, hidden=0.5, block=2), leg(0.5, points=2)),
            run("unmasked, lower rate", leg(1.0, points=2), seeds=(0,)),
            run("half hidden, higher rate", leg(0.5, hidden=0.5, block=2, **HIGHER), leg(0.5, **HIGHER), seeds=(0,)),
            run("3/4 hidden", leg(0.5, hidden=0.75, block=2), leg(0.5), seeds=(0,)),
            run("half hidden, patches", leg(0.5, hidden=0.5), leg(0.5), seeds=(0,)),
            run("half hidden, large blocks", leg(0.5, hidden=0.5, block=4), leg(0.5), seeds=(0,)),
            run("half hidden, shorter", leg(0.25, hidden=0.5, block=2), leg(0.75), seeds=(0,)),
        )
    elif name == "transfer":
        c.judged.on = "twemoji"
        tenth = lambda share, points=1, **more: leg(share, points, data="twemoji", **{"data.fraction": 0.1} | more)
        c.runs = (
            run("from scratch", tenth(1.0, 4, **HIGHER)),
            run("after unmasked", leg(0.5, points=0, **HIGHER), tenth(0.5, 2, **HIGHER)),
            run("after half hidden", leg(0.5, points=0, hidden=0.5, block=2), tenth(0.5, 2)),
            run("from scratch, lower rate", tenth(1.0, 2), seeds=(0,)),
            run("after unmasked, lower rate", leg(0.5, points=0), tenth(0.5), seeds=(0,)),
            run(
                "after half hidden, higher rate",
                leg(0.5, points=0, hidden=0.5, block=2, **HIGHER),
                tenth(0.5, **HIGHER),
            ),
        )
    elif name == "rates":
        c.budget, c.judged.samples = dict(flops=3e13, seconds=360.0), 500
        tried = [dict(zip(("train.learning_rate", "train.batch_size"), pair, strict=True)) for pair in RATES]
        unmasked = [(leg(1.0, **settings),) for settings in tried]
        hidden = [(leg(0.5, points=0, hidden=0.5, block=2, **settings), leg(0.5, **settings)) for settings in tried]
        names = [f"{rate:g} x {batch}" for rate, batch in RATES]
        for kind, rows in (("unmasked", unmasked), ("half hidden", hidden)):
            c.runs += tuple(run(f"{kind} {name}", *legs, seeds=(0,)) for name, legs in zip(names, rows, strict=True))
    else:
        raise ValueError(f"there is no study {name!r} here; choose convergence, transfer or rates")
    return c
