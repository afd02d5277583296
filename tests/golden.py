"""Golden cases of the official implementation, found in a folder by what they hold, and our settings for them."""

import dataclasses
import json
import pathlib
import zlib

import jax
import numpy as np

from maskdm_jax import config as config_lib
from maskdm_jax.interop import official, torch_file
from maskdm_jax.interop.names import JIT, UVIT

TINY = dict(
    img_size=16, patch_size=2, in_chans=3, encoder_embed_dim=32, encoder_depth=4, encoder_heads=4, mlp_ratio=2
) | dict(qkv_bias=False, num_classes=-1, mlp_time_embed=False)  # of official_tiny.pt
MASKS = ("mask", "detail_mask")
KINDS = ("wavelet", "jit", "uvit", "train", "schedules", "edm", "flow", "samplers", "inception")
OBJECTIVES = {"pred_noise": "noise", "pred_v": "v", "pred_x0": "x0"}


def raw_weights(path) -> dict:
    """Our parameters from the raw weights in a file of a U-ViT."""
    return UVIT.params(official.load(path)[0].model)


def same(a, b, where="file"):
    """Contents of two files are equal bit for bit and in the same order: arrays of any library, numbers, texts."""
    is_array = isinstance(a, (np.ndarray, jax.Array)) or hasattr(a, "detach")
    assert is_array or type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif is_array:
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        a, b = (np.asarray(x.detach() if hasattr(x, "detach") else x) for x in (a, b))
        assert a.tobytes() == b.tobytes(), where
    else:
        assert a == b, where


def cases(folder, kind: str):
    """Paths of the `.npz` files of one of the `KINDS`."""
    return [path for path in sorted(pathlib.Path(folder).glob("*.npz")) if _kind(path) == kind]


def _kind(path) -> str | None:
    with np.load(path) as file:
        names, meta = set(file.files), json.loads(str(file["meta"])) if "meta" in file.files else {}
    marks = dict(  # the first that holds
        wavelet="out_visible_approx" in names,
        jit="loss_visible" in names,
        uvit="out_visible" in names,
        train="param_norm" in names,
        schedules=any(n.endswith("/betas") for n in names),
        edm="precond/x" in names,
        flow="t_eps" in meta and "cases" in meta,
        samplers=any(n.endswith("/sample") for n in names),
        inception=any(n.endswith("/features2048") for n in names),
    )
    return next((kind for kind in KINDS if marks[kind]), None)


def load(path):
    """Arrays and meta of a case."""
    arrays = dict(np.load(path))
    return arrays, json.loads(str(arrays.pop("meta")))


def weight(name: str, shape) -> np.ndarray:
    """The value that the recipe gives to a U-ViT tensor, a function of its official name and shape."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if "norm" in name and name.endswith("weight"):
        return (1.0 + 0.1 * z).astype(np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 0
    embedding = "." in name and "emb" in name.split(".")[-2]
    scale = fan_in**-0.5 if name.endswith("weight") and fan_in and not embedding else 0.1
    return (scale * z).astype(np.float32)


def inception_weight(name: str, shape) -> np.ndarray:
    """The value that the recipe gives to a tensor of FID's Inception network."""
    if name.endswith("num_batches_tracked"):
        return np.array(0)
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        z = 1.0 + 0.2 * np.tanh(z)
    elif name.endswith("bn.weight"):
        z = 1.0 + 0.1 * z
    else:
        z = (0.1 if name.endswith(("bias", "running_mean")) else (2.0 / np.prod(shape[1:])) ** 0.5) * z
    return z.astype(np.float32)


def params(state_dict: dict) -> dict:
    """Our parameters from {official name: shape}."""
    return UVIT.params({name: weight(name, shape) for name, shape in state_dict.items()})


def config(network: dict, stage: dict | None = None, mask: dict | None = None, diffusion: dict | None = None):
    """Our config of an official network (and stage)."""
    wavelet = "data_chans" in network
    mask = dict(mask or {})
    rates = mask.pop("ratio", 0.0)
    rates = rates if isinstance(rates, (list, tuple)) else (rates, rates)
    masks = {
        name: dataclasses.asdict(config_lib.Mask(**mask, rate=rate)) for name, rate in zip(MASKS, rates, strict=True)
    }
    c = config_lib.default()
    c.data.update(
        path="digits",
        image_size=network["img_size"] * (2 if wavelet else 1),
        channels=network["data_chans" if wavelet else "in_chans"],
        labels=network["num_classes"] > 0,
        threads=1,
    )
    c.model.update(
        patch_size=network["patch_size"],
        wavelet_scale=network["scale"] if wavelet else 0,
        width=network["encoder_embed_dim"],
        depth=network["encoder_depth"],
        heads=network["encoder_heads"],
        mlp_ratio=network["mlp_ratio"],
        qv_bias=network["qkv_bias"],
        num_classes=max(network["num_classes"], 0),
        time_mlp=network["mlp_time_embed"],
    )
    c.diffusion.update(diffusion or {})
    c.sampling.steps = 10
    c.preview.update(every=0, rows=1, columns=1)
    c.checkpoint.every = c.log.every = 1
    c.log.tensorboard = False
    c.stages = ("stage",)
    settings = dict(steps=1, batch_size=8, weight_decay=0.0, clip_norm=0.0) | (stage or {})
    c.stage = config_lib.stage(**settings, **(masks if wavelet else {"mask": masks["mask"]}))
    return config_lib.parse(c)


def jit_params(shapes: dict) -> dict:
    """Our parameters of a JiT from {the authors' name: shape}."""
    return JIT.params({name: weight(name, shape) for name, shape in shapes.items() if name not in JIT.fixed})


def jit_config(network: dict, noise_scale: float = 1.0, **diffusion):
    """Our config of a JiT of the authors' code, with flow matching."""
    c = config_lib.default()
    c.data.update(path="digits", image_size=network["input_size"], labels=True, threads=1)
    c.model.update(
        network="jit",
        patch_size=network["patch_size"],
        width=network["hidden_size"],
        depth=network["depth"],
        heads=network["num_heads"],
        num_classes=network["num_classes"],
    )
    c.model.jit.update(
        bottleneck=network["bottleneck_dim"],
        class_tokens=network["in_context_len"],
        class_tokens_from=network["in_context_start"],
    )
    c.diffusion.update(process="flow", objective="x0", **diffusion)
    c.diffusion.flow.noise_scale = noise_scale
    c.sampling.update(method="heun", steps=10)
    c.stages, c.stage = ("stage",), config_lib.stage(steps=1, batch_size=8)
    return config_lib.parse(c)


def jit_files(folder) -> list[pathlib.Path]:
    """Checkpoints of JiT's authors with recorded outputs beside them."""
    return [path for path in sorted(pathlib.Path(folder).glob("*.pth")) if expected_of(path).exists()]


def expected_of(path) -> pathlib.Path:
    """The recorded outputs of a checkpoint."""
    return path.with_name(f"{path.stem}_expected.npz")


def jit_checkpoint() -> dict:
    """The content of `jit_tiny.pth`."""
    return torch_file.read(pathlib.Path(__file__).parent / "golden" / "jit_tiny.pth")


def at_path(tree, path):
    """The leaf of nested dicts at a path."""
    for part in path:
        tree = tree[part]
    return tree


def positions(mask) -> np.ndarray:
    """Row-major indices of the visible patches, [B, V], from a mask [B, N] that is True where hidden."""
    return np.stack([np.flatnonzero(~row) for row in mask]).astype(np.int32)


def nhwc(x):
    """PyTorch's [B, C, H, W] to [B, H, W, C]."""
    return np.asarray(x).transpose(0, 2, 3, 1)


def masks(seed: int, batch: int, side: int, kind: str, ratio=None, block=None, crop=None) -> np.ndarray:
    """The recipe's masks, [batch, side * side], True where hidden."""
    rng, out = np.random.RandomState(seed), []
    for _ in range(batch):
        if kind == "crop":
            m = np.ones((side, side))
            top, left = rng.randint(0, side - crop + 1), rng.randint(0, side - crop + 1)
            m[top : top + crop, left : left + crop] = 0
        else:
            b = block if kind == "block" else 1
            units = (side // b) ** 2
            hidden = int(ratio * side * side) // b**2
            m = np.r_[np.zeros(units - hidden), np.ones(hidden)]
            rng.shuffle(m)
            m = np.kron(m.reshape(side // b, side // b), np.ones((b, b)))
        out.append(m.reshape(-1))
    return np.stack(out).astype(bool)


def training_batches(meta: dict):
    """Per step, the recipe's micro-batches of (image in [0, 1], t, noise, mask)."""
    net, rng = meta["network"], np.random.RandomState(meta["seed"])
    side = net["img_size"] // net["patch_size"]
    shape = (meta["batch"], net["in_chans"], net["img_size"], net["img_size"])
    for _ in range(meta["steps"]):
        micro = []
        for _ in range(meta["gradient_accumulate_every"]):
            image = np.clip(rng.standard_normal(shape) * 0.25 + 0.5, 0, 1).astype(np.float32)
            t = rng.randint(0, 1000, size=(meta["batch"],))
            noise = rng.standard_normal(shape).astype(np.float32)
            micro.append((image, t, noise, masks(rng.randint(0, 2**31 - 1), meta["batch"], side, **meta["mask"])))
        yield micro
