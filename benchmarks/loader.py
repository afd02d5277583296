"""Throughput of the loader compared with decoding alone, and its memory over two epochs.

    python benchmarks/loader.py --data=data/mine256 --size=256

Both use the same number of threads and alternate for several rounds; the medians are compared. Decoding alone reads
the same records and decodes them to pixels. The last line is JSON.
"""

import concurrent.futures
import json
import statistics
import time

import numpy as np
from absl import app, flags

DATA = flags.DEFINE_string("data", None, "Prepared set, folder or archive.", required=True)
SIZE = flags.DEFINE_integer("size", None, "Side of the images in pixels.", required=True)
CHANNELS = flags.DEFINE_enum("channels", "3", ["1", "3"], "3 colour, 1 grey.")
BATCH = flags.DEFINE_integer("batch", 64, "Images per batch.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 4, "Threads of each of the two.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 4.0, "Seconds per round for each of the two.")


def main(_):
    from maskdm_jax.config import Data
    from maskdm_jax.data.pipeline import TrainingData

    data = TrainingData(
        Data(path=DATA.value, image_size=SIZE.value, channels=int(CHANNELS.value), threads=THREADS.value)
    )
    data.kept = None  # decode every image again, like a set that does not fit into memory
    subjects = {"bare": bare, "loader": loader}
    for measure in subjects.values():  # fill the disk cache and finish imports
        measure(data, 1.0)
    rates = {name: [] for name in subjects}
    for _ in range(ROUNDS.value):
        for name, measure in subjects.items():
            rates[name].append(measure(data, SECONDS.value))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["loader"], rates["bare"], strict=True))
    print(f"{'':8} images/s, {THREADS.value} threads, {len(data)} images of {SIZE.value} px")
    for name, values in rates.items():
        print(f"{name:8} {medians[name]:10,.0f}   ({min(values):,.0f} to {max(values):,.0f})")
    print(f"loader / bare decoding: {ratio:.2f}")
    print(json.dumps(dict(ratio=ratio, **medians, memory_growth_mib=memory_growth(data))))


def bare(data, seconds: float) -> float:
    """Images per second of threads that only read and decode."""
    from maskdm_jax.data.images import Framing, decode

    order, framing = np.random.RandomState(0).permutation(len(data)), Framing.of(data.settings)

    def work(first):
        done, until = 0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            number = order[(first + done * THREADS.value) % len(order)]
            decode(data.source.read(int(number))[0], framing)
            done += 1
        return done

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS.value) as pool:
        total = sum(pool.map(work, range(THREADS.value)))
    return total / (time.perf_counter() - start)


def loader(data, seconds: float) -> float:
    """Images per second of the loader in its steady state."""
    batches = data.batches(batch_size=BATCH.value, seed=0)
    for _ in range(3 * THREADS.value):  # exclude batches that were read ahead
        next(batches)
    done, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        next(batches)
        done += BATCH.value
    rate = done / (time.perf_counter() - start)
    batches.close()
    return rate


def memory_growth(data) -> float:
    """MiB by which the loader's memory grows over two epochs, after the first quarter of one."""
    batches = data.batches(batch_size=BATCH.value, seed=0)
    epoch, memory = max(4, len(data) // BATCH.value), []
    for _ in range(2 * epoch):
        next(batches)
        memory.append(resident())
    batches.close()
    quarter = len(memory) // 8  # of an epoch; then caches are full
    growth = (statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])) / 2**20
    print(f"memory over two epochs: {memory[-1] / 2**20:,.0f} MiB, {growth:+.1f} MiB from the first quarter epoch on")
    return growth


def resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    app.run(main)
