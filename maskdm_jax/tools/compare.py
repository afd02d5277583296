"""One HTML page that compares runs: numbers, curves, settings that differ, samples from the same noise."""

import collections
import dataclasses
import html
import json
import math
import pathlib

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from maskdm_jax.config import Config, parse, to_dict
from maskdm_jax.errors import EvaluationError, MaskDMError, first_line
from maskdm_jax.evaluation.page import img, plot, style_axis, write_page
from maskdm_jax.storage import location
from maskdm_jax.tools.cost import count_flops
from maskdm_jax.training import logs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")  # for all eyes
SMOOTHED = 0.03  # of a curve's points: width of the moving average


@dataclasses.dataclass
class Run:
    """A run folder as the page shows it."""

    name: str
    folder: pathlib.Path
    config: Config
    lines: list[dict]  # of metrics.jsonl
    flops: dict[str, float]  # of a step of each stage

    def along(self, step: int) -> tuple[int, float]:
        """Images and FLOPs up to a step of the run."""
        images, flops = 0, 0.0
        for name in self.config.stages:
            done = min(step, self.config.stage[name].steps)
            images, flops = images + done * self.config.stage[name].batch_size, flops + done * self.flops[name]
            step -= done
        return images, flops

    def borders(self) -> list[int]:
        """Steps at which a stage ends and the next one begins."""
        return list(np.cumsum([self.config.stage[name].steps for name in self.config.stages])[:-1])

    def points(self, key: str) -> np.ndarray:
        """(step, value) of a metric, [n, 2]."""
        found = [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key), int | float)]
        return np.array([pair for pair in found if math.isfinite(pair[1])], float).reshape(-1, 2)


def compare(folders: list, path, command: str = "") -> None:
    """Write the page of up to eight run folders.

    Raises:
      EvaluationError: a folder is no run, or has no metrics yet, or there are too many.
    """
    if len(folders) > len(COLOURS):
        raise EvaluationError(f"{len(folders)} runs are too many for one page; give at most {len(COLOURS)}")
    runs = [_open(folder) for folder in folders]
    counts = collections.Counter(run.name for run in runs)
    for number, run in enumerate(runs, 1):
        run.name += f" ({number})" if counts[run.name] > 1 else ""
    sections = [_numbers(runs), _curves(runs), _settings(runs), _samples(runs)]
    write_page(path, ", ".join(run.name for run in runs), f"{len(runs)} runs", sections, command)


def _open(folder) -> Run:
    folder = location(folder)
    try:
        raw, lines = json.loads((folder / "config.json").read_text()), logs.read_metrics(folder / "metrics.jsonl")
        config = parse(raw)
    except FileNotFoundError as error:
        missing = "config.json or metrics.jsonl"
        raise EvaluationError(f"{folder} is no run folder that can be compared: it lacks {missing}") from error
    except (OSError, ValueError, MaskDMError) as error:
        raise EvaluationError(f"{folder} is no run folder that can be compared ({first_line(error)})") from error
    if not any("loss" in line for line in lines):
        raise EvaluationError(f"{folder} has no metrics yet; its first line appears after config.log.every steps")
    flops = {name: count_flops(config, name, config.stage[name].batch_size) for name in config.stages}
    return Run(folder.name, folder, config, lines, flops)


def _numbers(runs: list[Run]) -> str:
    """A table with the state of each run at its last line."""
    metrics, rows = _metrics(runs), []
    for colour, run in zip(COLOURS, runs, strict=False):
        step = run.lines[-1]["step"]
        images, flops = run.along(step)
        speed = np.median(run.points("images_per_second")[:, 1]) if len(run.points("images_per_second")) else math.nan
        cells = [f"{step:,}", f"{images:,}", f"{flops:.3g}", f"{speed:,.0f}", f"{run.points('loss')[-1, 1]:.4f}"]
        cells += [f"{run.points(key)[-1, 1]:.4g}" if len(run.points(key)) else "" for key in metrics]
        mark = f'<b style="color: {colour}">&#9632;</b> {html.escape(run.name)}'
        rows.append(f"<tr><th>{mark}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    titles = ["", "step", "images", "FLOPs", "images/s", "loss", *(key.removeprefix("eval/") for key in metrics)]
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    return f'<div class="scroll"><table class="cards"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _metrics(runs: list[Run]) -> list[str]:
    """Keys of evaluations, in the order of their appearance."""
    keys = dict.fromkeys(key for run in runs for line in run.lines for key in line)
    return [key for key in keys if key.startswith("eval/") and not key.endswith("_std")]


def _curves(runs: list[Run]) -> str:
    """The loss against steps, images and FLOPs; then every metric of evaluations against steps."""
    along = {
        "step": lambda run, s: s,
        "images": lambda run, s: run.along(s)[0],
        "FLOPs": lambda run, s: run.along(s)[1],
    }
    panels = [("loss", f"loss by {name}", of) for name, of in along.items()]
    panels += [(key, f"{key.removeprefix('eval/')} by step", along["step"]) for key in _metrics(runs)]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 3.2 * rows + 0.4), layout="constrained")
    for number, (key, title, of) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 3, number)
        for colour, run in zip(COLOURS, runs, strict=False):
            _curve(axis, run, key, of, colour)
        positive = all((run.points(key)[:, 1] > 0).all() for run in runs)
        style_axis(axis, title, log=key == "loss" and positive)
        axis.locator_params(axis="x", nbins=5)
        if title.endswith("FLOPs"):
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.2g}")
    note = "The thin line shows the logged values, the thick one their moving average; circles mark the end of a stage."
    if len({(run.config.diffusion.process, run.config.diffusion.objective) for run in runs}) > 1:
        note += " Losses of different processes or objectives cannot be compared."
    return f'<h2>Curves</h2><p class="note">{note}</p>{img(plot(figure), "curves of the runs")}'


def _curve(axis, run: Run, key: str, of, colour: str) -> None:
    points = run.points(key)
    if not len(points):
        return
    x = np.array([of(run, int(step)) for step in points[:, 0]], float)
    width = max(1, int(SMOOTHED * len(points))) if key == "loss" else 1
    # Each stage is averaged by itself: the loss jumps where another share of the image is hidden.
    parts = np.split(np.arange(len(points)), np.searchsorted(points[:, 0], run.borders(), side="right"))
    if width > 1:
        axis.plot(x, points[:, 1], color=colour, linewidth=0.6, alpha=0.35)
    for part in (part for part in parts if len(part)):
        kernel = np.ones(min(width, len(part)))
        smooth = np.convolve(points[part, 1], kernel, "same") / np.convolve(np.ones(len(part)), kernel, "same")
        axis.plot(x[part], smooth, color=colour, linewidth=1.6, marker="o" if len(points) < 30 else "", markersize=3)
        if part[-1] + 1 < len(points):
            axis.plot(x[part[-1]], smooth[-1], "o", markersize=5, markerfacecolor="none", color=colour)


def _settings(runs: list[Run]) -> str:
    """A table of the settings in which the runs differ."""
    flat = [flatten_dict(to_dict(run.config), sep=".") for run in runs]
    keys = [
        key for key in dict.fromkeys(key for one in flat for key in one) if len({str(o.get(key)) for o in flat}) > 1
    ]
    if not keys:
        return "<h2>Settings</h2><p class='note'>All settings are equal.</p>"
    cell = lambda value: "" if value is None else html.escape(str(value))
    rows = [f"<tr><th>{key}</th>{''.join(f'<td>{cell(one.get(key))}</td>' for one in flat)}</tr>" for key in keys]
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    note = '<p class="note">The other settings are equal.</p>'
    table = f'<table class="cards"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    return f'<h2>Settings that differ</h2>{note}<div class="scroll">{table}</div>'


def _samples(runs: list[Run]) -> str:
    """The last grid of each run."""
    figures, noise = [], set()
    for run in runs:
        grids = sorted((run.folder / "samples").glob("step_*.png"), key=lambda grid: grid.name)
        if grids:
            step = int(grids[-1].stem.removeprefix("step_"))
            caption = f"{html.escape(run.name)}, step {step:,}"
            figures.append(
                f"<figure><figcaption>{caption}</figcaption>{img(grids[-1].read_bytes(), 'samples')}</figure>"
            )
            c, grid = run.config, (run.config.preview.rows, run.config.preview.columns)
            noise.add((c.seed, c.data.image_size, c.data.channels, c.model.wavelet_scale > 0, grid))
    if not figures:
        return ""
    same = "Images at the same place begin with the same noise."
    if len(noise) > 1:
        same = "The runs differ in seed, image size or grid: images at the same place begin with different noise."
    return f'<h2>Samples</h2><p class="note">{same}</p><div class="pair">{"".join(figures)}</div>'
