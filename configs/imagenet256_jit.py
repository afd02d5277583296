"""ImageNet 256, JiT-B/16 as in its paper: 200 epochs, nothing hidden.

    python launch/train.py --config=configs/imagenet256_jit.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --src=IMAGENET --size=256 --crop=adm --labels --out=data/imagenet256
Hardware: 4 accelerators of 80 GB or 16 of 16 GB; fewer or smaller ones with micro_batches or remat.
Expected cost, computed, not measured: 250.2k x 1024 images x 0.152 TFLOP
= 38.9 EFLOP, about 36.0 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s.
"""

from maskdm_jax import config


def get_config():
    c = config.default()
    c.data.update(path="data/imagenet256", image_size=256, labels=True, label_dropout=0.1, flip=0.5)
    c.model.update(network="jit", patch_size=16, width=768, depth=12, heads=12, num_classes=1000)
    c.diffusion.update(process="flow", objective="x0")
    c.diffusion.flow.noise_scale = 1.0  # image side / 256
    c.sampling.update(method="heun", steps=50, guidance=1.9, guidance_from=0.1)
    c.stages = ("train",)
    c.train = config.stage(
        steps=250_200,  # 200 epochs of 1,281,167 images
        batch_size=1024,
        learning_rate=2e-4,
        warmup_steps=6_255,  # 5 epochs
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=0.0,
        ema_decay=0.9999,
        more_ema_decays=(0.9996,),
        ema_law="plain",
    )
    return c
