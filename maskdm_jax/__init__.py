"""MaskDM-JAX: masked diffusion models in JAX and Flax.

From Python:

    import maskdm_jax

    config = maskdm_jax.recipe("own_images", {"data.path": "photos.zip"})
    maskdm_jax.train(config, "runs/photos")
    model = maskdm_jax.load("runs/photos")
    images = model.sample(16, seed=1)  # uint8 [16, S, S, C]

The programs in `launch/` do the same from the command line. Outside of `evaluation/`,
"the reference" in a docstring is the authors' PyTorch code, github.com/jiachenlei/maskdm.
"""

__version__ = "0.1.0"


def __getattr__(name):  # `load`, `recipe` and `train`, imported late: `import maskdm_jax.config` needs no JAX
    if name in ("load", "recipe", "train"):
        from maskdm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'maskdm_jax' has no attribute {name!r}")
