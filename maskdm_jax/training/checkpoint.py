"""Checkpoints on Orbax: saved in the background, restored onto any mesh, bit for bit.

    WORKDIR/checkpoints/STEP/{params, ema, ema2, ..., optimizer, meta}

STEP counts the steps of all stages. `meta` is JSON: the stage and its step, the position in the data, the whole config
and the class names. Sampling and resuming need no other file.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shlex
import shutil
import tempfile

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from maskdm_jax import config as config_lib
from maskdm_jax.errors import CheckpointError, ConfigError, first_line, prefixed
from maskdm_jax.parallel import processes
from maskdm_jax.storage import is_remote, local_copy, location, move, remove_tree, upload, write_atomically
from maskdm_jax.training.state import TrainState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_STARTED, _FINISHED = "_CHECKPOINT_METADATA", "commit_success.txt"  # Orbax's first and last file, in an object store
_EMA = re.compile(r"ema\d*")  # name of the item of an EMA
META = dict(stage=str, stage_step=int, past=dict, data=dict, window=dict, classes=list, card=dict, config=dict)
META |= dict(images=(int, type(None)))  # number; None: converted from another format


_NONE, _UNREADABLE = -1, -2  # in place of the step of a checkpoint


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its calls of JAX's preemption service, which `processes.stop_requested` calls every step.

    Orbax would call it from its background thread with the number of an earlier step. If SIGTERM came just then, JAX
    would choose a step to stop at that the loop has already passed, and the run would never stop.
    """

    def reached_preemption(self, step: int) -> bool:
        """Always False: a save before a stop is like any other."""
        return False


class Checkpoints:
    """The checkpoints of a run folder. Keeps the `keep` newest and those of the steps in `keep_steps`.

    Orbax does not write to s3://. There, each checkpoint is written to a temporary folder and uploaded.
    """

    def __init__(self, workdir, *, keep: int, keep_steps=()):
        check_path(workdir)
        self.folder, self._verified, self._last = location(workdir) / FOLDER, False, None
        self._keep, self._keep_steps = keep, list(keep_steps)

    @functools.cached_property
    def _manager(self) -> _Manager:
        """Orbax's manager, made at the first save. To look at a checkpoint takes it twenty requests to a store."""
        preserved = AnyPreservationPolicy([LatestN(self._keep), CustomSteps(self._keep_steps)])
        return _Manager(self.folder, options=ocp.CheckpointManagerOptions(preservation_policy=preserved))

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint, or None. A partial one, interrupted by a kill, does not count."""
        return _newest(self.folder)

    def latest_valid(self) -> int | None:
        """Step of the newest checkpoint that can be read, the same in all processes; None if there is none.

        A newer one that cannot be read is logged and renamed to STEP.damaged, because its step will be saved again.

        Raises:
          CheckpointError: there are checkpoints, but none can be read. They stay: the disk may be at fault.
        """
        step = self._set_damaged_aside() if processes.is_first() else 0
        step = int(processes.gather(step)[0])  # they may see a shared disk differently
        if step == _UNREADABLE:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; if the disk is in order, remove them to start anew"
            )
        self._last = None if step == _NONE else step
        return self._last

    def _set_damaged_aside(self) -> int:
        """Rename the checkpoints after the newest readable one; return its step, or `_NONE` or `_UNREADABLE`."""
        self._clear_away()
        damaged = {}
        for step in _finished(self.folder):
            try:
                check(self.folder / str(step))
                break
            except CheckpointError as error:
                damaged[step] = error
        else:
            for error in damaged.values():
                log.error("%s", error)
            return _UNREADABLE if damaged else _NONE
        for other, error in damaged.items():
            log.warning("%s; renamed to %s, resuming from %d", error, self._move_aside(other), step)
        return step

    def _clear_away(self) -> None:
        """Rename folders that are no checkpoints; Orbax would delete them among the oldest checkpoints."""
        for path in _children(self.folder):
            if not path.name.isdecimal() or _is_checkpoint(path):
                continue
            if _on_s3(path) and _is_whole(path):  # a copy from a disk, where Orbax adds no file to what is finished
                write_atomically(path / _FINISHED, b"")
            elif is_remote(path) and (path / _STARTED).exists():
                log.warning("%s was not finished; deleted", path)
                remove_tree(path)
            else:
                log.warning("%s is no checkpoint; renamed to %s", path, self._move_aside(path.name))

    def _move_aside(self, step: int | str) -> str:
        """Rename a folder that is not a valid checkpoint, and return its new name."""
        names = (f"{step}.damaged" + f"-{n}" * (n > 1) for n in itertools.count(1))
        aside = next(name for name in names if not (self.folder / name).exists())
        move(self.folder / str(step), self.folder / aside)
        return aside

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Start writing, and return when the state is copied and can be donated; for s3://, when it is uploaded.

        Raises:
          CheckpointError: the disk is too full, or the previous checkpoint could not be written.
        """
        if step == self._last:
            return
        with self._writing():
            if _on_s3(self.folder):
                with tempfile.TemporaryDirectory(prefix="maskdm-") as scratch, _Manager(scratch) as manager:
                    _save(manager, step, state, meta)
                    manager.wait_until_finished()
                    self._publish(location(scratch) / str(step), step)
            else:
                _save(self._manager, step, state, meta)
        self._last = step
        if not self._verified:  # a disk that does not keep what is written to it shows now, not at the next start
            self.wait()
            if processes.is_first():
                check(self.folder / str(step))
            self._verified = True

    def _publish(self, checkpoint: pathlib.Path, step: int) -> None:
        """Upload a checkpoint, and last the file that marks it as finished; then delete those that are not kept."""
        upload(checkpoint, self.folder / str(step))  # `_STARTED` is the first in alphabetical order
        write_atomically(self.folder / str(step) / _FINISHED, b"")
        for old in list(_finished(self.folder))[self._keep :]:
            if old not in self._keep_steps:
                (self.folder / str(old) / _FINISHED).unlink()  # first, so that no part is taken for a checkpoint
                remove_tree(self.folder / str(old))

    def wait(self) -> None:
        """Wait until the checkpoints are on disk.

        Raises:
          CheckpointError: one could not be written.
        """
        if "_manager" in vars(self):
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and release."""
        if "_manager" in vars(self):
            with self._writing():
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Context for writing by Orbax; any exception becomes a `CheckpointError` of one line."""
        try:
            yield
        except Exception as error:
            latest = self.latest()
            resume = "there is none yet" if latest is None else f"the same command resumes from step {latest}"
            raise CheckpointError(
                f"no checkpoint can be written to {self.folder} ({first_line(error)}); check that it is writable and "
                f"has room; {resume}"
            ) from error


def _save(manager: _Manager, step: int, state: TrainState, meta: dict) -> None:
    """Start writing to the folder of a manager.

    Raises:
      OSError: the disk is too full, for which Orbax would log hundreds of lines.
    """
    folder, needed = manager.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = math.inf if is_remote(folder) else shutil.disk_usage(folder).free
    if processes.is_first() and free < needed:
        raise OSError(f"step {step} takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free")
    manager.save(
        step,
        args=ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()},
            meta=ocp.args.JsonSave(meta),
        ),
        force=True,  # beside a stray folder of a higher number, Orbax would save nothing and say nothing
    )


def check_path(path) -> None:
    """Refuse a path where Orbax cannot write, or that it would take for a pattern.

    Raises:
      ConfigError: it is at s3:// and there are several processes, or has characters of patterns.
    """
    if _on_s3(location(path)) and jax.process_count() > 1:
        raise ConfigError(
            f"{path}: several processes cannot write checkpoints to s3://; give a disk that all hosts see, or gs://"
        )
    patterns = sorted(set(str(location(path))) & set("[]*?"))
    if patterns:
        raise ConfigError(f"{path}: no checkpoint can be kept below a folder with {' '.join(patterns)} in its name")


def find(path) -> pathlib.Path:
    """Find a checkpoint: `path` is a checkpoint or a run folder, whose newest one is taken.

    Raises:
      CheckpointError: there is none.
    """
    path = location(path)
    if _is_checkpoint(path):
        return path
    for folder in (path / FOLDER, path):
        newest = _newest(folder)
        if newest is not None:
            return folder / str(newest)
    if path.is_file() or any(child.suffix == ".safetensors" for child in _children(path)):
        command = f"python launch/convert.py --src={shlex.quote(str(path))} --dst=runs/{shlex.quote(path.stem)}"
        raise CheckpointError(
            f"{path} is not a run of this project; if it holds weights of PyTorch, convert it: {command}"
        )
    raise CheckpointError(f"{path} holds no checkpoint; give a run folder or one of its {FOLDER}/STEP folders")


def load_meta(checkpoint: pathlib.Path) -> dict:
    """The JSON part of a checkpoint that `find` returned.

    Raises:
      CheckpointError: it is damaged.
      ConfigError: its config is not one of this version.
    """
    with _reading(checkpoint):
        meta = json.loads((checkpoint / "meta" / "metadata").read_bytes())  # Orbax would wait for the other processes
        known = meta if isinstance(meta, dict) else {}
        wrong = [key for key, kind in META.items() if not isinstance(known.get(key, ...), kind)]
        if wrong:
            raise ValueError(f"its meta lacks or garbles {', '.join(wrong)}")
    try:
        config_lib.parse(meta["config"])
    except ConfigError as error:
        raise ConfigError(f"{checkpoint} was made by another version of this project: {error}") from None
    return meta


def load_state(checkpoint: pathlib.Path, abstract: TrainState) -> TrainState:
    """Read the whole state of a checkpoint that `find` returned, with the shardings of `abstract`.

    Raises:
      CheckpointError: names, shapes or dtypes differ.
    """
    _check_names(checkpoint, abstract)
    loaded = {name: load_item(checkpoint, name, tree) for name, tree in _items(abstract).items()}
    params, rest = loaded.pop("params"), loaded.pop("optimizer")
    return TrainState(params=params, emas=tuple(loaded.values()), **rest)


def check(checkpoint: pathlib.Path) -> None:
    """Read a whole checkpoint, one array at a time, to find damage. Orbax would log thousands of lines.

    Raises:
      CheckpointError: it is damaged.
    """
    load_meta(checkpoint)
    for item in (*weights_in(checkpoint), "optimizer"):
        with _reading(checkpoint), _readable(checkpoint / item) as folder:
            described = json.loads((folder / "_METADATA").read_bytes())["tree_metadata"]
            for path in (*_children(folder / "array_metadatas"), folder / "_sharding"):
                with contextlib.suppress(FileNotFoundError):
                    json.loads(path.read_bytes())
            store = {"driver": "ocdbt", "base": folder.as_uri() + "/"}
            keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
            arrays = [key.removesuffix(".zarray") for key in keys if key.endswith(".zarray")]
            wanted = sum(not entry["value_metadata"]["skip_deserialize"] for entry in described.values())
            if len(arrays) != wanted:
                raise ValueError(f"{item} has {len(arrays)} of {wanted} arrays")
            for name in arrays:
                options = {"driver": "zarr", "fill_missing_data_reads": False, "kvstore": store | {"path": name}}
                tensorstore.open(options).result().read().result()


def load_item(checkpoint: pathlib.Path, item: str, abstract):
    """Read `params` or `ema` of a checkpoint that `find` returned, with the shardings of `abstract`.

    Raises:
      CheckpointError: names, shapes or dtypes differ.
    """
    with _reading(checkpoint), _readable(checkpoint / item) as folder, ocp.StandardCheckpointer() as reader:
        _check_item(checkpoint, folder, abstract)  # every name, shape and dtype: Orbax casts dtypes silently
        return reader.restore(folder, abstract)


def check_fit(checkpoint: pathlib.Path, abstract: TrainState) -> None:
    """Compare names, shapes and dtypes of a checkpoint with those of a state.

    Raises:
      CheckpointError: they differ.
    """
    _check_names(checkpoint, abstract)
    for item, part in _items(abstract).items():
        with _reading(checkpoint), _readable(checkpoint / item) as folder:
            _check_item(checkpoint, folder, part)


def _check_names(checkpoint: pathlib.Path, abstract: TrainState) -> None:
    stored, wanted = weights_in(checkpoint), list(abstract.weights)
    if stored != wanted:
        raise CheckpointError(
            f"{checkpoint} holds {', '.join(stored)}, but the config asks for {', '.join(wanted)}: its stage needs "
            f"{len(stored) - 2} more_ema_decays"
        )


def _check_item(checkpoint: pathlib.Path, folder: pathlib.Path, abstract) -> None:
    stored = ocp.StandardCheckpointHandler().metadata(folder).tree
    compare(f"the {folder.name} of {checkpoint} do not fit config.model", stored, abstract)


def _items(state: TrainState) -> dict:
    """The parts of a state by the names of their folders."""
    rest = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in ("params", "emas")}
    return state.weights | {"optimizer": rest}


def weights_in(checkpoint: pathlib.Path) -> list[str]:
    """Names of the sets of weights in a checkpoint: params, ema, ema2, ..."""
    emas = {"ema"} | {path.name for path in checkpoint.iterdir() if _EMA.fullmatch(path.name)}
    return ["params", *sorted(emas, key=lambda name: (len(name), name))]


def _children(folder) -> list:
    """What a folder holds, if it exists."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _newest(folder) -> int | None:
    """Step of the newest checkpoint in a folder."""
    return next(_finished(folder), None)


def _finished(folder):
    """Steps of the checkpoints in a folder, the newest first."""
    steps = sorted((int(path.name) for path in _children(folder) if path.name.isdecimal()), reverse=True)
    return (step for step in steps if _is_checkpoint(folder / str(step)))


def is_finished(path: pathlib.Path) -> bool:
    """Whether a path in a folder of checkpoints is one, and not being written or moved aside."""
    return path.name.isdecimal() and _is_checkpoint(path)


def _is_checkpoint(path: pathlib.Path) -> bool:
    # On a disk, Orbax renames a finished checkpoint; in an object store, it adds a file.
    finished = not is_remote(path) or (path / _FINISHED).exists()
    return finished and (path / "meta").is_dir() and (path / "params").is_dir()


def _is_whole(checkpoint: pathlib.Path) -> bool:
    """Whether all of a checkpoint can be read."""
    try:
        check(checkpoint)
    except CheckpointError:
        return False
    return True


def _on_s3(path) -> bool:
    return os.fspath(path).startswith("s3://")


def _readable(path):
    """Context for a path that Orbax and TensorStore can read: itself, or a copy of what is at s3://."""
    return local_copy(path) if _on_s3(path) else contextlib.nullcontext(path)


def _reading(checkpoint: pathlib.Path):
    """Context for reading a checkpoint; any exception becomes a `CheckpointError` of one line."""
    return prefixed(CheckpointError, f"{checkpoint} is damaged (", Exception, "); an earlier one may be intact")


def compare(message: str, stored, abstract) -> None:
    """Check that two trees have the same names, shapes and dtypes.

    Raises:
      CheckpointError: they do not; `message`, then the differences by name.
    """
    stored, wanted = _shapes(stored), _shapes(abstract)
    problems = [f"missing in the checkpoint: {name}" for name in wanted.keys() - stored.keys()]
    problems += [f"unknown to this model: {name}" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name} is {stored[name]} there and {wanted[name]} here"
        for name in wanted.keys() & stored.keys()
        if stored[name] != wanted[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{message}: {shown}")


def _shapes(tree) -> dict:
    """Names of the leaves -> shape and dtype. PRNG keys are described by their stored words."""

    def describe(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{tuple(leaf.shape)} {leaf.dtype}"

    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): describe(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
