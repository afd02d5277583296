"""The JiT's checkpoints, as its authors' code writes them.

A dict of `model`, `model_ema1` and `model_ema2` (state dicts; the network is under `net.`), `optimizer` (AdamW with two
groups: vectors and biases first), `epoch`, and `args`, an argparse.Namespace of settings.
"""

import argparse
import collections
import functools
import math
import re
import typing

import numpy as np

from maskdm_jax.config import Config, Data, Flow, Jit, Stage
from maskdm_jax.diffusion.process import CLAMP
from maskdm_jax.errors import ConfigError
from maskdm_jax.interop.names import shape_of
from maskdm_jax.models.jit import sine_cosine

EMAS = 2  # that the authors' code keeps
KEYS = ("args", "epoch")  # of a file, besides those of weights and optimizer
UNSEEN = ("model.jit.class_tokens_from", "diffusion.flow.noise_scale")  # settings that a file may not show
POSITIONS = "pos_embed"
_SIZES = {  # of the authors: width, depth, heads, width of the bottleneck, block before which the class tokens join
    "B": (768, 12, 12, 128, 4),
    "L": (1024, 24, 16, 128, 8),
    "H": (1280, 32, 16, 256, 10),
}


# --- Writing ------------------------------------------------------------------------------------


def optimizer_groups(model: dict) -> list[list[str]]:
    """Names of the tensors in the groups of the authors' optimizer: vectors and biases, and the rest."""
    is_vector = lambda name: model[name].ndim <= 1 or name.endswith(".bias")
    return [[name for name in model if is_vector(name)], [name for name in model if not is_vector(name)]]


def content(official, config: Config, stage: str, optimizer: dict) -> dict:
    """The content of a file that the authors' code resumes from and samples from."""
    weights, fixed = {"ema": official.model} | official.weights, {POSITIONS: positions(config)}
    weights = {"ema2": weights["ema"]} | weights
    named = lambda tensors: collections.OrderedDict((f"net.{name}", tensor) for name, tensor in tensors.items())
    model, ema, ema2 = (named(fixed | weights[name]) for name in ("params", "ema", "ema2"))
    args = argparse.Namespace(**_args(config, config.stage[stage]))
    return dict(model=model, optimizer=optimizer, epoch=0, args=args, model_ema1=ema, model_ema2=ema2)


def positions(config: Config) -> np.ndarray:
    """The position embedding of the authors' network, [1, patches, width]."""
    return sine_cosine(config.model.width, config.data.image_size // config.model.patch_size)[None]


def unknown(config: Config) -> str:
    """Why the authors' code cannot use a run's weights; "" if it can."""
    process, objective = config.diffusion.process, config.diffusion.objective
    if (process, objective) == ("flow", "x0"):
        return ""
    return f"the authors' code knows flow matching with x0 alone, and this run is {process} with {objective}"


def described(config: Config) -> typing.Iterator[str]:
    """What a user of an exported file should know."""
    yield "its network in the authors' terms:"
    jit = config.model.jit
    found = dict(
        input_size=config.data.image_size, patch_size=config.model.patch_size, in_channels=config.data.channels
    )
    found |= dict(hidden_size=config.model.width, depth=config.model.depth, num_heads=config.model.heads)
    found |= dict(mlp_ratio=config.model.mlp_ratio, num_classes=config.model.num_classes)
    found |= dict(
        bottleneck_dim=jit.bottleneck, in_context_len=jit.class_tokens, in_context_start=jit.class_tokens_from
    )
    for name, value in found.items():
        yield f"  {name}: {value}"


def _args(config: Config, stage: Stage) -> dict:
    """The authors' settings of a stage that was trained here."""
    model, sampling, flow = config.model, config.sampling, config.diffusion.flow
    decays = (stage.ema_decay, *stage.more_ema_decays)
    return dict(
        model=_name(model),
        img_size=config.data.image_size,
        class_num=model.num_classes,
        attn_dropout=0.0,
        proj_dropout=model.jit.dropout,
        label_drop_prob=config.data.label_dropout,
        P_mean=flow.mean,
        P_std=flow.std,
        t_eps=CLAMP,
        noise_scale=flow.noise_scale,
        ema_decay1=decays[0],
        ema_decay2=decays[:2][-1],
        sampling_method=sampling.method if sampling.method in ("euler", "heun") else "heun",
        num_sampling_steps=sampling.steps,
        cfg=1.0 + sampling.guidance * (sampling.weak == "unlabelled"),
        interval_min=sampling.guidance_from,
        interval_max=sampling.guidance_to,
        lr=stage.learning_rate,
        epochs=1,
    )


def _name(model) -> str:
    """The authors' name of a network, if it is one of theirs."""
    size = (model.width, model.depth, model.heads, model.jit.bottleneck, model.jit.class_tokens_from)
    letter = next((letter for letter, theirs in _SIZES.items() if theirs == size), None)
    usual = (model.jit.class_tokens, model.mlp_ratio) == (32, 4.0)
    return f"JiT-{letter}/{model.patch_size}" if letter and usual else "custom"


# --- The settings that a file shows -------------------------------------------------------------


def shown(official) -> dict:
    """Settings that a file shows, such as "model.width": those of the network, and what `args` says of the process.

    Raises:
      ValueError: the tensors do not make a JiT; the message names one.
    """
    args = official.args
    found = _architecture(official.model | official.fixed)
    _check_positions(official.fixed[POSITIONS], found)
    found |= {"diffusion.process": "flow", "diffusion.objective": "x0"}
    if is_number(args.get("noise_scale")):
        found["diffusion.flow.noise_scale"] = args["noise_scale"]
    known = re.fullmatch(r"JiT-([BLH])/\d+", str(args.get("model")))
    if known and found["model.jit.class_tokens"]:
        found["model.jit.class_tokens_from"] = _SIZES[known[1]][-1]
    return found


def settings(official, shown: dict, heads: int | None, class_tokens_from: int | None) -> dict:
    """Settings for a config made from a file, besides those in `shown`; notes say what is assumed.

    Raises:
      ConfigError: the block before which the class tokens join cannot be told, or a flag tells what the file shows.
    """
    if heads is not None:
        raise ConfigError("--num_heads is for a U-ViT; the file holds a JiT, whose tensors show its heads")
    args, group, notes = official.args, official.group or {}, official.notes
    number = lambda name, default: args[name] if is_number(args.get(name)) else default
    found = {
        "data.label_dropout": number("label_drop_prob", Data.label_dropout),
        "model.jit.dropout": number("proj_dropout", Jit.dropout),
        "diffusion.flow.mean": number("P_mean", Flow.mean),
        "diffusion.flow.std": number("P_std", Flow.std),
        "sampling.method": "euler" if args.get("sampling_method") == "euler" else "heun",
        "sampling.steps": round(number("num_sampling_steps", 50)),
        "sampling.guidance": max(number("cfg", 1.0) - 1, 0.0) * bool(shown["model.num_classes"]),
        "sampling.guidance_from": number("interval_min", 0.1),
        "sampling.guidance_to": number("interval_max", 1.0),
        "stage.learning_rate": number("lr", group.get("lr", 0.0)),
        "stage.weight_decay": group.get("weight_decay", 0.0),
        "stage.clip_norm": 0.0,
        "stage.ema_law": "plain",
        "stage.ema_decay": number("ema_decay1", 0.9999),
        "stage.more_ema_decays": (number("ema_decay2", 0.9996),)[: max(len(official.emas) - 1, 0)],
        "model.jit.class_tokens_from": _class_tokens_from(args, shown, class_tokens_from, notes),
    }
    if "diffusion.flow.noise_scale" not in shown:
        scale = found["diffusion.flow.noise_scale"] = shown["data.image_size"] / 256
        notes.append(f"note: the file does not show its noise scale; {scale:g} = image side / 256 is assumed")
    return found


def _class_tokens_from(args: dict, shown: dict, flag: int | None, notes: list[str]) -> int:
    """The block before which the class tokens join: what the file shows, the flag, or that of the authors' size."""
    known = shown.get("model.jit.class_tokens_from") if shown["model.jit.class_tokens"] else 0
    if known is not None and flag is not None:
        raise ConfigError(f"--class_tokens_from is {flag}, but the file shows that it is {known}; leave it out")
    if known is not None or flag is not None:
        return flag if known is None else known
    size = next((size for size in _SIZES.values() if size[:2] == (shown["model.width"], shown["model.depth"])), None)
    if size is None or "model" in args:  # the name of another network
        raise ConfigError(
            "the block before which the class tokens join the patches cannot be seen in the file: pass "
            "--class_tokens_from=N (the authors' JiT-B has 4, JiT-L 8, JiT-H 10)"
        )
    notes.append(f"note: class tokens are assumed to join before block {size[-1]}, as in the authors' JiT")
    return size[-1]


def is_number(value) -> bool:
    """Whether a value of a file is a number of a sensible size."""
    return type(value) in (int, float) and abs(value) < 1e300


def differences(official, config: Config, stage: str) -> typing.Iterator[str]:
    """Notes about the parts of a file that training here does not use as they are."""
    args = official.args
    for name, value in (("t_eps", CLAMP), ("attn_dropout", 0.0)):
        if is_number(args.get(name)) and args[name] != value:
            yield f"note: the file was trained with {name} {args[name]}; training here has {value}"


def _architecture(tensors: dict[str, np.ndarray]) -> dict:
    shape = functools.partial(shape_of, tensors)
    bottleneck, channels, patch_size, _ = shape("x_embedder.proj1.weight", 4)
    width = shape("x_embedder.proj2.weight", 4)[0]
    _, patches, _ = shape(POSITIONS, 3)
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{POSITIONS!r} has {patches} positions, which are not those of square images")
    head, hidden = shape("blocks.0.attn.q_norm.weight", 1)[0], shape("blocks.0.mlp.w3.weight", 2)[1]
    # The hidden width is int(MLP's width * 2 / 3), for one or two of the MLP's widths.
    widths = [n for n in range(3 * hidden // 2, 3 * hidden // 2 + 3) if int(n * 2 / 3) == hidden]
    return {
        "data.image_size": side * patch_size,
        "data.channels": channels,
        "model.network": "jit",
        "model.patch_size": patch_size,
        "model.width": width,
        "model.depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "model.heads": max(width // head, 1),
        "model.mlp_ratio": max(widths, key=lambda n: math.gcd(n, width)) / width,
        "model.num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "model.jit.bottleneck": bottleneck,
        "model.jit.class_tokens": shape("in_context_posemb", 3)[1] if "in_context_posemb" in tensors else 0,
    }


def _check_positions(theirs: np.ndarray, found: dict) -> None:
    """Compare a file's position embedding with ours, which is computed.

    That of an EMA, which the authors average like a weight, differs by rounding.
    """
    width, side = found["model.width"], found["data.image_size"] // found["model.patch_size"]
    if width % 4:
        raise ValueError(f"its width is {width}; a JiT has a multiple of 4")
    ours = sine_cosine(width, side)[None]
    if theirs.shape != ours.shape or not np.abs(theirs - ours).max() < 0.01:
        raise ValueError(f"{POSITIONS!r} is not the sine-cosine embedding of a grid of {side} x {side} patches")
