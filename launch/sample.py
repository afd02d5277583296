"""Sample: python launch/sample.py --run=runs/demo --n=100 --out=samples/demo

Writes 000000.png, ... and samples.json to the folder, and a grid beside it (samples/demo.png). --format=npz writes
samples.npz instead of single images. After an interruption, the same command resumes; a larger --n adds images. With
several checkpoints, each gets its own folder:

    python launch/sample.py --run='runs/mine/checkpoints/*' --n=1000 --out=samples/mine

--run also takes a file (.pt, .pth, .safetensors), and the name of a shipped model: emoji64.
"""

import io
import math
import pathlib
import zipfile

from absl import app, flags

from maskdm_jax.parallel import runtime

RUN = flags.DEFINE_list("run", None, "Run folders (their latest checkpoints), checkpoints or files; * is expanded.")
OUT = flags.DEFINE_string("out", None, "Folder for the samples; default: samples/NAME of the run.")
N = flags.DEFINE_integer("n", 64, "Number of images.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise; image number i of a seed is always the same.", 0, 2**32 - 1)
BATCH = flags.DEFINE_integer("batch", 64, "Images per device and call.", lower_bound=1)
FORMAT = flags.DEFINE_enum("format", "png", ["png", "npz"], "One file per image, or one array.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "Averaged (ema; ema2, ... if there are more) or raw weights (params).")
LABELS = flags.DEFINE_list("labels", None, "Classes to cycle through, by name or number; default: all.")
# The run's own settings (config.sampling) are the defaults of these flags.
METHOD = flags.DEFINE_string("method", None, "Sampler; launch/train.py --print_config lists them.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of the sampler; ddpm always takes all.")
ETA = flags.DEFINE_float("eta", None, "Noise of ddim, from 0 (deterministic) to 1.")
ORDER = flags.DEFINE_integer("order", None, "Order of dpm_solver, 1 to 3.")
SPACING = flags.DEFINE_string("spacing", None, "Spacing of dpm_solver's steps.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Weight of guidance.")
WEAK = flags.DEFINE_string("weak", None, "Weak prediction of guidance: unlabelled, sparse or shallow.")
WEAK_RATE = flags.DEFINE_float("weak_rate", None, "Share of the patches that skip the inner blocks with --weak=sparse.")
COLUMNS = flags.DEFINE_integer("columns", 10, "Columns of the grid.", lower_bound=1)
GRID = flags.DEFINE_integer("grid", 100, "Maximum number of images in the grid; 0 for no grid.", lower_bound=0)


def main(_):
    if not RUN.value:
        raise app.UsageError("which run? give --run=runs/NAME")

    with runtime.program():
        for path, out in places(RUN.value, OUT.value).items():
            sample(path, out)


def matching(path) -> list:
    """Paths that match a pattern; in a folder of checkpoints, those that are complete."""
    from maskdm_jax.storage import location
    from maskdm_jax.training import checkpoint

    start = next(parent for parent in path.parents if "*" not in str(parent))
    found = map(location, start.glob(str(path.relative_to(start))))
    return [path for path in found if path.parent.name != checkpoint.FOLDER or checkpoint.is_finished(path)]


def places(runs: list[str], out: str | None) -> dict[pathlib.Path, pathlib.Path]:
    """Checkpoint or file -> folder of its samples; several get folders in `out`, named by run and step, or by file."""
    from maskdm_jax.errors import CheckpointError
    from maskdm_jax.interop.convert import is_file
    from maskdm_jax.main import model_path
    from maskdm_jax.storage import is_remote, location
    from maskdm_jax.training import checkpoint

    found = []
    for run in runs:
        path = location(model_path(run))
        literal = "*" not in run or path.exists()
        matches = [path] if literal else sorted(matching(path), key=lambda p: (len(str(p)), p))
        if not matches:
            raise CheckpointError(f"no checkpoint matches {run!r}")
        found += [match if is_file(match) else checkpoint.find(match) for match in matches]
    found = list(dict.fromkeys(found))
    if len(found) == 1:
        run = location(runs[0])
        name = run.name if is_remote(run) else run.resolve().name
        return {found[0]: location(out or f"samples/{name}")}
    name = lambda path: path.stem if is_file(path) else f"{path.parent.parent.name}-{path.name}"
    folders = [location(out or "samples") / name(path) for path in found]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise CheckpointError(
            f"samples of several of {', '.join(runs)} would be written to {twice}; sample them one by one"
        )
    return dict(zip(found, folders, strict=True))


def sample(path, out):
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from maskdm_jax import load
    from maskdm_jax.data.images import sample_grid, save_png
    from maskdm_jax.parallel import processes
    from maskdm_jax.sampling import generate_to_folder, label_cycle, with_sampling

    chosen = {"method": METHOD.value, "steps": STEPS.value, "eta": ETA.value, "order": ORDER.value}
    chosen |= {"spacing": SPACING.value, "guidance": GUIDANCE.value, "weak": WEAK.value, "weak_rate": WEAK_RATE.value}
    sampling = {key: value for key, value in chosen.items() if value is not None}
    loaded = with_sampling(load(path, weights=WEIGHTS.value), sampling)
    label_cycle(loaded, LABELS.value)  # an unknown label is an error before anything is printed
    first = processes.is_first()
    if first:
        print(f"{N.value} images from the {WEIGHTS.value} of {loaded.checkpoint}")
    with tqdm(total=N.value, unit="image", disable=not first) as bar:
        folder = generate_to_folder(
            loaded,
            out,
            N.value,
            seed=SEED.value,
            labels=LABELS.value,
            batch_size=BATCH.value,
            file_format=FORMAT.value,
            progress=lambda done: bar.update(done - bar.n),
        )
    if not first:
        return
    shown = min(N.value, GRID.value)
    if shown:
        if FORMAT.value == "npz":
            with (folder / "samples.npz").open("rb") as file, zipfile.ZipFile(file).open("images.npy") as content:
                np.lib.format.read_magic(content)
                (_, *shape), _, dtype = np.lib.format.read_array_header_1_0(content)
                images = np.frombuffer(content.read(shown * math.prod(shape)), dtype).reshape(shown, *shape)
        else:
            read = lambda i: Image.open(io.BytesIO((folder / f"{i:06d}.png").read_bytes()))
            images = np.stack([np.asarray(read(i)) for i in range(shown)])
        images = images.reshape(shown, *images.shape[1:3], -1)
        grid = folder.with_name(f"{folder.name}.png")
        save_png(grid, sample_grid(images, COLUMNS.value))
    print(f"done: {N.value} images in {folder}" + (f", grid {grid}" if shown else ""))


if __name__ == "__main__":
    runtime.start(main)
