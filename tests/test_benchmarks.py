"""The benchmarks start and print what they promise; their figures need an idle machine."""

import json
import re
import subprocess
import sys

import jax
import pytest
import tiny

import maskdm_jax
from maskdm_jax import config as config_lib
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.training import loop


def test_demo_quality(root, child_env, tmp_path):
    config = tiny.config(stages=("finetune",), model__depth=1)
    loop.train(config, TrainingData(config.data), tmp_path / "run", devices=jax.devices()[:1])
    args = [sys.executable, str(root / "benchmarks" / "demo_quality.py"), f"--run={tmp_path / 'run'}", "--n=20"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["real"]["accuracy"] > 0.95
    assert result["real"]["top_probability"] == pytest.approx(0.88, abs=0.02)
    assert result["samples"]["accuracy"] < 0.6, "two steps of training are not enough for digits"


def test_loader(root, child_env):
    args = [sys.executable, str(root / "benchmarks" / "loader.py"), "--data=digits", "--size=8", "--channels=1"]
    args += ["--rounds=1", "--seconds=0.3", "--threads=1"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ratio"] > 0
    assert result["loader"] > 0
    assert abs(result["memory_growth_mib"]) < 30


def test_speed(torch, root, child_env, tmp_path):
    args = [sys.executable, str(root / "benchmarks" / "speed.py"), f"--config={root / 'configs' / 'demo.py'}"]
    args += ["--config.model.num_classes=0", "--config.data.labels=False", "--config.data.label_dropout=0.0"]
    args += ["--config.model.depth=1", "--config.sampling.guidance=0.0", "--batch=4", "--visible=50"]
    args += ["--config.diffusion.process=ddpm", "--config.diffusion.objective=noise", "--config.sampling.method=ddim"]
    args += ["--rounds=1", "--seconds=0.01", "--sampling_steps=2", "--torch=fused"]
    args += [f"--json={tmp_path / 'speed.json'}", "--config.evaluation.inception_weights=nowhere.pth"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result == json.loads((tmp_path / "speed.json").read_text())
    ours, theirs = ({row["what"]: row for row in result["rows"] if row["by"] == by} for by in ("jax", "torch fused"))
    assert list(ours) == ["step 50%", "forward", "sampling", "loading"]
    assert list(theirs) == ["step 50%", "forward"]
    assert theirs["forward"]["over_ours"] > 0
    assert 0 < ours["step 50%"]["share_of_peak"] < 1
    assert ours["step 50%"]["share_of_roof"] > 0
    assert ours["loading"]["images_per_second"] > 0
    stall, whole = (row for row in result["rows"] if row["what"] == "checkpoint")
    assert 0 < stall["seconds"] < whole["seconds"]
    assert "evaluation is left out: nowhere.pth is not there" in done.stdout
    arithmetic = {what: row["flops_per_second"] * row["seconds"] for what, row in ours.items()}
    assert arithmetic["sampling"] == pytest.approx(2 * arithmetic["forward"], rel=0.05), "two evaluations against one"


def test_precision(root, child_env, tmp_path):
    args = [sys.executable, str(root / "benchmarks" / "precision.py"), f"--config={root / 'configs' / 'demo.py'}"]
    args += ["--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2", "--steps=6", "--window=2"]
    args += [f"--out={tmp_path / 'out' / 'precision'}"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0 < result["bfloat16"]["worst"] < 0.01 < result["float32, another seed"]["worst"]
    curves = json.loads((tmp_path / "out" / "precision.json").read_text())["losses"]
    assert [len(curve) for curve in curves.values()] == [5, 5, 5]
    assert (tmp_path / "out" / "precision.png").read_bytes().startswith(b"\x89PNG")


def test_faults(root, child_env):
    args = [
        sys.executable,
        str(root / "benchmarks" / "faults.py"),
        "--kills=1",
        "--processes=1",
        "--devices=1",
        "--steps=12",
    ]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=False)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["same"] == dict(params=True, ema=True, optimizer=True, history=True)


def test_the_table_of_costs_has_all_recipes(root):
    rows = [json.loads(line) for line in (root / "docs" / "costs.jsonl").read_text().splitlines()]
    stages_of_celebahq = {"celebahq_pretrain", "celebahq_pretrain_50", "celebahq_finetune"}
    recipes = {path.stem for path in (root / "configs").glob("*.py")} - stages_of_celebahq
    compiled = {row["config"] for row in rows}
    assert compiled <= recipes
    text = (root / "docs" / "costs.md").read_text()
    later = text.partition("Not compiled yet: ")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", later)) == recipes - compiled
    table = (root / "docs" / "costs.md").read_text()
    assert all(f"| {row['config']} | {row['stage']} | {row['topology']} |" in table for row in rows)
    assert all(row["fits"] for row in rows)


def test_recipes_fit_on_the_hardware_that_they_name(root):
    """With the memory that XLA planned for 16 chips: the state is on each, activations are divided."""
    numbers = dict(one=1) | {str(number): number for number in (2, 4, 8, 16)}
    for row in map(json.loads, (root / "docs" / "costs.jsonl").read_text().splitlines()):
        text = (root / "configs" / f"{row['config']}.py").read_text()
        if row["stage"] == "sampling" or row["config"] in ("demo", "emoji64"):  # for CPUs
            continue
        named = re.findall(r"(one|\d+)(?: accelerators?)? of (\d+) GB", text)
        assert named, row["config"]
        for number, size in named:
            needed = row["state"] + row["temporary"] * row["chips"] / numbers[number]
            assert needed < 0.95 * int(size) * 1e9, f"{row['config']}, {row['stage']}: {number} of {size} GB"


@pytest.mark.parametrize("name", ["celebahq", "own_images", "imagenet64_jit_masked"])
def test_the_time_left_counts_the_flops_of_later_stages(root, name):
    """As XLA counted them in the compiled programs."""
    rows = [json.loads(line) for line in (root / "docs" / "costs.jsonl").read_text().splitlines()]
    flops = {row["stage"]: row["flops"] for row in rows if row["config"] == name}
    config = config_lib.parse(maskdm_jax.recipe(name))
    first, *others = config.stages
    for other in others:
        ratio = config.stage[other].steps * flops[other] / (config.stage[first].steps * flops[first])
        assert loop._cost(config, other) / loop._cost(config, first) == pytest.approx(ratio, rel=0.1)


def test_recipe_costs(root, child_env, tmp_path):
    """Programs in the file are not compiled again."""
    row = dict(config="demo", topology="v5e:4x4", stage="pretrain", batch=64, fits=True, memory=2**30, flops=5e12)
    row |= dict(
        hbm_bytes=3e9,
        least_hbm_bytes=2e9,
        collectives={"all-reduce": [2, 7_000_000]},
        bounds=dict(hbm=0.004, arithmetic=0.001),
    )
    rows = [row, row | dict(stage="finetune", fits=False)]
    (tmp_path / "costs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [sys.executable, str(root / "benchmarks" / "recipe_costs.py"), f"--json={tmp_path / 'costs.jsonl'}"]
    args += ["--configs=demo", "--topologies=v5e:4x4", "--samples=0"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=100, check=True)
    assert "| demo | pretrain | v5e:4x4 | 64 | 1.00 | 5.00 | 3.0 | 1.50 | 7 | 4.0 (HBM) | 16,000 |" in done.stdout
    assert "| demo | finetune | v5e:4x4 | 64 | does not fit |" in done.stdout
