"""Studies: runs with the same budget of compute, evaluated along the way.

A study is a config (see `experiments/emoji32.py`) with `base`, a training config of one stage; `runs`, each a sequence
of phases with a share of the budget and changes to the settings; `sets` of images by name; and `evaluation`. A phase
starts from the weights of the previous phase with a new optimizer and the seed's random stream from its beginning, or,
with `continues`, goes on with the optimizer, the EMA and a stream of its own. Equal phases, in one study or in several,
are trained once. Every evaluated point is a line in a file of results; a point with a line is not computed again.
"""

import dataclasses
import datetime
import fnmatch
import hashlib
import json
import pathlib
import shutil
import statistics
import subprocess

import jax
from evaluator import StudyEvaluator

from maskdm_jax import config as config_lib
from maskdm_jax.config import Config
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import train
from maskdm_jax.storage import write_atomically
from maskdm_jax.tools import cost
from maskdm_jax.tools.preflight import step_seconds
from maskdm_jax.training import logs
from maskdm_jax.training.loop import run_folder

_SAVES = 4  # checkpoints between two points, which limit the loss by an interruption


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run: the last stage of `config`. The stages before it are the phases that it continues."""

    config: Config
    points: tuple[int, ...]  # steps after which it is evaluated
    flops: float  # of a step
    before: tuple[float, int]  # FLOPs and images of the phases before it
    key: str  # see `phase_key`

    @property
    def stage(self) -> config_lib.Stage:
        """The settings of its training."""
        return self.config.stage[self.config.stages[-1]]

    @property
    def sampling(self) -> dict:
        """Its settings of sampling that differ from the defaults."""
        return _keyed(self.config.sampling, "sampling")

    @property
    def start(self) -> int:
        """Steps of the phases that it continues; its checkpoints and logs count on from there."""
        return sum(self.config.stage[name].steps for name in self.config.stages[:-1])


@dataclasses.dataclass(frozen=True)
class Run:
    """A sequence of phases, with one seed."""

    name: str
    seed: int
    phases: tuple[Phase, ...]


# --- Planning -------------------------------------------------------------------------------------


def plan(study, *, unit: str = "flops", seconds_of=None, only: str = "*", seeds=()) -> list[Run]:
    """The runs of a study, ordered by seed, so that an interrupted study has complete comparisons.

    Args:
      study: the ConfigDict of a study file.
      unit: of the budget: `flops` of the training steps, as XLA counts them before fusion, or `seconds` of this
        machine's devices.
      seconds_of: (config, key) -> seconds of a step; for `seconds`.
      only: a pattern of run names, with * and ? as wildcards.
      seeds: those to plan; all when empty.

    Raises:
      ConfigError: a setting is unknown or invalid, two runs have one name, a phase is too short for its points, or no
        run is selected.
    """
    budget = study.budget[unit]
    if not budget > 0:
        raise ConfigError(f"config.budget.{unit} is {budget}; it must be above 0")
    names = [run["name"] for run in study.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs of config.runs have one name: {', '.join(names)}")
    known_seeds = dict.fromkeys(seed for run in study.runs for seed in run["seeds"])
    chosen = [run for run in study.runs if fnmatch.fnmatchcase(run["name"], only)]
    wanted = [
        (run, seed) for seed in known_seeds if not seeds or seed in seeds for run in chosen if seed in run["seeds"]
    ]
    if not wanted:
        raise ConfigError(
            f"--only and --seeds leave no run; this study has {'; '.join(names)}; seeds {list(known_seeds)}"
        )
    flops = {}  # of a step, by the phase's settings: counting takes seconds
    return [_plan_run(study, run, seed, budget, unit, seconds_of, flops) for run, seed in wanted]


def _plan_run(study, run: dict, seed: int, budget: float, unit: str, seconds_of, counted: dict) -> Run:
    name, total = run["name"], sum(phase["share"] for phase in run["phases"])
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"run {name!r}: its phases have {total:g} of the budget together; it must be 1")
    planned, key, flops, images = [], "", 0.0, 0
    for number, phase in enumerate(run["phases"]):
        where = f"run {name!r}, phase {number + 1}"
        try:
            config = _phase_config(study, phase, seed)
            stage_name, batch_size = config.stages[0], config.stage[config.stages[0]].batch_size
            step_key = phase_key(dataclasses.replace(config, seed=0), phase["data"], "")
            if step_key not in counted:
                counted[step_key] = cost.count_flops(config, stage_name, batch_size)
            price = counted[step_key] if unit == "flops" else seconds_of(config, step_key)
            config = _continue(config, planned) if phase.get("continues") else config
        except (KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
        parts = max(1, phase["points"]) * _SAVES
        steps = round(phase["share"] * budget / price / parts) * parts
        if steps <= 0 or phase["points"] < 0:
            raise ConfigError(
                f"{where}: a share of {phase['share']} pays for fewer than {parts} steps, too few for "
                f"{phase['points']} points"
            )
        config = dataclasses.replace(
            _with_steps(config, steps), checkpoint=config_lib.Checkpoint(steps // parts, keep=2)
        )
        key = phase_key(config, phase["data"], key)
        points = tuple(steps * (i + 1) // phase["points"] for i in range(phase["points"]))
        planned.append(Phase(config, points, counted[step_key], (flops, images), key))
        flops += steps * counted[step_key]
        images += steps * batch_size
    return Run(name, seed, tuple(planned))


def _phase_config(study, phase: dict, seed: int) -> Config:
    raw = study.base.copy_and_resolve_references()
    if unknown := phase.keys() - {"share", "points", "data", "settings", "continues"}:
        raise ConfigError(f"a phase has no {', '.join(sorted(unknown))}")
    if phase["data"] not in study.sets:
        raise ConfigError(f"there is no set {phase['data']!r} in config.sets, only {sorted(study.sets)}")
    if len(raw.stages) != 1:
        raise ConfigError(f"config.base.stages is {raw.stages}; a phase is one stage")
    raw.update_from_flattened_dict(phase["settings"])
    raw.seed, raw.data.path = seed, study.sets[phase["data"]]
    raw.evaluation.every = raw.preview.every = 0
    config = config_lib.parse(raw)
    if config.model.num_classes:
        raise ConfigError("config.model.num_classes must be 0: the held-out images have no labels")
    return config


def _with_steps(config: Config, steps: int) -> Config:
    name = config.stages[-1]
    return dataclasses.replace(
        config, stage=config.stage | {name: dataclasses.replace(config.stage[name], steps=steps)}
    )


def _continue(config: Config, planned: list[Phase]) -> Config:
    """`config`, of one stage, as the continuation of the last phase.

    Raises:
      ConfigError: there is none, or the network, the process, the optimizer or the EMA differ.
    """
    if not planned:
        raise ConfigError("the first phase continues none")
    before, stage = planned[-1].config, dataclasses.replace(config.stage[config.stages[0]], continues=True)
    if (config.model, config.diffusion) != (before.model, before.diffusion):
        raise ConfigError("it continues the phase before, whose config.model and config.diffusion must be the same")
    name = f"{config.stages[0]}{len(before.stages) + 1}"
    both = dataclasses.replace(config, stages=(*before.stages, name), stage=before.stage | {name: stage})
    return config_lib.parse(config_lib.to_dict(both))


# Settings that do not change the weights, by section.
_IGNORED = {
    "": ("init_from", "sampling", "preview", "evaluation", "checkpoint", "log", "mesh", "stage"),
    "data": ("path", "threads", "workers"),
}
# Settings that are part of every key. A setting that was added later is part of a key only if it differs from its
# default, so that recorded results stay valid.
_RECORDED = {
    "": "seed stages data model diffusion",
    "data": "split image_size channels classes fraction fraction_seed labels label_dropout flip",
    "model": "patch_size wavelet_scale width depth heads mlp_ratio qv_bias num_classes time_mlp dtype attention",
    "diffusion": "timesteps schedule shift_size objective loss loss_weight loss_weight_gamma",
    "stage": "steps batch_size micro_batches remat learning_rate warmup_steps b1 b2 weight_decay clip_norm ema_decay "
    "ema_every mask detail_mask",
    "mask": "kind rate block crop tile",
    "detail_mask": "kind rate block crop tile",
}


def phase_key(config: Config, data: str, before: str) -> str:
    """Hash of all that determines the weights after a phase: its settings, its set and the key of the previous phase.

    Equal phases have equal keys on every machine: file paths, logging, saving and evaluation are not included.
    """
    raw = _keyed(config, "") | {name: _keyed(stage, "stage") for name, stage in config.stage.items()}
    raw["data"]["path"] = data
    return hashlib.sha256(json.dumps([raw, before], sort_keys=True).encode()).hexdigest()[:12]


def _keyed(settings, section: str) -> dict:
    """The settings of a section that belong to a key."""
    found = {}
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        recorded = name in _RECORDED.get(section, "").split()
        if name in _IGNORED.get(section, ()) or (not recorded and value == field.default):
            continue
        found[name] = _keyed(value, name) if dataclasses.is_dataclass(value) else value
    return found


class StepSeconds:
    """Seconds of a training step on this machine's devices, measured once and kept in a file."""

    def __init__(self, path):
        self._path = pathlib.Path(path)
        self._known = json.loads(self._path.read_text()) if self._path.exists() else {}

    def __call__(self, config: Config, key: str) -> float:
        """Median of 20 steps after 3 warm-up steps. Run nothing else on the machine during it."""
        if key not in self._known:
            name = config.stages[0]
            program = cost.training_step(config, name, jax.devices(), config.stage[name].batch_size).program
            self._known[key] = statistics.median(step_seconds(config, name, program, times=23)[3:])
            write_atomically(self._path, json.dumps(self._known).encode())
        return self._known[key]


# --- Results --------------------------------------------------------------------------------------


class Results:
    """A file of evaluated points, one line of JSON each. Several processes can append to it.

    Its keys are those of recorded files: `leg` is the number of the phase; `judged` contains the settings of the
    evaluation, with the name of the evaluator as `judge`, and `Phase.sampling`.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path).expanduser().absolute()
        self.pictures = self.path.with_suffix("")  # folder of samples

    def rows(self) -> list[dict]:
        """All points so far."""
        return logs.read_metrics(self.path) if self.path.exists() else []

    def has(self, key: str, step: int, judged: dict) -> bool:
        """Whether a point has been evaluated with these settings."""
        return any((row["key"], row["step"], row["judged"]) == (key, step, judged) for row in self.rows())

    def add(self, row: dict) -> None:
        """Append a point."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")  # a line that a killed process did not finish
            file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def picture_name(run: str, seed: int) -> str:
    """File name of a run's samples."""
    return "".join(letter if letter.isalnum() else "_" for letter in run) + f"_{seed}.png"


def provenance() -> dict[str, str]:
    """Commit (with + if files are changed), date and devices."""
    here = pathlib.Path(__file__).parent
    ask = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False).stdout
    commit = ask("rev-parse", "--short", "HEAD").strip()
    changed = "+" if commit and ask("status", "--porcelain", "--untracked-files=no").strip() else ""
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    return dict(commit=commit + changed, date=datetime.date.today().isoformat(), device=device)


# --- Running --------------------------------------------------------------------------------------


def run_study(runs: list[Run], study, workdir, results: Results, evaluator_path: str = "", say=print) -> None:
    """Train and evaluate all points without a result.

    Args:
      runs: from `plan`.
      study: the ConfigDict.
      workdir: its folder `phases` contains the run folders of the phases.
      evaluator_path: see `StudyEvaluator`.
      say: called with a line of text for every run and result.

    Raises:
      ConfigError, DataError, CheckpointError: settings, data or a checkpoint are invalid.
    """
    workdir = run_folder(workdir)
    name = pathlib.Path(evaluator_path).stem if evaluator_path else "lite0"
    judged = lambda phase: dict(study.evaluation.to_dict(), judge=name, sampling=phase.sampling)
    made_by = provenance()  # now, because the files may change during the study
    missing = lambda run: [
        number
        for number, phase in enumerate(run.phases)
        for step in phase.points
        if not results.has(phase.key, step, judged(phase))
    ]
    if any(map(missing, runs)):  # before training, so that an invalid evaluator costs no time
        # Of all runs, also those that are not selected: the held-out images must be the same.
        every = [_phase_config(study, phase, 0) for run in study.runs for phase in run["phases"]]
        evaluate = StudyEvaluator(evaluator_path, study, every)
    for i, run in enumerate(runs):
        todo = missing(run)
        say(f"run {i + 1} of {len(runs)}: {run.name}, seed {run.seed}{'' if todo else ': done before'}")
        before = None
        for number, phase in enumerate(run.phases[: max(todo, default=-1) + 1]):
            folder = workdir / "phases" / phase.key
            for step in phase.points:
                if results.has(phase.key, step, judged(phase)):
                    continue
                found = _train_to(phase, step, folder, before)
                last = number == len(run.phases) - 1 and step == phase.stage.steps
                numbers = evaluate(found, results.pictures / picture_name(run.name, run.seed) if last else None)
                seconds = _seconds(workdir, run, number, step)
                row = _row(run, number, step) | dict(judged=judged(phase), train_seconds=seconds)
                results.add(row | numbers | made_by)
                told = ", ".join(f"{name} {numbers[name]:.4g}" for name in evaluate.names)
                say(f"{run.name}, seed {run.seed} at {row['flops']:.3g} FLOPs: {told}")
            if number < todo[-1]:
                _train_to(phase, phase.stage.steps, folder, before)
            before = folder


def _row(run: Run, number: int, step: int) -> dict:
    """Identity and cost of a point, by the plan; see `Results`."""
    phase = run.phases[number]
    flops, images = phase.before
    row = dict(run=run.name, seed=run.seed, leg=number + 1, key=phase.key, step=step)
    return row | dict(flops=flops + step * phase.flops, images=images + step * phase.stage.batch_size)


def _train_to(phase: Phase, step: int, folder: pathlib.Path, before: pathlib.Path | None) -> pathlib.Path:
    """The phase's checkpoint at a step; train to that step if it does not exist.

    before: the run folder of the phase before it.

    Raises:
      ConfigError: the phase was trained beyond that step, and its checkpoint was removed.
    """
    found = folder / "checkpoints" / str(phase.start + step)
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        trained = max((int(path.name) for path in found.parent.glob("[0-9]*") if path.name.isdecimal()), default=0)
        if trained > phase.start + step:
            raise ConfigError(
                f"{folder} is at step {trained}, but step {step} has no result and its checkpoint is gone; remove "
                "the folder to train this phase again"
            )
        if phase.start and not trained:
            first = before / "checkpoints" / str(phase.start)
            copy = shutil.copytree(first, folder / "copy", dirs_exist_ok=True)
            found.parent.mkdir(exist_ok=True)
            copy.rename(found.parent / first.name)
        init_from = "" if phase.start or before is None else str(before)
        train(dataclasses.replace(_with_steps(phase.config, step), init_from=init_from), folder)
    return found


def _seconds(workdir: pathlib.Path, run: Run, number: int, step: int) -> float:
    """Seconds of training up to a step of a phase, from the logged rates: without startup, saving and evaluation."""
    total = 0.0
    for i, phase in enumerate(run.phases[: number + 1]):
        done = phase.start
        for line in logs.read_metrics(workdir / "phases" / phase.key / "metrics.jsonl"):
            if (
                "images_per_second" in line
                and line["step"] > done
                and (i < number or line["step"] <= phase.start + step)
            ):
                total += (line["step"] - done) * phase.stage.batch_size / line["images_per_second"]
                done = line["step"]
    return total
