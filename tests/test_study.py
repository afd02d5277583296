"""Studies: equal budgets, nothing done twice, honest tables."""

import dataclasses
import functools
import json
import os
import runpy
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import study
import study_report
import tiny
from denoising import denoising_by_level
from ml_collections import ConfigDict
from PIL import Image

from maskdm_jax.build import make_network
from maskdm_jax.data.images import save_png
from maskdm_jax.data.sources import Digits, select
from maskdm_jax.errors import ConfigError, DataError
from maskdm_jax.sampling import as_loaded
from maskdm_jax.training import loop

JUDGE = """
import numpy as np
calls = []
def features(images, batch):
    assert all(image.dtype == np.uint8 for image in images)
    return np.stack([image.reshape(-1) / 255 for image in images])
frechet = lambda a, b: float(np.abs(a.mean(0) - b.mean(0)).sum())
kid = lambda a, b: 1.0
manifold = lambda a, b: dict(precision=0.5, recall=0.25)
"""


def leg(share, points=1, **settings):
    return dict(share=share, points=points, data="digits", settings=settings)


def hidden(share, points=1):
    return leg(share, points, **{"train.mask.kind": "patch", "train.mask.rate": 0.5})


def make(*runs, **changes):
    """A study of tiny networks on the digits."""
    base = tiny.raw(model__num_classes=0, data__labels=False, data__fraction=0.9, stages=("train",), log__every=16)
    base["train"] = dict(base.pop("finetune"))
    del base["pretrain"]
    c = ConfigDict(dict(base=base, sets=dict(digits="digits", copy="digits"), budget=dict(flops=1e9, seconds=1.0)))
    c.judged = dict(samples=8, on="digits", held_out=5, levels=2)
    c.runs = runs or (
        dict(name="unmasked", seeds=(0, 1), legs=(leg(1.0, 2),)),
        dict(name="half hidden", seeds=(0, 1), legs=(hidden(0.5), leg(0.5))),
        dict(name="slower", seeds=(1,), legs=(hidden(0.5, 0), leg(0.5, **{"train.learning_rate": 1e-4}))),
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
        *(("unmasked", 1), ("half hidden", 1), ("slower", 1)),
    ]
    for run in planned:
        last = run.legs[-1]
        assert sum(leg.flops * leg.stage.steps for leg in run.legs) == pytest.approx(1e9, rel=0.06)
        assert last.before[0] + last.flops * last.stage.steps == pytest.approx(1e9, rel=0.06)
        assert all(leg.config.seed == run.seed for leg in run.legs)
    unmasked, half = planned[0].legs, planned[1].legs
    assert unmasked[0].points == (unmasked[0].stage.steps // 2, unmasked[0].stage.steps)
    assert 1.5 < unmasked[0].flops / half[0].flops < 2.2, "half the patches, and the time token"
    assert half[1].before == (half[0].flops * half[0].stage.steps, half[0].stage.steps * 8)
    assert all(point % leg.config.checkpoint.every == 0 for run in planned for leg in run.legs for point in leg.points)


def test_the_budget_may_be_seconds(tmp_path, monkeypatch):
    asked = []
    runs = study.plan(make(), unit="seconds", seconds_of=lambda config, key: asked.append(key) or 1 / 640)
    assert {sum(leg.stage.steps for leg in run.legs) for run in runs} == {640}
    config = runs[0].legs[0].config
    seconds = (
        study.StepSeconds(tmp_path / "seconds.json")("any", "x") if False else study.StepSeconds(tmp_path / "s.json")
    )
    found = seconds(config, "here")
    assert 0 < found < 10
    monkeypatch.setattr(train, "jit_step", None)  # nothing is measured again
    assert study.StepSeconds(tmp_path / "s.json")(config, "here") == found


def test_legs_are_known_by_what_decides_their_weights(planned):
    keys = {(run.name, run.seed): [leg.key for leg in run.legs] for run in planned}
    assert keys["half hidden", 1][0] == keys["slower", 1][0], "the same training"
    every = [key for those in keys.values() for key in those]
    assert len(set(every)) == len(every) - 1
    elsewhere = {"sets.digits": "~/digits", "base.data.threads": 3, "base.log.every": 7, "base.sampling.steps": 2}
    elsewhere |= {"judged.samples": 9}
    assert [leg.key for run in study.plan(make(**elsewhere)) for leg in run.legs] == every
    for changed in ({"base.train.learning_rate": 0.5}, {"base.data.fraction": 0.8}, {"budget.flops": 2e9}):
        few = make(dict(name="half hidden", seeds=(1,), legs=(hidden(0.5), leg(0.5))), **changed)
        others = {leg.key for run in study.plan(few) for leg in run.legs}
        assert not others & set(every)


def test_what_cannot_be_planned_is_named():
    def fails(match, *legs, **changes):
        with pytest.raises(ConfigError, match=match):
            study.plan(make(dict(name="mine", seeds=(0,), legs=legs), **changes))

    fails(r"run 'mine': its legs have 0.75 of the budget together; it must be 1", leg(0.75))
    fails("run 'mine', leg 1: .*no_such", leg(1.0, **{"train.no_such": 1}))
    fails("run 'mine', leg 1: .*learning_rate", leg(1.0, **{"train.learning_rate": "high"}))
    fails(r"leg 1: there is no set 'cats' in config.sets, only \['copy', 'digits'\]", leg(1.0) | dict(data="cats"))
    fails("leg 2: a share of 0.0001 pays for fewer than 4 steps", leg(0.9999), leg(0.0001))
    fails("config.budget.flops is -1", leg(1.0), **{"budget.flops": -1.0})
    fails("leg 1: config.train.mask: mask rate 2.0", leg(1.0, **{"train.mask.kind": "patch", "train.mask.rate": 2.0}))


@pytest.fixture(scope="module")
def one_device():
    """Training on one device: eight virtual ones share two cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", functools.partial(loop.train, devices=jax.devices()[:1]))
        yield


def run_study(runs, folder, results, settings=None):
    said = []
    study.run_study(runs, settings or make(), folder, results, str(folder / "judge.py"), say=said.append)
    return said


@pytest.fixture(scope="module")
def done(tmp_path_factory, planned, one_device):
    """Folder, results and output of what one seed does."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "judge.py").write_text(JUDGE)
    results = study.Results(folder / "res" / "mine.jsonl")
    return folder, results, run_study(planned[2:], folder, results)


def test_every_point_is_judged_once(done, planned):
    folder, results, said = done
    rows, (unmasked, half, _) = results.rows(), planned[2:]
    assert [(row["run"], row["leg"]) for row in rows] == [
        *(("unmasked", 1), ("unmasked", 1), ("half hidden", 1), ("half hidden", 2), ("slower", 2))
    ]
    assert said[0] == "run 1 of 3: unmasked, seed 1"
    assert sum("FLOPs: fd " in text for text in said) == len(rows)
    first = rows[0]
    assert first["step"] == unmasked.legs[0].points[0]
    assert first["flops"] == first["step"] * unmasked.legs[0].flops
    assert first["images"] == 8 * first["step"]
    assert first["judged"]["judge"] == "judge"
    assert len(first["denoising"]) == 2
    assert first["train_seconds"] > 0
    assert rows[1]["train_seconds"] > first["train_seconds"]
    assert rows[3]["images"] - rows[2]["images"] == 8 * half.legs[1].stage.steps
    assert rows[3]["train_seconds"] > rows[2]["train_seconds"]
    with Image.open(results.pictures / "half_hidden_1.png") as picture:
        assert picture.size == (8 * 8, 8)
    legs = {leg.key for run in planned[2:] for leg in run.legs}
    assert {path.name for path in (folder / "legs").iterdir()} == legs, "the leg of two runs was trained once"


def test_what_is_done_is_not_done_again(done, planned, monkeypatch, tmp_path):
    """And a lost result of an end is judged anew without training."""
    folder, results, _ = done
    monkeypatch.setattr(train, "train", None)
    with monkeypatch.context() as patch:
        patch.setattr(study, "Judge", None)
        said = run_study(planned[2:], folder, results)
    assert len(said) == 3
    assert all("done before" in text for text in said)
    rows, again = results.rows(), study.Results(tmp_path / "again.jsonl")
    for row in rows[:-1]:
        again.add(row)
    run_study(planned[2:], folder, again)
    same = lambda row: {key: value for key, value in row.items() if key not in ("train_seconds", "date", "commit")}
    assert same(again.rows()[-1]) == same(rows[-1])
    # Judged otherwise, all is judged anew, but only what is still there can be.
    with pytest.raises(ConfigError, match=r"is at step \d+, but step \d+ has no result and its checkpoint is gone"):
        run_study(planned[2:], folder, results, make(**{"judged.samples": 4}))


def test_stopped_in_a_leg_it_ends_as_if_nothing_had_been(done, planned, monkeypatch, tmp_path):
    _, results, _ = done
    original, calls = loop.train, []

    def stopping(config, workdir):
        calls.append(workdir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(config, workdir)

    (tmp_path / "judge.py").write_text(JUDGE)
    again = study.Results(tmp_path / "again.jsonl")
    monkeypatch.setattr(train, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(planned[2:3], tmp_path, again)
    assert len(again.rows()) == 1
    run_study(planned[2:3], tmp_path, again)
    values = lambda rows: [(row["key"], row["step"], row["fd"], row["denoising"]) for row in rows]
    assert values(again.rows()) == values(results.rows()[:2])


def test_a_judge_that_cannot_work_is_named_before_training(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train", None)
    results = study.Results(tmp_path / "results.jsonl")
    with pytest.raises(ConfigError, match="--judge=nowhere.py: there is no such file"):
        study.run_study(planned, make(), tmp_path, results, "nowhere.py", say=lambda text: None)
    (tmp_path / "poor.py").write_text("features = frechet = None")
    with pytest.raises(ConfigError, match="poor.py has no kid, manifold"):
        study.run_study(planned, make(), tmp_path, results, str(tmp_path / "poor.py"), say=lambda text: None)
    everything = make(dict(name="greedy", seeds=(0,), legs=(leg(1.0, **{"data.fraction": 1.0}),)))
    with pytest.raises(DataError, match="a fraction of 1.0 leaves none of 1797 images out"):
        study.run_study(study.plan(everything), everything, tmp_path, results, "poor.py", say=lambda text: None)


def test_the_report_says_what_ranges_allow(planned, tmp_path):
    """Results put in by hand: one run better in every seed, one with a single seed."""
    values = {("unmasked", 0): 10.0, ("unmasked", 1): 12.0, ("half hidden", 0): 8.0, ("half hidden", 1): 9.0}
    rows, pictures = [], tmp_path / "pictures"
    judged = dict(samples=2000, on="digits", judge="inception", held_out=5)
    about = dict(judged=judged, commit="abc", device="1 x cpu", images=10**6, train_seconds=90.0)
    for run in planned:
        for leg in run.legs:
            for step in leg.points:
                row = dict(key=leg.key, step=step, denoising=[0.5, 0.25], date=f"2026-01-0{run.seed + 1}")
                rows.append(about | row | dict(fd=values.get((run.name, run.seed), 11.0), kid=1.0))
        if (run.name, run.seed) != ("half hidden", 0):  # the next seed's stands in
            save_png(pictures / study.picture_name(run.name, run.seed), Image.new("RGB", (96, 16)))
    text = study_report.write(planned, rows, tmp_path, pictures, "python launch/study.py")
    assert "| half hidden | 2 | 8.5 (8.0-9.0) | 1.00 (1.00-1.00) | 0.3750 (0.3750-0.3750) | 1.00 | 2 (2-2) |" in text
    said = "Fréchet distance -22.7% (ranges apart), held-out loss +0.0% (ranges overlap)"
    assert f"- half hidden, against unmasked: {said}" in text
    assert "- slower, against unmasked: Fréchet distance +0.0% (one seed)" in text
    assert "judged on digits by inception" in text
    assert "commit abc; 1 x cpu; 2026-01-01 to 2026-01-02." in text
    assert (tmp_path / "table.md").read_text() == text
    for name, size in (("curves.png", (1430, 506)), ("samples.png", (192, 3 * (32 + 26)))):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == size
    with pytest.raises(ConfigError, match="no run of this study has all its results yet"):
        study_report.write(planned, rows[:1], tmp_path, pictures, "")


def test_denoising_by_level():
    """0 for who knows the image, 1 for who says nothing; the same noise in any batch."""
    config = tiny.config(model__num_classes=0, data__labels=False)
    network = make_network(config)
    images = np.full((5, 8, 8, 1), 255, np.uint8)
    loaded = as_loaded(config, network, jax.jit(network.init)(jax.random.key(0)), [], {}, "nowhere")

    def said(apply, **options):
        stub = dataclasses.replace(loaded, network=Stub(apply))
        return denoising_by_level(stub, images, levels=4, **options)

    class Stub:
        cast = staticmethod(lambda params: params)

        def __init__(self, apply):
            self.apply = apply

    from maskdm_jax.diffusion.gaussian import at, make_schedule

    schedule = make_schedule("cosine", 1000)

    def knows(params, x_t, t):
        a = at(schedule.alpha_bar, t, x_t.ndim)
        return (x_t - jnp.sqrt(a)) / jnp.sqrt(1 - a)

    np.testing.assert_allclose(said(knows), 0, atol=1e-4)
    silent = said(lambda params, x_t, t: jnp.zeros_like(x_t))
    np.testing.assert_allclose(silent, 1, atol=0.25)
    assert len(set(silent)) == 4
    echo = lambda params, x_t, t: x_t
    assert np.all(np.diff(said(echo)) < 0), "the noisier, the more of it is noise"
    np.testing.assert_allclose(said(echo, batch_size=2), said(echo, batch_size=64), rtol=1e-6)
    assert not np.allclose(said(echo, seed=1), said(echo), rtol=1e-3)


def test_the_rest_of_a_selection():
    source = Digits()
    part, rest = (select(source, (), 0.9, 3, False, rest=rest) for rest in (False, True))
    assert len(part) == 1617
    assert sorted([*part.names, *rest.names]) == sorted(source.names)
    assert len(select(source, (), 0.5, 3, False, rest=True)) > len(rest)
    with pytest.raises(DataError, match=r"a fraction of 1.0 leaves none of 1797 images out"):
        select(source, rest=True)


@pytest.mark.parametrize("name", ["convergence", "transfer", "rates"])
def test_the_studies_on_emoji_can_be_planned(root, monkeypatch, name):
    monkeypatch.setattr(study.cost, "of_rows", lambda *args: (1e9, 0.0))  # counting takes seconds for every leg
    config = runpy.run_path(str(root / "experiments" / "emoji32.py"))["get_config"](name)
    runs = study.plan(config)
    assert len({(run.name, run.seed) for run in runs}) == len(runs) >= 8
    for run in runs:
        assert run.legs[-1].points[-1] == run.legs[-1].stage.steps, "the end is judged"
        flops = sum(leg.flops * leg.stage.steps for leg in run.legs)
        assert flops == pytest.approx(config.budget.flops, rel=1e-3)


def test_from_the_command_line(root, child_env, tmp_path):
    """The studies on emoji, in little: a set of noise, a small budget."""
    noise = np.random.default_rng(0)
    for i in range(20):
        save_png(tmp_path / "set" / f"{i}.png", Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)))
    (tmp_path / "judge.py").write_text(JUDGE)
    command = [sys.executable, str(root / "launch" / "study.py"), f"--workdir={tmp_path / 'runs'}"]
    command += [f"--config={root / 'experiments' / 'emoji32.py'}:convergence", f"--judge={tmp_path / 'judge.py'}"]
    command += [f"--config.sets.noto={tmp_path / 'set'}", "--config.budget.flops=3e9", "--config.base.model.width=16"]
    command += ["--config.base.train.batch_size=2", "--config.judged.samples=4", "--config.base.sampling.steps=2"]

    def run(*args, check=True):
        env = child_env | {"MASKDM_CACHE": str(tmp_path / "cache")}
        return subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=300, check=check)

    plan = run("--only=half*shorter", "--seeds=0", "--dry_run").stdout
    assert "half hidden, shorter, seed 0" in plan
    assert "50% hidden, block 2, judged at" in plan
    assert not (tmp_path / "runs").exists(), "a dry run leaves nothing behind"
    done = run("--only=unmasked*rate", "--seeds=0")
    assert done.stdout.count("unmasked, lower rate, seed 0 at ") == 2
    rows = [json.loads(line) for line in (tmp_path / "runs" / "convergence.jsonl").read_text().splitlines()]
    assert [row["leg"] for row in rows] == [1, 1]
    report = run("--only=unmasked*rate", "--report=" + os.fspath(tmp_path / "report"))
    assert "| unmasked, lower rate | 1 |" in report.stdout
    assert shlex.split(report.stdout.splitlines()[-2]) == ["python", *command[1:], "--only=unmasked*rate"]
    wrong = run("--only=x*", check=False)
    assert wrong.returncode == 1
    assert "--only and --seeds leave no run; this study has unmasked; half hidden; 90-50-0; " in wrong.stderr


def test_swiss_roll(root, child_env, tmp_path):
    args = [sys.executable, str(root / "experiments" / "swiss_roll.py"), "--steps=64", "--primer=64", "--seeds=2"]
    args += [f"--out={tmp_path / 'roll.png'}"]
    done = subprocess.run(args, env=child_env, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    scratch, primed = (np.array(values) for values in result["distances"].values())
    assert result["marks"] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert scratch.shape == primed.shape == (8, 2)
    assert primed[0].max() < scratch[0].min(), "the primer is nearer than nothing"
    assert 0 < result["floor"] < primed.min()
    with Image.open(tmp_path / "roll.png") as picture:
        assert picture.size == (1300, 420)


def test_the_primer_shares_marginals_alone(root):
    import importlib.util

    spec = importlib.util.spec_from_file_location("swiss_roll", root / "experiments" / "swiss_roll.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    roll, primer = (np.asarray(draw(jax.random.key(0), 20_000)) for draw in (module.swiss_roll, module.primer))
    np.testing.assert_allclose(np.sort(primer, 0), np.sort(roll, 0), atol=0.1)
    radius = lambda points: np.hypot(*points.T)
    assert np.quantile(radius(roll), 0.001) > 0.6, "the roll has a hole"
    assert np.quantile(radius(primer), 0.01) < 0.6
    jax.clear_caches()
