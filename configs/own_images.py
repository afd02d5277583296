"""Your own images at 64 x 64, MaskDM-S with flow matching: masked pre-training, 50% hidden, then fine-tuning.

    python launch/train.py --config=configs/own_images.py --config.data.path=DIR_OR_ZIP

Hardware: one accelerator of 80 GB or 8 of 16 GB; less with micro_batches or remat.
Expected cost, computed, not measured: 50k x 256 images x 0.0355 TFLOP
 + 50k x 128 images x 0.0733 TFLOP
= 0.923 EFLOP, about 0.648 hours of one H100 in bfloat16 at 40% of its peak (989 TFLOP/s).
Class-conditional, with one folder per class: --config.data.labels=True --config.model.num_classes=N.
On two CPU cores at 32 x 32: --config.data.image_size=32 --config.model.width=128
--config.model.depth=5 --config.model.heads=4 --config.pretrain.steps=2000 --config.pretrain.batch_size=64
--config.pretrain.learning_rate=1e-3 --config.finetune.steps=4000 --config.finetune.batch_size=64
--config.finetune.learning_rate=2e-3 --config.preview.every=500
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/images", image_size=64, flip=0.5)
    c.model.update(patch_size=4, width=512, depth=13, heads=8)
    # At equal compute, flow matching with x0-prediction gave the best samples (docs/processes.md, "At equal compute").
    c.diffusion.update(process="flow", objective="x0")
    c.sampling.update(method="heun", steps=50)
    c.stages = ("pretrain", "finetune")
    c.pretrain = config.stage(
        steps=50_000,
        batch_size=256,
        learning_rate=2e-4,
        warmup_steps=1000,
        mask=config.block(rate=0.5, block=2),  # 128 of 256 patches
    )
    c.finetune = config.stage(steps=50_000, batch_size=128, learning_rate=1e-4, warmup_steps=1000)
    c.preview.every = 2000
    c.checkpoint.every = 1000
    return c
