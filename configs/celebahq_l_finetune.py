"""CelebA-HQ 256, MaskDM-L on Haar coefficients: fine-tuning, nothing hidden (second of two stages).

    python launch/train.py --config=configs/celebahq_l_finetune.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 40 GB or 4 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 550k x 16 images x 3.71 TFLOP
= 32.7 EFLOP, about 30.3 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312.
Before: configs/celebahq_l_pretrain.py.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.init_from = "runs/celebahq_l_pretrain"  # the raw weights of the first stage
    c.data.update(path="data/celebahq256", image_size=256, flip=0.5)
    c.model.update(width=1024, depth=16, heads=16, qv_bias=True, wavelet_scale=1)
    c.stages = ("finetune",)
    c.finetune = config.stage(steps=550_000, batch_size=16, learning_rate=5e-5, ema_every=10)
    return c
