"""Loss curves in bfloat16 and in float32, on your images.

    python benchmarks/precision.py --config=configs/celeba64_pretrain.py --config.data.path=DIR_OR_ZIP --out=precision

Trains the first stage for `--steps` steps, three times: in float32, in bfloat16 with the same seed, and in float32 with
another seed, as a measure of random variation. Writes the curves to OUT.png. Writes the losses, averaged over
`--window` steps, and the median and largest deviation of the last two runs from the first to OUT.json. The effect of
bfloat16 is within random variation if it is smaller than that of the other seed. The last line is JSON. Needs
matplotlib.
"""

import json
import pathlib
import statistics
import tempfile

import numpy as np
from absl import app, flags, logging

from maskdm_jax.parallel import runtime

CONFIG = runtime.config_flag("Config file; its first stage is trained.")
STEPS = flags.DEFINE_integer("steps", 500, "Steps of each run.", lower_bound=2)
WINDOW = flags.DEFINE_integer("window", 25, "Steps over which losses are averaged.", lower_bound=1)
OUT = flags.DEFINE_string("out", "precision", "Path of the files to write, without .png and .json.")
RUNS = {"float32": ("float32", 0), "bfloat16": ("bfloat16", 0), "float32, another seed": ("float32", 1)}


def main(argv):
    if len(argv) > 1 or CONFIG.value is None:
        raise app.UsageError("give --config=configs/NAME.py; its settings as --config.key=value")
    logging.set_verbosity(logging.ERROR)
    with runtime.program(distributed=False):
        losses = {name: run(CONFIG.value, *settings) for name, settings in RUNS.items()}
    smooth = {
        name: np.convolve(values, np.ones(WINDOW.value) / WINDOW.value, "valid") for name, values in losses.items()
    }
    first, *others = smooth
    result = dict(steps=STEPS.value, window=WINDOW.value)
    for name in others:
        deviation = np.abs(smooth[name] / smooth[first] - 1)
        result[name] = dict(median=statistics.median(deviation.tolist()), worst=float(deviation.max()))
    out = pathlib.Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    curves = {name: [round(float(value), 6) for value in values] for name, values in smooth.items()}
    out.with_name(out.name + ".json").write_text(json.dumps(result | dict(losses=curves)) + "\n")
    plot(smooth, out.with_name(out.name + ".png"))
    for name in others:
        print(f"{name:24} deviates {result[name]['median']:8.3%} from float32, {result[name]['worst']:.3%} at worst")
    print(json.dumps(result))


def run(settings, dtype: str, seed: int) -> list[float]:
    """The loss of every step."""
    import jax

    from maskdm_jax import config
    from maskdm_jax.run import open_training_data
    from maskdm_jax.training import logs, loop

    stage = settings.stages[0]
    with settings.unlocked():
        settings.stages, settings.seed, settings.model.dtype = (stage,), settings.seed + seed, dtype
        settings[stage].steps = settings.checkpoint.every = STEPS.value
        settings.log.every = 1
    with tempfile.TemporaryDirectory() as folder:
        parsed = config.parse(settings)
        loop.train(parsed, open_training_data(parsed), folder)  # without hooks for previews and evaluation
        lines = logs.read_metrics(pathlib.Path(folder) / "metrics.jsonl")
    settings.seed -= seed
    jax.clear_caches()
    return [line["loss"] for line in lines if "loss" in line]


def plot(curves: dict, path: pathlib.Path) -> None:
    """Plot all curves, and below them their deviation from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained")
    (_, first), *others = curves.items()
    step = np.arange(WINDOW.value, WINDOW.value + len(first))
    styles = [dict(color="black", lw=2.5, alpha=0.35), dict(color="tab:red", lw=1), dict(color="tab:blue", lw=1)]
    for (name, values), style in zip(curves.items(), styles, strict=True):
        above.plot(step, values, label=name, **style)
    for (_, values), style in zip(others, styles[1:], strict=True):
        below.plot(step, 100 * (values / first - 1), **style)
    above.set(yscale="log", ylabel=f"loss, mean of {WINDOW.value} steps")
    below.set(xlabel="step", ylabel="from float32, %")
    above.legend(frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    runtime.start(main)
