"""The training step in PyTorch, for comparison: as published, with fused operations, or also compiled.

The networks are those of `tests/torch_twin.py` and `tests/torch_jit.py`, which tests compare with ours. If the
config's dtype is bfloat16, all variants use autocast; weights, residual stream, norms, softmax and loss stay in
float32.

- eager: as published. Every patch is embedded, a boolean mask picks the visible tokens before the first block,
  attention writes its weights to memory, AdamW and EMA are PyTorch's and the reference's defaults.
- fused: the fastest known variant without a compiler. It picks the visible patches first, as our step does, and uses
  `scaled_dot_product_attention`, fused AdamW, and the EMA as one multi-tensor operation.
- compiled: the fused variant, with the network compiled by `torch.compile`.
"""

import pathlib
import sys

import numpy as np
import torch
from torch.nn import functional as F

from maskdm_jax.build import compute_dtype, mask_plans, noise_schedule

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import torch_jit
import torch_twin

FORMS = ("eager", "fused", "compiled")


class VisibleUViT(torch_twin.UViT):
    """The U-ViT on visible patches [B, V, p*p*C] at positions [B, V], or on all patches if positions are None."""

    def forward(self, patches, t, positions=None):
        """The objective for each patch, [B, V, p*p*C]."""
        encoder, conv = self.encoder, self.encoder.patch_embed.proj
        pos_extras, pos_grid = encoder.encoder_pos_embed[0].tensor_split([encoder.extras])
        pos = pos_grid if positions is None else F.embedding(positions, pos_grid)
        tokens = F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias) + pos
        extras = encoder.extra_tokens(t, None) + pos_extras
        return self.encoder_to_output(encoder.transform(torch.cat([extras, tokens], dim=1)))


class Trainer:
    """One unconditional model on random images; calling it takes a training step and returns the loss.

    Args:
      form: one of FORMS.
      config: a `config.Config`; `stage` names the stage whose batch size, optimizer, EMA and mask are used.
      device: "cuda" or "cpu".
    """

    def __init__(self, form: str, config, stage: str, device: str):
        model, data, self.stage, self.device = config.model, config.data, config.stage[stage], device
        self.network = self.new_network(form, config).to(device)
        self.averages = [self.new_network(form, config).to(device) for _ in (0, *self.stage.more_ema_decays)]
        self.predict = torch.compile(self.network, dynamic=False) if form == "compiled" else self.network
        rates = dict(lr=self.stage.learning_rate, betas=(self.stage.b1, self.stage.b2))
        rates |= dict(weight_decay=self.stage.weight_decay, fused=form != "eager")
        self.optimizer = torch.optim.AdamW(self.network.parameters(), **rates)
        self.ema = self.published_ema().to(device) if form == "eager" and model.network == "uvit" else None
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=compute_dtype(model) == "bfloat16")
        (self.plan,) = mask_plans(config, stage)
        self.classes, self.flow, schedule = model.num_classes, config.diffusion.flow, noise_schedule(config)
        self.signal = torch.tensor(np.sqrt(schedule.alpha_bar), device=device, dtype=torch.float32)
        self.noise = torch.tensor(np.sqrt(1 - schedule.alpha_bar), device=device, dtype=torch.float32)
        shape = (self.stage.batch_size, data.channels, data.image_size, data.image_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        (rows, cols), unit = self.plan.grid, self.plan.unit
        patches = torch.arange(rows * cols, device=device).view(rows // unit, unit, cols // unit, unit)
        self.units = patches.permute(0, 2, 1, 3).reshape(-1, unit**2)

    def new_network(self, form: str, config):
        """The network, with new weights."""
        model, data = config.model, config.data
        c = dict(in_chans=data.channels, img_size=data.image_size, patch_size=model.patch_size)
        c |= dict(encoder_embed_dim=model.width, encoder_depth=model.depth, encoder_heads=model.heads)
        c |= dict(mlp_ratio=model.mlp_ratio, qkv_bias=model.qv_bias, mlp_time_embed=model.time_mlp)
        network = (torch_twin.UViT if form == "eager" else VisibleUViT)(c)
        for module in network.modules():
            if isinstance(module, torch_twin.Attention):
                module.fused = form != "eager"
        return network

    def published_ema(self):
        """The reference's EMA, after the steps in which it copies."""
        ema = torch_twin.Ema(self.network, self.averages[0], self.stage.ema_decay, self.stage.ema_every)
        ema.initted.fill_(True)
        ema.step.fill_(200)
        return ema

    def loss(self):
        """The loss of the images, at new times and noise."""
        t = torch.randint(len(self.signal), (len(self.images),), device=self.device)
        return self.loss_as_published(t) if self.ema else self.loss_of_visible(t)

    def __call__(self):
        """Take a step; returns the loss, still on the device."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        if self.stage.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.stage.clip_norm)
        self.optimizer.step()
        if self.ema:
            self.ema.update()
        else:
            weights, decays = list(self.network.parameters()), (self.stage.ema_decay, *self.stage.more_ema_decays)
            with torch.no_grad():
                for average, decay in zip(self.averages, decays, strict=True):
                    torch._foreach_lerp_(list(average.parameters()), weights, 1 - decay)
        return loss.detach()

    def loss_as_published(self, t):
        """The loss of the visible patches, by a boolean mask after embedding."""
        noise = torch.randn(self.images.shape, device=self.device)
        x_t = self.noised(self.images, t, noise)
        hidden = None
        if not self.plan.hides_nothing:
            hidden = torch.ones(len(t), self.plan.total, dtype=torch.bool, device=self.device)
            hidden.scatter_(1, self.draw_positions(), False)
        with self.autocast:
            found = self.predict(x_t, t, hidden)
        wanted = noise if hidden is None else self.patches(noise)[~hidden].view(found.shape)
        return F.mse_loss(found.float(), wanted)

    def loss_of_visible(self, t):
        """The same loss, without processing the hidden patches."""
        patches, positions = self.patches(self.images), None
        if not self.plan.hides_nothing:
            positions = self.draw_positions()
            patches = patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[2]))
        noise = torch.randn(patches.shape, device=self.device)
        with self.autocast:
            found = self.predict(self.noised(patches, t, noise), t, positions)
        return F.mse_loss(found.float(), noise)

    def forward(self):
        """Take a forward pass of whole images; returns a number of the result, still on the device."""
        t = torch.full((len(self.images),), 500, device=self.device)
        images = self.images if self.ema else self.patches(self.images)
        with torch.no_grad(), self.autocast:
            return self.predict(self.noised(images, t, 0), t).flatten()[0]

    def draw_positions(self):
        """Visible patches of each image, [B, V], in ascending order."""
        shown = self.plan.visible // self.plan.unit**2
        order = torch.rand(len(self.images), len(self.units), device=self.device).argsort(1)
        return self.units[order[:, :shown]].flatten(1).sort(1).values

    def noised(self, images, t, noise):
        """x_t of uint8 images or patches."""
        column = lambda values: values[t].view(-1, *[1] * (images.ndim - 1))
        return column(self.signal) * (images.float() / 127.5 - 1) + column(self.noise) * noise

    def patches(self, images):
        """[B, C, H, W] -> [B, N, p*p*C]."""
        b, c, side, _ = images.shape
        rows, p = self.plan.grid[0], side // self.plan.grid[0]
        return images.view(b, c, rows, p, rows, p).permute(0, 2, 4, 3, 5, 1).reshape(b, rows**2, p * p * c)


class JitTrainer(Trainer):
    """The same for JiT with flow matching. Eager and fused differ in attention and AdamW; the authors have no masks."""

    def new_network(self, form: str, config):
        """The network, with new weights."""
        network = torch_jit.of_config(config)
        network.fused = form != "eager"
        return network

    def loss(self):
        """The loss of the images, at new times and noise."""
        n, device, flow = len(self.images), self.device, self.flow
        x0, t = self.images.float() / 127.5 - 1, (torch.randn(n, device=device) * flow.std + flow.mean).sigmoid()
        noise, labels = torch.randn_like(x0) * flow.noise_scale, torch.zeros(n, dtype=torch.long, device=device)
        visible = None if self.plan.hides_nothing else self.draw_positions()
        with self.autocast:
            return torch_jit.loss(self.predict, x0, t, labels, noise, visible).mean()

    def forward(self):
        """Take a forward pass of whole images; returns a number of the result, still on the device."""
        t = torch.full((len(self.images),), 0.5, device=self.device)
        with torch.no_grad(), self.autocast:
            return self.predict(self.images.float() / 127.5 - 1, t, torch.zeros_like(t).long()).flatten()[0]


def make_trainer(form: str, config, stage: str, device: str) -> Trainer:
    """The trainer of a config's network; see `Trainer`."""
    return (JitTrainer if config.model.network == "jit" else Trainer)(form, config, stage, device)
