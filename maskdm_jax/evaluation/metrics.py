"""Metrics that compare two sets of images by their features, in NumPy and float64.

Features are [n, d] arrays, one row per image.
"""

import dataclasses
import typing

import numpy as np
import scipy.linalg
import scipy.special

from maskdm_jax.errors import ConfigError, prefixed


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean [d] and covariance [d, d] (normalized by n - 1) of n features, as in `.npz` statistics."""

    n: int
    mu: np.ndarray
    sigma: np.ndarray


class MomentSums:
    """Running sums for `Moments`, so that features need not be kept."""

    def __init__(self, dim: int):
        self._n, self._sum, self._products = 0, np.zeros(dim), np.zeros((dim, dim))
        self._origin = None

    def add(self, features) -> None:
        """Add features [n, d]."""
        x = np.asarray(features, np.float64)
        if self._origin is None:
            self._origin = x.mean(axis=0)  # near the mean, so that the subtraction in `parts` loses no digits
        x = x - self._origin
        self._n += len(x)
        self._sum += x.sum(axis=0)
        self._products += x.T @ x

    def parts(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(n, mean, sum of products about the mean), the input of `combine`."""
        if not self._n:
            return 0, self._sum, self._products
        mean = self._sum / self._n
        return self._n, self._origin + mean, self._products - self._n * np.outer(mean, mean)


def combine(parts) -> Moments:
    """Moments of the union of several sets, such as those of several hosts (Chan et al. 1979).

    Raises:
      ValueError: it has fewer than two images.
    """
    parts = [part for part in parts if part[0]]
    total = int(sum(n for n, _, _ in parts))
    if total < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {total}")
    mu = sum(n * mean for n, mean, _ in parts) / total
    products = sum(product + n * np.outer(mean - mu, mean - mu) for n, mean, product in parts)
    return Moments(total, mu, products / (total - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, the "FID" of Inception features (Heusel et al. 2017, eq. 6).

    tr (Sa Sb)^(1/2) is the sum of the square roots of the eigenvalues of Sa^(1/2) Sb Sa^(1/2). That matrix is
    symmetric, so the roots are real and singular covariances (fewer images than features) need no special case.

    Raises:
      ValueError: the features have different widths, or a covariance has a negative eigenvalue.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"features of {a.mu.size} and of {b.mu.size} numbers cannot be compared")
    values, vectors = scipy.linalg.eigh(a.sigma)
    root = (vectors * _roots(values)) @ vectors.T
    product = root @ b.sigma @ root
    cross = _roots(scipy.linalg.eigvalsh((product + product.T) / 2)).sum()
    with np.errstate(over="ignore"):
        distance = float(np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)
    if not np.isfinite(distance):
        raise ValueError("the means or covariances are too large to be of features")
    return distance


def _roots(values: np.ndarray) -> np.ndarray:
    """Square roots of a covariance's eigenvalues; those that rounding made slightly negative count as 0."""
    if values.min() < -1e-3 * np.abs(values).max():
        raise ValueError(f"a matrix with the eigenvalue {values.min():.3g} is no covariance")
    return np.sqrt(np.maximum(values, 0))


def kernel_distance(a, b, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and standard deviation over `subsets` of the unbiased squared MMD.

    The kernel is (x.y / d + 1)^3. Each subset draws `size` features of either set, or as many as the smaller has.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("KID needs at least 2 images on either side")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = a[draw.choice(len(a), size, replace=False)], b[draw.choice(len(b), size, replace=False)]
        kernel = lambda p, q: (p @ q.T / p.shape[1] + 1) ** 3
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(x, x), kernel(y, y)))
        values.append(within - 2 * kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016): mean and standard deviation over `splits` of exp(E KL(p(y|x) || p(y))).

    logits: [n, classes]. They are shuffled first, because samples of a conditional model cycle through its classes.

    Raises:
      ValueError: there are fewer images than splits.
    """
    logits = np.asarray(logits, np.float64)[np.random.RandomState(seed).permutation(len(logits))]
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images do not fill {splits} splits")
    log_p = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
    scores = []
    for part in np.array_split(log_p, splits):
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def squared_distances(a, b, block: int = 2**25) -> typing.Iterator[np.ndarray]:
    """Squared distances of features a [n, d] from b [m, d], float64: some rows of [n, m] at a time.

    block: the most distances, and numbers of `a` in float64, that are held at a time.
    """
    b = np.asarray(b, np.float64)
    norms, rows = (b**2).sum(axis=1), max(1, block // max(b.shape))
    for start in range(0, len(a), rows):
        part = np.asarray(a[start : start + rows], np.float64)
        yield np.maximum((part**2).sum(axis=1)[:, None] - 2 * part @ b.T + norms[None], 0)


def precision_recall(reference, samples, *, neighbours: int = 3, block: int = 2**25) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): shares of samples within the reference, and vice versa.

    A set's manifold is the union of balls around its features, each as large as the distance to its k-th neighbour.

    block: of `squared_distances`.
    """
    reference, samples = np.asarray(reference, np.float64), np.asarray(samples, np.float64)
    if min(len(reference), len(samples)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images on either side")

    def radii(x):
        parts = squared_distances(x, x, block)
        return np.concatenate([np.partition(d, neighbours, axis=1)[:, neighbours] for d in parts])

    def covered(points, x, radius):
        parts = squared_distances(points, x, block)
        return float(np.concatenate([(d <= radius[None]).any(axis=1) for d in parts]).mean())

    return covered(samples, reference, radii(reference)), covered(reference, samples, radii(samples))


@dataclasses.dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`."""

    compute: typing.Callable  # (reference, samples) -> the values of `keys`; both are `features.ImageSet`
    keys: dict[str, tuple[str, str] | None]  # name in the results -> title and meaning in the report; None: not shown
    network: str = "inception"  # whose features are compared; one of `features.NETWORKS`
    needs: str = "features"  # of the samples: moments, features or logits
    minimum: int = 2  # number of images


_frechet = lambda reference, samples: (frechet_distance(reference.moments, samples.moments),)
_kernel = lambda reference, samples: kernel_distance(reference.features, samples.features)
_inception_score = lambda _, samples: inception_score(samples.logits)
_precision_recall = lambda reference, samples: precision_recall(reference.features, samples.features)

_FID = ("FID", "Fréchet distance of Inception features; lower is better")
_KID = ("KID × 1000", "kernel distance of Inception features, times 1,000; lower is better")
_IS = ("Inception Score", "sharpness and diversity by Inception's own classes; higher is better")
_FD = ("Fréchet distance", "of EfficientNet-Lite0 features, not FID; lower is better")
_KD = ("Kernel distance × 1000", "of EfficientNet-Lite0 features, not KID; lower is better")
_PRECISION = ("Precision", "fraction of samples that look like reference images")
_RECALL = ("Recall", "fraction of reference images that the samples cover")

METRICS = {  # by the names of `config.evaluation.metrics`
    "fid": Metric(_frechet, {"fid": _FID}, needs="moments"),
    "kid": Metric(_kernel, {"kid": _KID, "kid_std": None}),
    "is": Metric(_inception_score, {"is": _IS, "is_std": None}, needs="logits", minimum=10),
    "pr": Metric(_precision_recall, {"precision": _PRECISION, "recall": _RECALL}, minimum=4),
    "fd_lite0": Metric(_frechet, {"fd_lite0": _FD}, "lite0", needs="moments"),
    "kid_lite0": Metric(_kernel, {"kid_lite0": _KD, "kid_lite0_std": None}, "lite0"),
    "pr_lite0": Metric(_precision_recall, {"precision_lite0": _PRECISION, "recall_lite0": _RECALL}, "lite0", minimum=4),
}


def network_of(wanted: tuple[str, ...]) -> str:
    """Name of the network whose features the metrics `wanted` compare.

    Raises:
      ValueError: a metric is unknown, none is given, or they compare features of two networks.
    """
    unknown = [name for name in wanted if name not in METRICS]
    if unknown or not wanted:
        raise ValueError(f"{(unknown or [''])[0]!r}; it must be one of {', '.join(METRICS)}")
    networks = {METRICS[name].network for name in wanted}
    if len(networks) > 1:
        raise ValueError(
            f"{', '.join(wanted)}, whose features are of different networks; compute those that end in _lite0 in "
            "another evaluation"
        )
    return networks.pop()


def check_settings(settings) -> None:
    """Check the metrics' names and the number of samples of a `config.Evaluation`.

    Raises:
      ConfigError: a name is unknown, or there are too few samples for a metric.
    """
    with prefixed(ConfigError, "config.evaluation.metrics is "):
        network_of(settings.metrics)
    minimum = max(METRICS[name].minimum for name in settings.metrics)
    if settings.n < minimum:
        raise ConfigError(f"config.evaluation.n is {settings.n}; it must be at least {minimum}")
