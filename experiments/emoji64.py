"""Which process? DDPM, flow matching and EDM at equal compute, for a U-ViT and a JiT, on emoji at 64 x 64.

    python experiments/run_study.py --config=experiments/emoji64.py --config.sets.noto=NOTO.zip

Sized for two CPU cores. Nothing is hidden. The U-ViT has 256 patches of 4 x 4, the JiT 64 of 8 x 8.
"""

from ml_collections import ConfigDict

from maskdm_jax import config

UVIT = {"model.network": "uvit", "model.patch_size": 4, "model.width": 128, "model.depth": 5, "model.heads": 4}
JIT = {"model.network": "jit", "model.patch_size": 8, "model.width": 192, "model.depth": 6, "model.heads": 6}
PROCESSES = {
    "DDPM, noise": {"diffusion.objective": "noise", "sampling.method": "dpm_solver", "sampling.steps": 50},
    "DDPM, x0": {"diffusion.objective": "x0", "sampling.method": "dpm_solver", "sampling.steps": 50},
    "flow, x0": {
        "diffusion.process": "flow",
        "diffusion.objective": "x0",
        "sampling.method": "heun",
        "sampling.steps": 50,
    },
    "EDM": {"diffusion.process": "edm", "diffusion.objective": "x0", "sampling.method": "heun", "sampling.steps": 25},
}


def base():
    """The settings that all runs share."""
    c = config.default()
    c.data.update(image_size=64, fraction=0.9, threads=2)
    c.model.dtype = "float32"
    c.model.jit.update(bottleneck=64, class_tokens=0, class_tokens_from=0)
    c.stages = ("train",)
    c.train = config.stage(batch_size=16, learning_rate=1e-3, warmup_steps=200)
    return c


def get_config():
    """The study."""
    c = ConfigDict()
    c.base = base()
    c.sets = dict(noto="data/emoji64_noto.zip")
    c.budget = dict(flops=2e14, seconds=2400.0)  # of a run; 40 minutes of one core
    c.evaluation = dict(samples=1000, on="noto", held_out=400, levels=10)
    c.runs = tuple(
        dict(
            name=f"{name}, {process}", seeds=(0,), phases=(dict(share=1.0, points=1, data="noto", settings=net | more),)
        )
        for name, net in (("U-ViT", UVIT), ("JiT", JIT))
        for process, more in PROCESSES.items()
    )
    return c
