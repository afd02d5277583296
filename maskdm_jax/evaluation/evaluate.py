"""Compare samples with a reference: paths in, numbers out."""

import logging
import pathlib
import sys

import numpy as np
from tqdm import tqdm

from maskdm_jax.errors import EvaluationError, prefixed
from maskdm_jax.evaluation import inception, metrics
from maskdm_jax.evaluation.features import (
    Extractor,
    Images,
    ImageSet,
    is_checkpoint,
    open_images,
    save_statistics,
)
from maskdm_jax.evaluation.metrics import METRICS
from maskdm_jax.storage import cache_dir

log = logging.getLogger(__name__)

MEANINGFUL = 2048  # images; with fewer, the covariance of the features has no full rank


class Evaluator:
    """Computes the features of references and samples, and caches the statistics of references."""

    def __init__(self, weights="", *, batch_size: int = 64):
        """weights: path of FID's Inception weights; "" downloads them once. batch_size: images per device and call.

        Raises:
          TorchFileError, OSError: the weights cannot be read or downloaded.
        """
        path = pathlib.Path(weights).expanduser() if weights else inception.fetch_weights()
        self._digest = inception.file_hash(path)
        self.batch_size = batch_size
        self._extractor = Extractor(inception.load_weights(path), batch_size=batch_size)

    def reference(self, images: Images | ImageSet, wanted=("fid",), keep: bool = False) -> ImageSet:
        """Compute what the metrics `wanted` need of a reference. Statistics of a prepared set are cached on disk.

        keep: return its features even if no metric needs them.

        Raises:
          EvaluationError: statistics from a file are of another network's features.
        """
        if isinstance(images, ImageSet):
            self._extractor.check_statistics(images)
            return images
        keep = keep or bool(set(wanted) & {"kid", "pr"})
        path = self._cached(images)
        if path is not None and path.exists() and not keep:
            return ImageSet(images, open_images(path).moments)
        found = self._extract(images, "reference", keep)
        if path is not None and not path.exists():
            try:
                save_statistics(path, found.moments)
            except OSError as error:
                log.warning("statistics of %s are not cached: %s", images.name, error)
        return found

    def samples(self, images: Images | ImageSet, wanted=("fid",), keep: bool = False) -> ImageSet:
        """Compute what the metrics `wanted` need of samples; otherwise as `reference`, without a cache."""
        if isinstance(images, ImageSet):
            self._extractor.check_statistics(images)
            return images
        return self._extract(images, "samples", keep or bool(set(wanted) - {"fid"}))

    def _cached(self, images: Images) -> pathlib.Path | None:
        """Path of a set's cached statistics, from the hashes of its content and of the weights; None without a card."""
        content = images.card.get("content_hash")
        return cache_dir("statistics") / f"{content}-{self._digest[:16]}.npz" if content else None

    def _extract(self, images: Images, what: str, keep: bool) -> ImageSet:
        with tqdm(total=images.n, desc=what, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            return self._extractor(images, keep=keep, progress=lambda done: bar.update(done - bar.n))


def evaluate(
    reference,
    samples,
    weights="",
    *,
    wanted: tuple[str, ...] = ("fid",),
    n: int | None = None,
    seeds=(0,),
    batch_size: int = 64,
    sampling: dict | None = None,
    statistics=None,
    allow_mismatch: bool = False,
    keep: bool = False,
):
    """Compare samples with a reference; both are paths as `features.open_images` takes them.

    Args:
      weights: path of FID's Inception weights; "" downloads them once.
      wanted: names of `metrics.METRICS`: `fid`, `kid`, `is` (Inception Score), `pr` (precision and recall).
      n: number of samples; None for all of a folder.
      seeds: of a checkpoint's samples. With several, each number is their mean and `range` has the lowest and highest.
      batch_size: images per device and call.
      sampling: replaces fields of a checkpoint's `sampling`.
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
    options = dict(sampling=sampling, batch_size=batch_size)
    real = open_images(reference, n=n if is_checkpoint(reference) else None, **options)
    made = [open_images(samples, n=n, seed=seed, **options) for seed in seeds]
    check_comparable(real, made[0], wanted, allow_mismatch)
    if "fid" in wanted:
        _warn_of_few(real, made[0])
    evaluator = Evaluator(weights, batch_size=batch_size)
    real = evaluator.reference(real, wanted, keep)
    if statistics:
        save_statistics(statistics, real.moments)
    runs = []
    for images in made:
        sampled = evaluator.samples(images, wanted, keep)
        runs.append(compare(real, sampled, wanted))
    result = dict(reference=real.name, reference_n=real.n, samples=sampled.name, n=sampled.n)
    result |= dict(reference_card=real.images.card, made_by=sampled.images.made_by)
    if len(seeds) == 1:
        return result | runs[0], real, sampled
    result |= dict(samples=made[0].made_by["checkpoint"], made_by=sampled.images.made_by | dict(seed=list(seeds)))
    values = {name: [run[name] for run in runs] for name in runs[0]}
    means = {name: float(np.mean(value)) for name, value in values.items()}
    ranges = {name: [min(value), max(value)] for name, value in values.items()}
    return result | means | dict(seeds=list(seeds), range=ranges), real, sampled


def _warn_of_few(*sides: Images | ImageSet) -> None:
    for side in sides:
        if 0 < side.n < MEANINGFUL:
            log.warning("FID of %d images (%s) is unreliable: it needs at least 2,048; use kid", side.n, side.name)


def check_comparable(reference, samples, wanted, allow_mismatch: bool = False) -> None:
    """Check, before anything is computed, that two sets can be compared by the metrics `wanted`.

    Raises:
      EvaluationError: a metric is unknown or needs images where there are only statistics; there are fewer than two
        images; or sizes, crops, filters or colours differ and `allow_mismatch` is False.
    """
    unknown = [name for name in wanted if name not in METRICS]
    if unknown or not wanted:
        raise EvaluationError(f"metrics {unknown} are unknown; choose from {', '.join(METRICS)}")
    if set(wanted) & {"kid", "pr"} and isinstance(reference, ImageSet):
        raise EvaluationError(f"KID and precision/recall need images, but {reference.name} holds statistics alone")
    if set(wanted) - {"fid"} and isinstance(samples, ImageSet):
        raise EvaluationError(f"{samples.name} holds statistics alone, which are enough for fid only")
    for side in (reference, samples):
        if isinstance(side, Images) and side.n < 2:
            raise EvaluationError(f"{side.name} has {side.n} images; at least 2 are needed")
    if allow_mismatch:
        return
    a, b = (known(side) for side in (reference, samples))
    different = [f"{key}: {a[key]} and {b[key]}" for key in sorted(a.keys() & b.keys()) if a[key] != b[key]]
    if different:
        raise EvaluationError(
            f"{reference.name} and {samples.name} were made differently ({'; '.join(different)}), so the numbers would "
            "mean little; prepare the reference as the training data was, or give --allow_mismatch"
        )


def known(side: Images | ImageSet) -> dict:
    """How images were made, as far as it is known: the `image` of their card, and their size."""
    if isinstance(side, ImageSet):
        return {}
    image = dict(side.card.get("image", {}))
    if "size" not in image and side.size is not None:
        sizes = sorted({side.size(i) for i in range(side.n)})
        text = ", ".join(f"{width} x {height}" for width, height in sizes[:5])
        text += f", ... ({len(sizes)} sizes)" if len(sizes) > 5 else ""
        image["size"] = sizes[0][0] if len(sizes) == 1 and len(set(sizes[0])) == 1 else text
    return image


def compare(reference: ImageSet, samples: ImageSet, wanted: tuple[str, ...]) -> dict[str, float]:
    """Compute the metrics `wanted`; see `evaluate`.

    Raises:
      EvaluationError: there are too few images for a metric.
    """
    result = {}
    with prefixed(EvaluationError, f"{samples.name} and {reference.name}: "):
        if "fid" in wanted:
            result["fid"] = metrics.frechet_distance(reference.moments, samples.moments)
        if "kid" in wanted:
            result["kid"], result["kid_std"] = metrics.kernel_distance(reference.features, samples.features)
        if "is" in wanted:
            result["is"], result["is_std"] = metrics.inception_score(samples.logits)
        if "pr" in wanted:
            result["precision"], result["recall"] = metrics.precision_recall(reference.features, samples.features)
    return result
