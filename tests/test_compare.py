"""launch/compare.py: one page about several runs."""

import json
import re

import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax.config import to_dict
from maskdm_jax.errors import EvaluationError
from maskdm_jax.tools import compare
from maskdm_jax.tools.cost import count_flops


def fake_run(folder, lines, grid=True, **changes):
    """A run folder as training leaves it."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(tiny.config(**changes))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if grid:
        for step in (4, 6):
            Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"step_{step:07d}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    lines = [{"step": step, "loss": 1 / step, "images_per_second": 10.0 * step} for step in range(1, 7)]
    a = fake_run(root / "a", [*lines, {"step": 6, "eval/fd_lite0": 12.5, "eval/kid_lite0_std": 0.1}])
    b = fake_run(root / "b" / "a", lines[:4], pretrain__mask__rate=0.75, model__dtype="float32")
    return a, b


def test_page(runs, tmp_path):
    compare.compare(runs, tmp_path / "page.html", "python launch/compare.py a b/a")
    page = (tmp_path / "page.html").read_text()
    text = re.sub(r"<[^>]*>", "|", page)
    assert "a (1), a (2)" in text
    assert "eval/" not in text
    assert "|fd_lite0|" in text
    assert "|12.5|" in text
    rows = dict(re.findall(r"\|pretrain\.mask\.rate\|\|([\d.]+)\|\|([\d.]+)\|", text))
    assert rows == {"0.5": "0.75"}
    assert "|model.dtype|" in text
    assert "model.width" not in text
    assert "begin with the same noise" in text
    assert page.count("<img") == 3
    assert text.count("step 6") == 2
    assert not re.search(r'(src|href)="(?!data:)', page), "it loads nothing"


def test_images_and_flops_along_a_run(runs):
    run = compare._open(runs[0])
    assert run.borders() == [4]
    assert run.flops["pretrain"] < run.flops["finetune"]
    assert run.flops["pretrain"] == count_flops(run.config, "pretrain", 8), "of a batch: AdamW's count once"
    assert run.along(3) == (24, 3 * run.flops["pretrain"])
    assert run.along(6) == (48, 4 * run.flops["pretrain"] + 2 * run.flops["finetune"])
    np.testing.assert_array_equal(run.points("images_per_second")[:, 1], 10.0 * np.arange(1, 7))


def test_what_cannot_be_compared(runs, tmp_path):
    empty = fake_run(tmp_path / "empty", [], grid=False)
    for folders, message in (
        ([runs[0], tmp_path / "nothing"], "nothing is no run folder that can be compared"),
        ([runs[0], empty], "empty has no metrics yet"),
        ([runs[0]] * 9, "9 runs are too many"),
    ):
        with pytest.raises(EvaluationError, match=message):
            compare.compare(folders, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_runs_that_begin_with_other_noise(runs, tmp_path):
    other = fake_run(tmp_path / "c", [{"step": 1, "loss": 1.0}], seed=4, diffusion__objective="x0")
    compare.compare([runs[0], other], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "begin with different noise" in page
    assert "Losses of different processes or objectives cannot be compared" in page
