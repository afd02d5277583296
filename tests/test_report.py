"""The report page: what it shows, and that nothing in it comes from elsewhere."""

import html.parser
import io
import json

import numpy as np
import pytest

from maskdm_jax.evaluation import report
from maskdm_jax.evaluation.features import Images, ImageSet
from maskdm_jax.evaluation.metrics import Moments


def image_set(name, n, seed, features=True, card=None, made_by=None):
    rng = np.random.RandomState(seed)
    pixels = rng.randint(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    images = Images(name, n, None, lambda i: pixels[i], card or {}, made_by or {})
    x = rng.standard_normal((n, 2048)).astype(np.float32)
    moments = Moments(n, x.mean(0), np.eye(2048))
    return ImageSet(images, moments, x if features else None, None, tuple(pixels[:64]))


CARD = dict(source="faces <b>", split="train", count=30, content_hash="ab" * 32, image=dict(size=8, crop="centre"))
RESULT = dict(reference="/data/<script>", reference_n=30, samples="/runs/mine/checkpoints/7, seed 0", n=20)
RESULT |= dict(reference_card=CARD, made_by={"checkpoint": "/runs/mine/checkpoints/7", "seed": 0}, fid=12.345678)
RESULT |= dict(kid=0.00123, kid_std=0.0001, precision=0.5, recall=0.25)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    lines = [{"step": s, "loss": 1 / s, "grad_norm": 1.0, "learning_rate": 0.1, "stage": "a<"} for s in range(1, 3000)]
    lines += [{"step": s, "eval/fid": 100 - s / 100} for s in (1000, 2000)]
    lines += [{"step": 7, "loss": None, "grad_norm": "x"}, {"loss": 1.0}, [], 3]  # none of them ours
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_page_shows_everything_and_loads_nothing(run, tmp_path):
    path = tmp_path / "deep" / "report.html"
    sets = image_set("a", 30, 0), image_set("b", 20, 1, card=CARD)
    report.write_report(path, RESULT, *sets, run=run, command="python launch/evaluate.py --x='<y>'")
    page = Page(path.read_text())
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    # two grids, for each of ten samples itself and eight neighbours, and the curves
    assert len(page.sources) == 2 + 10 * 9 + 1
    for text in ("12.35", "1.23", "± 0.1", "0.25", "mine, step 7", "20 samples against 30 images of faces <b> (train)"):
        assert text in page.text, text
    for text in ("ab" * 32, "/data/<script>", "a< to step 2,999", "--x='<y>'", "centre"):
        assert text in page.text, text
    assert len(path.read_text()) < 3e6, "noise does not compress; pictures take half"


def test_several_seeds_show_their_range(tmp_path):
    several = RESULT | dict(seeds=[0, 1], range=dict(fid=[11.5, 13.25], kid=[0, 1], precision=[0, 1], recall=[0, 1]))
    report.write_report(tmp_path / "r.html", several, image_set("a", 9, 0), image_set("b", 9, 1))
    assert "11.5 to 13.2, 2 seeds" in Page((tmp_path / "r.html").read_text()).text


def test_statistics_have_no_neighbours(tmp_path):
    statistics = ImageSet(Images("s.npz", 0, None), Moments(0, np.zeros(3), np.eye(3)))
    result = RESULT | dict(reference_n=0, reference_card={}, reference="/x/s.npz")
    report.write_report(tmp_path / "r.html", result, statistics, image_set("b", 9, 1))
    page = Page((tmp_path / "r.html").read_text())
    assert "Nearest" not in page.text
    assert "against statistics of s.npz" in page.text


def test_nearest_finds_the_copy():
    rng = np.random.RandomState(0)
    reference = rng.standard_normal((100, 16)).astype(np.float32)
    samples = np.concatenate([reference[[42]], rng.standard_normal((3, 16)).astype(np.float32)])
    order, distances = report.nearest(samples, reference, 5)
    brute = np.linalg.norm(samples[:, None].astype(float) - reference[None], axis=-1)
    np.testing.assert_array_equal(order, np.argsort(brute, axis=1)[:, :5])
    np.testing.assert_allclose(distances, np.sort(brute, axis=1)[:, :5], atol=1e-6)
    assert (order[0, 0], round(distances[0, 0], 6)) == (42, 0)


def lines_of(points, key="loss"):
    return [{"step": step, key: value} for step, value in points]


def test_curves_go_where_the_numbers_are():
    """Of each curve its title and scale; what is no number is left out, and so is a curve of one point."""
    points = [(0, 1.0), (50, 10.0), (100, 100.0)]
    lines = [*lines_of(points), *lines_of(points, "eval/fid"), {"step": 7, "loss": None, "eval/fid": "x"}, {"step": 8}]
    lines += lines_of([(3, 0.1)], "learning_rate")
    fid, loss = report.draw_curves(lines).axes
    for axis, title, scale in [(fid, "FID during training", "linear"), (loss, "Loss", "log")]:
        assert (axis.get_title(loc="left"), axis.get_yscale()) == (title, scale)
        np.testing.assert_array_equal(axis.lines[0].get_xydata(), points)
        assert axis.lines[0].get_marker() == "o", "few points show"
    assert report.draw_curves([]) is None


def test_long_flat_and_negative_curves_can_be_drawn():
    (axis,) = report.draw_curves(lines_of((i, 1 + i % 7) for i in range(12_345))).axes
    drawn = axis.lines[0].get_xydata()
    assert drawn.shape == (1000, 2)
    assert drawn[:, 1].mean() == pytest.approx(4, abs=0.01), "means, not every twelfth point"
    assert drawn[:, 1].std() < 1
    for flat, scale in [
        ([(1, 0.0), (2, 0.0)], "linear"),
        ([(5, 1e-9), (5, 1e-9)], "log"),
        ([(0, -1.0), (1, 3e8)], "linear"),
    ]:
        figure = report.draw_curves(lines_of(flat))
        figure.savefig(io.BytesIO(), format="png")
        assert figure.axes[0].get_yscale() == scale
        assert np.isfinite(figure.axes[0].get_ylim()).all()
