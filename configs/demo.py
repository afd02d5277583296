"""Handwritten digits in minutes on two CPU cores: masked pre-training, fine-tuning, samples by class.

    python launch/train.py --config=configs/demo.py --workdir=runs/demo

Hardware: two CPU cores. Expected cost: 2.7 minutes, of which the masked stage takes 50 seconds.
Expected result: the rows of the last grid in runs/demo/samples show the digits 0 to 9; the final loss is near 0.32.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="digits", image_size=8, channels=1, labels=True, threads=1)
    c.model.update(patch_size=2, width=64, depth=5, heads=4, num_classes=10)  # 16 patches
    c.stages = ("pretrain", "finetune")
    common = dict(batch_size=64, learning_rate=2e-3, warmup_steps=100, b1=0.9)
    c.pretrain = config.stage(steps=1500, mask=config.patch(rate=0.5), **common)
    c.finetune = config.stage(steps=2500, **common)
    c.diffusion.update(process="flow", objective="x0")
    c.sampling.update(method="heun", steps=50)
    c.preview.update(every=500, rows=10, columns=10)
    c.evaluation.n = 1_000
    c.checkpoint.every = 500
    c.log.every = 50
    return c
