"""CelebA-HQ 256, MaskDM-B: fine-tuning, nothing hidden (last of three stages).

    python launch/train.py --config=configs/celebahq_finetune.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 4 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 32 images x 4.45 TFLOP
= 28.5 EFLOP, about 26.4 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.init_from = "runs/celebahq_pretrain_50"  # the raw weights of the second stage; "" trains from scratch
    c.data.update(path="data/celebahq256", image_size=256)
    c.model.update(width=768, depth=12, heads=12)
    c.stages = ("finetune",)
    c.finetune = config.stage(
        steps=200_000,  # the paper gives no number: stop when samples no longer improve
        batch_size=32,
        learning_rate=1e-5,
        warmup_steps=5000,
    )
    return c
