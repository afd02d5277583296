"""Studies: equal budgets, nothing done twice, honest tables."""

import dataclasses
import functools
import io
import json
import math
import os
import runpy
import shlex
import subprocess
import sys
import tarfile
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import study
import study_report
import swiss_roll
import tiny
from denoising import denoising_by_level
from ml_collections import ConfigDict
from PIL import Image

from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network, make_sampler
from maskdm_jax.data.images import save_png
from maskdm_jax.data.sources import Digits, select
from maskdm_jax.diffusion.gaussian import at, make_schedule
from maskdm_jax.errors import ConfigError, DataError
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.run import train
from maskdm_jax.sampling import TrainedModel, load
from maskdm_jax.training import checkpoint
from maskdm_jax.training.start import abstract_state

BUDGET = 3e8
EVALUATOR = """
import numpy as np
def features(images, batch):
    assert all(image.dtype == np.uint8 for image in images)
    return np.stack([image.reshape(-1) / 255 for image in images])
frechet = lambda a, b: float(np.abs(a.mean(0) - b.mean(0)).sum())
kid = lambda a, b: 1.0
manifold = lambda a, b: dict(precision=0.5, recall=0.25)
"""


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """Counting the FLOPs of a step takes a second; equal settings are counted once."""
    count, known = study.cost.count_flops, {}

    def cached(config, name, images):
        key = study.phase_key(dataclasses.replace(config, seed=0), "", "")
        if key not in known:
            known[key] = count(config, name, images)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.cost, "count_flops", cached)
        yield


def phase(share, points=1, **settings):
    return dict(share=share, points=points, data="digits", settings=settings)


def hidden(share, points=1):
    return phase(share, points, **{"train.mask.kind": "patch", "train.mask.rate": 0.5})


def make(*runs, **changes):
    """A study of tiny networks on the digits."""
    base = tiny.raw(model__num_classes=0, data__labels=False, data__fraction=0.9, stages=("train",), log__every=16)
    base["model"] |= dict(depth=1, time_mlp=False, qv_bias=False)  # quick to compile
    base["train"] = dict(base.pop("finetune"), ema_law="plain")  # the EMA differs from the weights at once
    del base["pretrain"]
    c = ConfigDict(dict(base=base, sets=dict(digits="digits", copy="digits"), budget=dict(flops=BUDGET, seconds=1.0)))
    c.evaluation = dict(samples=8, on="digits", held_out=5, levels=2)
    c.runs = runs or (
        dict(name="unmasked", seeds=(0, 1), phases=(phase(1.0, 2),)),
        dict(name="half hidden", seeds=(0, 1), phases=(hidden(0.5), phase(0.5))),
        # Other images, but the same compiled program.
        dict(name="fewer images", seeds=(1,), phases=(hidden(0.5, 0), phase(0.5, **{"data.fraction": 0.5}))),
    )
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def planned():
    return study.plan(make())


def test_every_run_has_the_same_budget(planned):
    assert [(run.name, run.seed) for run in planned] == [
        *(("unmasked", 0), ("half hidden", 0)),
        *(("unmasked", 1), ("half hidden", 1), ("fewer images", 1)),
    ]
    for run in planned:
        last = run.phases[-1]
        assert sum(phase.flops * phase.stage.steps for phase in run.phases) == pytest.approx(BUDGET, rel=0.06)
        assert last.before[0] + last.flops * last.stage.steps == pytest.approx(BUDGET, rel=0.06)
        assert all(phase.config.seed == run.seed for phase in run.phases)
    unmasked, half = planned[0].phases, planned[1].phases
    assert unmasked[0].points == (unmasked[0].stage.steps // 2, unmasked[0].stage.steps)
    assert 1.5 < unmasked[0].flops / half[0].flops < 2.2, "half the patches, and the time token"
    assert half[1].before == (half[0].flops * half[0].stage.steps, half[0].stage.steps * 8)
    phases = [phase for run in planned for phase in run.phases]
    assert all(point % phase.config.checkpoint.every == 0 for phase in phases for point in phase.points)


def test_the_budget_may_be_seconds(tmp_path, monkeypatch):
    runs = study.plan(make(), unit="seconds", seconds_of=lambda config, key: 1 / 640)
    assert {sum(phase.stage.steps for phase in run.phases) for run in runs} == {640}
    masked = make(dict(name="a", seeds=(0,), phases=(hidden(0.5), phase(0.5) | dict(continues=True))))
    price = lambda config, key: 1 / (640 if config.stage[config.stages[0]].mask.kind == "none" else 1280)
    (run,) = study.plan(masked, unit="seconds", seconds_of=price)
    assert [phase.stage.steps for phase in run.phases] == [640, 320], "each by its own mask"
    config = runs[0].phases[0].config
    found = study.StepSeconds(tmp_path / "seconds.json")(config, "here")
    assert 0 < found < 10
    monkeypatch.setattr(study, "step_seconds", None)  # nothing is measured again
    assert study.StepSeconds(tmp_path / "seconds.json")(config, "here") == found


def test_phases_are_known_by_what_decides_their_weights(planned):
    keys = {(run.name, run.seed): [phase.key for phase in run.phases] for run in planned}
    assert keys["half hidden", 1][0] == keys["fewer images", 1][0], "the same training"
    every = [key for those in keys.values() for key in those]
    assert len(set(every)) == len(every) - 1
    elsewhere = {"sets.digits": "~/digits", "base.data.threads": 3, "base.log.every": 7, "base.sampling.steps": 2}
    elsewhere |= {"evaluation.samples": 9}
    assert [phase.key for run in study.plan(make(**elsewhere)) for phase in run.phases] == every
    for changed in ({"base.train.learning_rate": 0.5}, {"base.data.fraction": 0.8}, {"budget.flops": 2 * BUDGET}):
        few = make(dict(name="half hidden", seeds=(1,), phases=(hidden(0.5), phase(0.5))), **changed)
        others = {phase.key for run in study.plan(few) for phase in run.phases}
        assert not others & set(every)


def test_a_new_setting_is_part_of_a_key_where_it_is_used(planned):
    """So that a setting added to the package leaves recorded results valid."""
    config = planned[0].phases[0].config
    newer = dataclasses.make_dataclass("Model", [("invented", int, 7)], bases=(config_lib.Model,), frozen=True)
    keys = [
        study.phase_key(dataclasses.replace(config, model=model), "digits", "")
        for model in (config.model, newer(**vars(config.model)), newer(**vars(config.model), invented=8))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_what_cannot_be_planned_is_named():
    def fails(match, *phases, only="*", **changes):
        with pytest.raises(ConfigError, match=match):
            study.plan(make(dict(name="mine", seeds=(0,), phases=phases), **changes), only=only)

    fails(r"run 'mine': its phases have 0.75 of the budget together; it must be 1", phase(0.75))
    fails("run 'mine', phase 1: .*no_such", phase(1.0, **{"train.no_such": 1}))
    fails("run 'mine', phase 1: .*learning_rate", phase(1.0, **{"train.learning_rate": "high"}))
    fails(r"phase 1: there is no set 'cats' in config.sets, only \['copy', 'digits'\]", phase(1.0) | dict(data="cats"))
    fails("phase 2: a share of 0.0001 pays for fewer than 4 steps", phase(0.9999), phase(0.0001))
    fails("phase 2: a share of -0.5 pays for fewer than 4 steps", phase(1.5), phase(-0.5))
    fails("phase 1: .* too few for -1 points", phase(1.0, -1))
    fails("phase 1: config.model.num_classes must be 0", phase(1.0, **{"model.num_classes": 10, "data.labels": True}))
    fails("config.budget.flops is -1", phase(1.0), **{"budget.flops": -1.0})
    fails("phase 1: .*mask rate 2.0", phase(1.0, **{"train.mask.kind": "patch", "train.mask.rate": 2.0}))
    fails("phase 1: the first phase continues none", phase(1.0) | dict(continues=True))
    other = phase(0.5, **{"train.learning_rate": 0.5}) | dict(continues=True)
    fails("phase 2: .*train2.learning_rate is 0.5; it must be 0.001 as in train", phase(0.5), other)
    other = phase(0.5, **{"diffusion.objective": "x0"}) | dict(continues=True)
    fails("phase 2: it continues the phase before, whose config.model and config.diffusion", phase(0.5), other)
    fails("phase 1: a phase has no continued", phase(1.0) | dict(continued=True))
    with pytest.raises(ConfigError, match="two runs of config.runs have one name: mine, mine"):
        study.plan(make(*(dict(name="mine", seeds=(0,), phases=(phase(1.0),)) for _ in range(2))))
    fails(r"--only and --seeds leave no run; this study has mine; seeds \[0\]", phase(1.0), only="x*")


@pytest.fixture(scope="module")
def one_device():
    """Training on one device: eight virtual ones share two cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", functools.partial(train, devices=jax.devices()[:1]))
        yield


def run_study(runs, folder, results, settings=None):
    lines = []
    study.run_study(runs, settings or make(), folder, results, str(folder / "evaluator.py"), say=lines.append)
    return lines


@pytest.fixture(scope="module")
def done(tmp_path_factory, planned, one_device):
    """Folder, results and output of the runs of one seed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "evaluator.py").write_text(EVALUATOR)
    results = study.Results(folder / "res" / "mine.jsonl")
    return folder, results, run_study(planned[2:], folder, results)


def test_the_ema_is_evaluated_on_images_that_no_run_trains_on(done, planned):
    folder, results, _ = done
    phase, row = planned[-1].phases[-1], results.rows()[-1]
    trained_on, held_out = (select(Digits(), (), 0.9, 0, rest=rest) for rest in (False, True))
    assert not set(trained_on.names) & set(held_out.names)
    images = np.stack([held_out.image(i) for i in range(5)])
    of = lambda weights: load(folder / "phases" / phase.key / "checkpoints" / str(row["step"]), weights=weights)
    ema, raw = (denoising_by_level(of(weights), images, levels=2) for weights in ("ema", "params"))
    np.testing.assert_allclose(row["denoising"], ema, atol=1e-6)
    assert np.abs(raw - ema).min() > 1e-4


def test_seconds_of_phases_that_continue(tmp_path):
    phases = hidden(0.5, 0), phase(0.5) | dict(continues=True)
    (run,) = study.plan(make(dict(name="continued", seeds=(1,), phases=phases)))
    first, last = run.phases
    for one, rates in (
        (first, {first.stage.steps: 2.0}),
        (last, {first.stage.steps + 10: 4.0, first.stage.steps + 20: 8.0}),
    ):
        folder = tmp_path / "phases" / one.key
        folder.mkdir(parents=True)
        lines = [json.dumps(dict(step=step, images_per_second=rate)) for step, rate in rates.items()]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    images = lambda steps: 8 * steps
    expected = images(first.stage.steps) / 2 + images(10) / 4
    assert study._seconds(tmp_path, run, 1, 10) == pytest.approx(expected)


def test_a_line_that_was_not_finished_costs_no_other(tmp_path):
    results = study.Results(tmp_path / "results.jsonl")
    results.add(dict(step=1))
    with results.path.open("a") as file:
        file.write('{"step": 2')
    results.add(dict(step=3))
    results.add(dict(step=4))
    assert [row["step"] for row in results.rows()] == [1, 3, 4]


def test_every_point_is_evaluated_once(done, planned):
    folder, results, lines = done
    rows, (unmasked, half, _) = results.rows(), planned[2:]
    assert [(row["run"], row["leg"]) for row in rows] == [
        *(("unmasked", 1), ("unmasked", 1), ("half hidden", 1), ("half hidden", 2), ("fewer images", 2))
    ]
    assert lines[0] == "run 1 of 3: unmasked, seed 1"
    assert sum("FLOPs: fd " in text for text in lines) == len(rows)
    first = rows[0]
    assert first["step"] == unmasked.phases[0].points[0]
    assert first["flops"] == first["step"] * unmasked.phases[0].flops
    assert first["images"] == 8 * first["step"]
    assert first["judged"]["judge"] == "evaluator"
    assert len(first["denoising"]) == 2
    assert first["train_seconds"] > 0
    assert rows[1]["train_seconds"] > first["train_seconds"]
    assert rows[3]["images"] - rows[2]["images"] == 8 * half.phases[1].stage.steps
    assert rows[3]["train_seconds"] > rows[2]["train_seconds"]
    with Image.open(results.pictures / "half_hidden_1.png") as picture:
        assert picture.size == (8 * 8, 8)
    keys = {phase.key for run in planned[2:] for phase in run.phases}
    assert {path.name for path in (folder / "phases").iterdir()} == keys, "the phase of two runs was trained once"


def test_what_is_done_is_not_done_again(done, planned, monkeypatch, tmp_path):
    """And a lost result of an end is computed again without training."""
    folder, results, _ = done
    monkeypatch.setattr(study, "train", None)
    with monkeypatch.context() as patch:
        patch.setattr(study, "StudyEvaluator", None)
        lines = run_study(planned[2:], folder, results)
    assert len(lines) == 3
    assert all("done before" in text for text in lines)
    rows, again = results.rows(), study.Results(tmp_path / "again.jsonl")
    for row in rows[:-1]:
        again.add(row)
    run_study(planned[2:], folder, again)
    same = lambda row: {key: value for key, value in row.items() if key not in ("train_seconds", "date", "commit")}
    assert same(again.rows()[-1]) == same(rows[-1])
    # With another evaluation, all points are evaluated anew, but only those whose checkpoints remain can be.
    for other in (make(**{"evaluation.samples": 4}), make(**{"base.sampling.steps": 2})):
        with pytest.raises(ConfigError, match=r"is at step \d+, but step \d+ has no result and its checkpoint is gone"):
            run_study(study.plan(other)[2:], folder, results, other)


def test_stopped_in_a_phase_it_ends_like_an_uninterrupted_study(done, planned, monkeypatch, tmp_path):
    _, results, _ = done
    original, calls = study.train, []

    def stopping(config, workdir):
        calls.append(workdir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(config, workdir)

    (tmp_path / "evaluator.py").write_text(EVALUATOR)
    again = study.Results(tmp_path / "again.jsonl")
    monkeypatch.setattr(study, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(planned[2:3], tmp_path, again)
    assert len(again.rows()) == 1
    run_study(planned[2:3], tmp_path, again)
    values = lambda rows: [(row["key"], row["step"], row["fd"], row["denoising"]) for row in rows]
    assert values(again.rows()) == values(results.rows()[:2])


def test_a_phase_that_continues_equals_a_run_of_two_stages(planned, one_device, tmp_path):
    """It keeps optimizer and EMA, and has a key of its own."""
    phases = hidden(0.5, 0), phase(0.5) | dict(continues=True)
    (run,) = study.plan(make(dict(name="continued", seeds=(1,), phases=phases), **{"budget.flops": BUDGET / 3}))
    first, last = run.phases
    assert last.key not in {phase.key for run in planned for phase in run.phases}
    assert last.stage.continues
    assert last.start == first.stage.steps
    folder, results = tmp_path / "study", study.Results(tmp_path / "results.jsonl")
    folder.mkdir()
    (folder / "evaluator.py").write_text(EVALUATOR)
    run_study([run], folder, results)
    study.train(last.config, tmp_path / "run")
    end = f"checkpoints/{first.stage.steps + last.stage.steps}"
    assert (folder / "phases" / last.key / end).exists()
    config, mesh = last.config, make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(config, 1, make_network(config), mesh)
    ours, theirs = (
        checkpoint.load_state(root / end, abstract) for root in (folder / "phases" / last.key, tmp_path / "run")
    )
    jax.tree.map(np.testing.assert_array_equal, *(dataclasses.replace(s, key=0) for s in (ours, theirs)))
    (row,) = results.rows()
    assert row["step"] == last.stage.steps
    assert row["images"] == 8 * (first.stage.steps + last.stage.steps)


def test_an_evaluator_that_cannot_work_is_named_before_training(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "train", None)
    results = study.Results(tmp_path / "results.jsonl")
    with pytest.raises(ConfigError, match="--evaluator=nowhere.py: there is no such file"):
        study.run_study(planned, make(), tmp_path, results, "nowhere.py", say=lambda text: None)
    (tmp_path / "poor.py").write_text("features = frechet = None")
    with pytest.raises(ConfigError, match="poor.py has no kid, manifold"):
        study.run_study(planned, make(), tmp_path, results, str(tmp_path / "poor.py"), say=lambda text: None)
    everything = make(dict(name="greedy", seeds=(0,), phases=(phase(1.0, **{"data.fraction": 1.0}),)))
    with pytest.raises(DataError, match="a fraction of 1.0 leaves none of 1797 images out"):
        study.run_study(study.plan(everything), everything, tmp_path, results, "poor.py", say=lambda text: None)


def test_a_part_of_a_study_holds_out_what_all_runs_hold_out(planned, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(study, "StudyEvaluator", lambda path, settings, configs: seen.extend(configs))
    monkeypatch.setattr(study, "_train_to", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_study(planned[:1], tmp_path, study.Results(tmp_path / "results.jsonl"))
    assert {config.data.fraction for config in seen} == {0.9, 0.5}


def test_the_report_says_what_ranges_allow(planned, tmp_path):
    """Results put in by hand: one run better in every seed, one with a single seed."""
    values = {("unmasked", 0): 10.0, ("unmasked", 1): 12.0, ("half hidden", 0): 8.0, ("half hidden", 1): 9.0}
    rows, pictures = [], tmp_path / "pictures"
    judged = dict(samples=2000, on="digits", judge="inception", held_out=5)
    about = dict(commit="abc", device="1 x cpu", images=10**6, train_seconds=90.0)
    for run in planned:
        for phase in run.phases:
            for step in phase.points:
                row = dict(key=phase.key, step=step, denoising=[0.5, 0.25], date=f"2026-01-0{run.seed + 1}")
                row["judged"] = judged | dict(sampling=phase.sampling)
                rows.append(about | row | dict(fd=values.get((run.name, run.seed), 11.0), kid=1.0))
        if (run.name, run.seed) != ("half hidden", 0):  # the next seed's is shown instead
            save_png(pictures / study.picture_name(run.name, run.seed), Image.new("RGB", (96, 16)))
    text = study_report.write(planned, rows, tmp_path, pictures, "python experiments/run_study.py")
    assert "| half hidden | 2 | 8.5 (8.0-9.0) | 1.00 (1.00-1.00) | 0.3750 (0.3750-0.3750) | 1.00 | 2 (2-2) |" in text
    compared = "Fréchet distance -22.7% (ranges apart), held-out loss +0.0% (ranges overlap)"
    assert f"- half hidden, against unmasked: {compared}" in text
    assert "- fewer images, against unmasked: Fréchet distance +0.0% (one seed)" in text
    assert "compared with digits by inception" in text
    assert "commit abc; 1 x cpu; 2026-01-01 to 2026-01-02." in text
    assert (tmp_path / "table.md").read_text() == text
    for name, size in (("curves.png", (1430, 506)), ("samples.png", (768, 3 * (8 * 16 + 26)))):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == size
    for others in (planned, rows[:1]), (planned, []), (study.plan(make(**{"base.sampling.steps": 2})), rows):
        with pytest.raises(ConfigError, match="no run of this study has all its results yet"):
            study_report.write(*others, tmp_path, pictures, "")


def test_denoising_by_level():
    """Error 0 for a network that knows the image, 1 for one that predicts 0; the same noise in any batch."""
    config = tiny.config(model__num_classes=0, data__labels=False)
    images = np.full((5, 8, 8, 1), 255, np.uint8)

    def errors(apply, **options):
        network = types.SimpleNamespace(apply=apply, cast=lambda params: params)
        loaded = TrainedModel(None, "ema", config, network, {}, [], {}, None)
        return denoising_by_level(loaded, images, levels=4, **options)

    schedule = make_schedule("cosine", 1000)

    def knows(params, x_t, t):
        a = at(schedule.alpha_bar, t, x_t.ndim)
        return (x_t - jnp.sqrt(a)) / jnp.sqrt(1 - a)

    np.testing.assert_allclose(errors(knows), 0, atol=1e-4)
    silent = errors(lambda params, x_t, t: jnp.zeros_like(x_t))
    np.testing.assert_allclose(silent, 1, atol=0.25)
    assert len(set(silent)) == 4
    echo = lambda params, x_t, t: x_t
    assert np.all(np.diff(errors(echo)) < 0), "the noisier, the more of it is noise"
    np.testing.assert_allclose(errors(echo, batch_size=2), errors(echo, batch_size=64), rtol=1e-6)
    assert not np.allclose(errors(echo, seed=1), errors(echo), rtol=1e-3)


def test_the_rest_of_a_selection():
    source = Digits()
    part, rest = (select(source, (), 0.9, 3, False, rest=rest) for rest in (False, True))
    assert len(part) == 1617
    assert sorted([*part.names, *rest.names]) == sorted(source.names)
    assert len(select(source, (), 0.5, 3, False, rest=True)) > len(rest)
    with pytest.raises(DataError, match=r"a fraction of 1.0 leaves none of 1797 images out"):
        select(source, rest=True)


# FLOPs of a step of the recorded studies, by kind, rate and block of the mask and by batch size.
RECORDED_FLOPS = {
    ("none", 0.0, 1, 16): 7251547648.0,
    ("none", 0.0, 1, 32): 14477303808.0,
    ("patch", 0.5, 1, 16): 3559988224.0,
    ("block", 0.5, 2, 16): 3559958528.0,
    ("block", 0.5, 2, 32): 7094186496.0,
    ("block", 0.5, 4, 16): 3559951872.0,
    ("block", 0.75, 2, 16): 1811576448.0,
    ("block", 0.9, 2, 16): 961663616.0,
}


@pytest.mark.parametrize("name", ["convergence", "transfer", "rates"])
def test_the_recorded_studies_on_emoji_are_done(root, monkeypatch, tmp_path, name):
    """Their plans have the recorded keys and costs, so that nothing is trained or evaluated again."""

    def recorded(config, stage, images):
        mask = config.stage[stage].mask
        return RECORDED_FLOPS[mask.kind, mask.rate, mask.block, images]

    monkeypatch.setattr(study.cost, "count_flops", recorded)
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(study, "StudyEvaluator", None)
    config = runpy.run_path(str(root / "experiments" / "emoji32.py"))["get_config"](name)
    runs, results = study.plan(config), study.Results(root / "docs" / "studies" / f"{name}.jsonl")
    lines = []
    study.run_study(runs, config, tmp_path, results, "image_fd.py", say=lines.append)
    assert len({(run.name, run.seed) for run in runs}) == len(runs) == len(lines) >= 8
    assert all("done before" in line for line in lines)
    costs = {(row["key"], row["step"]): row["flops"] for row in results.rows()}
    for run in runs:
        assert run.phases[-1].points[-1] == run.phases[-1].stage.steps, "the end is evaluated"
        flops = sum(phase.flops * phase.stage.steps for phase in run.phases)
        assert flops == pytest.approx(config.budget.flops, rel=1e-3)
        assert costs[run.phases[-1].key, run.phases[-1].stage.steps] == flops


def test_from_the_command_line(root, child_env, tmp_path):
    """The studies on emoji, in little: a set of noise, a small budget."""
    noise = np.random.default_rng(0)
    for i in range(20):
        save_png(tmp_path / "set" / f"{i}.png", Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)))
    (tmp_path / "evaluator.py").write_text(EVALUATOR)
    command = [sys.executable, str(root / "experiments" / "run_study.py"), f"--workdir={tmp_path / 'runs'}"]
    command += [f"--config={root / 'experiments' / 'emoji32.py'}:convergence"]
    command += [f"--evaluator={tmp_path / 'evaluator.py'}", f"--config.sets.noto={tmp_path / 'set'}"]
    command += ["--config.budget.flops=5e8", "--config.base.model.width=16", "--config.base.model.depth=1"]
    command += ["--config.base.train.batch_size=2", "--config.evaluation.samples=4", "--config.base.sampling.steps=2"]

    def run(*args):
        env = child_env | {"MASKDM_CACHE": str(tmp_path / "cache")}
        return subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=300, check=True)

    plan = run("--only=half*shorter", "--seeds=0", "--dry_run").stdout
    assert "half hidden, shorter, seed 0" in plan
    assert "50% hidden, block 2, evaluated at" in plan
    assert not (tmp_path / "runs").exists(), "a dry run leaves nothing behind"
    done = run("--only=unmasked*rate", "--seeds=0")
    assert done.stdout.count("unmasked, lower rate, seed 0 at ") == 2
    rows = [json.loads(line) for line in (tmp_path / "runs" / "convergence.jsonl").read_text().splitlines()]
    assert [row["leg"] for row in rows] == [1, 1]
    report = run("--only=unmasked*rate", "--report=" + os.fspath(tmp_path / "report"))
    assert "| unmasked, lower rate | 1 |" in report.stdout
    assert shlex.split(report.stdout.splitlines()[-2]) == ["python", *command[1:], "--only=unmasked*rate"]


def test_the_study_of_processes_is_planned(root, monkeypatch):
    monkeypatch.setattr(study.cost, "count_flops", lambda config, stage, images: 1e11)
    runs = study.plan(runpy.run_path(str(root / "experiments" / "emoji64.py"))["get_config"]())
    kinds = {(run.phases[0].config.model.network, run.phases[0].config.diffusion.process) for run in runs}
    assert len(runs) == 8
    assert kinds == {(network, process) for network in ("uvit", "jit") for process in ("ddpm", "flow", "edm")}
    for run in runs:
        make_sampler(run.phases[0].config, make_network(run.phases[0].config))


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_study_of_routing_is_fair(root, monkeypatch, size):
    """Every run has the same budget, network and process; phases differ in the mask alone. A method's sparse phase is
    trained once for its three shares of the budget.
    """
    monkeypatch.setattr(study.cost, "count_flops", lambda config, stage, images: 1e11)
    config = runpy.run_path(str(root / "experiments" / "sparse64.py"))["get_config"](size)
    runs, steps = study.plan(config, seeds={0}), config.budget.flops / 1e11
    assert len(runs) == 2 * (1 + 5 * 3)
    trained = {phase.key: phase.stage.steps for run in runs for phase in run.phases}
    assert sum(trained.values()) == pytest.approx(steps * 2 * (1 + 5 * (0.95 + 0.5 + 0.2 + 0.05)), rel=0.01)
    for run in runs:
        assert sum(phase.stage.steps for phase in run.phases) == pytest.approx(steps, rel=0.01)
        models = {phase.config.model for phase in run.phases}
        assert len(models) == 1
        assert len({phase.config.diffusion for phase in run.phases}) == 1
        assert run.phases[-1].stage.mask.kind == "none"
        assert (run.phases[0].stage.mask.kind == "none") == ("dense" in run.name)


def test_other_learning_rates_train_the_same_runs_otherwise(root, monkeypatch):
    monkeypatch.setattr(study.cost, "count_flops", lambda config, stage, images: 1e11)
    get_config = runpy.run_path(str(root / "experiments" / "sparse64.py"))["get_config"]
    other = get_config("cpu")
    other.base.train.learning_rate = 2e-3
    named = {run.name: run for run in study.plan(get_config("rates"), seeds={0})}
    for pattern in ("*, dense", "*, MaskDM 75%, 50% sparse"):
        for run in study.plan(other, seeds={0}, only=pattern):
            same = named[f"{run.name}, 0.002"]
            assert [phase.key for phase in same.phases] == [phase.key for phase in run.phases]
            assert named[f"{run.name}, 0.004"].phases[0].stage.learning_rate == 4e-3
    assert len(named) == 2 * 2 * 2


def test_the_compute_of_dense_training_with_the_same_error(root):
    """With errors that are a power of the FLOPs, one that dense training did not reach, and one that it never had."""
    script = runpy.run_path(str(root / "experiments" / "same_error.py"))
    # Seeds, FLOPs, and a seed's error relative to the average; seed 1 has the same point twice.
    scattered = [(0, 1e13, 1), (0, 1e14, 2), (1, 1e14, 0.5), (1, 1.001e14, 0.5), (0, 4e13, 1)]
    dense = script["averaged"](
        dict(run="dense", seed=seed, flops=flops, denoising=[flops**-0.5 * by, flops**-0.2 * by, flops**-0.5])
        for seed, flops, by in scattered
    )
    found = script["ratios"](dict(flops=1e13, denoising=[2e13**-0.5, 3e14**-0.2, 9e12**-0.5]), dense)
    assert found[0] == pytest.approx(2, rel=1e-3)
    assert found[1:] == [math.inf, 0]
    faster = [dense[0] | dict(denoising=dense[0]["denoising"] * np.array([0.5, 2, 1])), dense[2]]
    both = script["lowest"]([dense, faster])
    assert [point["flops"] for point in both] == [point["flops"] for point in dense]
    np.testing.assert_allclose(both[0]["denoising"], dense[0]["denoising"] * np.array([0.5, 1, 1]))


def test_emoji_archive(root, child_env, tmp_path):
    """From a package with two emoji, one of which has a variation."""
    emoji = [dict(image="a.png", category="People & Body", skin_variations={"1": dict(image="b.png")})]
    emoji.append(dict(image="c.png", category="Flags"))
    red = io.BytesIO()
    Image.fromarray(np.array([[[255, 0, 0, 128], [0, 0, 0, 0]]], np.uint8)).save(red, "PNG")
    packages = {maker: f"--package={tmp_path / maker}.tgz" for maker in ("google", "twitter")}
    for maker in packages:
        files = {"emoji.json": json.dumps(emoji).encode()} | {f"img/{maker}/64/{n}.png": red.getvalue() for n in "abc"}
        with tarfile.open(tmp_path / f"{maker}.tgz", "w:gz") as package:
            for name, content in files.items():
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(content)
                package.addfile(entry, io.BytesIO(content))

    def archive(*args):
        command = [sys.executable, root / "experiments" / "emoji.py", *args, f"--out={tmp_path / 'set.zip'}"]
        subprocess.run(command, env=child_env, check=True)
        return zipfile.ZipFile(tmp_path / "set.zip")

    one = ["people_body/a.png", "people_body/b.png", "flags/c.png"]
    with archive(packages["google"]) as made:
        assert made.namelist() == one
        with Image.open(made.open("flags/c.png")) as image:
            assert np.asarray(image).tolist() == [[[255, 127, 127], [255, 255, 255]]]
    with archive(*packages.values()) as made:
        assert made.namelist() == [f"{maker}_{name}" for maker in packages for name in one]


def test_swiss_roll(root, child_env, tmp_path):
    args = [sys.executable, str(root / "experiments" / "swiss_roll.py"), "--steps=8", "--primer=64", "--seeds=2"]
    args += [f"--out={tmp_path / 'roll.png'}"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    scratch, primed = (np.array(values) for values in result["distances"].values())
    assert result["marks"] == [0, 1, 2, 4, 8]
    assert scratch.shape == primed.shape == (5, 2)
    assert primed[0].max() < scratch[0].min(), "the primer is nearer than nothing"
    assert 0 < result["floor"] < primed.min()
    with Image.open(tmp_path / "roll.png") as picture:
        assert picture.size == (1300, 420)


def test_the_primer_shares_only_marginals():
    roll, primer = (np.asarray(draw(jax.random.key(0), 20_000)) for draw in (swiss_roll.swiss_roll, swiss_roll.primer))
    np.testing.assert_allclose(np.sort(primer, 0), np.sort(roll, 0), atol=0.1)
    radius = lambda points: np.hypot(*points.T)
    assert np.quantile(radius(roll), 0.001) > 0.6, "the roll has a hole"
    assert np.quantile(radius(primer), 0.01) < 0.6
