"""Prepare a set of images once, for training and as a reference of evaluation.

    python launch/prepare_data.py --src=DIR_OR_ZIP --out=data/mine256 --size=256 [--labels]
    python launch/prepare_data.py --dataset=celeba --src=DOWNLOADS --out=data/celeba64

Every image is decoded, rotated by its EXIF orientation, cropped, resized and stored losslessly in ArrayRecord files. A
data card (card.json) records these steps. After an interruption, the same command resumes. Training and evaluation read
the set like any folder: --config.data.path=data/mine256. docs/data.md lists the published sets and their files.
"""

import dataclasses
import pathlib
import sys

from absl import app, flags

from maskdm_jax.data import images, published, sources
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.parallel import runtime

DATASET = flags.DEFINE_enum(
    "dataset", None, list(published.SETS), "Published set; it determines split, labels, crop and size."
)
SRC = flags.DEFINE_string(
    "src",
    None,
    "Folder, .zip or .tar of images, Parquet files, WebDataset shards (x-{000..012}.tar), LMDB, address (gs://...), "
    "tfds:NAME, or a published set's files.",
)
OUT = flags.DEFINE_string("out", None, "Folder for the prepared set: new, empty, or with an unfinished set.")
SIZE = flags.DEFINE_integer("size", None, "Side of the images in pixels; published sets have a default.")
SPLIT = flags.DEFINE_string("split", "", "Split of a published, TFDS, Parquet or WebDataset set, such as train.")
LABELS = flags.DEFINE_bool(
    "labels", None, "Keep class labels: of the set, of dataset.json or metadata.csv/.jsonl, else folder names."
)
GREY = flags.DEFINE_bool("grey", False, "Store one channel instead of three.")
CROP = flags.DEFINE_string(
    "crop", None, "centre (the largest square), centre:SIDE or LEFT,TOP,SIDE in pixels, or adm (of ImageNet results)."
)
FILTER = flags.DEFINE_enum("filter", None, list(images.FILTERS), "Filter for resizing, with antialiasing.")
FRACTION = flags.DEFINE_float(
    "fraction", 1.0, "Fraction of the images, drawn by --seed; a smaller fraction is a subset of a larger one."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of --fraction.", lower_bound=0, upper_bound=2**32 - 1)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", images.MAX_PIXELS, "Limit for an encoded image, against decompression bombs.", lower_bound=1
)
ANY_COUNT = flags.DEFINE_bool("any_count", False, "Accept a published set with another number of images.")
THREADS = flags.DEFINE_integer("threads", 0, "Decoding threads; 0 uses two per core.", lower_bound=0)


def main(_):
    if not SRC.value or not OUT.value:
        raise app.UsageError("give --src and --out")
    if "://" in OUT.value:
        raise app.UsageError(f"--out={OUT.value}: give a local folder and copy the set from there when it is done")
    if not 0 < FRACTION.value <= 1:
        raise app.UsageError(f"--fraction={FRACTION.value:g}: it must be in (0, 1]")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    with runtime.program(distributed=False):
        card = prepare()
    for entry in card["left_out"]:
        print(f"left out: {entry}")
    if empty := [name for name, count in card["count_by_class"].items() if not count]:
        print(f"no image has the class {', '.join(empty[:8])} ({len(empty)} classes)")
    classes = f" in {len(card['classes'])} classes" if card["classes"] else ""
    print(f"done: {card['count']} images{classes} in {OUT.value}, content {card['content_hash'][:12]}")


def prepare() -> dict:
    """Open the source and prepare the set; returns its card."""
    from tqdm import tqdm

    from maskdm_jax.data.pipeline import probe
    from maskdm_jax.data.prepare import prepare

    with prefixed(DataError, ""):  # invalid --size or --crop
        source, framing, split = open_source()
    source = sources.select(source, fraction=FRACTION.value, seed=SEED.value)
    for note in probe(source, framing, 16).notes:
        print(note)
    name = DATASET.value or pathlib.PurePath(SRC.value).name
    if FRACTION.value < 1:
        name += f", {FRACTION.value:.3%} by seed {SEED.value}"
    with tqdm(total=len(source), unit="image", file=sys.stderr) as bar:
        progress = lambda done: bar.update(done - bar.n)
        options = dict(name=name, split=split, threads=THREADS.value, progress=progress)
        return prepare(source, OUT.value, framing, **options)


def open_source():
    """The source, its framing and its split."""
    chosen = {"size": SIZE.value, "crop": CROP.value, "filter": FILTER.value, "channels": 1 if GREY.value else None}
    chosen |= {"max_pixels": MAX_PIXELS.value}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if DATASET.value:
        framing = dataclasses.replace(published.SETS[DATASET.value].framing, **chosen)
        options = dict(split=SPLIT.value, labels=LABELS.value, any_count=ANY_COUNT.value)
        source, split = published.open_published(DATASET.value, SRC.value, **options)
        return source, framing, split
    if SIZE.value is None:
        raise DataError("how large? give --size=PIXELS, or --dataset=NAME for a published set")
    framing, split, labels = images.Framing(**chosen), SPLIT.value, bool(LABELS.value)
    if SRC.value.startswith("tfds:"):
        return published.open_tfds(SRC.value, labels, split), framing, split
    return sources.open_source(SRC.value, labels, split), framing, split


if __name__ == "__main__":
    runtime.start(main)
