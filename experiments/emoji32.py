"""Does masking pay? Studies at 32 x 32 on two sets of emoji, sized for two CPU cores.

    python experiments/run_study.py --config=experiments/emoji32.py:convergence --config.sets.noto=NOTO.zip

`convergence` trains on one set. `transfer` trains on that set and then on a tenth of the other. `rates` compares
learning rates and batch sizes with and without masks. `own_images` compares masks for the recipe `own_images.py:cpu`,
which has flow matching. A run is a sequence of phases, each with a share of the budget. Its settings are those of
`base()`, except where a phase changes them. The report compares all runs with the first.
"""

from emoji64 import PROCESSES
from ml_collections import ConfigDict

from maskdm_jax import config

RATES = ((5e-4, 16), (1e-3, 16), (2e-3, 16), (1e-3, 32))  # learning rates and batch sizes tried
HIGHER = {"train.learning_rate": 2e-3}  # the best of them without masks; with masks, the best is that of `base()`


def base():
    """A U-ViT of 1.1 million parameters on 64 patches, trained unmasked."""
    c = config.default()
    c.data.update(image_size=32, fraction=0.9, threads=2)
    c.model.update(patch_size=4, width=128, depth=5, heads=4, dtype="float32")
    c.diffusion.objective = "x0"  # with "noise", it takes much longer until the patches of a sample fit together
    c.sampling.update(method="dpm_solver", steps=25)
    c.stages = ("train",)
    c.train = config.stage(batch_size=16, learning_rate=1e-3, warmup_steps=200)
    return c


def phase(share, points=1, data="noto", hidden=0.0, block=1, **settings):
    """A phase with a share of the budget and a share of hidden patches, evaluated at evenly spaced points."""
    kind = "none" if not hidden else "patch" if block == 1 else "block"
    mask = {"train.mask.kind": kind, "train.mask.rate": hidden, "train.mask.block": block}
    return dict(share=share, points=points, data=data, settings=mask | settings)


def run(name, *phases, seeds=(0, 1, 2)):
    """Runs with the same phases, one per seed."""
    return dict(name=name, seeds=seeds, phases=phases)


def convergence():
    """Training on one set, with and without masks."""
    half = lambda share, **more: phase(share, hidden=0.5, block=2, **more)
    return (
        run("unmasked", phase(1.0, points=4, **HIGHER)),
        run("half hidden", half(0.5), phase(0.5, points=2)),
        run("90-50-0", phase(0.25, hidden=0.9, block=2), half(0.25), phase(0.5, points=2)),
        run("unmasked, lower rate", phase(1.0, points=2), seeds=(0,)),
        run("half hidden, higher rate", half(0.5, **HIGHER), phase(0.5, **HIGHER), seeds=(0,)),
        run("3/4 hidden", phase(0.5, hidden=0.75, block=2), phase(0.5), seeds=(0,)),
        run("half hidden, patches", phase(0.5, hidden=0.5), phase(0.5), seeds=(0,)),
        run("half hidden, large blocks", phase(0.5, hidden=0.5, block=4), phase(0.5), seeds=(0,)),
        run("half hidden, shorter", half(0.25), phase(0.75), seeds=(0,)),
    )


def transfer():
    """Training on a tenth of the second set, from scratch or after the first set."""
    tenth = lambda share, points=1, **more: phase(share, points, data="twemoji", **{"data.fraction": 0.1} | more)
    first = lambda **more: phase(0.5, points=0, **more)
    half = lambda **more: first(hidden=0.5, block=2, **more)
    return (
        run("from scratch", tenth(1.0, 4, **HIGHER)),
        run("after unmasked", first(**HIGHER), tenth(0.5, 2, **HIGHER)),
        run("after half hidden", half(), tenth(0.5, 2)),
        run("from scratch, lower rate", tenth(1.0, 2), seeds=(0,)),
        run("after unmasked, lower rate", first(), tenth(0.5), seeds=(0,)),
        run("after half hidden, higher rate", half(**HIGHER), tenth(0.5, **HIGHER)),
    )


def rates():
    """Learning rates and batch sizes, tried unmasked and with half hidden for half of the budget."""
    runs = {"unmasked": [], "half hidden": []}
    for rate, batch in RATES:
        tried = {"train.learning_rate": rate, "train.batch_size": batch}
        hidden = phase(0.5, points=0, hidden=0.5, block=2, **tried)
        for kind, phases in (("unmasked", [phase(1.0, **tried)]), ("half hidden", [hidden, phase(0.5, **tried)])):
            runs[kind].append(run(f"{kind} {rate:g} x {batch}", *phases, seeds=(0,)))
    return (*runs["unmasked"], *runs["half hidden"])


def own_images():
    """The recipe, which hides 3/4 for half of its FLOPs, the mask that it had before, and none."""
    recipe = PROCESSES["flow, x0"] | {"sampling.steps": 12, "train.batch_size": 64, "data.flip": 0.5}
    masked = lambda share, **mask: (phase(share, points=0, **mask, **recipe), phase(1 - share, **recipe, **HIGHER))
    return (
        run("unmasked", phase(1.0, points=4, **recipe, **HIGHER)),
        run("half hidden, 20%", *masked(0.2, hidden=0.5, block=2)),
        run("3/4 hidden, 50%", *masked(0.5, hidden=0.75)),
    )


STUDIES = dict(convergence=convergence, transfer=transfer, rates=rates, own_images=own_images)


def get_config(name="convergence"):
    """The study of that name."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r} here; choose one of {', '.join(STUDIES)}")
    c = ConfigDict()
    c.base = base()
    c.sets = dict(noto="data/emoji64_noto.zip", twemoji="data/emoji64_twemoji.zip")
    c.budget = dict(flops=1.5e14, seconds=1800.0)  # of a run; half an hour of one core
    c.evaluation = dict(samples=2000, on="noto", held_out=400, levels=10)
    if name == "transfer":
        c.evaluation.on = "twemoji"
    if name == "rates":
        c.budget, c.evaluation.samples = dict(flops=3e13, seconds=360.0), 500
    c.runs = STUDIES[name]()
    return c
