"""ImageNet 64, JiT-B/4: masked pre-training, 75% hidden, then fine-tuning.

    python launch/train.py --config=configs/imagenet64_jit_masked.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=imagenet64 --src=DOWNLOADS --out=data/imagenet64
Hardware: 4 accelerators of 80 GB or 16 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 250.2k x 1024 images x 0.0448 TFLOP
 + 175.1k x 1024 images x 0.151 TFLOP
= 38.5 EFLOP, about 35.7 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
The numbers of steps are ours: the two stages cost as much as 200 epochs without a mask.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/imagenet64", image_size=64, labels=True, label_dropout=0.1, flip=0.5)
    c.model.update(network="jit", patch_size=4, width=768, depth=12, heads=12, num_classes=1000)
    c.diffusion.update(process="flow", objective="x0")
    c.diffusion.flow.noise_scale = 0.25  # image side / 256
    c.sampling.update(method="heun", steps=50, guidance=1.9, guidance_from=0.1)
    c.stages = ("pretrain", "finetune")
    common = dict(
        batch_size=1024,
        learning_rate=2e-4,
        warmup_steps=6_255,  # 5 epochs of 1,281,167 images
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=0.0,
        ema_decay=0.9999,
        more_ema_decays=(0.9996,),
        ema_law="plain",
    )
    c.pretrain = config.stage(steps=250_200, mask=config.block(rate=0.75, block=2), **common)  # 64 of 256 patches
    c.finetune = config.stage(steps=175_100, **common)
    return c
