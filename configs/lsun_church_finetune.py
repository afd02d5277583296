"""LSUN church 256, MaskDM-B: fine-tuning of masked pre-trained weights.

    python launch/train.py --config=configs/lsun_church_finetune.py --config.data.path=DIR_OR_ZIP --config.init_from=RUN

Data: python launch/prepare_data.py --dataset=lsun_church --src=DOWNLOADS --out=data/lsun_church256
Hardware: 2 accelerators of 80 GB or 8 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 64 images x 4.45 TFLOP
= 56.9 EFLOP, about 52.7 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
Before: python launch/train.py --config=configs/celebahq_pretrain.py --config.data.path=DIR_OR_ZIP
 --config.diffusion.schedule=linear --workdir=runs/lsun_church_pretrain
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.init_from = "runs/lsun_church_pretrain"  # run or checkpoint of the pre-trained weights; "" trains from scratch
    c.data.update(path="data/lsun_church256", image_size=256, flip=0.5)
    c.model.update(width=768, depth=12, heads=12)
    c.diffusion.schedule = "linear"
    c.stages = ("finetune",)
    c.finetune = config.stage(steps=200_000, batch_size=64, learning_rate=1e-4, warmup_steps=5000, ema_decay=0.9999)
    return c
