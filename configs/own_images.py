"""Your own images at 64 x 64, MaskDM-S with flow matching: masked pre-training, 75% hidden, then fine-tuning.

    python launch/train.py --config=configs/own_images.py --config.data.path=DIR_OR_ZIP

Hardware: one accelerator of 16 GB, or a smaller one with micro_batches or remat.
Expected cost, computed, not measured: 100k x 256 images x 0.0176 TFLOP
 + 50k x 128 images x 0.0733 TFLOP
= 0.920 EFLOP, about 0.852 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
Class-conditional, with one folder per class: --config.data.labels=True --config.model.num_classes=N.
`own_images.py:cpu` trains 1.1 million parameters at 32 x 32, for two CPU cores.
"""

from maskdm_jax import config


def get_config(size=""):
    if size not in ("", "cpu"):
        raise ValueError(f"there is no size {size!r}; choose cpu, or none")
    c = config.default()
    c.data.update(path="data/images", image_size=64, flip=0.5)
    c.model.update(patch_size=4, width=512, depth=13, heads=8)
    # At equal compute, flow matching with x0-prediction gave the best samples (docs/processes.md, "At equal compute").
    c.diffusion.update(process="flow", objective="x0")
    c.sampling.update(method="heun", steps=50)
    c.stages = ("pretrain", "finetune")
    c.pretrain = config.stage(
        steps=100_000,  # half of the FLOPs; this mask and share were the best in docs/study.md
        batch_size=256,
        learning_rate=2e-4,
        warmup_steps=1000,
        mask=config.patch(rate=0.75),  # 64 of 256 patches
    )
    c.finetune = config.stage(steps=50_000, batch_size=128, learning_rate=1e-4, warmup_steps=1000)
    c.preview.every = 2000
    c.checkpoint.every = 1000
    if size == "cpu":
        c.data.image_size = 32
        c.model.update(width=128, depth=5, heads=4)
        c.pretrain.update(steps=10_000, batch_size=64, learning_rate=1e-3, warmup_steps=200)
        c.finetune.update(steps=2500, batch_size=64, learning_rate=2e-3, warmup_steps=200)
        c.preview.every = c.checkpoint.every = 500
        c.log.every = 25
    return c
