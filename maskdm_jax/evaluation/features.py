"""Sets of images, wherever they are, and their features."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import pathlib
import typing

import grain
import jax
import numpy as np

from maskdm_jax.data.images import Framing, open_image
from maskdm_jax.data.pipeline import read_or_neighbour
from maskdm_jax.data.sources import card_of, open_source, read_patiently
from maskdm_jax.errors import CheckpointError, DataError, EvaluationError, TorchFileError, prefixed
from maskdm_jax.evaluation import efficientnet, inception
from maskdm_jax.evaluation.metrics import Moments, MomentSums, combine
from maskdm_jax.interop import torch_file
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.sampling import TrainedModel, generate_batches, label_cycle, load
from maskdm_jax.storage import location, write_atomically
from maskdm_jax.training import checkpoint

log = logging.getLogger(__name__)

NETWORKS = {"inception": inception, "lite0": efficientnet}
PICTURES = 64  # images of a set that are kept for the report


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images in order, read or generated when needed; its statistics; or both.

    Images are uint8 [H, W, 3 or 1]; sizes may differ.

    Raises:
      EvaluationError: there are fewer than two images, or the card says that they have another number of channels.
    """

    name: str
    n: int  # 0 for statistics of an unknown number of images
    iterate: typing.Callable | None = None  # (start, stop) -> iterator over those images
    get: typing.Callable | None = None  # number -> image, where that is cheap
    card: dict = dataclasses.field(default_factory=dict)  # see `data.sources.card_of`; {} if nothing is known
    made_by: dict = dataclasses.field(default_factory=dict)  # checkpoint, weights, sampling and seed of samples
    moments: Moments | None = None  # statistics from a file, which may also hold some of the images

    def __post_init__(self):
        channels = self.card.get("image", {}).get("channels", 3)
        if channels not in (1, 3):
            raise EvaluationError(f"{self.name}: the metrics compare images of 1 or 3 channels, not {channels}")
        if self.iterate is not None and self.n < 2:
            raise EvaluationError(f"{self.name} has {self.n} images; at least 2 are needed")

    @property
    def statistics_alone(self) -> bool:
        """Whether these are statistics without images."""
        return self.moments is not None and self.iterate is None


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What the metrics need of a set of images."""

    images: Images
    moments: Moments
    features: np.ndarray | None = None  # float32 [n, d]; d is 2048 for Inception
    logits: np.ndarray | None = None  # float32 [n, classes]
    pictures: tuple = ()  # the first images

    @property
    def name(self) -> str:
        """Where the images are."""
        return self.images.name

    @property
    def n(self) -> int:
        """Number of images; 0 if a file of statistics does not contain it."""
        return self.moments.n


def load_weights(path, network=inception) -> dict:
    """Read the parameters of a network, a value of `NETWORKS`, from a file of PyTorch in either format.

    Raises:
      TorchFileError: the file is damaged or holds another network.
    """
    content, causes = torch_file.read(path), (KeyError, ValueError, TypeError, AttributeError)
    with prefixed(TorchFileError, f"{path} does not hold the weights of {network.NAME} (", causes, ")"):
        return network.prepare(content)


class Extractor:
    """A network on all devices of a process: uint8 images to features and logits."""

    def __init__(self, path, network=inception, *, batch_size: int = 64, mesh=None):
        """path, network: see `load_weights`; batch_size: rounded up to the devices; mesh: of local devices, or all."""
        params = load_weights(path, network)
        mesh = sharding.make_mesh(devices=jax.local_devices()) if mesh is None else mesh
        self._widths = params["fc"].shape  # of features and logits
        self._place, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._params = jax.device_put(params, everywhere)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._resize_on_host = network.resize_on_host
        self._resize = network.resize and jax.jit(network.resize, out_shardings=self._place)
        self._apply = jax.jit(network.apply, out_shardings=everywhere)

    def __call__(self, images: Images, *, keep: bool = True, progress=None) -> ImageSet:
        """Compute the features of all images and their moments in float64. Each process takes a share.

        keep: return features and logits besides the moments (12 KB per image).
        progress: called after each batch with the number of images that this process has done.
        """
        share = -(-images.n // (jax.process_count() * self._batch_size)) * self._batch_size
        start = min(jax.process_index() * share, images.n)
        sums, pictures, done = MomentSums(self._widths[0]), [], 0
        kept = [np.zeros((share, width), np.float32) for width in self._widths] if keep else []
        for batch in self._batches(images.iterate(start, min(start + share, images.n))):
            out = [np.asarray(part)[: len(batch)] for part in self._apply(self._params, self._ready(batch))]
            sums.add(out[0])
            for part, rows in zip(kept, out, strict=False):
                part[done : done + len(batch)] = rows
            pictures += [np.array(image) for image in batch[: PICTURES - len(pictures)]]
            done += len(batch)
            if progress:
                progress(done)
        moments = combine(zip(*map(processes.gather, sums.parts()), strict=True))
        kept = [processes.gather(part).reshape(-1, part.shape[1])[: images.n] for part in kept]
        return ImageSet(images, moments, *(kept or (None, None)), tuple(pictures))

    def check_statistics(self, images: Images) -> None:
        """Raise an EvaluationError if the statistics of a set are of other features than this network's."""
        moments, width = images.moments, self._widths[0]
        if moments.mu.shape != (width,):
            raise EvaluationError(
                f"{images.name}: mu {moments.mu.shape} and sigma {moments.sigma.shape} are not of {width} features"
            )

    def _batches(self, images):
        """Up to `batch_size` images at a time, in order."""
        while batch := list(itertools.islice(images, self._batch_size)):
            yield batch

    def _ready(self, batch):
        """Resized, on the devices if they can and all have one size, and padded to `batch_size` by repetition."""
        on_host = self._resize is None or len({image.shape for image in batch}) > 1
        rows = np.stack([self._resize_on_host(image) for image in batch] if on_host else batch)
        full = jax.device_put(rows[np.arange(self._batch_size) % len(rows)], self._place)
        return full if on_host else self._resize(full)


def open_images(path, *, n=None, seed: int = 0, weights: str = "ema", sampling=None, batch_size: int = 64) -> Images:
    """Open a set of images, or statistics of one. Cheap: images are read or generated when they are needed.

    Args:
      path: anything that `data.sources.open_source` takes; a run folder or checkpoint, from which `n` images are
        generated; an .npz with `images` (as launch/sample.py packs them; `arr_0` by guided-diffusion), with `mu` and
        `sigma`, or with both. The statistics of such a file are those of `Images.moments`, unless `n` selects images.
      n: the first n images, an int; None for all. A checkpoint needs it.
      seed: of the noise, for a checkpoint.
      weights, sampling: of a checkpoint, see `sampling.load`.
      batch_size: images per device and call, for a checkpoint.

    Raises:
      EvaluationError, DataError, CheckpointError: there is no such set, or it is damaged or too small.
    """
    if str(path) != "digits":
        path = location(path)
        if (path / "samples.npz").is_file():  # a folder written by launch/sample.py --format=npz
            path = path / "samples.npz"
        if path.suffix == ".npz":
            return _from_npz(path, n)
        if is_checkpoint(path):
            if n is None:
                raise EvaluationError(f"{path} is a checkpoint: say how many images to make of it (--n)")
            return sampled(load(path, weights=weights, sampling=sampling), n, seed=seed, batch_size=batch_size)
    source = open_source(str(path))
    count = _enough(path, len(source), n)
    made_by, card = _samples_settings(path)
    if source.card:
        image = source.card["image"]
        card = card_of(source, Framing(image["size"], image["channels"]))
        if count < len(source):
            card.pop("content_hash", None)  # it is of all images

    def get(i):
        try:
            return np.asarray(open_image(read_patiently(source, i)[0], 3))
        except Exception as error:  # decoders raise any type on a damaged file
            raise DataError(f"{source.names[i]} cannot be read ({error}); repair or remove it") from error

    return Images(str(path), count, _iterate(get), get, card, made_by)


def sampled(loaded: TrainedModel, n: int, *, seed: int, batch_size: int) -> Images:
    """Samples 0..n-1 of a network and seed; a conditional network cycles through its classes."""
    labels = label_cycle(loaded, None)
    labels = None if labels is None else np.resize(np.asarray(labels, np.int32), n)

    def iterate(start, stop):
        index, wanted = range(start, stop), None if labels is None else labels[start:stop]
        batches = generate_batches(loaded, index, wanted, seed=seed, batch_size=batch_size)
        return (image for _, batch in batches for image in batch)

    sampling = dataclasses.asdict(loaded.config.sampling)
    made_by = dict(checkpoint=str(loaded.checkpoint), weights=loaded.weights, seed=seed, sampling=sampling)
    size, channels = loaded.config.data.image_size, loaded.config.data.channels
    card = loaded.card or dict(image=dict(size=size, channels=channels))  # converted files have no card
    return Images(f"{loaded.checkpoint}, seed {seed}", n, iterate, card=card, made_by=made_by)


def transform(name: str, source, framing: Framing) -> Images:
    """Images of a source as training sees them: neighbours replace unreadable ones.

    Raises (while iterating):
      DataError: an image of a prepared set is unreadable, so that the set is not the one that its card describes.
    """

    def get(i):
        image, _, reason = read_or_neighbour(source, i, framing)
        if reason and source.card:
            raise DataError(f"{source.names[i]} cannot be read ({reason}); copy the prepared set again")
        if reason:
            log.warning("unreadable image %s: %s; replaced by its neighbour", source.names[i], reason)
        return image

    return Images(name, len(source), _iterate(get), get, card_of(source, framing))


def _iterate(get):
    """Build (start, stop) -> iterator over those images, which threads `get` a few ahead."""

    def iterate(start, stop):
        images = grain.MapDataset.range(start, stop).map(lambda i: get(int(i)))
        return iter(images.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)))

    return iterate


def is_checkpoint(path) -> bool:
    """Whether a path is a run folder or a checkpoint."""
    try:
        checkpoint.find(path)
    except CheckpointError:
        return False
    return True


def _moments(path, arrays: dict) -> Moments:
    with prefixed(EvaluationError, f"{path}: ", (ValueError, TypeError, OverflowError)):
        mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
            raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} must be a vector and a square matrix")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("mu and sigma must be finite")
        if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-3 * np.abs(sigma).max()):
            raise ValueError("sigma is no covariance, for it is not symmetric")
        return Moments(int(arrays.get("n", 0)), mu, sigma)


def save_statistics(path, moments: Moments) -> None:
    """Write an .npz with `mu`, `sigma` and `n`."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=moments.mu, sigma=moments.sigma, n=moments.n)
    write_atomically(path, buffer.getvalue())


def _enough(path, there: int, n: int | None) -> int:
    if n is not None and there < n:
        raise EvaluationError(f"{path} has {there} images, fewer than n = {n}")
    return there if n is None else n


def _samples_settings(path) -> tuple[dict, dict]:
    """The settings that launch/sample.py wrote beside its images, and the card among them; {} without.

    Raises:
      EvaluationError: the file is damaged.
    """
    file = location(path) / "samples.json"
    damaged = (ValueError, RecursionError, LookupError, TypeError)
    advice = "); restore it, or remove it and lose the check"
    with contextlib.suppress(OSError), prefixed(EvaluationError, f"{file} is damaged (", damaged, advice):
        noted = json.loads(file.read_bytes())
        return noted, noted.pop("card")
    return {}, {}


def _read_npz(path) -> dict:
    if not path.exists():
        raise EvaluationError(f"{path} does not exist")
    broken = prefixed(EvaluationError, f"{path} is damaged or not an .npz file (", Exception, ")")
    with broken, path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # np.load raises many types
        arrays = {name: file[name] for name in ("mu", "sigma", "n", "images", "arr_0") if name in file.files}
        there = ", ".join(file.files)
    if "arr_0" in arrays:  # np.savez's name for an array without one, such as the samples of guided-diffusion
        arrays["images"] = arrays.pop("arr_0")
    if not ("images" in arrays or arrays.keys() >= {"mu", "sigma"}):
        raise EvaluationError(f"{path} holds neither images (images, arr_0) nor statistics (mu, sigma), but {there}")
    return arrays


def _from_npz(path: pathlib.Path, n: int | None) -> Images:
    arrays = _read_npz(path)
    if "images" not in arrays:
        moments = _moments(path, arrays)
        return Images(str(path), moments.n, moments=moments)
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise EvaluationError(f"{path}: images are {images.dtype} {images.shape}; uint8 [n, H, W, 3 or 1] is wanted")
    images = images[: _enough(path, len(images), n)]
    made_by, card = _samples_settings(path.parent) if path.name == "samples.npz" else ({}, {})
    whole = arrays.keys() >= {"mu", "sigma"} and len(images) == len(arrays["images"])
    moments = _moments(path, arrays) if whole else None
    iterate = lambda start, stop: iter(images[start:stop])
    return Images(str(path), len(images), iterate, lambda i: images[i], card, made_by, moments)
