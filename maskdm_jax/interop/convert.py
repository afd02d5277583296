"""Checkpoints from one form to another: run folder (Orbax), official `.pt`, `.safetensors` (weights only)."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import typing

import jax
import numpy as np
import optax

from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network, noise_schedule
from maskdm_jax.config import Config
from maskdm_jax.errors import CheckpointError, ConfigError, TorchFileError, prefixed
from maskdm_jax.interop import official as official_file
from maskdm_jax.interop.official import Moment, Official, params_from_state_dict
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.storage import write_atomically
from maskdm_jax.training import checkpoint
from maskdm_jax.training.loop import stage_ends
from maskdm_jax.training.start import abstract_state, compare_settings, meaning
from maskdm_jax.training.state import EMA_COPY_STEPS, TrainState, learning_rate, make_optimizer

_TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
_OTHER_FILES = (".npz", ".npy", ".h5", ".msgpack", ".pkl", ".onnx", ".zip", ".tar", ".json")


@dataclasses.dataclass
class _Source:
    """The content of a source of any kind."""

    official: Official
    config: Config | None = None  # of the run; None if the file does not say
    stage: str = ""  # of the config
    classes: list[str] = dataclasses.field(default_factory=list)
    goes_on: bool = False  # whether a config was given, to train further


def convert(
    src, dst, *, heads: int | None = None, config=None, stage: str | None = None, weights: str = "ema"
) -> list[str]:
    """Convert `src` into `dst`; the paths tell the kinds.

    Args:
      src: a run folder or one of its checkpoints; an official `.pt` (or another file with such weights); or a
        `.safetensors`, the index of several, or their folder.
      dst: a run folder with one checkpoint, a `.pt` or a `.safetensors`; must not exist yet.
      heads: attention heads, the one setting of the network that its tensors do not show. Where neither it nor a config
        is known, width / 64 is assumed, as in the official models.
      config: ConfigDict or dict of the run that a file belongs to, to train it further; must agree with the file.
        Without it the checkpoint gets a config made from the file, good for sampling.
      stage: of `config`, the one that the file belongs to; the first when not given.
      weights: `ema` or `params`, those that go into a `.safetensors`.

    Returns:
      lines for the user: what was carried over, and what was not.

    Raises:
      TorchFileError, CheckpointError, ConfigError: nothing was written; the message says why.
    """
    src, dst = (pathlib.Path(os.path.expanduser(path)).absolute() for path in (src, dst))
    kinds = [_kind(path) for path in (src, dst)]
    if kinds[0] == kinds[1]:
        raise ConfigError(f"{src} and {dst} are of the same kind; there is nothing to convert")
    if weights not in ("ema", "params"):
        raise ConfigError(f"weights {weights!r} are unknown; choose ema or params (the raw ones)")
    given = None if config is None else config_lib.parse(config)
    writers = {"folder": _to_folder, "pt": _to_pt, "safetensors": _to_safetensors}
    with prefixed(TorchFileError, f"{src}: "):
        with prefixed(CheckpointError, f"{src} cannot be read: ", OSError):
            if kinds[0] != "folder" and not src.exists():
                raise CheckpointError(f"{src} is not a file")
            source = _from_folder(src) if kinds[0] == "folder" else _from_file(src)
        _settle_config(source, src, heads, given, stage)
        with prefixed(CheckpointError, f"{dst} cannot be written: ", OSError):
            if os.path.lexists(dst) and not (kinds[1] == "folder" and dst.is_dir() and not any(dst.iterdir())):
                raise ConfigError(f"{dst} exists already; give another --dst or move it away")
            dst.parent.mkdir(parents=True, exist_ok=True)
            lines = writers[kinds[1]](dst, source, weights)
    return [*lines, *source.official.notes]


def _kind(path: pathlib.Path) -> str:
    suffix = path.suffix.lower()
    if official_file.is_safetensors(path):
        return "safetensors"
    if suffix in _OTHER_FILES:
        raise ConfigError(f"{path}: {suffix} is not known; give a .pt, a .safetensors or a run folder")
    return "pt" if suffix in _TORCH_FILES else "folder"


# --- Reading ------------------------------------------------------------------------------------


def _from_file(path: pathlib.Path) -> _Source:
    official, noted = official_file.load(path)
    if not noted:
        return _Source(official)
    with prefixed(ValueError, "its header does not hold a config of this project (", (LookupError, TypeError), ")"):
        return _source_of(official, noted, "its header")


def _source_of(official: Official, meta: dict, where) -> _Source:
    """A source that comes with its config, stage and classes."""
    config, stage = config_lib.parse(meta["config"]), meta["stage"]
    if stage not in config.stages:
        raise CheckpointError(f"{where} is damaged: its stage {stage!r} is not in its config")
    return _Source(official, config, stage, [str(name) for name in meta["classes"]])


def _from_folder(path: pathlib.Path) -> _Source:
    found = checkpoint.find(path)
    meta = checkpoint.load_meta(found)
    source = _source_of(Official({}), meta, found)
    config, stage = source.config, source.config.stage[source.stage]
    index, mesh = config.stages.index(source.stage), make_mesh(devices=jax.devices()[:1])
    state = checkpoint.load_state(found, abstract_state(config, index, make_network(config), mesh))
    named = lambda tree: official_file.state_dict_from_params(tree, config.model.patch_size, config.model.wavelet_scale)
    step = int(state.step)
    official = Official(
        named(state.params),
        ema=named(state.ema),
        ema_step=step,
        ema_initted=step > 0,
        moments=_moments(state.opt_state, named),
        group=_group(stage) | {"lr": float(learning_rate(stage)(step))},
        step=step,
    )
    kept = meta.get("official")  # of the file that this checkpoint was made from
    if kept:
        group = kept["group"] and kept["group"] | {"betas": tuple(kept["group"]["betas"])}
        official = dataclasses.replace(official, **kept | {"group": group})
    return dataclasses.replace(source, official=official)


def _moments(opt_state, named) -> dict[str, Moment]:
    """AdamW's state by official name, without tensors that no step has used, as in PyTorch."""
    moments = {}
    for adam in filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam)):
        if adam.count:
            mu, nu = named(adam.mu), named(adam.nu)
            moments |= {name: Moment(int(adam.count), mu[name], nu[name]) for name in mu}
    return {name: moments[name] for name in sorted(moments, key=official_file.official_rank)}


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _group(stage) -> dict:
    """AdamW's settings as PyTorch keeps them."""
    switches = dict(amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None)
    rates = dict(lr=stage.learning_rate, betas=(stage.b1, stage.b2), eps=1e-8, weight_decay=stage.weight_decay)
    return rates | switches | dict(decoupled_weight_decay=True, initial_lr=stage.learning_rate)


# --- The config ---------------------------------------------------------------------------------


def _settle_config(
    source: _Source, path: pathlib.Path, heads: int | None, given: Config | None, stage: str | None
) -> None:
    """Find the config of the run: the one given, the source's own, or one made from the file."""
    official, own = source.official, source.config
    if own is None:
        shown = official_file.architecture(official.model) | official_file.schedule_settings(official)
    else:
        shown = meaning(own)
    if given is not None:
        compare_settings(given, shown, path)
        source.config, source.stage, source.goes_on = given, stage or given.stages[0], True
        if source.stage not in given.stages:
            raise ConfigError(f"--stage {source.stage!r} is not one of config.stages {given.stages}")
    elif stage is not None:
        raise ConfigError("--stage names a stage of a --config; give both")
    elif own is None:
        source.config, source.stage = _config_of(official, shown, heads), "stage"
        if official.buffers is None:
            note = "note: the file does not show its noise schedule; cosine is assumed (or give --config)"
            official.notes.append(note)
    used = source.config.model.heads
    if heads not in (None, used):
        raise ConfigError(f"--num_heads is {heads}, but {'config.model.heads' if given else 'the source'} has {used}")
    if own is None and (heads, given) == (None, None):
        official.notes.append(f"note: the file does not show its attention heads; width / 64 = {used} is assumed")
    elif own is None and shown["model.width"] != 64 * used:
        official.notes.append(f"note: {used} attention heads are taken as given; official models have width / 64")
    steps = source.config.stage[source.stage].steps
    if official.step > steps:
        raise ConfigError(
            f"the file is at step {official.step}, but config.{source.stage}.steps is {steps}; give the stage "
            f"that it belongs to with --stage (config.stages is {source.config.stages}) or a config with enough steps"
        )
    source.classes = source.classes or [str(i) for i in range(shown["model.num_classes"])]
    params, wanted = params_from_state_dict(official.model), make_network(source.config).abstract_params()
    checkpoint.compare(f"the weights in {path} are not those of a whole U-ViT", params, wanted)


def _config_of(official: Official, shown: dict, heads: int | None) -> Config:
    """A config with all that the file shows; the rest (data, batch, mask, EMA) has the defaults."""
    width = shown["model.width"]
    if heads is None and width % 64:
        raise ConfigError(
            "the number of attention heads cannot be seen in the file: pass --num_heads=H "
            f"(the official models have width / 64, but the width of this one is {width})"
        )
    c = config_lib.default()
    c.update_from_flattened_dict(shown | {"model.heads": heads or width // 64})
    c.data.path, c.data.labels = "unknown", shown["model.num_classes"] > 0
    c.stages, c.stage = ("stage",), config_lib.stage(steps=max(official.step, 1))
    if official.group:
        group = official.group
        c.stage.learning_rate = group.get("initial_lr", group.get("lr", 0.0))
        c.stage.b1, c.stage.b2 = group["betas"]
        c.stage.weight_decay = group.get("weight_decay", c.stage.weight_decay)
    return config_lib.parse(c)


# --- Writing ------------------------------------------------------------------------------------


def _to_folder(dst: pathlib.Path, source: _Source, weights: str) -> list[str]:
    official, config, name = source.official, source.config, source.stage
    index, stage = config.stages.index(name), config.stage[name]
    params = params_from_state_dict(official.model)
    ema = params if official.ema is None else params_from_state_dict(official.ema)
    opt_state = _optimizer_state(make_optimizer(stage).init(params), source)
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    state = TrainState(np.int32(official.step), params, (ema,), opt_state, key)
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
        official={kept: getattr(official, kept) for kept in ("ema_step", "ema_initted", "group", "scaler")},
    )
    step = stage_ends(config)[index] - stage.steps + official.step
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with our number
    try:
        _save(temporary, step, state, meta)
        write_atomically(temporary / "config.json", json.dumps(meta["config"], indent=2).encode())
        os.replace(temporary, dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parts = "weights, EMA, optimizer" if official.moments else "weights" + ", EMA" * (official.ema is not None)
    lines = [f"{dst} holds checkpoint {step}: {parts}, step {official.step} of stage {name!r}"]
    return [*lines, *_differences(official, config)]


def _save(folder: pathlib.Path, step: int, state: TrainState, meta: dict) -> None:
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    try:
        checkpoints.save(step, state, meta)
        checkpoints.wait()
    except CheckpointError as error:
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(CheckpointError):
            checkpoints.close()


def _differences(official: Official, config: Config) -> typing.Iterator[str]:
    """Notes about the parts of a file that training here does not use as they are."""
    ours = official_file.schedule_buffers(noise_schedule(config))
    if official.buffers is not None and not all(np.array_equal(ours[k], official.buffers.get(k)) for k in ours):
        yield "note: the file's schedule buffers are incomplete or differ by rounding; ours are used"
    if official.ema is None:
        yield "note: the file has one set of weights; it serves as raw weights and as EMA"
    elif official.ema_step != official.step or (official.step > EMA_COPY_STEPS and not official.ema_initted):
        yield (
            f"note: the file's EMA says step {official.ema_step}, initted {official.ema_initted} at training step "
            f"{official.step}; this is kept for the way back, but training here goes by the training step"
        )


def _optimizer_state(fresh, source: _Source):
    """A fresh optimizer state, filled with the file's; left fresh, with a note, if the file's cannot be continued.

    Raises:
      ConfigError: it cannot, but a config was given, to train further.
    """
    official = source.official
    try:
        if official.optimizer_problem:
            raise ValueError(official.optimizer_problem)
        return _filled(fresh, official.moments or {}, official.step)
    except ValueError as error:
        if source.goes_on:
            advice = "leave --config out to sample, or start from the weights alone with --config.init_from"
            raise ConfigError(f"the file's optimizer cannot be continued ({error}); {advice}") from error
        official.moments = None
        official.notes.append(f"left out: the optimizer ({error})")
        return _filled(fresh, {}, official.step)


def _filled(fresh, moments: dict[str, Moment], step: int):
    def fill(node):
        if isinstance(node, optax.ScaleByScheduleState):  # the rate follows the training step
            return optax.ScaleByScheduleState(np.int32(step))
        if not _is_adam(node):
            return node
        # The tensors have counts of their own: half-precision training skips steps, and a tensor may rest in one.
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(node.mu)]
        steps = {moments[name].step if name in moments else 0 for name in names}
        if len(steps) > 1:
            raise ValueError(f"it has done {sorted(steps)} steps on different tensors; one number is wanted")

        def values(field):
            def value(path, leaf):
                name = _name(path)
                return official_file.our_layout(name, getattr(moments[name], field)) if name in moments else leaf

            return jax.tree_util.tree_map_with_path(value, getattr(node, field))

        return optax.ScaleByAdamState(np.int32(max(steps, default=0)), values("mu"), values("nu"))

    wanted = optax.ScaleByAdamState | optax.ScaleByScheduleState
    return jax.tree.map(fill, fresh, is_leaf=lambda node: isinstance(node, wanted))


def _name(path) -> str:
    """Official name of a leaf of our parameters."""
    return official_file.official_name(tuple(part.key for part in path))


def _to_pt(dst: pathlib.Path, source: _Source, weights: str) -> list[str]:
    official = source.official
    complete = dataclasses.replace(
        official,
        ema=official.model if official.ema is None else official.ema,
        group=official.group or _group(source.config.stage[source.stage]),
        buffers=official_file.schedule_buffers(noise_schedule(source.config)),
    )
    official_file.write(dst, complete)
    parts = "weights, EMA, optimizer" if official.moments else "weights (also as EMA), new optimizer"
    line = f"{dst} holds {parts}, step {official.step}; its network in the official code's terms:"
    return [line, *_network_yaml(source.config)]


def _to_safetensors(dst: pathlib.Path, source: _Source, weights: str) -> list[str]:
    official = source.official
    which = "ema" if weights == "ema" and official.ema is not None else "params"
    noted = dict(config=config_lib.to_dict(source.config), stage=source.stage, classes=source.classes, weights=which)
    official_file.write_safetensors(dst, official.ema if which == "ema" else official.model, noted)
    if which != weights:
        official.notes.append("note: the source has one set of weights, no EMA")
    return [f"{dst} holds the {'EMA' if which == 'ema' else 'raw weights'} (--weights chooses)"]


def _network_yaml(config: Config) -> typing.Iterator[str]:
    """The `network` section of an official config file."""
    model, wavelet = config.model, bool(config.model.wavelet_scale)
    yield "network:"
    settings = {"name": "maskdwt" if wavelet else "maskdm", "img_size": config.data.image_size // (2 if wavelet else 1)}
    settings |= {"patch_size": model.patch_size, "in_chans": config.data.channels * (4 if wavelet else 1)}
    if wavelet:
        settings |= {"data_chans": config.data.channels, "level": 1, "scale": model.wavelet_scale}
    settings |= {"encoder_embed_dim": model.width, "encoder_depth": model.depth, "encoder_heads": model.heads}
    settings |= {"decoder_depth": 0, "mlp_ratio": model.mlp_ratio, "qkv_bias": model.qv_bias}
    settings |= {"num_classes": model.num_classes or -1, "use_final_conv": False, "mlp_time_embed": model.time_mlp}
    for name, value in settings.items():
        yield f"  {name}: {value}"
