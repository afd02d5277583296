r"""CelebA 64, MaskDM-S: fine-tuning, or training from scratch, with nothing hidden.

    python launch/train.py --config=configs/celeba64_finetune.py --config.data.path=DIR_OR_ZIP \
        --config.init_from=runs/celeba64_block2_50

Data: python launch/prepare_data.py --dataset=celeba --src=DOWNLOADS --out=data/celeba64
Hardware: one accelerator of 16 GB, or a smaller one with micro_batches or remat.
Expected cost, computed, not measured: 200k x 128 images x 0.0733 TFLOP
= 1.88 EFLOP, about 1.74 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
From scratch: leave init_from out.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/celeba64", image_size=64)
    c.model.update(width=512, depth=13, heads=8)
    c.diffusion.schedule = "linear"
    c.stages = ("finetune",)
    c.finetune = config.stage(steps=200_000, batch_size=128, learning_rate=2e-4, clip_norm=0.0)
    return c
