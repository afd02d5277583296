"""The official PyTorch checkpoints: their parts, and the names, order and layouts of the tensors in them.

A file of the official trainer is a dict of `step`, `model` and `ema` (state dicts of the diffusion wrapper: 13
schedule buffers and, under `model.`, the network), `opt` (AdamW, by position of the tensors) and `scaler`.
A `.safetensors` file holds the network's tensors alone, under the same names. Other files are read wherever they keep
such tensors: those whose names differ from the official ones by the same prefix are a set of weights.

Conversion renames, transposes and reshapes, nothing else, so it is exact in both directions.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import reprlib
import typing

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from maskdm_jax.diffusion.gaussian import Schedule, cosine_betas, linear_betas
from maskdm_jax.errors import TorchFileError, prefixed
from maskdm_jax.interop import torch_file
from maskdm_jax.interop.pickles import Skipped
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
_FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
_METADATA = "maskdm_jax"  # key in the header of a .safetensors file
INDEX = ".safetensors.index.json"  # ending of the file that says which of several files holds a tensor
_READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # types of safetensors
_WANTED = "a checkpoint of the official trainer is a dict of step, model, opt, ema and scaler"
# Modules that PyTorch wraps around others put these into the names of tensors.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MAX_PARTS = max(name.count(".") for name in _NAMES) + 1  # of an official name
_EMA = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow)(?:[._\d]|$)")  # in the prefix of averaged weights


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
    optimizer_problem: str = ""  # why the file's optimizer was not read, if it has one
    notes: list[str] = dataclasses.field(default_factory=list)  # lines for the user: what was left out or changed


def schedule_buffers(schedule: Schedule) -> dict[str, np.ndarray]:
    """The 13 buffers of the official diffusion wrapper."""
    return {name: getattr(schedule, column) for name, column in BUFFERS.items()}


def read(path) -> Official:
    """Read a checkpoint of the official trainer, or another `.pt` file with the weights of such a network.

    Nothing in the file is executed. Half-precision tensors become float32; float64 is rounded to it. An optimizer that
    training here cannot continue is not read, and content that is not known here is left out; both are described.

    Raises:
      TorchFileError: the file is damaged or of another kind; the message says how.
    """
    content = torch_file.read(path)
    with prefixed(TorchFileError, f"{path}: "):
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {_kind(content)}; {_WANTED}")
        is_optimizer = lambda value: isinstance(value, dict) and "param_groups" in value
        optimizer = next((key for key, value in content.items() if is_optimizer(value)), None)
        step = next((key for key in ("step", "global_step") if key in content), None)
        official = _find_weights(content, {optimizer, step, "scaler"})
        official.scaler = _plain(official, "scaler", content.get("scaler"))
        if optimizer is not None:
            try:
                _read_optimizer(official, content[optimizer])
            except ValueError as error:
                official.optimizer_problem = f"{optimizer!r}: {error}"
        if step is not None:
            official.step = _count(content[step], step)
        elif official.moments:
            official.step = max(moment.step for moment in official.moments.values())
        official.ema_step = official.step if official.ema_step < 0 else official.ema_step
        return official


def _find_weights(content: dict, known: set) -> Official:
    """Find raw and averaged weights in nested dicts; what belongs to neither, nor to the keys `known`, gets a note."""
    others, sets, keys = {}, {}, set(known)
    for name, (key, value) in _leaves(content).items():
        prefix, tensor_name = _divide(name)
        if tensor_name:
            sets.setdefault(prefix, {})[tensor_name] = value
            keys.add(key)
        else:
            others[name] = (key, value)
    roles = {}
    for prefix in sets:
        role = "online" if "online_model." in prefix else "ema" if _EMA.search(prefix) else "model"
        if role in roles:
            both = " and ".join(f"{found + '*'!r} ({len(sets[found])} tensors)" for found in (roles[role], prefix))
            raise ValueError(f"it holds several networks, {both}; save the one that is meant in a file of its own")
        roles[role] = prefix
    raw = next((role for role in ("model", "online", "ema") if role in roles), None)
    if raw is None:
        raise ValueError(f"it holds no tensors of a U-ViT; {_WANTED}")
    weights = {role: {n: _float32(prefix + n, t) for n, t in sets[prefix].items()} for role, prefix in roles.items()}

    def take(name):
        key, value = others.pop(name, (None, None))
        keys.add(key)
        return value

    buffers = {role: _take_buffers(take, roles[role]) for role in sorted(roles, key=lambda role: role != raw)}
    official = Official(weights[raw], buffers=buffers[raw])
    broken = [name for name, tensor in official.model.items() if not np.isfinite(tensor).all()]
    if broken:
        official.notes.append(f"note: {len(broken)} tensors hold NaN or infinity, such as {broken[0]}")
    if raw == "online":
        official.notes.append("note: the file has no 'model'; the raw weights are those of the EMA's online_model")
    if raw != "ema" and "ema" in roles:
        _add_ema(official, weights["ema"], roles["ema"], take)
    online = weights.get("online", official.model)
    if not all(np.array_equal(online.get(name), tensor, equal_nan=True) for name, tensor in official.model.items()):
        official.notes.append("left out: ema.online_model, which differs from the weights of 'model' here")
    if any(tensor.dtype == np.float64 for found in sets.values() for tensor in found.values()):
        official.notes.append("note: float64 weights are rounded to float32")
    official.notes += _left_out(content, others, sets, keys, known)
    return official


def _leaves(content: dict) -> dict:
    """{name: (key in `content`, value)}; a name joins the keys that lead to a value, without PyTorch's wrappers.

    Names and the search are bounded: a small file can hold a dict or a text any number of times.
    """
    leaves, seen = {}, set()

    def walk(node, prefix, home, depth):
        seen.add(id(node))
        for key, value in node.items():
            if not isinstance(key, str):
                continue
            name = f"{prefix}{key[:128]}"
            if isinstance(value, dict) and depth < 4:
                if id(value) not in seen:
                    walk(value, f"{name}.", home if depth else key, depth + 1)
                continue
            name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if name in leaves and _divide(name)[1]:
                raise ValueError(f"there are two tensors {name!r}, with and without a wrapper's name")
            leaves[name] = (home if depth else key, value)

    walk(content, "", None, 0)
    return leaves


def _divide(name: str) -> tuple[str, str | None]:
    """Prefix of a name, and the official name of a tensor that it ends with."""
    parts = name.split(".")
    for i in range(max(0, len(parts) - _MAX_PARTS), len(parts)):
        official = ".".join(parts[i:])
        if _pattern(official)[0] in _NAMES:
            return name.removesuffix(official), official
    return name, None


def _take_buffers(take, prefix: str) -> dict | None:
    """The schedule's buffers, which are beside the network or in it; None without betas."""
    parent = prefix[: prefix[:-1].rfind(".") + 1]
    found = [(name, take(home + name)) for home in (prefix, parent) for name in BUFFERS]
    buffers = {name: value for name, value in found if isinstance(value, np.ndarray)}
    return buffers if "betas" in buffers else None


def _add_ema(official: Official, ema: dict, prefix: str, take) -> None:
    """Add averaged weights, and the calls of the EMA where the file counts them (else -1)."""
    shapes = lambda weights: {(name, tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(shapes(ema) ^ shapes(official.model))
    if wrong:
        raise ValueError(f"{prefix}* and the raw weights differ in names or shapes: {wrong[:3]}")
    official.ema = ema
    wrapper = prefix.partition("ema_model.")[0]
    step, initted = take(f"{wrapper}step"), take(f"{wrapper}initted")
    official.ema_step = -1 if step is None else _count(step, f"{wrapper}step")
    official.ema_initted = True if initted is None else bool(_count(initted, f"{wrapper}initted"))


def _left_out(content: dict, others: dict, sets: dict, keys: set, known: set) -> list[str]:
    """Notes about content that is not used. Tensors beside a network's own mean that it is another network."""
    for name, (_, value) in others.items():
        if isinstance(value, np.ndarray) and value.size > 1 and any(name.startswith(prefix) for prefix in sets):
            raise ValueError(f"{name!r} is not the name of a U-ViT tensor")
    found = {name: value for name, (key, value) in others.items() if key in keys and key not in known}
    empty = lambda value: value is None or (isinstance(value, (dict, list, tuple)) and not value)
    found |= {key: value for key, value in content.items() if key not in keys and not empty(value)}
    notes = [f"left out: {reprlib.repr(name)} of the file ({_kind(value)})" for name, value in found.items()]
    return notes[:20] + [f"left out: {len(notes) - 20} more parts of the file"] * (len(notes) > 20)


def _kind(value) -> str:
    return value.kind if isinstance(value, Skipped) else type(value).__name__


def _read_optimizer(official: Official, opt: dict) -> None:
    """Add AdamW's moments and settings.

    Raises:
      ValueError: training here cannot continue this optimizer.
    """
    state, groups, names = opt.get("state"), opt["param_groups"], list(official.model)
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise ValueError("it lacks state or param_groups")
    lists = [group.get("params") for group in groups]
    numbers = [number for params in lists if isinstance(params, list) for number in params]
    if len(numbers) != len(names) or not all(type(number) is int for number in numbers):
        raise ValueError(f"it knows {len(numbers)} tensors, the network has {len(names)}")
    settings = [_read_group(official, group) for group in groups]
    if any(group != settings[0] for group in settings):
        raise ValueError(f"its {len(groups)} groups of tensors have different settings; here all tensors share one")
    moments = {}
    for name, entry in ((name, state[number]) for name, number in zip(names, numbers, strict=True) if number in state):
        if not isinstance(entry, dict) or entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the state of {name} is not that of AdamW (step, exp_avg, exp_avg_sq)")
        pair = [_float32(f"{kind} of {name}", entry[kind]) for kind in ("exp_avg", "exp_avg_sq")]
        for tensor in pair:
            if tensor.shape != official.model[name].shape:
                raise ValueError(f"a moment of {name} is {tensor.shape}, the tensor {official.model[name].shape}")
        moments[name] = Moment(_count(entry["step"], f"the step of {name}"), *pair)
    if len(groups) > 1:
        official.notes.append(f"note: the optimizer's {len(groups)} groups of equal settings become one")
    official.moments, official.group = moments, settings[0]


def _read_group(official: Official, group: dict) -> dict:
    """AdamW's settings, as plain numbers and text."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"its betas is {reprlib.repr(betas)}; two numbers are wanted")
    plain = {}
    for key in (key for key in group if key != "params"):
        value = tuple(map(_scalar, betas)) if key == "betas" else _plain(official, f"the optimizer's {key}", group[key])
        if value is not None or group[key] is None:
            plain[key] = value
    numbers = [(name, plain.get(name, 0.0)) for name in ("lr", "initial_lr", "weight_decay")]
    for name, value in [*numbers, *(("betas", beta) for beta in plain["betas"])]:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
            raise ValueError(f"its {name} is {reprlib.repr(value)}, which is not a number")
    return plain


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
    """Read weights, with the schedule's buffers if they are there, and the notes of `write_safetensors`.

    path: a file, the `.safetensors.index.json` of several, or the folder of either.

    Raises:
      TorchFileError: a file is damaged, or not of a U-ViT.
      OSError: it cannot be opened.
    """
    tensors, noted, damage = (
        {},
        {},
        (safetensors.SafetensorError, ValueError, TypeError, AttributeError, RecursionError),
    )
    with prefixed(TorchFileError, f"{path}: it is damaged or not a .safetensors file (", damage, ")"):
        files, wanted = _shards(pathlib.Path(path))
        for file in files:
            torch_file.check_head(file)  # raises the ordinary errors of a missing or forbidden file, too
            with safetensors.safe_open(file, framework="numpy") as opened:
                noted |= json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
                for name in list(opened.keys()):
                    if name in tensors:
                        raise TorchFileError(f"{path}: two of its files hold {name!r}; give the one that is meant")
                    kind = opened.get_slice(name).get_dtype()
                    tensors[name] = opened.get_tensor(name) if kind in _READABLE else Skipped(f"{kind} tensor")
    with prefixed(TorchFileError, f"{path}: "):
        missing = sorted(wanted - tensors.keys())
        if missing:
            raise ValueError(f"its index names {missing[:3]}, which are in none of the files")
        official = _find_weights(tensors, set())
        official.model = {name: official.model[name] for name in sorted(official.model, key=official_rank)}
        return official, noted


def _shards(path: pathlib.Path) -> tuple[list[pathlib.Path], set[str]]:
    """The files that make up a `.safetensors`, and names of tensors that must be in them."""
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX}"))
        if not indices:
            return sorted(path.glob("*.safetensors")), set()
        path = indices[0]
    if not path.name.endswith(INDEX):
        return [path], set()
    where = json.loads(path.read_bytes())["weight_map"]
    names = sorted(set(where.values()))
    if any(pathlib.Path(name).name != name for name in names):
        raise ValueError("its index names files of other folders")
    return [path.with_name(name) for name in names], set(where)


def write_safetensors(path, model: dict[str, np.ndarray], noted: dict) -> None:
    """Write weights by official name, whole or not at all; `noted` goes into the header as JSON."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in model.items()}
    write_atomically(path, safetensors.numpy.save(tensors, {"format": "pt", _METADATA: json.dumps(noted)}))


def load(path: pathlib.Path) -> tuple[Official, dict]:
    """Read either kind of file: `read_safetensors`, or `read` and no notes."""
    return read_safetensors(path) if is_safetensors(path) else (read(path), {})


def is_safetensors(path: pathlib.Path) -> bool:
    """Whether `read_safetensors` reads this path."""
    name = path.name.lower()
    return name.endswith((".safetensors", INDEX)) or (os.path.isdir(path) and any(path.glob("*.safetensors")))


def _float32(name: str, tensor) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"{name} is a {_kind(tensor)}, not a tensor of floating-point numbers of 16 to 64 bits")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; float32 is wanted")
    return tensor.astype(np.float32, copy=False)


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
    official.notes.append(f"left out: {name}, which is not made of plain numbers and words")
    return None


# --- The settings that a file shows -------------------------------------------------------------


def architecture(model: dict[str, np.ndarray]) -> dict:
    """Settings of the network with these tensors, such as "model.width"; all but `model.heads`.

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
    return {
        "data.image_size": side * patch_size * (2 if wavelet else 1),
        "data.channels": channels,
        "model.network": "uvit",
        "model.patch_size": patch_size,
        "model.wavelet_scale": scale,
        "model.width": width,
        "model.depth": 2 * len(blocks),
        "model.mlp_ratio": shape("encoder.mid_block.mlp.fc1.weight", 2)[0] / width,
        "model.qv_bias": "encoder.mid_block.attn.q_bias" in model,
        "model.num_classes": shape("encoder.label_emb.weight", 2)[0] if conditional else 0,
        "model.time_mlp": "encoder.time_embed.0.weight" in model,
    }


def schedule_settings(official: Official) -> dict:
    """Settings of the noise schedule with the file's betas, such as "diffusion.schedule"; {} without them.

    Raises:
      ValueError: the betas are those of no schedule that is known here.
    """
    betas = (official.buffers or {}).get("betas")
    if betas is None:
        return {}
    if betas.ndim == 1 and 20 < betas.size <= 100_000 and betas.dtype in _FLOATS:
        rounding, values = max(1e-5, float(ml_dtypes.finfo(betas.dtype).eps)), betas.astype(np.float64)

        def distance(candidate):
            name, size = candidate
            known = linear_betas(values.size) if name == "linear" else cosine_betas(values.size, size=size)
            return np.max(np.abs(known - values) / (rounding * known + 1e-7))

        name, size = min(
            [("cosine", 64), ("linear", 64), *(("shifted_cosine", s) for s in range(1, 2049))], key=distance
        )
        if distance((name, size)) < 1:
            shift = {"diffusion.shift_size": size} if name == "shifted_cosine" else {}
            return {"diffusion.process": "ddpm", "diffusion.schedule": name, "diffusion.timesteps": values.size} | shift
    raise ValueError("its betas are those of no noise schedule that is known here (linear, cosine, shifted cosine)")
