"""The evaluation of a study: distance of samples from real images, and denoising of held-out ones."""

import importlib.util
import pathlib

import numpy as np
from denoising import denoising_by_level
from PIL import Image

from maskdm_jax.config import Config
from maskdm_jax.data.images import Framing, save_png, to_pil
from maskdm_jax.data.sources import open_source, select
from maskdm_jax.errors import ConfigError
from maskdm_jax.evaluation.evaluate import Evaluator, compare
from maskdm_jax.evaluation.features import Images, transform
from maskdm_jax.sampling import load

SHOWN = 24  # samples shown per run
BATCH = 64  # images per call when sampling and extracting features


class StudyEvaluator:
    """Compares the samples of a network with real images, and measures how well it denoises held-out ones."""

    def __init__(self, path: str, study, configs: list[Config]):
        """Read the real images and compute their features.

        Args:
          path: a Python file with `features(images, batch)` -> float [n, d], `frechet(a, b)`, `kid(a, b)` and
            `manifold(reference, samples)` -> dict of floats; "" takes the metrics of EfficientNet-Lite0.
          study: a study config, of which `sets` and `evaluation` are used.
          configs: of all phases of the study. The held-out images are those of the set that no phase trains on.

        Raises:
          ConfigError, DataError: the file or the set does not exist, or no image is held out.
        """
        self._settings, self.names = study.evaluation, ()
        if self._settings.on not in study.sets:
            raise ConfigError(f"config.evaluation.on is {self._settings.on!r}; config.sets has {sorted(study.sets)}")
        place = study.sets[self._settings.on]
        trained_on = [config.data for config in configs if config.data.path == place]
        data = max(trained_on, key=lambda data: data.fraction, default=configs[0].data)
        if len({data.fraction_seed for data in trained_on}) > 1:
            raise ConfigError("phases on one set must draw their part of it with one data.fraction_seed")
        source, framing = open_source(place), Framing.of(data)
        held_out = select(source, (), data.fraction, data.fraction_seed, False, rest=True)
        see = lambda source, n: np.stack(list(transform(self._settings.on, source, framing).iterate(0, n)))
        self._held_out = see(held_out, min(self._settings.held_out, len(held_out)))
        real = see(source, len(source))
        self._compare = _module_comparison(path, real) if path else _lite0_comparison(real)

    def __call__(self, checkpoint: pathlib.Path, picture: pathlib.Path | None) -> dict:
        """Evaluate the EMA of a checkpoint; if `picture` is given, save the first samples there."""
        loaded = load(checkpoint)
        samples = loaded.sample(self._settings.samples, seed=0, batch_size=BATCH)
        if picture:
            save_png(picture, _strip(samples[:SHOWN]))
        found = {name: float(value) for name, value in self._compare(samples).items()}
        self.names = tuple(found)
        levels = denoising_by_level(loaded, self._held_out, levels=self._settings.levels)
        return found | dict(denoising=[round(float(level), 6) for level in levels])


def _strip(images: np.ndarray) -> Image.Image:
    """Images uint8 [n, S, S, C] in rows of twelve, in their own size."""
    n, side = images.shape[:2]
    page = Image.new("RGB", (min(n, 12) * side, -(-n // 12) * side), "white")
    for i, image in enumerate(images):
        page.paste(to_pil(image), (i % 12 * side, i // 12 * side))
    return page


def _module_comparison(path: str, real: np.ndarray):
    """Build samples -> distances, with the functions of a Python file."""
    place = pathlib.Path(path).expanduser()
    if not place.is_file():
        raise ConfigError(f"--evaluator={path}: there is no such file")
    spec = importlib.util.spec_from_file_location("study_evaluator_file", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("features", "frechet", "kid", "manifold") if not hasattr(module, name)]
    if missing:
        raise ConfigError(f"--evaluator={path} has no {', '.join(missing)}; see StudyEvaluator in {__file__}")
    reference = module.features(list(real), BATCH)

    def compare_samples(samples):
        own = module.features(list(samples), BATCH)
        distances = dict(fd=module.frechet(reference, own), kid=module.kid(reference, own))
        return distances | module.manifold(reference, own)

    return compare_samples


def _lite0_comparison(real: np.ndarray):
    """Build samples -> distances, with EfficientNet-Lite0."""
    wanted = ("fd_lite0", "kid_lite0", "pr_lite0")
    evaluator = Evaluator(wanted, batch_size=BATCH)
    images = lambda name, rows: Images(name, len(rows), lambda start, stop: iter(rows[start:stop]))
    reference = evaluator.reference(images("real images", real))

    def compare_samples(samples):
        found = compare(reference, evaluator.samples(images("samples", samples)), wanted)
        return {name.replace("_lite0", ""): value for name, value in found.items()}

    return compare_samples
