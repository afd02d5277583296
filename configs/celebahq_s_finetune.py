"""CelebA-HQ 256, MaskDM-S: fine-tuning on 1% or 10% of the images (300 or 3,000).

    python launch/train.py --config=configs/celebahq_s_finetune.py --config.data.path=DIR_OR_ZIP --config.init_from=RUN

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 8 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 64 images x 2.42 TFLOP
= 31 EFLOP, about 28.7 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
The images are drawn by data.fraction_seed; the 1% are a subset of the 10%.
From scratch for comparison: --config.init_from="".
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.init_from = "runs/vggface2_pretrain"  # or runs/celebahq_s_pretrain; "" trains from scratch
    c.data.update(
        path="data/celebahq256",
        image_size=256,
        fraction=0.1,  # 3,000 images; 0.01 is 300
        flip=0.5,
    )
    c.model.update(width=512, depth=13, heads=8)
    c.stages = ("finetune",)
    c.finetune = config.stage(steps=200_000, batch_size=64, learning_rate=5e-5, clip_norm=0.0)
    return c
