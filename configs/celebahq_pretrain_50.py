"""CelebA-HQ 256, MaskDM-B: masked pre-training, 50% hidden (second of three stages).

    python launch/train.py --config=configs/celebahq_pretrain_50.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 4 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 64 images x 1.72 TFLOP
= 22 EFLOP, about 20.4 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.init_from = "runs/celebahq_pretrain"  # the raw weights of the first stage
    c.data.update(path="data/celebahq256", image_size=256)
    c.model.update(width=768, depth=12, heads=12)
    c.stages = ("pretrain",)
    c.pretrain = config.stage(
        steps=200_000,
        batch_size=64,
        learning_rate=2e-4,
        warmup_steps=5000,
        mask=config.block(rate=0.5, block=4),  # 2,048 of 4,096 patches
    )
    return c
