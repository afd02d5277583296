r"""CelebA 64, MaskDM-S: masked pre-training with one of the masks that the paper compares.

    python launch/train.py --config=configs/celeba64_pretrain.py:block2_50 --config.data.path=DIR_OR_ZIP \
        --workdir=runs/celeba64_block2_50

Data: python launch/prepare_data.py --dataset=celeba --src=DOWNLOADS --out=data/celeba64
Hardware: one accelerator of 80 GB or 8 of 16 GB; less with micro_batches or remat.
Expected cost, by arithmetic, not measured: 200k x 256 images x 0.0355 TFLOP
= 1.82 EFLOP, about 1.27 hours of one H100 in bfloat16 at 40% of its peak (989 TFLOP/s). (50% hidden)
The name after the colon is one of MASKS below; without it, block2_50.
"""

from ml_collections import ConfigDict

MASKS = {  # name: kind, rate, block, crop; the comment is how many of the 256 patches stay visible
    "patch_10": ("patch", 0.1, 1, 1),  # 231
    "patch_50": ("patch", 0.5, 1, 1),  # 128
    "patch_90": ("patch", 0.9, 1, 1),  # 26
    "block2_10": ("block", 0.1, 2, 1),  # 232
    "block2_50": ("block", 0.5, 2, 1),  # 128
    "block2_90": ("block", 0.9, 2, 1),  # 28
    "block4_10": ("block", 0.1, 4, 1),  # 240
    "block4_50": ("block", 0.5, 4, 1),  # 128
    "block4_90": ("block", 0.9, 4, 1),  # 32
    "block8_50": ("block", 0.5, 8, 1),  # 128
    "crop_10": ("crop", 0.0, 1, 15),  # 225
    "crop_50": ("crop", 0.0, 1, 11),  # 121
    "crop_90": ("crop", 0.0, 1, 5),  # 25
}


def get_config(mask="block2_50"):
    if mask not in MASKS:
        raise ValueError(f"mask {mask!r} is unknown; choose one of {', '.join(MASKS)}")
    kind, rate, block, crop = MASKS[mask]
    c = ConfigDict()
    c.seed = 0
    c.init_from = ""  # run folder, checkpoint, .pt or .safetensors to take weights from; "" starts fresh
    c.data = ConfigDict(
        dict(
            path="data/celeba64",  # prepared set, folder, .zip or .tar of images, TFDS data folder, LMDB
            split="",  # of a TFDS data folder
            image_size=64,  # short side resized (bicubic), centre cropped
            channels=3,
            classes=(),  # names of those to use; () for all
            fraction=1.0,  # share of the images to use, drawn once by fraction_seed
            fraction_seed=0,
            labels=False,
            label_dropout=0.0,
            flip=0.0,
            threads=16,  # reading threads
            workers=0,  # reading processes besides this one
        )
    )
    c.model = ConfigDict(
        dict(
            patch_size=4,
            wavelet_scale=0,  # 0: a U-ViT on pixels
            width=512,
            depth=13,
            heads=8,
            mlp_ratio=4.0,
            qv_bias=False,
            num_classes=0,  # 0: unconditional
            time_mlp=False,
            dtype="float32",  # bfloat16 computes in bfloat16, with float32 weights
            attention="auto",  # or the kernel: plain, side_by_side (CPU), splash (TPU), cudnn
        )
    )
    c.diffusion = ConfigDict(
        dict(
            timesteps=1000,
            schedule="linear",
            shift_size=64,  # for shifted_cosine
            objective="noise",
            loss="l2",
            loss_weight="p2",
            loss_weight_gamma=0.0,  # off
        )
    )
    c.stages = ("pretrain",)
    c.pretrain = ConfigDict(
        dict(
            steps=200_000,
            batch_size=256,  # global, over all devices
            micro_batches=1,  # more for less memory: parts of a batch computed one after the other
            remat=False,  # recompute blocks in the backward pass: less memory, a third more work
            learning_rate=2e-4,
            warmup_steps=0,
            b1=0.99,
            b2=0.99,
            weight_decay=0.03,
            clip_norm=0.0,  # 0: off
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind=kind, rate=rate, block=block, crop=crop, tile=0),
        )
    )
    c.sampling = ConfigDict(
        dict(
            method="ddim",  # ddim, ddpm or dpm_solver
            steps=250,
            eta=1.0,  # of ddim
            order=2,  # of dpm_solver
            spacing="log_snr",  # of dpm_solver
            guidance=0.0,  # of a conditional model trained with label_dropout
        )
    )
    c.preview = ConfigDict(dict(every=10_000, rows=4, columns=4))
    c.evaluation = ConfigDict(
        dict(
            every=0,  # steps; 0 evaluates never
            n=10_000,  # samples of the EMA
            metrics=("fid",),  # of fid, kid, is, pr
            reference="",  # images to compare with; "" takes those of the training
            inception_weights="",  # path; "" fetches them once
        )
    )
    c.checkpoint = ConfigDict(dict(every=10_000, keep=2))
    c.log = ConfigDict(dict(every=100, tensorboard=True, wandb=False))
    c.mesh = ConfigDict(dict(data=-1, fsdp=1))
    return c
