"""CelebA-HQ 256, MaskDM-L on Haar coefficients: masked pre-training, 70% of each band hidden (first of two stages).

    python launch/train.py --config=configs/celebahq_l_pretrain.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 8 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 128 images x 0.973 TFLOP
= 24.9 EFLOP, about 23.1 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312.
Next: configs/celebahq_l_finetune.py.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/celebahq256", image_size=256, flip=0.5)
    c.model.update(width=1024, depth=16, heads=16, qv_bias=True, wavelet_scale=1)
    c.stages = ("pretrain",)
    c.pretrain = config.stage(
        steps=200_000,
        batch_size=128,
        learning_rate=1e-4,
        ema_every=10,
        mask=config.block(rate=0.7, block=4),  # 320 of 1,024 patches, of each band
    )
    return c
