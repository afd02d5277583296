"""CelebA-HQ 256, MaskDM-B with EDM's process: masked pre-training, 90% hidden, then fine-tuning.

    python launch/train.py --config=configs/celebahq_edm.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 4 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 200k x 256 images x 0.27 TFLOP
 + 200k x 32 images x 4.49 TFLOP
= 42.5 EFLOP, about 39.4 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
The paper announces score-based models, without a recipe: these are the settings of its first and last stage.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/celebahq256", image_size=256)
    c.model.update(width=768, depth=12, heads=12)
    c.diffusion.update(process="edm", objective="x0")
    c.sampling.update(method="heun", steps=18)
    c.stages = ("pretrain", "finetune")
    c.pretrain = config.stage(
        steps=200_000,
        batch_size=256,
        learning_rate=2e-4,
        mask=config.block(rate=0.9, block=4),  # 416 of 4,096 patches
    )
    c.finetune = config.stage(
        steps=200_000,  # stop when samples no longer improve
        batch_size=32,
        learning_rate=1e-5,
        warmup_steps=5000,
    )
    return c
