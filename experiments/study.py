"""Studies: runs that may spend the same compute, judged along the way.

A study is a config file (see `experiments/emoji32.py`): `base`, a whole training config of one stage; `runs`, each a
row of legs with a share of the budget and settings of their own; and what the networks are judged by. A leg starts from
the weights of the leg before. Legs that are the same, in one study or in several, are trained once; every judged point
is a line in a file of results, and what has its line is not done again.
"""

import dataclasses
import datetime
import fnmatch
import hashlib
import importlib.util
import json
import pathlib
import statistics
import subprocess
import time

import jax
import numpy as np
from denoising import denoising_by_level
from PIL import Image

from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network
from maskdm_jax.config import Config
from maskdm_jax.data.images import Framing, save_png
from maskdm_jax.data.sources import open_source, select
from maskdm_jax.errors import ConfigError
from maskdm_jax.evaluation.evaluate import Evaluator, compare
from maskdm_jax.evaluation.features import Images, transform
from maskdm_jax.parallel import sharding
from maskdm_jax.run import train
from maskdm_jax.sampling import generate_batches, load
from maskdm_jax.storage import write_atomically
from maskdm_jax.tools import cost
from maskdm_jax.training import logs
from maskdm_jax.training.loop import make_run_mesh, run_folder
from maskdm_jax.training.start import abstract_state, fresh_state
from maskdm_jax.training.step import jit_step

SHOWN = 24  # samples of a point that are kept as a picture
_BATCH = 64  # images per call when sampling and judging
_SAVES = 4  # checkpoints between two points: what a stop can cost


@dataclasses.dataclass(frozen=True)
class Leg:
    """A part of a run: one stage of training."""

    config: Config
    points: tuple[int, ...]  # steps after which it is judged
    flops: float  # of a step
    before: tuple[float, int]  # FLOPs and images of the legs before it
    key: str  # the same for the same training, whatever the machine

    @property
    def stage(self) -> config_lib.Stage:
        """Its only stage."""
        return self.config.stage[self.config.stages[0]]


@dataclasses.dataclass(frozen=True)
class Run:
    """Legs in a row, from one seed."""

    name: str
    seed: int
    legs: tuple[Leg, ...]


def plan(study, *, unit: str = "flops", seconds_of=None, only: str = "*", seeds=()) -> list[Run]:
    """The runs of a study, seed by seed, so that whoever stops early has whole comparisons.

    Args:
      study: the ConfigDict of a study file.
      unit: what the budget counts: `flops` of the training steps, by XLA's count of the program before fusion, or
        `seconds` that this machine's devices take for them.
      seconds_of: (config, key) -> seconds of a step; for `seconds`.
      only: a pattern of run names, with * and ? for any letters.
      seeds: those wanted; all when empty.

    Raises:
      ConfigError: a setting is unknown or cannot work, a leg is too short for its points, or no run is left.
    """
    budget = study.budget[unit]
    if not budget > 0:
        raise ConfigError(f"config.budget.{unit} is {budget}; it must be above 0")
    counted = {}  # FLOPs of a step by the leg's settings: counting takes seconds
    there = dict.fromkeys(seed for run in study.runs for seed in run["seeds"])
    chosen = [run for run in study.runs if fnmatch.fnmatchcase(run["name"], only)]
    wanted = [(run, seed) for seed in there if not seeds or seed in seeds for run in chosen if seed in run["seeds"]]
    if not wanted:
        names = "; ".join(run["name"] for run in study.runs)
        raise ConfigError(f"--only and --seeds leave no run; this study has {names}; seeds {list(there)}")
    return [_plan_run(study, run["name"], run["legs"], seed, budget, unit, seconds_of, counted) for run, seed in wanted]


def _plan_run(study, name, legs, seed, budget, unit, seconds_of, counted) -> Run:
    total = sum(leg["share"] for leg in legs)
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"run {name!r}: its legs have {total:g} of the budget together; it must be 1")
    planned, key, flops, images = [], "", 0.0, 0
    for number, leg in enumerate(legs):
        where = f"run {name!r}, leg {number + 1}"
        config = _leg_config(study, leg, seed, where)
        stage_name = config.stages[0]
        one_step = _key(dataclasses.replace(config, seed=0), leg["data"], "")
        if one_step not in counted:
            counted[one_step] = cost.count_flops(config, stage_name, config.stage[stage_name].batch_size)[0]
        price = counted[one_step] if unit == "flops" else seconds_of(config, one_step)
        parts = max(1, leg["points"]) * _SAVES
        steps = round(leg["share"] * budget / price / parts) * parts
        if not steps:
            raise ConfigError(f"{where}: a share of {leg['share']} pays for fewer than {parts} steps, too few to judge")
        config = _with_steps(config, steps)
        config = dataclasses.replace(config, checkpoint=config_lib.Checkpoint(every=steps // parts, keep=2))
        key = _key(config, leg["data"], key)
        points = tuple(steps * (i + 1) // leg["points"] for i in range(leg["points"]))
        planned.append(Leg(config, points, counted[one_step], (flops, images), key))
        flops += steps * counted[one_step]
        images += steps * config.stage[stage_name].batch_size
    return Run(name, seed, tuple(planned))


def _leg_config(study, leg: dict, seed: int, where: str) -> Config:
    raw = study.base.copy_and_resolve_references()
    if leg["data"] not in study.sets:
        raise ConfigError(f"{where}: there is no set {leg['data']!r} in config.sets, only {sorted(study.sets)}")
    if len(raw.stages) != 1:
        raise ConfigError(f"config.base.stages is {raw.stages}; a leg is one stage")
    try:
        raw.update_from_flattened_dict(leg["settings"])
        raw.seed, raw.data.path = seed, study.sets[leg["data"]]
        raw.evaluation.every = raw.preview.every = 0
        return config_lib.parse(raw)
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None


def _with_steps(config: Config, steps: int) -> Config:
    name = config.stages[0]
    return dataclasses.replace(config, stage={name: dataclasses.replace(config.stage[name], steps=steps)})


def _key(config: Config, data: str, before: str) -> str:
    """Of all that decides the weights that a leg ends with; where things are and how often they are saved does not."""
    raw = config_lib.to_dict(config)
    for name in ("init_from", "sampling", "preview", "evaluation", "checkpoint", "log", "mesh"):
        del raw[name]
    raw["data"] = {k: v for k, v in raw["data"].items() if k not in ("threads", "workers")} | {"path": data}
    return hashlib.sha256(json.dumps([raw, before], sort_keys=True).encode()).hexdigest()[:12]


class StepSeconds:
    """Seconds of a training step on this machine's devices, measured once and kept in a file."""

    def __init__(self, path):
        self._path = pathlib.Path(path)
        self._known = json.loads(self._path.read_text()) if self._path.exists() else {}

    def __call__(self, config: Config, key: str) -> float:
        """The median of 20 steps after 3 that do not count. Keep the machine free of other work meanwhile."""
        if key not in self._known:
            name, network, mesh = config.stages[0], make_network(config), make_run_mesh(config)
            abstract = abstract_state(config, 0, network, mesh)
            state, size = fresh_state(config, network, abstract), config.data.image_size
            n = config.stage[name].batch_size
            rows = dict(image=np.zeros((n, size, size, config.data.channels), np.uint8), label=np.zeros(n, np.int32))
            batch = sharding.to_global(mesh, rows | dict(index=np.arange(n, dtype=np.uint32)))
            step, seconds = jit_step(config, name, mesh, abstract), []
            for _ in range(23):
                begun = time.perf_counter()
                state, values = step(state, batch)
                jax.block_until_ready(values)
                seconds.append(time.perf_counter() - begun)
            self._known[key] = statistics.median(seconds[3:])
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._known).encode())
        return self._known[key]


class Results:
    """A file of judged points, a line of JSON each. Several processes may add to it."""

    def __init__(self, path):
        self.path = pathlib.Path(path).expanduser().absolute()
        self.pictures = self.path.with_suffix("")  # folder of samples

    def rows(self) -> list[dict]:
        """All points so far."""
        return logs.read_metrics(self.path) if self.path.exists() else []

    def has(self, key: str, step: int, judged: dict) -> bool:
        """Whether a point was judged by these settings."""
        return any((row["key"], row["step"], row["judged"]) == (key, step, judged) for row in self.rows())

    def add(self, row: dict) -> None:
        """Append a point."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_study(runs: list[Run], study, workdir, results: Results, judge_path: str = "", say=print) -> None:
    """Train and judge what has no result yet.

    Args:
      runs: from `plan`.
      study: the ConfigDict.
      workdir: run folders of the legs go to its `legs`; pictures of samples beside the results.
      judge_path: see `Judge`.
      say: called with a line of text for every run and result.

    Raises:
      ConfigError, DataError, CheckpointError: something cannot work.
    """
    workdir = run_folder(workdir)
    judged = dict(study.judged.to_dict(), judge=pathlib.Path(judge_path).stem if judge_path else "inception")
    made_by = provenance()  # now: files may change while this runs
    missing = lambda run: [
        number for number, leg in enumerate(run.legs) for step in leg.points if not results.has(leg.key, step, judged)
    ]
    if any(map(missing, runs)):
        judge = Judge(judge_path, study, runs)  # before training: what cannot work should be said at once
    for i, run in enumerate(runs):
        todo = missing(run)
        say(f"run {i + 1} of {len(runs)}: {run.name}, seed {run.seed}{'' if todo else ': done before'}")
        if not todo:
            continue
        before = ""
        for number, leg in enumerate(run.legs[: todo[-1] + 1]):
            folder = workdir / "legs" / leg.key
            for step in leg.points:
                if results.has(leg.key, step, judged):
                    continue
                found = _train_to(leg, step, folder, before)
                last = number == len(run.legs) - 1 and step == leg.stage.steps
                picture = results.pictures / picture_name(run.name, run.seed) if last else None
                row = dict(run=run.name, seed=run.seed, leg=number + 1, key=leg.key, step=step, judged=judged)
                row |= dict(flops=leg.before[0] + step * leg.flops, images=leg.before[1] + step * leg.stage.batch_size)
                row |= dict(train_seconds=_seconds(workdir, run, number, step), **judge(found, picture), **made_by)
                results.add(row)
                numbers = ", ".join(f"{name} {row[name]:.4g}" for name in judge.names)
                say(f"{run.name}, seed {run.seed} at {row['flops']:.3g} FLOPs: {numbers}")
            if number < todo[-1]:
                _train_to(leg, leg.stage.steps, folder, before)
            before = str(folder)


def picture_name(run: str, seed: int) -> str:
    """File of a run's samples."""
    return "".join(letter if letter.isalnum() else "_" for letter in run) + f"_{seed}.png"


def _train_to(leg: Leg, step: int, folder: pathlib.Path, before: str) -> pathlib.Path:
    """The leg's checkpoint at a step, trained to there if it is not.

    Raises:
      ConfigError: the leg is further than that, and this checkpoint is gone.
    """
    found = folder / "checkpoints" / str(step)
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        further = [int(path.name) for path in found.parent.glob("[0-9]*") if path.name.isdecimal()]
        if max(further, default=0) > step:
            raise ConfigError(
                f"{folder} is at step {max(further)}, but step {step} has no result and its checkpoint is gone; remove "
                "the folder to train this leg again"
            )
        train(dataclasses.replace(_with_steps(leg.config, step), init_from=before), folder)
    return found


def _seconds(workdir: pathlib.Path, run: Run, number: int, step: int) -> float:
    """Seconds of training up to a step of a leg, by the rates in the logs: without starts, saving and judging."""
    total = 0.0
    for i, leg in enumerate(run.legs[: number + 1]):
        done = 0
        for line in logs.read_metrics(workdir / "legs" / leg.key / "metrics.jsonl"):
            if "images_per_second" in line and line["step"] > done and (i < number or line["step"] <= step):
                total += (line["step"] - done) * leg.stage.batch_size / line["images_per_second"]
                done = line["step"]
    return total


def provenance() -> dict[str, str]:
    """Commit (with + if files were changed), date and devices."""
    here = pathlib.Path(__file__).parent
    ask = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False).stdout
    commit = ask("rev-parse", "--short", "HEAD").strip()
    changed = "+" if commit and ask("status", "--porcelain", "--untracked-files=no").strip() else ""
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    return dict(commit=commit + changed, date=datetime.date.today().isoformat(), device=device)


class Judge:
    """What is said of a network: how far its samples are from real images, and how well it denoises held-out ones."""

    def __init__(self, path: str, study, runs: list[Run]):
        """Reads the real images and computes their features.

        Args:
          path: a Python file with `features(images, batch)` -> float [n, d], `frechet(a, b)`, `kid(a, b)` and
            `manifold(reference, samples)` -> dict of floats; "" takes FID's Inception network.
          study: its `sets` and `judged`: samples, the set they are judged on, how many held-out images and levels.
          runs: of the plan. Held out are those images of the set that all their legs on it leave out.

        Raises:
          ConfigError, DataError: there is no such file, no such set, or nothing is held out.
        """
        self._settings, self.names = study.judged, ()
        if self._settings.on not in study.sets:
            raise ConfigError(f"config.judged.on is {self._settings.on!r}; config.sets has {sorted(study.sets)}")
        place = study.sets[self._settings.on]
        of_set = [leg.config.data for run in runs for leg in run.legs if leg.config.data.path == place]
        data = max(of_set, key=lambda data: data.fraction, default=runs[0].legs[-1].config.data)
        if len({data.fraction_seed for data in of_set}) > 1:
            raise ConfigError("legs on one set must draw their part of it with one data.fraction_seed")
        source = open_source(place)
        rest = select(source, (), data.fraction, data.fraction_seed, False, rest=True)
        see = lambda source, n: np.stack(list(transform(self._settings.on, source, Framing.of(data)).iterate(0, n)))
        self._held_out = see(rest, min(self._settings.held_out, len(rest)))
        real = see(source, len(source))
        self._compare = _module_judge(path, real) if path else _inception_judge(real, runs[0].legs[0].config)

    def __call__(self, checkpoint: pathlib.Path, picture: pathlib.Path | None) -> dict:
        """Numbers of a checkpoint's EMA; some of its samples are drawn into `picture`, if it is given."""
        loaded, index = load(checkpoint), np.arange(self._settings.samples)
        batches = generate_batches(loaded, index, None, seed=0, batch_size=min(_BATCH, len(index)))
        samples = np.concatenate([images for _, images in batches])
        if picture:
            save_png(picture, _strip(samples[:SHOWN]))
        found = {name: float(value) for name, value in self._compare(samples).items()}
        self.names = tuple(found)
        levels = denoising_by_level(loaded, self._held_out, levels=self._settings.levels)
        return found | dict(denoising=[round(float(level), 6) for level in levels])


def _strip(images: np.ndarray) -> Image.Image:
    """Images side by side as they are, in rows of twelve."""
    n, side, _, channels = images.shape
    page = Image.new("RGB", (min(n, 12) * side, -(-n // 12) * side), "white")
    for i, image in enumerate(images):
        page.paste(Image.fromarray(image[..., 0] if channels == 1 else image), (i % 12 * side, i // 12 * side))
    return page


def _module_judge(path: str, real: np.ndarray):
    place = pathlib.Path(path).expanduser()
    if not place.is_file():
        raise ConfigError(f"--judge={path}: there is no such file")
    spec = importlib.util.spec_from_file_location("judge", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("features", "frechet", "kid", "manifold") if not hasattr(module, name)]
    if missing:
        raise ConfigError(f"--judge={path} has no {', '.join(missing)}; see maskdm_jax.study.Judge")
    reference = module.features(list(real), _BATCH)

    def judge(samples):
        own = module.features(list(samples), _BATCH)
        distances = dict(fd=module.frechet(reference, own), kid=module.kid(reference, own))
        return distances | module.manifold(reference, own)

    return judge


def _inception_judge(real: np.ndarray, config: Config):
    wanted = ("fid", "kid", "pr")
    evaluator = Evaluator(config.evaluation.inception_weights, batch_size=_BATCH)
    images = lambda name, rows: Images(name, len(rows), lambda start, stop: iter(rows[start:stop]))
    reference = evaluator.reference(images("real images", real), wanted)

    def judge(samples):
        return compare(reference, evaluator.samples(images("samples", samples), wanted), wanted)

    return judge
