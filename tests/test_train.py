import functools
import gzip
import json
import re
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdm_jax import config as config_lib
from maskdm_jax import run
from maskdm_jax.build import make_network
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.errors import CheckpointError, ConfigError, NonFiniteLoss
from maskdm_jax.parallel import sharding
from maskdm_jax.run import train
from maskdm_jax.training import checkpoint, logs, loop, start, step
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.state import new_state
from maskdm_jax.training.step import draw_inputs

ONE = jax.devices()[:1]


def setup(config, devices=ONE):
    """A compiled first-stage step, a fresh state and batches for it."""
    mesh, network = make_run_mesh(config, devices), make_network(config)
    abstract = abstract_state(config, 0, network, mesh)
    jitted = step.jit_step(config, config.stages[0], mesh, abstract)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = lambda: new_state(network.init(jax.random.key(0)), config.stage[config.stages[0]], jax.random.key(1))
    state = jax.jit(make, out_shardings=placed)()
    batches = TrainingData(config.data).batches(batch_size=config.stage[config.stages[0]].batch_size, seed=0)
    return jitted, state, batches, mesh


def run_steps(config, n, devices=ONE):
    """Losses of n steps and the final state."""
    losses, traces = [], []
    with mock.patch.object(step, "draw_inputs", wraps=draw_inputs) as draw:
        jitted, state, batches, mesh = setup(config, devices)
        for _ in range(n):
            state, metrics = jitted(state, sharding.to_global(mesh, next(batches)))
            losses.append(float(metrics["loss"]))
            traces.append(draw.call_count)
    batches.close()
    assert len(set(traces)) == 1, "a stage traces its step once"
    return losses, state


@pytest.fixture(scope="module")
def reference_losses():
    return run_steps(tiny.config(), 5)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8)])  # data and fsdp together: test_distributed.py
def test_eight_devices_compute_what_one_does(reference_losses, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)  # so that tiny parameters are split too
    losses, state = run_steps(tiny.config(mesh__data=mesh[0], mesh__fsdp=mesh[1]), 5, jax.devices())
    np.testing.assert_allclose(losses, reference_losses[0], rtol=1e-5)
    kernel = state.params["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // mesh[1]
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.shape == kernel.shape]
    assert moments
    assert all(m.sharding == kernel.sharding for m in moments)
    assert state.ema["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"].sharding == kernel.sharding


def test_micro_batches_compute_what_the_whole_batch_does(reference_losses):
    with mock.patch.object(step, "make_network", wraps=make_network) as made:
        losses, _ = run_steps(tiny.config(pretrain__micro_batches=4, pretrain__remat=True), 5)
    assert made.call_args.kwargs["remat"], "a setting of the stage"
    np.testing.assert_allclose(losses, reference_losses[0], rtol=1e-5)


def test_randomness_belongs_to_the_example_not_to_its_row():
    config = tiny.config()
    batch = next(TrainingData(config.data).batches(batch_size=8, seed=0))
    order = np.random.RandomState(0).permutation(8)
    key = jax.random.key(0)
    draw = jax.jit(functools.partial(draw_inputs, config, "pretrain"))
    straight, shuffled = draw(key, batch), draw(key, {name: rows[order] for name, rows in batch.items()})
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), straight, shuffled)
    assert len(set(straight.t.tolist())) > 4
    assert len(np.unique(straight.eps[:, 0, 0])) == 8, "images do not share their noise"
    assert len(np.unique(straight.positions, axis=0)) > 4
    other = draw(jax.random.key(1), batch)
    assert (other.t != straight.t).any()
    assert (other.positions != straight.positions).any()


def test_labels_are_dropped_at_the_rate_asked_for():
    config = tiny.config(data__label_dropout=0.25)
    batch = next(TrainingData(config.data).batches(batch_size=1000, seed=0))
    inputs = draw_inputs(config, "pretrain", jax.random.key(0), batch)
    dropped = np.asarray(inputs.labels) == -1
    assert 0.2 < dropped.mean() < 0.3
    np.testing.assert_array_equal(np.asarray(inputs.labels)[~dropped], batch["label"][~dropped])


def test_the_same_batch_is_seen_afresh_at_every_step():
    jitted, state, batches, mesh = setup(tiny.config())  # with warm-up, the first step has the rate 0
    batch = sharding.to_global(mesh, next(batches))
    batches.close()
    before = jax.tree.map(np.asarray, state.params)
    state, first = jitted(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    _, second = jitted(state, batch)
    assert first["loss"] != second["loss"]


def test_inputs_are_the_visible_patches_of_the_image():
    config = tiny.config(data__flip=0.0)
    batch = next(TrainingData(config.data).batches(batch_size=8, seed=0))
    inputs = draw_inputs(config, "pretrain", jax.random.key(0), batch)
    assert inputs.x0.shape == inputs.eps.shape == (8, 8, 4)
    for image, patches, positions in zip(batch["image"], inputs.x0, inputs.positions, strict=True):
        for patch, position in zip(patches, positions, strict=True):
            row, column = divmod(int(position), 4)
            expected = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1) / 127.5 - 1
            np.testing.assert_allclose(patch, expected, atol=1e-6)
    whole = draw_inputs(config, "finetune", jax.random.key(0), batch)
    assert whole.positions is None
    assert whole.x0.shape == (8, 16, 4)
    mirrored = draw_inputs(tiny.config(data__flip=1.0), "finetune", jax.random.key(0), batch)
    turned = dict(batch, image=batch["image"][:, :, ::-1])
    again = draw_inputs(config, "finetune", jax.random.key(0), turned)
    np.testing.assert_array_equal(mirrored.x0, again.x0)


def params_of(folder, which="params"):
    found = checkpoint.find(folder)
    config = config_lib.parse(checkpoint.load_meta(found)["config"])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(ONE[0])),
        make_network(config).abstract_params(),
    )
    return jax.tree.map(np.asarray, checkpoint.load_item(found, which, abstract))


def history(workdir):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in logs.read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An undisturbed run of both stages."""
    workdir = tmp_path_factory.mktemp("whole")
    last = train(tiny.config(), workdir, devices=ONE)
    assert last == workdir / "checkpoints" / "6"
    return workdir


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole_run_with_means(tmp_path_factory):
    """The same with metrics averaged over windows of three steps, which a stop cuts in two."""
    workdir = tmp_path_factory.mktemp("means")
    train(tiny.config(log__every=3), workdir, devices=ONE)
    return workdir


@pytest.mark.parametrize(("stop_after", "log_every"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (2, 3), (5, 3)])
def test_resumed_runs_equal_undisturbed_ones_bit_for_bit(
    whole_run, whole_run_with_means, tmp_path, monkeypatch, stop_after, log_every
):
    """Stopped after any step, in either stage, with checkpoints every second step."""
    whole_run = whole_run if log_every == 1 else whole_run_with_means
    config, workdir = tiny.config(log__every=log_every), tmp_path / "stopped"
    real, count = sharding.to_global, 0

    def dies(*args):
        nonlocal count
        count += 1
        if count > stop_after:
            raise Stop
        return real(*args)

    monkeypatch.setattr(sharding, "to_global", dies)
    with pytest.raises(Stop):
        train(config, workdir, devices=ONE)
    monkeypatch.setattr(sharding, "to_global", real)
    train(config, workdir, devices=ONE)
    assert history(workdir) == history(whole_run)
    for which in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, params_of(workdir, which), params_of(whole_run, which))


@pytest.mark.parametrize("steps", [2, 100])
def test_a_profile_is_taken(tmp_path, monkeypatch, steps):
    """Of some steps, or of those that there are; it changes nothing."""
    monkeypatch.setattr(loop, "WARM_UP", 1)
    train(tiny.config(stages=("pretrain",)), tmp_path, devices=ONE, profile=steps)
    assert (tmp_path / "log.txt").read_text().count("profile from step 2 on: ") == 1
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    marked = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert marked == ({"2", "3"} if steps == 2 else {"2", "3", "4"})


def test_a_run_leaves_everything_behind(whole_run, caplog):
    assert [line["step"] for line in logs.read_metrics(whole_run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    first = logs.read_metrics(whole_run / "metrics.jsonl")[0]
    assert first.keys() == {
        "step", "loss", "grad_norm", "learning_rate", "images_per_second", "waiting_for_data", "visible_patches",
        "stage",
    }  # fmt: skip
    assert (first["stage"], first["visible_patches"], first["learning_rate"]) == ("pretrain", 8, 0)
    assert (whole_run / "samples" / "step_0000004.png").exists(), "at the end of each stage"
    assert (whole_run / "samples" / "step_0000006.png").exists()
    assert config_lib.parse(json.loads((whole_run / "config.json").read_text())) == tiny.config()
    log = (whole_run / "log.txt").read_text()
    for said in ("start: fresh weights, seed 3", "Total: ", "8 of 16 patches visible", "done in ", "metrics.jsonl"):
        assert said in log
    before = history(whole_run)
    train(tiny.config(), whole_run, devices=ONE)
    assert "nothing left to do" in (whole_run / "log.txt").read_text()
    assert history(whole_run) == before


def test_checkpoints_kept_are_the_newest_and_the_end_of_each_stage(whole_run):
    assert sorted(int(p.name) for p in (whole_run / "checkpoints").iterdir()) == [4, 6]


def test_a_stage_starts_from_raw_weights_with_a_new_optimizer_and_ema(tmp_path):
    with mock.patch.object(step, "ema_step_size", return_value=0.5):  # so that the EMA is not the weights
        source = train(tiny.config(stages=("pretrain",)), tmp_path / "run", devices=ONE)
    raw, ema = params_of(source), params_of(source, "ema")
    differ = jax.tree.map(lambda a, b: (a != b).any(), raw, ema)
    assert any(jax.tree.leaves(differ))
    config = tiny.config(stages=("finetune",), init_from=str(source), finetune__learning_rate=0.0)
    last = train(config, tmp_path / "next", devices=ONE)
    for which in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, params_of(last, which), raw)
    state = checkpoint.load_state(last, abstract_state(config, 0, make_network(config), make_run_mesh(config, ONE)))
    assert max(int(leaf) for leaf in jax.tree.leaves(state.opt_state) if not leaf.shape) == 2, "steps of the optimizer"
    assert f"start: weights of {source}" in (tmp_path / "next" / "log.txt").read_text()


def test_weights_that_do_not_fit_are_refused_by_name(whole_run, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run folder"):
        train(tiny.config(init_from=str(tmp_path)), tmp_path / "c", devices=ONE)
    shutil.copytree(whole_run, tmp_path / "other")  # whose checkpoint is not of its config
    path = tmp_path / "other" / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["model"] |= dict(patch_size=4, time_mlp=False)
    path.write_text(json.dumps(meta))
    config = tiny.config(init_from=str(tmp_path / "other"), model__patch_size=4, model__time_mlp=False)
    shapes = r"do not fit config.model: head.bias is \(4,\) float32 there and \(16,\) float32 here"
    with pytest.raises(CheckpointError, match=f"{shapes}.*; unknown to this model: backbone.time_mlp.fc1.bias; and 3 "):
        train(config, tmp_path / "a", devices=ONE)


@pytest.mark.parametrize(
    ("setting", "value", "flag"),
    [
        ("model__heads", 4, "--config.model.heads=2"),
        ("model__width", 32, "--config.model.width=16"),
        ("diffusion__schedule", "linear", "--config.diffusion.schedule=cosine"),
        ("diffusion__objective", "x0", "--config.diffusion.objective=noise"),
        ("diffusion__timesteps", 500, "--config.diffusion.timesteps=1000"),
    ],
)
def test_weights_trained_for_other_settings_are_refused(whole_run, tmp_path, setting, value, flag):
    """Shapes do not show them: the run would start worse and say nothing."""
    named = f"was trained with {setting.replace('__', '.')} .* {re.escape(f'(now {value}); take its settings: {flag}')}"
    with pytest.raises(ConfigError, match=named):
        train(tiny.config(init_from=str(whole_run), **{setting: value}), tmp_path, devices=ONE)
    with pytest.raises(ConfigError, match=named):
        train(tiny.config(**{setting: value}), whole_run, devices=ONE)


def test_labels_keep_their_meaning(caplog):
    config = tiny.config(model__num_classes=2)

    def check(theirs, ours):
        start.check_trained_for(config, ours, dict(config=config_lib.to_dict(config), classes=theirs), "runs/mine")

    check(["cat", "dog"], ["cat", "dog"])
    with pytest.raises(ConfigError, match=r"the classes cat, dog; the data has dog, cat.*classes=\"\('cat', 'dog'\)\""):
        check(["cat", "dog"], ["dog", "cat"])
    with pytest.raises(ConfigError, match="would mean other classes; give data with the original class names"):
        check(["cat", "dog"], ["cat", "hound"])
    assert not caplog.text
    check(["0", "1"], ["cat", "dog"])  # a converted file knows no names
    assert "0, 1; the data has cat, dog, numbered in this order: make sure" in caplog.text


def test_a_run_folder_of_other_stages_is_refused(whole_run):
    with pytest.raises(ConfigError, match="use the stages of that run, or another --workdir"):
        train(tiny.config(pretrain__steps=3), whole_run, devices=ONE)
    with pytest.raises(ConfigError, match="use the stages of that run"):
        train(tiny.config(stages=("finetune",)), whole_run, devices=ONE)
    with pytest.raises(ConfigError, match="is at step 2 of stage 'finetune', but config.finetune.steps is 1"):
        train(tiny.config(finetune__steps=1), whole_run, devices=ONE)


def test_a_history_without_its_checkpoints_is_not_overwritten(tmp_path):
    config = tiny.config()
    start.check_history(config, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3, "lo')
    start.check_history(config, tmp_path)  # killed before the first checkpoint was complete
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ConfigError, match="goes to step 3, but there is no checkpoint beside it; give another"):
        start.check_history(config, tmp_path)
    seldom = tiny.config(checkpoint__every=10, pretrain__steps=10)  # as it was until now
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(seldom)))
    start.check_history(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.json").write_text('{"lr": 1}')
    with pytest.raises(ConfigError, match=r"config.json is not of a run of this project \(config.lr is not a setting"):
        start.check_history(config, tmp_path)


@pytest.mark.parametrize("folder", ["file", "file/run", "link", "~nobody-has-this-name/run"])
def test_a_workdir_that_cannot_be_a_folder_is_a_wrong_setting(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(
        ConfigError, match=f"--workdir={folder}: (.*/(file|link) is not a|there is no such home) folder"
    ):
        loop.run_folder(folder)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(whole_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    (workdir / "checkpoints" / "99").mkdir()  # an empty folder is no checkpoint
    (workdir / "checkpoints" / "6" / "params" / "manifest.ocdbt").unlink()
    train(tiny.config(), workdir, devices=ONE)
    assert history(workdir) == history(whole_run)
    assert "checkpoints/6 is damaged (params has 0 of 54 arrays)" in (workdir / "log.txt").read_text()
    checkpoint.check(workdir / "checkpoints" / "6")  # saved again, in spite of the empty folder


def test_a_run_goes_on_with_what_the_advice_after_divergence_changes(whole_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    changes = dict(finetune__learning_rate=5e-4, finetune__clip_norm=0.0, finetune__steps=3, model__dtype="bfloat16")
    train(tiny.config(**changes), workdir, devices=ONE)
    assert [line["step"] for line in logs.read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    log = (workdir / "log.txt").read_text()
    assert "the config changed since that checkpoint: finetune.learning_rate: 0.001 -> 0.0005" in log
    assert "finetune.clip_norm: 1.0 -> 0.0" in log


@pytest.mark.parametrize(("bad_step", "checkpoint_step"), [(1, None), (4, 2)])
def test_a_non_finite_loss_stops_the_run(tmp_path, monkeypatch, bad_step, checkpoint_step):
    real, count = sharding.to_global, 0

    def poisoned(mesh, batch):
        nonlocal count
        count += 1
        return real(mesh, batch)

    monkeypatch.setattr(sharding, "to_global", poisoned)
    honest = loop.compile_step

    def compile_poisoned(*args):
        compiled = honest(*args)

        def poisoned_step(state, batch):
            state, metrics = compiled(state, batch)
            bad = jnp.float32(jnp.nan) if count >= bad_step else metrics["loss"]
            return state, metrics | {"loss": bad}

        poisoned_step.memory_analysis = compiled.memory_analysis
        return poisoned_step

    monkeypatch.setattr(loop, "compile_step", compile_poisoned)
    with pytest.raises(NonFiniteLoss) as error:
        train(tiny.config(), tmp_path, devices=ONE)
    said = str(error.value)
    assert f"step {bad_step} (pretrain, step {bad_step}) is not finite: loss nan" in said
    assert "--config.pretrain.learning_rate (now 0.001)" in said
    expected = (
        "there is no checkpoint yet"
        if checkpoint_step is None
        else str(tmp_path / "checkpoints" / str(checkpoint_step))
    )
    assert expected in said
    assert f"ended by NonFiniteLoss: {said}" in (tmp_path / "log.txt").read_text()
    assert checkpoint.Checkpoints(tmp_path, keep=2).latest() == checkpoint_step, "what diverged was not saved"


def test_a_checkpoint_comes_before_what_may_take_hours(tmp_path):
    """A kill during an evaluation must not cost the steps before it."""

    def evaluate(at):
        raise TimeoutError(f"killed at {at.step}")

    evaluate.every = 2
    config = tiny.config(checkpoint__every=2)
    with pytest.raises(TimeoutError, match="killed at 2"):
        loop.train(config, TrainingData(config.data), tmp_path, make_hooks=lambda run: (evaluate,), devices=ONE)
    assert checkpoint.Checkpoints(tmp_path, keep=2).latest() == 2


def test_classes_and_devices_must_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"digits has 10 classes \(0, 1, .*\).*pass --config.model.num_classes=10"):
        train(tiny.config(model__num_classes=7), tmp_path, devices=ONE)
    with pytest.raises(ConfigError, match="pretrain.batch_size 8 in 2 micro-batches does not divide over 8 devices"):
        train(tiny.config(pretrain__micro_batches=2), tmp_path)
    with pytest.raises(ConfigError, match="mesh data=3 x fsdp=1 are not 8 devices"):
        train(tiny.config(mesh__data=3), tmp_path)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_a_network_too_narrow_for_its_patches_is_told():
    told = lambda config: [line for line in run.warnings_of(config) if "too narrow" in line]
    (line,) = told(tiny.config(model__patch_size=8))
    assert "a patch has 64 values but config.model.width is only 16" in line
    assert not told(tiny.config())
    assert not told(tiny.config(model__patch_size=8, diffusion__objective="x0"))
    (line,) = told(tiny.config(**tiny.JIT, model__patch_size=4, model__depth=3))
    assert "a patch has 16 values but config.model.jit.bottleneck is only 4" in line


def test_bfloat16_trains(reference_losses):
    losses, state = run_steps(tiny.config(model__dtype="bfloat16"), 3)
    expected = reference_losses[0][:3]
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert losses != expected
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.ema)))
