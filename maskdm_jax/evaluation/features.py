"""Sets of images, wherever they are, as Inception features."""

import concurrent.futures
import dataclasses
import itertools
import pathlib
import zipfile

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maskdm_jax import checkpoint, generate, sharding
from maskdm_jax.data.images import open_image
from maskdm_jax.data.sources import DataError, open_source
from maskdm_jax.evaluation import inception
from maskdm_jax.evaluation.metrics import Moments, MomentSums


class EvaluationError(ValueError):
    """Sets that cannot be compared as asked; the message says why and what would work."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What the metrics need of a set of images. Statistics from a file have moments alone."""

    name: str
    moments: Moments
    features: np.ndarray | None = None  # float32 [n, 2048]
    logits: np.ndarray | None = None  # float32 [n, 1008]

    @property
    def n(self) -> int:
        """Number of images; 0 where a file of statistics does not say."""
        return self.moments.n


class Extractor:
    """The Inception network on all devices: batches of uint8 images to features and logits."""

    def __init__(self, params: dict, *, batch_size: int = 64, mesh=None):
        """params: from `inception.load_weights`; batch_size: images per call, rounded up to fill the devices."""
        mesh = sharding.make_mesh() if mesh is None else mesh
        self._place = sharding.batch_sharding(mesh)
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._resize = jax.jit(inception.resize, out_shardings=self._place)
        self._apply = jax.jit(inception.apply_to_resized, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, name: str, images, progress=None) -> ImageSet:
        """Features of an iterable of uint8 images [H, W, 3 or 1], which may differ in size.

        progress: called with the number of images done, after each batch.

        Raises:
          EvaluationError: there are fewer than two images.
        """
        sums, features, logits, done = MomentSums(inception.DIM), [], [], 0
        for batch in self._batches(images):
            pooled, scores = (np.asarray(out)[: len(batch)] for out in self._apply(self._params, self._ready(batch)))
            sums.add(pooled)
            features.append(pooled)
            logits.append(scores)
            done += len(batch)
            if progress:
                progress(done)
        if done < 2:
            raise EvaluationError(f"{name} has {done} images; at least 2 are needed")
        return ImageSet(name, sums.moments(), np.concatenate(features), np.concatenate(logits))

    def _batches(self, images):
        """Up to `batch_size` images of one size at a time, in order."""
        for _, same in itertools.groupby(images, key=lambda image: image.shape):
            while batch := list(itertools.islice(same, self.batch_size)):
                yield batch

    def _ready(self, batch):
        """Resized on the devices; filled up, so that few programs are compiled."""
        rows = np.stack(batch)
        full = rows[np.arange(self.batch_size) % len(rows)]
        return self._resize(jax.device_put(full, self._place))


def load_set(
    path, extractor: Extractor, *, n: int | None = None, seed: int = 0, sampling=None, progress=None
) -> ImageSet:
    """A set of images from a path.

    Args:
      path: a folder or .zip of images; a run folder or checkpoint, from which `n` images are made; an .npz with
        `images` (as launch/sample.py packs them) or with `mu` and `sigma`.
      n: the first n images; all when None. A checkpoint needs it.
      seed: of the noise, for a checkpoint.
      sampling: replaces fields of a checkpoint's `sampling`.
      progress: see `Extractor`.

    Raises:
      EvaluationError, DataError, CheckpointError: there is no such set, or it is damaged or too small.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if path.suffix == ".npz":
        return _from_npz(path, extractor, n, progress)
    if is_checkpoint(path):
        if n is None:
            raise EvaluationError(f"{path} is a checkpoint: say how many images to make of it (--n)")
        loaded = generate.load(path, sampling=sampling)
        labels = generate.label_cycle(loaded, None)
        labels = None if labels is None else np.resize(np.asarray(labels, np.int32), n)
        batches = generate.generate_batches(loaded, range(n), labels, seed=seed, batch_size=extractor.batch_size)
        return extractor(
            f"{loaded.checkpoint}, seed {seed}", (image for _, batch in batches for image in batch), progress
        )
    source = open_source(str(path), False)
    _enough(path, len(source), n)
    return extractor(str(path), _decoded(source, len(source) if n is None else n), progress)


def is_checkpoint(path) -> bool:
    """Whether a path is a run folder or a checkpoint."""
    try:
        checkpoint.find(path)
    except checkpoint.CheckpointError:
        return False
    return True


def _enough(path, there: int, n: int | None) -> None:
    if n is not None and there < n:
        raise EvaluationError(f"{path} has {there} images, fewer than n = {n}")


def _from_npz(path: pathlib.Path, extractor: Extractor, n: int | None, progress) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("mu", "sigma", "n", "images")}
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path} is damaged or not an .npz file ({error})") from None
    if "images" in arrays:
        images = arrays["images"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise EvaluationError(
                f"{path}: images are {images.dtype} {images.shape}; uint8 [n, H, W, 3 or 1] is wanted"
            )
        _enough(path, len(images), n)
        return extractor(str(path), images[:n], progress)
    if not arrays.keys() >= {"mu", "sigma"}:
        raise EvaluationError(f"{path} holds neither images nor statistics (mu and sigma)")
    mu, sigma = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
    if mu.shape != (inception.DIM,) or sigma.shape != (inception.DIM, inception.DIM):
        raise EvaluationError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not of {inception.DIM} features")
    return ImageSet(str(path), Moments(int(arrays.get("n", 0)), mu, sigma))


def _decoded(source, n: int):
    """Images 0..n-1 of a source in their own sizes, decoded a few ahead by threads.

    Raises:
      DataError: an image cannot be read. Leaving it out would change the number.
    """

    def read(i):
        try:
            return np.asarray(open_image(source.read(i)[0], 3))
        except Exception as error:  # whatever a decoder throws at a damaged file
            raise DataError(f"{source.names[i]} cannot be read ({error}); repair or remove it") from error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ahead = [pool.submit(read, i) for i in range(min(n, 256))]
        for i in range(n):
            image = ahead.pop(0).result()
            if i + 256 < n:
                ahead.append(pool.submit(read, i + 256))
            yield image
