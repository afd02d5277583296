"""Emoji at 64 x 64 by class, a JiT with flow matching: masked pre-training, 75% hidden, then fine-tuning.

    python launch/train.py --config=configs/emoji64.py --config.data.path=emoji64.zip --workdir=runs/emoji64

Data: emoji64.zip of experiments/emoji.py, 7,572 images by two makers. The result is pretrained/emoji64.
Hardware: a CPU core. Expected cost: 97 minutes, of which the masked stage, half of the FLOPs, takes 53.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/emoji64.zip", image_size=64, labels=True, label_dropout=0.1, threads=2)
    c.model.update(network="jit", patch_size=8, width=192, depth=6, heads=6, num_classes=20)  # 64 patches
    c.model.jit.update(bottleneck=64, class_tokens=0, class_tokens_from=0)
    c.stages = ("pretrain", "finetune")
    common = dict(batch_size=32, learning_rate=1e-3, warmup_steps=200)
    c.pretrain = config.stage(steps=22_000, mask=config.patch(rate=0.75), **common)
    c.finetune = config.stage(steps=5500, continues=True, **common)
    c.diffusion.update(process="flow", objective="x0")
    c.sampling.update(method="heun", steps=25, guidance=1.0, guidance_from=0.1)
    c.preview.update(every=4000, rows=20, columns=4)
    c.checkpoint.every = 500
    c.log.every = 100
    return c
