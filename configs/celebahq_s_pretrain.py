"""CelebA-HQ 256, MaskDM-S: masked pre-training, 90% hidden.

    python launch/train.py --config=configs/celebahq_s_pretrain.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 40 GB or 2 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 256 images x 0.124 TFLOP
= 6.36 EFLOP, about 5.89 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/celebahq256", image_size=256)
    c.model.update(width=512, depth=13, heads=8)
    c.stages = ("pretrain",)
    c.pretrain = config.stage(
        steps=200_000,
        batch_size=256,
        learning_rate=2e-4,
        mask=config.block(rate=0.9, block=4),  # 416 of 4,096 patches
    )
    return c
