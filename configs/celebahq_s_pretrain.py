"""CelebA-HQ 256, MaskDM-S: masked pre-training, 90% hidden.

    python launch/train.py --config=configs/celebahq_s_pretrain.py --config.data.path=DIR_OR_ZIP

Data: python launch/prepare_data.py --dataset=celebahq --src=DOWNLOADS --out=data/celebahq256
Hardware: one accelerator of 80 GB or 8 of 16 GB; less with micro_batches or remat.
Expected cost, by arithmetic, not measured: 200k x 256 images x 0.124 TFLOP
= 6.36 EFLOP, about 4.47 hours of one H100 in bfloat16 at 40% of its peak (989 TFLOP/s).
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed = 0
    c.init_from = ""  # run folder, checkpoint, .pt or .safetensors to take weights from; "" starts fresh
    c.data = ConfigDict(
        dict(
            path="data/celebahq256",  # prepared set, folder, .zip or .tar of images, TFDS data folder, LMDB
            split="",  # of a TFDS data folder
            image_size=256,  # short side resized (bicubic), centre cropped
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
            schedule="cosine",
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
            clip_norm=1.0,
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind="block", rate=0.9, block=4, crop=1, tile=0),  # 416 of 4,096 patches
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
