"""The U-ViT's checkpoints, as the official trainer writes them.

A dict of `step`, `model` and `ema` (state dicts of the diffusion wrapper: 13 schedule buffers and, under `model.`, the
network), `opt` (AdamW, by position of the tensors) and `scaler`.
"""

import collections
import functools
import math
import typing

import ml_dtypes
import numpy as np

from maskdm_jax.build import noise_schedule
from maskdm_jax.config import Config, steps_before
from maskdm_jax.diffusion.gaussian import Schedule, cosine_betas, linear_betas
from maskdm_jax.errors import ConfigError
from maskdm_jax.interop.names import shape_of
from maskdm_jax.training.state import EMA_COPY_STEPS

BUFFERS = {  # of the official diffusion wrapper, in its order, from a `gaussian.Schedule`
    "alphas": lambda s: 1 - s.betas,
    "betas": lambda s: s.betas,
    "alphas_cumprod": lambda s: s.alpha_bar,
    "alphas_cumprod_prev": lambda s: np.append(1, s.alpha_bar[:-1]),
    "sqrt_alphas_cumprod": lambda s: np.sqrt(s.alpha_bar),
    "sqrt_one_minus_alphas_cumprod": lambda s: np.sqrt(1 - s.alpha_bar),
    "log_one_minus_alphas_cumprod": lambda s: np.log(1 - s.alpha_bar),
    "sqrt_recip_alphas_cumprod": lambda s: np.sqrt(1 / s.alpha_bar),
    "sqrt_recipm1_alphas_cumprod": lambda s: np.sqrt(1 / s.alpha_bar - 1),
    "posterior_variance": lambda s: s.posterior.variance,
    "posterior_log_variance_clipped": lambda s: np.log(np.maximum(s.posterior.variance, 1e-20)),
    "posterior_mean_coef1": lambda s: s.posterior.x0,
    "posterior_mean_coef2": lambda s: s.posterior.xt,
}
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
EMAS = 1  # that the trainer keeps
KEYS = ()  # of a file, besides those of weights, optimizer and step
UNSEEN = ("model.heads", "diffusion.objective", "diffusion.schedule")  # settings that a file may not show


def schedule_buffers(schedule: Schedule) -> dict[str, np.ndarray]:
    """The 13 buffers of the official diffusion wrapper, float32 [T]."""
    return {name: column(schedule).astype(np.float32) for name, column in BUFFERS.items()}


def content(official, config: Config, stage: str, optimizer: dict) -> dict:
    """The content of a file that the official trainer resumes from, fine-tunes from and samples from."""
    buffers = schedule_buffers(noise_schedule(config))
    wrapper = buffers | {f"model.{name}": tensor for name, tensor in official.model.items()}
    averaged = official.weights.get("ema", official.model)
    averaged = buffers | {f"model.{name}": tensor for name, tensor in averaged.items()}
    calls = official.step if official.ema_step is None else official.ema_step
    ema = {"initted": np.bool_(official.ema_initted), "step": np.int64(calls)}
    ema |= {f"online_model.{name}": tensor for name, tensor in wrapper.items()}  # the same arrays: stored once
    ema |= {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    return {
        "step": official.step,
        "model": collections.OrderedDict(wrapper),
        "opt": optimizer,
        "ema": collections.OrderedDict(ema),
        "scaler": None,
    }


def optimizer_groups(model: dict) -> list[list[str]]:
    """Names of the tensors in the groups of the trainer's optimizer."""
    return [list(model)]


def shown(official) -> dict:
    """Settings that a file shows, such as "model.width": those of the network and of the noise schedule.

    Raises:
      ValueError: the tensors do not make a U-ViT, or the schedule is not known here.
    """
    return _architecture(official.model) | _schedule_settings(official.buffers)


def settings(official, shown: dict, heads: int | None, class_tokens_from: int | None) -> dict:
    """Settings for a config made from a file, besides those in `shown`; notes say what is assumed.

    Raises:
      ConfigError: the number of attention heads cannot be told.
    """
    width = shown["model.width"]
    if class_tokens_from is not None:
        raise ConfigError("--class_tokens_from is for a JiT; the file holds a U-ViT")
    if heads is None and width % 64:
        raise ConfigError(
            "the number of attention heads cannot be seen in the file: pass --num_heads=H "
            f"(the official models have width / 64, but the width of this one is {width})"
        )
    if heads is None:
        note = f"note: the file does not show its attention heads; width / 64 = {width // 64} is assumed"
        official.notes.append(note)
    if official.buffers is None:
        official.notes.append("note: the file does not show its noise schedule; cosine is assumed (or give --config)")
    official.notes.append("note: the file does not show its objective; noise is assumed (or give --config)")
    return {"model.heads": width // 64 if heads is None else heads}


def differences(official, config: Config, stage: str) -> typing.Iterator[str]:
    """Notes about the parts of a file that training here does not use as they are."""
    ours = schedule_buffers(noise_schedule(config))
    if official.buffers is not None and not all(np.array_equal(ours[k], official.buffers.get(k)) for k in ours):
        yield "note: the file's schedule buffers are incomplete or differ by rounding; ours are used"
    done = official.step + steps_before(config, stage)
    rests = official.ema_step not in (None, done) or (done > EMA_COPY_STEPS and not official.ema_initted)
    if official.emas and rests:
        yield (
            f"note: the file's EMA says step {official.ema_step}, initted {official.ema_initted} at training step "
            f"{done}; training here goes by the training step"
        )


def _architecture(model: dict[str, np.ndarray]) -> dict:
    shape = functools.partial(shape_of, model)
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


def _schedule_settings(buffers: dict | None) -> dict:
    """Settings of the noise schedule with these betas; {} without them."""
    if buffers is None:
        return {}
    betas = buffers["betas"]
    if betas.ndim == 1 and 20 < betas.size <= 100_000 and betas.dtype in FLOATS:
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


def unknown(config: Config) -> str:
    """Why the official code cannot use a run's weights; "" if it can."""
    process = config.diffusion.process
    return "" if process == "ddpm" else f"the official code knows DDPM alone, and this run is of the process {process}"


def described(config: Config) -> typing.Iterator[str]:
    """What a user of an exported file should know: the `network` section of an official config file."""
    model, wavelet = config.model, bool(config.model.wavelet_scale)
    yield "its network in the official code's terms:"
    yield "network:"
    settings = {"name": "maskdwt" if wavelet else "maskdm", "img_size": config.data.image_size // (2 if wavelet else 1)}
    settings |= {"patch_size": model.patch_size, "in_chans": config.data.channels * (4 if wavelet else 1)}
    if wavelet:
        settings |= {"data_chans": config.data.channels, "level": 1, "scale": model.wavelet_scale}
    settings |= {"encoder_embed_dim": model.width, "encoder_depth": model.depth, "encoder_heads": model.heads}
    settings |= {"decoder_depth": 0, "mlp_ratio": model.mlp_ratio, "qkv_bias": model.qv_bias}
    settings |= {"num_classes": model.num_classes or -1, "use_final_conv": False, "mlp_time_embed": model.time_mlp}
    for name, value in settings.items():
        yield f"  {name}: {value}"
