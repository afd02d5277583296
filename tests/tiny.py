"""The smallest run that still has two stages, classes and a mask: a few steps on the digits."""

import copy

from maskdm_jax import config as config_lib

STAGE = dict(
    steps=4,
    batch_size=8,
    micro_batches=1,
    remat=False,
    learning_rate=1e-3,
    warmup_steps=2,
    b1=0.9,
    b2=0.99,
    weight_decay=0.03,
    clip_norm=1.0,
    ema_decay=0.9,
    ema_every=1,
    mask=dict(kind="patch", rate=0.5, block=1, crop=1, tile=0),
)
RUN = dict(
    seed=3,
    init_from="",
    data=dict(
        path="digits",
        split="",
        image_size=8,
        channels=1,
        classes=(),
        fraction=1.0,
        fraction_seed=0,
        labels=True,
        label_dropout=0.0,
        flip=0.5,
        threads=1,
        workers=0,
    ),
    model=dict(
        patch_size=2,
        wavelet_scale=0,
        width=16,
        depth=3,
        heads=2,
        mlp_ratio=2.0,
        qv_bias=True,
        num_classes=10,
        time_mlp=True,
        dtype="float32",
        attention="auto",
    ),
    diffusion=dict(
        timesteps=1000,
        schedule="cosine",
        shift_size=64,
        objective="noise",
        loss="l2",
        loss_weight="p2",
        loss_weight_gamma=0.0,
    ),
    sampling=dict(method="ddim", steps=3, eta=1.0, order=2, spacing="log_snr", guidance=0.0),
    preview=dict(every=0, rows=2, columns=4),
    evaluation=dict(every=0, n=8, metrics=("fid",), reference="", inception_weights=""),
    checkpoint=dict(every=2, keep=1),
    log=dict(every=1, tensorboard=False, wandb=False),
    mesh=dict(data=-1, fsdp=1),
    stages=("pretrain", "finetune"),
    pretrain=STAGE,
    finetune=STAGE | dict(steps=2, mask=dict(kind="none", rate=0.0, block=1, crop=1, tile=0)),
)


def raw(**changes) -> dict:
    """RUN with changes by dotted key, written with __ for the dot: raw(pretrain__mask__rate=0.3)."""
    run = copy.deepcopy(RUN)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = run
        for parent in parents:
            node = node[parent]
        node[last] = value
    return run


def config(**changes):
    """The parsed config of `raw`."""
    return config_lib.parse(raw(**changes))
