"""CelebA-HQ 256, MaskDM-B: all three stages in a row, 90% hidden, 50% hidden, nothing hidden.

    python launch/train.py --config=configs/celebahq.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 4 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 256 images x 0.269 TFLOP
 + 200k x 64 images x 1.72 TFLOP
 + 200k x 32 images x 4.45 TFLOP
= 64.3 EFLOP, about 59.5 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/celebahq256", image_size=256)
    c.model.update(width=768, depth=12, heads=12)
    c.stages = ("pretrain", "pretrain_50", "finetune")
    c.pretrain = config.stage(
        steps=200_000,
        batch_size=256,
        learning_rate=2e-4,
        mask=config.block(rate=0.9, block=4),  # 416 of 4,096 patches
    )
    c.pretrain_50 = config.stage(
        steps=200_000,
        batch_size=64,
        learning_rate=2e-4,
        warmup_steps=5000,
        mask=config.block(rate=0.5, block=4),  # 2,048 of 4,096 patches
    )
    c.finetune = config.stage(
        steps=200_000,  # the paper gives no number: stop when samples no longer improve
        batch_size=32,
        learning_rate=1e-5,
        warmup_steps=5000,
    )
    return c
