"""Checkpoints from one form to another: run folder (Orbax), official `.pt`, `.safetensors` (weights only)."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import typing

import jax
import ml_dtypes
import numpy as np
import optax

from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network
from maskdm_jax.config import Config
from maskdm_jax.diffusion.gaussian import make_schedule
from maskdm_jax.errors import CheckpointError, ConfigError, TorchFileError
from maskdm_jax.interop import official as official_file
from maskdm_jax.interop.official import Moment, Official, params_from_state_dict
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.storage import write_atomically
from maskdm_jax.training import checkpoint
from maskdm_jax.training.loop import stage_ends
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.state import EMA_COPY_STEPS, TrainState, learning_rate, make_optimizer

FILE_KINDS = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
_OTHER_FILES = (".ckpt", ".bin", ".npz", ".npy", ".h5", ".msgpack", ".pkl", ".onnx", ".zip", ".tar")


@dataclasses.dataclass
class _Source:
    """What was read, whatever it was read from."""

    official: Official
    config: Config | None  # of the run; None if the file does not say
    stage: str = ""  # of the config
    classes: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)  # for a person


def convert(
    src, dst, *, heads: int | None = None, config=None, stage: str | None = None, weights: str = "ema"
) -> list[str]:
    """Convert `src` into `dst`; the kinds are told by the paths.

    Args:
      src: a run folder or one of its checkpoints, an official `.pt` (or `.pth`), or a `.safetensors`.
      dst: the same kinds; must not exist yet. A folder becomes a run folder with one checkpoint.
      heads: attention heads, the one setting of the network that its tensors do not show.
      config: ConfigDict or dict of the run that a file belongs to, if one wants to train it further; must agree
        with the file. Without it the checkpoint gets a config made from the file, good for sampling.
      stage: of `config`, the one that the file belongs to; the first when not given.
      weights: `ema` or `params`, those that go into a `.safetensors`.

    Returns:
      lines for a person: what was carried over, and what was not.

    Raises:
      TorchFileError, CheckpointError, ConfigError: nothing was written; the message says why.
    """
    src, dst = (pathlib.Path(os.path.expanduser(path)).absolute() for path in (src, dst))
    kinds = [_kind(path) for path in (src, dst)]
    if kinds[0] == kinds[1]:
        raise ConfigError(f"{src} and {dst} are of the same kind; there is nothing to convert")
    if weights not in ("ema", "params"):
        raise ConfigError(f"weights {weights!r} are unknown; choose ema or params (the raw ones)")
    if config is not None:
        config = config_lib.parse(config)
    readers = {"folder": _from_folder, "pt": _from_pt, "safetensors": _from_safetensors}
    with _saying(f"{src} cannot be read"):
        if kinds[0] != "folder" and not src.is_file():
            raise CheckpointError(f"{src} is not a file")
        source = readers[kinds[0]](src, kinds[1] == "safetensors")
    try:
        _settle_config(source, src, heads, config, stage)
        with _saying(f"{dst} cannot be written"):
            if os.path.lexists(dst) and not (kinds[1] == "folder" and dst.is_dir() and not any(dst.iterdir())):
                raise ConfigError(f"{dst} exists already; give another --dst or move it away")
            dst.parent.mkdir(parents=True, exist_ok=True)
            lines = {"folder": _to_folder, "pt": _to_pt, "safetensors": _to_safetensors}[kinds[1]](dst, source, weights)
    except TorchFileError as error:
        raise TorchFileError(f"{src}: {error}") from None
    return [*lines, *source.notes, *(f"left out: {what}" for what in source.official.left_out)]


def _kind(path: pathlib.Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _OTHER_FILES:
        raise ConfigError(f"{path}: {suffix} is not known; give a .pt, a .safetensors or a run folder")
    return FILE_KINDS.get(suffix, "folder")


@contextlib.contextmanager
def _saying(what: str):
    """What the system refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error


# --- Reading ------------------------------------------------------------------------------------


def _from_pt(path: pathlib.Path, weights_only: bool) -> _Source:
    return _Source(official_file.read(path, weights_only=weights_only), None)


def _from_safetensors(path: pathlib.Path, weights_only: bool) -> _Source:
    official, noted = official_file.read_safetensors(path)
    if not noted:
        return _Source(official, None)
    try:
        config = config_lib.parse(noted["config"])
        stage = noted["stage"]
        if stage not in config.stages:
            raise ConfigError(f"stage {stage!r} is not in the config")
        return _Source(official, config, stage, [str(name) for name in noted["classes"]])
    except (KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise TorchFileError(f"{path}: its header does not hold a config of this project ({error})") from None


def _from_folder(path: pathlib.Path, weights_only: bool) -> _Source:
    found = checkpoint.find(path)
    meta = checkpoint.load_meta(found)
    config, stage = config_lib.parse(meta["config"]), meta["stage"]
    if stage not in config.stages:
        raise CheckpointError(f"{found} is damaged: its stage {stage!r} is not in its config")
    index, mesh = config.stages.index(stage), make_mesh(devices=jax.devices()[:1])
    network = make_network(config)
    state = checkpoint.load_state(found, abstract_state(config, index, network, mesh))
    named = lambda tree: official_file.state_dict_from_params(tree, config.model.patch_size, config.model.wavelet_scale)
    step, of_stage = int(state.step), config.stage[stage]
    rate = learning_rate(of_stage)
    official = Official(
        named(state.params),
        ema=named(state.ema),
        ema_step=step,
        ema_initted=ema_initted(step, of_stage.ema_every),
        moments=_moments(state.opt_state, named),
        group=_group(of_stage) | {"lr": float(rate(step))},
        step=step,
    )
    kept = meta.get("official")  # of a file that this checkpoint was made from
    if kept:
        official.ema_step, official.ema_initted = kept["ema_step"], kept["ema_initted"]
        official.scaler, official.group = (
            kept["scaler"],
            kept["group"] and kept["group"] | {"betas": tuple(kept["group"]["betas"])},
        )
    return _Source(official, config, stage, meta["classes"])


def _moments(opt_state, named) -> dict[str, Moment]:
    """AdamW's state by official name; tensors that no step has used are left out, as PyTorch does."""
    moments = {}
    for adam in filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam)):
        if adam.count:
            mu, nu = named(_without_masked(adam.mu)), named(_without_masked(adam.nu))
            moments |= {name: Moment(int(adam.count), mu[name], nu[name]) for name in mu}
    return {name: moments[name] for name in sorted(moments, key=official_file.official_rank)}


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _without_masked(tree: dict) -> dict:
    """The tensors that a group of the optimizer has, without the places of the others."""
    return {
        key: _without_masked(node) if isinstance(node, dict) else node
        for key, node in tree.items()
        if not isinstance(node, optax.MaskedNode)
    }


def ema_initted(calls: int, every: int) -> bool:
    """The flag of the official EMA after so many calls: whether it has acted after its copying steps."""
    return calls > (EMA_COPY_STEPS // every + 1) * every


def _group(stage) -> dict:
    """AdamW's settings as PyTorch keeps them."""
    return dict(
        lr=stage.learning_rate,
        betas=(stage.b1, stage.b2),
        eps=1e-8,
        weight_decay=stage.weight_decay,
        amsgrad=False,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        decoupled_weight_decay=True,
        initial_lr=stage.learning_rate,
    )


def _buffers(config: Config) -> dict:
    diffusion = config.diffusion
    schedule = make_schedule(diffusion.schedule, diffusion.timesteps, size=diffusion.shift_size)
    return official_file.schedule_buffers(schedule)


# --- The config ---------------------------------------------------------------------------------


def _settle_config(
    source: _Source, path: pathlib.Path, heads: int | None, given: Config | None, stage: str | None
) -> None:
    """Find the config of the run: the source's own, the one given, or one made from the file."""
    found = official_file.architecture(source.official.model)
    if source.config is not None:
        own = source.config.diffusion
        found |= dict(schedule=own.schedule, shift_size=own.shift_size, timesteps=own.timesteps)
        found |= dict(objective=own.objective, heads=source.config.model.heads)
    elif source.official.buffers is not None:
        found |= _schedule_of(source.official.buffers)
    if given is not None:
        _compare(given, found, heads)
        source.config, source.stage = given, stage or given.stages[0]
        if source.stage not in given.stages:
            raise ConfigError(f"--stage {source.stage!r} is not one of config.stages {given.stages}")
    elif stage is not None:
        raise ConfigError("--stage names a stage of a --config; give both")
    elif source.config is None:
        if heads is None:
            width = found["width"]
            hint = f"; the official models have width / 64 = {width // 64}" if width % 64 == 0 else ""
            raise ConfigError(f"the number of attention heads cannot be seen in the file: pass --num_heads=H{hint}")
        source.config, source.stage = config_lib.parse(_config_of(source.official, found, heads)), "stage"
        if source.official.buffers is None:
            source.notes.append("note: the file does not show its noise schedule; cosine is assumed (or give --config)")
    elif heads not in (None, source.config.model.heads):
        raise ConfigError(f"--num_heads={heads}, but the checkpoint was made with {source.config.model.heads} heads")
    steps = source.config.stage[source.stage].steps
    if source.official.step > steps:
        raise ConfigError(
            f"the file is at step {source.official.step}, but config.{source.stage}.steps is {steps}; give the stage "
            f"that it belongs to with --stage (config.stages is {source.config.stages}) or a config with enough steps"
        )
    if not source.classes:
        source.classes = [str(i) for i in range(found["num_classes"])]
    params = params_from_state_dict(source.official.model)
    wanted = make_network(source.config).abstract_params()
    checkpoint.compare(f"the weights in {path} are not those of a whole U-ViT", params, wanted)


_ROUNDING = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-5, np.dtype(np.float16): 1e-3}
_ROUNDING |= {np.dtype(ml_dtypes.bfloat16): 1e-2}  # of the numbers that schedules may be stored in, relative


def _schedule_of(buffers: dict) -> dict:
    """Settings of the schedule with these buffers."""
    betas, timesteps = buffers["betas"], buffers["betas"].size
    candidates = [("cosine", 64), ("linear", 64)] + [("shifted_cosine", size) for size in range(1, 2049)]
    if betas.ndim == 1 and 20 < timesteps <= 100_000 and betas.dtype in _ROUNDING:
        rounding, values = _ROUNDING[betas.dtype], betas.astype(np.float64)

        def distance(candidate):
            name, size = candidate
            known = make_schedule(name, timesteps, size=size).betas
            return np.max(np.abs(known - values) / (rounding * known + 1e-7))

        name, size = min(candidates, key=distance)
        if distance((name, size)) < 1:
            return dict(schedule=name, shift_size=size, timesteps=timesteps)
    raise TorchFileError("its betas are those of no noise schedule that is known here (linear, cosine, shifted cosine)")


def _compare(config: Config, found: dict, heads: int | None) -> None:
    """Check that a config fits what the file shows."""
    settings = {"data": config.data, "model": config.model, "diffusion": config.diffusion}
    problems = []
    for name, value in found.items():
        section, there = next((s, getattr(part, name)) for s, part in settings.items() if hasattr(part, name))
        if name == "depth":
            there = there // 2 * 2  # 2k and 2k + 1 are the same network
        if name == "mlp_ratio":
            there = int(there * found["width"]) / found["width"]
        if name == "shift_size" and found["schedule"] != "shifted_cosine":
            continue
        if there != value:
            problems.append(f"config.{section}.{name} is {there}, the file has {value}")
    if heads not in (None, config.model.heads):
        problems.append(f"config.model.heads is {config.model.heads}, --num_heads is {heads}")
    if problems:
        raise ConfigError("; ".join(problems))


def _config_of(official: Official, found: dict, heads: int) -> dict:
    """A config that holds what the file shows; what it does not show (data, batch, mask, EMA) is a placeholder."""
    group = official.group or {}
    b1, b2 = group.get("betas", (0.99, 0.99))
    rate = group.get("initial_lr", group.get("lr", 0.0))
    model = {name: found[name] for name in ("patch_size", "wavelet_scale", "width", "depth", "mlp_ratio", "qv_bias")}
    model |= {name: found[name] for name in ("num_classes", "time_mlp")}
    return dict(
        seed=0,
        init_from="",
        data=dict(
            path="unknown",
            split="",
            image_size=found["image_size"],
            channels=found["channels"],
            classes=[],
            fraction=1.0,
            fraction_seed=0,
            labels=found["num_classes"] > 0,
            label_dropout=0.0,
            flip=0.0,
            threads=1,
            workers=0,
        ),
        model=model | dict(heads=heads, dtype="float32", attention="auto"),
        diffusion=dict(
            timesteps=found.get("timesteps", 1000),
            schedule=found.get("schedule", "cosine"),
            shift_size=found.get("shift_size", 64),
            objective="noise",
            loss="l2",
            loss_weight="p2",
            loss_weight_gamma=0.0,
        ),
        stages=("stage",),
        stage=dict(
            steps=max(official.step, 1),
            batch_size=1,
            micro_batches=1,
            remat=False,
            learning_rate=rate,
            warmup_steps=0,
            b1=b1,
            b2=b2,
            weight_decay=group.get("weight_decay", 0.03),
            clip_norm=0.0,
            ema_decay=0.999,
            ema_every=1,
            mask=dict(kind="none", rate=0.0, block=1, crop=1, tile=0),
        ),
        sampling=dict(method="ddim", steps=250, eta=1.0, order=2, spacing="log_snr", guidance=0.0),
        preview=dict(every=0, rows=4, columns=4),
        evaluation=dict(every=0, n=10_000, metrics=["fid"], reference="", inception_weights=""),
        checkpoint=dict(every=10_000, keep=2),
        log=dict(every=100, tensorboard=True, wandb=False),
        mesh=dict(data=-1, fsdp=1),
    )


# --- Writing ------------------------------------------------------------------------------------


def _to_folder(dst: pathlib.Path, source: _Source, weights: str) -> list[str]:
    official, config, name = source.official, source.config, source.stage
    index, stage = config.stages.index(name), config.stage[name]
    before = stage_ends(config)[index] - stage.steps
    params = params_from_state_dict(official.model)
    ema = params if official.ema is None else params_from_state_dict(official.ema)
    opt_state = _optimizer_state(make_optimizer(stage).init(params), official)
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    state = TrainState(np.int32(official.step), params, ema, opt_state, key)
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
        official=dict(
            ema_step=official.ema_step,
            ema_initted=official.ema_initted,
            group=official.group,
            scaler=official.scaler,
        ),
    )
    lines = []
    if official.buffers is not None and not all(
        np.array_equal(ours, official.buffers.get(name)) for name, ours in _buffers(config).items()
    ):
        lines.append("note: the file's schedule buffers are incomplete or differ by rounding; ours are used")
    if official.ema is None:
        lines.append("note: the file has one set of weights; it serves as raw weights and as EMA")
    elif official.ema_step != official.step or official.ema_initted != ema_initted(official.step, stage.ema_every):
        lines.append(
            f"note: the file's EMA says step {official.ema_step}, initted {official.ema_initted} at training step "
            f"{official.step}; this is kept for the way back, but training here goes by the training step"
        )
    # Asked first: Orbax's threads meet a full disk with hundreds of lines.
    needed = 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))  # weights, EMA and two moments
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise OSError(f"it takes {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free")
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with our number
    try:
        _save(temporary, before + official.step, state, meta)
        write_atomically(temporary / "config.json", json.dumps(meta["config"], indent=2).encode())
        os.replace(temporary, dst)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    what = "weights, EMA, optimizer" if official.moments else "weights" + ", EMA" * (official.ema is not None)
    return [f"{dst} holds checkpoint {before + official.step}: {what}, step {official.step} of stage {name!r}", *lines]


def _save(folder: pathlib.Path, step: int, state: TrainState, meta: dict) -> None:
    checkpoints = checkpoint.Checkpoints(folder, keep=1)
    try:
        checkpoints.save(step, state, meta)
        checkpoints.wait()
    except Exception as error:  # Orbax passes on whatever its storage throws
        raise OSError(str(error).strip().splitlines()[0][:200]) from error
    finally:
        with contextlib.suppress(Exception):
            checkpoints.close()


def _optimizer_state(fresh, official: Official):
    """A fresh optimizer state, filled with the file's."""
    moments = official.moments or {}

    def fill(node):
        if isinstance(node, optax.ScaleByScheduleState):  # the rate follows the training step
            return optax.ScaleByScheduleState(np.int32(official.step))
        if not _is_adam(node):
            return node
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(node.mu)]
        # Of a tensor's own: half-precision training skips steps, and a tensor may take no part in one.
        steps = {moments[name].step if name in moments else 0 for name in names}
        if len(steps) > 1:
            raise TorchFileError(
                f"the optimizer has done {sorted(steps)} steps on different tensors; one number is wanted"
            )

        def values(field, tree):
            def value(path, leaf):
                name = _name(path)
                return official_file.our_layout(name, getattr(moments[name], field)) if name in moments else leaf

            return jax.tree_util.tree_map_with_path(value, tree)

        return optax.ScaleByAdamState(np.int32(max(steps, default=0)), values("mu", node.mu), values("nu", node.nu))

    wanted = optax.ScaleByAdamState | optax.ScaleByScheduleState
    return jax.tree.map(fill, fresh, is_leaf=lambda node: isinstance(node, wanted))


def _name(path) -> str:
    """Official name of a leaf of our parameters."""
    return official_file.official_name(tuple(part.key for part in path))


def _to_pt(dst: pathlib.Path, source: _Source, weights: str) -> list[str]:
    official, stage = source.official, source.config.stage[source.stage]
    complete = dataclasses.replace(
        official,
        ema=official.model if official.ema is None else official.ema,
        group=official.group or _group(stage),
        buffers=_buffers(source.config),
    )
    official_file.write(dst, complete)
    what = "weights, EMA, optimizer" if official.moments else "weights (also as EMA), new optimizer"
    return [
        f"{dst} holds {what}, step {official.step}; its network in the official code's terms:",
        *_network_yaml(source.config),
    ]


def _to_safetensors(dst: pathlib.Path, source: _Source, weights: str) -> list[str]:
    official = source.official
    which = "ema" if weights == "ema" and official.ema is not None else "params"
    noted = dict(config=config_lib.to_dict(source.config), stage=source.stage, classes=source.classes, weights=which)
    official_file.write_safetensors(dst, official.ema if which == "ema" else official.model, noted)
    if which != weights:
        source.notes.append("note: the source has one set of weights, no EMA")
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
