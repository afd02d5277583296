"""Imports point one way, so that a part can be read without those that use it."""

import ast

import pytest

ORDER = [  # a module may import, at its top, its own package and those above it
    {"errors"},
    {"storage", "config", "main", "interop.pickles"},
    {"diffusion", "parallel"},
    {"models", "data"},
    {"build", "interop.torch_file", "interop.names"},
    {"training"},
    {"interop.uvit_file", "interop.jit_file"},
    {"interop.official"},
    {"interop.torch_folder"},
    {"sampling", "interop.convert"},
    {"evaluation"},
    {"run"},
    {"tools", "api"},
]


def imports(path):
    """Modules and names that a file imports at its top."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def part(name):
    """The entry of ORDER that a module of the package belongs to, and its row; None for packages themselves."""
    for row, names in enumerate(ORDER):
        for entry in names:
            if name == entry or name.startswith(f"{entry}."):
                return entry, row
    return None


def modules(root):
    package = root / "maskdm_jax"
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(package).with_suffix("").parts), path


def test_one_module_knows_how_run_folders_are_stored(root):
    """The others use `storage`, whose paths can also be addresses in an object store."""
    changes = {f"os.{name}" for name in ("replace", "rename", "remove", "unlink", "makedirs", "listdir", "scandir")}
    local = changes | {"pathlib.Path", "shutil.rmtree", "shutil.move", "shutil.copy", "glob.glob", "open"}
    exceptions = {
        ("run", "pathlib.Path"),
        ("evaluation.efficientnet", "pathlib.Path"),
        ("evaluation.inception", "open"),
    }
    for name, path in modules(root):
        if name.split(".")[0] in ("training", "sampling", "run", "evaluation", "tools") or name == "interop.convert":
            calls = {
                ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            }
            assert {(name, call) for call in calls & local} <= exceptions


def test_imports_point_one_way(root):
    for name, path in modules(root):
        assert part(name), f"{name} has no place in ORDER"
        entry, row = part(name)
        ours = {
            imported.removeprefix("maskdm_jax.") for imported in imports(path) if imported.startswith("maskdm_jax.")
        }
        found = {found for found in map(part, ours) if found}
        wrong = {other for other, other_row in found if other != entry and other_row >= row}
        assert not wrong, f"{name} imports {wrong}"


def test_training_can_be_read_alone(root):
    """Nothing that training imports at its top is of data, sampling, evaluation or other people's files."""
    paths = dict(modules(root))
    seen, queue = set(), [name for name in paths if name.startswith("training.")]
    while queue:
        name = queue.pop()
        if name in paths and name not in seen:
            seen.add(name)
            queue += [imported.removeprefix("maskdm_jax.") for imported in imports(paths[name])]
    assert {part(name)[0] for name in seen} == {
        "errors", "storage", "config", "diffusion", "parallel", "models", "build", "training"
    }  # fmt: skip


def test_the_method_knows_no_config_and_no_network(root):
    for name, path in modules(root):
        if name.startswith("diffusion."):
            ours = {imported for imported in imports(path) if imported.startswith("maskdm_jax")}
            assert all(imported.startswith("maskdm_jax.diffusion") for imported in ours), name


@pytest.mark.parametrize("folder", ["maskdm_jax", "launch", "benchmarks", "experiments"])
def test_nothing_imports_launch_configs_torch_or_tensorflow(root, folder):
    for path in (root / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        # Measured beside ours, where it is installed; and what is copied for users of PyTorch.
        compared = {"torch"} if folder == "benchmarks" or path.parent.name == "torch_folder" else set()
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"launch", "configs", "torch", "tensorflow", "tests"} - compared, path


def test_no_function_is_longer_than_a_screen(root):
    for folder in ("maskdm_jax", "launch", "configs", "experiments", "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    lines = node.end_lineno - node.lineno + 1
                    assert lines <= 60, f"{path}: {node.name} has {lines} lines"


def test_there_is_no_drawer_for_odds_and_ends(root):
    assert not [p for p in (root / "maskdm_jax").rglob("*.py") if p.stem in ("utils", "helpers", "common", "misc")]
