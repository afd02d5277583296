"""JiT in PyTorch, with the authors' names of tensors and order of operations: a twin to compare training with."""

import math

import torch
from torch import nn
from torch.nn import functional


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * wide).to(x.dtype)


def sequential(*layers):
    """Layers under the numbers of the authors' nn.Sequential, which begins with an activation."""
    return nn.Sequential(*layers)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, rotary, fused):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        if fused:
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
            out = weights.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


def rotate(x, cos, sin):
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        hidden = int(hidden * 2 / 3)
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(functional.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1, self.attn, self.norm2 = RMSNorm(dim), Attention(dim, heads), RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rotary, fused):
        a, b, g, d, e, f = self.adaLN_modulation(c).chunk(6, -1)
        x = x + g[:, None] * self.attn(modulate(self.norm1(x), a, b), rotary, fused)
        return x + f[:, None] * self.mlp(modulate(self.norm2(x), d, e))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final, self.linear = RMSNorm(dim), nn.Linear(dim, out)
        self.adaLN_modulation = sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, bottleneck, dim):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dim, 1)

    def forward(self, x):
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LabelEmbed(nn.Module):
    def __init__(self, classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


class JiT(nn.Module):
    def __init__(
        self, *, size, patch, channels=3, dim, depth, heads, classes, bottleneck, tokens, start, mlp_ratio=4.0
    ):
        super().__init__()
        side, head = size // patch, dim // heads
        self.patch, self.side, self.tokens, self.start, self.fused = patch, side, tokens, start, False
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2, dim), requires_grad=False)
        if tokens:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, tokens, dim))
        self.t_embedder, self.y_embedder = TimeEmbed(dim), LabelEmbed(classes, dim)
        self.x_embedder = PatchEmbed(patch, channels, bottleneck, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, patch**2 * channels)
        frequencies = 10_000.0 ** -(torch.arange(0, head // 2, 2) / (head // 2))
        places = torch.arange(side)[:, None] * frequencies
        rows, columns = places[:, None].expand(side, side, -1), places[None].expand(side, side, -1)
        angles = torch.cat([rows, columns], -1).reshape(side**2, -1).repeat_interleave(2, -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, t, y, visible=None):
        """x: [B, C, H, W]; visible: indices [B, V] of the patches to compute, None for all. Returns [B, V, p*p*C]."""
        h, label = self.x_embedder(x) + self.pos_embed, self.y_embedder(y)
        c = self.t_embedder(t) + label
        cos, sin = self.cos[None], self.sin[None]
        if visible is not None:
            h = torch.gather(h, 1, visible[..., None].expand(-1, -1, h.shape[-1]))
            cos, sin = self.cos[visible], self.sin[visible]
        for i, block in enumerate(self.blocks):
            if self.tokens and i == self.start:
                h = torch.cat([label[:, None] + self.in_context_posemb, h], 1)
                cos = torch.cat([torch.ones_like(cos[:, :1]).expand(-1, self.tokens, -1), cos], 1)
                sin = torch.cat([torch.zeros_like(sin[:, :1]).expand(-1, self.tokens, -1), sin], 1)
            h = block(h, c, (cos[:, None], sin[:, None]), self.fused)
        return self.final_layer(h[:, self.tokens if self.tokens else 0 :], c)


def of_config(config) -> JiT:
    """The network of one of our configs."""
    data, model = config.data, config.model
    return JiT(
        size=data.image_size,
        patch=model.patch_size,
        channels=data.channels,
        dim=model.width,
        depth=model.depth,
        heads=model.heads,
        classes=model.num_classes,
        bottleneck=model.jit.bottleneck,
        tokens=model.jit.class_tokens,
        start=model.jit.class_tokens_from,
        mlp_ratio=model.mlp_ratio,
    )


def loss(network, x0, t, y, eps, visible=None):
    """The authors' loss of each image for noise `eps` that is scaled already: squared error of the velocity."""
    z = t[:, None, None, None] * x0 + (1 - t[:, None, None, None]) * eps
    out, p = network(z, t, y, visible), network.patch

    def cut(x):
        b, c, side = x.shape[0], x.shape[1], network.side
        patches = x.reshape(b, c, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(b, side**2, -1)
        return (
            patches
            if visible is None
            else torch.gather(patches, 1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        )

    left = (1 - t[:, None, None]).clamp_min(0.05)
    v, predicted = (cut(x0) - cut(z)) / left, (out - cut(z)) / left
    return (predicted - v).pow(2).flatten(1).mean(1)
