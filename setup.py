"""What pyproject.toml cannot say: the installed package also holds the recipes, the programs and the trained models."""

import os

import setuptools

FOLDERS = [name for name in ("configs", "launch", "pretrained") if os.path.isdir(name)]

setuptools.setup(
    packages=[*setuptools.find_packages(include=["maskdm_jax*"]), *(f"maskdm_jax.{name}" for name in FOLDERS)],
    package_dir={f"maskdm_jax.{name}": name for name in FOLDERS},
    package_data={
        "maskdm_jax.data": ["digits.npz"],
        "maskdm_jax.launch": ["*.sh", "*.yaml"],
        "maskdm_jax.pretrained": ["*/*"],
    },
)
