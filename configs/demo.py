"""Handwritten digits, in minutes, on two CPU cores: masked pre-training, fine-tuning, samples by class.

    python launch/train.py --config=configs/demo.py --workdir=runs/demo

Hardware: two CPU cores. Expected cost: 2.7 minutes, of which the masked stage takes 50 seconds.
Expected result: a grid in runs/demo/samples that reads 0 to 9, row by row; the loss ends near 0.16.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed = 0
    c.init_from = ""  # run folder, checkpoint, .pt or .safetensors to take weights from; "" starts fresh
    c.data = ConfigDict(
        dict(
            path="digits",  # the set that comes with the package; or a folder or .zip of images
            split="",  # of a TFDS data folder
            image_size=8,
            channels=1,
            classes=(),  # names of those to use; () for all
            fraction=1.0,  # share of the images to use, drawn once by fraction_seed
            fraction_seed=0,
            labels=True,
            label_dropout=0.0,  # above 0 allows --config.sampling.guidance
            flip=0.0,
            threads=1,
            workers=0,
        )
    )
    c.model = ConfigDict(
        dict(
            patch_size=2,  # 16 patches
            wavelet_scale=0,  # 0: a U-ViT on pixels
            width=64,
            depth=5,
            heads=4,
            mlp_ratio=4.0,
            qv_bias=False,
            num_classes=10,
            time_mlp=False,
            dtype="float32",
            attention="auto",  # or the kernel: plain, side_by_side (CPU), splash (TPU), cudnn
        )
    )
    c.diffusion = ConfigDict(
        dict(
            timesteps=1000,
            schedule="cosine",
            shift_size=64,
            objective="noise",
            loss="l2",
            loss_weight="p2",
            loss_weight_gamma=0.0,
        )
    )
    c.stages = ("pretrain", "finetune")
    c.pretrain = ConfigDict(
        dict(
            steps=1500,
            batch_size=64,
            micro_batches=1,
            remat=False,
            learning_rate=2e-3,
            warmup_steps=100,
            b1=0.9,
            b2=0.99,
            weight_decay=0.03,
            clip_norm=1.0,
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind="patch", rate=0.5, block=1, crop=1, tile=0),
        )
    )
    c.finetune = ConfigDict(
        dict(
            steps=2500,
            batch_size=64,
            micro_batches=1,
            remat=False,
            learning_rate=2e-3,
            warmup_steps=100,
            b1=0.9,
            b2=0.99,
            weight_decay=0.03,
            clip_norm=1.0,
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind="none", rate=0.0, block=1, crop=1, tile=0),
        )
    )
    c.sampling = ConfigDict(dict(method="ddim", steps=100, eta=1.0, order=2, spacing="log_snr", guidance=0.0))
    c.preview = ConfigDict(dict(every=500, rows=10, columns=10))
    c.evaluation = ConfigDict(
        dict(
            every=0,  # steps; 0 evaluates never
            n=1_000,  # samples of the EMA
            metrics=("fid",),  # of fid, kid, is, pr
            reference="",  # images to compare with; "" takes those of the training
            inception_weights="",  # path; "" fetches them once
        )
    )
    c.checkpoint = ConfigDict(dict(every=500, keep=2))
    c.log = ConfigDict(dict(every=50, tensorboard=True, wandb=False))
    c.mesh = ConfigDict(dict(data=-1, fsdp=1))
    return c
