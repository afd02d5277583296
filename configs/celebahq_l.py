"""CelebA-HQ 256, MaskDM-L on Haar coefficients: masked pre-training, 70% of each band hidden, then fine-tuning.

    python launch/train.py --config=configs/celebahq_l.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 8 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 128 images x 0.973 TFLOP
 + 550k x 16 images x 3.71 TFLOP
= 57.6 EFLOP, about 53.3 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/celebahq256", image_size=256, flip=0.5)
    c.model.update(width=1024, depth=16, heads=16, qv_bias=True, wavelet_scale=1)
    c.stages = ("pretrain", "finetune")
    c.pretrain = config.stage(
        steps=200_000,
        batch_size=128,
        learning_rate=1e-4,
        ema_every=10,
        mask=config.block(rate=0.7, block=4),  # 320 of 1,024 patches, of each band
    )
    c.finetune = config.stage(steps=550_000, batch_size=16, learning_rate=5e-5, ema_every=10)
    return c
