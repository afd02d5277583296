"""The data sets of the literature, read from the files that their authors publish."""

import dataclasses
import pathlib
import re
import tarfile
import typing
import zipfile

from maskdm_jax.data.databases import ArrayBatches, TfdsImages
from maskdm_jax.data.images import Framing
from maskdm_jax.data.sources import Selection, open_source
from maskdm_jax.errors import DataError, prefixed

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclasses.dataclass(frozen=True)
class Published:
    """How a set is opened, how the literature uses it, and what it must hold."""

    open: typing.Callable  # (path, split, whether to read labels) -> source
    framing: Framing
    counts: dict[str, int]  # number of images per split; the first split is the default
    classes: int = 0  # 0: without labels


_OTHER_NAMES = {"valid": "validation"}  # of splits, in TFDS and in CelebA-HQ's databases


def open_published(dataset: str, src: str, *, split: str = "", labels: bool | None = None, any_count: bool = False):
    """Open a set of `SETS` from its files.

    Args:
      src: a folder with the published files, one of these files, a folder of the unpacked images, or `tfds:NAME`.
      split: a split of the set; "" for its first.
      labels: whether to read class labels; None reads them if the set has classes.
      any_count: accept a number of images other than the set's.

    Returns:
      (source, split).

    Raises:
      DataError: files are missing or damaged, their number is wrong, or the set has no such split or no classes.
    """
    known = SETS[dataset]
    split = split or next(iter(known.counts))
    if split not in known.counts:
        raise DataError(f"{dataset} has no split {split!r}; choose from {', '.join(known.counts)}")
    labels = known.classes > 0 if labels is None else labels
    if labels and not known.classes:
        raise DataError(f"{dataset} has no classes; leave --labels out")
    if src.startswith("tfds:"):
        source = open_tfds(src, labels, _OTHER_NAMES.get(split, split))
    else:
        place = pathlib.Path(src).expanduser()
        if not place.exists():
            raise DataError(f"{src!r} does not exist; give the folder with the files of {dataset}")
        source = known.open(place, split, labels)
    if len(source) != known.counts[split] and not any_count:
        raise DataError(
            f"{src} holds {len(source)} images, but {dataset} ({split}) has {known.counts[split]}; give all of it, or "
            "--any_count if you mean it"
        )
    return source, split


def open_tfds(src: str, labels: bool, split: str = ""):
    """Open `tfds:NAME`; TFDS downloads and prepares it first unless that was done before."""
    import tensorflow_datasets as tfds  # seconds to import

    with prefixed(DataError, f"{src} cannot be prepared by TFDS: ", Exception):  # TFDS raises many types
        builder = tfds.builder(src.removeprefix("tfds:"), file_format="array_record")
        hint = "; install this package, such as tensorflow, which TFDS needs for the set"
        with prefixed(DataError, f"{src} cannot be prepared by TFDS: ", ImportError, hint):
            builder.download_and_prepare()
    return TfdsImages(builder.data_dir, labels, split)


def _celeba(place, split, labels):
    source = open_source(str(_find(place, "img_align_celeba.zip") or place))
    if split == "all":
        return source
    number = {"train": "0", "valid": "1", "test": "2"}[split]
    wanted = {name for name, part in _celeba_partition(place).items() if part == number}
    if not wanted:
        raise DataError(f"the split file of {place} lists no image of {split}; download list_eval_partition.txt again")
    numbers = [i for i, name in enumerate(source.names) if pathlib.PurePosixPath(name).name in wanted]
    if not numbers:
        raise DataError(f"{place} holds no image that its split file lists for {split}, such as {min(wanted)}")
    return Selection(source, numbers)


def _celeba_partition(place: pathlib.Path) -> dict[str, str]:
    """File name -> "0" (train), "1" (valid) or "2" (test), from the official text file or its .csv copy."""
    inside = _members(place, r"(^|/)list_eval_partition\.(txt|csv)$") if zipfile.is_zipfile(place) else []
    if inside:
        with zipfile.ZipFile(place) as archive:
            content = archive.read(inside[0])
    else:
        around = place.parent if place.is_file() else place
        file = _find(around, "list_eval_partition.txt", "list_eval_partition.csv")
        if file is None:
            raise DataError(f"{around} lacks list_eval_partition.txt, the official split; put it there, or --split=all")
        content = file.read_bytes()
    rows = [line.replace(",", " ").split() for line in content.decode("utf-8", "replace").splitlines()]
    return {row[0]: row[-1] for row in rows if len(row) > 1 and row[-1] in ("0", "1", "2")}


def _celebahq(place, split, labels):
    database = _find(place, f"{_OTHER_NAMES.get(split, split)}.lmdb")
    source = open_source(str(database or place))
    # CelebAMask-HQ.zip holds many face masks per image too.
    inside = [i for i, name in enumerate(source.names) if "CelebA-HQ-img/" in f"/{name}"]
    return Selection(source, inside) if inside else source


def _vggface2(place, split, labels):
    tars = [f"vggface2_{split}.{suffix}" for suffix in ("tar", "tar.gz")]  # the latter for an error that names it
    return open_source(str(_find(place, split, *tars) or place), labels)


def _lsun_church(place, split, labels):
    name = {"train": "church_outdoor_train_lmdb", "valid": "church_outdoor_val_lmdb"}[split]
    place = _find(place, name) or place
    zipped = _find(place, f"{name}.zip")
    if zipped or _members(place, r"data\.mdb$"):
        raise DataError(f"{zipped or place} holds a database, which cannot be read inside a zip; unpack it first")
    return open_source(str(place))


def _cifar10(place, split, labels):
    pattern = {"train": r"(^|/)data_batch_\d(\.bin)?$", "test": r"(^|/)test_batch(\.bin)?$"}[split]
    return _batches(place, "cifar-10-*.tar.gz", pattern, CIFAR10 if labels else [], 0)


def _imagenet64(place, split, labels):
    pattern = {"train": r"(^|/)train_data_batch_\d+(\.npz)?$", "valid": r"(^|/)val_data(\.npz)?$"}[split]
    return _batches(place, "Imagenet64_*.zip", pattern, [str(i) for i in range(1, 1001)] if labels else [], 1)


def _batches(place, archives: str, pattern: str, classes, first_label: int):
    """All files, or members of archives, whose names match the pattern, ordered by the numbers in their names."""
    places = [place] if place.is_file() else sorted(place.glob(archives))
    found = {name: (str(path), name) for path in places for name in _members(path, pattern)}
    if place.is_dir():
        near = [str(path) for path in (*place.glob("*"), *place.glob("*/*")) if path.is_file()]
        found = {name: (name, "") for name in near if re.search(pattern, name)} or found
    if not found:
        raise DataError(f"{place} holds no file that matches {pattern!r}, nor {archives} with such files")
    number = lambda name: int("".join(re.findall(r"\d+", re.search(pattern, name).group())) or 0)
    once = {pathlib.PurePosixPath(name).stem: name for name in found}  # .bin files and pickles hold the same images
    files = [found[name] for name in sorted(once.values(), key=number)]
    return ArrayBatches(files, classes, first_label=first_label)


def _members(path: pathlib.Path, pattern: str) -> list[str]:
    """Members of a zip or tar whose names match the pattern; [] for anything else."""
    names = []
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    elif path.is_file() and ".tar" in path.name:
        causes = (tarfile.TarError, EOFError, OSError)
        broken = prefixed(DataError, f"{path} is not a readable archive (", causes, "); copy it again")
        with broken, tarfile.open(path) as archive:
            names = [member.name for member in archive if member.isfile()]
    return [name for name in names if re.search(pattern, name)]


def _find(place: pathlib.Path, *names: str) -> pathlib.Path | None:
    """The first entry of one of these names in a folder or in its subfolders."""
    found = (path for name in names for path in [*place.glob(name), *sorted(place.glob(f"*/{name}"))])
    return next(found, None)


SETS = {
    # The crop of DDIM (Song et al. 2021) and U-ViT: 128 x 128 pixels around (89, 121) of the aligned 178 x 218.
    "celeba": Published(
        _celeba,
        Framing(64, crop="25,57,128", filter="bilinear"),
        {"train": 162_770, "valid": 19_867, "test": 19_962, "all": 202_599},
    ),
    "celebahq": Published(_celebahq, Framing(256), {"all": 30_000, "train": 27_000, "valid": 3_000}),
    "vggface2": Published(_vggface2, Framing(256), {"train": 3_141_890, "test": 169_396}, classes=8_631),
    "lsun_church": Published(_lsun_church, Framing(256), {"train": 126_227, "valid": 300}),
    "cifar10": Published(_cifar10, Framing(32), {"train": 50_000, "test": 10_000}, classes=10),
    "imagenet64": Published(_imagenet64, Framing(64), {"train": 1_281_167, "valid": 50_000}, classes=1_000),
}
