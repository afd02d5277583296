"""Interpolate between two images: python launch/interpolate.py --run=runs/mine --images=a.png,b.png --out=between.png

Adds noise to both up to time step --start (0 to 999), mixes them, and denoises the mixtures. At higher steps, results
resemble the two images less; a few hundred of 1000 keep the layout. The grid has --seeds rows with different noise.
"""

from absl import app, flags

from maskdm_jax.parallel import runtime

RUN = flags.DEFINE_string("run", None, "Run folder (its latest checkpoint is used), checkpoint or file.", required=True)
IMAGES = flags.DEFINE_list(
    "images", None, "Two image files, which are resized and cropped as in training.", required=True
)
OUT = flags.DEFINE_string("out", "interpolation.png", "PNG file to write; its outer columns are the two images.")
N = flags.DEFINE_integer("n", 9, "Images per row between the outer columns.", lower_bound=2)
START = flags.DEFINE_integer("start", 500, "Time step to which both images are noised.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of rows, each with its own noise.", lower_bound=1)
LABEL = flags.DEFINE_string(
    "label", None, "Class, by name or number; a model that was trained only with labels needs one."
)
WEIGHTS = flags.DEFINE_string("weights", "ema", "Averaged (ema; ema2, ... if there are more) or raw weights (params).")


def main(_):
    if len(IMAGES.value) != 2:
        raise app.UsageError("give two files: --images=a.png,b.png")
    import numpy as np

    from maskdm_jax import load, sampling
    from maskdm_jax.data.images import Framing, decode, sample_grid, save_png
    from maskdm_jax.errors import DataError, prefixed
    from maskdm_jax.storage import location

    with runtime.program(distributed=False):
        loaded, ends = load(RUN.value, weights=WEIGHTS.value), []
        for path in IMAGES.value:
            with prefixed(DataError, f"{path}: ", (OSError, ValueError)):
                ends.append(decode(location(path).read_bytes(), Framing.of(loaded.config.data)))
        options = dict(n=N.value, start=START.value, label=LABEL.value)
        rows = [sampling.interpolate(loaded, *ends, seed=seed, **options) for seed in range(SEEDS.value)]
        images = np.concatenate([np.stack([ends[0], *row, ends[1]]) for row in rows])
        save_png(location(OUT.value), sample_grid(images, N.value + 2))
    print(f"done: {OUT.value}, {SEEDS.value} rows of {N.value} images between the two outer ones")


if __name__ == "__main__":
    runtime.start(main)
