"""Where a run starts: its own newest checkpoint, else the weights of `init_from`, else fresh weights."""

import dataclasses
import json
import logging
import operator
import pathlib
import typing

import jax

from maskdm_jax import config as config_lib
from maskdm_jax.build import Network
from maskdm_jax.config import Config
from maskdm_jax.errors import ConfigError, TorchFileError, first_line, prefixed
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.storage import location
from maskdm_jax.training import checkpoint, logs
from maskdm_jax.training.state import TrainState, new_state

log = logging.getLogger(__name__)


class Start(typing.NamedTuple):
    """The first state of a run, or the one that it resumes from."""

    stage: int  # index into config.stages
    state: TrainState
    meta: dict  # of the checkpoint, {} if there is none


def begin(config: Config, network: Network, mesh, checkpoints: checkpoint.Checkpoints, data) -> Start:
    """Resume this run's newest valid checkpoint, else take the weights of `init_from`, else fresh weights.

    The log says which in one line.

    Raises:
      CheckpointError, ConfigError: the checkpoint or the weights do not fit the config.
    """
    step = checkpoints.latest_valid()
    if step is not None:
        found = checkpoints.folder / str(step)
        meta = checkpoint.load_meta(found)
        index = resumed_stage(config, meta, found)
        check_trained_for(config, data.classes, meta, found)
        state = checkpoint.load_state(found, abstract_state(config, index, network, mesh))
        log.info(
            "start: resuming %s at step %d (%s, step %d)", checkpoints.folder, step, meta["stage"], meta["stage_step"]
        )
        for line in changes_since(config, meta, data):
            log.warning("%s", line)
        return Start(index, state, meta)
    abstract = abstract_state(config, 0, network, mesh)
    if not config.init_from:
        log.info("start: fresh weights, seed %d", config.seed)
        return Start(0, fresh_state(config, network, abstract), {})
    params, found = initial_weights(config, data.classes, abstract.params)
    if processes.differ(str(found)):
        raise ConfigError(f"the processes found different checkpoints, here {found}; set config.init_from to one")
    log.info("start: weights of %s, new optimizer", found)
    return Start(0, _first_state(config, 0, abstract, params), {})


def check_history(config: Config, workdir: pathlib.Path) -> None:
    """Check that a start without checkpoints would not overwrite the history of a run, or files of another program.

    Raises:
      ConfigError: config.json is not of this project, or metrics.jsonl shows that checkpoints have disappeared.
    """
    folder, stored, metrics = (workdir / name for name in (checkpoint.FOLDER, "config.json", "metrics.jsonl"))
    if folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir()):
        return
    before = config  # settings of the run until now
    if stored.exists():
        try:
            before = config_lib.parse(json.loads(stored.read_bytes()))
        except (ConfigError, TypeError, ValueError) as error:
            what = f"{stored} is not of a run of this project ({first_line(error)})"
            raise ConfigError(f"{what}; give another --workdir") from None
    reached = max((line["step"] for line in logs.read_metrics(metrics)), default=0) if metrics.exists() else 0
    first_save = min(before.checkpoint.every, before.stage[before.stages[0]].steps)
    if reached > first_save:
        raise ConfigError(
            f"{metrics} goes to step {reached}, but there is no checkpoint beside it; give another --workdir, restore "
            "the checkpoints, or remove that file to start anew"
        )


def changes_since(config: Config, meta: dict, data) -> list[str]:
    """How data and config differ from those of a checkpoint, one line each."""
    lines = []
    if meta["images"] not in (None, len(data)):  # None: converted from another format
        counts = f"{meta['images']} images then, {len(data)} now"
        lines.append(f"the data changed ({counts}): the shuffle order differs")
    elif any(meta["card"].get(key, now) != now for key, now in data.card.items() if key.endswith("_hash")):
        lines.append("the data changed (the same number of images, but other files or labels)")
    old = config_lib.to_dict(config_lib.parse(meta["config"]))
    changed = config_lib.differences(old, config_lib.to_dict(config))
    return lines + [f"the config changed since that checkpoint: {line}" for line in changed]


def abstract_state(config: Config, index: int, network: Network, mesh) -> TrainState:
    """Shapes, dtypes and placement of the state in stage number `index`."""
    stage = config.stage[config.stages[index]]
    state = jax.eval_shape(lambda params: new_state(params, stage, jax.random.key(0)), network.abstract_params())
    placed = sharding.state_sharding(mesh, state)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, placed)


def fresh_state(config: Config, network: Network, abstract: TrainState) -> TrainState:
    """State at the start of the first stage, with new weights, placed as `abstract` says."""
    init = jax.jit(network.init, out_shardings=sharding.placement(abstract.params))
    return _first_state(config, 0, abstract, init(jax.random.key(config.seed)))


def next_stage(config: Config, index: int, network: Network, mesh, state: TrainState) -> TrainState:
    """State at the start of stage `index`: the weights of the previous stage, and a new EMA and optimizer state.

    A stage that continues the previous one keeps its EMA and optimizer state, too.
    """
    abstract = abstract_state(config, index, network, mesh)
    if not config.stage[config.stages[index]].continues:
        return _first_state(config, index, abstract, state.params)
    fresh = lambda state, key: dataclasses.replace(state, step=0 * state.step, key=key)
    go_on = jax.jit(fresh, out_shardings=sharding.placement(abstract), donate_argnums=0)
    return go_on(state, _stage_key(config, index))


def _first_state(config: Config, index: int, abstract: TrainState, params) -> TrainState:
    stage, key = config.stage[config.stages[index]], _stage_key(config, index)
    return jax.jit(new_state, static_argnums=1, out_shardings=sharding.placement(abstract))(params, stage, key)


def _stage_key(config: Config, index: int):
    """Each stage has its own random stream."""
    return jax.random.fold_in(jax.random.key(config.seed), index)


def initial_weights(config: Config, classes: list[str], abstract) -> tuple[dict, pathlib.Path]:
    """Raw weights of `config.init_from`: a run folder, a checkpoint, their authors' `.pt` or a `.safetensors`.

    Args:
      classes: names of the data's classes, in the order of their labels.
      abstract: shapes, dtypes and placement of the parameters.

    Returns:
      the parameters, placed as `abstract` says, and the file or checkpoint that they are from.

    Raises:
      CheckpointError: there are no such weights, or they do not fit the network.
      ConfigError: they were trained for other settings or classes; see `check_trained_for`.
    """
    from maskdm_jax.interop import official

    found = location(config.init_from)
    if not found.exists():
        raise ConfigError(
            f"config.init_from is {config.init_from!r}, which does not exist; give the path of a file or run"
        )
    if not found.is_file() and not official.is_safetensors(found):
        found = checkpoint.find(found)
        check_trained_for(config, classes, checkpoint.load_meta(found), found)
        return checkpoint.load_item(found, "params", abstract), found
    file, noted = official.load(found)
    for note in file.notes:
        log.info("%s: %s", found, note)
    with prefixed(TorchFileError, f"{found}: "):
        params, shown = file.names.params(file.model), file.format.shown(file)
    if "config" in noted:
        check_trained_for(config, classes, noted, found)
    else:
        compare_settings(config, shown, found)
        _state_assumptions(config, found, [name for name in file.format.UNSEEN if name not in shown])
    checkpoint.compare(f"the weights of {found} do not fit config.model", params, abstract)
    return sharding.put(params, sharding.placement(abstract)), found


def check_trained_for(config: Config, classes: list[str], source: dict, where) -> None:
    """Compare a config and class names with those that weights were trained with; shapes show few of them.

    Args:
      classes: names of the data's classes, in the order of their labels.
      source: `config` and `classes` that the weights come with.
      where: where the weights are, for the message.

    Raises:
      ConfigError: the network, the noise or the objective differ, or the classes of a conditional model.
    """
    compare_settings(config, meaning(config_lib.parse(source["config"])), where)
    if config.model.num_classes and list(source["classes"]) != list(classes):
        _check_classes(list(source["classes"]), list(classes), where)


def compare_settings(config: Config, theirs: dict, where) -> None:
    """Compare a config with settings of `meaning`, all or some, that weights were trained with.

    Raises:
      ConfigError: some differ; the message names both values and the flags that take `theirs`.
    """
    if "model.depth" in theirs and theirs.get("model.network") != "jit":
        theirs = theirs | {"model.depth": theirs["model.depth"] | 1}  # 2k and 2k + 1 are the same U-ViT
    ours = meaning(config)
    network, now = theirs.get("model.network", config.model.network), config.model.network
    if network != now:
        raise ConfigError(
            f"{where} holds the weights of a network {network!r}, but config.model.network is {now!r}; give weights of "
            f"that network, or the config of a {network!r}"
        )
    wrong = {name: value for name, value in theirs.items() if ours.get(name) != value}
    if wrong:
        differing = ", ".join(f"{name} {value} (now {ours.get(name)})" for name, value in wrong.items())
        flags = " ".join(f"--config.{name}={value}" for name, value in wrong.items())
        raise ConfigError(f"{where} was trained with {differing}; take its settings: {flags}")


def meaning(config: Config) -> dict:
    """The settings that give weights their meaning, by dotted name, such as "model.width"."""
    model, diffusion, jit = config.model, config.diffusion, config.model.network == "jit"
    names = [f"model.{name}" for name in ("network", "patch_size", "width", "heads", "num_classes", "returning")]
    names += ["data.image_size", "data.channels", "diffusion.process", "diffusion.objective"]
    of_jit = ["model.jit.bottleneck", "model.jit.class_tokens", "model.jit.class_tokens_from"]
    names += of_jit if jit else ["model.wavelet_scale", "model.qv_bias", "model.time_mlp"]
    of_processes = {
        "ddpm": ["diffusion.timesteps", "diffusion.schedule"],
        "flow": ["diffusion.flow.noise_scale"],
        "edm": ["diffusion.edm.sigma_data"],
    }
    names += of_processes.get(diffusion.process, [])
    names += ["diffusion.shift_size"] * (diffusion.process == "ddpm" and diffusion.schedule == "shifted_cosine")
    names += ["model.outer_blocks"] * (model.returning == "token")
    found = {name: operator.attrgetter(name)(config) for name in names}
    found["model.depth"] = model.depth if jit else model.depth | 1  # 2k and 2k + 1 are the same U-ViT
    return found | {"model.mlp_ratio": int(model.mlp_ratio * model.width) / model.width}


def _check_classes(theirs: list[str], ours: list[str], where) -> None:
    """Raise a ConfigError about class names that differ, or warn if the source has only numbers for names."""
    shown = lambda names: ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    problem = f"{where} was trained on the classes {shown(theirs)}; the data has {shown(ours)}"
    if theirs == [str(i) for i in range(len(theirs))]:
        log.warning("%s, numbered in this order: make sure that these are the same classes", problem)
        return
    same = set(theirs) <= set(ours)
    advice = f'--config.data.classes="{tuple(theirs)}"' if same else "data with the original class names"
    raise ConfigError(f"{problem}, so that labels would mean other classes; give {advice}")


def _state_assumptions(config: Config, found: pathlib.Path, names: list[str]) -> None:
    """Log the settings that a file of bare weights cannot show."""
    heads, width = config.model.heads, config.model.width
    assumed = ", ".join(f"{name}={operator.attrgetter(name)(config)}" for name in names)
    if assumed:
        log.warning("%s does not hold its settings; assumed are %s", found, assumed)
    if "model.heads" in names and width != 64 * heads:
        log.warning(
            "model.heads=%d gives %g channels per head, the official models have 64 (model.heads=%d)",
            *(heads, width / heads, max(1, width // 64)),
        )


def resumed_stage(config: Config, meta: dict, where: pathlib.Path) -> int:
    """Index of the stage that a checkpoint belongs to.

    Raises:
      ConfigError: the config's stages, or what a stage does with hidden patches, disagree with the checkpoint.
    """
    past = list(meta["past"].items())
    expected = [(name, config.stage[name].steps) for name in config.stages]
    index = len(past)
    if expected[:index] != past or index >= len(expected) or expected[index][0] != meta["stage"]:
        raise ConfigError(
            f"{where} was made by stages {[*past, (meta['stage'], '...')]}, the config has {expected}; use the stages "
            "of that run, or another --workdir with --config.init_from to start from its weights"
        )
    name, steps = expected[index]
    theirs = config_lib.parse(meta["config"])
    for setting, before, now in (
        ("model.outer_blocks", theirs.model.outer_blocks, config.model.outer_blocks),
        *(
            (f"{stage}.continues", theirs.stage[stage].continues, config.stage[stage].continues)
            for stage in config.stages[: index + 1]
        ),
    ):
        if now != before:
            raise ConfigError(
                f"{where} is of a run with {setting}={before}, which cannot become {now} on the way; pass "
                f"--config.{setting}={before}"
            )
    if meta["stage_step"] > steps:
        raise ConfigError(
            f"{where} is at step {meta['stage_step']} of stage {name!r}, but config.{name}.steps is {steps}"
        )
    return index
