"""Where things are kept between runs: copies of remote sets, statistics, Inception weights, compiled programs."""

import os
import pathlib

import jax


def folder(kind: str) -> pathlib.Path:
    """$MASKDM_CACHE, or maskdm_jax in $XDG_CACHE_HOME or ~/.cache; in it, the folder of that kind."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maskdm_jax"
    return pathlib.Path(os.environ.get("MASKDM_CACHE") or default).expanduser().absolute() / kind


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles, unless $JAX_COMPILATION_CACHE_DIR says where: a restart should not pay twice."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder("xla")))
