"""Sampling: image number i of a seed is the same image on any number of devices and processes."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maskdm_jax.build import Network, make_network, make_process, make_sampler
from maskdm_jax.config import Config, Data, differences, parse, to_dict
from maskdm_jax.data.images import save_png, to_pil
from maskdm_jax.diffusion import samplers
from maskdm_jax.diffusion.process import Continuous, noisy
from maskdm_jax.errors import SamplingError
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.storage import atomic_path, location, remove_tree, write_atomically
from maskdm_jax.training import checkpoint

WRITERS = 16  # threads that write images; an object store takes a tenth of a second for each


def compile_sampling(config: Config, network: Network, mesh):
    """Jit `(params, key, index, labels or None)` -> uint8 [n, S, S, C]: the whole trajectories of a batch."""
    space, sample, rows = make_representation(config), make_sampler(config, network), sharding.BATCH

    def on_device(params, key, index, labels):
        x, noise = samplers.image_noise(key, index, space.shape)
        return space.decode(sample(network.cast(params), x, noise, labels))

    # Sharded parameters are gathered once; then each device computes its own rows.
    specs = (sharding.EVERYWHERE, sharding.EVERYWHERE, rows, rows)
    run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def make_generator(config: Config, mesh, batch_size: int):
    """Build `generate(params, seed, index, labels=None)` -> uint8 [n, S, S, C] for up to `batch_size` images.

    index: int32 [n], the numbers of the images, which determine their noise; labels: int32 [n] for a conditional model.
    One compiled program runs the whole trajectory, with the batch split over the mesh. Generators with equal settings
    share it.
    """
    settings = dict(model=config.model, diffusion=config.diffusion, sampling=config.sampling)
    data = Data(image_size=config.data.image_size, channels=config.data.channels)
    return _generator(Config(data=data, **settings), mesh, batch_size)


@functools.lru_cache(maxsize=8)
def _generator(config: Config, mesh, batch_size: int):
    padded, place = -(-batch_size // mesh.size) * mesh.size, sharding.batch_sharding(mesh)
    jitted, compiled = compile_sampling(config, make_network(config), mesh), {}  # with and without labels

    def generate(params, seed: int, index, labels=None) -> np.ndarray:
        n = len(index)
        if n > batch_size:
            raise ValueError(f"{n} images were requested from a generator for at most {batch_size}")
        fill = lambda a: sharding.put(np.resize(np.asarray(a, np.int32), padded), place)
        args = params, jax.random.key(seed), fill(index), None if labels is None else fill(labels)
        if (labels is None) not in compiled:
            spans = processes.spans_processes(mesh)
            compiled[labels is None] = processes.compile_together(jitted.lower(*args), mesh) if spans else jitted
        return np.asarray(compiled[labels is None](*args))[:n]

    return generate


def interpolate(
    loaded: "TrainedModel", image_a, image_b, *, n: int, start: int, seed: int = 0, label=None
) -> np.ndarray:
    """Interpolate from `image_a` to `image_b` in n images, uint8 [n, S, S, C]: add noise to both, mix, and denoise.

    Source: Ho et al. 2020, section 4.3. The noise is the same for all, so that mixing does not change its variance.

    Args:
      image_a, image_b: uint8 [S, S, C] of the model's size, from `data.images.decode`.
      start: time step to which both are noised, 0..T-1; for flow matching and EDM, the part (start + 1) / T of the way
        to noise. With more noise, the results resemble the two images less.
      seed: of the noise.
      label: class of a conditional model, by name or number; None is its "no label".

    Raises:
      SamplingError: start, n or label is invalid, a label is needed, or the sampler can start only from pure noise.
    """
    config, last = loaded.config, loaded.config.diffusion.timesteps - 1
    if not 0 <= start <= last or n < 1:
        raise SamplingError(f"start is {start} and n is {n}; they must be in 0..{last} and at least 1")
    labels = _labels_of(loaded, label, n)
    space, sample, process = make_representation(config), make_sampler(config, loaded.network), make_process(config)
    time = start
    if isinstance(process, Continuous):
        start = 1 - (start + 1) / config.diffusion.timesteps
        time = np.float32(process.times(1, start)[0])

    def run(params, key, a, b):
        eps, noise = samplers.image_noise(key, jnp.zeros(n, "int32"), space.shape)
        a, b = jnp.split(space.encode(jnp.stack([a, b])), 2)
        w = jnp.linspace(0, 1, n)[:, None, None, None]
        x_t = noisy(process, (1 - w) * a + w * b, jnp.full(n, time), eps)  # mixed before, which is equal
        return space.decode(sample(params, x_t, noise, labels, start))

    return np.asarray(jax.jit(run)(loaded.params, jax.random.key(seed), image_a, image_b))


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained network, ready to sample from."""

    checkpoint: pathlib.Path
    weights: str  # ema, ema2, ... or params
    config: Config
    network: Network = dataclasses.field(repr=False)
    params: dict = dataclasses.field(repr=False)
    classes: list[str]
    card: dict  # of the training data; see `data.sources.card_of`
    mesh: jax.sharding.Mesh  # of this process's devices
    converted: bool = False  # from a file of other code, which may have trained it in ways that no config tells

    def untrained(self, weak: str) -> str:
        """What training lacks for a weak prediction of guidance; see `Config.untrained`."""
        return "" if self.converted else self.config.untrained(weak)

    def sample(self, n: int, *, labels=None, seed: int = 0, batch_size: int = 64, **sampling) -> np.ndarray:
        """Generate images 0..n-1 of a seed, uint8 [n, S, S, C].

        Args:
          labels: a class, by name or number, or several to cycle through; default: all of a conditional model.
          batch_size: images per device and call.
          sampling: settings of `config.Sampling` in place of the model's own, such as steps=50 or guidance=1.5.

        Raises:
          SamplingError, ConfigError: a label or setting is invalid.
        """
        if not (isinstance(n, int | np.integer) and n >= 1 and batch_size >= 1 and 0 <= seed < 2**32):
            wanted = "n and batch_size must be at least 1, and seed at least 0 and below 2^32"
            raise SamplingError(f"{wanted}, not {n}, {batch_size}, {seed}")
        model, cycle = with_sampling(self, sampling), label_cycle(self, labels)
        of_image = None if cycle is None else np.resize(np.asarray(cycle, np.int32), n)
        batches = generate_batches(model, range(n), of_image, seed=seed, batch_size=min(n, batch_size))
        return np.concatenate([images for _, images in batches])

    def denoise(self, x, t, labels=None) -> jax.Array:
        """Predict clean images from noisy ones, float32 [B, S, S, C] in [-1, 1], not clipped.

        Args:
          x: noisy images, float32 [B, S, S, C]; for a wavelet model their Haar coefficients, as the result.
          t: time of the process, a number or [B]: 0..T-1 for ddpm, 0 (noise) to 1 for flow, the noise level for edm.
          labels: classes of the images, by name or number, or None.

        Raises:
          SamplingError: a label is invalid, or is needed.
          ValueError: a shape is wrong.
        """
        process, x = make_process(self.config), jnp.asarray(x, jnp.float32)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32 if isinstance(process, Continuous) else jnp.int32), len(x))
        labels = _labels_of(self, labels, len(x))
        return process.x0(self.network.apply(self.params, *process.network_inputs(x, t), labels, None), x, t)


def _labels_of(model: TrainedModel, labels, n: int) -> jax.Array | None:
    """Class numbers of n images, int32 [n], of one or several classes to cycle through; None stays None.

    Raises:
      SamplingError: there is no such class, or None was given for a model that was trained only with labels.
    """
    if labels is not None:
        return jnp.asarray(np.resize(label_cycle(model, labels), n), jnp.int32)
    config = model.config.model
    if config.num_classes and (config.wavelet_scale or model.untrained("unlabelled")):
        raise SamplingError(f"{model.checkpoint} was trained only with labels; give one, such as {model.classes[0]!r}")
    return None


def with_sampling(model: TrainedModel, changes: dict) -> TrainedModel:
    """The model with other settings of `config.sampling`.

    Raises:
      SamplingError: guidance by a weak prediction that was not trained.
      ConfigError: a setting is invalid.
    """
    raw = to_dict(model.config)
    config = parse(raw | dict(sampling=raw["sampling"] | changes))
    if config.sampling.guidance and (wanted := model.untrained(config.sampling.weak)):
        raise SamplingError(
            f"{model.checkpoint} was not trained for the weak prediction of guidance={config.sampling.guidance:g}, "
            f"{config.sampling.weak!r}; that needs {wanted}"
        )
    make_sampler(config, model.network)  # checks the settings
    return dataclasses.replace(model, config=config)


def load(path, *, weights: str = "ema", sampling: dict | None = None) -> TrainedModel:
    """Load the network of a run folder (its newest checkpoint) or of a checkpoint folder.

    weights: `ema`, `ema2`, ... or `params` (the raw ones); sampling: replaces fields of the config's `sampling`.

    Raises:
      SamplingError: the checkpoint has no such weights.
      CheckpointError, ConfigError: there is no checkpoint, it does not fit, or `sampling` is invalid.
    """
    found = checkpoint.find(path)
    if weights not in checkpoint.weights_in(found):
        there = ", ".join(checkpoint.weights_in(found))
        raise SamplingError(f"{found} has no weights {weights!r}; it has {there} (the raw ones are params)")
    meta = checkpoint.load_meta(found)
    config = parse(meta["config"] | dict(mesh={}))  # the mesh of the machine that trained; this one may have another
    network, mesh = make_network(config), _local_mesh()
    about = meta["classes"], meta["card"], mesh, meta["images"] is None
    model = TrainedModel(found, weights, config, network, {}, *about)
    model, place = with_sampling(model, sampling or {}), sharding.replicated(mesh)  # before weights are read
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), network.abstract_params()
    )
    return dataclasses.replace(model, params=checkpoint.load_item(found, weights, abstract))


def from_weights(path, weights: str, config: Config, classes: list[str], params: dict) -> TrainedModel:
    """Make a `TrainedModel` from weights that were read from a file at `path`."""
    mesh = _local_mesh()
    params = jax.device_put(params, sharding.replicated(mesh))
    return TrainedModel(path, weights, config, make_network(config), params, classes, {}, mesh)


def in_memory(run, params) -> TrainedModel:
    """Make a `TrainedModel` from weights of a `training.loop.Run`, such as its EMA, on every local device."""
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    model = from_weights(run.folder, "ema", run.config, list(run.data.classes), params)
    return dataclasses.replace(model, card=run.data.card)


def _local_mesh():
    """A mesh of this process's devices: each process generates its images without communication."""
    return sharding.make_mesh(devices=jax.local_devices())


def generate_batches(loaded: TrainedModel, index, labels, *, seed: int, batch_size: int):
    """Yield (index, images) for the image numbers `index`, with `labels` (or None) of equal length.

    batch_size: images per device and call. Every device runs the same program on its own rows. On one platform, an
      image is therefore equal bit for bit on any number of devices.
    """
    together = batch_size * loaded.mesh.size
    generate = make_generator(loaded.config, loaded.mesh, together)
    index = np.asarray(index, np.int32)
    for start in range(0, len(index), together):
        part = slice(start, start + together)
        of_part = None if labels is None else np.asarray(labels)[part]
        yield index[part], generate(loaded.params, seed, index[part], of_part)


def generate_to_folder(
    loaded: TrainedModel,
    folder,
    n: int,
    *,
    seed: int = 0,
    labels=None,
    batch_size: int = 64,
    file_format: str = "png",
    progress=None,
) -> pathlib.Path:
    """Generate images 0..n-1 of a seed into a folder, and keep those that an earlier, interrupted call finished.

    With several processes, each calls this and generates a share; all must see the folder.

    Args:
      loaded: from `load`.
      folder: receives `000000.png`, ... or `samples.npz` (images uint8 [n, S, S, C], labels int32 [n]), and
        `samples.json`, the settings.
      labels: classes, by name or number, to cycle through; image i gets labels[i % len(labels)]. Default: all
        classes of a conditional model.
      batch_size: images per device and call. It is one of the recorded settings, because it affects rounding.
      file_format: `png` or `npz`.
      progress: called after each batch with the number of images that this process has finished.

    Returns:
      the folder.

    Raises:
      SamplingError: the folder contains samples with other settings, or labels do not fit the model.
    """
    if file_format not in ("png", "npz"):
        raise SamplingError(f"format {file_format!r} is unknown; choose png or npz")
    if file_format == "png" and loaded.config.data.channels not in (1, 3):
        raise SamplingError(f"images of {loaded.config.data.channels} channels cannot be PNG files; use --format=npz")
    if n < 1 or batch_size < 1:
        raise SamplingError(f"n and batch_size must be at least 1, not {n} and {batch_size}")
    cycle = label_cycle(loaded, labels)
    of_image = None if cycle is None else np.resize(np.asarray(cycle, np.int32), n)
    folder = location(folder)
    if processes.differ(str(loaded.checkpoint)):
        raise SamplingError(f"the processes found different checkpoints, here {loaded.checkpoint}; give one of them")
    if processes.is_first():
        settings = dict(seed=seed, labels=cycle, batch_size=batch_size, format=file_format) | _settings_of(loaded)
        _claim(folder, settings)
    processes.barrier("samples claimed")
    packed = _packed(folder / "samples.npz")
    held = max(len(packed), *(i + 1 for i in _numbers(folder, ".png")), 0)
    if held > n:
        raise SamplingError(f"{folder} holds {held} images, more than n = {n}; give another folder")
    if len(packed) == n:
        return folder
    parts = folder / "parts" if file_format == "npz" else None
    place = (parts, ".npy") if parts else (folder, ".png")
    _make_missing(loaded, n, *place, len(packed), of_image, seed, batch_size, progress)
    processes.barrier("samples made")
    if parts and processes.is_first():
        _pack(folder, n, packed, of_image)
    processes.barrier("samples packed")
    return folder


def _settings_of(loaded: TrainedModel) -> dict:
    """The settings that determine the images, for samples.json."""
    sampling = dataclasses.asdict(loaded.config.sampling)
    known = dict(weights=loaded.weights, sampling=sampling, classes=loaded.classes, card=loaded.card)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(loaded.params):
        digest.update(np.asarray(leaf).tobytes())
    return known | dict(checkpoint=str(loaded.checkpoint), weights_hash=digest.hexdigest())


def _make_missing(loaded, n, folder, suffix, packed, of_image, seed, batch_size, progress) -> None:
    """Generate those of this process's images that are neither among the first `packed` nor in `folder`."""
    there = _numbers(folder, suffix)
    # Batches have fixed boundaries, so that an image's batch does not depend on where an earlier call stopped.
    batches = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    batches = batches[jax.process_index() :: jax.process_count()]
    missing = [batch for batch in batches if not all(i < packed or i in there for i in batch)]
    index = [i for batch in missing for i in batch]
    labels = None if of_image is None else of_image[index]
    done = sum(map(len, batches)) - len(index)
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for numbers, images in generate_batches(loaded, index, labels, seed=seed, batch_size=batch_size):
            list(pool.map(_write_image, (folder / f"{i:06d}{suffix}" for i in numbers), images))
            done += len(numbers)
            if progress:
                progress(done)


def _numbers(folder, suffix: str) -> set[int]:
    """Numbers of the images in a folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return {int(path.stem) for path in found if path.suffix == suffix and path.stem.isdecimal()}


def _pack(folder: pathlib.Path, n: int, packed, of_image) -> None:
    """Write samples.npz: the images `packed` by an earlier call, then those in `parts`, one at a time."""
    parts = folder / "parts"
    image = lambda i: packed[i] if i < len(packed) else np.load(io.BytesIO((parts / f"{i:06d}.npy").read_bytes()))
    header = np.lib.format.header_data_from_array_1_0(image(0))
    header["shape"] = (n, *header["shape"])
    with atomic_path(folder / "samples.npz") as path, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(n):
                file.write(image(i).tobytes())
        if of_image is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, of_image)
    remove_tree(parts)


def label_cycle(loaded: TrainedModel, labels) -> list[int] | None:
    """Numbers of the classes to cycle through, given by name or number, one or several; all if `labels` is empty.

    Raises:
      SamplingError: labels for an unconditional model, or unknown ones.
    """
    count = loaded.config.model.num_classes
    labels = [labels] if isinstance(labels, str | int | np.integer) else labels
    if not count:
        if labels is not None and len(labels):
            raise SamplingError(f"{loaded.checkpoint} is of an unconditional model; leave labels out")
        return None
    if labels is None or not len(labels):
        return list(range(count))
    number = {str(i): i for i in range(count)} | {name: i for i, name in enumerate(loaded.classes)}
    wrong = [label for label in labels if str(label) not in number]
    if wrong:
        known = ", ".join(loaded.classes[:20]) + (", ..." if count > 20 else "")
        raise SamplingError(f"labels {wrong} are neither classes ({known}) nor numbers in 0..{count - 1}")
    return [number[str(label)] for label in labels]


def _claim(folder: pathlib.Path, settings: dict) -> None:
    """Write the settings, or compare them with those of existing samples."""
    path = folder / "samples.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
            if not isinstance(there, dict):
                raise ValueError("it holds no settings")
        except ValueError as error:
            raise SamplingError(f"{path} is damaged ({error}); give another folder") from None
        # A run folder may have moved: its weights are known by their hash.
        then, now = (stored | dict(checkpoint="") for stored in (there, json.loads(json.dumps(settings))))
        if then != now:
            changes = "; ".join(differences(then, now))
            raise SamplingError(f"{folder} holds samples with other settings ({changes}); give another folder")
        return
    if folder.exists() and any(not p.name.endswith(".tmp") for p in folder.iterdir()):
        raise SamplingError(f"{folder} is not empty and holds no samples.json; give a new or empty folder")
    write_atomically(path, json.dumps(settings, indent=2).encode())


def _packed(path: pathlib.Path):
    """The images in samples.npz of an earlier call, if any."""
    if not path.exists():
        return ()
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return stored["images"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SamplingError(f"{path} is damaged ({error}); remove it to make it again") from None


def _write_image(path: pathlib.Path, image: np.ndarray) -> None:
    if path.suffix == ".png":
        save_png(path, to_pil(image))
    else:
        buffer = io.BytesIO()
        np.save(buffer, image)
        write_atomically(path, buffer.getvalue())
