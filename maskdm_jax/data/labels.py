"""Class labels of image files: from label files beside them, or from the names of their folders."""

import csv
import io
import itertools
import json
import logging
import pathlib
import posixpath
import re

from maskdm_jax.data.base import WITHOUT_LABELS
from maskdm_jax.errors import DataError, prefixed

LABEL_COLUMNS = ("label", "labels", "class", "category")

log = logging.getLogger(__name__)


def _read_dataset_json(text: str) -> list[dict]:
    """The format of StyleGAN and EDM: {"labels": [["00000/img.png", 3], ...]}, or null without labels."""
    found = json.loads(text)
    if not isinstance(found, dict) or "labels" not in found:
        return []
    if not found["labels"]:
        raise ValueError("it lists none")
    return [dict(file_name=name, label=label) for name, label in found["labels"]]


# Each reader returns rows of columns, `file_name` among them; files without it have nothing to do with labels.
_LABEL_FILES = {
    "dataset.json": _read_dataset_json,
    "metadata.csv": lambda text: list(csv.DictReader(io.StringIO(text, newline=""))),  # Hugging Face's imagefolder
    "metadata.jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
}


def find_labels(path, names: list[str], others: list[str], read):
    """The labels of images.

    Args:
      path: of the whole set, for messages.
      names: of the images.
      others: names of the other files beside them.
      read: returns the content of a file, by its name.

    Returns:
      (labels, one class number per image; class names; names of the label files).

    Raises:
      DataError: neither label files nor folders define the label of every image.
    """
    listed = {name: _read_label_file(path, name, read) for name in others if posixpath.basename(name) in _LABEL_FILES}
    files, known = [name for name, found in listed.items() if found], {}
    for found in listed.values():
        differing = [name for name in found if known.get(name, found[name]) != found[name]]
        if differing:
            raise DataError(f"{path}: {' and '.join(files)} give different labels to {differing[0]!r}; remove one")
        known |= found
    if not files:
        return *_labels_by_folder(path, names), []
    labels = {name: known.get(posixpath.normpath(name)) for name in names}
    bare = [name for name, label in labels.items() if label is None]
    if bare:
        raise DataError(
            f"{path}: {' and '.join(files)} lack a label for {bare[0]!r} ({len(bare)} of {len(names)} images); add "
            f"it, or {WITHOUT_LABELS}"
        )
    if len(known) > len(names):
        log.warning("%s: %s list %d images that are not there", path, " and ".join(files), len(known) - len(names))
    if all(re.fullmatch(r"\d{1,6}(\.0+)?", label) for label in labels.values()):
        numbers = [int(float(label)) for label in labels.values()]  # label 3 is class 3, even if no image has label 2
        return numbers, [str(i) for i in range(max(numbers) + 1)], files
    classes = sorted(set(labels.values()))
    number = {name: i for i, name in enumerate(classes)}
    return [number[label] for label in labels.values()], classes, files


def _read_label_file(path, file: str, read) -> dict[str, str]:
    """Label by normalized name of every image that a file lists; {} if the file is of another kind."""
    causes = (ValueError, TypeError, AttributeError, LookupError, RecursionError, csv.Error)
    hint = f"); repair or remove it, or {WITHOUT_LABELS}"
    with prefixed(DataError, f"{path}: {file} cannot be used for labels (", causes, hint):
        rows = _LABEL_FILES[posixpath.basename(file)](read(file).decode("utf-8-sig"))
        columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        if "file_name" not in columns:
            return {}
        if None in columns:  # where `csv` puts them
            raise ValueError("a line has more fields than the first one")
        column = next((name for name in LABEL_COLUMNS if name in columns), None)
        if column is None:
            raise ValueError(f"of its columns {columns} none is named {' or '.join(LABEL_COLUMNS)}")
        found = {}
        for row in rows:
            label = row.get(column)
            if isinstance(label, bool) or not isinstance(label, (int, float, str)) or not str(label).strip():
                raise ValueError(
                    f"the label of {row.get('file_name')!r} is {label!r}, not the number or name of a class"
                )
            name = posixpath.join(posixpath.dirname(file), row["file_name"].replace("\\", "/"))
            found[posixpath.normpath(name)] = str(label).strip()
        return found


def _labels_by_folder(path, names: list[str]) -> tuple[list[int], list[str]]:
    """The classes are the folders of the first level at which the images' folders differ."""
    folders = [pathlib.PurePosixPath(name).parts[:-1] for name in names]
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    if len(set(folders)) == 1 and folders[0]:
        raise DataError(
            f"{path} has only one class folder, {'/'.join(folders[0])!r}; labels need two, or {WITHOUT_LABELS}"
        )
    stray = [name for name, parts in zip(names, folders, strict=True) if len(parts) <= shared]
    if stray:
        raise DataError(
            f"{path} has no class folder for {stray[0]!r}; put every image into a folder per class, at least two of "
            f"them, add a {' or '.join(_LABEL_FILES)}, or {WITHOUT_LABELS}"
        )
    classes = sorted({parts[shared] for parts in folders})
    if all(re.fullmatch(r"\d{5,}", name) for name in classes):
        text = "%s: no %s is there, so the folders %s are taken for classes. If they only divide the files, %s"
        log.warning(text, path, " or ".join(_LABEL_FILES), ", ".join(classes[:3]), WITHOUT_LABELS)
    number = {name: i for i, name in enumerate(classes)}
    return [number[parts[shared]] for parts in folders], classes
