import io
import sys
import types
from unittest import mock

import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax import config as config_lib
from maskdm_jax import run
from maskdm_jax.data.images import sample_grid, save_png
from maskdm_jax.errors import ConfigError
from maskdm_jax.training import logs

CONFIG = tiny.config()


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = logs.Metrics(tmp_path, CONFIG, step=0)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": step / 3, "stage": "pretrain"})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    metrics = logs.Metrics(tmp_path, CONFIG, step=2)
    metrics.write(3, {"loss": 9.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in logs.read_metrics(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 9.0)]


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    metrics = logs.Metrics(tmp_path, tiny.config(log__tensorboard=True), step=0)
    metrics.write(1, {"loss": 0.5, "stage": "pretrain"})
    save_png(tmp_path / "a.png", Image.new("L", (4, 4)))
    metrics.image(1, "samples", tmp_path / "a.png")
    metrics.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in written
    assert b"samples" in written


@pytest.mark.parametrize(("setting", "package"), [("log__wandb", "wandb"), ("log__tensorboard", "tensorboardX")])
def test_a_logger_must_be_installed_if_wanted(monkeypatch, setting, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        run.check(tiny.config(**{setting: True}))


def test_each_run_folder_has_a_wandb_id_of_its_own(tmp_path, monkeypatch):
    asked = []
    wandb = types.SimpleNamespace(init=lambda **options: asked.append(options) or mock.Mock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny.config(log__wandb=True)
    for folder in ("a/demo", "b/demo", "c/lr:1e-4", "a/demo"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        logs.Metrics(tmp_path / folder, config, step=0).close()
    ids = [options["id"] for options in asked]
    assert ids[0] == ids[3], "resumed"
    assert len(set(ids)) == 3
    assert all(text.isalnum() for text in ids)
    assert [options["name"] for options in asked[:3]] == ["demo", "demo", "lr:1e-4"]
    assert asked[0]["config"] == config_lib.to_dict(config)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (90061, "25h01m")]
)
def test_duration(seconds, text):
    assert logs.duration(seconds) == text


def test_grid_shows_every_image_in_its_place():
    images = np.zeros((6, 64, 64, 3), np.uint8)
    images[4] = 200
    page = np.asarray(sample_grid(images, 3))
    assert page.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    assert (page[68 + 4 : 2 * 68, 68 + 4 : 2 * 68] == 200).all()
    assert (page[4:68, 4:68] == 0).all()
    named = np.asarray(sample_grid(images, 3, ["cat", "a name that is far too long for a margin"]))
    assert named.shape[1] > page.shape[1]
    assert (named[:, -page.shape[1] :] == page).all()


def test_small_images_are_enlarged():
    page = sample_grid(np.zeros((1, 8, 8, 1), np.uint8), 1)
    assert page.size == (72, 72)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "grid.png"
    save_png(path, Image.new("L", (4, 4), 7))

    class Breaks:
        def save(self, target, format):
            target.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(path, Breaks())
    assert np.asarray(Image.open(path))[0, 0] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_rate_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    rate = logs.Rate()
    now[0] = 5.0
    with rate.paused():
        now[0] = 105.0
    with rate.waiting(lambda: True):
        now[0] = 106.0
    with rate.waiting(lambda: False):  # the device was busy meanwhile
        now[0] = 110.0
    assert rate.read(10) == pytest.approx((1.0, 0.1))
    now[0] = 111.0
    assert rate.read(0) == (0.0, 0.0)


def test_progress_on_a_terminal_is_a_bar_and_without_one_lines(monkeypatch, tmp_path, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, bar in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(logs.sys, "stderr", stream)
        with logs.logging_to(tmp_path):
            progress = logs.Progress("pretrain", step=1, steps=3)
            progress.numbers(2, "loss 0.5")
            progress.mininterval = 0
            progress.update()
            progress.close()
        shown = stream.getvalue()
        assert ("| 2/3 loss 0.5" in shown) == bar, shown
        assert ("pretrain 2/3 loss 0.5" in shown) != bar, shown
    assert (tmp_path / "log.txt").read_text().count("pretrain 2/3 loss 0.5") == 2, "the file has the lines either way"
