"""Images in Parquet files, as Hugging Face's `datasets` writes them."""

import collections
import json
import logging
import os
import posixpath
import re
import shutil

import numpy as np

from maskdm_jax.data.base import WITHOUT_LABELS, RowNames, Source, hash_texts
from maskdm_jax.data.files import open_file, read_range
from maskdm_jax.data.labels import number_labels
from maskdm_jax.data.shards import index_path, kept_indexes, relative_names
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.storage import atomic_path, foreign_kind

_READERS = 4  # files that are read at the same time, for their index: each takes twice the memory of a row group
_BATCH = 64  # rows that are read at a time
_GAP = 1 << 16  # bytes before an image at most: its length, or the header of a page

log = logging.getLogger(__name__)


class ParquetImages(Source):
    """The rows of Parquet files as images: encoded files in a column, or beside the files under the paths in it.

    The column of images and that of labels are those that the metadata of `datasets` name, else `image` and `label`.
    A column of images holds bytes, or structs of `bytes` and `path`. An index of each file is made once: where the file
    is not compressed, as `datasets` writes it, the images are read in place; others are copied into the cache.
    """

    def __init__(self, path, files: list[str], labels: bool = False):
        """Read the files once, or their index of an earlier call.

        Args:
          path: of the whole set, for messages.
          files: paths or addresses, in order.
          labels: whether to read labels.

        Raises:
          DataError: PyArrow is missing, a file is damaged, there is no column of images, or labels are wanted and there
            is not one column of labels.
        """
        indexes = kept_indexes(files, _read_rows, _READERS)
        self._files, self._copies = files, [str(index_path(file, ".images")) for file in files]
        self._paths = [index["paths"] for index in indexes]
        joined = lambda key: np.concatenate([np.asarray(index[key], np.int64) for index in indexes])
        self._in_copy, self._offsets, self._sizes = map(joined, ("in_copy", "offsets", "sizes"))
        if not len(self._sizes):
            raise DataError(f"{path} holds no rows")
        names, counts = relative_names(files), [len(index["sizes"]) for index in indexes]
        numbers, classes = _labels(path, names, indexes) if labels else ([], [])
        known = zip(names, counts, indexes, strict=True)
        files_hash = hash_texts(f"{name} {rows} {index['bytes']}" for name, rows, index in known)
        super().__init__(RowNames(names, counts), numbers, classes, files_hash)

    def image(self, i: int) -> bytes:
        """Encoded bytes."""
        number, row = self.names.locate(i)
        file = self._files[number]
        if path := self._paths[number].get(str(row)):
            with open_file(posixpath.join(posixpath.dirname(file), path)) as opened:
                return opened.read()
        if not self._sizes[i]:
            raise DataError("the row holds no image")
        place = self._copies[number] if self._in_copy[i] else file
        return read_range(place, int(self._offsets[i]), int(self._sizes[i]))


def _labels(path, names: list[str], indexes: list[dict]):
    """(class numbers, class names).

    Raises:
      DataError: the files have not one column of labels, or it holds neither numbers of classes nor texts alone.
    """
    labels, known = [label for index in indexes for label in index["labels"]], indexes[0]["classes"]
    kinds = {str} if isinstance(labels[0], str) else {int, type(None)}
    for name, index in zip(names, indexes, strict=True):
        columns = index["label_columns"]
        if len(columns) != 1:
            found = f"{len(columns)} columns of labels" if columns else "no column 'label'"
            shown = ", ".join(index["columns"])
            raise DataError(f"{path}: {name} has {found}; its columns are {shown}; {WITHOUT_LABELS}")
        wrong = next((row for row, label in enumerate(index["labels"]) if type(label) not in kinds), None)
        if wrong is not None:
            shown = f"column {columns[0]!r} of {name}[{wrong}] is {index['labels'][wrong]!r}"
            raise DataError(
                f"{path}: {shown}, not the {'name' if str in kinds else 'number'} of a class; {WITHOUT_LABELS}"
            )
        if index["classes"] != known:
            raise DataError(f"{path}: {name} has other class names than {names[0]}")
    if str in kinds:
        return number_labels(labels)
    labels = np.array([-1 if label is None else label for label in labels])
    if not known:
        return labels, [str(i) for i in range(max(labels) + 1)]
    if all(re.fullmatch(r"n\d{8}", name) for name in known):  # of ImageNet: the published order is that of the names
        order = np.argsort(known)
        labels = np.where(np.isin(labels, order), np.argsort(order)[labels % len(known)], labels)
        known = sorted(known)
    times = collections.Counter(known)
    return labels, [name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(known)]


def _read_rows(file: str) -> dict:
    """The index of a file.

    Returns:
      `in_copy`, `offsets`, `sizes`: of each row's image, in the file or in a copy in the cache; `paths`: by row, where
      only a path is given; `labels`: of each row, a number, a text or None; `classes`: names, if known; `columns`,
      `label_columns`: names; `bytes`: size of the file; `copied`: size of the copy.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{file}: reading Parquet files needs PyArrow: pip install -e '.[parquet]'") from None
    log.info("reading %s for its index", file)
    with open_file(file) as opened:
        if kind := foreign_kind(opened.read(64)):
            raise DataError(f"{file} is {kind}")
        with _broken(file):
            rows, size = parquet.ParquetFile(opened), opened.seek(0, os.SEEK_END)
        image, labels, classes = _columns(file, rows.schema_arrow)
        index = dict(in_copy=[], offsets=[], sizes=[], paths={}, labels=[], classes=classes)
        index |= dict(columns=rows.schema_arrow.names, label_columns=labels, bytes=size)
        chunks = [_image_chunk(rows.metadata.row_group(i), image) for i in range(rows.num_row_groups)]
        _check_space(file, chunks)
        with atomic_path(index_path(file, ".images")) as copy, open(copy, "wb") as out:
            for group, chunk in enumerate(chunks):
                _add(_rows(file, rows, group, image, labels), *_as_stored(file, chunk), out, index)
            index["copied"] = out.tell()
    return index


def _broken(file: str):
    causes = (ValueError, OSError, KeyError, EOFError)  # those of PyArrow derive from them
    return prefixed(DataError, f"{file} is not a readable Parquet file (", causes, "); copy it again")


def _columns(file: str, schema) -> tuple[str, list[str], list[str]]:
    """The column of images, the columns of labels, and the class names; see `ParquetImages`.

    Raises:
      DataError: there is not one column of images.
    """
    causes = (ValueError, LookupError, TypeError, AttributeError)
    with prefixed(DataError, f"{file} has damaged metadata of the library datasets (", causes, ")"):
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        features = {name: found for name, found in features.items() if isinstance(found, dict)}
    of_kind = lambda kind: [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    images = of_kind("Image") or [name for name in schema.names if name == "image"]
    labels = of_kind("ClassLabel") or [name for name in schema.names if name == "label"]
    if len(images) != 1:
        found = f"{len(images)} columns of images" if images else "no column 'image'"
        raise DataError(f"{file} has {found}; its columns are {', '.join(schema.names)}; rename or drop columns")
    kind = schema.field(images[0]).type
    parts = {field.name for field in kind} if hasattr(kind, "get_field_index") else {str(kind).removeprefix("large_")}
    if not parts & {"bytes", "path", "binary"}:
        raise DataError(f"{file}: column {images[0]!r} is {kind}, not bytes or a struct of bytes and path")
    return images[0], labels, features.get(labels[0], {}).get("names") or [] if labels else []


def _image_chunk(group, image: str):
    """The metadata of the bytes of a row group's images; None if there are only paths."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return next((chunk for chunk in chunks if chunk.path_in_schema in (image, f"{image}.bytes")), None)


def _check_space(file: str, chunks) -> None:
    """Raise DataError if the disk of the cache lacks the space for a copy of the images that are compressed."""
    needed = sum(chunk.total_uncompressed_size for chunk in chunks if chunk and chunk.compression != "UNCOMPRESSED")
    folder = index_path(file, ".images").parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{file} is compressed, and a copy of its images needs {needed / 2**30:,.1f} GiB in {folder}, which has "
            f"{free / 2**30:,.1f}; set MASKDM_CACHE to a folder on a larger disk"
        )


def _as_stored(file: str, chunk) -> tuple[int, bytes]:
    """(offset in the file, bytes) of a row group's images, one after the other; (0, b"") if they are compressed."""
    if chunk is None or chunk.compression != "UNCOMPRESSED":
        return 0, b""
    start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    with _broken(file):
        return start, read_range(file, start, chunk.total_compressed_size)


def _rows(file: str, opened, group: int, image: str, labels: list[str]):
    """Yield (image, label) of each row of a row group."""
    with _broken(file):
        for batch in opened.iter_batches(_BATCH, row_groups=[group], columns=[image, *labels[:1]]):
            images = batch.column(image).to_pylist()
            yield from zip(images, batch.column(labels[0]).to_pylist() if labels else [None] * len(images), strict=True)


def _add(rows, start: int, stored: bytes, out, index: dict) -> None:
    """Add rows to an index: find their images in `stored`, which the file holds at `start`, or copy them to `out`."""
    position = 0  # in `stored`, after the image before
    for image, label in rows:
        content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        content = content or b""
        found = stored.find(content, position, position + len(content) + _GAP) if content else -1
        if found >= 0:
            offset, position = start + found, found + len(content)
        else:
            offset = out.tell()
            out.write(content)
        if path and not content:
            index["paths"][str(len(index["sizes"]))] = path
        index["in_copy"].append(int(found < 0))
        index["offsets"].append(offset)
        index["sizes"].append(len(content))
        index["labels"].append(label)
