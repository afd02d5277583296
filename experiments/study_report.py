"""Report of a study: curves of quality against compute, a table, samples. Drawing needs matplotlib."""

import itertools
import json
import pathlib
import statistics

from PIL import Image, ImageDraw, ImageFont
from study import Run, picture_name

from maskdm_jax.build import mask_plans
from maskdm_jax.data.images import save_png
from maskdm_jax.errors import ConfigError
from maskdm_jax.storage import write_atomically

DISTANCES = dict(fd="Fréchet distance", fid="FID")  # titles, by their name in the results


def describe(runs: list[Run]) -> list[str]:
    """Describe a plan in lines of text."""
    lines = []
    for run in runs:
        lines.append(f"{run.name}, seed {run.seed}")
        for phase in run.phases:
            stage, plan = phase.stage, mask_plans(phase.config, phase.config.stages[-1])[0]
            share = 1 - plan.visible / plan.total
            hidden = f"{share:.0%} hidden, {plan.kind} {plan.unit}" if share else "nothing hidden"
            points = f"evaluated at {', '.join(map(str, phase.points))}" if phase.points else "not evaluated"
            lines.append(
                f"  {stage.steps:,} steps of {stage.batch_size} images, {phase.flops * stage.steps:.3g} FLOPs, "
                f"{hidden}, {points} ({phase.key})"
            )
    return lines


def write(runs: list[Run], rows: list[dict], folder, pictures, command: str) -> str:
    """Write curves.png, samples.png and table.md for the points evaluated so far into a folder, and return the table.

    Args:
      runs: the plan.
      rows: of `study.Results`. Rows of other plans, or with another evaluation than the last row, are ignored.
      pictures: folder of the runs' samples.
      command: the command of the study, for the table.

    Raises:
      ConfigError: no run of this plan is complete.
    """
    found = _by_run(runs, rows)
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _draw(found, folder / "curves.png")
    drawn = lambda name, seeds: [pathlib.Path(pictures) / picture_name(name, seed) for seed in sorted(seeds)]
    strips = {name: next(filter(pathlib.Path.exists, drawn(name, seeds)), None) for name, seeds in found.items()}
    strips = {name: path for name, path in strips.items() if path}
    if strips:
        save_png(folder / "samples.png", _page_of_strips(strips))
    text = "\n".join([*_table(found), "", f"    {command}"]) + "\n"
    write_atomically(folder / "table.md", text.encode())
    return text


def _by_run(runs, rows) -> dict[str, dict[int, list[dict]]]:
    """Name -> seed -> rows by increasing cost, for completed runs."""
    name = lambda judged: json.dumps(judged, sort_keys=True)
    points = {(row["key"], row["step"], name(row["judged"])): row for row in rows}
    latest = rows[-1]["judged"] if rows else {}
    found = {}
    for run in runs:
        judged = [name(latest | dict(sampling=phase.sampling)) for phase in run.phases]
        wanted = [(phase.key, step, by) for phase, by in zip(run.phases, judged, strict=True) for step in phase.points]
        if all(point in points for point in wanted):
            # Name, seed and cost come from the plan, because runs that share a phase share its results.
            costs = [(phase.before[0] + step * phase.flops) for phase in run.phases for step in phase.points]
            of_seed = [points[point] | dict(flops=cost) for point, cost in zip(wanted, costs, strict=True)]
            found.setdefault(run.name, {})[run.seed] = of_seed
    if not found:
        raise ConfigError("no run of this study has all its results yet; run the study first, without --report")
    return found


def _distance(found) -> str:
    row = next(iter(next(iter(found.values())).values()))[0]
    return next(name for name in DISTANCES if name in row)


def _denoising(row: dict) -> float:
    return statistics.mean(row["denoising"])


def _spread(values, digits=1) -> str:
    """Mean (lowest-highest), or a single value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _table(found) -> list[str]:
    distance = _distance(found)
    names = [name for name in ("kid", "precision", "recall", "nn") if name in next(iter(_ends(found).values()))[0]]
    title = {"kid": "KID", "nn": "nearest real"}
    head = ["at the whole budget", "seeds", DISTANCES[distance], *(title.get(name, name) for name in names)]
    head += ["held-out loss", "million images", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name, ends in _ends(found).items():
        cells = [name, str(len(ends)), _spread([row[distance] for row in ends])]
        cells += [_spread([row[what] for row in ends], 2) for what in names]
        cells += [_spread([_denoising(row) for row in ends], 4)]
        cells += [f"{ends[0]['images'] / 1e6:.2f}", _spread([row["train_seconds"] / 60 for row in ends], 0)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_sentences(found, distance), "", _provenance(found)]


def _provenance(found) -> str:
    rows = [row for seeds in found.values() for points in seeds.values() for row in points]
    commits, devices, dates = (sorted({row[name] for row in rows}) for name in ("commit", "device", "date"))
    judged = rows[0]["judged"]  # settings of the evaluation; see `study.Results`
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{judged['samples']:,} samples of the EMA per point, compared with {judged['on']} by {judged['judge']}; "
        f"held-out loss on {judged['held_out']} images; "
        f"commit {', '.join(commits)}; {', '.join(devices)}; {period}."
    )


def _ends(found) -> dict[str, list[dict]]:
    return {name: [points[-1] for points in seeds.values()] for name, seeds in found.items()}


def _sentences(found, distance) -> list[str]:
    """Compare each run with the first one, including the ranges over seeds."""
    (first, ours), *others = _ends(found).items()
    lines = []
    for name, ends in others:
        said = []
        for what, value in ((DISTANCES[distance], lambda row: row[distance]), ("held-out loss", _denoising)):
            a, b = [value(row) for row in ends], [value(row) for row in ours]
            change = f"{what} {statistics.mean(a) / statistics.mean(b) - 1:+.1%}"
            apart = max(a) < min(b) or min(a) > max(b)
            few = min(len(a), len(b)) < 2
            said.append(f"{change} ({'one seed' if few else 'ranges apart' if apart else 'ranges overlap'})")
        lines.append(f"- {name}, against {first}: {', '.join(said)}")
    return lines


def _draw(found, path: pathlib.Path) -> None:
    """Plot distance and held-out loss by compute, and the final loss by noise level, relative to the first run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    distance = _distance(found)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    first, ends = next(iter(_ends(found).items()))
    colors = pyplot.get_cmap("tab10" if len(found) <= 10 else "tab20").colors
    base = [statistics.mean(level) for level in zip(*(row["denoising"] for row in ends), strict=True)]
    for color, (name, seeds) in zip(itertools.cycle(colors), found.items(), strict=False):
        style = dict(color=color, marker="o", markersize=4, label=f"{name} ({len(seeds)} seeds)")
        if len(seeds) == 1:
            style |= dict(linestyle="--", linewidth=1, label=f"{name} (1 seed)")
        by_point = list(zip(*seeds.values(), strict=True))
        for axis, value in ((axes[0], lambda row: row[distance]), (axes[1], _denoising)):
            x = [rows[0]["flops"] for rows in by_point]
            y = [[value(row) for row in rows] for rows in by_point]
            axis.plot(x, [statistics.mean(values) for values in y], **style)
            axis.fill_between(x, list(map(min, y)), list(map(max, y)), color=color, alpha=0.15, linewidth=0)
        ratios = [[a / b for a, b in zip(row["denoising"], base, strict=True)] for row in by_point[-1]]
        by_level = list(zip(*ratios, strict=True))
        x = [(level + 0.5) / len(base) for level in range(len(base))]
        axes[2].plot(x, [100 * (statistics.mean(values) - 1) for values in by_level], **style)
        low, high = ([100 * (pick(values) - 1) for values in by_level] for pick in (min, max))
        axes[2].fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="training, FLOPs", ylabel=DISTANCES[distance], yscale="log")
    axes[1].set(xlabel="training, FLOPs", ylabel="held-out denoising loss", yscale="log")
    axes[2].set(xlabel="noise level, as a part of the diffusion's time", ylabel=f"loss at the end, % from {first}")
    for axis in (axes[0].yaxis, axes[1].yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(4, 150 // max(map(len, labels))))  # of characters, about 150 fit beside each other
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _read(path: pathlib.Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _page_of_strips(strips: dict[str, pathlib.Path]) -> Image.Image:
    """The samples of each run below its name, enlarged to at least 768 pixels, in 128 colours."""
    pictures = {name: _read(path) for name, path in strips.items()}
    font, gap = ImageFont.load_default(size=16), 26
    scale = max(1, 768 // max(picture.width for picture in pictures.values()))
    pictures = {
        name: picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.BICUBIC)
        for name, picture in pictures.items()
    }
    width = max(picture.width for picture in pictures.values())
    page = Image.new("RGB", (width, sum(picture.height + gap for picture in pictures.values())), "white")
    draw, top = ImageDraw.Draw(page), 0
    for name, picture in pictures.items():
        draw.text((4, top + 4), name, fill="black", font=font)
        page.paste(picture, (0, top + gap))
        top += picture.height + gap
    return page.quantize(128)
