r"""CelebA 64, MaskDM-S: masked pre-training with one of the masks that the paper compares.

    python launch/train.py --config=configs/celeba64_pretrain.py:block2_50 --config.data.path=DIR_OR_ZIP \
        --workdir=runs/celeba64_block2_50

Data: python launch/prepare_data.py --dataset=celeba --src=DOWNLOADS --out=data/celeba64
Hardware: one accelerator of 16 GB, or a smaller one with micro_batches or remat.
Expected cost, computed, not measured: 200k x 256 images x 0.0355 TFLOP
= 1.82 EFLOP, about 1.69 hours of one H100 at 300 TFLOP/s; docs/speed.md measures 228 and 312 TFLOP/s. (50% hidden)
The name after the colon is one of MASKS below; the default is block2_50.
"""

from maskdm_jax import config

MASKS = {  # comments: number of visible patches, of 256
    "patch_10": config.patch(rate=0.1),  # 231
    "patch_50": config.patch(rate=0.5),  # 128
    "patch_90": config.patch(rate=0.9),  # 26
    "block2_10": config.block(rate=0.1, block=2),  # 232
    "block2_50": config.block(rate=0.5, block=2),  # 128
    "block2_90": config.block(rate=0.9, block=2),  # 28
    "block4_10": config.block(rate=0.1, block=4),  # 240
    "block4_50": config.block(rate=0.5, block=4),  # 128
    "block4_90": config.block(rate=0.9, block=4),  # 32
    "block8_50": config.block(rate=0.5, block=8),  # 128
    "crop_10": config.crop(15),  # 225
    "crop_50": config.crop(11),  # 121
    "crop_90": config.crop(5),  # 25
}


def get_config(mask="block2_50"):
    if mask not in MASKS:
        raise ValueError(f"mask {mask!r} is unknown; choose one of {', '.join(MASKS)}")
    c = config.default()
    c.data.update(path="data/celeba64", image_size=64)
    c.model.update(width=512, depth=13, heads=8)
    c.diffusion.schedule = "linear"
    c.stages = ("pretrain",)
    c.pretrain = config.stage(steps=200_000, batch_size=256, learning_rate=2e-4, clip_norm=0.0, mask=MASKS[mask])
    return c
