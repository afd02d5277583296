"""Train: python launch/train.py --config=configs/NAME.py [--workdir=DIR] [--config.key=value ...]

Run it again with the same command to go on after a stop. With --dry_run it only checks what it needs.
"""

import pathlib
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the run.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check what the run needs, on every host, and say whether it would work.")
PROFILE = flags.DEFINE_integer("profile", 0, "Trace so many steps, soon after the start, into the run folder.", 0)
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config when not given.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are given as --config.key=value")
    if CONFIG.value is None:
        raise app.UsageError("which run? give --config=configs/NAME.py, for example configs/demo.py")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    import jax

    from maskdm_jax import cache, config, distributed, memory, train
    from maskdm_jax.checkpoint import CheckpointError
    from maskdm_jax.data.sources import DataError
    from maskdm_jax.evaluation.features import EvaluationError
    from maskdm_jax.torch_file import TorchFileError

    memory.keep_freed()
    cache.keep_compiled_programs()
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        distributed.initialize(catch_sigterm=True)
        settings, workdir = config.parse(CONFIG.value), WORKDIR.value or f"runs/{name}"
        if DRY_RUN.value:
            check(settings, workdir)
        else:
            train.train(settings, workdir, profile=PROFILE.value)
    except train.Preempted as stop:
        distributed.leave(str(stop), distributed.PREEMPTED)
    except (config.ConfigError, DataError, CheckpointError, EvaluationError, TorchFileError, OSError) as error:
        distributed.leave(f"error: {error}")
    except (train.NonFiniteLoss, distributed.DistributedError) as error:
        distributed.leave(f"error: {error}")
    except KeyboardInterrupt:
        distributed.leave("interrupted; run the same command again to go on from the last checkpoint")
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            distributed.leave(
                f"error: not enough memory; raise the stage's micro_batches, or set its remat=True ({reason})"
            )
        if jax.process_count() == 1:
            raise
        distributed.leave(f"error: another process of this run must have ended: {reason}")
    except Exception:
        distributed.leave(traceback.format_exc())


def check(config, workdir):
    import jax

    from maskdm_jax import distributed, doctor

    def say(name, good, text):
        where = f"process {jax.process_index()}, " if jax.process_count() > 1 and not good else ""
        print(f"{'ok  ' if good else 'FAIL'}  {where}{name}: {text}", flush=True)

    if not doctor.examine(config, workdir, say):
        distributed.leave("this run would not work")
    if distributed.is_first():
        print("this run would work", flush=True)


if __name__ == "__main__":
    app.run(main)
