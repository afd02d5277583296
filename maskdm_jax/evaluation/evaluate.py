"""Compare samples with a reference: paths in, numbers out."""

import dataclasses
import logging
import pathlib
import sys

import numpy as np
from tqdm import tqdm

from maskdm_jax.errors import EvaluationError, prefixed
from maskdm_jax.evaluation.features import (
    NETWORKS,
    Extractor,
    Images,
    ImageSet,
    is_checkpoint,
    open_images,
    save_statistics,
)
from maskdm_jax.evaluation.inception import file_hash
from maskdm_jax.evaluation.metrics import METRICS, network_of
from maskdm_jax.parallel import processes
from maskdm_jax.storage import cache_dir, location

log = logging.getLogger(__name__)

_MEANINGFUL = 2048  # images; with fewer, the covariance of the features has no full rank


class Evaluator:
    """Computes the features of references and samples, and caches the statistics of references."""

    def __init__(self, wanted=("fid",), inception_weights="", *, batch_size: int = 64):
        """Load the network of the metrics `wanted`.

        inception_weights: path of FID's Inception weights; "" downloads them once, if they are needed.
        batch_size: images per device and call.

        Raises:
          ValueError: the metrics are unknown or need different networks.
          EvaluationError, TorchFileError, OSError: the weights cannot be found, read or downloaded.
        """
        name = network_of(wanted)
        weights = inception_weights if name == "inception" else ""
        path = location(weights) if weights else NETWORKS[name].fetch_weights()
        self._wanted, self._digest, self.batch_size = wanted, file_hash(path), batch_size
        self._extractor = Extractor(path, NETWORKS[name], batch_size=batch_size)

    def reference(self, images: Images, keep: bool = False) -> ImageSet:
        """Compute what the metrics need of a reference. Statistics of a prepared set are cached on disk.

        Statistics that a file holds beside images are used instead of those of the images.

        keep: return its features even if no metric needs them.

        Raises:
          EvaluationError: statistics from a file are of another network's features.
        """
        return self._compute(images, "reference", keep or "features" in _needs(self._wanted), self._cached(images))

    def samples(self, images: Images, keep: bool = False) -> ImageSet:
        """Compute what the metrics need of samples; otherwise as `reference`, without a cache."""
        return self._compute(images, "samples", keep or _needs(self._wanted) != {"moments"})

    def _cached(self, images: Images) -> pathlib.Path | None:
        """Path of a set's cached statistics, from the hashes of its content and of the weights; None without a card.

        The card of samples is that of the data they were trained on, so they have none of their own.
        """
        content = "" if images.made_by else images.card.get("content_hash")
        return cache_dir("statistics") / f"{content}-{self._digest[:16]}.npz" if content else None

    def _compute(self, images: Images, what: str, keep: bool, cache: pathlib.Path | None = None) -> ImageSet:
        moments = images.moments
        if moments is not None:
            self._extractor.check_statistics(images)
        elif cache is not None and not keep and processes.gather(np.bool_(cache.exists())).all():
            moments = open_images(cache).moments
        if moments is not None and (images.statistics_alone or not keep):
            return ImageSet(images, moments)
        log.info("computing the features of %d images, %s", images.n, images.name)
        with tqdm(total=images.n, desc=what, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            found = self._extractor(images, keep=keep, progress=lambda done: bar.update(done - bar.n))
        if cache is not None and not cache.exists():
            try:
                save_statistics(cache, found.moments)
            except OSError as error:
                log.warning("statistics of %s are not cached: %s", images.name, error)
        return found if moments is None else dataclasses.replace(found, moments=moments)


def evaluate(
    reference,
    samples,
    inception_weights="",
    *,
    wanted: tuple[str, ...] = ("fid",),
    n: int | None = None,
    seeds=(0,),
    batch_size: int = 64,
    weights: str = "ema",
    sampling: dict | None = None,
    statistics=None,
    allow_mismatch: bool = False,
    keep: bool = False,
):
    """Compare samples with a reference; both are paths as `features.open_images` takes them.

    Args:
      inception_weights: path of FID's Inception weights; "" downloads them once, if they are needed.
      wanted: names of `metrics.METRICS`.
      n: number of samples; None for all of a folder.
      seeds: of a checkpoint's samples. With several, each number is their mean and `range` has the lowest and highest.
      batch_size: images per device and call.
      weights, sampling: of a checkpoint, see `sampling.load`.
      statistics: path of an .npz to write the reference's `mu`, `sigma` and `n` to.
      allow_mismatch: compare images even if their sizes, crops, filters or colours differ.
      keep: return the features in the sets even if no metric needs them.

    Returns:
      a dict for JSON with the numbers and what was compared; the reference; the samples (of the last seed). The sets
      are `ImageSet`s.

    Raises:
      EvaluationError, DataError, CheckpointError, TorchFileError, OSError: with a message that says what is wrong.
    """
    if len(seeds) > 1 and not is_checkpoint(samples):
        raise EvaluationError(f"several seeds need a checkpoint to sample from; {samples} holds images")
    options = dict(weights=weights, sampling=sampling, batch_size=batch_size)
    real = open_images(reference, n=n if is_checkpoint(reference) else None, **options)
    made = [open_images(samples, n=n, seed=seed, **options) for seed in seeds]
    check_comparable(real, made[0], wanted, allow_mismatch)
    for side in (real, made[0]):
        count = side.n if side.moments is None else side.moments.n
        if "moments" in _needs(wanted) and 0 < count < _MEANINGFUL:
            warning = "a Frechet distance of %d images (%s) is unreliable; use %d or more, or kid"
            log.warning(warning, count, side.name, _MEANINGFUL)
    evaluator = Evaluator(wanted, inception_weights, batch_size=batch_size)
    real = evaluator.reference(real, keep)
    if statistics:
        save_statistics(statistics, real.moments)
    runs = []
    for images in made:
        sampled = evaluator.samples(images, keep)
        runs.append(compare(real, sampled, wanted))
    result = dict(reference=real.name, reference_n=real.n, samples=sampled.name, n=sampled.n)
    result |= dict(reference_card=real.images.card, made_by=sampled.images.made_by)
    if len(seeds) == 1:
        return result | runs[0], real, sampled
    result |= dict(samples=made[0].made_by["checkpoint"], made_by=sampled.images.made_by | dict(seed=list(seeds)))
    return result | _mean_and_range(runs) | dict(seeds=list(seeds)), real, sampled


def _mean_and_range(runs: list[dict]) -> dict:
    values = {name: [run[name] for run in runs] for name in runs[0]}
    means = {name: float(np.mean(value)) for name, value in values.items()}
    return means | dict(range={name: [min(value), max(value)] for name, value in values.items()})


def check_comparable(reference, samples, wanted, allow_mismatch: bool = False) -> None:
    """Check, before anything is computed, that two sets can be compared by the metrics `wanted`.

    Raises:
      EvaluationError: a metric is unknown or needs images where there are only statistics, or sizes, crops, filters or
        colours differ and `allow_mismatch` is False.
    """
    with prefixed(EvaluationError, "the metric is "):
        network_of(wanted)
    for side, lacking in ((reference, {"features"}), (samples, {"features", "logits"})):
        if side.statistics_alone and _needs(wanted) & lacking:
            raise EvaluationError(
                f"{side.name} holds statistics alone, which are enough for a Frechet distance; kid and the others need "
                "images"
            )
    if allow_mismatch:
        return
    a, b = (_known(side) for side in (reference, samples))
    different = [f"{key}: {a[key]} and {b[key]}" for key in sorted(a.keys() & b.keys()) if a[key] != b[key]]
    if different:
        raise EvaluationError(
            f"{reference.name} and {samples.name} were made differently ({'; '.join(different)}), so the numbers would "
            "mean little; prepare the reference as the training data was, or give --allow_mismatch"
        )


def _known(side: Images) -> dict:
    """How images were made, as far as it is known: the `image` of their card, else the size of the first image."""
    image = dict(side.card.get("image", {}))
    if "size" not in image and side.get is not None:
        height, width = side.get(0).shape[:2]
        image["size"] = height if height == width else f"{width} x {height}"
    return image


def compare(reference: ImageSet, samples: ImageSet, wanted: tuple[str, ...]) -> dict[str, float]:
    """Compute the metrics `wanted`; see `evaluate`.

    Raises:
      EvaluationError: there are too few images for a metric.
    """
    result = {}
    with prefixed(EvaluationError, f"{samples.name} and {reference.name}: "):
        for metric in (METRICS[name] for name in wanted):
            result |= zip(metric.keys, metric.compute(reference, samples), strict=True)
    return result


def _needs(wanted) -> set[str]:
    """What the metrics `wanted` need of the samples: some of moments, features and logits."""
    return {METRICS[name].needs for name in wanted}
