"""The start and end of a command-line program: flags, compilation cache, host memory, processes, errors."""

import contextlib
import ctypes
import faulthandler
import glob
import os
import re
import signal
import sys
import threading
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from maskdm_jax.errors import ConfigError, Interrupted, MaskDMError, Preempted, first_line
from maskdm_jax.main import recipe_path, recipes
from maskdm_jax.parallel import processes
from maskdm_jax.storage import cache_dir

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def start(main, *, positional: bool = False) -> None:
    """Run `main(argv)` with the flags of the command line; wrong flags and config files end it in one line.

    positional: whether it takes arguments besides flags.
    """

    def run(argv):
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
        try:
            if len(argv) > 1 and not positional:
                raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are given as --config.key=value")
            return main(argv)
        except app.UsageError as error:
            error.exitcode = ConfigError.status
            raise

    app.run(run, flags_parser=_parse_flags)


def config_flag(text: str):
    """Define --config=FILE, and --config.key=value for keys that the file's config need not have.

    `config.parse` then refuses unknown keys with the closest known one.
    """
    return config_flags.DEFINE_config_file("config", None, text, lock_config=False, accept_new_attributes=True)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line, and load the config file that it names; what remains are the arguments."""
    argv = re.sub(r"\0--?config\0", "\0--config=", "\0".join(argv)).split("\0")  # --config FILE is --config=FILE
    flag = re.compile(r"\A(--?config=)(.*)", re.DOTALL)
    argv = [flag.sub(lambda found: found[1] + recipe_path(found[2]), arg) for arg in argv]
    named = [arg.partition("=")[2].split(":")[0] for arg in argv if arg.startswith(("--config=", "-config="))]
    try:
        for file in named:
            if not os.path.exists(file):
                raise ConfigError(
                    f"--config={file} does not exist; give a FILE.py, or the name of a recipe: {recipes()}"
                )
            open(file).close()  # ml_collections would say so in four lines
        arguments = flags.FLAGS(argv)
        if named and flags.FLAGS["config"].value is None:
            raise TypeError(f"get_config of {named[-1]} returns nothing")
        return arguments
    except Exception as error:  # of absl's parsers, of ml_collections, or of the user's config file
        print(f"error: {_reason(error, named)}", file=sys.stderr)
        sys.exit(ConfigError.status)


def _reason(error: Exception, named: list[str]) -> str:
    """One line about why the flags cannot be parsed; it says where in the config files `named` an error is."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for cause in causes:
        frames = [
            f
            for f in traceback.extract_tb(cause.__traceback__)
            if any(name and f.filename.endswith(name) for name in named)
        ]
        if frames:
            return f"{frames[-1].filename}, line {frames[-1].lineno}: {type(cause).__name__}: {_message(cause)}"
    if "Error whilst parsing config file" in str(error):
        return f"{named[-1]}: {_message(causes[-1])}"
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return f"{named[-1]} has no function get_config"
    if isinstance(error, (KeyError, AttributeError)):
        return f"the config has no {_message(error)}"
    return re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not an integer", _message(error))


def _message(error) -> str:
    """The text of an error, on one line."""
    while isinstance(error, (KeyError, AttributeError)) and error.args:  # each quotes the text of the other
        error = error.args[0]
    return " ".join(str(error).split())


class _Stderr:
    """A stream that drops what cannot be written: a run outlives its terminal, or the program it is piped into."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if anybody still reads."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody still reads."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def _repeat_ctrl_c(unraisable) -> None:
    """Press Ctrl-C again if it came where Python ignores exceptions, for instance in a callback of garbage collection.

    A thread does it, since this function is called where they are still ignored.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def program(*, distributed: bool = True, catch_sigterm: bool = False):
    """Run the body of a launcher: set up JAX, join the other processes, exit with one line on an expected error.

    Args:
      distributed: join the other processes of this run; see `processes.initialize`.
      catch_sigterm: see `processes.initialize`.
    """
    keep_freed_memory()
    keep_compiled_programs()
    sys.stderr, sys.unraisablehook = _Stderr(sys.stderr), _repeat_ctrl_c
    try:
        if distributed:
            processes.initialize(catch_sigterm=catch_sigterm)
            if jax.process_count() > 1 and not os.environ.get("PYTHONFAULTHANDLER"):
                faulthandler.disable()  # stack dumps of the others would hide the message of one that fails
        yield
    except (Preempted, Interrupted) as stop:
        processes.exit_all(str(stop), stop.status)
    except MaskDMError as error:
        processes.exit_all(f"error: {error}", error.status)
    except OSError as error:
        refused = isinstance(error, PermissionError) or "Forbidden" in str(error)  # as gcsfs says it
        processes.exit_all(f"error: {error}", ConfigError.status if refused else 1)
    except MemoryError as error:
        processes.exit_all(f"error: not enough host memory ({first_line(error)})")
    except KeyboardInterrupt:
        processes.exit_all("interrupted", Interrupted.status)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            processes.exit_all(
                "error: not enough memory; in training raise the stage's micro_batches or set its remat=True, "
                f"elsewhere lower --batch ({reason})"
            )
        if jax.process_count() == 1:
            raise
        processes.exit_all(f"error: another process of this run must have ended: {reason}")
    except Exception as error:
        if "Unable to initialize backend" in str(error):  # without one, processes cannot be counted
            print(f"error: {first_line(error)}", file=sys.stderr)
            sys.exit(ConfigError.status)
        if jax.process_count() == 1:
            raise
        processes.exit_all(traceback.format_exc())


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, in the cache folder unless $JAX_COMPILATION_CACHE_DIR is set."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with contextlib.suppress(OSError):  # the cache is optional: run without it if there is no place for it
            folder = cache_dir("xla")
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_freed_memory() -> bool:
    """Keep freed pages so that the next CPU step reuses them. Call this before anything uses a device.

    XLA:CPU allocates the buffers of a program with malloc at every execution. Mapping and clearing new pages for
    hundreds of MiB takes a seventh of a training step. With one heap that is never trimmed, an execution reuses the
    pages of the previous one; the process keeps its largest size.

    Returns:
      True if malloc was configured; False on machines with accelerators, with a C library other than glibc, or if
      environment variables (MALLOC_ARENA_MAX, GLIBC_TUNABLES, ...) already configure malloc.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    configured |= "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    elsewhere = jax.config.jax_platforms != "cpu" and any(map(glob.glob, _DEVICE_FILES))
    if configured or elsewhere:
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # One arena: the heaps of other arenas are too small for large buffers.
    return all(mallopt(*option) for option in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
