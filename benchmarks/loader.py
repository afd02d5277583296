"""Throughput of the loader against bare decoding of the same bytes, and its memory over an epoch.

    python benchmarks/loader.py --data=data/mine256 --size=256

Both sides use the same threads and take turns, several rounds each; medians are compared. Bare decoding reads the
records and turns them into pixels, and does nothing else. The last line is JSON.
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
THREADS = flags.DEFINE_integer("threads", 4, "Of either side.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Of either side.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 4.0, "Length of a round.")


def main(_):
    from maskdm_jax.config import Data
    from maskdm_jax.data.images import Framing, decode
    from maskdm_jax.data.pipeline import Batches
    from maskdm_jax.data.sources import open_source

    settings = dict(path=DATA.value, split="", image_size=SIZE.value, channels=int(CHANNELS.value), classes=())
    settings |= dict(fraction=1.0, fraction_seed=0, labels=False, label_dropout=0.0, flip=0.0)
    data = Data(**settings, threads=THREADS.value, workers=0)
    source = open_source(DATA.value)
    order = np.random.RandomState(0).permutation(len(source))
    see = lambda i: decode(source.read(int(order[i % len(order)]))[0], Framing.of(data))

    def bare(seconds):
        """Images per second of threads that do nothing but read and decode."""

        def work(first):
            done, until = 0, time.perf_counter() + seconds
            while time.perf_counter() < until:
                see(first + done * THREADS.value)
                done += 1
            return done

        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(THREADS.value) as pool:
            total = sum(pool.map(work, range(THREADS.value)))
        return total / (time.perf_counter() - start)

    def loader(seconds):
        """Images per second of the loader, once it runs."""
        batches = Batches(data, batch_size=BATCH.value, seed=0, source=source)
        for _ in range(3 * THREADS.value):  # what it had read ahead before the clock started does not count
            next(batches)
        done, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            next(batches)
            done += BATCH.value
        rate = done / (time.perf_counter() - start)
        batches.close()
        return rate

    bare(1.0), loader(1.0)  # the disk's cache, and imports
    rates = {"bare": [], "loader": []}
    for _ in range(ROUNDS.value):
        rates["bare"].append(bare(SECONDS.value))
        rates["loader"].append(loader(SECONDS.value))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["loader"], rates["bare"], strict=True))
    print(f"{'':8} images/s, {THREADS.value} threads, {len(source)} images of {SIZE.value} px")
    for name, values in rates.items():
        print(f"{name:8} {medians[name]:10,.0f}   ({min(values):,.0f} to {max(values):,.0f})")
    print(f"loader / bare decoding: {ratio:.2f}")

    batches = Batches(data, batch_size=BATCH.value, seed=0, source=source)
    epoch, memory = max(4, len(source) // BATCH.value), []
    for _ in range(2 * epoch):
        next(batches)
        memory.append(resident())
    batches.close()
    quarter = len(memory) // 8  # of an epoch: caches are full
    growth = (statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])) / 2**20
    print(f"memory over two epochs: {memory[-1] / 2**20:,.0f} MiB, {growth:+.1f} MiB from the first quarter epoch on")
    print(json.dumps(dict(ratio=ratio, **medians, memory_growth_mib=growth)))


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    app.run(main)
