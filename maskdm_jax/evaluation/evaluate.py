"""A reference and samples in, numbers out."""

import io
import sys

import numpy as np
from tqdm import tqdm

from maskdm_jax.evaluation import inception, metrics
from maskdm_jax.evaluation.features import EvaluationError, Extractor, ImageSet, is_checkpoint, load_set
from maskdm_jax.observe import write_atomically


def evaluate(
    reference,
    samples,
    inception_weights,
    *,
    wanted: tuple[str, ...] = ("fid",),
    n: int | None = None,
    seeds=(0,),
    batch_size: int = 64,
    sampling: dict | None = None,
    save_statistics=None,
) -> dict:
    """Compare samples with a reference; both are paths as `features.load_set` takes them.

    Args:
      inception_weights: path of FID's Inception weights.
      wanted: of `fid`, `kid`, `is` (Inception Score) and `pr` (precision and recall).
      n: number of samples; all of a folder when None.
      seeds: of a checkpoint's samples. With several, each number is their mean, and `range` holds lowest and highest.
      sampling: replaces fields of a checkpoint's `sampling`.
      save_statistics: path of an .npz for the reference's `mu`, `sigma` and `n`.

    Returns:
      what was compared and the numbers, ready for JSON.

    Raises:
      EvaluationError, DataError, CheckpointError, TorchFileError: it cannot be done; the message says why.
    """
    if len(seeds) > 1 and not is_checkpoint(samples):
        raise EvaluationError(f"several seeds need a checkpoint to sample from; {samples} holds images")
    extractor = Extractor(inception.load_weights(inception_weights), batch_size=batch_size)
    real = _load(reference, extractor, "reference", n=n if is_checkpoint(reference) else None)
    if save_statistics:
        _save(save_statistics, real)
    runs = []
    for seed in seeds:
        made = _load(samples, extractor, "samples", n=n, seed=seed, sampling=sampling)
        runs.append(compare(real, made, wanted))
    result = dict(reference=real.name, reference_n=real.n, samples=made.name, n=made.n)
    if len(seeds) == 1:
        return result | runs[0]
    values = {name: [run[name] for run in runs] for name in runs[0]}
    ranges = {name: [min(value), max(value)] for name, value in values.items()}
    return (
        result | {name: float(np.mean(value)) for name, value in values.items()} | dict(seeds=list(seeds), range=ranges)
    )


def compare(reference: ImageSet, samples: ImageSet, wanted: tuple[str, ...]) -> dict[str, float]:
    """The numbers wanted; see `evaluate`."""
    if set(wanted) & {"kid", "pr"} and reference.features is None:
        raise EvaluationError(f"KID and precision/recall need images, but {reference.name} holds statistics alone")
    if set(wanted) - {"fid"} and samples.features is None:
        raise EvaluationError(f"{samples.name} holds statistics alone, which are enough for fid only")
    result = {}
    if "fid" in wanted:
        result["fid"] = metrics.frechet_distance(reference.moments, samples.moments)
    if "kid" in wanted:
        result["kid"], result["kid_std"] = metrics.kernel_distance(reference.features, samples.features)
    if "is" in wanted:
        result["is"], result["is_std"] = metrics.inception_score(samples.logits)
    if "pr" in wanted:
        result["precision"], result["recall"] = metrics.precision_recall(reference.features, samples.features)
    return result


def _load(path, extractor: Extractor, what: str, **options) -> ImageSet:
    with tqdm(desc=what, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        return load_set(path, extractor, progress=lambda done: bar.update(done - bar.n), **options)


def _save(path, images: ImageSet) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, mu=images.moments.mu, sigma=images.moments.sigma, n=images.n)
    write_atomically(path, buffer.getvalue())
