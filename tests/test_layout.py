"""Imports point one way, so that a part can be read without those that use it."""

import ast

import pytest

ORDER = [  # a module may import those above it
    {"cache", "disk", "distributed", "memory", "models.attention", "wavelet", "evaluation.metrics", "data.images"},
    {"models.layers"},
    {"masking", "diffusion", "models.backbone", "train_state", "sharding", "torch_file", "data.files", "data.prepared"},
    {"models.uvit", "models.wavelet_uvit", "samplers", "torch_checkpoint", "evaluation.inception", "data.databases"},
    {"config", "data.sources"},
    {"network", "representation", "checkpoint", "observe", "data.pipeline", "data.published"},
    {"generate", "data.prepare"},
    {"evaluation.features", "evaluation.denoising"},
    {"evaluation.evaluate", "evaluation.report"},
    {"train"},
    {"cost"},
    {"doctor", "study"},
    {"study_report"},
    {"convert"},
]


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_one_way(root):
    package = root / "maskdm_jax"
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if name.endswith("__init__"):
            continue
        assert name in level, f"{name} has no place in ORDER"
        ours = {i.removeprefix("maskdm_jax.") for i in imports(path) if i.startswith("maskdm_jax.")}
        wrong = {i for i in ours & level.keys() if level[i] >= level[name]}
        assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("folder", ["maskdm_jax", "launch", "benchmarks", "experiments"])
def test_nothing_imports_launch_configs_torch_or_tensorflow(root, folder):
    for path in (root / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        compared = {"torch"} if path.name == "speed.py" else set()  # measures PyTorch, where it is asked to
        assert not roots & {"launch", "configs", "torch", "tensorflow", "tests"} - compared, path


def test_there_is_no_drawer_for_odds_and_ends(root):
    assert not [p for p in (root / "maskdm_jax").rglob("*.py") if p.stem in ("utils", "helpers", "common", "misc")]
