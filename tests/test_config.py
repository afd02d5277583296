import json

import pytest
import tiny

from maskdm_jax import config as config_lib
from maskdm_jax import run
from maskdm_jax.build import compute_dtype, make_network
from maskdm_jax.config import parse
from maskdm_jax.errors import ConfigError


def test_round_trip_through_json():
    config = tiny.config()
    assert parse(json.loads(json.dumps(config_lib.to_dict(config)))) == config


def test_stages_keep_their_order_and_unused_sections_are_checked_too():
    config = tiny.config(stages=("finetune",))
    assert list(config.stage) == ["finetune"]
    with pytest.raises(ConfigError, match=r"config.pretrain.step is not a setting; did you mean 'steps'"):
        tiny.config(stages=("finetune",), pretrain__step=3)


def test_settings_left_out_take_their_defaults():
    run = tiny.raw()
    del run["model"]["mlp_ratio"], run["mesh"], run["pretrain"]["mask"]["tile"]
    config = parse(run)
    assert config.model.mlp_ratio == config_lib.Model().mlp_ratio
    assert config.mesh == config_lib.MeshShape()
    assert config.stage["pretrain"].mask == tiny.config().stage["pretrain"].mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__widht=3), r"config.model.widht is not a setting; did you mean 'width'"),
        (dict(pretrain__lr=1), r"config.pretrain.lr is not a setting; known keys"),
        (dict(sede=3), r"config.sede is not a setting; did you mean 'seed'"),
        (dict(pretrain__mask__ratio=0.3), r"config.pretrain.mask.ratio is not a setting; did you mean 'rate'"),
        (dict(model__width="16"), r"config.model.width must be a int, not '16'"),
        (dict(model__width=True), r"config.model.width must be a int, not True"),
        (dict(data__labels=1), r"config.data.labels must be a bool, not 1"),
        (dict(stages=()), r"config.stages is empty.*\['finetune', 'pretrain'\]"),
        (dict(stages=("pretrain", "tune")), r"names 'tune', but the config has only"),
        (dict(stages=("pretrain", "pretrain")), r"names a stage twice"),
        (dict(stages="pretrain"), r"config.stages must be a tuple of names"),
        (dict(model__patch_size=3), r"patch_size is 3; it must be a divisor of data.image_size 8: \[1, 2, 4, 8\]"),
        (dict(model__outer_blocks=2), r"outer_blocks is 2; it must be below half of the 3 blocks"),
        (dict(model__heads=3), r"heads is 3; it must be a divisor of model.width 16"),
        (dict(model__dtype="float16"), r"dtype is 'float16'; it must be one of auto, float32, bfloat16"),
        (dict(model__num_classes=0), "config.data.labels is True but config.model.num_classes is 0; set both"),
        (dict(data__labels=False), "config.data.labels is False but config.model.num_classes is 10; set both"),
        (dict(sampling__steps=1001), r"sampling.steps is 1001; it must be 1 to"),
        (dict(pretrain__micro_batches=3), r"config.pretrain.micro_batches is 3; it must be a divisor of batch_size 8"),
        (dict(sampling__order=4), r"sampling.order is 4; it must be one of 1, 2, 3"),
        (dict(sampling__guidance=-1.0), r"sampling.guidance is -1.0; it must be at least 0"),
        (dict(evaluation__every=-1), "evaluation.every is -1"),
        (dict(data__fraction=0.0), r"data.fraction is 0.0; it must be in \(0, 1\]"),
        (dict(data__classes=("a", "a")), "data.classes is .*; it must be without repetitions"),
        (dict(data__label_dropout=1.0), r"label_dropout is 1.0; it must be in \[0, 1\)"),
        (
            dict(sampling__guidance=1.0, data__labels=False, model__num_classes=0),
            "sampling.guidance needs a conditional model",
        ),
        (dict(pretrain__b1=1.0), r"config.pretrain.b1 is 1.0; it must be in \[0, 1\)"),
        (dict(pretrain__steps=0), r"config.pretrain.steps is 0; it must be at least 1"),
        (dict(pretrain__steps=2**31), r"steps is 2147483648; it must be at least 1 and at most 2,147,483,647"),
        (dict(data__image_size=2**30), r"image_size is 1073741824; it must be .* at most 65,536"),
        (dict(data__channels=0), r"config.data.channels is 0; it must be at least 1"),
        (dict(data__flip=1.5), r"config.data.flip is 1.5; it must be 0 to 1"),
        (dict(pretrain__learning_rate=float("nan")), r"learning_rate is nan; it must be a finite number"),
        (dict(model__mlp_ratio=float("inf")), r"mlp_ratio is inf"),
        (dict(seed=-1), r"seed is -1; it must be in \[0, 2\^31\)"),
        (dict(model__attention="flash"), r"'flash'; it must be one of auto, plain, parallel_heads, splash, cudnn"),
        (
            dict(diffusion__schedule="cos"),
            r"config.diffusion.schedule is 'cos'; it must be one of linear, cosine, shifted_cosine",
        ),
        (dict(diffusion__objective="eps"), r"config.diffusion.objective is 'eps'; it must be one of noise, x0, v"),
        (dict(diffusion__loss="l3"), r"config.diffusion.loss is 'l3'; it must be one of l2, l1"),
        (dict(diffusion__loss_weight="p3"), r"config.diffusion.loss_weight is 'p3'; it must be one of p2, min_snr"),
        (dict(sampling__spacing="even"), r"config.sampling.spacing is 'even'; it must be one of time_uniform"),
        (dict(sampling__method="ddmp"), r"config.sampling.method is 'ddmp'; it must be one of ddim, ddpm, dpm_solver"),
        (dict(diffusion__process="sde"), "config.diffusion.process is 'sde'; it must be one of ddpm, flow, edm"),
        (
            dict(pretrain__mask__kind="blob"),
            "config.pretrain.mask.kind is 'blob'; it must be one of none, patch, block",
        ),
        (dict(model__network="unet"), "config.model.network is 'unet'; it must be one of uvit, jit, FILE.py:NAME"),
        (dict(diffusion__schedule="linear", diffusion__timesteps=10), r"timesteps is 10; it must be more than 20"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__attention="cudnn"), r"attention 'cudnn' is for bfloat16 and heads"),
        (dict(pretrain__mask__tile=-1), r"config.pretrain.mask: mask tile -1"),
        (dict(model__wavelet_scale=1, pretrain__mask__tile=8), r"config.pretrain.mask.tile must be 0"),
        (
            dict(evaluation__metrics=("fid", "lpips")),
            "evaluation.metrics is 'lpips'; it must be one of",
        ),
        (dict(evaluation__metrics=("is",), evaluation__n=9), "evaluation.n is 9; it must be at least 10"),
        (dict(evaluation__metrics=()), "evaluation.metrics is ''; it must be one of"),
        (
            dict(pretrain__mask__kind="block", pretrain__mask__block=3),
            r"config.pretrain.mask: mask block 3 does not divide",
        ),
        (dict(pretrain__mask__rate=1.0), r"config.pretrain.mask: mask rate 1.0 is outside \[0, 1\)"),
    ],
)
def test_what_a_part_refuses_is_said_before_anything_is_written(tmp_path, changes, message):
    """By the network, the masks, the loss, the sampler or the metrics, before data is opened."""
    config = tiny.config(**changes, data__path=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=message):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_of_an_older_version_parses_to_the_same_run(root):
    """`config.json` of a run made before settings had defaults: every key is there, and only known ones."""
    stored = json.loads((root / "tests" / "stored_config.json").read_text())
    config = parse(stored)
    assert config == tiny.config(model__dtype="float32")


def test_dtype_by_platform():
    model, platforms = tiny.config().model, ("cpu", "gpu", "tpu")
    assert [compute_dtype(model, platform) for platform in platforms] == ["float32", "bfloat16", "bfloat16"]
    assert compute_dtype(tiny.config(model__dtype="bfloat16").model, "cpu") == "bfloat16"
    assert make_network(tiny.config()).dtype == "float32"


def test_every_setting_is_shown_as_it_is_given_on_the_command_line():
    lines = config_lib.describe(tiny.config()).splitlines()
    assert "--config.model.width=16                         # width of a token" in lines
    keys = {line.split("=")[0].removeprefix("--config.") for line in lines}
    assert {"pretrain.mask.rate", "finetune.steps", "stages", "seed", "data.path"} <= keys
    assert len(keys) == len(lines)
    (rate,) = (line for line in lines if line.startswith("--config.sampling.weak_rate="))
    assert "skip the inner blocks with weak=sparse" in rate, "a comment that the formatter moved would be lost"


def test_differences():
    old, new = tiny.raw(), tiny.raw(pretrain__mask__rate=0.75, seed=4)
    assert config_lib.differences(old, new) == ["pretrain.mask.rate: 0.5 -> 0.75", "seed: 3 -> 4"]
