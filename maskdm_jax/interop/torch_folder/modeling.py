"""The networks of MaskDM-JAX in PyTorch: U-ViT on pixels or Haar coefficients, and JiT.

    model = from_pretrained("FOLDER")  # holds config.json and model.safetensors
    output = model(x, t, labels)

`x` [B, C, H, W] is noisy, `t` [B] is the time input, and `labels` [B] are class numbers, -1 for "no
label", or None. The output, of x's shape, is what the network was trained to predict; see `sample.py`. Names of tensors
are those of the networks' original code. This file needs torch and safetensors alone.
"""

import json
import math
import pathlib

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


def from_pretrained(folder=".") -> nn.Module:
    """Load the network of a folder, in evaluation mode; `.config` holds config.json."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    model = (JiT if config["model"]["network"] == "jit" else UViT)(**config["data"], **config["model"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.config = config
    return model.eval()


def sinusoids(t, width: int):
    """Embed times [B] as [B, width], cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def unpatchify(patches, channels: int):
    """Patches [B, N, p*p*C] of a square grid, each flattened as (row, column, channel), to images [B, C, H, W]."""
    b, n, d = patches.shape
    side, p = math.isqrt(n), math.isqrt(d // channels)
    grid = patches.reshape(b, side, side, p, p, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * p, side * p)


def attend(q, k, v, heads: int):
    """Multi-head attention on q, k, v [B, T, D], or on heads [B, H, T, d] that are already split: [B, T, D]."""
    if q.ndim == 3:
        q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# --- U-ViT ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention in which q and v may have a bias."""

    def __init__(self, width: int, heads: int, qv_bias: bool):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        return self.proj(attend(q, k, v, self.heads))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; with a long skip, it is joined by a linear layer first."""

    def __init__(self, width: int, heads: int, hidden: int, qv_bias: bool, skip: bool):
        super().__init__()
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, qv_bias)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to tokens [B, N, D], one per patch, row by row."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """The transformer over the tokens [label?, time, patches of each band], with long skips (Bao et al. 2023)."""

    def __init__(self, bands, side: int, *, width, depth, heads, mlp_ratio, qv_bias, num_classes, time_mlp, unlabelled):
        super().__init__()
        self.width, self.names, self.extras = width, [name for name, _, _ in bands], 2 if num_classes else 1
        tokens = self.extras + sum((side // patch) ** 2 for _, _, patch in bands)
        self.encoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        for name, channels, patch in bands:
            self.add_module(name, PatchEmbed(channels, patch, width))
        self.label_emb = nn.Embedding(num_classes, width) if num_classes else None
        self.uncond_embed = nn.Parameter(torch.zeros(1, width)) if num_classes and unlabelled else None
        layers = [nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)] if time_mlp else []
        self.time_embed = nn.Sequential(*layers)
        block = lambda skip: Block(width, heads, int(width * mlp_ratio), qv_bias, skip)
        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)

    def forward(self, bands, t, labels=None):
        extras = [self.time_embed(sinusoids(t, self.width))]
        if self.label_emb is not None:
            extras.insert(0, self.label(labels, len(t)))
        patches = [getattr(self, name)(band) for name, band in zip(self.names, bands)]
        h = torch.cat([torch.stack(extras, dim=1), *patches], dim=1) + self.encoder_pos_embed
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        return self.norm(h)[:, self.extras :]

    def label(self, labels, n: int):
        """Label tokens [B, D]."""
        if self.uncond_embed is None:  # the wavelet model has no token for "no label"
            return self.label_emb(labels)
        unlabelled = self.uncond_embed.expand(n, -1)
        if labels is None:
            return unlabelled
        return torch.where(labels[:, None] < 0, unlabelled, self.label_emb(labels.clamp(0)))


class UViT(nn.Module):
    """U-ViT on pixels, or with `wavelet_scale` on Haar coefficients [B, 4C, h, w]: approximation, then details."""

    def __init__(
        self, *, image_size, channels, patch_size, wavelet_scale=0, width, network="uvit", jit=None, **options
    ):
        super().__init__()
        if wavelet_scale:
            wide, side = patch_size * wavelet_scale, image_size // 2
            bands = [("approx_patch_embed", channels, patch_size), ("detail_patch_embed", 3 * channels, wide)]
            heads = ["approx_to_output", "detail_to_output"]
        else:
            bands, heads, side = [("patch_embed", channels, patch_size)], ["encoder_to_output"], image_size
        self.bands = [(head, count, (side // patch) ** 2) for head, (_, count, patch) in zip(heads, bands)]
        self.encoder = Encoder(bands, side, width=width, unlabelled=not wavelet_scale, **options)
        for head, (_, count, patch) in zip(heads, bands):
            self.add_module(head, nn.Linear(width, patch**2 * count))

    def forward(self, x, t, labels=None):
        channels = [count for _, count, _ in self.bands]
        h = self.encoder(x.split(channels, dim=1), t, labels)
        parts = h.split([patches for _, _, patches in self.bands], dim=1)
        out = [unpatchify(getattr(self, head)(part), count) for (head, count, _), part in zip(self.bands, parts)]
        return torch.cat(out, dim=1)


# --- JiT --------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        return (self.weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x, angles):
    """Rotate neighbouring pairs of x [B, H, T, d] by angles [T, d / 2] (RoPE)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention with normalised, rotated q and k."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.q_norm, self.k_norm = heads, RMSNorm(width // heads), RMSNorm(width // heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, angles):
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles), v, self.heads))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class AdaptiveBlock(nn.Module):
    """Transformer block whose shifts, scales and gates come from the condition `c` [B, D]."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = RMSNorm(width), RotaryAttention(width, heads)
        self.norm2, self.mlp = RMSNorm(width), SwiGLU(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, angles):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), angles)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final, self.linear = RMSNorm(width), nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=-1)))


class JiT(nn.Module):
    """JiT (Li & He 2025): a transformer on large patches, with class tokens that join before a block."""

    def __init__(self, *, image_size, channels, patch_size, width, depth, heads, mlp_ratio, num_classes, jit, **_):
        super().__init__()
        side, hidden = image_size // patch_size, int(int(width * mlp_ratio) * 2 / 3)
        self.channels, self.num_classes, self.joins = channels, num_classes, jit["class_tokens_from"]
        self.tokens = jit["class_tokens"]
        self.register_buffer("pos_embed", torch.zeros(1, side**2, width))
        if self.tokens:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, self.tokens, width))
        parts = lambda **modules: nn.ModuleDict(modules)
        self.t_embedder = parts(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = parts(embedding_table=nn.Embedding(num_classes + 1, width))
        first = nn.Conv2d(channels, jit["bottleneck"], patch_size, stride=patch_size, bias=False)
        self.x_embedder = parts(proj1=first, proj2=nn.Conv2d(jit["bottleneck"], width, 1))
        self.blocks = nn.ModuleList(AdaptiveBlock(width, heads, hidden) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * channels)
        quarter = width // heads // 2
        frequencies = 10_000.0 ** -(torch.arange(0, quarter, 2, dtype=torch.float64) / quarter)
        row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
        angles = torch.cat([place[:, None] * frequencies for place in (row, column)], dim=1).float()
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x, t, labels=None):
        labels = torch.full((len(x),), -1, device=x.device) if labels is None else labels
        label = self.y_embedder["embedding_table"](torch.where(labels < 0, self.num_classes, labels))
        c = self.t_embedder["mlp"](sinusoids(t, 256)) + label
        h = self.x_embedder["proj2"](self.x_embedder["proj1"](x)).flatten(2).transpose(1, 2) + self.pos_embed
        angles = self.angles
        for i, block in enumerate(self.blocks):
            if self.tokens and i == self.joins:
                h = torch.cat([label[:, None] + self.in_context_posemb, h], dim=1)
                angles = functional.pad(angles, (0, 0, self.tokens, 0))  # class tokens are not rotated
            h = block(h, c, angles)
        return unpatchify(self.final_layer(h[:, self.tokens :], c), self.channels)
