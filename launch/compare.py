"""Compare runs: python launch/compare.py RUN RUN ... [--out=compare.html]

One HTML page: curves by step, images and FLOPs, metrics, settings that differ, samples from the same noise.
"""

import shlex
import sys

from absl import app, flags

from maskdm_jax.parallel import runtime

OUT = flags.DEFINE_string("out", "compare.html", "File for the page.")


def main(argv):
    if len(argv) < 2:
        raise app.UsageError("which runs? give run folders, such as runs/a runs/b")
    import jax

    jax.config.update("jax_platforms", "cpu")
    from maskdm_jax.storage import location
    from maskdm_jax.tools.compare import compare

    with runtime.program(distributed=False):
        compare(argv[1:], location(OUT.value), f"python {shlex.join(sys.argv)}")
    print(f"done: {OUT.value}")


if __name__ == "__main__":
    runtime.start(main, positional=True)
