"""One HTML page about an evaluation: numbers, cards, samples, their nearest neighbours, curves. Needs no server."""

import base64
import datetime
import html
import io
import json
import math
import pathlib

import numpy as np
from PIL import Image

import maskdm_jax
from maskdm_jax.data.images import sample_grid
from maskdm_jax.evaluation.features import ImageSet
from maskdm_jax.storage import write_atomically
from maskdm_jax.training import logs

NEIGHBOURS = 8  # shown of each sample
SAMPLES = 10  # of which neighbours are shown
_NAMES = {
    "fid": ("FID", "Fréchet distance of Inception features; lower is better"),
    "kid": ("KID × 1000", "kernel distance of Inception features, times 1,000; lower is better"),
    "is": ("Inception Score", "sharp and diverse by Inception's own classes; higher is better"),
    "precision": ("Precision", "share of samples that look like reference images"),
    "recall": ("Recall", "share of reference images that samples come near to"),
}


def write_report(path, result: dict, reference: ImageSet, samples: ImageSet, *, run=None, command: str = "") -> None:
    """Write the page of an evaluation.

    Args:
      result: from `evaluate.evaluate`, with the sets that it returned, `keep` being true.
      run: run folder, whose metrics.jsonl the curves are drawn from; None leaves them out.
      command: that made it, to be shown.
    """
    sections = [
        _numbers(result),
        _pictures(reference, samples),
        _nearest(reference, samples),
        _curves(run),
        _cards(result, reference, samples),
    ]
    title = html.escape(pathlib.Path(result["samples"].split(", seed")[0]).name)
    made = result["made_by"]
    if made.get("checkpoint"):
        place = pathlib.Path(made["checkpoint"])
        title = html.escape(f"{place.parent.parent.name}, step {place.name}")
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = _PAGE.format(
        title=title,
        subtitle=f"{result['n']:,} samples against {_reference_text(result)}",
        body="\n".join(filter(None, sections)),
        footer=html.escape(f"maskdm-jax {maskdm_jax.__version__}, {when}"),
        command=f"<pre>{html.escape(command)}</pre>" if command else "",
        style=_STYLE,
    )
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace"))


def nearest(features: np.ndarray, reference: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and distances [n, k] of the k reference features nearest to each of `features`, nearest first."""
    a, b = np.asarray(features, np.float64), reference
    squares = np.concatenate([(part.astype(np.float64) ** 2).sum(axis=1) for part in np.array_split(b, 32)])
    products = np.concatenate([a @ part.astype(np.float64).T for part in np.array_split(b, 32)], axis=1)
    distances = np.sqrt(np.maximum((a**2).sum(axis=1)[:, None] - 2 * products + squares, 0))
    order = np.argsort(distances, axis=1)[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


def _reference_text(result) -> str:
    count = f"{result['reference_n']:,} images" if result["reference_n"] else "statistics"
    card = result["reference_card"]
    name = card.get("source") or pathlib.Path(result["reference"]).name
    return html.escape(f"{count} of {name}" + (f" ({card['split']})" if card.get("split") else ""))


def _numbers(result: dict) -> str:
    tiles = []
    for key, (name, meaning) in _NAMES.items():
        if key not in result:
            continue
        scale = 1000 if key == "kid" else 1
        value, spread = result[key] * scale, ""
        if "range" in result:
            low, high = (v * scale for v in result["range"][key])
            spread = f"{low:.3g} to {high:.3g}, {len(result['seeds'])} seeds"
        elif f"{key}_std" in result:
            spread = f"± {result[f'{key}_std'] * scale:.2g}"
        tiles.append(f'<div class="tile" title="{meaning}"><b>{value:.4g}</b><span>{name}</span><i>{spread}</i></div>')
    notes = "; ".join(f"{name}: {meaning}" for key, (name, meaning) in _NAMES.items() if key in result)
    return f'<div class="tiles">{"".join(tiles)}</div><p class="note">{notes}.</p>'


def _pictures(reference: ImageSet, samples: ImageSet) -> str:
    columns = []
    for name, images in (("Samples", samples.pictures), ("Reference", reference.pictures)):
        if images:
            columns.append(f"<figure><figcaption>{name}</figcaption>{_grid(images[:64], 8)}</figure>")
    if not columns:
        return ""
    return (
        f'<h2>Images</h2><p class="note">The first of each, not chosen.</p><div class="pair">{"".join(columns)}</div>'
    )


def _nearest(reference: ImageSet, samples: ImageSet) -> str:
    if reference.features is None or samples.features is None or reference.images.get is None:
        return ""
    shown = min(SAMPLES, len(samples.pictures))
    k = min(NEIGHBOURS, len(reference.features))
    order, distances = nearest(samples.features[:shown], reference.features, k)
    probe = np.linspace(0, reference.n - 1, min(500, reference.n)).astype(int)
    usual = nearest(reference.features[probe], reference.features, min(2, reference.n))[1][:, -1]
    rows = []
    for i in range(shown):
        cells = [f'<td class="first">{_tile(samples.pictures[i])}</td>']
        for number, distance in zip(order[i], distances[i], strict=True):
            cells.append(f"<td>{_tile(reference.images.get(int(number)))}<i>{distance:.3g}</i></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<h2>Nearest reference images</h2>"
        '<p class="note">Each row: a sample, then the reference images whose Inception features are nearest to its '
        "own, with the distance. Between a reference image and the one nearest to it the distance is "
        f"{np.median(usual):.3g} in the middle ({np.percentile(usual, 5):.3g} to {np.percentile(usual, 95):.3g} for "
        "nine in ten): samples far below that may be copies.</p>"
        f'<div class="scroll"><table class="near">{"".join(rows)}</table></div>'
    )


def _curves(run) -> str:
    path = None if run is None else pathlib.Path(run) / "metrics.jsonl"
    if path is None or not path.exists():
        return ""
    lines = logs.read_metrics(path)
    charts = []
    for key, name, log_scale in [
        ("eval/fid", "FID while training", False),
        ("loss", "Loss", True),
        ("grad_norm", "Gradient norm", True),
        ("learning_rate", "Learning rate", False),
    ]:
        points = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
        if len(points) > 1:
            charts.append(f"<figure><figcaption>{name}</figcaption>{line_chart(points, log_scale=log_scale)}</figure>")
    stages = {str(line["stage"]): line["step"] for line in lines if "stage" in line}
    ends = ", ".join(f"{html.escape(name)} to step {step:,}" for name, step in stages.items())
    note = f'<p class="note">By step. Stages: {ends}.</p>' if ends else ""
    return f'<h2>Training</h2>{note}<div class="pair">{"".join(charts)}</div>' if charts else ""


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cards(result: dict, reference: ImageSet, samples: ImageSet) -> str:
    made, rows = result["made_by"], []
    sampling = made.get("sampling", {})
    rows.append(("", "Reference", "Samples"))
    rows.append(("path", result["reference"], result["samples"]))
    rows.append(("weights", "", made.get("weights", "")))
    rows.append(("sampler", "", ", ".join(f"{key} {value}" for key, value in sampling.items())))
    rows.append(("seed", "", str(made.get("seed", ""))))
    a, b = result["reference_card"], samples.images.card
    rows.append(("data", a.get("source", ""), f"trained on {b['source']}" if b.get("source") else ""))
    for key in ("split", "count", "content_hash"):
        rows.append((key.replace("_", " "), a.get(key, ""), b.get(key, "")))
    for key in ("size", "channels", "crop", "resize", "colour"):
        rows.append((key, a.get("image", {}).get(key, ""), b.get("image", {}).get(key, "")))
    text = lambda value: html.escape(f"{value:,}" if isinstance(value, int) else str(value))
    kept = [row for row in rows if any(str(cell) for cell in row[1:])]
    body = "".join(f"<tr><th>{row[0]}</th><td>{text(row[1])}</td><td>{text(row[2])}</td></tr>" for row in kept[1:])
    head = "<tr><th></th><th>Reference</th><th>Samples</th></tr>"
    numbers = html.escape(json.dumps({k: v for k, v in result.items() if k not in ("reference_card", "made_by")}))
    return (
        f'<h2>What was compared</h2><div class="scroll"><table class="cards">{head}{body}</table></div>'
        f"<details><summary>JSON</summary><pre>{numbers}</pre></details>"
    )


def _grid(images, columns: int) -> str:
    """Images of one size as one picture; those of other sizes are fitted into squares first."""
    side = max(32, min(128, max(image.shape[0] for image in images)))
    fitted = [np.asarray(_square(image, side)) for image in images]
    return _tag(sample_grid(np.stack(fitted), columns), 2 * columns * side, "grid")


def _square(image: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    if picture.size == (side, side):
        return picture
    picture = picture.resize([max(1, round(length * side / max(picture.size))) for length in picture.size])
    page = Image.new("RGB", (side, side), "white")
    page.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return page


def _tile(image: np.ndarray) -> str:
    side = 96 if image.shape[0] <= 96 else 128
    return _tag(_square(image, side), 96, "tile of a row")


def _tag(picture: Image.Image, width: int, what: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{what}" style="max-width: min(100%, {width}px)" src="data:image/png;base64,{data}">'


def line_chart(points: list[tuple[float, float]], *, log_scale: bool = False, width=520, height=220) -> str:
    """An SVG curve of (x, y) points; at most a thousand are drawn, the mean of those that fall together."""
    if len(points) > 1000:
        points = [tuple(np.mean(part, axis=0)) for part in np.array_split(np.asarray(points, float), 1000)]
    xs, ys = zip(*points, strict=True)
    log_scale = log_scale and min(ys) > 0
    scale = math.log10 if log_scale else float
    low, high = scale(min(ys)), scale(max(ys))
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high, first, last = low - pad, high + pad, min(xs), max(max(xs), min(xs) + 1)
    left, right, top, bottom = 58, 12, 8, 26
    x_of = lambda x: left + (x - first) / (last - first) * (width - left - right)
    y_of = lambda y: height - bottom - (scale(y) - low) / (high - low) * (height - top - bottom)
    marks = []
    for y in _log_ticks(10**low, 10**high) if log_scale else _ticks(low, high):
        at = y_of(y)
        marks.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        marks.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for value in _ticks(first, last):
        text = f"{value / 1000:g}k" if last >= 10_000 else f"{value:g}"
        marks.append(f'<text x="{x_of(value):.1f}" y="{height - 8}" text-anchor="middle">{text}</text>')
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, ys, strict=True))
    dots = (
        "".join(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>' for x, y in points) if len(points) < 30 else ""
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(marks)}<polyline points="{path}"/>{dots}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers within a range."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw)
    start = math.ceil(low / step)
    return [round(i * step, 12) for i in range(start, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range, thinned out; round numbers if these are too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for nice in ((1,), (1, 3), (1, 2, 5)):
        ticks = [n * 10.0**power for power in powers for n in nice if low <= n * 10.0**power <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 6)]
    return [tick for tick in _ticks(low, high) if tick > 0]


_STYLE = """
:root { --page: #fff; --ink: #1a1c1f; --soft: #676d76; --line: #e2e5e9; --tint: #f5f6f8; --accent: #2563a8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e8eaed; --soft: #9aa1ab; --line: #30343a; --tint: #1f2226; --accent: #7fb3ec; }
}
* { box-sizing: border-box; }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  margin: 0 auto; max-width: 1120px; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 8px; }
.subtitle, .note, footer { color: var(--soft); }
.subtitle { font-size: 17px; margin: 0 0 28px; }
.note { font-size: 14px; margin: 6px 0 14px; max-width: 80ch; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px; }
.tile { background: var(--tint); border-radius: 10px; flex: 1 1 150px; max-width: 260px; padding: 16px 20px; }
.tile b { display: block; font-size: 34px; font-weight: 650; letter-spacing: -0.5px; line-height: 1.15; }
.tile span { display: block; }
.tile i, td i { color: var(--soft); font-size: 13px; font-style: normal; }
.pair { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
img { border-radius: 4px; display: block; width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.near td { padding: 4px; text-align: center; width: 104px; }
.near img { width: 96px; }
.near .first { border-right: 2px solid var(--line); padding-right: 14px; vertical-align: top; width: 116px; }
.near td + td { padding-left: 8px; }
.cards { font-size: 14px; width: 100%; }
.cards th, .cards td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; padding: 7px 14px 7px 0;
  text-align: left; vertical-align: top; }
.cards tr > th:first-child { color: var(--soft); font-weight: 400; white-space: nowrap; width: 110px; }
svg { height: auto; width: 100%; }
svg text { fill: var(--soft); font-size: 12px; }
svg .axis { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; stroke-width: 1.8; }
svg circle { fill: var(--accent); }
pre { background: var(--tint); border-radius: 8px; font-size: 13px; overflow-wrap: anywhere; padding: 12px 14px;
  white-space: pre-wrap; }
details { margin-top: 14px; }
summary { color: var(--soft); cursor: pointer; font-size: 14px; }
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
