"""Compare images: python launch/evaluate.py --reference=DIR --samples=DIR --inception_weights=FILE

Either side is a folder or .zip of images, an .npz (images, or statistics mu and sigma), or a run folder or checkpoint
(then --n images are made of it). The last line of the output is a JSON object. FILE is the file that pytorch-fid
distributes, pt_inception-2015-12-05-6726825d.pth.
"""

import json
import sys

from absl import app, flags, logging

METRICS = ("fid", "kid", "is", "pr")
REFERENCE = flags.DEFINE_string("reference", None, "Real images, or their statistics.", required=True)
SAMPLES = flags.DEFINE_string("samples", None, "Images to judge.", required=True)
WEIGHTS = flags.DEFINE_string("inception_weights", None, "Weights of FID's Inception network.", required=True)
CHOSEN = flags.DEFINE_list("metrics", ["fid"], f"Of {', '.join(METRICS)} (is: Inception Score; pr: precision, recall).")
N = flags.DEFINE_integer("n", None, "Samples to judge; all of a folder when not given.", lower_bound=2)
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of a checkpoint's samples; several give a mean and a range.")
BATCH = flags.DEFINE_integer("batch", 64, "Images per batch.", lower_bound=1)
METHOD = flags.DEFINE_enum("method", None, ["ddim", "ddpm", "dpm_solver"], "Sampler of a checkpoint, if not its own.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps of a checkpoint, if not its own.")
SAVE = flags.DEFINE_string("save_statistics", None, "Write the reference's mu and sigma to this .npz, to be reused.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    wrong = [name for name in CHOSEN.value if name not in METRICS]
    if wrong or not CHOSEN.value:
        raise app.UsageError(f"--metrics={','.join(CHOSEN.value)}: choose from {', '.join(METRICS)}")
    logging.set_verbosity(logging.WARNING)
    from maskdm_jax.checkpoint import CheckpointError
    from maskdm_jax.config import ConfigError
    from maskdm_jax.data.sources import DataError
    from maskdm_jax.evaluation import evaluate
    from maskdm_jax.evaluation.features import EvaluationError
    from maskdm_jax.generate import GenerateError
    from maskdm_jax.torch_file import TorchFileError

    sampling = {key: flag.value for key, flag in {"method": METHOD, "steps": STEPS}.items() if flag.value is not None}
    try:
        result = evaluate.evaluate(
            REFERENCE.value,
            SAMPLES.value,
            WEIGHTS.value,
            wanted=tuple(CHOSEN.value),
            n=N.value,
            seeds=[int(seed) for seed in SEEDS.value],
            batch_size=BATCH.value,
            sampling=sampling,
            save_statistics=SAVE.value,
        )
    except (CheckpointError, ConfigError, DataError, EvaluationError, GenerateError, TorchFileError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
