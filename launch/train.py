"""Train: python launch/train.py --config=configs/NAME.py [--workdir=DIR] [--config.key=value ...]

Run it again with the same command to go on after a stop.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the run.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config when not given.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are given as --config.key=value")
    if CONFIG.value is None:
        raise app.UsageError("which run? give --config=configs/NAME.py, for example configs/demo.py")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    from maskdm_jax import cache, config, train
    from maskdm_jax.checkpoint import CheckpointError
    from maskdm_jax.data.sources import DataError
    from maskdm_jax.evaluation.features import EvaluationError
    from maskdm_jax.torch_file import TorchFileError

    cache.keep_compiled_programs()
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        train.train(config.parse(CONFIG.value), WORKDIR.value or pathlib.Path("runs") / name)
    except (config.ConfigError, DataError, CheckpointError, EvaluationError, TorchFileError, OSError) as error:
        sys.exit(f"error: {error}")
    except train.NonFiniteLoss as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on from the last checkpoint")


if __name__ == "__main__":
    app.run(main)
