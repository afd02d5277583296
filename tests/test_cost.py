"""Costs of compiled programs: memory, FLOPs, and the roofline of benchmarks/roofline.py."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import pytest
import recipe_costs
import roofline
import tiny

from maskdm_jax.errors import CostError
from maskdm_jax.tools import cost

CONFIG = tiny.config(model__width=128, model__depth=1, model__time_mlp=False, mesh__fsdp=2)


def test_flops_are_those_counted_by_hand():
    config = tiny.config(model__width=128)  # of three blocks, the last of which takes a skip connection
    width, tokens, images = 128, 18, 4  # label, time and 16 patches
    block = 2 * tokens * (3 + 1 + 2 * 2) * width**2 + 4 * tokens**2 * width  # qkv, proj, an MLP of ratio 2; attention
    skips = 2 * tokens * 2 * width**2
    few, many = (cost.count_flops(config, "finetune", n) for n in (images, 2 * images))
    assert many - few == pytest.approx(3 * images * (3 * block + skips), rel=0.06), "without the optimizer's"
    assert few == pytest.approx(many - few, rel=0.2)


def test_a_training_step(monkeypatch):
    """FLOPs per chip, state by counting, interconnect by the parameters."""
    devices = jax.devices()[:2]
    roof = roofline.training_step(CONFIG, "finetune", devices, 8)
    found = roof.cost
    assert (found.chips, found.kind, found.batch, found.limit, found.fits) == (2, "cpu", 8, None, None)
    assert found.seconds is None
    assert roof.bounds() == {}
    assert found.flops == cost.count_flops(CONFIG, "finetune", 4)
    assert roof.collectives["all-gather"][0] == roof.collectives["reduce-scatter"][0] == 4
    assert roof.collectives["all-gather"][1] == pytest.approx(2 * roof.collectives["reduce-scatter"][1])
    twice = cost.training_step(CONFIG, "finetune", devices, 16)
    assert twice.temporary > found.temporary
    assert twice.state == pytest.approx(found.state, rel=0.01)
    monkeypatch.setitem(cost.CHIPS, "cpu", cost.Chip(flops=1e12, memory=0))
    monkeypatch.setitem(roofline.BANDWIDTHS, "cpu", roofline.Bandwidth(hbm=1e9, interconnect=1e6))
    assert dataclasses.replace(found, limit=found.memory).fits
    assert dataclasses.replace(twice, limit=found.memory).fits is False
    assert roof.bounds()["arithmetic"] == found.seconds == found.flops / 1e12
    assert 1 < roof.hbm_bytes / roof.least_hbm_bytes < 10
    row = json.loads(json.dumps(recipe_costs.numbers(roof)))
    assert (row["hbm_bytes"], row["memory"], row["bounds"]) == (roof.hbm_bytes, found.memory, roof.bounds())
    assert roof.seconds == max(roof.bounds().values()) == roof.bounds()["interconnect"]


def test_sampling():
    roof = roofline.sampling(CONFIG, jax.devices()[:2], 4)
    assert roof.cost.batch == 8
    assert cost.evaluations(CONFIG) == CONFIG.sampling.steps
    step = cost.count_flops(CONFIG, "finetune", 4)
    assert roof.cost.flops == pytest.approx(step / 3 * CONFIG.sampling.steps, rel=0.1)
    assert not roof.collectives.keys() - {"all-gather"}


def test_guidance_costs_what_its_weak_prediction_costs():
    def flops(**changes):
        config = tiny.config(model__outer_blocks=1, **{f"sampling__{key}": value for key, value in changes.items()})
        return cost.trace_forward(config, 4, guided=True).lower().cost_analysis()["flops"]

    alone, full = flops(), flops(guidance=1.0)
    assert full == pytest.approx(2 * alone, rel=0.01)
    assert 1.2 * alone < flops(guidance=1.0, weak="shallow") < 0.95 * full


def test_the_largest_batch_is_found(monkeypatch):
    tried = []

    def training_step(config, name, devices, batch_size):
        tried.append(batch_size)
        if batch_size > 1000:
            raise CostError("too large")
        return types.SimpleNamespace(fits=batch_size <= 344, limit=1)

    monkeypatch.setattr(cost, "training_step", training_step)
    assert 312 <= cost.largest_batch(CONFIG, "pretrain", jax.devices()) <= 344
    assert len(tried) < 12
    assert tried[0] == CONFIG.stage["pretrain"].batch_size
    few = cost.with_batch(CONFIG, "pretrain", 1024)
    assert 312 <= cost.largest_batch(few, "pretrain", jax.devices()) <= 344
    assert all(size % 8 == 0 for size in tried)
    assert cost.round_up_batch(CONFIG, "pretrain", 6) == 12
    monkeypatch.setattr(cost, "training_step", lambda *_: types.SimpleNamespace(fits=False, limit=1))
    with pytest.raises(CostError, match="not even 8 images fit"):
        cost.largest_batch(CONFIG, "pretrain", jax.devices())
    monkeypatch.setattr(cost, "training_step", lambda *_: types.SimpleNamespace(fits=None, limit=None, kind="cpu"))
    with pytest.raises(CostError, match="the memory size of cpu is not known; choose a TPU topology"):
        cost.largest_batch(CONFIG, "pretrain", jax.devices())


def test_collectives_are_counted_in_the_text():
    text = """
  %a = (f32[3,4]{1,0:T(8,128)}, bf16[10]{0}) all-reduce(%x, %y), channel_id=1
  ROOT %b = f32[8]{0} all-gather-start(%z), dimensions={0}
  %c = f32[8]{0} all-gather-done(%b)
  %d = f32[8]{0} add(%all-reduce.1, %b)
"""
    assert roofline.collectives(text) == {"all-reduce": (1, 68), "all-gather": (1, 32)}


def test_hbm_bytes_are_counted_in_the_text():
    """Arrays count in whole tiles, those on the chip not at all; the body of a loop counts once for each trip."""
    text = """
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %inside = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%f
}

ENTRY %main (a: f32[8,128], b: bf16[4,9,64]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[4,9,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %near = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%f
  %start = (bf16[4,9,64]{2,1,0:T(8,128)(2,1)}, bf16[2,9,64]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%b)
  %done = bf16[2,9,64]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%start)
  %far = f32[8,128]{1,0:T(8,128)} fusion(%near, %done), kind=kLoop, calls=%f, metadata={op_name="a(b)"}
  %w = (s32[], f32[8,128]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[8,128]) while(%t), condition=%c, body=%body
}
"""
    array, part = 8 * 128 * 4, 2 * 16 * 128 * 2
    assert roofline.hbm_bytes(text, loops=5) == array + part + array + (3 + 5) * 2 * array


def test_logits_need_not_be_in_memory():
    def attend(x, w):
        q = (x @ w).reshape(2, 9, 3, 4)
        return jax.nn.dot_product_attention(q, q, q)

    traced = jax.jit(attend).trace(
        jax.ShapeDtypeStruct((2, 9, 12), "float32"), jax.ShapeDtypeStruct((12, 12), "float32")
    )
    x = 2 * 9 * 12
    assert roofline.product_bytes(traced.jaxpr.jaxpr) == 4 * (2 * x + 12 * 12 + 4 * x)


def test_an_unknown_topology_is_named(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # variables for libtpu
    with pytest.raises(CostError, match="there is no TPU compiler for topology 'v9:1x1'.*pip install"):
        cost.topology_devices("v9:1x1")


def test_from_the_command_line(root, child_env, tmp_path):
    """For the devices of this machine; the numbers in the file are those on the screen."""
    # As if the peak of this CPU were published.
    known = "import runpy, sys; from maskdm_jax.tools import cost; cost.CHIPS['cpu'] = cost.Chip(1e6, 1 << 40); "
    known = ["-c", known + "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"]
    command = [str(root / "launch" / "compile.py"), f"--config={root / 'configs' / 'demo.py'}"]
    command += ["--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2", "--config.mesh.data=2"]
    command += [f"--json={tmp_path / 'costs.jsonl'}"]
    environment = child_env | {"JAX_NUM_CPU_DEVICES": "2"}
    run = lambda *args, before=(): subprocess.run(
        [sys.executable, *before, *command, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    args = ["--stages=pretrain", "--samples=2", "--config.pretrain.batch_size=9", "--config.sampling.steps=2"]
    done = run(*args, "--config.pretrain.steps=100000", "--price=1.2", before=known)
    assert done.returncode == 0, done.stderr
    assert "demo on 2 x cpu" in done.stdout
    assert "pretrain: a batch of 9 does not divide over 2 chips; 10 is taken" in done.stdout
    training, sampling = map(json.loads, (tmp_path / "costs.jsonl").read_text().splitlines())
    assert (training["config"], training["stage"], training["batch"]) == ("demo", "pretrain", 10)
    assert (sampling["stage"], sampling["batch"]) == ("sampling", 4)
    assert training["memory"] == training["state"] + training["temporary"] > 0
    assert f"{training['flops'] / 1e6:8.2f} MFLOP" in done.stdout
    hours = 2 * training["flops"] / 1e6 * 100_000 / 3600
    assert f"100,000 steps take at least {hours:,.1f} chip-hours" in done.stdout
    price = f"${1.2 * hours:,.2f} at $1.20 per chip-hour"
    assert f"pretrain: at least {hours:,.1f} chip-hours, {price}" in done.stdout
    assert hours > 1
    done = run("--price=1.2")
    assert done.returncode == CostError.status
    assert done.stderr.strip().endswith("--price: the speed of cpu is not known; give a --topology of TPUs")
    done = run("--stages=other")
    assert done.returncode == CostError.status
    assert done.stderr.strip().endswith("error: 'other' is not a stage of the config; it has pretrain, finetune")
