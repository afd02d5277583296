"""The Inception network of FID (the graph of 2015-12-05) with the weights that `pytorch-fid` distributes.

It differs from the classifier of current libraries: average pooling excludes the padding, the last block max-pools, and
there are 1,008 classes. Everything is float32, on TPU too, where convolutions would be bfloat16 by default.
"""

import functools
import hashlib
import pathlib
import shutil
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.errors import prefixed
from maskdm_jax.storage import atomic_path, cache_dir

NAME = "FID's Inception network"
SIZE = 299  # side of the images that the network sees
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_BATCH_NORM_EPS = 1e-3


def fetch_weights() -> pathlib.Path:
    """The weights' file in the cache, downloaded once from the release of `pytorch-fid` and checked by its hash.

    Raises:
      OSError: the download fails or has another hash.
    """
    path = cache_dir("weights") / FILE
    if path.exists():
        return path
    failed = prefixed(
        OSError, f"{URL} cannot be fetched (", OSError, "); get the file and give it by --inception_weights"
    )
    with failed, atomic_path(path) as temporary:
        with urllib.request.urlopen(URL, timeout=60) as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file)
        found = file_hash(temporary)
        if found != SHA256:
            raise OSError(f"it arrived with hash {found[:12]}..., not {SHA256[:12]}...")
    return path


def file_hash(path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(state_dict: dict) -> dict:
    """PyTorch's tensors by name -> {layer: (kernel [h, w, in, out], offset [out])}, batch norm folded in; and `fc`.

    The fold is computed in float64 and rounded once.

    Raises:
      KeyError, ValueError, TypeError, AttributeError: the tensors are of another network.
    """
    params = {}
    for name in state_dict:
        layer, found, _ = name.partition(".conv.weight")
        if found:
            params[layer] = fold_norm(state_dict, f"{layer}.conv", f"{layer}.bn")
    params["fc"] = np.asarray(state_dict["fc.weight"], np.float32).T
    jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32))
    return params


def fold_norm(state_dict: dict, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [h, w, in, out] and offset [out] of a convolution with its batch norm."""
    weight = np.asarray(state_dict[f"{conv}.weight"], np.float64)
    gain, bias, mean, variance = (np.asarray(state_dict[f"{norm}.{part}"], np.float64) for part in _BATCH_NORM)
    scale = gain / np.sqrt(variance + _BATCH_NORM_EPS)
    kernel = (weight * scale[:, None, None, None]).transpose(2, 3, 1, 0)
    return kernel.astype(np.float32), (bias - scale * mean).astype(np.float32)


def apply(params: dict, x) -> tuple[jax.Array, jax.Array]:
    """Features and class scores of images from `resize`: float32 [B, 2048], [B, 1008].

    The scores are logits without the layer's bias, as the Inception Score has always used them.
    """
    features = taps(params, x)[-1]
    return features, jnp.dot(features, params["fc"], precision=jax.lax.Precision.HIGHEST)


def taps(params: dict, x) -> list[jax.Array]:
    """Features of resized images at four depths, averaged over the image: [B, 64], [B, 192], [B, 768], [B, 2048]."""
    conv = functools.partial(_conv, params)
    x = conv(x, "Conv2d_1a_3x3", stride=2)
    x = conv(x, "Conv2d_2a_3x3", padding="VALID")
    x = conv(x, "Conv2d_2b_3x3")
    first = _max_pool(x)
    x = conv(first, "Conv2d_3b_1x1")
    x = conv(x, "Conv2d_4a_3x3", padding="VALID")
    second = x = _max_pool(x)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_a(conv, x, name)
    x = _block_b(conv, x, "Mixed_6a")
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _block_c(conv, x, name)
    third = x
    x = _block_d(conv, x, "Mixed_7a")
    x = _block_e(conv, x, "Mixed_7b", _average_pool)
    x = _block_e(conv, x, "Mixed_7c", functools.partial(_max_pool, stride=1, padding="SAME"))
    return [depth.mean(axis=(1, 2)) for depth in (first, second, third, x)]


def resize(images):
    """uint8 [B, H, W, C] -> float32 [B, 299, 299, 3] in -1..1: bilinear, half-pixel centres, no antialiasing."""
    b, h, w, c = images.shape
    x = images.astype(jnp.float32) / 255.0
    if (h, w) != (SIZE, SIZE):
        x = jax.image.resize(x, (b, SIZE, SIZE, c), "bilinear", antialias=False)
    return jnp.broadcast_to(2.0 * x - 1.0, (b, SIZE, SIZE, 3))


def resize_on_host(image: np.ndarray) -> np.ndarray:
    """The same as `resize` of one image [H, W, C], without a program for its size."""

    def weights(size):  # [SIZE, size]
        at = (np.arange(SIZE, dtype=np.float32) + 0.5) * (size / SIZE) - 0.5
        near = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size, dtype=np.float32)))
        return near / near.sum(axis=1, keepdims=True)

    x = weights(image.shape[0]) @ (image / np.float32(255)).transpose(2, 0, 1) @ weights(image.shape[1]).T
    return np.broadcast_to(2 * x.transpose(1, 2, 0) - 1, (SIZE, SIZE, 3))


def _conv(params, x, *names, stride=1, padding="SAME"):
    """Convolutions one after the other, each with (folded) batch norm and ReLU. With a stride there is no padding."""
    for name in names:
        kernel, offset = params[name]
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "VALID" if stride > 1 else padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x + offset[None, None, None])
    return x


def _max_pool(x, stride=2, padding="VALID"):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x):
    """3 x 3 means that exclude the padding."""
    add = lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return add(x) / add(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _branch(conv, x, name, count, stride=1):
    """Layers `name`_1 to `name`_count, the last one with a stride."""
    x = conv(x, *(f"{name}_{i}" for i in range(1, count)))
    return conv(x, f"{name}_{count}", stride=stride)


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


def _block_a(conv, x, name):
    return _join(
        conv(x, f"{name}.branch1x1"),
        _branch(conv, x, f"{name}.branch5x5", 2),
        _branch(conv, x, f"{name}.branch3x3dbl", 3),
        conv(_average_pool(x), f"{name}.branch_pool"),
    )


def _block_b(conv, x, name):
    three, double = conv(x, f"{name}.branch3x3", stride=2), _branch(conv, x, f"{name}.branch3x3dbl", 3, stride=2)
    return _join(three, double, _max_pool(x))


def _block_c(conv, x, name):
    return _join(
        conv(x, f"{name}.branch1x1"),
        _branch(conv, x, f"{name}.branch7x7", 3),
        _branch(conv, x, f"{name}.branch7x7dbl", 5),
        conv(_average_pool(x), f"{name}.branch_pool"),
    )


def _block_d(conv, x, name):
    three = _branch(conv, x, f"{name}.branch3x3", 2, stride=2)
    seven = _branch(conv, x, f"{name}.branch7x7x3", 4, stride=2)
    return _join(three, seven, _max_pool(x))


def _block_e(conv, x, name, pool):
    single, double = conv(x, f"{name}.branch3x3_1"), _branch(conv, x, f"{name}.branch3x3dbl", 2)
    return _join(
        conv(x, f"{name}.branch1x1"),
        conv(single, f"{name}.branch3x3_2a"),  # 1 x 3, and below 3 x 1
        conv(single, f"{name}.branch3x3_2b"),
        conv(double, f"{name}.branch3x3dbl_3a"),
        conv(double, f"{name}.branch3x3dbl_3b"),
        conv(pool(x), f"{name}.branch_pool"),
    )
