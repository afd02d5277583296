"""The smallest run that still has two stages, classes and a mask: a few steps on the digits."""

from maskdm_jax import config as config_lib

STAGE = dict(steps=4, batch_size=8, learning_rate=1e-3, warmup_steps=2, b1=0.9, ema_decay=0.9)
WAVELET = dict(model__wavelet_scale=1, model__patch_size=1)  # changes for `raw`
JIT = dict(model__network="jit", model__jit=dict(bottleneck=4, class_tokens=3, class_tokens_from=1))
MODEL = dict(patch_size=2, width=16, depth=3, heads=2, mlp_ratio=2.0, qv_bias=True, num_classes=10, time_mlp=True)


def raw(**changes) -> dict:
    """The run's settings, with changes by dotted key, written with __ for the dot: raw(pretrain__mask__rate=0.3)."""
    c = config_lib.default()
    c.seed = 3
    c.data.update(path="digits", image_size=8, channels=1, labels=True, flip=0.5, threads=1)
    c.model.update(MODEL)
    c.sampling.steps = 3
    c.preview.update(every=0, rows=2, columns=4)
    c.evaluation.n = 8
    c.checkpoint.update(every=2, keep=1)
    c.log.update(every=1, tensorboard=False)
    c.stages = ("pretrain", "finetune")
    c.pretrain = config_lib.stage(**STAGE, mask=config_lib.patch(0.5))
    c.finetune = config_lib.stage(**STAGE | dict(steps=2))
    run = c.to_dict()
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
