"""Patches that skip the inner blocks: their features when they re-enter, and their cost."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import maskdm_jax
from maskdm_jax import config as config_lib
from maskdm_jax import run, sampling
from maskdm_jax.build import grids, make_network, make_process, make_sampler
from maskdm_jax.diffusion import masking, samplers
from maskdm_jax.errors import CheckpointError, ConfigError
from maskdm_jax.interop.convert import convert
from maskdm_jax.models import routing
from maskdm_jax.models.layers import patchify
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.training import checkpoint, logs, start, step
from maskdm_jax.training.state import make_optimizer

NETWORKS = {
    "uvit": dict(),
    "wavelet": tiny.WAVELET,
    "jit": tiny.JIT | dict(diffusion__process="flow", diffusion__objective="x0", sampling__method="heun"),
}


def built(kind, **changes):
    """(config, network, parameters none of which is zero, whole noisy images as patches, which are visible)"""
    config = tiny.config(**NETWORKS[kind] | changes)
    network = make_network(config)
    spread = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    params = jax.tree.map(spread, network.init(jax.random.key(0)))
    data = dict(image=np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8))
    data |= dict(label=np.array([1, 2, 3], np.int32), index=np.arange(3, dtype=np.uint32))
    return config, network, params, step.draw_inputs(config, "pretrain", jax.random.key(1), data)


def outputs(network, params, inputs, positions):
    return jax.jit(network.apply)(params, inputs.x0, inputs.t, inputs.labels, positions)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("returning", ["itself", "token"])
def test_all_blocks_process_all_patches_if_nothing_is_hidden_or_all_blocks_are_outer(kind, returning):
    config, _, params, inputs = built(kind, model__outer_blocks=1, model__returning=returning)
    with_outer = lambda k: make_network(
        dataclasses.replace(config, model=dataclasses.replace(config.model, outer_blocks=k))
    )
    network = with_outer(2)  # all three
    assert jax.tree.leaves(inputs.x0)[0].shape[1] == 16, "all patches go in"
    assert inputs.positions is not None
    dense = outputs(network, params, inputs, None)
    jax.tree.map(np.testing.assert_array_equal, outputs(network, params, inputs, inputs.positions), dense)
    if returning == "itself":
        for k in (0, 1):
            jax.tree.map(np.testing.assert_array_equal, outputs(with_outer(k), params, inputs, None), dense)


def test_class_tokens_may_join_after_the_inner_blocks():
    _, network, params, inputs = built("jit", model__outer_blocks=1, model__jit__class_tokens_from=2)
    every = jnp.broadcast_to(jnp.arange(16), (3, 16))
    dense = outputs(network, params, inputs, None)
    np.testing.assert_allclose(outputs(network, params, inputs, every), dense, atol=1e-5)


@pytest.mark.parametrize("token", [None, jnp.arange(4.0)])
def test_leaving_and_coming_back(token):
    """Against loops in NumPy: two extras, then seven patches, of which three are visible."""
    draw = np.random.default_rng(0)
    tokens, visible = draw.standard_normal((2, 9, 4)).astype(np.float32), np.array([[0, 3, 6], [1, 2, 5]])
    seen = []

    def run(i, h, inner):
        seen.append((i, inner, np.asarray(h)))
        return h + 1 if inner else h

    back = routing.through_blocks(run, jnp.asarray(tokens), 4, 1, jnp.asarray(visible), None, patches=7, token=token)
    assert [(i, inner) for i, inner, _ in seen] == [(0, False), (1, True), (2, True), (3, False)]
    for b in range(2):
        expected = [*(tokens[b, :2] + 1 + 1)]
        for n in range(7):
            hidden = tokens[b, 2 + n] if token is None else np.asarray(token)
            expected.append(tokens[b, 2 + n] + 1 + 1 if n in visible[b] else hidden)
        np.testing.assert_array_equal(seen[1][2][b], np.concatenate([tokens[b, :2], tokens[b, 2 + visible[b]]]))
        np.testing.assert_array_equal(back[b], expected)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("returning", ["itself", "token"])
def test_gradients_of_hidden_patches_pass_the_outer_blocks_alone(kind, returning):
    """If attention in the outer blocks mixes nothing, hidden patches depend on no parameter of the inner blocks."""
    _, network, params, inputs = built(kind, model__outer_blocks=1, model__returning=returning)
    unmixed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "proj" in jax.tree_util.keystr(path) else leaf, params
    )
    visible = jax.tree.leaves(inputs.positions)

    def of_hidden(params):
        total = 0
        for band, at in zip(jax.tree.leaves(outputs(network, params, inputs, inputs.positions)), visible, strict=True):
            hidden = jnp.ones(band.shape[:2]).at[jnp.arange(3)[:, None], at].set(0)
            total += (band * hidden[..., None]).sum()
        return total

    grads = jax.jit(jax.grad(of_hidden))(unmixed)
    size = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    if kind == "jit":
        inner, outer = grads["blocks"][1], [grads["blocks"][i]["w3"] for i in (0, 2)]
    else:
        grads = grads["backbone"]
        inner, outer = grads["mid_block"], [grads["in_blocks"][0]["mlp"], grads["out_blocks"][0]["mlp"]]
    assert size(inner) == 0
    assert all(size(one) > 0 for one in outer)
    assert returning == "itself" or size(grads["mask_token"]) > 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_order_of_visible_patches_does_not_matter(kind):
    """Each keeps its own position and rotary angles in the inner blocks."""
    _, network, params, inputs = built(kind, model__outer_blocks=1)
    turned = jax.tree.map(lambda at: at[:, ::-1], inputs.positions)
    one, other = (outputs(network, params, inputs, at) for at in (inputs.positions, turned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, other)


def test_the_mask_token_does_not_decay():
    config, _, params, _ = built(
        "uvit", model__outer_blocks=1, model__returning="token", finetune__weight_decay=0.1, finetune__warmup_steps=0
    )
    optimizer = make_optimizer(config.stage["finetune"])
    unused = jax.tree.map(jnp.zeros_like, params)
    begun = optimizer.init(params)
    assert begun[1].inner_states["all"].inner_state[1] == optax.EmptyState(), "as in recorded checkpoints"
    updates, _ = optimizer.update(unused, begun, params)
    assert not np.any(updates["backbone"].pop("mask_token"))
    used = {path[0].key for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if np.all(leaf != 0)}
    assert {"backbone", "head", "pos_embed"} <= used


def test_class_tokens_join_although_all_patches_are_hidden():
    _, network, params, inputs = built("jit", model__outer_blocks=1)
    none_visible = inputs.positions[:, :0]
    shallow = outputs(network, params, inputs, none_visible)
    moved = params | dict(class_positions=params["class_positions"] + 1)
    assert np.abs(outputs(network, moved, inputs, none_visible) - shallow).max() > 1e-3


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_hidden_patch_matters_and_is_learned(kind):
    config, network, params, inputs = built(kind, model__outer_blocks=1)
    loss = step.make_loss(config, network)
    grads = jax.jit(jax.grad(lambda x0: loss(params, inputs._replace(x0=x0))))(inputs.x0)
    for grad in jax.tree.leaves(grads):
        assert (np.abs(np.asarray(grad)).max(axis=-1) > 0).all(), "the loss is of all patches"


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("masked", [True, False])
def test_shallow_images_skip_the_inner_blocks(kind, masked):
    """They equal the prediction with all patches hidden, the others are as they were; also without a mask."""
    _, network, params, inputs = built(kind, model__outer_blocks=1, model__returning="token")
    positions = inputs.positions if masked else None
    apply = jax.jit(network.apply)
    args = params, inputs.x0, inputs.t, inputs.labels
    mixed = apply(*args, positions, shallow=jnp.array([False, True, False]))
    deep, shallow = apply(*args, positions), apply(*args, jax.tree.map(lambda at: at[:, :0], inputs.positions))
    for ours, far, near in zip(*map(jax.tree.leaves, (mixed, deep, shallow)), strict=True):
        np.testing.assert_allclose(ours[::2], far[::2], atol=1e-5)
        np.testing.assert_allclose(ours[1], near[1], atol=1e-5)
        assert np.abs(far[1] - near[1]).max() > 1e-3


def test_shallow_images_are_drawn_without_labels():
    config = tiny.config(model__outer_blocks=1, pretrain__shallow=0.4)
    data = dict(image=np.zeros((500, 8, 8, 1), np.uint8), label=np.ones(500, np.int32), index=np.arange(500))
    inputs = step.draw_inputs(config, "pretrain", jax.random.key(1), data)
    assert float(inputs.shallow.mean()) == pytest.approx(0.4, abs=0.06)
    np.testing.assert_array_equal(inputs.labels, np.where(inputs.shallow, -1, 1))
    assert step.draw_inputs(config, "finetune", jax.random.key(1), data).shallow is None


@pytest.mark.parametrize("kind", NETWORKS)
def test_guidance_from_sparsity(kind, monkeypatch):
    """(1 + w) p - w weak, where the weak prediction skips the inner blocks and the label, or has hidden patches."""
    unconditional = dict(model__num_classes=0, data__labels=False) if kind == "wavelet" else {}
    config, network, params, _ = built(kind, model__outer_blocks=1, **unconditional)
    x = jax.random.normal(jax.random.key(4), (2, 4, 4, 4) if kind == "wavelet" else (2, 8, 8, 1))
    labels, t = None if unconditional else jnp.array([1, 2]), jnp.full(2, 0.5 if kind == "jit" else 500)
    call = lambda predict, x, *args, **options: predict(x, t)
    entry = dataclasses.replace(samplers.SAMPLERS[config.sampling.method], run=call)
    monkeypatch.setitem(samplers.SAMPLERS, config.sampling.method, entry)

    def guided(**changes):
        settings = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, guidance=0.5, **changes))
        return jax.jit(make_sampler(settings, network))(params, x, None, labels)

    plans = [masking.make_plan("patch", grid, rate=0.25) for grid in grids(config)]
    some = [jnp.stack([masking.sample_positions(plan, jax.random.key(i))] * 2) for i, plan in enumerate(plans)]
    pick = lambda positions: tuple(positions) if kind == "wavelet" else positions[0]
    predict = lambda *args: network.apply(params, *make_process(config).network_inputs(x, t), *args)
    strong = predict(labels)
    for ours, weak in (
        (guided(weak="shallow"), predict(None, pick([at[:, :0] for at in some]))),
        (guided(weak="sparse", weak_rate=0.25), predict(labels, pick(some))),
    ):
        assert np.abs(strong - weak).max() > 1e-3
        np.testing.assert_allclose(ours, 1.5 * strong - 0.5 * weak, atol=1e-5)


@pytest.fixture(scope="module")
def token_run(tmp_path_factory):
    """Routed, then dense with the same optimizer, guidance from sparsity."""
    changes = dict(model__outer_blocks=1, model__returning="token", pretrain__mask=config_lib.strided(2))
    changes |= dict(pretrain__shallow=0.3, finetune__shallow=0.2)
    for stage in ("pretrain", "finetune"):
        changes |= {
            f"{stage}__{key}": value for key, value in dict(warmup_steps=5, ema_law="plain", ema_every=3).items()
        }
    changes |= dict(finetune__continues=True)
    config = tiny.config(**changes, sampling__guidance=0.5, sampling__weak="shallow")
    run.train(config, folder := tmp_path_factory.mktemp("token") / "whole")
    return folder, config


def test_a_run(token_run, tmp_path):
    """A stop in between changes nothing."""
    folder, config = token_run
    text = (folder / "log.txt").read_text()
    assert "4 of 16 patches visible" in text
    assert "hidden patches take part in the first and last 1 blocks" in text
    rates = [line["learning_rate"] for line in logs.read_metrics(folder / "metrics.jsonl")]
    np.testing.assert_allclose(rates, 1e-3 * np.minimum(np.arange(6) / 5, 1), rtol=1e-6)
    first = dataclasses.replace(config, stages=("pretrain",), stage=dict(pretrain=config.stage["pretrain"]))
    run.train(first, tmp_path / "parts")
    run.train(config, tmp_path / "parts")
    whole, parts = (sampling.load(path) for path in (folder, tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    network, mesh = make_network(config), make_mesh(devices=jax.devices()[:1])
    state = checkpoint.load_state(whole.checkpoint, start.abstract_state(config, 1, network, mesh))
    assert int(state.step) == 2
    before = sampling.load(folder / "checkpoints" / "4")
    # The EMA is updated every third step of both stages together: at steps 1 and 4.
    jax.tree.map(np.testing.assert_array_equal, before.params, whole.params)
    counts = [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert max(counts) == 6, "one optimizer for both stages"
    meta = checkpoint.load_meta(whole.checkpoint)
    dropping = dataclasses.replace(config, model=dataclasses.replace(config.model, outer_blocks=0))
    with pytest.raises(
        ConfigError, match="outer_blocks=1, which cannot become 0 .*; pass --config.model.outer_blocks=1"
    ):
        start.resumed_stage(dropping, meta, "whole")
    alone = config.stage | dict(finetune=dataclasses.replace(config.stage["finetune"], continues=False))
    with pytest.raises(ConfigError, match="finetune.continues=True, which cannot become False"):
        start.resumed_stage(dataclasses.replace(config, stage=alone), meta, "whole")


def test_a_run_with_a_mask_token_is_exported_without_it(token_run, tmp_path):
    """The prediction for whole images does not use it."""
    whole, config = token_run
    assert {
        line.split(";")[0] for line in convert(whole, tmp_path / "file.pt") if line.startswith(("note", "left"))
    } == {
        "left out: the learned token of hidden patches",
        "note: other code has no model.outer_blocks=1",
        "note: other code has no guidance of sampling.weak='shallow'",
    }
    convert(whole, tmp_path / "file.safetensors")
    ours, file = (
        maskdm_jax.load(path).sample(2, seed=1, guidance=0.0) for path in (whole, tmp_path / "file.safetensors")
    )
    np.testing.assert_array_equal(ours, file)
    itself = dataclasses.replace(config, model=dataclasses.replace(config.model, returning="itself"))
    lines = convert(tmp_path / "file.pt", tmp_path / "back", config=config_lib.to_dict(itself), stage="finetune")
    assert not [line for line in lines if "EMA says" in line], "it counts the steps of both stages"
    shutil.copytree(whole, tmp_path / "jit")
    path = tmp_path / "jit" / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["model"] |= dict(network="jit", jit=dict(class_tokens_from=0))
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="is a JiT with config.model.returning='token', which no other format"):
        convert(tmp_path / "jit", tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__returning="token"), "returning is 'token', but config.model.outer_blocks is 0"),
        (dict(model__outer_blocks=1, model__network="own.py:X"), "outer_blocks must be 0 for a network of one's own"),
        (dict(pretrain__shallow=0.1), "pretrain.shallow needs config.model.outer_blocks above 0"),
        (NETWORKS["wavelet"] | dict(model__outer_blocks=1, pretrain__shallow=0.1), "the stages' shallow"),
        (dict(sampling__guidance=1.0, sampling__weak="shallow"), "which needs config.model.outer_blocks above 0"),
        (dict(pretrain__continues=True), "pretrain is the first stage; there is none to continue"),
        (dict(finetune__continues=True, finetune__b1=0.5), "finetune.b1 is 0.5; it must be 0.9 as in pretrain"),
        (dict(sampling__weak_rate=1.0), r"weak_rate is 1.0; it must be in \(0, 1\)"),
        (dict(sampling__weak="weaker"), "weak is 'weaker'; it must be one of unlabelled, shallow, sparse"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**changes)


def test_patches_in_order_are_the_image():
    _, network, params, inputs = built("uvit", model__outer_blocks=1)
    image = jax.random.normal(jax.random.key(3), (3, 8, 8, 1))
    whole = network.apply(params, image, inputs.t, inputs.labels, inputs.positions)
    patches = network.apply(params, patchify(image, 2), inputs.t, inputs.labels, inputs.positions)
    np.testing.assert_array_equal(patchify(whole, 2), patches)
