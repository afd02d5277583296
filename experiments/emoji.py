"""Build the emoji archives of the studies from public packages:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python experiments/emoji.py --package=emoji-datasource-google-16.0.0.tgz --out=emoji64_noto.zip
    python experiments/emoji.py --package=emoji-datasource-twitter-16.0.0.tgz --out=emoji64_twemoji.zip
    python experiments/emoji.py --package=emoji-datasource-google-16.0.0.tgz \
        --package=emoji-datasource-twitter-16.0.0.tgz --out=emoji64.zip

An archive of one package holds 3,786 RGB images of 64 x 64 pixels on white, CLASS/CODEPOINTS.png, with ten
classes; one of both holds 7,572 in twenty classes, google_CLASS and twitter_CLASS. The images are Noto Emoji (Google,
Apache-2.0) and Twemoji (Twitter and others, CC BY 4.0); the packages are of emoji-data (MIT).
"""

import io
import json
import posixpath
import tarfile
import zipfile

from absl import app, flags
from PIL import Image

PACKAGES = flags.DEFINE_multi_string(
    "package", None, "A package emoji-datasource-MAKER-VERSION.tgz; may be repeated.", required=True
)
OUT = flags.DEFINE_string("out", None, "The archive to write.", required=True)


def main(_):
    with zipfile.ZipFile(OUT.value, "w") as archive:
        for path in PACKAGES.value:
            with tarfile.open(path) as package:
                add(archive, package)
        print(f"{OUT.value} holds {len(archive.namelist())} images")


def add(archive, package):
    """Add the images of a package to an archive."""
    folder = posixpath.dirname(next(name for name in package.getnames() if "/64/" in name))  # package/img/MAKER/64
    maker = f"{folder.split('/')[2]}_" if len(PACKAGES.value) > 1 else ""
    for emoji in json.load(package.extractfile("package/emoji.json")):
        label = maker + emoji["category"].lower().replace(" & ", "_").replace(" ", "_")
        for image in (emoji, *emoji.get("skin_variations", {}).values()):
            png = on_white(package.extractfile(f"{folder}/{image['image']}"))
            archive.writestr(zipfile.ZipInfo(f"{label}/{image['image']}", (2024, 1, 1, 0, 0, 0)), png)


def on_white(file) -> bytes:
    """A PNG on white, RGB."""
    image = Image.open(file).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    content = io.BytesIO()
    page.convert("RGB").save(content, "PNG", optimize=True)
    return content.getvalue()


if __name__ == "__main__":
    app.run(main)
