"""Logs of a run: console, progress bar, metrics.jsonl, TensorBoard, W&B, profile."""

import contextlib
import json
import logging
import sys
import time
import uuid

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from maskdm_jax import config as config_lib
from maskdm_jax.config import Config
from maskdm_jax.errors import MaskDMError
from maskdm_jax.parallel import processes
from maskdm_jax.storage import location, read, write_atomically

log = logging.getLogger("maskdm_jax")

CONTINUED = ("config.json", "metrics.jsonl", "log.txt", "wandb_id.txt")  # files of a run folder that a restart reads


class _Console(logging.Handler):
    """Write log lines above the progress bar."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def logging_to(workdir):
    """Log to stderr and WORKDIR/log.txt. Processes other than the first log only warnings, to stderr."""
    workdir = location(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    console = _Console()
    handlers = [console]
    where = "" if processes.is_first() else f"process {jax.process_index()}: "
    console.setFormatter(logging.Formatter(f"%(asctime)s {where}%(message)s", "%H:%M:%S"))
    console.setLevel(logging.INFO if processes.is_first() else logging.WARNING)
    if processes.is_first():
        file = logging.FileHandler(workdir / "log.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    log.setLevel(logging.DEBUG)
    log.propagate = False  # absl's root handler would print every line again
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:  # into log.txt alone: the program prints it, but perhaps nobody reads that
        expected = isinstance(error, (MaskDMError, OSError))
        log.debug("ended by %s: %s", type(error).__name__, error, exc_info=not expected)
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class Metrics:
    """Metrics by step, written to WORKDIR/metrics.jsonl and, as configured, TensorBoard and W&B.

    Opening it at `step` drops later lines, which a killed process wrote, so that the history of a resumed run equals
    that of an uninterrupted one. Of several processes, only the first writes.
    """

    def __init__(self, workdir, config: Config, *, step: int, name: str = ""):
        self._file = self._board = self._wandb = None
        if not processes.is_first():
            return
        workdir, settings = location(workdir), config.log
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        if settings.tensorboard:
            import tensorboardX  # imported here: takes a second if PyTorch is installed

            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if settings.wandb:
            import wandb

            known = workdir / "wandb_id.txt"  # a name can belong to several runs, and have characters that an id cannot
            if not known.exists():
                write_atomically(known, uuid.uuid4().hex.encode())
            about = dict(
                project="maskdm-jax", name=name or workdir.name, dir=str(workdir), config=config_lib.to_dict(config)
            )
            self._wandb = wandb.init(**about, id=known.read_text().strip(), resume="allow")

    def write(self, step: int, values: dict) -> None:
        """Record numbers and strings of a step; strings go to metrics.jsonl only."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def image(self, step: int, name: str, path) -> None:
        """Show a PNG file in TensorBoard and W&B."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl. Damaged lines, such as one truncated by a kill, are skipped."""
    lines = []
    for text in read(path).decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


_BAR = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}"


class Progress(tqdm):
    """Progress bar of a stage; without a terminal, a log line for each call of `numbers`."""

    def __init__(self, name: str, *, step: int, steps: int):
        hidden = not (sys.stderr.isatty() and processes.is_first())
        options = dict(file=sys.stderr, disable=hidden, bar_format=_BAR, mininterval=0.2)
        super().__init__(total=steps, initial=step, desc=name, **options)
        self._name = name

    def numbers(self, step: int, text: str) -> None:
        """Show the metrics of step `step` of the stage."""
        self.bar_format = f"{_BAR} {text}"
        # With a bar on the terminal, the line goes to the file only.
        level = logging.INFO if self.disable else logging.DEBUG
        log.log(level, "%s %d/%d %s", self._name, step, self.total, text)


class Rate:
    """Steps per second since the last reading, without pauses, and the share of time spent waiting for data."""

    def __init__(self):
        self._since, self._waited = time.perf_counter(), 0.0

    def read(self, steps: int) -> tuple[float, float]:
        """Steps per second, for `steps` since the last call, and the share of that time spent in `waiting`."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate, waited = steps / seconds, min(self._waited / seconds, 1.0)
        self._since, self._waited = now, 0.0
        return rate, waited

    @contextlib.contextmanager
    def waiting(self, idle):
        """Context whose time counts as waiting if `idle()`, called at its end, says that the device is idle."""
        start = time.perf_counter()
        yield
        if idle():
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Context whose time does not count, such as that of a preview."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class Profile:
    """A trace of some steps by JAX's profiler.

    Args:
      folder: receives the trace.
      first: first step to trace.
      steps: number of steps; 0 for no trace.
    """

    def __init__(self, folder, first: int, steps: int):
        self._folder, self._first, self._last, self._on = folder, first, first + steps - 1, False

    def step(self, number: int):
        """Context that marks step `number` in the trace."""
        if self._first == number <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, values) -> None:
        """Write the trace once the last traced step has computed its `values`."""
        if self._on and number >= self._last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Stop a running trace and write it."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info(
                "profile from step %d on: %s (xprof --logdir=%s, or open its trace.json.gz at ui.perfetto.dev)",
                *(self._first, self._folder, self._folder),
            )


def duration(seconds: float) -> str:
    """90 -> '1m30s'."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"
