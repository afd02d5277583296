"""Compare images: python launch/evaluate.py --reference=DIR --samples=DIR [--report=report.html]

Both can be images of any kind that training reads, an .npz (images, or statistics mu and sigma), or a run folder or
checkpoint, from which --n images are generated. The last line of the output is a JSON object. The Inception weights
are those of pytorch-fid, pt_inception-2015-12-05-6726825d.pth, downloaded once unless --inception_weights is given.
"""

import json
import shlex
import sys

from absl import app, flags

from maskdm_jax.parallel import runtime

REFERENCE = flags.DEFINE_string("reference", None, "Real images, or their statistics.")
SAMPLES = flags.DEFINE_string("samples", None, "Images to evaluate.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "Of a checkpoint: ema, ema2, ... or params (the raw ones).")
INCEPTION = flags.DEFINE_string("inception_weights", "", "Weights of FID's Inception network; downloaded by default.")
CHOSEN = flags.DEFINE_list(
    "metrics",
    ["fid"],
    "Metrics, such as fid,kid,is,pr (precision and recall); those that end in _lite0 need no download.",
)
N = flags.DEFINE_integer("n", None, "Number of samples; default: all of a folder.", lower_bound=2)
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of a checkpoint's samples; several give a mean and a range.")
BATCH = flags.DEFINE_integer("batch", 64, "Images per device and call.", lower_bound=1)
METHOD = flags.DEFINE_string("method", None, "Sampler, in place of the checkpoint's own.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps, in place of the checkpoint's own.")
SAVE = flags.DEFINE_string("save_statistics", None, "Write mu and sigma of the reference to this .npz.")
ALLOW_MISMATCH = flags.DEFINE_bool(
    "allow_mismatch", False, "Compare images even if their sizes, crops, filters or colours differ."
)
REPORT = flags.DEFINE_string("report", None, "Write an HTML page with metrics, samples, nearest images and curves.")


def main(_):
    if not REFERENCE.value or not SAMPLES.value:
        raise app.UsageError("give --reference and --samples")
    if not SEEDS.value or not all(seed.isdecimal() and int(seed) < 2**32 for seed in SEEDS.value):
        raise app.UsageError(f"--seeds={','.join(SEEDS.value)}: give numbers, such as 0,1,2")
    from maskdm_jax.evaluation import evaluate
    from maskdm_jax.parallel import processes
    from maskdm_jax.storage import is_remote, location

    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    sampling = {key: flag.value for key, flag in {"method": METHOD, "steps": STEPS}.items() if flag.value is not None}
    with runtime.program():
        for path in filter(None, (REPORT.value, SAVE.value)):  # fail now, not after hours of work
            if not is_remote(path):
                location(path).parent.mkdir(parents=True, exist_ok=True)
        result, reference, samples = evaluate.evaluate(
            REFERENCE.value,
            SAMPLES.value,
            INCEPTION.value,
            wanted=tuple(CHOSEN.value),
            n=N.value,
            seeds=[int(seed) for seed in SEEDS.value],
            batch_size=BATCH.value,
            weights=WEIGHTS.value,
            sampling=sampling,
            statistics=location(SAVE.value) if SAVE.value else None,
            allow_mismatch=ALLOW_MISMATCH.value,
            keep=bool(REPORT.value),
        )
    if not processes.is_first():
        return
    failed = None
    if REPORT.value:
        from maskdm_jax.evaluation.report import write_report

        made_by = result["made_by"].get("checkpoint")
        command = shlex.join(["python", *sys.argv])
        try:
            run = location(made_by).parent.parent if made_by else None
            write_report(location(REPORT.value), result, reference, samples, run=run, command=command)
            print(f"report: {REPORT.value}")
        except Exception as error:  # the numbers must not be lost, for instance by a damaged metrics.jsonl
            failed = f"error: the report was not written: {error}"
    print(json.dumps(result))
    sys.exit(failed)


if __name__ == "__main__":
    runtime.start(main)
