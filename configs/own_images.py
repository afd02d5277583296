"""Your own images at 64 x 64, MaskDM-S: masked pre-training, 50% hidden, then fine-tuning.

    python launch/train.py --config=configs/own_images.py --config.data.path=DIR_OR_ZIP

Hardware: one accelerator of 80 GB or 8 of 16 GB; less with micro_batches or remat.
Expected cost, by arithmetic, not measured: 50k x 256 images x 0.0355 TFLOP
 + 50k x 128 images x 0.0733 TFLOP
= 0.923 EFLOP, about 0.648 hours of one H100 in bfloat16 at 40% of its peak (989 TFLOP/s).
By class, if the images are in a folder per class: --config.data.labels=True --config.model.num_classes=N.
On two CPU cores, an hour for first outlines at 32 x 32: --config.data.image_size=32 --config.model.width=128
--config.model.depth=5 --config.model.heads=4 --config.pretrain.steps=2000 --config.pretrain.batch_size=64
--config.pretrain.learning_rate=1e-3 --config.finetune.steps=4000 --config.finetune.batch_size=64
--config.finetune.learning_rate=2e-3 --config.preview.every=500 --config.sampling.steps=100
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed = 0
    c.init_from = ""  # run folder, checkpoint, .pt or .safetensors to take weights from; "" starts fresh
    c.data = ConfigDict(
        dict(
            path="data/images",  # prepared set, folder, .zip or .tar of images, TFDS data folder, LMDB
            split="",  # of a TFDS data folder
            image_size=64,  # short side resized (bicubic), centre cropped
            channels=3,
            classes=(),  # names of those to use; () for all
            fraction=1.0,  # share of the images to use, drawn once by fraction_seed
            fraction_seed=0,
            labels=False,
            label_dropout=0.0,
            flip=0.5,
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
    c.stages = ("pretrain", "finetune")
    c.pretrain = ConfigDict(
        dict(
            steps=50_000,
            batch_size=256,  # global, over all devices
            micro_batches=1,  # more for less memory: parts of a batch computed one after the other
            remat=False,  # recompute blocks in the backward pass: less memory, a third more work
            learning_rate=2e-4,
            warmup_steps=1000,
            b1=0.99,
            b2=0.99,
            weight_decay=0.03,
            clip_norm=1.0,
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind="block", rate=0.5, block=2, crop=1, tile=0),
        )
    )
    c.finetune = ConfigDict(
        dict(
            steps=50_000,
            batch_size=128,  # global, over all devices
            micro_batches=1,  # more for less memory: parts of a batch computed one after the other
            remat=False,  # recompute blocks in the backward pass: less memory, a third more work
            learning_rate=1e-4,
            warmup_steps=1000,
            b1=0.99,
            b2=0.99,
            weight_decay=0.03,
            clip_norm=1.0,
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind="none", rate=0.0, block=1, crop=1, tile=0),
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
    c.preview = ConfigDict(dict(every=2_000, rows=4, columns=4))
    c.evaluation = ConfigDict(
        dict(
            every=0,  # steps; 0 evaluates never
            n=10_000,  # samples of the EMA
            metrics=("fid",),  # of fid, kid, is, pr
            reference="",  # images to compare with; "" takes those of the training
            inception_weights="",  # path; "" fetches them once
        )
    )
    c.checkpoint = ConfigDict(dict(every=1_000, keep=2))
    c.log = ConfigDict(dict(every=100, tensorboard=True, wandb=False))
    c.mesh = ConfigDict(dict(data=-1, fsdp=1))
    return c
