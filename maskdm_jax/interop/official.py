"""The official PyTorch checkpoints: their parts, and the names, order and layouts of the tensors in them.

A file of the official trainer is a dict of `step`, `model` and `ema` (state dicts of the diffusion wrapper: 13
schedule buffers and, under `model.`, the network), `opt` (AdamW, by position of the tensors) and `scaler`.
A `.safetensors` file holds the network's tensors alone, under the same names.

Conversion renames, transposes and reshapes, nothing else, so it is exact in both directions.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
import reprlib
import typing

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from maskdm_jax.diffusion.gaussian import Schedule
from maskdm_jax.errors import TorchFileError, prefixed
from maskdm_jax.interop import torch_file
from maskdm_jax.storage import write_atomically

# --- Names and layouts --------------------------------------------------------------------------


def _tensors(theirs: str, ours: str, weight: str = "kernel", bias: str | None = "bias") -> dict:
    names = {f"{theirs}.weight": f"{ours}.{weight}"}
    return names | ({f"{theirs}.bias": f"{ours}.{bias}"} if bias else {})


def _block(theirs: str, ours: str) -> dict:
    names = _tensors(f"{theirs}.norm1", f"{ours}.norm1", "scale")
    names |= {f"{theirs}.attn.{bias}": f"{ours}.attn.{bias}" for bias in ("q_bias", "v_bias")}
    names |= _tensors(f"{theirs}.attn.qkv", f"{ours}.attn.qkv", bias=None)
    names |= _tensors(f"{theirs}.attn.proj", f"{ours}.attn.proj")
    names |= _tensors(f"{theirs}.norm2", f"{ours}.norm2", "scale")
    for linear in ("mlp.fc1", "mlp.fc2", "skip_linear"):
        names |= _tensors(f"{theirs}.{linear}", f"{ours}.{linear}")
    return names


# Official name -> our path, in the official order, for both networks; * is the number of a block.
_NAMES = (
    {"encoder.uncond_embed": "backbone.uncond_embed", "encoder.encoder_pos_embed": "pos_embed"}
    | _tensors("encoder.patch_embed.proj", "patch_embed")
    | _tensors("encoder.approx_patch_embed.proj", "approx_patch_embed")
    | _tensors("encoder.detail_patch_embed.proj", "detail_patch_embed")
    | _tensors("encoder.label_emb", "backbone.label_embed", "embedding", bias=None)
    | _tensors("encoder.time_embed.0", "backbone.time_mlp.fc1")
    | _tensors("encoder.time_embed.2", "backbone.time_mlp.fc2")
    | _block("encoder.in_blocks.*", "backbone.in_blocks.*")
    | _block("encoder.mid_block", "backbone.mid_block")
    | _block("encoder.out_blocks.*", "backbone.out_blocks.*")
    | _tensors("encoder.norm", "backbone.norm", "scale")
    | _tensors("encoder_to_output", "head")
    | _tensors("approx_to_output", "approx_head")
    | _tensors("detail_to_output", "detail_head")
)
_OUR_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}
_ORDER = {theirs: i for i, theirs in enumerate(_NAMES)}
_FIRST = {theirs.partition("*")[0]: i for theirs, i in reversed(_ORDER.items())}  # place of the blocks of one kind
_NUMBER = re.compile(r"(?<=blocks\.)(?:0|[1-9]\d{0,3})(?=\.)")  # of a block


def _pattern(name: str) -> tuple[str, int]:
    """A name with its block's number as *, and that number (0 outside the numbered blocks)."""
    number = _NUMBER.search(name)
    return (name, 0) if number is None else (_NUMBER.sub("*", name, count=1), int(number[0]))


def our_path(name: str) -> tuple:
    """Path of the official tensor `name` in our parameters, e.g. ('backbone', 'in_blocks', 0, 'attn', 'qkv', 'kernel').

    Raises:
      KeyError: the name is not one of a U-ViT.
    """
    pattern, number = _pattern(name)
    if pattern not in _NAMES:
        raise KeyError(f"{name!r} is not the name of a U-ViT tensor")
    return tuple(number if part == "*" else part for part in _NAMES[pattern].split("."))


def official_name(path: tuple) -> str:
    """Inverse of `our_path`."""
    number = next((part for part in path if isinstance(part, int)), None)
    pattern = ".".join("*" if isinstance(part, int) else part for part in path)
    return _OUR_NAMES[pattern].replace("*", str(number))


def official_rank(name: str) -> tuple:
    """Sorts official names as the official network lists them; the optimizer numbers its tensors in this order."""
    pattern, number = _pattern(name)
    return _FIRST[pattern.partition("*")[0]], number, _ORDER[pattern]


def our_layout(name: str, tensor: np.ndarray) -> np.ndarray:
    """Rearrange an official tensor: Linear [out, in] to [in, out], patch convolution [D, C, p, p] to [p*p*C, D].

    Raises:
      ValueError: the tensor has the wrong shape.
    """
    if name.endswith(("encoder_pos_embed", "uncond_embed")):
        if tensor.shape[:1] != (1,):
            raise ValueError(f"{name} is {tensor.shape}; its first dimension must be 1, for the batch")
        return tensor[0]
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    if tensor.ndim == 2 and not name.endswith("label_emb.weight"):
        return tensor.T
    return tensor


def official_layout(name: str, tensor: np.ndarray, patch_size: int, scale: int = 1) -> np.ndarray:
    """Inverse of `our_layout`, for patches of `patch_size` and detail patches `scale` times as wide."""
    if name.endswith(("encoder_pos_embed", "uncond_embed")):
        return tensor[None]
    if name.endswith("patch_embed.proj.weight"):
        side = patch_size * scale if "detail" in name else patch_size
        return tensor.reshape(side, side, -1, tensor.shape[1]).transpose(3, 2, 0, 1)
    if tensor.ndim == 2 and not name.endswith("label_emb.weight"):
        return tensor.T
    return tensor


def params_from_state_dict(state_dict: dict) -> dict:
    """The network's tensors by official name -> our nested dict of parameters (NumPy, dtypes kept).

    Raises:
      KeyError: a name is not one of a U-ViT.
      ValueError: a tensor has the wrong shape.
    """
    params = {}
    for name, tensor in state_dict.items():
        *parents, last = our_path(name)
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = our_layout(name, np.asarray(tensor))
    return params


def state_dict_from_params(params: dict, patch_size: int, scale: int = 1) -> dict:
    """Inverse of `params_from_state_dict`: {official name: contiguous NumPy array}, in the official order."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = official_name(tuple(part.key for part in path))
        tensors[name] = np.ascontiguousarray(official_layout(name, np.asarray(leaf), patch_size, scale))
    return {name: tensors[name] for name in sorted(tensors, key=official_rank)}


# --- Files --------------------------------------------------------------------------------------

BUFFERS = {  # of the official diffusion wrapper, in its order -> column of `gaussian.Schedule`
    "alphas": "alpha",
    "betas": "betas",
    "alphas_cumprod": "alpha_bar",
    "alphas_cumprod_prev": "alpha_bar_prev",
    "sqrt_alphas_cumprod": "sqrt_alpha_bar",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alpha_bar",
    "log_one_minus_alphas_cumprod": "log_one_minus_alpha_bar",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alpha_bar",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alpha_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_x0",
    "posterior_mean_coef2": "posterior_mean_xt",
}
_METADATA = "maskdm_jax"  # key in the header of a .safetensors file
_WANTED = "a checkpoint of the official trainer is a dict of step, model, opt, ema and scaler"


class Moment(typing.NamedTuple):
    """AdamW's state of one tensor."""

    step: int
    mu: np.ndarray  # float32, in the tensor's shape
    nu: np.ndarray


@dataclasses.dataclass
class Official:
    """The content of an official checkpoint; tensors by official name in the network, in the official order."""

    model: dict[str, np.ndarray]  # raw weights
    ema: dict[str, np.ndarray] | None = None
    ema_step: int = 0  # calls of the EMA
    ema_initted: bool = False  # whether the EMA holds weights; without it the next call copies
    moments: dict[str, Moment] | None = None  # tensors that never had a gradient have none
    group: dict | None = None  # AdamW's settings, without `params`
    step: int = 0
    scaler: dict | None = None
    buffers: dict[str, np.ndarray] | None = None  # of the noise schedule, `betas` at least
    left_out: tuple[str, ...] = ()  # descriptions of the file's other content


def schedule_buffers(schedule: Schedule) -> dict[str, np.ndarray]:
    """The 13 buffers of the official diffusion wrapper."""
    return {name: getattr(schedule, column) for name, column in BUFFERS.items()}


def read(path, *, weights_only: bool = False) -> Official:
    """Read a checkpoint of the official trainer, or a bare state dict, from a `.pt` file.

    Nothing in the file is executed. Half-precision tensors become float32. With `weights_only` the optimizer is not
    read, and may be of any kind.

    Raises:
      TorchFileError: the file is damaged or of another kind; the message says how.
    """
    content = torch_file.read(path)
    with prefixed(TorchFileError, f"{path}: "):
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}; {_WANTED}")
        if "model" not in content:
            if not any("encoder" in str(name) for name in content):
                raise ValueError(f"it has no 'model'; {_WANTED}")
            model, buffers = _split(content, "")
            return Official(model, buffers=buffers)
        model, buffers = _split(_part(content, "model"), "model: ")
        official = Official(model, buffers=buffers, step=_count(content.get("step", 0), "step"))
        official.scaler = _plain(official, "scaler", content.get("scaler"))
        known = ("step", "model", "opt", "ema", "scaler")
        official.left_out += tuple(f"{key!r} of the file" for key in content if key not in known)
        if not _is_empty(content.get("ema")):
            _read_ema(official, _part(content, "ema"))
        if not weights_only and not _is_empty(content.get("opt")):
            _read_optimizer(official, _part(content, "opt"))
        return official


def _read_ema(official: Official, ema: dict) -> None:
    parts = {"ema_model": {}, "online_model": {}}
    for name, tensor in ema.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
        elif name not in ("initted", "step"):
            raise ValueError(f"'ema' holds {name!r}, which is not known here")
    official.ema, _ = _split(parts["ema_model"], "ema: ema_model.")
    wrong = [name for name in official.ema.keys() ^ official.model.keys()]
    wrong += [
        name for name, t in official.ema.items() if name in official.model and t.shape != official.model[name].shape
    ]
    if wrong:
        raise ValueError(f"ema_model and the weights of 'model' differ in names or shapes: {sorted(wrong)[:3]}")
    if parts["online_model"]:
        online, _ = _split(parts["online_model"], "ema: online_model.")
        if not all(np.array_equal(online.get(name), t, equal_nan=True) for name, t in official.model.items()):
            official.left_out += ("ema.online_model, which differs from the weights of 'model' here",)
    official.ema_step = _count(ema.get("step", official.step), "ema.step")
    official.ema_initted = bool(_count(ema.get("initted", True), "ema.initted"))


def _read_optimizer(official: Official, opt: dict) -> None:
    state, groups, names = opt.get("state"), opt.get("param_groups"), list(official.model)
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise ValueError("'opt' lacks state or param_groups")
    if len(groups) != 1:
        raise ValueError(f"'opt' has {len(groups)} groups of parameters; the official trainer makes one")
    numbers = groups[0].get("params")
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or len(numbers) != len(names):
        known = len(numbers) if isinstance(numbers, list) else "no"
        raise ValueError(f"'opt' knows {known} tensors, the network has {len(names)}")
    official.group = _read_group(official, groups[0])
    official.moments = {}
    for name, entry in ((name, state[number]) for name, number in zip(names, numbers, strict=True) if number in state):
        if not isinstance(entry, dict) or entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the optimizer's state of {name} is not that of AdamW (step, exp_avg, exp_avg_sq)")
        step = _count(entry["step"], f"the optimizer's step of {name}")
        pair = [_float32(f"{kind} of {name}", entry[kind]) for kind in ("exp_avg", "exp_avg_sq")]
        for tensor in pair:
            if tensor.shape != official.model[name].shape:
                raise ValueError(f"a moment of {name} is {tensor.shape}, the tensor {official.model[name].shape}")
        official.moments[name] = Moment(step, *pair)


def _read_group(official: Official, group: dict) -> dict:
    """AdamW's settings, as plain numbers and text."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"opt.param_groups betas is {reprlib.repr(betas)}; two numbers are wanted")
    others = {key: value for key, value in group.items() if key not in ("params", "betas")}
    plain = {key: _plain(official, f"opt.param_groups {key}", value) for key, value in others.items()}
    plain["betas"] = tuple(_plain(official, "opt.param_groups betas", beta) for beta in betas)
    numbers = [(name, plain.get(name, 0.0)) for name in ("lr", "initial_lr", "weight_decay")]
    for name, value in [*numbers, *(("betas", beta) for beta in plain["betas"])]:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
            raise ValueError(f"opt.param_groups {name} is {value!r}, which is not a number")
    return {key: plain[key] for key in group if key != "params"}


def write(path, official: Official) -> None:
    """Write a file that the official trainer resumes from, fine-tunes from and samples from; whole or not at all.

    `official` must have `buffers`, `group` and `ema`; without `moments` the optimizer starts anew.
    """
    wrapper = official.buffers | {f"model.{name}": tensor for name, tensor in official.model.items()}
    averaged = official.buffers | {f"model.{name}": tensor for name, tensor in official.ema.items()}
    ema = {"initted": np.bool_(official.ema_initted), "step": np.int64(official.ema_step)}
    ema |= {f"online_model.{name}": tensor for name, tensor in wrapper.items()}  # the same arrays: stored once
    ema |= {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    names, state = list(official.model), {}
    for name, moment in (official.moments or {}).items():
        step = np.float32(moment.step)
        state[names.index(name)] = {"step": step, "exp_avg": moment.mu, "exp_avg_sq": moment.nu}
    content = {
        "step": official.step,
        "model": collections.OrderedDict(wrapper),
        "opt": {"state": state, "param_groups": [official.group | {"params": list(range(len(names)))}]},
        "ema": collections.OrderedDict(ema),
        "scaler": official.scaler,
    }
    torch_file.write(path, content)


def read_safetensors(path) -> tuple[Official, dict]:
    """Read one set of weights, with the schedule's buffers if they are there, and the notes of `write_safetensors`.

    Raises:
      TorchFileError: the file is damaged, or not of a U-ViT.
      OSError: it cannot be opened.
    """
    path = pathlib.Path(path)
    path.open("rb").close()  # raises the ordinary errors of a missing or forbidden file
    damage = (safetensors.SafetensorError, ValueError, TypeError, AttributeError, RecursionError)
    with prefixed(TorchFileError, f"{path}: it is damaged or not a .safetensors file (", damage, ")"):
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        noted = json.loads(header.get(_METADATA, "{}"))
    with prefixed(TorchFileError, f"{path}: "):
        if not isinstance(noted, dict):
            raise ValueError(f"its header's {_METADATA!r} is damaged")
        model, buffers = _split(tensors, "")
        return Official({name: model[name] for name in sorted(model, key=official_rank)}, buffers=buffers), noted


def write_safetensors(path, model: dict[str, np.ndarray], noted: dict) -> None:
    """Write weights by official name, whole or not at all; `noted` goes into the header as JSON."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in model.items()}
    write_atomically(path, safetensors.numpy.save(tensors, {"format": "pt", _METADATA: json.dumps(noted)}))


def load_weights(path, which: str = "params") -> dict:
    """Our parameters from a `.pt` (`params`, the raw weights, or `ema`) or from a `.safetensors`, which has one set.

    Raises:
      TorchFileError: the file is damaged or of another kind; the message says how.
    """
    if str(path).lower().endswith(".safetensors"):
        weights = read_safetensors(path)[0].model
    else:
        official = read(path, weights_only=True)
        weights = official.model if which == "params" else official.ema
    with prefixed(TorchFileError, f"{path}: "):
        if weights is None:
            raise ValueError(f"it has no 'ema'; {_WANTED}")
        return params_from_state_dict(weights)


def _is_empty(part) -> bool:
    return part is None or (isinstance(part, dict) and not part)


def _part(content: dict, key: str) -> dict:
    part = content[key]
    if not isinstance(part, dict) or not part or not all(isinstance(name, str) for name in part):
        raise ValueError(f"{key!r} is not what the official trainer writes; {_WANTED}")
    return part


def _split(state_dict: dict, where: str) -> tuple[dict, dict | None]:
    """Split a state dict into the network's tensors and the schedule's buffers (None without betas)."""
    network, buffers = {}, {}
    for full, tensor in state_dict.items():
        inner = str(full).removeprefix("module.")  # of a model that was saved while wrapped for several devices
        name = inner.removeprefix("model.")
        if not isinstance(tensor, np.ndarray):
            raise ValueError(f"{where}{full} is a {type(tensor).__name__}, not a tensor")
        if inner in BUFFERS:
            buffers[inner] = tensor
        elif _pattern(name)[0] not in _NAMES:
            raise ValueError(f"{where}{name[:100]!r} is not the name of a U-ViT tensor")
        elif name in network:
            raise ValueError(f"{where}there are two tensors {name!r}, with and without a prefix")
        else:
            network[name] = _float32(f"{where}{full}", tensor)
    if not network:
        raise ValueError(f"{where}there are no tensors of a U-ViT")
    return network, buffers if "betas" in buffers else None


def _float32(name: str, tensor) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if tensor.dtype in (np.float16, ml_dtypes.bfloat16):
        return tensor.astype(np.float32)
    if tensor.dtype != np.float32:
        raise ValueError(f"{name} is {tensor.dtype}; float32 is wanted")
    return tensor


def _count(value, name: str) -> int:
    """A number of steps (or a flag), stored as a number or as a tensor of one element."""
    number = _scalar(value)
    if not isinstance(number, (int, float)) or not 0 <= number < 2**31 or number != int(number):
        raise ValueError(f"{name} is {reprlib.repr(value)}, which is not a count; counts go up to 2^31 - 1")
    return int(number)


def _scalar(value):
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


def _plain(official: Official, name: str, value):
    """A setting, or a dict of settings, as JSON keeps it. What is of another kind is left out, and None."""
    plain = {key: _scalar(item) for key, item in value.items()} if isinstance(value, dict) else _scalar(value)
    items = [*plain, *plain.values()] if isinstance(plain, dict) else [plain]
    if all(item is None or isinstance(item, (bool, int, float, str)) for item in items):
        return plain
    official.left_out += (f"{name}, which is not made of plain numbers and words",)
    return None


# --- The network of a file ----------------------------------------------------------------------


def architecture(model: dict[str, np.ndarray]) -> dict:
    """Settings of the network with these tensors, as `config.Model` and `config.Data` name them, without `heads`.

    Raises:
      ValueError: the tensors do not make a U-ViT; the message names one.
    """

    def shape(name, ndim):
        if name not in model:
            raise ValueError(f"tensor {name!r} is missing")
        if model[name].ndim != ndim or not model[name].size:
            raise ValueError(f"tensor {name!r} is {model[name].shape}; {ndim} dimensions are wanted")
        return model[name].shape

    wavelet = "encoder.approx_patch_embed.proj.weight" in model
    embed = "encoder.approx_patch_embed.proj.weight" if wavelet else "encoder.patch_embed.proj.weight"
    width, channels, patch_size, _ = shape(embed, 4)
    _, tokens, _ = shape("encoder.encoder_pos_embed", 3)
    conditional = "encoder.label_emb.weight" in model
    scale = shape("encoder.detail_patch_embed.proj.weight", 4)[2] // patch_size if wavelet else 0
    patches = tokens - (2 if conditional else 1)
    if wavelet and scale:
        patches = patches * scale**2 // (scale**2 + 1)  # those of the approximation
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches or (wavelet and not scale):
        raise ValueError(f"'encoder.encoder_pos_embed' has {tokens} positions, which are not those of square images")
    blocks = {int(name.split(".")[2]) for name in model if name.startswith("encoder.in_blocks.")}
    return dict(
        image_size=side * patch_size * (2 if wavelet else 1),
        channels=channels,
        patch_size=patch_size,
        wavelet_scale=scale,
        width=width,
        depth=2 * len(blocks),
        mlp_ratio=shape("encoder.mid_block.mlp.fc1.weight", 2)[0] / width,
        qv_bias="encoder.mid_block.attn.q_bias" in model,
        num_classes=shape("encoder.label_emb.weight", 2)[0] if conditional else 0,
        time_mlp="encoder.time_embed.0.weight" in model,
    )
