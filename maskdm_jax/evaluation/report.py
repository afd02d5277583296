"""One HTML page about an evaluation: numbers, samples, their nearest neighbours, curves, cards. It loads nothing."""

import html
import json
import math
import pathlib

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from maskdm_jax.data.images import sample_grid, to_pil
from maskdm_jax.evaluation.features import ImageSet
from maskdm_jax.evaluation.metrics import METRICS, squared_distances
from maskdm_jax.evaluation.page import img, plot, png, style_axis, write_page
from maskdm_jax.training import logs

NEIGHBOURS = 8  # shown for each sample
SAMPLES = 10  # whose neighbours are shown
# Key of the result -> title and meaning.
_METRICS = {key: text for metric in METRICS.values() for key, text in metric.keys.items() if text}
_CURVES = {  # key of metrics.jsonl -> title and scale of the axis
    "eval/fid": ("FID during training", "linear"),
    "eval/fd_lite0": ("Fréchet distance during training", "linear"),
    "loss": ("Loss", "log"),
    "grad_norm": ("Gradient norm", "log"),
    "learning_rate": ("Learning rate", "linear"),
}


def write_report(path, result: dict, reference: ImageSet, samples: ImageSet, *, run=None, command: str = "") -> None:
    """Write the page of an evaluation.

    Args:
      path: of the HTML file.
      result, reference, samples: from `evaluate.evaluate` with `keep=True`.
      run: run folder whose metrics.jsonl the curves show; None omits them.
      command: the command line to show.
    """
    sections = [
        _numbers(result),
        _pictures(reference, samples),
        _nearest(reference, samples),
        _training(run),
        _cards(result, reference, samples),
    ]
    title = pathlib.PurePosixPath(result["samples"].split(", seed")[0]).name
    if result["made_by"].get("checkpoint"):
        checkpoint = pathlib.PurePosixPath(result["made_by"]["checkpoint"])
        title = f"{checkpoint.parent.parent.name}, step {checkpoint.name}"
    subtitle = f"{result['n']:,} samples against {_reference_text(result)}"
    write_page(path, title, subtitle, sections, command)


def nearest(features: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and distances [n, k] of the k reference features nearest to each of `features`, nearest first."""
    distances = np.sqrt(np.concatenate([*squared_distances(reference, features)])).T
    order = np.argsort(distances, axis=1)[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


def _reference_text(result: dict) -> str:
    count = f"{result['reference_n']:,} images" if result["reference_n"] else "statistics"
    card = result["reference_card"]
    name = card.get("source") or pathlib.PurePosixPath(result["reference"]).name
    return f"{count} of {name}" + (f" ({card['split']})" if card.get("split") else "")


def _numbers(result: dict) -> str:
    tiles = []
    shown = {key: text for key, text in _METRICS.items() if key in result}
    for key, (name, meaning) in shown.items():
        scale = 1000 if key.startswith("kid") else 1
        spread = ""
        if "range" in result:
            low, high = (value * scale for value in result["range"][key])
            spread = f"{low:.3g} to {high:.3g}, {len(result['seeds'])} seeds"
        elif f"{key}_std" in result:
            spread = f"± {result[f'{key}_std'] * scale:.2g}"
        value = f"{result[key] * scale:.4g}"
        tiles.append(f'<div class="tile" title="{meaning}"><b>{value}</b><span>{name}</span><i>{spread}</i></div>')
    notes = "; ".join(f"{name}: {meaning}" for name, meaning in shown.values())
    return f'<div class="tiles">{"".join(tiles)}</div><p class="note">{notes}.</p>'


def _pictures(reference: ImageSet, samples: ImageSet) -> str:
    columns = []
    for name, images in (("Samples", samples.pictures), ("Reference", reference.pictures)):
        if images:
            columns.append(f"<figure><figcaption>{name}</figcaption>{_grid(images[:64], 8)}</figure>")
    if not columns:
        return ""
    note = '<p class="note">The first images of each set, not selected.</p>'
    return f'<h2>Images</h2>{note}<div class="pair">{"".join(columns)}</div>'


def _nearest(reference: ImageSet, samples: ImageSet) -> str:
    if reference.features is None or samples.features is None or reference.images.get is None:
        return ""
    shown = min(SAMPLES, len(samples.pictures))
    order, distances = nearest(samples.features[:shown], reference.features, NEIGHBOURS)
    there = len(reference.features)
    probe = np.linspace(0, there - 1, min(500, there)).astype(int)
    usual = nearest(reference.features[probe], reference.features, 2)[1][:, -1]  # the nearest one is the image itself
    rows = []
    for i in range(shown):
        cells = [f'<td class="first">{_tile(samples.pictures[i])}</td>']
        for number, distance in zip(order[i], distances[i], strict=True):
            cells.append(f"<td>{_tile(reference.images.get(int(number)))}<i>{distance:.3g}</i></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<h2>Nearest reference images</h2>"
        '<p class="note">Each row shows a sample, then the reference images whose features are nearest, with '
        "the distance. The median distance of a reference image to the nearest other one is "
        f"{np.median(usual):.3g} (90% are within {np.percentile(usual, 5):.3g} to {np.percentile(usual, 95):.3g}); "
        "samples far below that may be copies.</p>"
        f'<div class="scroll"><table class="near">{"".join(rows)}</table></div>'
    )


def _training(run) -> str:
    path = None if run is None else run / "metrics.jsonl"
    if path is None or not path.exists():
        return ""
    lines = logs.read_metrics(path)
    figure = draw_curves(lines)
    if figure is None:
        return ""
    stages = {str(line["stage"]): line["step"] for line in lines if "stage" in line}
    ends = ", ".join(f"{html.escape(name)} to step {step:,}" for name, step in stages.items())
    note = f'<p class="note">By step. Stages: {ends}.</p>' if ends else ""
    return f"<h2>Training</h2>{note}{img(plot(figure), 'curves of the training')}"


def draw_curves(lines: list[dict]) -> Figure | None:
    """Plot the curves of metrics.jsonl by step, two per row; of more than 1,000 points, means over equal parts.

    lines: its content; what is no number is skipped. None if no curve has two points.
    """
    curves = {}
    for key in _CURVES:
        points = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
        if len(points) > 1000:
            points = [np.mean(part, axis=0) for part in np.array_split(np.asarray(points, float), 1000)]
        if len(points) > 1:
            curves[key] = np.asarray(points, float)
    if not curves:
        return None
    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(10.4, 2.9 * rows), layout="constrained")
    figure.get_layout_engine().set(hspace=0.1)
    for i, (key, points) in enumerate(curves.items(), 1):
        title, scale = _CURVES[key]
        axis = figure.add_subplot(rows, 2, i)
        axis.plot(*points.T, color="#3b82c4", linewidth=1.4, marker="o" if len(points) < 30 else "", markersize=4)
        style_axis(axis, title, log=scale == "log" and points[:, 1].min() > 0)
    return figure


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cards(result: dict, reference: ImageSet, samples: ImageSet) -> str:
    made, a, b = result["made_by"], result["reference_card"], samples.images.card
    sampling = ", ".join(f"{key} {value}" for key, value in made.get("sampling", {}).items())
    rows = [
        ("path", result["reference"], result["samples"]),
        ("weights", "", made.get("weights", "")),
        ("sampler", "", sampling),
        ("seed", "", str(made.get("seed", ""))),
        ("data", a.get("source", ""), f"trained on {b['source']}" if b.get("source") else ""),
    ]
    rows += [(key.replace("_", " "), a.get(key, ""), b.get(key, "")) for key in ("split", "count", "content_hash")]
    for key in ("size", "channels", "crop", "resize", "colour"):
        rows.append((key, a.get("image", {}).get(key, ""), b.get("image", {}).get(key, "")))
    text = lambda value: html.escape(f"{value:,}" if isinstance(value, int) else str(value))
    body = "".join(
        f"<tr><th>{name}</th><td>{text(left)}</td><td>{text(right)}</td></tr>"
        for name, left, right in rows
        if f"{left}{right}"
    )
    head = "<tr><th></th><th>Reference</th><th>Samples</th></tr>"
    numbers = html.escape(json.dumps({k: v for k, v in result.items() if k not in ("reference_card", "made_by")}))
    return (
        f'<h2>What was compared</h2><div class="scroll"><table class="cards">{head}{body}</table></div>'
        f"<details><summary>JSON</summary><pre>{numbers}</pre></details>"
    )


def _grid(images, columns: int) -> str:
    """A grid of images; those that are not of its square size are fitted into squares."""
    side = max(32, min(128, max(image.shape[0] for image in images)))
    fitted = np.stack([np.asarray(_square(image, side)) for image in images])
    return img(png(sample_grid(fitted, columns)), "grid", 2 * columns * side)


def _tile(image: np.ndarray) -> str:
    return img(png(_square(image, 96 if image.shape[0] <= 96 else 128)), "image of a row", 96)


def _square(image: np.ndarray, side: int) -> Image.Image:
    return ImageOps.pad(to_pil(image).convert("RGB"), (side, side), color="white")
