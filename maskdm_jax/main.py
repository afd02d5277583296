"""The command `maskdm` of an installed package: maskdm PROGRAM [flags] runs launch/PROGRAM.py.

    maskdm train --config=celebahq_pretrain --config.data.path=photos.zip

--config takes the name of a recipe, or the path of a file.
"""

import pathlib
import runpy
import sys

from maskdm_jax.errors import ConfigError

HERE = pathlib.Path(__file__).parent


def shipped(name: str) -> pathlib.Path:
    """The folder `configs`, `launch` or `pretrained`: in the installed package, or beside it in a clone."""
    return HERE / name if (HERE / name).is_dir() else HERE.parent / name


def recipes() -> str:
    """Names of the recipes, for messages."""
    return ", ".join(sorted(path.stem for path in shipped("configs").glob("*.py")))


def recipe_path(name: str) -> str:
    """The file of a recipe given by name, such as celeba64_pretrain:crop_50; a path stays what it is."""
    name, colon, argument = name.partition(":")
    known = shipped("configs") / f"{name}.py"
    return f"{known if known.is_file() else name}{colon}{argument}"


def model_path(path):
    """The folder of a shipped model given by name, such as emoji64; a path stays what it is."""
    known = shipped("pretrained") / str(path)
    return known if known.is_dir() and not pathlib.Path(path).exists() else path


def main() -> None:
    """Run a program."""
    programs = {path.stem: path for path in shipped("launch").glob("*.py")}
    name, *arguments = sys.argv[1:] or [""]
    if name not in programs:
        print(f"usage: maskdm PROGRAM [flags]; PROGRAM is one of {', '.join(sorted(programs))}", file=sys.stderr)
        sys.exit(ConfigError.status)
    sys.argv = [str(programs[name]), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
