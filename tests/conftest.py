import gc
import os
import pathlib
import signal
from unittest import mock

import jax
import jaxlib
import pytest

import maskdm_jax
from maskdm_jax.config import steps_before
from maskdm_jax.parallel import sharding
from maskdm_jax.training import loop, step

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache" / "xla"

# Tests spend most of their time in compilers. LLVM's optimizations change rounding alone (see `optimized`). XLA's
# older code generator, which JAX 0.12 no longer has, takes half of the time of the newer one.
jax.config.update("jax_disable_most_optimizations", True)
if jaxlib.version.__version_info__ < (0, 12):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
BEFORE = dict(os.environ)  # as no test has changed it
gc.set_threshold(200_000, 20, 100)  # tracing makes many objects; by default, a fifth of the time goes to the collector
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background job; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=str(ROOT / "tests" / "golden"), help="folder of golden cases for test_golden.py"
    )


def pytest_generate_tests(metafunc):
    import golden

    for kind in golden.KINDS:
        if f"{kind}_case" in metafunc.fixturenames:
            paths = golden.cases(metafunc.config.getoption("--golden"), kind)
            metafunc.parametrize(f"{kind}_case", paths, ids=[path.stem for path in paths], scope="module")
    if "jit_file" in metafunc.fixturenames:
        paths = golden.jit_files(metafunc.config.getoption("--golden"))
        metafunc.parametrize("jit_file", paths, ids=[path.stem for path in paths], scope="module")


@pytest.fixture(scope="session")
def torch():
    """PyTorch; tests that compare with it are skipped where it is missing."""
    return pytest.importorskip("torch", reason="compares with PyTorch, which requirements-test.txt installs on 3.11")


@pytest.fixture(scope="session")
def root():
    assert pathlib.Path(maskdm_jax.__file__).parent.parent == ROOT
    return ROOT


@pytest.fixture(scope="session")
def official():
    """A small checkpoint that the official trainer wrote; `golden.TINY` are its settings."""
    return ROOT / "tests" / "golden" / "official_tiny.pt"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of the session's own."""
    os.environ["MASKDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def shared_steps():
    """Runs of equal settings share their jitted steps, so that each is traced and compiled once per worker."""
    honest, known = loop.compile_step, {}

    def compile_step(config, name, mesh, state):
        data = config.data.image_size, config.data.channels, config.data.flip, config.data.label_dropout
        key = (
            config.model,
            data,
            config.diffusion,
            config.stage[name],
            steps_before(config, name),
            mesh,
            sharding.MIN_SHARDED_SIZE,
            step.ema_step_size,
        )
        if key not in known:
            known[key] = honest(config, name, mesh, state)
        return known[key]

    with mock.patch.object(loop, "compile_step", compile_step):
        yield


@pytest.fixture
def optimized():
    """Programs compiled with LLVM's optimizations, for recorded runs that rounding could lead elsewhere."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def child_env(tmp_path_factory):
    """Environment of a program that a test starts: one CPU device, a warm compilation cache."""
    return BEFORE | {
        "MASKDM_CACHE": str(tmp_path_factory.mktemp("children")),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file like that of FID's Inception weights, with random numbers and a sixteenth of the channels."""
    import golden
    import numpy as np

    from maskdm_jax.interop import torch_file

    _, meta = golden.load(ROOT / "tests" / "golden" / "fid_inception.npz")
    state_dict = {}
    for name, shape in meta["state_dict"].items():
        channels = [size // 16 if size >= 16 else size for size in shape[:2]]
        state_dict[name] = np.asarray(golden.inception_weight(name, (*channels, *shape[2:])))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch_file.write(path, state_dict)
    return path
