"""A HTML page of the project: style, images within the page, axes of plots. It loads nothing."""

import base64
import datetime
import html
import io

from matplotlib.figure import Figure
from PIL import Image

import maskdm_jax
from maskdm_jax.storage import write_atomically

GREY = "#808790"  # legible on the white page and on the dark one


def write_page(path, title: str, subtitle: str, sections: list[str], command: str = "") -> None:
    """Write a page; `sections` are HTML, empty ones are left out, the other texts are plain."""
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        body="\n".join(filter(None, sections)),
        footer=html.escape(f"maskdm-jax {maskdm_jax.__version__}, {when}"),
        command=f"<pre>{html.escape(command)}</pre>" if command else "",
        style=_STYLE,
    )
    write_atomically(path, page.encode("utf-8", "replace"))


def png(picture: Image.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def img(content: bytes, alt: str, width: int = 1120) -> str:
    """An <img> with its data in the page, at most `width` pixels wide."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{alt}" style="max-width: min(100%, {width}px)" src="data:image/png;base64,{data}">'


def plot(figure: Figure) -> bytes:
    """A figure as PNG, transparent, so that it fits the white page and the dark one."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, transparent=True)
    return buffer.getvalue()


def style_axis(axis, title: str, *, log: bool = False) -> None:
    """Give an axis its title, grey lines and readable numbers."""
    axis.set_title(title, loc="left", fontsize=11, color=GREY)
    if log:
        axis.set_yscale("log")
        label = lambda y, _: f"{y:g}" if f"{y:e}"[0] in "125" else ""
        axis.yaxis.set_major_formatter(label)
        axis.yaxis.set_minor_formatter(label)
    axis.grid(axis="y", color=GREY, alpha=0.25)
    axis.tick_params(which="both", colors=GREY, labelsize=9)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GREY)


_STYLE = """
:root { --page: #fff; --ink: #1a1c1f; --soft: #676d76; --line: #e2e5e9; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e8eaed; --soft: #9aa1ab; --line: #30343a; --tint: #1f2226; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1120px; padding: 40px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 8px; }
.subtitle, .note, footer, summary, i { color: var(--soft); font-style: normal; }
.note { font-size: 14px; margin: 6px 0 14px; max-width: 80ch; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 28px; }
.tile { background: var(--tint); border-radius: 10px; flex: 1 1 110px; max-width: 240px; padding: 16px 20px; }
.tile b { display: block; font-size: 34px; line-height: 1.15; }
.tile span { display: block; }
i { font-size: 13px; }
.pair { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
img { border-radius: 4px; display: block; width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.near td { padding: 4px; text-align: center; vertical-align: top; }
.near img { width: 96px; }
.near .first { border-right: 2px solid var(--line); padding-right: 12px; }
.near .first + td { padding-left: 12px; }
.cards { font-size: 14px; width: 100%; }
.cards th, .cards td { border-bottom: 1px solid var(--line); padding: 7px 14px 7px 0; text-align: left; }
.cards tr > th:first-child { color: var(--soft); font-weight: 400; white-space: nowrap; }
pre { background: var(--tint); border-radius: 8px; font-size: 13px; padding: 12px 14px; white-space: pre-wrap; }
footer { border-top: 1px solid var(--line); font-size: 14px; margin-top: 48px; padding-top: 14px; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
{body}
<footer>{footer}{command}</footer>
</body>
</html>
"""
