"""Preflight checks: what they report, and that they change nothing."""

import contextlib
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.errors import CheckpointError, ConfigError, DataError, EvaluationError, PreflightError
from maskdm_jax.run import check_processes, open_training_data, train, warnings_of
from maskdm_jax.tools import preflight
from maskdm_jax.training import checkpoint

CHANGES = dict(stages=("finetune",), model__depth=1)  # of one block: quick to compile
CONFIG = tiny.config(**CHANGES)


def examined(config, workdir):
    lines = {}

    def say(name, passed, text):
        lines[name] = (passed, text)

    return preflight.examine(config, workdir, say), lines


def test_a_healthy_run(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "step_seconds", lambda *_, times: [30.0])
    config = tiny.config(pretrain__batch_size=8, checkpoint__keep=2, model__depth=1)
    fine, lines = examined(config, tmp_path / "run")
    assert fine, lines
    assert all(passed for passed, _ in lines.values())
    assert lines["config"][1].endswith(
        "pretrain 4 steps of 8 images, 50% visible; finetune 2 steps of 8 images, 100% visible"
    )
    assert lines["devices"][1] == "8 x cpu in 1 processes, as data 8 x fsdp 1; a sum over all of them is correct"
    assert "1,797 images in 10 classes from digits; 200 of them, evenly spread" in lines["data"][1]
    assert lines["start"] == (True, "the run would start fresh")
    assert "GiB per device, compiled in" in lines["memory, finetune"][1]
    assert lines["memory, finetune"][1].endswith("; 30 s per step: 1m00s if data keeps up")
    assert not (tmp_path / "run").exists(), "nothing was created"


def test_batches_of_worker_processes_fit_into_shared_memory(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 << 10))
    config = tiny.config(data__workers=2, pretrain__batch_size=1024)
    data = TrainingData(config.data)
    with pytest.raises(DataError, match="/dev/shm has 0.1 MiB free.* need 0.4; .*--config.data.workers=0"):
        preflight._data(config, data)
    with pytest.raises(DataError, match="/dev/shm has 0.1 MiB free"):
        next(data.batches(batch_size=1024, seed=0))
    assert preflight._data(tiny.config(data__workers=2), data)


@pytest.mark.parametrize(
    ("counts", "same", "message"),
    [
        ([1797, 1797], True, None),
        (
            [1797, 5],
            False,
            "the processes see different images or labels .images by process: 1,797, 5; here 1797 images from digits",
        ),
        ([1797, 1797], False, "the processes see different images or labels"),
        ([1797, -1], True, "process 1 cannot open the images"),
    ],
)
def test_all_processes_must_see_the_same_images(monkeypatch, counts, same, message):
    def gather(value):
        return np.array(counts) if np.ndim(value) == 0 else np.stack([value, value if same else value[::-1]])

    monkeypatch.setattr(preflight.processes, "gather", gather)
    with pytest.raises(DataError, match=message) if message else contextlib.nullcontext():
        open_training_data(tiny.config())


def test_all_processes_must_have_the_same_settings(monkeypatch):
    """Each compiles its own program: with another learning rate, the copies of the weights would drift apart."""

    def check(theirs):
        other = json.dumps(json.loads(seen[1].tobytes()) | theirs).encode().ljust(10_000)
        gather = lambda array: (
            np.array([10_000, 1]) if array.ndim == 0 else np.stack([array, np.frombuffer(other, "u1")])
        )
        monkeypatch.setattr(preflight.processes, "gather", gather)
        check_processes(CONFIG, "runs/x")

    seen = []
    monkeypatch.setattr(preflight.processes, "gather", lambda array: seen.append(array) or np.asarray(array)[None])
    check_processes(CONFIG, "runs/x")
    check({})
    with pytest.raises(
        ConfigError, match="process 1 differs from process 0 .JAX: .* -> 0.1; seed: 3 -> 4.; start all with"
    ):
        check(dict(seed=4, JAX="0.1"))


def test_settings_that_nobody_wants_are_named():
    assert not warnings_of(tiny.config(pretrain__warmup_steps=0, finetune__warmup_steps=0))
    config = tiny.config(
        preview__every=10_000,
        checkpoint__every=5000,
        pretrain__steps=2000,
        pretrain__ema_law="plain",
        pretrain__ema_decay=0.999,
        pretrain__more_ema_decays=(0.9999,),
        pretrain__warmup_steps=1000,
        pretrain__learning_rate=2.0,
        finetune__mask__rate=0.5,
    )
    routed = tiny.config(model__outer_blocks=1, sampling__weak="sparse", pretrain__mask__kind="none")
    assert warnings_of(routed)[:2] == [
        "model.outer_blocks=1 has no effect in training: nothing is hidden",
        "sampling.weak=sparse has no effect: sampling.guidance is 0",
    ]
    details = tiny.config(
        **tiny.WAVELET,
        model__outer_blocks=1,
        sampling__guidance_from=0.8,
        sampling__guidance_to=0.2,
        pretrain__mask__kind="none",
        pretrain__detail_mask=dict(kind="patch", rate=0.5),
    )
    assert warnings_of(details)[0] == (
        "guidance has no effect from sampling.guidance_from=0.8 to sampling.guidance_to=0.2"
    )
    assert not details.untrained("sparse")
    assert warnings_of(config) == [
        "preview.every=10000 is beyond the end: each stage has one preview, at its end",
        "checkpoint.every=5000 is beyond the end: a failure loses a whole stage",
        "pretrain.warmup_steps=1000 is more than a third of its 2000 steps",
        "pretrain.learning_rate=2 is unusual; recipes have 1e-5 to 2e-3",
        "82% of the EMA at the end of pretrain still come from the weights of step 0: lower "
        "0.9999 in pretrain.more_ema_decays or pretrain.ema_every=1, or train longer",
        "finetune.warmup_steps=2 is more than a third of its 2 steps",
        "finetune.mask.rate has no effect: finetune.mask.kind is 'none'",
    ]


def test_long_emas_are_told_by_their_law():
    """The decay of the reference's law rises slowly, so that its memory is always shorter than the run."""
    told = lambda **stage: [
        line
        for line in warnings_of(tiny.config(**{f"pretrain__{k}": v for k, v in stage.items()}))
        if "pretrain" in line
    ]
    common = dict(steps=500, warmup_steps=0)
    assert not told(**common, ema_decay=0.999)
    assert not told(**common, ema_law="plain", ema_decay=0.9979), "35% are below 1 / e"
    assert "61% of the EMA" in told(**common, ema_law="plain", ema_decay=0.999)[0]
    assert told(**common, ema_decay=0.999, more_ema_decays=(0.9999,)) == [
        "0.9999 in pretrain.more_ema_decays has no effect: in 500 steps, the law 'reference' gives an equal EMA twice"
    ]
    assert not told(**common, ema_decay=0.9, more_ema_decays=(0.9999,))


def test_settings_that_a_choice_ignores_are_named(tmp_path):
    config = tiny.config(
        data__labels=False,
        data__label_dropout=0.1,
        model__num_classes=0,
        diffusion__process="flow",
        diffusion__objective="x0",
        diffusion__loss_weight_gamma=1.0,
        diffusion__edm__mean=0.0,
        model__jit__dropout=0.1,
        sampling__method="heun",
        sampling__eta=0.5,
        pretrain__mask=dict(kind="patch", rate=0.5, crop=2),
    )
    assert [line for line in warnings_of(config) if "no effect" in line] == [
        "data.label_dropout=0.1 has no effect: data.labels is False",
        "diffusion.edm has no effect: diffusion.process is 'flow'",
        "diffusion.loss_weight_gamma has no effect: diffusion.process is 'flow'",
        "model.jit has no effect: model.network is 'uvit'",
        "sampling.eta has no effect: sampling.method is 'heun'",
        "pretrain.mask.crop has no effect: pretrain.mask.kind is 'patch'",
    ]
    own = dict(model__network=f"{tmp_path}/own.py:Own", model__jit__dropout=0.1)
    assert not [line for line in warnings_of(tiny.config(**own)) if "model.jit" in line], "it may use any setting"


def test_every_failure_is_named_and_stops_no_other_check(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
    gather = lambda value: np.array([value, value + 7.5]) if isinstance(value, float) else np.asarray(value)[None]
    monkeypatch.setattr(preflight.processes, "gather", gather)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    too_much = types.SimpleNamespace(memory=1 << 50, limit=None)
    monkeypatch.setattr(preflight.cost, "training_step", lambda *_: too_much)
    changes = dict(data__path=str(tmp_path / "images"), data__labels=False, model__num_classes=0)
    changes |= dict(evaluation__every=1, evaluation__inception_weights="nowhere")
    fine, lines = examined(tiny.config(**changes), tmp_path / "run")
    said = {name: text for name, (passed, text) in lines.items() if not passed}
    assert said.keys() == {"clocks", "data", "evaluation", "folder", "memory, pretrain", "memory, finetune"}
    assert "clocks are 7.5 s apart" in said["clocks"]
    assert "4 of 4 images are unreadable, more than 1% (0.png: not an image of a known kind" in said["data"]
    assert "nowhere" in said["evaluation"]
    assert "0.0 GB free, but the checkpoints" in said["folder"]
    assert "raise config.pretrain.micro_batches" in said["memory, pretrain"]
    fine, lines = examined(tiny.config(mesh__data=3), tmp_path / "run")
    assert not fine
    assert [name for name, (_, text) in lines.items() if "mesh data=3" in text] == ["devices"], "said once"


def test_a_reference_that_evaluation_cannot_use_is_found_before_training(inception_weights, tmp_path):
    def check(width, **changes):
        path = tmp_path / "statistics.npz"
        np.savez(path, mu=np.zeros(width), sigma=np.eye(width))
        changes |= dict(evaluation__every=1, evaluation__reference=str(path))
        config = tiny.config(evaluation__inception_weights=str(inception_weights), **changes)
        return preflight._evaluation(config, lambda: open_training_data(config))

    assert check(128).endswith("weights and reference fit")
    with pytest.raises(EvaluationError, match=r"mu \(4,\) and sigma \(4, 4\) are not of 128 features"):
        check(4)
    with pytest.raises(EvaluationError, match="statistics.npz holds statistics alone"):
        check(128, evaluation__metrics=("kid",), evaluation__n=1000)


def test_images_are_opened_once_and_judged_as_in_training(inception_weights, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (5, 5)).save(tmp_path / "images" / f"{i}.png")
    opened = []
    monkeypatch.setattr(preflight, "open_training_data", lambda config: opened.append(1) or open_training_data(config))
    monkeypatch.setattr(preflight.cost, "training_step", lambda *_: types.SimpleNamespace(memory=1 << 50, limit=None))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(128), sigma=np.eye(128))
    changes = dict(data__path=str(tmp_path / "images"), data__channels=3, data__labels=False, model__num_classes=0)
    changes |= dict(evaluation__every=1, evaluation__inception_weights=str(inception_weights))
    changes |= dict(evaluation__reference=str(tmp_path / "statistics.npz"))
    lines = examined(tiny.config(**changes), tmp_path / "run")[1]
    assert lines["data"][1].endswith(
        "0 unreadable; 3 of 3 images read are smaller than 8 x 8 pixels, so they are enlarged"
    )
    assert lines["evaluation"][0]
    assert len(opened) == 1
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    passed, text = examined(tiny.config(**changes), tmp_path / "run")[1]["data"]
    assert not passed
    assert "1 of 3 images are unreadable, more than 1%" in text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(CONFIG, workdir, devices=jax.devices()[:1])
    return workdir


def test_a_run_folder_is_checked_without_being_touched(run, tmp_path):
    data = TrainingData(CONFIG.data)
    assert preflight._start(CONFIG, run, data) == "the run would resume from step 2"
    with pytest.raises(ConfigError, match="2 was trained with model.width 16 .now 32.; take its settings"):
        preflight._start(tiny.config(**CHANGES, model__width=32), run, data)
    with pytest.raises(ConfigError, match="is at step 2 of stage 'finetune', but config.finetune.steps is 1"):
        preflight._start(tiny.config(**CHANGES, finetune__steps=1), run, data)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "2" / "ema" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="2 is damaged"):
        preflight._start(CONFIG, tmp_path / "run", data)
    with pytest.raises(PreflightError, match="/proc cannot be written to; give another --workdir|/proc has 0"):
        preflight._folder(CONFIG, pathlib.Path("/proc/x"))


def test_weights_are_compared_with_config_and_data_before_training(run, tmp_path, monkeypatch):
    start = tiny.config(**CHANGES, init_from=str(run))
    text = preflight._start(start, tmp_path / "new", TrainingData(CONFIG.data))
    assert text == f"the run would start from the weights of {run / 'checkpoints' / '2'}"
    fewer = tiny.config(**CHANGES, data__fraction=0.5)
    lines = preflight._start(fewer, run, TrainingData(fewer.data)).split("; ")
    assert lines == [
        "the run would resume from step 2",
        "the data changed (1797 images then, 898 now): the shuffle order differs",
        "the config changed since that checkpoint: data.fraction: 1.0 -> 0.5",
    ]
    nowhere = tiny.config(**CHANGES, init_from="nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        preflight._start(nowhere, tmp_path / "new", TrainingData(CONFIG.data))
    meta = checkpoint.load_meta(run / "checkpoints" / "2") | dict(classes=list("abcdefghij"))
    monkeypatch.setattr(checkpoint, "load_meta", lambda path: meta)
    for config, workdir in ((CONFIG, run), (start, tmp_path / "new")):
        with pytest.raises(ConfigError, match="2 was trained on the classes a, b, .*; the data has 0, 1, "):
            preflight._start(config, workdir, TrainingData(CONFIG.data))
