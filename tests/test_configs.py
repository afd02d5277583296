"""Every shipped config is complete, runs and is the recipe that it says it is."""

import ast
import dataclasses
import importlib.util
import pathlib
import typing

import jax
import pytest

from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network, mask_plans

NAMES = [
    "celeba64_finetune",
    "celeba64_pretrain",
    "celebahq",
    "celebahq_edm",
    "celebahq_finetune",
    "celebahq_l",
    "celebahq_pretrain",
    "celebahq_pretrain_50",
    "celebahq_s_finetune",
    "celebahq_s_pretrain",
    "cifar10",
    "demo",
    "emoji64",
    "imagenet256_jit",
    "imagenet256_jit_masked",
    "imagenet512_jit",
    "imagenet64_jit_masked",
    "lsun_church_finetune",
    "own_images",
    "vggface2_pretrain",
]


def load(root, name, *args):
    spec = importlib.util.spec_from_file_location(name, root / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def test_the_list_above_is_complete(root):
    assert sorted(path.stem for path in (root / "configs").glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_is_complete_and_says_how_to_run_it(root, name):
    config = config_lib.parse(load(root, name))
    assert config_lib.parse(config_lib.to_dict(config)) == config
    text = ast.get_docstring(ast.parse((root / "configs" / f"{name}.py").read_text()))
    assert f"python launch/train.py --config=configs/{name}.py" in text
    assert "Hardware" in text
    assert "xpected cost" in text
    make_network(config).abstract_params()


def test_own_images_for_a_cpu(root):
    config = config_lib.parse(load(root, "own_images", "cpu"))
    assert sum(leaf.size for leaf in jax.tree.leaves(make_network(config).abstract_params())) < 1.3e6
    with pytest.raises(ValueError, match="there is no size 'gpu'; choose cpu"):
        load(root, "own_images", "gpu")


# Of the reference's recipe table: size, images, batch, rate, warm-up, clip, EMA, schedule, visible, flip.
B, S, L = (768, 12, 12), (512, 13, 8), (1024, 16, 16)
RECIPES = {
    "celebahq_pretrain": [("pretrain", B, 256, 256, 2e-4, 0, 1.0, 0.999, "cosine", 416, 0)],
    "celebahq_pretrain_50": [("pretrain", B, 256, 64, 2e-4, 5000, 1.0, 0.999, "cosine", 2048, 0)],
    "celebahq_finetune": [("finetune", B, 256, 32, 1e-5, 5000, 1.0, 0.999, "cosine", 4096, 0)],
    "celebahq": [
        ("pretrain", B, 256, 256, 2e-4, 0, 1.0, 0.999, "cosine", 416, 0),
        ("pretrain_50", B, 256, 64, 2e-4, 5000, 1.0, 0.999, "cosine", 2048, 0),
        ("finetune", B, 256, 32, 1e-5, 5000, 1.0, 0.999, "cosine", 4096, 0),
    ],
    "lsun_church_finetune": [("finetune", B, 256, 64, 1e-4, 5000, 1.0, 0.9999, "linear", 4096, 0.5)],
    "vggface2_pretrain": [("pretrain", S, 256, 256, 2e-4, 0, 1.0, 0.999, "cosine", 416, 0)],
    "celebahq_s_pretrain": [("pretrain", S, 256, 256, 2e-4, 0, 1.0, 0.999, "cosine", 416, 0)],
    "celebahq_s_finetune": [("finetune", S, 256, 64, 5e-5, 0, 0.0, 0.999, "cosine", 4096, 0.5)],
    "celeba64_pretrain": [("pretrain", S, 64, 256, 2e-4, 0, 0.0, 0.999, "linear", 128, 0)],
    "celebahq_l": [
        ("pretrain", L, 256, 128, 1e-4, 0, 1.0, 0.999, "cosine", 2 * 320, 0.5),
        ("finetune", L, 256, 16, 5e-5, 0, 1.0, 0.999, "cosine", 2 * 1024, 0.5),
    ],
    "celeba64_finetune": [("finetune", S, 64, 128, 2e-4, 0, 0.0, 0.999, "linear", 256, 0)],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(root, name):
    config = config_lib.parse(load(root, name))
    assert config.model.patch_size == 4
    assert list(config.stage) == [recipe[0] for recipe in RECIPES[name]]
    for stage_name, size, images, batch, rate, warmup, clip, ema, schedule, visible, flip in RECIPES[name]:
        stage = config.stage[stage_name]
        assert (config.model.width, config.model.depth, config.model.heads) == size
        assert (config.data.image_size, config.data.flip) == (images, flip)
        assert (stage.batch_size, stage.learning_rate, stage.warmup_steps, stage.clip_norm) == (
            batch,
            rate,
            warmup,
            clip,
        )
        assert (stage.b1, stage.b2, stage.weight_decay, stage.ema_decay) == (0.99, 0.99, 0.03, ema)
        assert (config.diffusion.schedule, config.diffusion.objective, config.diffusion.loss) == (
            schedule,
            "noise",
            "l2",
        )
        assert sum(plan.visible for plan in mask_plans(config, stage_name)) == visible
        assert stage.steps == (550_000 if (size, stage_name) == (L, "finetune") else 200_000)
        assert (stage.ema_every, config.model.qv_bias, config.model.wavelet_scale) == (
            (10, True, 1) if size == L else (1, False, 0)
        )


@pytest.mark.parametrize(
    "name", ["imagenet256_jit", "imagenet256_jit_masked", "imagenet512_jit", "imagenet64_jit_masked"]
)
def test_jit_recipes(root, name):
    """Those of the JiT paper: batch, rate, warm-up, betas, EMAs, times, noise and guidance."""
    config = config_lib.parse(load(root, name))
    for stage in config.stage.values():
        assert (stage.batch_size, stage.learning_rate, stage.warmup_steps) == (1024, 2e-4, 6255)
        assert (stage.b1, stage.b2, stage.weight_decay, stage.clip_norm) == (0.9, 0.95, 0.0, 0.0)
        assert (stage.ema_decay, stage.more_ema_decays, stage.ema_law) == (0.9999, (0.9996,), "plain")
    flow, sampling = config.diffusion.flow, config.sampling
    assert (flow.times, flow.mean, flow.std, flow.noise_scale) == (
        "logit_normal", -0.8, 0.8, config.data.image_size / 256
    )  # fmt: skip
    assert (sampling.method, sampling.steps, sampling.guidance, sampling.guidance_from) == ("heun", 50, 1.9, 0.1)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "parameters"), [(256, 16, (131, 459, 953)), (512, 32, (133, 462, 956))]
)
def test_sizes_of_the_jit_paper(image_size, patch_size, parameters):
    """In millions, of JiT-B, L and H."""
    shapes = [(768, 12, 12, 128, 4), (1024, 24, 16, 128, 8), (1280, 32, 16, 256, 10)]
    for (width, depth, heads, bottleneck, start), expected in zip(shapes, parameters, strict=True):
        c = config_lib.default()
        c.data.update(path="digits", image_size=image_size, labels=True)
        c.model.update(network="jit", patch_size=patch_size, width=width, depth=depth, heads=heads, num_classes=1000)
        c.model.jit.update(bottleneck=bottleneck, class_tokens_from=start)
        c.stages, c.stage = ("stage",), config_lib.stage()
        params = make_network(config_lib.parse(c)).abstract_params()
        fixed = (image_size // patch_size) ** 2 * width  # the authors count the fixed position embedding
        assert round((sum(leaf.size for leaf in jax.tree.leaves(params)) + fixed) / 1e6) == expected


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        *(("patch_10", 231), ("patch_50", 128), ("patch_90", 26)),
        *(("block2_10", 232), ("block2_50", 128), ("block2_90", 28)),
        *(("block4_10", 240), ("block4_50", 128), ("block4_90", 32), ("block8_50", 128)),
        *(("crop_10", 225), ("crop_50", 121), ("crop_90", 25)),
    ],
)
def test_masks_of_celeba64(root, mask, visible):
    config = config_lib.parse(load(root, "celeba64_pretrain", mask))
    assert mask_plans(config, "pretrain")[0].visible == visible


def test_every_setting_is_explained():
    """Each field of the schema has a comment on its line or a name that needs none."""
    plain = {
        "network",
        "jit",
        "flow",
        "edm",
        "patch_size",
        "width",
        "heads",
        "mlp_ratio",
        "qv_bias",
        "schedule",
        "process",
        "loss",
        "kind",
        "timesteps",
        "steps",
        "seed",
    }
    plain |= {
        "learning_rate",
        "warmup_steps",
        "b1",
        "b2",
        "weight_decay",
        "ema_decay",
        "ema_every",
        "mask",
        "tensorboard",
    }
    lines = pathlib.Path(config_lib.__file__).read_text().splitlines()
    for cls in (config_lib.Data, config_lib.Model, config_lib.Diffusion, config_lib.Mask, config_lib.Stage):
        hints = typing.get_type_hints(cls)
        assert hints.keys() == {field.name for field in dataclasses.fields(cls)}
        for name in hints.keys() - plain:
            assert any(line.startswith(f"    {name}: ") and "#" in line for line in lines), name
