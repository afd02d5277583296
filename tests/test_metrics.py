import golden
import numpy as np
import pytest
import scipy.linalg

from maskdm_jax.evaluation import metrics


def moments(x, parts=1):
    sums = metrics.MomentSums(x.shape[1])
    for part in np.array_split(x, parts):
        sums.add(part)
    return metrics.combine([sums.parts()])


def test_frechet_distance_of_the_reference(inception_case):
    arrays, _ = golden.load(inception_case)
    ours = metrics.frechet_distance(moments(arrays["frechet/a"]), moments(arrays["frechet/b"]))
    assert ours == pytest.approx(float(arrays["frechet/distance"]), rel=1e-6)


def test_moments_in_parts_are_those_of_the_whole():
    x = np.random.RandomState(0).standard_normal((500, 7)).astype(np.float32) + 1000
    for parts in (1, 3, 50):
        ours = moments(x, parts)
        np.testing.assert_allclose(ours.mu, x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(ours.sigma, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        moments(x[:1])
    hosts = [metrics.MomentSums(7) for _ in range(4)]  # the last has nothing to do
    for host, part in zip(hosts, np.split(x, [3, 400]), strict=False):
        host.add(part)
    together = metrics.combine(host.parts() for host in hosts)
    assert together.n == 500
    np.testing.assert_allclose(together.sigma, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-10)


def test_frechet_distance_of_known_gaussians():
    """Between N(m, A^2) and N(0, B^2) of commuting A, B it is |m|^2 + |A - B|^2."""
    rng = np.random.RandomState(1)
    q = scipy.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b, m = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6), rng.standard_normal(6)
    b[0] = a[1] = 0  # singular, as with fewer images than features
    gaussian = lambda s, mu: metrics.Moments(9, mu, (q * s**2) @ q.T)
    ours = metrics.frechet_distance(gaussian(a, m), gaussian(b, np.zeros(6)))
    assert ours == pytest.approx(np.sum(m**2) + np.sum((a - b) ** 2), rel=1e-7)  # roots of what rounding makes of 0
    assert metrics.frechet_distance(gaussian(a, m), gaussian(a, m)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="features of 6 and of 2 numbers"):
        metrics.frechet_distance(gaussian(a, m), moments(rng.standard_normal((9, 2))))


def test_what_is_no_gaussian_has_no_frechet_distance():
    good = metrics.Moments(9, np.zeros(4), np.diag([0.0, 1.0, 1.0, 2.0]))
    for odd, message in [
        (metrics.Moments(9, np.zeros(4), np.diag([-1.0, 1.0, 2.0, -0.01])), "no covariance"),
        (metrics.Moments(9, np.full(4, 1e200), np.eye(4)), "too large to be of features"),
    ]:
        for pair in [(odd, good), (good, odd)]:
            with pytest.raises(ValueError, match=message):
                metrics.frechet_distance(*pair)
    rounded = metrics.Moments(9, np.zeros(4), np.diag([-1e-9, 1.0, 1.0, 2.0]))
    assert metrics.frechet_distance(rounded, good) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.RandomState(2)
    estimates = [metrics.kernel_distance(*rng.standard_normal((2, 100, 8)), subsets=1)[0] for _ in range(100)]
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / 10
    assert min(estimates) < 0 < max(estimates)
    a, b = rng.standard_normal((2, 800, 8))
    # Of all of both sets, written out.
    k = lambda x, y: np.array([[(p @ q / 8 + 1) ** 3 for q in y] for p in x])
    x, y = a[:20], b[:15] + 0.5
    xx, yy = k(x[:15], x[:15]), k(y, y)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = xx.sum() / (15 * 14) + yy.sum() / (15 * 14) - 2 * k(x[:15], y).mean()
    assert metrics.kernel_distance(x[:15], y, subsets=3)[0] == pytest.approx(expected, rel=1e-9)
    assert metrics.kernel_distance(a, b + 1, subsets=20, size=200)[0] > 0.5


def test_inception_score_of_clear_and_of_clueless_classifiers():
    sure = np.repeat(50 * np.eye(4), 100, axis=0)
    assert metrics.inception_score(sure)[0] == pytest.approx(4, rel=0.05)  # as many as there are classes
    assert metrics.inception_score(np.zeros((200, 4)))[0] == pytest.approx(1)
    assert metrics.inception_score(sure[:100])[0] == pytest.approx(1), "all of one class"
    with pytest.raises(ValueError, match="5 images do not fill 10 splits"):
        metrics.inception_score(sure[:5])


def test_precision_and_recall_tell_quality_from_variety():
    rng = np.random.RandomState(3)
    reference = rng.standard_normal((600, 4))
    other = rng.standard_normal((600, 4))
    precision, recall = metrics.precision_recall(reference, other)
    assert min(precision, recall) > 0.75
    precision, recall = metrics.precision_recall(reference, 0.1 * other)  # good but all alike
    assert precision > 0.95
    assert recall < 0.2
    precision, recall = metrics.precision_recall(reference, np.concatenate([other[:300], other[:300] + 50]))
    assert precision == pytest.approx(0.45, abs=0.06)
    in_blocks = metrics.precision_recall(reference, other, block=77 * len(other))
    assert in_blocks == metrics.precision_recall(reference, other)
    with pytest.raises(ValueError, match="more than 3 images"):
        metrics.precision_recall(reference[:3], other)
