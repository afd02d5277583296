"""Checkpoints from one form to another: run folder (Orbax), the authors' `.pt`, `.safetensors`, folder for PyTorch."""

import contextlib
import dataclasses
import json
import os
import pathlib
import typing

import jax
import numpy as np
import optax

from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network
from maskdm_jax.config import Config
from maskdm_jax.errors import CheckpointError, ConfigError, TorchFileError, prefixed
from maskdm_jax.interop import official as official_file
from maskdm_jax.interop.names import NETWORKS
from maskdm_jax.interop.official import Moment, Official
from maskdm_jax.interop.torch_folder import write as torch_folder
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.storage import is_remote, location, move, remove_tree, write_atomically
from maskdm_jax.training import checkpoint
from maskdm_jax.training.loop import stage_ends
from maskdm_jax.training.start import abstract_state, compare_settings, meaning
from maskdm_jax.training.state import TrainState, ema_decays, ema_names, learning_rate, make_optimizer

_TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
_OTHER_FILES = (".npz", ".npy", ".h5", ".msgpack", ".pkl", ".onnx", ".zip", ".tar", ".json")


@dataclasses.dataclass
class _Source:
    """The content of a source of any kind."""

    path: pathlib.Path
    official: Official
    config: Config | None = None  # of the run; None if the file does not say
    stage: str = ""  # of the config
    classes: list[str] = dataclasses.field(default_factory=list)
    goes_on: bool = False  # whether a config was given, to train further
    only: str = "params"  # name of the weights, if there is one set of them

    def chosen(self, weights: str) -> tuple[str, dict]:
        """Name and tensors of the weights asked for; a single set of weights serves as `ema`, under its own name."""
        sets = self.official.weights if self.official.emas else {self.only: self.official.model}
        name = self.only if weights == "ema" and "ema" not in sets else weights
        if name not in sets:
            raise ConfigError(f"the source has no weights {name!r}; it has {', '.join(sets)}")
        return name, sets[name]


def convert(
    src,
    dst,
    *,
    heads: int | None = None,
    class_tokens_from: int | None = None,
    config=None,
    stage: str | None = None,
    weights: str = "ema",
    dtype: str = "float32",
    for_torch: bool = False,
) -> list[str]:
    """Convert `src` into `dst`; the paths tell the kinds.

    Args:
      src: a run folder or one of its checkpoints; an official `.pt` of a U-ViT or `.pth` of a JiT (or another file with
        such weights); or a `.safetensors`, or a folder with `model.safetensors`.
      dst: a run folder with one checkpoint, a `.pt` or a `.safetensors`; must not exist yet.
      heads: attention heads of a U-ViT, which its tensors do not show. Where neither it nor a config is known,
        width / 64 is assumed, as in the official models.
      class_tokens_from: the block before which the class tokens of a JiT join, which its tensors do not show. Where
        neither it nor a config nor the file's `args.model` tells, that of the authors' JiT of this size is assumed.
      config: ConfigDict or dict of the run that a file belongs to, to train it further; must agree with the file.
        Without it the checkpoint gets a config made from the file, good for sampling.
      stage: of `config`, the one that the file belongs to; the first when not given.
      weights: those that go into a `.safetensors`: `ema`, `ema2`, ... or `params`.
      dtype: of the weights in a `.safetensors`: `float32` or `bfloat16`.
      for_torch: make `dst` a folder for users of PyTorch, with weights, model code, sampler and model card.

    Returns:
      lines for the user: what was carried over, and what was not.

    Raises:
      TorchFileError, CheckpointError, ConfigError: nothing was written; the message says why.
    """
    src, dst = map(location, (src, dst))
    kind = "torch" if for_torch else _kind(dst)
    if kind == _kind(src) != "safetensors":  # these can be converted to another dtype
        raise ConfigError(f"{src} and {dst} are of the same kind; there is nothing to convert")
    given = None if config is None else config_lib.parse(config)
    writers = dict(folder=_to_folder, pt=_to_pt, safetensors=_to_safetensors, torch=_to_torch)
    options = dict(weights=weights, dtype=dtype) if kind in ("safetensors", "torch") else {}
    unused = [f"--dtype={dtype}"] * (dtype != "float32") + [f"--weights={weights}"] * (weights != "ema")
    if unused and not options:
        raise ConfigError(f"{unused[0]} is for a .safetensors or --for=torch; {dst} holds all weights, in float32")
    with prefixed(TorchFileError, f"{src}: "):
        source = _read(src, dict(heads=heads, class_tokens_from=class_tokens_from), given, stage)
        with prefixed(CheckpointError, f"{dst} cannot be written: ", OSError):
            there = dst.exists() if is_remote(dst) else os.path.lexists(dst)  # a link to nothing, too
            if there and not (kind in ("folder", "torch") and dst.is_dir() and not any(dst.iterdir())):
                raise ConfigError(f"{dst} exists already; give another --dst or move it away")
            lines = writers[kind](dst, source, **options)
    return [*lines, *source.official.notes]


def read_weights(path, *, weights: str = "ema", heads: int | None = None) -> tuple[Config, list[str], dict]:
    """Read a file's config, names of its classes, and weights; arguments and errors are those of `convert`."""
    path = location(path)
    with prefixed(TorchFileError, f"{path}: "):
        source = _read(path, dict(heads=heads, class_tokens_from=None))
        return source.config, source.classes, source.official.names.params(source.chosen(weights)[1])


def is_file(path) -> bool:
    """Whether a path is of a file with weights, or of a folder with a .safetensors; else of a run."""
    return _kind(location(path)) != "folder"


def _kind(path: pathlib.Path) -> str:
    suffix = path.suffix.lower()
    if official_file.is_safetensors(path):
        return "safetensors"
    if suffix in _OTHER_FILES:
        raise ConfigError(f"{path}: {suffix} is not known; give a .pt, a .safetensors or a run folder")
    return "pt" if suffix in _TORCH_FILES else "folder"


# --- Reading ------------------------------------------------------------------------------------


def _read(path: pathlib.Path, flags: dict, given: Config | None = None, stage: str | None = None) -> _Source:
    with prefixed(CheckpointError, f"{path} cannot be read: ", OSError):
        is_folder = _kind(path) == "folder"
        if not is_folder and not path.exists():
            raise CheckpointError(f"{path} does not exist")
        source = _from_folder(path) if is_folder else _from_file(path)
    return _settle_config(source, flags, given, stage)


def _from_file(path: pathlib.Path) -> _Source:
    official, noted = official_file.load(path)
    if not noted:
        return _Source(path, official)
    with prefixed(ValueError, "its header does not hold a config of this project (", (LookupError, TypeError), ")"):
        return _Source(path, official, *_origin(noted, "its header"), only=str(noted.get("weights", "params")))


def _origin(meta: dict, where) -> tuple[Config, str, list[str]]:
    """Config, stage and classes of the run that a source is from."""
    config, stage = config_lib.parse(meta["config"]), meta["stage"]
    if stage not in config.stages:
        raise CheckpointError(f"{where} is damaged: its stage {stage!r} is not in its config")
    return config, stage, [str(name) for name in meta["classes"]]


def _from_folder(path: pathlib.Path) -> _Source:
    found = checkpoint.find(path)
    config, stage, classes = _origin(checkpoint.load_meta(found), found)
    network, has_token = config.model.network, config.model.returning == "token"
    if has_token and network == "jit":
        raise CheckpointError(f"{found} is a JiT with config.model.returning='token', which no other format can hold")
    if network not in NETWORKS:
        raise CheckpointError(f"{found} is of {network}, a network that PyTorch code has no counterpart of")
    index, mesh = config.stages.index(stage), make_mesh(devices=jax.devices()[:1])
    state = checkpoint.load_state(found, abstract_state(config, index, make_network(config), mesh))

    def named(tree):
        if has_token:  # which only hidden patches use
            tree = tree | {"backbone": {key: part for key, part in tree["backbone"].items() if key != "mask_token"}}
        return NETWORKS[network].state_dict(tree, config.model.patch_size, config.model.wavelet_scale)

    step = int(state.step)
    done = step + config_lib.steps_before(config, stage)
    official = Official(
        network,
        named(state.params),
        [named(ema) for ema in state.emas],
        ema_step=done,
        ema_initted=done > 0,
        moments=_moments(state.opt_state, named),
        group=_group(config.stage[stage]) | {"lr": float(learning_rate(config.stage[stage])(done))},
        step=step,
    )
    if has_token:
        official.notes.append("left out: the learned token of hidden patches; the config says returning='itself'")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, returning="itself"))
    return _Source(path, official, config, stage, classes)


def _moments(opt_state, named) -> dict[str, Moment]:
    """AdamW's state by name in PyTorch, without tensors that no step has used, as there."""
    moments = {}
    for adam in filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam)):
        if adam.count:
            mu, nu = named(adam.mu), named(adam.nu)
            moments |= {name: Moment(int(adam.count), mu[name], nu[name]) for name in mu}
    return moments


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _group(stage) -> dict:
    """AdamW's settings as PyTorch keeps them."""
    switches = dict(amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None)
    rates = dict(lr=stage.learning_rate, betas=(stage.b1, stage.b2), eps=1e-8, weight_decay=stage.weight_decay)
    return rates | switches | dict(decoupled_weight_decay=True, initial_lr=stage.learning_rate)


# --- The config ---------------------------------------------------------------------------------


def _settle_config(source: _Source, flags: dict, given: Config | None, stage: str | None) -> _Source:
    """The source with the config of its run: the one given, its own, or one made from the file."""
    path, official, own = source.path, source.official, source.config
    shown = official.format.shown(official) if own is None else meaning(own)
    if (given or own) and any(value is not None for value in flags.values()):
        has_them = "--config" if given else path
        raise ConfigError(f"--num_heads and --class_tokens_from are for files without settings; {has_them} has them")
    if stage is not None and given is None:
        raise ConfigError("--stage names a stage of a --config; give both")
    if given is not None:
        compare_settings(given, shown, path)
        config, stage = given, stage or given.stages[0]
    elif own is not None:
        config, stage = own, source.stage
    else:
        config, stage = _config_of(official, shown, flags), "stage"
    _check_fit(official, config, stage, path)
    if own is None:
        official.notes += official.format.differences(official, config, stage)
    classes = source.classes or [str(i) for i in range(shown["model.num_classes"])]
    return dataclasses.replace(source, config=config, stage=stage, classes=classes, goes_on=given is not None)


def _check_fit(official: Official, config: Config, stage: str, path: pathlib.Path) -> None:
    """Raise an error if weights or step do not fit a stage of a config."""
    if stage not in config.stages:
        raise ConfigError(f"--stage {stage!r} is not one of config.stages {config.stages}")
    steps = config.stage[stage].steps
    if official.step > steps:
        raise ConfigError(
            f"the file is at step {official.step}, but config.{stage}.steps is {steps}; give the stage "
            f"that it belongs to with --stage (config.stages is {config.stages}) or a config with enough steps"
        )
    params, wanted = official.names.params(official.model), make_network(config).abstract_params()
    checkpoint.compare(f"the weights in {path} are not those of a whole {official.names.network}", params, wanted)


def _config_of(official: Official, shown: dict, flags: dict) -> Config:
    """A config with all that the file shows; the rest (data, batch, mask) has the defaults."""
    c = config_lib.default()
    c.data.path, c.data.labels = config_lib.UNKNOWN, shown["model.num_classes"] > 0
    c.stages, c.stage = ("stage",), config_lib.stage(steps=max(official.step, 1))
    c.stage.more_ema_decays = (c.stage.ema_decay,) * len(official.emas[1:])
    if official.group:
        group = official.group
        c.stage.learning_rate = group.get("initial_lr", group.get("lr", 0.0))
        c.stage.b1, c.stage.b2 = group["betas"]
        c.stage.weight_decay = group.get("weight_decay", c.stage.weight_decay)
    c.update_from_flattened_dict(shown | official.format.settings(official, shown, **flags))
    return config_lib.parse(c)


# --- Writing ------------------------------------------------------------------------------------


def _to_folder(dst: pathlib.Path, source: _Source) -> list[str]:
    official, config, name = source.official, source.config, source.stage
    index, stage = config.stages.index(name), config.stage[name]
    params, emas = official.names.params(official.model), _emas(official, stage)
    opt_state = _optimizer_state(make_optimizer(stage).init(params), source)
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    state = TrainState(np.int32(official.step), params, emas, opt_state, key)
    meta = dict(
        stage=name,
        stage_step=official.step,
        past={earlier: config.stage[earlier].steps for earlier in config.stages[:index]},
        data={"global_next_index": official.step * stage.batch_size},
        window={},
        images=None,
        classes=source.classes,
        card={},
        config=config_lib.to_dict(config),
    )
    step = stage_ends(config)[index] - stage.steps + official.step
    with _whole(dst) as folder:
        try:
            with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as checkpoints:
                checkpoints.save(step, state, meta)
        except CheckpointError as error:  # to be said of `dst`
            raise OSError(str(error)) from error
        write_atomically(folder / "config.json", json.dumps(meta["config"], indent=2).encode())
    parts = ", ".join(["weights", *_ema_words(official), *["optimizer"] * bool(official.moments)])
    return [f"{dst} holds checkpoint {step}: {parts}, step {official.step} of stage {name!r}"]


@contextlib.contextmanager
def _whole(dst):
    """Yield a folder that becomes `dst` when it is complete; an object store cannot rename, so it is `dst` there."""
    folder = dst if is_remote(dst) else dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    remove_tree(folder)  # of a killed process with our number
    try:
        yield folder
    except BaseException:
        remove_tree(folder)
        raise
    if folder != dst:
        move(folder, dst)


def _ema_words(official: Official) -> list[str]:
    return ["EMA" if len(official.emas) == 1 else f"{len(official.emas)} EMAs"] if official.emas else []


def _emas(official: Official, stage) -> tuple:
    """The EMAs of a stage; notes say where the file has more or fewer."""
    names, count = ema_names(len(official.emas)), len(ema_decays(stage))
    if not names:
        official.notes.append("note: the file has one set of weights; it serves as raw weights and as EMA")
    elif len(names) < count:
        official.notes.append(
            f"note: the config has {count} EMAs, the file {len(names)}; {names[-1]} serves as the rest"
        )
    for name in names[count:]:
        official.notes.append(f"left out: {name} of the file; more_ema_decays of its stage would make room for it")
    emas = [official.names.params(tensors) for tensors in official.emas or [official.model]][:count]
    return tuple(emas + emas[-1:] * (count - len(emas)))


def _optimizer_state(fresh, source: _Source):
    """A fresh optimizer state, filled with the file's; left fresh, with a note, if the file's cannot be continued.

    Raises:
      ConfigError: it cannot, but a config was given, to train further.
    """
    official = source.official
    try:
        if official.optimizer_problem:
            raise ValueError(official.optimizer_problem)
        return _filled(fresh, source, official.moments or {})
    except ValueError as error:
        if source.goes_on:
            advice = "leave --config out to sample, or start from the weights alone with --config.init_from"
            raise ConfigError(f"the file's optimizer cannot be continued ({error}); {advice}") from error
        official.moments = None
        official.notes.append(f"left out: the optimizer ({error})")
        return _filled(fresh, source, {})


def _filled(fresh, source: _Source, moments: dict[str, Moment]):
    """A fresh optimizer state with these moments, by name in PyTorch.

    Raises:
      ValueError: the tensors have done different numbers of steps.
    """
    names, done = source.official.names, source.official.step + config_lib.steps_before(source.config, source.stage)

    def moment(path, zeros):
        name = names.their_name(tuple(part.key for part in path))
        if name not in moments:
            return Moment(0, zeros, zeros)
        step, mu, nu = moments[name]
        return Moment(step, names.our_layout(name, mu), names.our_layout(name, nu))

    def fill(node):
        if isinstance(node, optax.ScaleByScheduleState):  # the rate follows the training step
            return optax.ScaleByScheduleState(np.int32(done))
        if not _is_adam(node):
            return node
        field = lambda name: jax.tree_util.tree_map_with_path(lambda *at: getattr(moment(*at), name), node.mu)
        # The tensors have counts of their own: half-precision training skips steps, and a tensor may rest in one.
        steps = set(jax.tree.leaves(field("step")))
        if len(steps) > 1:
            raise ValueError(f"it has done {sorted(steps)} steps on different tensors; one number is wanted")
        return optax.ScaleByAdamState(np.int32(max(steps, default=0)), field("mu"), field("nu"))

    wanted = optax.ScaleByAdamState | optax.ScaleByScheduleState
    return jax.tree.map(fill, fresh, is_leaf=lambda node: isinstance(node, wanted))


def _to_pt(dst: pathlib.Path, source: _Source) -> list[str]:
    official, config = source.official, source.config
    if problem := official.format.unknown(config):
        raise ConfigError(f"{problem}; convert it with --for=torch to sample in PyTorch, or to a .safetensors")
    group = official.group or _group(config.stage[source.stage])
    official_file.write(dst, dataclasses.replace(official, group=group), config, source.stage)
    for name in ema_names(len(official.emas))[official.format.EMAS :]:
        official.notes.append(
            f"left out: {name}; such files have no place for it, a .safetensors does (--weights={name})"
        )
    parts = ", ".join(["weights", *(_ema_words(official) or ["the same as EMA"])])
    parts += ", optimizer" if official.moments else ", new optimizer"
    return [f"{dst} holds {parts}, step {official.step}", *_only_here(config), *official.format.described(config)]


def _only_here(config: Config) -> typing.Iterator[str]:
    """Notes about settings that other code does not have."""
    if config.model.outer_blocks:
        yield f"note: other code has no model.outer_blocks={config.model.outer_blocks}; it drops hidden patches"
    if config.sampling.guidance and config.sampling.weak != "unlabelled":
        yield f"note: other code has no guidance of sampling.weak={config.sampling.weak!r}; it samples without guidance"


def _to_safetensors(dst: pathlib.Path, source: _Source, *, weights: str, dtype: str) -> list[str]:
    official, config = source.official, source.config
    name, tensors = source.chosen(weights)
    if (weights, name) == ("ema", "params"):
        official.notes.append("note: the source has one set of weights, no EMA")
    noted = dict(config=config_lib.to_dict(config), stage=source.stage, classes=source.classes, weights=name)
    fixed = {key: official.format.positions(config) for key in official.names.fixed}
    trained = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
    official_file.write_safetensors(dst, fixed | trained, noted)
    return [f"{dst} holds the {'raw weights' if name == 'params' else name.replace('ema', 'EMA')} (--weights chooses)"]


def _to_torch(dst: pathlib.Path, source: _Source, *, weights: str, dtype: str) -> list[str]:
    with _whole(dst) as folder:
        _to_safetensors(folder / "model.safetensors", source, weights=weights, dtype=dtype)
        name, _ = source.chosen(weights)
        torch_folder.write(folder, dst.name, source.config, source.classes, name, source.path)
    text = f"{dst} holds the weights ({name}), sample.py for PyTorch, and README.md, a model card to complete"
    return [text, *_only_here(source.config)]
