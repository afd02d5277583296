"""One HTML page about an evaluation: numbers, samples, their nearest neighbours, curves, cards. It loads nothing."""

import base64
import datetime
import html
import io
import json
import math
import pathlib

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import maskdm_jax
from maskdm_jax.data.images import sample_grid, to_pil
from maskdm_jax.evaluation.features import ImageSet
from maskdm_jax.evaluation.metrics import METRICS
from maskdm_jax.storage import write_atomically
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
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(f"{result['n']:,} samples against {_reference_text(result)}"),
        body="\n".join(filter(None, sections)),
        footer=html.escape(f"maskdm-jax {maskdm_jax.__version__}, {when}"),
        command=f"<pre>{html.escape(command)}</pre>" if command else "",
        style=_STYLE,
    )
    write_atomically(path, page.encode("utf-8", "replace"))


def nearest(features: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and distances [n, k] of the k reference features nearest to each of `features`, nearest first."""
    a, b = np.asarray(features, np.float64), reference
    squares = np.concatenate([(part.astype(np.float64) ** 2).sum(axis=1) for part in np.array_split(b, 32)])
    products = np.concatenate([a @ part.astype(np.float64).T for part in np.array_split(b, 32)], axis=1)
    distances = np.sqrt(np.maximum((a**2).sum(axis=1)[:, None] - 2 * products + squares, 0))
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    stages = {str(line["stage"]): line["step"] for line in lines if "stage" in line}
    ends = ", ".join(f"{html.escape(name)} to step {step:,}" for name, step in stages.items())
    note = f'<p class="note">By step. Stages: {ends}.</p>' if ends else ""
    return f"<h2>Training</h2>{note}{_image(buffer.getvalue(), 'curves of the training')}"


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
        axis.set_title(title, loc="left", fontsize=11, color=_GREY)
        if scale == "log" and points[:, 1].min() > 0:
            axis.set_yscale("log")
            label = lambda y, _: f"{y:g}" if f"{y:e}"[0] in "125" else ""
            axis.yaxis.set_major_formatter(label)
            axis.yaxis.set_minor_formatter(label)
        axis.grid(axis="y", color=_GREY, alpha=0.25)
        axis.tick_params(which="both", colors=_GREY, labelsize=9)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(_GREY)
    return figure


_GREY = "#808790"  # legible on the white page and on the dark one


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
    return _image(_png(sample_grid(fitted, columns)), "grid", 2 * columns * side)


def _tile(image: np.ndarray) -> str:
    return _image(_png(_square(image, 96 if image.shape[0] <= 96 else 128)), "image of a row", 96)


def _square(image: np.ndarray, side: int) -> Image.Image:
    picture = to_pil(image).convert("RGB")
    if picture.size == (side, side):
        return picture
    picture = picture.resize([max(1, round(length * side / max(picture.size))) for length in picture.size])
    page = Image.new("RGB", (side, side), "white")
    page.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return page


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _image(png: bytes, alt: str, width: int = 1120) -> str:
    """An <img> with its data in the page, at most `width` pixels wide."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{alt}" style="max-width: min(100%, {width}px)" src="data:image/png;base64,{data}">'


_STYLE = """
:root { --page: #fff; --ink: #1a1c1f; --soft: #676d76; --line: #e2e5e9; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e8eaed; --soft: #9aa1ab; --line: #30343a; --tint: #1f2226; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1120px; padding: 40px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 8px; }
.subtitle, .note, footer, summary, i { color: var(--soft); font-style: normal; }
.note { font-size: 14px; margin: 6px 0 14px; max-width: 80ch; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 28px; }
.tile { background: var(--tint); border-radius: 10px; flex: 1 1 110px; max-width: 240px; padding: 16px 20px; }
.tile b { display: block; font-size: 34px; line-height: 1.15; }
.tile span { display: block; }
i { font-size: 13px; }
.pair { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
img { border-radius: 4px; display: block; width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.near td { padding: 4px; text-align: center; vertical-align: top; }
.near img { width: 96px; }
.near .first { border-right: 2px solid var(--line); padding-right: 12px; }
.near .first + td { padding-left: 12px; }
.cards { font-size: 14px; width: 100%; }
.cards th, .cards td { border-bottom: 1px solid var(--line); padding: 7px 14px 7px 0; text-align: left; }
.cards tr > th:first-child { color: var(--soft); font-weight: 400; white-space: nowrap; }
pre { background: var(--tint); border-radius: 8px; font-size: 13px; padding: 12px 14px; white-space: pre-wrap; }
footer { border-top: 1px solid var(--line); font-size: 14px; margin-top: 48px; padding-top: 14px; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
{body}
<footer>{footer}{command}</footer>
</body>
</html>
"""
