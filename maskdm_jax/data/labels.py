"""Class labels of image files: from label files beside them, or from the names of their folders."""

import csv
import io
import itertools
import json
import posixpath
import re
import unicodedata

from maskdm_jax.data.base import WITHOUT_LABELS
from maskdm_jax.errors import DataError, prefixed

LABEL_COLUMNS = ("label", "labels", "class", "category")

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}  # names of folders


def _read_dataset_json(text: str) -> list[dict]:
    """The format of StyleGAN and EDM: {"labels": [["00000/img.png", 3], ...]}, or null without labels."""
    found = json.loads(text)
    if not isinstance(found, dict) or "labels" not in found:
        return []
    if not found["labels"]:
        raise ValueError("it lists none")
    return [dict(file_name=name, label=label) for name, label in found["labels"]]


def _read_csv(text: str) -> list[dict]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if len(set(columns)) < len(columns):
        raise ValueError(f"two of its columns {columns} have the same name")
    return list(reader)


# Each reader returns rows of columns, `file_name` among them; files without it have nothing to do with labels.
_LABEL_FILES = {
    "dataset.json": _read_dataset_json,
    "metadata.csv": _read_csv,  # Hugging Face's imagefolder
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
      (labels, one class number per image; class names; names of the label files; notes for the log).

    Raises:
      DataError: neither label files nor folders define the label of every image.
    """
    known, files, notes = {}, [], []
    for name in others:
        kind = posixpath.basename(name).lower()
        found = _read_label_file(path, name, read) if kind in _LABEL_FILES else {}
        for image, label in found.items():
            if known.setdefault(image, label) != label:
                raise DataError(
                    f"{path}: {' and '.join([*files, name])} give different labels to {image!r}; remove one"
                )
        if found:
            files.append(name)
        elif kind in _LABEL_FILES or kind == "metadata.parquet":
            notes.append(
                f"no labels are taken from {name}: a metadata.csv or .jsonl needs a column 'file_name', a "
                "dataset.json needs 'labels'"
            )
    if not files:
        labels, classes = _labels_by_folder(path, names)
        if notes or all(re.fullmatch(r"\d{5,}", name) for name in classes):
            shown = ", ".join(classes[:3])
            notes.append(f"the folders {shown} are taken for classes. If they only divide the files, {WITHOUT_LABELS}")
        return labels, classes, [], notes
    labels = {name: known.get(_normalized(name)) for name in names}
    bare = [name for name, label in labels.items() if label is None]
    if bare:
        raise DataError(
            f"{path}: {' and '.join(files)} lack a label for {bare[0]!r} ({len(bare)} of {len(names)} images); add "
            f"it, or {WITHOUT_LABELS}"
        )
    if len(known) > len(names):
        notes.append(f"{' and '.join(files)} list {len(known) - len(names)} images that are not there")
    return *number_labels(list(labels.values())), files, notes


def number_labels(labels: list[str]) -> tuple[list[int], list[str]]:
    """(class numbers, class names) of labels as texts: numbers stay the numbers of the classes, names are sorted."""
    if all(re.fullmatch(r"\d{1,6}(\.0+)?", label) for label in labels):
        numbers = [int(float(label)) for label in labels]  # label 3 is class 3, even if no image has label 2
        return numbers, [str(i) for i in range(max(numbers) + 1)]
    classes = sorted(set(labels))
    number = {name: i for i, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def read_label(suffix: str, content: bytes) -> str | None:
    """The label in a file beside an image, as text: all of a `.cls`, a key of a `.json`. None if there is none."""
    try:
        text = content.decode()
        if suffix == ".cls":
            return _class_name(text)
        found = json.loads(text)
        column = next((name for name in LABEL_COLUMNS if name in found), None) if isinstance(found, dict) else None
        return _class_name(found[column]) if column else None
    except (ValueError, RecursionError):
        return None


def _read_label_file(path, file: str, read) -> dict[str, str]:
    """Label by normalized name of every image that a file lists; {} if the file is of another kind."""
    causes = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, csv.Error)  # RuntimeError: of a zip
    hint = f"); repair or remove it, or {WITHOUT_LABELS}"
    with prefixed(DataError, f"{path}: {file} cannot be used for labels (", causes, hint):
        rows = _LABEL_FILES[posixpath.basename(file).lower()](read(file).decode("utf-8-sig"))
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
            label = _class_name(row.get(column))
            if label is None:
                shown = f"{row.get('file_name')!r} is {row.get(column)!r}"
                raise ValueError(f"the label of {shown}, not the number or name of a class")
            name = _normalized(posixpath.join(posixpath.dirname(file), row["file_name"].replace("\\", "/")))
            if found.setdefault(name, label) != label:
                raise ValueError(f"it gives two labels to {row['file_name']!r}")
        return found


def _normalized(name: str) -> str:
    """A name without `./` and `../`; macOS writes accents as characters of their own, label files mostly do not."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def _class_name(label) -> str | None:
    """A label as text; None if it is not one, such as -1 for an image without a label, 0.5 or NaN."""
    text = str(label).strip()
    if isinstance(label, bool) or not isinstance(label, (int, float, str)) or not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return text if number >= 0 and number.is_integer() else None


def differing_folders(names: list[str]) -> list[str]:
    """The folder of each image at the first level at which the images' folders differ; "" if it has none there."""
    folders = [[part for part in name.split("/")[:-1] if part not in ("", ".")] for name in names]
    same = lambda level: len(set(level)) == 1
    shared = sum(1 for _ in itertools.takewhile(same, zip(*folders, strict=False)))
    return [parts[shared] if len(parts) > shared else "" for parts in folders]


def _labels_by_folder(path, names: list[str]) -> tuple[list[int], list[str]]:
    """The classes are the folders of the first level at which the images' folders differ."""
    folders, only = differing_folders(names), posixpath.dirname(posixpath.normpath(names[0]))
    if only and not any(folders):
        raise DataError(f"{path} has only one class folder, {only!r}; labels need two, or {WITHOUT_LABELS}")
    if "" in folders:
        raise DataError(
            f"{path} has no class folder for {names[folders.index('')]!r}; put every image into a folder per class, at "
            f"least two of them, add a {' or '.join(_LABEL_FILES)}, or {WITHOUT_LABELS}"
        )
    classes = sorted(set(folders))
    if SPLITS.issuperset(map(str.lower, classes)):
        raise DataError(
            f"{path} is divided into {', '.join(classes)}: splits, not classes; give the path of one of them"
        )
    number = {name: i for i, name in enumerate(classes)}
    return [number[folder] for folder in folders], classes
