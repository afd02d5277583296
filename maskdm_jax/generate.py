"""Making images from weights: image number i of a seed is the same image on any number of devices and hosts."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from maskdm_jax import checkpoint, distributed, samplers, sharding
from maskdm_jax.config import Config, differences, parse, to_dict
from maskdm_jax.diffusion import make_schedule
from maskdm_jax.disk import write_atomically
from maskdm_jax.network import Network, make_network
from maskdm_jax.observe import save_image
from maskdm_jax.representation import make_representation


class GenerateError(ValueError):
    """Samples that cannot be made as asked; the message says why and what would work."""


def make_sampler(config: Config, network: Network):
    """Build `sample(params, x, noise, labels=None, start=None)` -> x0 by the config's `sampling`; see `samplers`.

    Raises:
      GenerateError: from `sample`, if it is to start in the middle with a sampler that cannot.
    """
    sampling, clip = config.sampling, make_representation(config).clip
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps, size=config.diffusion.shift_size)

    def sample(params, x, noise, labels=None, start=None):
        def predict(x, t):
            return network.apply(params, x, t, labels)

        if sampling.guidance:
            predict = samplers.guided(predict, lambda x, t: network.apply(params, x, t), sampling.guidance)
        options = dict(objective=config.diffusion.objective, clip=clip)
        if sampling.method == "dpm_solver":
            if start is not None:
                raise GenerateError("dpm_solver starts from pure noise only; use ddim or ddpm")
            options |= dict(steps=sampling.steps, order=sampling.order, spacing=sampling.spacing)
            return samplers.dpm_solver(predict, x, schedule, **options)
        if sampling.method == "ddpm":
            return samplers.ddpm(predict, x, noise, schedule, start=start, **options)
        steps = sampling.steps if start is None else min(sampling.steps, start + 1)
        return samplers.ddim(predict, x, noise, schedule, start=start, steps=steps, eta=sampling.eta, **options)

    return sample


def compile_sampling(config: Config, network: Network, mesh):
    """Jit `(params, key, index, labels or None)` -> uint8 [n, S, S, C]: whole trajectories of a batch over the mesh."""
    space, sample, rows = make_representation(config), make_sampler(config, network), sharding.BATCH

    def on_device(params, key, index, labels):
        x, noise = samplers.image_noise(key, index, space.shape)
        return space.decode(sample(network.cast(params), x, noise, labels))

    # Split parameters are gathered once; from there each device goes its own way.
    specs = (PartitionSpec(), PartitionSpec(), rows, rows)
    run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return jax.jit(run, out_shardings=sharding.replicated(mesh))


def make_generator(config: Config, network: Network, mesh, batch_size: int):
    """Build `generate(params, seed, index, labels=None)` -> uint8 [n, S, S, C] for up to `batch_size` images.

    index: int32 [n], the images' numbers, which decide their noise; labels: int32 [n] for a conditional
    model. One compiled program runs the whole trajectory; the batch is split over the mesh.
    """
    padded = -(-batch_size // mesh.size) * mesh.size
    compiled, place = compile_sampling(config, network, mesh), sharding.batch_sharding(mesh)

    def generate(params, seed: int, index, labels=None) -> np.ndarray:
        n = len(index)
        if n > batch_size:
            raise ValueError(f"{n} images asked of a generator for {batch_size}")
        fill = lambda a: sharding.put(np.resize(np.asarray(a, np.int32), padded), place)
        labels = None if labels is None else fill(labels)
        return np.asarray(compiled(params, jax.random.key(seed), fill(index), labels))[:n]

    return generate


def interpolate(loaded: "Loaded", image_a, image_b, *, n: int, start: int, seed: int = 0, label=None) -> np.ndarray:
    """Make n images between two, uint8 [n, S, S, C], the first at `image_a`, the last at `image_b`.

    Args:
      image_a, image_b: uint8 [S, S, C] of the model's size, as `data.images.decode` makes them.
      start: step that both are noised to, 0..T-1; see `samplers.interpolate`.
      seed: of the noise, which all n share.
      label: class of a conditional model, by name or number; None is its "no label".

    Raises:
      GenerateError: start, n or label do not fit, or the sampler cannot start in the middle.
    """
    config, last = loaded.config, loaded.config.diffusion.timesteps - 1
    if not 0 <= start <= last or n < 1:
        raise GenerateError(f"start is {start} and n is {n}; they must be in 0..{last} and at least 1")
    labels = None
    if label is not None:
        labels = jnp.full((n,), label_cycle(loaded, [label])[0])
    elif config.model.num_classes and config.model.wavelet_scale:
        raise GenerateError("a conditional wavelet model needs a label")
    space, sample = make_representation(config), make_sampler(config, loaded.network)
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps, size=config.diffusion.shift_size)

    def run(params, key, a, b):
        x, noise = samplers.image_noise(key, jnp.zeros(n, "int32"), space.shape)  # one image's noise, n times
        denoise = lambda x_t: sample(params, x_t, noise, labels, start)
        a, b = space.encode(jnp.stack([a, b]))
        weights = np.linspace(0, 1, n, dtype=np.float32)
        return space.decode(samplers.interpolate(denoise, schedule, a, b, weights, x[0], start))

    return np.asarray(jax.jit(run)(loaded.params, jax.random.key(seed), image_a, image_b))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained network, ready to sample from."""

    checkpoint: pathlib.Path
    weights: str  # ema or params
    config: Config
    network: Network
    params: dict
    classes: list[str]
    card: dict  # of the data that it was trained on; see `data.sources.card_of`
    mesh: jax.sharding.Mesh


def load(path, *, weights: str = "ema", sampling: dict | None = None) -> Loaded:
    """Load the network of a run folder (its newest checkpoint) or of a checkpoint folder.

    weights: `ema` or `params` (the raw ones); sampling: replaces fields of the config's `sampling`.

    Raises:
      CheckpointError, ConfigError: there is no checkpoint, it does not fit, or `sampling` cannot work.
    """
    if weights not in ("ema", "params"):
        raise GenerateError(f"weights {weights!r} are unknown; choose ema or params (the raw ones)")
    found = checkpoint.find(path)
    meta = checkpoint.load_meta(found)
    raw = meta["config"]
    raw["sampling"] |= sampling or {}
    raw["mesh"] = {"data": -1, "fsdp": 1}  # of the machine that trained; this one may have other devices
    config = parse(raw)
    # Each host makes images of its own on its own devices: they have nothing to tell each other.
    network, mesh = make_network(config), sharding.make_mesh(devices=jax.local_devices())
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), network.abstract_params()
    )
    params = checkpoint.load_item(found, weights, abstract)
    return Loaded(found, weights, config, network, params, meta["classes"], meta["card"], mesh)


def as_loaded(config: Config, network: Network, params, classes, card: dict, where) -> Loaded:
    """Weights in memory, such as a running training's EMA, on every local device, as `load` gives those of a file."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return Loaded(pathlib.Path(where), "ema", config, network, params, list(classes), card, mesh)


@functools.lru_cache(maxsize=2)
def _shared_generator(config: str, mesh, batch_size: int):
    """One compiled program for several seeds, and for several checkpoints of a run. config: JSON."""
    config = parse(json.loads(config))
    return make_generator(config, make_network(config), mesh, batch_size)


def generate_batches(loaded: Loaded, index, labels, *, seed: int, batch_size: int):
    """Yield (index, images) for the image numbers `index`, with `labels` (or None) of equal length.

    batch_size: images per device and call. Devices run the same program on rows of their own, so that on one
      platform an image comes out bit for bit the same on any number of devices.
    """
    together = batch_size * loaded.mesh.size
    generate = _shared_generator(json.dumps(to_dict(loaded.config)), loaded.mesh, together)
    index = np.asarray(index, np.int32)
    for start in range(0, len(index), together):
        part = slice(start, start + together)
        yield (
            index[part],
            generate(loaded.params, seed, index[part], None if labels is None else np.asarray(labels)[part]),
        )


def generate_to_folder(
    loaded: Loaded,
    folder,
    n: int,
    *,
    seed: int = 0,
    labels=None,
    batch_size: int = 64,
    file_format: str = "png",
    progress=None,
) -> pathlib.Path:
    """Make images 0..n-1 of a seed and write them; images that an earlier, stopped call finished are kept.

    With several hosts, each calls this and makes its share; the folder must be one that all of them see.

    Args:
      loaded: from `load`.
      folder: receives `000000.png`, ... or `samples.npz` (images uint8 [n, S, S, C], labels int32 [n]), and
        `samples.json`, the settings.
      labels: classes, by name or number, to cycle through; image i gets labels[i % len(labels)]. Default: all
        classes of a conditional model.
      batch_size: images per device and call. It belongs to the settings, for other sizes round differently.
      file_format: `png` or `npz`.
      progress: called with the number of images done (of this host's, with several), after each batch.

    Returns:
      the folder.

    Raises:
      GenerateError: the folder holds samples of other settings, labels do not fit the model.
    """
    if file_format not in ("png", "npz"):
        raise GenerateError(f"format {file_format!r} is unknown; choose png or npz")
    if n < 1 or batch_size < 1:
        raise GenerateError(f"n and batch_size must be at least 1, not {n} and {batch_size}")
    cycle = label_cycle(loaded, labels)
    of_image = None if cycle is None else np.resize(np.asarray(cycle, np.int32), n)
    folder = pathlib.Path(os.path.expanduser(folder)).absolute()
    settings = dict(
        checkpoint=str(loaded.checkpoint),
        weights=loaded.weights,
        sampling=dataclasses.asdict(loaded.config.sampling),
        seed=seed,
        labels=cycle,
        classes=loaded.classes,
        batch_size=batch_size,
        format=file_format,
        card=loaded.card,
    )
    host, hosts = jax.process_index(), jax.process_count()
    if host == 0:
        _claim(folder, settings)
    distributed.wait_for_all("samples claimed")
    parts = folder / "parts"  # of an unfinished .npz

    def name(i):
        return parts / f"{i:06d}.npy" if file_format == "npz" else folder / f"{i:06d}.png"

    packed = _packed(folder / "samples.npz")
    if len(packed) > n:
        raise GenerateError(f"{folder} holds {len(packed)} images, more than n = {n}; give another folder")
    if len(packed) == n:
        return folder
    if file_format == "npz":
        parts.mkdir(exist_ok=True)
    # Whole batches only, on fixed borders: an image's batch is the same however often we were stopped.
    there = lambda i: i < len(packed) or name(i).exists()
    batches = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)][host::hosts]
    missing = [batch for batch in batches if not all(map(there, batch))]
    index = [i for batch in missing for i in batch]
    todo = None if of_image is None else of_image[index]
    done = sum(map(len, batches)) - len(index)
    for numbers, images in generate_batches(loaded, index, todo, seed=seed, batch_size=batch_size):
        for i, image in zip(numbers, images, strict=True):
            _write_image(name(i), image)
        done += len(numbers)
        if progress:
            progress(done)
    distributed.wait_for_all("samples made")
    if file_format == "npz" and host == 0:
        images = np.stack([packed[i] if i < len(packed) else np.load(name(i)) for i in range(n)])
        arrays = dict(images=images) if of_image is None else dict(images=images, labels=of_image)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomically(folder / "samples.npz", buffer.getvalue())
        shutil.rmtree(parts)
    distributed.wait_for_all("samples packed")
    return folder


def label_cycle(loaded: Loaded, labels) -> list[int] | None:
    """Numbers of the classes to cycle through, from names or numbers; all classes when `labels` is empty.

    Raises:
      GenerateError: labels for an unconditional model, or unknown ones.
    """
    count = loaded.config.model.num_classes
    if not count:
        if labels:
            raise GenerateError(f"{loaded.checkpoint} is of an unconditional model; leave labels out")
        return None
    if not labels:
        return list(range(count))
    number = {str(i): i for i in range(count)} | {name: i for i, name in enumerate(loaded.classes)}
    wrong = [label for label in labels if str(label) not in number]
    if wrong:
        known = ", ".join(loaded.classes[:20]) + (", ..." if count > 20 else "")
        raise GenerateError(f"labels {wrong} are neither classes ({known}) nor numbers in 0..{count - 1}")
    return [number[str(label)] for label in labels]


def _claim(folder: pathlib.Path, settings: dict) -> None:
    """Write the settings, or compare them with those of the samples that are there."""
    path = folder / "samples.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise GenerateError(f"{path} is damaged ({error}); give another folder") from None
        if there != json.loads(json.dumps(settings)):
            changes = "; ".join(differences(there, json.loads(json.dumps(settings))))
            raise GenerateError(f"{folder} holds samples of other settings ({changes}); give another folder")
        return
    if folder.exists() and any(not p.name.endswith(".tmp") for p in folder.iterdir()):
        raise GenerateError(f"{folder} is not empty and holds no samples.json; give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings, indent=2).encode())


def _packed(path: pathlib.Path):
    """Images of an earlier call's samples.npz, or none."""
    if not path.exists():
        return ()
    try:
        with np.load(path) as stored:
            return stored["images"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise GenerateError(f"{path} is damaged ({error}); remove it to make it again") from None


def _write_image(path: pathlib.Path, image: np.ndarray) -> None:
    if path.suffix == ".png":
        save_image(path, Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))
    else:
        buffer = io.BytesIO()
        np.save(buffer, image)
        write_atomically(path, buffer.getvalue())
