"""Other people's checkpoints of a U-ViT or a JiT, read and written; see `uvit_file` and `jit_file` for what is in them.

A `.safetensors` file holds the network's tensors alone, under the same names. Other files are read wherever they keep
such tensors: those whose names differ from the official ones by the same prefix are a set of weights.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import reprlib
import types
import typing

import numpy as np
import safetensors
import safetensors.numpy

from maskdm_jax.config import Config
from maskdm_jax.errors import TorchFileError, prefixed
from maskdm_jax.interop import jit_file, torch_file, uvit_file
from maskdm_jax.interop.names import NETWORKS, Names
from maskdm_jax.interop.pickles import Skipped
from maskdm_jax.storage import is_remote, local_copy, write_atomically
from maskdm_jax.training import checkpoint
from maskdm_jax.training.state import ema_names

_FORMATS = {"uvit": uvit_file, "jit": jit_file}  # by `config.model.network`
_METADATA = "maskdm_jax"  # key in the header of a .safetensors file
_IN_FOLDER = "model.safetensors"  # the file that is read of a folder
_READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # types of safetensors
_EPS = 1e-8  # of `training.state.make_optimizer`
_WANTED = (
    "a checkpoint of the official trainer is a dict of step, model, opt, ema and scaler, one of the JiT's authors of "
    "model, model_ema1, model_ema2, optimizer, epoch and args"
)
# Modules that PyTorch wraps around others put these into the names of tensors.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_EMA = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow)(?:[._\d]|$)")  # in the prefix of averaged weights


class Moment(typing.NamedTuple):
    """AdamW's state of one tensor."""

    step: int
    mu: np.ndarray  # float32, in the tensor's shape
    nu: np.ndarray


@dataclasses.dataclass
class Official:
    """The content of a checkpoint; tensors by their name in PyTorch's network, in its order."""

    network: str  # as in `config.model.network`
    model: dict[str, np.ndarray]  # raw weights
    emas: list[dict] = dataclasses.field(default_factory=list)  # averaged weights; the first is that to sample from
    moments: dict[str, Moment] | None = None  # tensors that never had a gradient have none
    group: dict | None = None  # AdamW's settings, without `params`
    step: int = 0
    optimizer_problem: str = ""  # why the file's optimizer was not read, if it has one
    notes: list[str] = dataclasses.field(default_factory=list)  # lines for the user: what was left out or changed
    fixed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # tensors of the network, not trained
    # Of the U-ViT's official trainer:
    ema_step: int | None = None  # calls of the EMA, if the file counts them
    ema_initted: bool = False  # whether the EMA holds weights; without it the next call copies
    buffers: dict[str, np.ndarray] | None = None  # of the noise schedule, `betas` at least
    # Of the JiT's authors:
    args: dict = dataclasses.field(default_factory=dict)  # settings: numbers and words

    @property
    def names(self) -> Names:
        """Names of the network's tensors."""
        return NETWORKS[self.network]

    @property
    def format(self) -> types.ModuleType:
        """Functions for what is particular to files of this network."""
        return _FORMATS[self.network]

    @property
    def weights(self) -> dict[str, dict]:
        """All sets of weights by name: params, ema, ema2, ..."""
        return dict(zip(["params", *ema_names(len(self.emas))], [self.model, *self.emas], strict=True))


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
        official = _find_weights(content, {optimizer, step})
        args = content.get("args")
        args = getattr(args, "settings", args)  # of a namespace
        settings = args.items() if isinstance(args, dict) else ()
        official.args = {key: value for key, value in settings if isinstance(value, (int, float, str))}
        if optimizer is not None:
            try:
                _read_optimizer(official, content[optimizer])
            except ValueError as error:
                official.optimizer_problem = f"{optimizer!r}: {error}"
        if step is not None:
            official.step = _count(content[step], step)
        elif official.moments:
            official.step = max(moment.step for moment in official.moments.values())
        return official


def _find_weights(content: dict, known: set) -> Official:
    """Find raw and averaged weights in nested dicts; what belongs to neither, nor to the keys `known`, gets a note."""
    leaves = _leaves(content)
    divided = {key: {name: names.divide(name) for name in leaves} for key, names in NETWORKS.items()}
    network = max(divided, key=lambda key: sum(tensor is not None for _, tensor in divided[key].values()))
    names, known, sets = NETWORKS[network], known | set(_FORMATS[network].KEYS), {}
    used = set(known)

    def take(name):
        key, value = leaves.pop(name, (None, None))
        used.add(key)
        return value

    for name, (prefix, tensor_name) in divided[network].items():
        if tensor_name:
            sets.setdefault(prefix, {})[tensor_name] = take(name)
    raw, averaged = _raw_and_averaged(sets)
    buffers = {prefix: _take_buffers(take, prefix) for prefix in sets}
    weights = [{n: _float32(p + n, sets[p][n]) for n in sets[p]} for p in (raw, *averaged)]
    fixed = [{n: tensors.pop(n) for n in names.fixed if n in tensors} for tensors in weights]
    official = Official(network, weights[0], weights[1:], fixed=fixed[0], buffers=buffers[raw])
    broken = [name for name, tensor in official.model.items() if not np.isfinite(tensor).all()]
    if broken:
        official.notes.append(f"note: {len(broken)} tensors hold NaN or infinity, such as {broken[0]}")
    if "online_model." in raw:
        official.notes.append("note: the file has no 'model'; the raw weights are those of the EMA's online_model")
    if raw in averaged:
        official.notes.append(f"note: the file has no raw weights; those of {raw}* serve")
    if any(getattr(tensor, "dtype", None) == np.float64 for found in sets.values() for tensor in found.values()):
        official.notes.append("note: float64 weights are rounded to float32")
    _check_averages(official, averaged)
    if averaged:
        _count_calls(official, averaged[0], take)
    official.notes += _left_out(content, leaves, sets, used, known, names)
    return official


def _raw_and_averaged(sets: dict) -> tuple[str, list[str]]:
    """The prefix of the raw weights, and those of averages.

    Without raw weights, the first average serves as them; if it is the only one, it is not listed as an average.
    """
    copies = [prefix for prefix in sets if "online_model." in prefix]
    emas = sorted(prefix for prefix in sets if prefix not in copies and _EMA.search(prefix))
    plain = [prefix for prefix in sets if prefix not in (*copies, *emas)] or copies
    if len(plain) > 1:
        both = " and ".join(f"{prefix + '*'!r} ({len(sets[prefix])} tensors)" for prefix in plain[:2])
        raise ValueError(f"it holds several networks, {both}; save the one that is meant in a file of its own")
    if not plain and not emas:
        raise ValueError(f"it holds no tensors of a U-ViT or a JiT; {_WANTED}")
    return (plain[0], emas) if plain else (emas[0], emas if len(emas) > 1 else [])


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
            if name in leaves and any(names.divide(name)[1] for names in NETWORKS.values()):
                raise ValueError(f"there are two tensors {name!r}, with and without a wrapper's name")
            leaves[name] = (home if depth else key, value)

    walk(content, "", None, 0)
    return leaves


def _take_buffers(take, prefix: str) -> dict | None:
    """The schedule's buffers, which are beside the network or in it; None without betas."""
    parent = prefix[: prefix[:-1].rfind(".") + 1]
    found = [(name, take(home + name)) for home in (prefix, parent) for name in uvit_file.BUFFERS]
    buffers = {name: value for name, value in found if isinstance(value, np.ndarray)}
    return buffers if "betas" in buffers else None


def _check_averages(official: Official, prefixes: list[str]) -> None:
    shapes = lambda weights: {(name, tensor.shape) for name, tensor in weights.items()}
    for prefix, ema in zip(prefixes, official.emas, strict=True):
        if wrong := sorted(shapes(ema) ^ shapes(official.model)):
            raise ValueError(f"{prefix}* and the raw weights differ in names or shapes: {wrong[:3]}")


def _count_calls(official: Official, prefix: str, take) -> None:
    """Read how often the EMA with this prefix was called."""
    wrapper = prefix.partition("ema_model.")[0]
    step, initted = take(f"{wrapper}step"), take(f"{wrapper}initted")
    official.ema_step = None if step is None else _count(step, f"{wrapper}step")
    official.ema_initted = True if initted is None else bool(_count(initted, f"{wrapper}initted"))


def _left_out(content: dict, leaves: dict, sets: dict, used: set, known: set, names: Names) -> list[str]:
    """Notes about content that is not used. Tensors beside a network's own mean that it is another network."""
    for name, (_, value) in leaves.items():
        if isinstance(value, np.ndarray) and value.size > 1 and any(name.startswith(prefix) for prefix in sets):
            raise ValueError(f"{name!r} is not the name of a {names.network} tensor")
    found = {name: value for name, (key, value) in leaves.items() if key in used and key not in known}
    empty = lambda value: value is None or (isinstance(value, (dict, list, tuple)) and not value)
    found |= {key: value for key, value in content.items() if key not in used and not empty(value)}
    notes = [f"left out: {reprlib.repr(name)} of the file ({_kind(value)})" for name, value in found.items()]
    return notes[:20] + [f"left out: {len(notes) - 20} more parts of the file"] * (len(notes) > 20)


def _kind(value) -> str:
    return value.kind if isinstance(value, Skipped) else type(value).__name__


def _read_optimizer(official: Official, opt: dict) -> None:
    """Add AdamW's moments and settings.

    Raises:
      ValueError: training here cannot continue this optimizer.
    """
    state, groups = opt.get("state"), opt["param_groups"]
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise ValueError("it lacks state or param_groups")
    lists = [group.get("params") for group in groups]
    lists = [params for params in lists if isinstance(params, list)]
    sizes = list(map(len, lists))
    names = _numbered(official.model, sizes)
    if sum(sizes) != len(names) or not all(type(number) is int for params in lists for number in params):
        raise ValueError(f"it knows {sum(sizes)} tensors, the network has {len(names)}")
    settings = [_read_group(group) for group in groups]
    if any(group != settings[0] for group in settings):
        raise ValueError(f"its {len(groups)} groups of tensors have different settings; here all tensors share one")
    numbers = [number for params in lists for number in params]
    moments = {}
    for name, entry in ((name, state[number]) for name, number in zip(names, numbers, strict=True) if number in state):
        if not isinstance(entry, dict) or entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the state of {name} is not that of AdamW (step, exp_avg, exp_avg_sq)")
        pair = [_float32(f"{kind} of {name}", entry[kind]) for kind in ("exp_avg", "exp_avg_sq")]
        for tensor in pair:
            if tensor.shape != official.model[name].shape:
                raise ValueError(f"a moment of {name} is {tensor.shape}, the tensor {official.model[name].shape}")
        moments[name] = Moment(_count(entry["step"], f"the step of {name}"), *pair)
    official.moments, official.group = moments, settings[0]


def _numbered(model: dict, sizes: list[int]) -> list[str]:
    """Names of the tensors in the order in which an optimizer with groups of these sizes numbers them.

    Two groups whose sizes fit are those of timm's `add_weight_decay`, which the JiT's authors use.
    """
    groups = jit_file.optimizer_groups(model)
    return [*itertools.chain(*groups)] if sizes == list(map(len, groups)) else list(model)


def _optimizer(official: Official) -> dict:
    """The state dict of PyTorch's AdamW; without moments it starts anew."""
    groups, moments = official.format.optimizer_groups(official.model), official.moments or {}
    numbers = {name: number for number, name in enumerate(itertools.chain(*groups))}
    state = {
        number: {"step": np.float32(moments[name].step), "exp_avg": moments[name].mu, "exp_avg_sq": moments[name].nu}
        for name, number in numbers.items()
        if name in moments
    }
    return {"state": state, "param_groups": [official.group | {"params": [numbers[n] for n in g]} for g in groups]}


def _read_group(group: dict) -> dict:
    """AdamW's settings in a group of tensors, as numbers.

    Raises:
      ValueError: some are not, or training here has other ones.
    """
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"its betas is {reprlib.repr(betas)}; two numbers are wanted")

    def number(name, value):
        if not jit_file.is_number(_scalar(value)):
            raise ValueError(f"its {name} is {reprlib.repr(value)}, which is not a number")
        return _scalar(value)

    rates = {name: number(name, group[name]) for name in ("lr", "initial_lr", "weight_decay") if name in group}
    fixed = dict(eps=_EPS, amsgrad=False, maximize=False)
    fixed |= {"decoupled_weight_decay": True} if rates.get("weight_decay") else {}  # not in Adam
    for name, ours in fixed.items():
        value = _scalar(group.get(name, ours))
        if isinstance(value, np.ndarray) or value != ours:
            raise ValueError(f"its {name} is {reprlib.repr(value)}; training here has {ours}")
    return rates | {"betas": tuple(number("betas", beta) for beta in betas)}


def write(path, official: Official, config: Config, stage: str) -> None:
    """Write a `.pt` file of a stage as the network's authors do, whole or not at all; `official` must have `group`."""
    torch_file.write(path, official.format.content(official, config, stage, _optimizer(official)))


def read_safetensors(path) -> tuple[Official, dict]:
    """Read weights, with the schedule's buffers if they are there, and the notes of `write_safetensors`.

    path: a file, or a folder with a `model.safetensors` or a single other one.

    Raises:
      TorchFileError: it is damaged, not of a known network, or weights in several files.
      OSError: it cannot be opened.
    """
    path = pathlib.Path(path)
    files = [path]
    if path.is_dir():
        files = [path / _IN_FOLDER] if (path / _IN_FOLDER).exists() else list(path.glob("*.safetensors"))
    if len(files) > 1 or path.suffix == ".json":
        raise TorchFileError(f"{path}: weights in several files are not read; merge them into one {_IN_FOLDER}")
    damage = (safetensors.SafetensorError, ValueError, TypeError, AttributeError, RecursionError)
    with prefixed(TorchFileError, f"{path}: it is damaged or not a .safetensors file (", damage, ")"):
        torch_file.check_head(files[0])  # raises the ordinary errors of a missing or forbidden file, too
        with safetensors.safe_open(files[0], framework="numpy") as opened:
            tensors, noted = {}, {} | json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
            for name in list(opened.keys()):
                kind = opened.get_slice(name).get_dtype()
                tensors[name] = opened.get_tensor(name) if kind in _READABLE else Skipped(f"{kind} tensor")
    with prefixed(TorchFileError, f"{path}: "):
        official = _find_weights(tensors, set())
    in_order = lambda weights: {name: weights[name] for name in sorted(weights, key=official.names.rank)}
    official.model, official.emas = in_order(official.model), list(map(in_order, official.emas))
    return official, noted


def write_safetensors(path, model: dict[str, np.ndarray], noted: dict) -> None:
    """Write weights by official name, whole or not at all; `noted` goes into the header as JSON."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in model.items()}
    write_atomically(path, safetensors.numpy.save(tensors, {"format": "pt", _METADATA: json.dumps(noted)}))


def load(path: pathlib.Path) -> tuple[Official, dict]:
    """Read either kind of file: `read_safetensors`, or `read` and no notes."""
    with local_copy(path) as file:
        return read_safetensors(file) if is_safetensors(path) else (read(file), {})


def is_safetensors(path: pathlib.Path) -> bool:
    """Whether `read_safetensors` handles a path, if only to refuse weights in several files."""
    name = path.name.lower()
    is_dir = path.is_dir() if is_remote(path) else os.path.isdir(path)  # Path.is_dir raises if a name is too long
    is_run = is_dir and (path / checkpoint.FOLDER).is_dir()  # which may hold exports, too
    return name.endswith((".safetensors", ".safetensors.index.json")) or (
        is_dir and not is_run and any(path.glob("*.safetensors"))
    )


def _float32(name: str, tensor) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"{name} is a {_kind(tensor)}, not a tensor of floating-point numbers of 16 to 64 bits")
    if tensor.dtype not in uvit_file.FLOATS:
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
