"""The GPU benchmark, rehearsed on the CPU."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import accelerator
import jax
import jax.numpy as jnp
import pytest

from maskdm_jax.build import make_network

# What the package needs elsewhere, and a GPU machine may lack.
ABSENT = ("PIL", "array_record", "clu", "fsspec", "grain", "lmdb", "matplotlib", "orbax", "safetensors", "scipy")
ABSENT += ("tensorboardX", "tensorflow_datasets", "tensorstore", "tqdm")
WITHOUT = f"""
import importlib.machinery, pathlib, runpy, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))  # as Python does for a script
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def rehearsed(root, child_env, tmp_path_factory):
    """The folder and the output of a whole call, on a machine that has only what is needed."""
    out = tmp_path_factory.mktemp("accelerator")
    script, folder = str(root / "benchmarks" / "accelerator.py"), f"--out={out}"
    args = [sys.executable, "-c", WITHOUT, script, folder, "--small", "--commit=abc1234"]
    env = child_env | {"PYTHONPATH": str(root)}
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_rehearsal_measures_every_row_without_what_a_gpu_machine_lacks(rehearsed):
    out, printed = rehearsed
    results = json.loads((out / "small.json").read_text())
    names = [
        "peak",
        "copy",
        "attention, 17 tokens",
        "step, tiny, 50% visible",
        "step, tiny JiT, 25% visible",
        "sampling, tiny, 2 DDIM steps",
        "profile",
    ]
    assert list(results) == names
    for name, row in results.items():
        assert "error" not in row, f"{name}: {row}"
        assert row["device"] == "cpu"
        assert row["commit"] == "abc1234"
        assert row["versions"]["jax"] == jax.__version__
        assert row["date"].startswith("20")
        assert row["wall_seconds"] > 0
    jit = results["step, tiny JiT, 25% visible"]
    assert (jit["visible"], jit["patches"]) == (16, 64)
    assert list(jit["by"]) == ["jax", "torch eager", "torch fused"]
    step = results["step, tiny, 50% visible"]
    assert (step["visible"], step["patches"]) == (32, 64)
    assert list(step["by"]) == ["jax", "torch eager", "torch fused"]
    for by, facts in step["by"].items():
        if by == "jax" or HAS_TORCH:
            assert len(facts["turns"]) == accelerator.SMALL.rounds, f"{by}: {facts}"
            assert facts["seconds"] > 0
            assert facts["compile_seconds"] > 0
            assert 0.1 < facts["loss"] < 10
        else:
            assert "PyTorch cannot be imported" in facts["skipped"]
    assert step["by"]["jax"]["memory_bytes"] > 100_000
    assert "note" not in step["by"]["jax"], "the platform's own attention works"
    (line,) = [line for line in printed.splitlines() if line.startswith("| step, tiny, 50% visible | jax |")]
    assert line.count("|") == 12
    assert "% |" in line


def test_the_fused_kernel_is_as_exact_as_the_plain_one(rehearsed):
    errors = json.loads((rehearsed[0] / "small.json").read_text())["attention, 17 tokens"]["errors"]
    assert set(errors) == {"auto", "plain"}
    for kernel in errors.values():
        assert list(kernel) == ["values", "to q", "to k", "to v"]
        assert all(1e-4 < error < 0.1 for error in kernel.values()), "bfloat16 against float32"


def test_a_profile_names_kernels_and_leaves_a_trace(rehearsed):
    out, printed = rehearsed
    row = json.loads((out / "small.json").read_text())["profile"]
    assert row["case"] == "tiny, 50% visible"
    assert 0 < row["kernels"][0]["seconds_per_step"] <= row["busy_seconds_per_step"]
    assert {"profile.xplane.pb", "profile.trace.json.gz"} <= row["files"].keys()
    for name, size in row["files"].items():
        assert (out / name).exists() == (size < accelerator.LARGEST_TRACE)
    assert f"| `{row['kernels'][0]['name']}` |" in printed


def test_a_second_call_measures_nothing_again(rehearsed, monkeypatch, capsys):
    out, printed = rehearsed
    before = (out / "small.json").read_bytes()
    monkeypatch.setattr(accelerator, "Subject", None)
    accelerator.main([f"--out={out}", "--small"])
    assert (out / "small.json").read_bytes() == before
    again = capsys.readouterr().out
    assert again.strip() == printed[printed.index("cpu, commit abc1234") :].strip(), "the same tables"
    accelerator.main([f"--out={out}", "--small", "--table"])
    assert capsys.readouterr().out == again


def test_results_of_two_devices_do_not_mix(rehearsed, tmp_path):
    results = json.loads((rehearsed[0] / "small.json").read_text())
    results["peak"]["device"] = "NVIDIA H100"
    (tmp_path / "small.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="has results of NVIDIA H100, this is cpu; give another --out"):
        accelerator.main([f"--out={tmp_path}", "--small"])


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path):
    with pytest.raises(SystemExit, match="JAX sees only cpu; --small runs anywhere"):
        accelerator.main([f"--out={tmp_path}"])


def fail():
    raise RuntimeError("out of\nluck")


ABOUT = dict(device="cpu", commit="abc1234", versions=dict(jax=jax.__version__))


def test_a_row_that_raises_is_recorded_and_tried_again_last(tmp_path):
    path, ran = tmp_path / "rows.json", []
    good = lambda name: accelerator.Row(name, 1, lambda: ran.append(name) or dict(value=name))
    rows = [accelerator.Row("bad", 1, fail), good("b"), accelerator.Row("long", 5000, fail), good("c")]
    skipped = accelerator.run_rows(rows, path, budget=1000, about=ABOUT)
    assert ran == ["b", "c"]
    assert skipped.keys() == {"long"}
    assert skipped["long"].startswith("it needs about 5000 s, ")
    results = json.loads(path.read_text())
    assert list(results) == ["bad", "b", "c"]
    assert results["bad"]["error"] == "RuntimeError: out of"
    assert results["c"]["value"] == "c"
    assert "- bad: RuntimeError: out of" in accelerator.table(results)
    rows = [good("bad"), good("b"), good("new")]
    assert not accelerator.run_rows(rows, path, budget=1000, about=ABOUT)
    assert ran == ["b", "c", "new", "bad"], "what is done is not run again, what failed goes last"
    assert "error" not in json.loads(path.read_text())["bad"]


def test_a_row_in_which_the_program_ends_is_known_to_the_next_call(tmp_path):
    path = tmp_path / "rows.json"

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accelerator.run_rows([accelerator.Row("fatal", 1, killed)], path, budget=1000, about=ABOUT)
    assert json.loads(path.read_text())["fatal"]["error"] == "the program ended during this row"


def test_a_form_that_raises_leaves_the_others_their_turns():
    calls = []

    def late():
        calls.append(1)
        if len(calls) == 3:
            fail()
        return 0

    sizes = accelerator.Sizes(rounds=3, turn=0)
    still = lambda: accelerator.Subject(lambda: jnp.zeros(()), batch=2, flops=6)
    makers = {"bad": fail, "good": still, "none": "no torch", "late": lambda: accelerator.Subject(late)}
    found = accelerator.take_turns(makers, sizes)
    assert list(found) == list(makers)
    assert found["bad"] == found["late"] == dict(error="RuntimeError: out of")
    assert found["none"] == dict(skipped="no torch")
    assert len(found["good"]["turns"]) == 3
    assert found["good"]["images_per_second"] == 2 / found["good"]["seconds"]


def test_a_loss_that_is_not_finite_is_no_result():
    subject = lambda: accelerator.Subject(lambda: jnp.array(jnp.nan), loss=float)
    found = accelerator.take_turns({"jax": subject}, accelerator.SMALL)
    assert found["jax"] == dict(error="FloatingPointError: the loss is nan")


def test_a_kernel_that_does_not_work_is_replaced_and_named(monkeypatch):
    asked = []

    def our_step(case, kernel="auto"):
        asked.append(kernel)
        return fail() if kernel == "auto" else accelerator.Subject(lambda: 0)

    monkeypatch.setattr(accelerator, "our_step", our_step)
    subject = accelerator.our_step_or_plain(accelerator.SMALL.cases[0])
    assert asked == ["auto", "plain"]
    assert subject.note == "plain attention, because: RuntimeError: out of"


def test_pytorch_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    accelerator.torch_problem.cache_clear()
    try:
        assert accelerator.torch_problem().startswith("PyTorch cannot be imported: ")
    finally:
        accelerator.torch_problem.cache_clear()


def test_the_cases_are_the_papers():
    plans = [accelerator.mask_plans(case.config(), "train")[0] for case in accelerator.Sizes().cases]
    of_maskdm, of_jit = [(416, 4096), (2048, 4096), (4096, 4096), (256, 256)], [(256, 256), (64, 256)]
    assert [(plan.visible, plan.total) for plan in plans] == of_maskdm + of_jit
    rows = accelerator.all_rows(accelerator.Sizes(), None)
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("case", [2, 4])
def test_flops_by_formula_are_those_that_xla_counts(case):
    """XLA counts softmax, normalisation and GELU, too: a few percent of these networks."""
    settings = accelerator.Sizes().cases[case].config(kernel="plain")
    network, size = make_network(settings), settings.data.image_size
    x, t = jax.ShapeDtypeStruct((1, size, size, 3), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    counted = jax.jit(network.apply).lower(network.abstract_params(), x, t).cost_analysis()["flops"]
    assert 0.95 * counted < accelerator.forward_flops(settings) < counted


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
def test_all_forms_of_pytorchs_network_are_equal():
    import torch
    import torch_uvit

    settings = accelerator.SMALL.cases[0].config()
    torch.manual_seed(0)
    eager, fused = (torch_uvit.Trainer(form, settings, "train", "cpu") for form in ("eager", "fused"))
    fused.network.load_state_dict(eager.network.state_dict())
    images, t, positions = torch.randn(eager.images.shape), torch.tensor([0, 3, 500, 999]), eager.draw_positions()
    assert positions.shape == (4, 32)
    hidden = torch.ones(4, 64, dtype=torch.bool).scatter_(1, positions, False)
    visible = eager.patches(images).gather(1, positions[..., None].expand(-1, -1, 48))
    want = eager.network(images, t, hidden)
    torch.testing.assert_close(fused.network(visible, t, positions), want, rtol=1e-5, atol=1e-5)
    whole = eager.patches(eager.network(images, t))
    torch.testing.assert_close(fused.network(eager.patches(images), t), whole, rtol=1e-5, atol=1e-5)
    unmasked = dataclasses.replace(accelerator.SMALL.cases[0], rate=0).config()
    for form in ("eager", "fused"):
        trainer = torch_uvit.Trainer(form, unmasked, "train", "cpu")
        before = [weight.detach().clone() for weight in trainer.network.parameters()]
        assert 0.1 < trainer() < 10
        for weight, old in zip(trainer.network.parameters(), before, strict=True):
            assert not torch.equal(weight, old)
