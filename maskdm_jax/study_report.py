"""What a study found: curves of quality against compute, a table, samples side by side."""

import pathlib


def describe(runs) -> list[str]:
    """Lines of a plan."""
    lines = []
    for run in runs:
        lines.append(f"{run.name}, seed {run.seed}")
        for leg in run.legs:
            stage = leg.stage
            hidden = (
                f"{stage.mask.rate:.0%} hidden, {stage.mask.kind} {stage.mask.block}"
                if stage.mask.rate
                else "nothing hidden"
            )
            lines.append(
                f"  {stage.steps:7,} steps x {stage.batch_size} images, {leg.flops * stage.steps:.3g} FLOPs, {hidden}, "
                f"judged at {', '.join(map(str, leg.points)) or 'no point'} ({leg.key})"
            )
    return lines


def write(runs, rows, folder):
    """Draw."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    return ""
