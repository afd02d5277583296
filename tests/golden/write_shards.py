"""Write the Parquet set of the `datasets` library and the shards of the `webdataset` library that tests read.

pip install datasets==5.2.0 webdataset==1.0.2 pillow==13.0.0
python tests/golden/write_shards.py tests/golden
"""

import io
import pathlib
import sys

import datasets
import numpy as np
import webdataset
from PIL import Image

NAMES = ["cat", "dog", "eel"]
MODES = ["RGB", "L", "P", "RGBA"]  # colour, grey, palette, transparent


def image(i: int) -> Image.Image:
    """Image i, 8 x 8 noise. Colours are drawn from i alone."""
    pixels = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(MODES[i % 4])


def png(i: int) -> bytes:
    """Image i as a PNG file."""
    buffer = io.BytesIO()
    image(i).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: pathlib.Path) -> None:
    """10 training images in two files and 3 of a test split without labels, as `push_to_hub` names and writes them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, start, count, files in [("train", 0, 10, 2), ("test", 10, 3, 1)]:
        rows = range(start, start + count)
        labels = [i % 3 if split == "train" else -1 for i in rows]
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in rows]
        whole = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        for i in range(files):
            part = whole.shard(files, i, contiguous=True)
            part.to_parquet(str(folder / "data" / f"{split}-{i:05d}-of-{files:05d}.parquet"), batch_size=2)


def write_tars(folder: pathlib.Path) -> None:
    """10 images in three shards of at most 4; each has its class in a .cls and a .json."""
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), maxcount=4, start_shard=0, mtime=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i:06d}", "png": png(i), "cls": i % 3, "json": {"label": NAMES[i % 3], "id": i}})


if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    for name, write in (("parquet", write_parquet), ("webdataset", write_tars)):
        (root / name / ("data" if name == "parquet" else "")).mkdir(parents=True)
        write(root / name)
