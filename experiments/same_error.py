"""The compute with which dense training reaches the denoising error of other runs, divided by theirs:

    python experiments/same_error.py --dense="U-ViT, dense|U-ViT, flow, x0" --runs="U-ViT, SPRINT*" \\
        docs/studies/sparse64.jsonl docs/studies/processes.jsonl

Prints the median and the range over the noise levels. The errors of dense runs with equal FLOPs, to two digits, are
averaged (geometric mean); with several --dense, such as one for each learning rate, the lowest average at each noise
level counts. Between the FLOPs of dense runs, the error is interpolated as a power of the FLOPs. An error below that
of all of them gives infinity, above that of all of them 0.
"""

import collections
import fnmatch
import itertools
import statistics

import numpy as np
from absl import app, flags

from maskdm_jax.training.logs import read_metrics

DENSE = flags.DEFINE_multi_string(
    "dense", None, "Names of dense runs to average, separated by |; repeated: the lowest error counts.", required=True
)
RUNS = flags.DEFINE_string("runs", "*", "Pattern of the names of the others.")


def main(argv):
    rows = [row for path in argv[1:] for row in read_metrics(path)]
    names = [name for value in DENSE.value for name in value.split("|")]
    dense = lowest([averaged(row for row in rows if row["run"] in value.split("|")) for value in DENSE.value])
    print("| run | seed | Fréchet distance | compute gain | range |\n|---|--:|--:|--:|--:|")
    for row in rows:
        if fnmatch.fnmatchcase(row["run"], RUNS.value) and row["run"] not in names:
            gains = ratios(row, dense)
            middle, low, high = (f(gains) for f in (statistics.median, min, max))
            print(f"| {row['run']} | {row['seed']} | {row['fd']:.1f} | {middle:.2f} | {low:.2f}-{high:.2f} |")


def averaged(rows) -> list[dict]:
    """Points with the average error of the rows with equal FLOPs, to two digits, by FLOPs."""
    groups = [{(row["run"], row["seed"]): row for row in group} for group in by_flops(rows)]  # each seed counts once
    average = lambda group: np.exp(np.mean([np.log(row["denoising"]) for row in group], 0))
    return [point(group.values(), average) for group in groups]


def lowest(curves: list[list[dict]]) -> list[dict]:
    """The lowest error at each noise level, by FLOPs, of curves from `averaged`."""
    least = lambda group: np.min([row["denoising"] for row in group], 0)
    return [point(group, least) for group in by_flops(itertools.chain(*curves))]


def by_flops(rows) -> list[list[dict]]:
    """Groups of rows with equal FLOPs, to two digits, in the order of the FLOPs."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[float(f"{row['flops']:.1e}")].append(row)
    return [groups[flops] for flops in sorted(groups)]


def point(group, error) -> dict:
    """One point for a group of rows: their mean FLOPs, and their `error`, a function of the group."""
    return dict(flops=statistics.mean(row["flops"] for row in group), denoising=error(group))


def ratios(row: dict, dense: list[dict]) -> list[float]:
    """FLOPs of dense training with the error of a row, divided by its own, for each noise level."""
    flops = np.log([point["flops"] for point in dense])
    errors = np.log([point["denoising"] for point in dense]).T  # [level, point]
    if (np.diff(errors) >= 0).any():
        raise app.UsageError("the error of dense training must fall with its FLOPs at every noise level")
    ends = dict(left=-np.inf, right=np.inf)
    at = [np.interp(-np.log(e), -of, flops, **ends) for e, of in zip(row["denoising"], errors, strict=True)]
    return list(np.exp(at) / row["flops"])


if __name__ == "__main__":
    app.run(main)
