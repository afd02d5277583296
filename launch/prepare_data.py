"""Prepare a set of images once: python launch/prepare_data.py --src=DIR_OR_ZIP --out=data/mine256 --size=256

Every image is decoded, turned as EXIF says, resized by its short side, centre cropped and stored losslessly in
ArrayRecord files, with a data card (card.json) that says how. Run it again with the same command to go on after a
stop. Give the folder to training and evaluation like any other: --config.data.path=data/mine256.
"""

import sys

from absl import app, flags, logging

SRC = flags.DEFINE_string("src", None, "Folder or .zip of images, or a prepared set.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder for the prepared set; new or empty, or unfinished.", required=True)
SIZE = flags.DEFINE_integer("size", None, "Side of the images, in pixels.", required=True, lower_bound=1)
LABELS = flags.DEFINE_bool("labels", False, "Take the first folder level that differs as the class.")
GREY = flags.DEFINE_bool("grey", False, "One channel instead of three.")
THREADS = flags.DEFINE_integer("threads", 0, "Decoding threads; 0 takes two per core.", lower_bound=0)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    from tqdm import tqdm

    from maskdm_jax.data import DataError, prepare
    from maskdm_jax.data.sources import open_source

    try:
        source = open_source(SRC.value, LABELS.value)
        options = dict(name=SRC.value, size=SIZE.value, channels=1 if GREY.value else 3, threads=THREADS.value)
        with tqdm(total=len(source), unit="image", file=sys.stderr) as bar:
            card = prepare.prepare(source, OUT.value, progress=lambda done: bar.update(done - bar.n), **options)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    for entry in card["left_out"]:
        print(f"left out: {entry}")
    classes = f" in {len(card['classes'])} classes" if card["classes"] else ""
    print(f"done: {card['count']} images{classes} in {OUT.value}, content {card['content_hash'][:12]}")


if __name__ == "__main__":
    app.run(main)
