"""Compare trainings at equal compute: python experiments/run_study.py --config=experiments/emoji32.py:convergence

Runs the study in the config file, or the rest of it, and appends every evaluated point to --results. Several of these
commands can work on one study, with different --only or --seeds. --dry_run prints the plan. --report=DIR writes a
report of the results so far: curves.png, samples.png, and table.md with the command.
"""

import functools
import pathlib
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

from maskdm_jax.parallel import runtime

CONFIG = config_flags.DEFINE_config_file("config", None, "Study file, such as experiments/emoji32.py:convergence.")
BUDGET = flags.DEFINE_enum("budget", "flops", ["flops", "seconds"], "Unit of the budget: FLOPs or device time.")
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/study", "Folder for runs; studies of the same images may share it, and no others."
)
RESULTS = flags.DEFINE_string(
    "results", None, "File of results, for one set of images; default: WORKDIR/NAME.jsonl, after the study."
)
EVALUATOR = flags.DEFINE_string("evaluator", "", "Python file that compares images; default: EfficientNet-Lite0.")
ONLY = flags.DEFINE_string("only", "*", "Pattern of run names, with * and ? as wildcards.")
SEEDS = flags.DEFINE_list("seeds", [], "Seeds to run; default: all.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan, without training.")
REPORT = flags.DEFINE_string("report", None, "Write a report to this folder, without training.")


def main(_):
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise app.UsageError(f"--seeds={','.join(SEEDS.value)}: give numbers, such as 0,1,2")
    if CONFIG.value is None:
        raise app.UsageError("which study? give --config=experiments/emoji32.py:convergence")
    import study
    import study_report

    stem, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    workdir = pathlib.Path(WORKDIR.value).expanduser()
    results = study.Results(RESULTS.value or workdir / f"{variant or pathlib.Path(stem).stem}.jsonl")
    with runtime.program(distributed=False):
        seconds_of = study.StepSeconds(workdir / "step_seconds.json") if BUDGET.value == "seconds" else None
        seeds = {int(seed) for seed in SEEDS.value}
        runs = study.plan(CONFIG.value, unit=BUDGET.value, seconds_of=seconds_of, only=ONLY.value, seeds=seeds)
        if REPORT.value:
            given = [arg for arg in sys.argv if arg not in (f"--report={REPORT.value}", "--report", REPORT.value)]
            command = shlex.join(["python", *given])
            print(study_report.write(runs, results.rows(), REPORT.value, results.pictures, command))
        elif DRY_RUN.value:
            print("\n".join(study_report.describe(runs)))
        else:
            say = functools.partial(print, flush=True)
            study.run_study(runs, CONFIG.value, workdir, results, EVALUATOR.value, say=say)


if __name__ == "__main__":
    runtime.start(main)
