"""Train: python launch/train.py --config=configs/NAME.py [--workdir=DIR] [--config.key=value ...]

After a stop, the same command resumes the run. --dry_run checks everything that the run needs, without training.
--print_config prints every setting of the recipe with its meaning.
"""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from maskdm_jax.parallel import runtime

CONFIG = runtime.config_flag("Config file of the run.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything that the run needs, on every host, without training.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print every setting with its meaning, without training.")
PROFILE = flags.DEFINE_integer("profile", 0, "Number of steps to trace, shortly after the start.", 0)
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; default: runs/NAME, after the name of the config.")


def main(_):
    if CONFIG.value is None:
        raise app.UsageError("which run? give --config=configs/NAME.py, for example configs/demo.py")
    from maskdm_jax import config, run

    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    with runtime.program(distributed=not PRINT_CONFIG.value, catch_sigterm=True):
        settings, workdir = config.parse(CONFIG.value), WORKDIR.value or f"runs/{name}"
        if PRINT_CONFIG.value:
            print(config.describe(settings))
        elif DRY_RUN.value:
            check(settings, workdir)
        else:
            run.train(settings, workdir, profile=PROFILE.value)


def check(config, workdir):
    import jax

    from maskdm_jax import run
    from maskdm_jax.errors import ConfigError
    from maskdm_jax.parallel import processes
    from maskdm_jax.tools import preflight

    def say(name, good, text):
        where = f"process {jax.process_index()}, " if jax.process_count() > 1 and not good else ""
        print(f"{'ok  ' if good else 'FAIL'}  {where}{name}: {text}", flush=True)

    if not preflight.examine(config, workdir, say):
        processes.exit_all("preflight checks failed", ConfigError.status)
    if processes.is_first():
        for line in run.warnings_of(config):
            print(f"note  {line}")
        print("preflight checks passed", flush=True)


if __name__ == "__main__":
    runtime.start(main)
