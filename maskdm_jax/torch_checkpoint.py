"""The official PyTorch checkpoints: names and layouts of their weights, and the way to our parameters and back.

Conversion only renames, transposes and reshapes, so it is exact in both directions.
"""

import re

import numpy as np

from maskdm_jax import torch_file
from maskdm_jax.torch_file import TorchFileError

_LINEAR = {"weight": "kernel", "bias": "bias"}
_NORM = {"weight": "scale", "bias": "bias"}
_PARTS = {  # official name within the network -> our path and the names of its tensors
    "encoder.patch_embed.proj": ("patch_embed", _LINEAR),
    "encoder.time_embed.0": ("time_mlp.fc1", _LINEAR),
    "encoder.time_embed.2": ("time_mlp.fc2", _LINEAR),
    "encoder.label_emb": ("label_embed", {"weight": "embedding"}),
    "encoder.norm": ("norm", _NORM),
    "encoder_to_output": ("head", _LINEAR),
}
_BLOCK_PARTS = {
    "norm1": _NORM,
    "norm2": _NORM,
    "attn": {"q_bias": "q_bias", "v_bias": "v_bias"},
    "attn.qkv": _LINEAR,
    "attn.proj": _LINEAR,
    "mlp.fc1": _LINEAR,
    "mlp.fc2": _LINEAR,
    "skip_linear": _LINEAR,
}
_TENSORS = {"encoder.encoder_pos_embed": "pos_embed", "encoder.uncond_embed": "uncond_embed"}
_OUR_TENSORS = {ours: name for name, ours in _TENSORS.items()}
_BLOCK = re.compile(r"encoder\.(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.+)")


_WRAPPER = {"params": ("model", "model."), "ema": ("ema", "ema_model.model.")}  # part of the file, prefix of names


def load_weights(path, which: str) -> dict:
    """Read `params` (the raw weights) or `ema` of an official `.pt`: our nested dict of NumPy arrays.

    Raises:
      TorchFileError: it is not a checkpoint of the official trainer; the message says why.
    """
    part, prefix = _WRAPPER[which]
    content = torch_file.read(path)
    if not isinstance(content, dict) or not isinstance(content.get(part), dict):
        raise TorchFileError(f"{path} has no {part!r}; a checkpoint of the official trainer has step, model, opt, ema")
    tensors = {name.removeprefix(prefix): t for name, t in content[part].items() if name.startswith(prefix)}
    try:
        return params_from_state_dict(tensors)
    except KeyError as error:
        raise TorchFileError(f"{path}: {error.args[0]}") from None


def our_path(name: str) -> tuple:
    """Path of the official tensor `name` in our parameter tree, e.g. ('in_blocks', 0, 'attn', 'qkv', 'kernel').

    Raises:
      KeyError: the name is not one of a U-ViT.
    """
    if name in _TENSORS:
        return (_TENSORS[name],)
    module, _, tensor = name.rpartition(".")
    block = _BLOCK.fullmatch(module)
    if block and tensor in _BLOCK_PARTS.get(block[2], {}):
        path = f"{block[1]}.{block[2]}.{_BLOCK_PARTS[block[2]][tensor]}"
    elif module in _PARTS and tensor in _PARTS[module][1]:
        path = f"{_PARTS[module][0]}.{_PARTS[module][1][tensor]}"
    else:
        raise KeyError(f"{name!r} is not the name of a U-ViT tensor")
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def our_layout(name: str, tensor: np.ndarray) -> np.ndarray:
    """Rearrange an official tensor: Linear [out, in] to [in, out], patch convolution [D, C, p, p] to [p*p*C, D]."""
    if name in _TENSORS:
        return tensor.reshape(tensor.shape[1:])  # the official tensor has a leading batch dimension of 1
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    if tensor.ndim == 2 and not name.endswith("label_emb.weight"):
        return tensor.T
    return tensor


def params_from_state_dict(state_dict: dict) -> dict:
    """The network's tensors by official name -> our nested dict of parameters (NumPy, dtypes kept)."""
    params = {}
    for name, tensor in state_dict.items():
        *parents, last = our_path(name)
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = our_layout(name, np.asarray(tensor))
    return params


def official_name(path: tuple) -> str:
    """Inverse of `our_path`."""
    names = [str(key) for key in path]
    if names[0] in _OUR_TENSORS:
        return _OUR_TENSORS[names[0]]
    depth = {"in_blocks": 2, "out_blocks": 2, "mid_block": 1}.get(names[0], 0)
    block, parts = names[:depth], names[depth:]
    if block:
        module, tensor = ".".join(parts[:-1]), parts[-1]
        tensors = _BLOCK_PARTS[module]
        prefix = f"encoder.{'.'.join(block)}.{module}"
    else:
        ours, tensor = ".".join(parts[:-1]), parts[-1]
        prefix, tensors = next((name, tensors) for name, (path, tensors) in _PARTS.items() if path == ours)
    return f"{prefix}.{next(theirs for theirs, our in tensors.items() if our == tensor)}"


def official_layout(name: str, tensor: np.ndarray, patch_size: int) -> np.ndarray:
    """Inverse of `our_layout`."""
    if name in _TENSORS:
        return tensor[None]
    if name.endswith("patch_embed.proj.weight"):
        return tensor.reshape(patch_size, patch_size, -1, tensor.shape[1]).transpose(3, 2, 0, 1)
    if tensor.ndim == 2 and not name.endswith("label_emb.weight"):
        return tensor.T
    return tensor


def state_dict_from_params(params: dict, patch_size: int, path: tuple = ()) -> dict:
    """Inverse of `params_from_state_dict`: {official name: NumPy array}."""
    if not isinstance(params, dict):
        name = official_name(path)
        return {name: official_layout(name, np.asarray(params), patch_size)}
    tensors = {}
    for key, value in params.items():
        tensors |= state_dict_from_params(value, patch_size, (*path, key))
    return tensors
