"""The benchmarks start and print what they promise; their figures are for a machine at rest."""

import json
import subprocess
import sys

import jax
import pytest
import tiny

from maskdm_jax import train


def test_demo_quality(root, child_env, tmp_path):
    train.train(tiny.config(stages=("finetune",)), tmp_path / "run", devices=jax.devices()[:1])
    args = [sys.executable, str(root / "benchmarks" / "demo_quality.py"), f"--run={tmp_path / 'run'}", "--n=20"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["real"]["accuracy"] > 0.95
    assert result["real"]["top_probability"] == pytest.approx(0.88, abs=0.02)
    assert result["samples"]["accuracy"] < 0.6, "two steps of training do not write digits"


def test_loader(root, child_env):
    args = [sys.executable, str(root / "benchmarks" / "loader.py"), "--data=digits", "--size=8", "--channels=1"]
    args += ["--rounds=1", "--seconds=0.3", "--threads=1"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ratio"] > 0
    assert result["loader"] > 100
    assert abs(result["memory_growth_mib"]) < 30
