"""The package from Python: recipes, training, and models that sample. `import maskdm_jax` has these functions."""

import pathlib
import runpy

from absl import logging
from ml_collections import ConfigDict

from maskdm_jax import run, sampling
from maskdm_jax.config import Config, parse
from maskdm_jax.errors import ConfigError, prefixed
from maskdm_jax.interop.convert import is_file, read_weights
from maskdm_jax.main import model_path, recipe_path, recipes
from maskdm_jax.parallel import runtime
from maskdm_jax.storage import location


def recipe(name: str, changes: dict | None = None) -> ConfigDict:
    """The settings of a recipe, which you may change before training.

    >>> config = maskdm_jax.recipe("demo", {"pretrain.steps": 100, "pretrain.mask.rate": 0.75})
    >>> config.finetune.learning_rate = 1e-3
    >>> config.pretrain.mask.kind, config.pretrain.mask.rate
    ('patch', 0.75)

    Args:
      name: of a file in `configs/`, such as "celebahq_pretrain" or "celeba64_pretrain:block4_50"; or a path FILE.py.
      changes: values by dotted key, as in --config.KEY=VALUE.

    Raises:
      ConfigError: there is no such recipe, or it does not take the argument.
    """
    file, _, argument = recipe_path(name).partition(":")
    if not pathlib.Path(file).is_file():
        raise ConfigError(f"there is no recipe {name!r}; give the path of a FILE.py or one of {recipes()}")
    with prefixed(ConfigError, f"{name}: "):  # such as an argument that the recipe does not know
        raw = runpy.run_path(file)["get_config"](*[argument] * bool(argument)).to_dict()
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})  # `parse` refuses unknown keys
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {parent} is a setting, not a section of settings")
        section[last] = value
    return ConfigDict(raw)


def train(config: ConfigDict | Config | str, workdir) -> pathlib.Path:
    """Train a run, or resume it from its last checkpoint.

    >>> small = {"model.width": 16, "model.depth": 1, "model.heads": 2, "sampling.steps": 2, "log.every": 1}
    >>> small |= {"stages": ("pretrain",), "pretrain.steps": 4, "pretrain.batch_size": 8, "preview.every": 0}
    >>> last = maskdm_jax.train(maskdm_jax.recipe("demo", small), runs / "small")

    Args:
      config: settings from `recipe`, or the name of a recipe.
      workdir: run folder, on a disk, gs:// or s3://.

    Returns:
      the folder of the last checkpoint, for `load`.

    Raises:
      MaskDMError: settings, data or a checkpoint are at fault; the message says how.
    """
    runtime.keep_freed_memory()
    runtime.keep_compiled_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    config = recipe(config) if isinstance(config, str) else config
    return run.train(config if isinstance(config, Config) else parse(config), workdir)


def load(path, *, weights: str = "ema", heads: int | None = None) -> sampling.TrainedModel:
    """Load a trained model.

    >>> model = maskdm_jax.load(last)
    >>> model.sample(4, labels=[7], seed=1).shape
    (4, 8, 8, 1)

    Args:
      path: run folder (its newest checkpoint), checkpoint folder, or a file: .pt, .pth, .safetensors; or the name of
        a shipped model: "emoji64".
      weights: `ema`, `ema2`, ... or `params`, the raw ones.
      heads: attention heads of a file that does not show them; width / 64 if not given, as in the official models.

    Raises:
      MaskDMError: there is no such checkpoint or file, or it cannot be read.
    """
    path = location(model_path(path))
    if not is_file(path):
        return sampling.load(path, weights=weights)
    config, classes, params = read_weights(path, weights=weights, heads=heads)
    return sampling.from_weights(path, weights, config, classes, params)
