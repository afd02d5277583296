"""The official network, optimizer and EMA in PyTorch, written for the tests: what an exported file must work in.

Module names follow the official state dict (`encoder.in_blocks.0.attn.qkv.weight`, ...), so that
`load_state_dict(strict=True)` proves names and shapes; the arithmetic is plain float32.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    fused = False  # benchmarks measure PyTorch's own kernel too

    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (a.view(b, t, self.heads, -1).transpose(1, 2) for a in (q, k, v))
        if self.fused:
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        weights = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, qkv_bias, skip):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, qkv_bias)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatchify(tokens, channels):
    b, n, d = tokens.shape
    side, patch = math.isqrt(n), math.isqrt(d // channels)
    grid = tokens.view(b, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * patch, side * patch)


class Encoder(nn.Module):
    """`bands`: per band its name of the patch embedding, channels and patch size."""

    def __init__(self, c, bands, size, uncond):
        super().__init__()
        width, depth = c["encoder_embed_dim"], c["encoder_depth"]
        self.classes = max(c.get("num_classes", -1), 0)
        self.width, self.bands = width, bands
        self.extras = 2 if self.classes else 1
        if self.classes and uncond:
            self.uncond_embed = nn.Parameter(torch.randn(1, width))
        tokens = self.extras + sum((size // patch) ** 2 for _, _, patch in bands)
        self.encoder_pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        for name, channels, patch in bands:
            setattr(self, name, PatchEmbed(channels, patch, width))
        if self.classes:
            self.label_emb = nn.Embedding(self.classes, width)
        self.time_embed = nn.Identity()
        if c.get("mlp_time_embed"):
            self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        block = lambda skip: Block(width, c["encoder_heads"], int(width * c["mlp_ratio"]), c["qkv_bias"], skip)
        self.in_blocks = nn.ModuleList([block(False) for _ in range(depth // 2)])
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList([block(True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(width)

    def forward(self, images, t, mask, labels):
        tokens = [getattr(self, name)(x) for (name, _, _), x in zip(self.bands, images, strict=True)]
        h = torch.cat([self.extra_tokens(t, labels), *tokens], dim=1) + self.encoder_pos_embed
        if mask is not None:
            extras = torch.ones(len(t), self.extras, dtype=torch.bool, device=mask.device)
            h = h[torch.cat([extras, ~mask], dim=1)].view(len(t), -1, self.width)
        return self.transform(h)

    def extra_tokens(self, t, labels):
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device).float() / half)
        angles = t[:, None].float() * frequencies[None]
        extras = [self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))]
        if self.classes:
            extras = [self.uncond_embed.expand(len(t), -1) if labels is None else self.label_emb(labels), *extras]
        return torch.stack(extras, dim=1)

    def transform(self, h):
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        return self.norm(h)[:, self.extras :]


class UViT(nn.Module):
    """c: the official `network` settings. Images [B, C, H, W]; with a mask [B, N] (True hidden), visible tokens."""

    def __init__(self, c):
        super().__init__()
        self.channels = c["in_chans"]
        bands = [("patch_embed", c["in_chans"], c["patch_size"])]
        self.encoder = Encoder(c, bands, c["img_size"], uncond=True)
        self.encoder_to_output = nn.Linear(c["encoder_embed_dim"], c["patch_size"] ** 2 * c["in_chans"])

    def forward(self, x, t, mask=None, labels=None):
        out = self.encoder_to_output(self.encoder([x], t, mask, labels))
        return unpatchify(out, self.channels) if mask is None else out


class WaveletUViT(nn.Module):
    """The same on Haar coefficients [B, 4C, h, w]; the mask covers the approximation's patches, then the details'."""

    def __init__(self, c):
        super().__init__()
        self.channels, patch, self.size = c["data_chans"], c["patch_size"], c["img_size"]
        self.patch, wide = patch, patch * c["scale"]
        bands = [("approx_patch_embed", self.channels, patch), ("detail_patch_embed", 3 * self.channels, wide)]
        self.encoder = Encoder(c, bands, c["img_size"], uncond=False)
        self.approx_to_output = nn.Linear(c["encoder_embed_dim"], patch**2 * self.channels)
        self.detail_to_output = nn.Linear(c["encoder_embed_dim"], wide**2 * 3 * self.channels)

    def forward(self, x, t, mask=None, labels=None):
        n = (self.size // self.patch) ** 2
        h = self.encoder([x[:, : self.channels], x[:, self.channels :]], t, mask, labels)
        seen = n if mask is None else int((~mask[0, :n]).sum())
        approx, detail = self.approx_to_output(h[:, :seen]), self.detail_to_output(h[:, seen:])
        if mask is not None:
            return approx, detail
        return torch.cat([unpatchify(approx, self.channels), unpatchify(detail, 3 * self.channels)], dim=1)


def network(c):
    """The network with these official settings."""
    return WaveletUViT(c) if "data_chans" in c else UViT(c)


class Diffusion(nn.Module):
    """The wrapper whose state dict is stored: 13 schedule buffers and the network as `model`."""

    def __init__(self, c, buffers):
        super().__init__()
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values))
        self.model = network(c)


class Ema(nn.Module):
    """The averaging wrapper: `initted`, `step`, `online_model`, `ema_model`."""

    def __init__(self, online, average, beta, every):
        super().__init__()
        self.beta, self.every = beta, every
        self.online_model, self.ema_model = online, average
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))

    @torch.no_grad()
    def update(self):
        step, first = int(self.step), not self.initted
        self.step += 1
        self.initted.fill_(True)
        if step % self.every and not first:
            return
        copies = first or step <= 100
        decay = 0.0 if copies else min(self.beta, 1 - (1 + step - 100) ** (-2 / 3))
        for average, online in zip(self.ema_model.parameters(), self.online_model.parameters(), strict=True):
            average.lerp_(online, 1 - decay)
