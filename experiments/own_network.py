"""Your own network, here in Linen, trained with this library's masks, process and step, and sampled.

    python experiments/own_network.py --out=own_network.png

It is any object with `apply(params, x, t, labels, positions)`. x is an image [B, H, W, C], or its visible patches
[B, V, p*p*C] and their indices `positions` [B, V]; the output has x's shape.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

from maskdm_jax import build, config, run
from maskdm_jax.data.images import sample_grid, save_png
from maskdm_jax.diffusion.samplers import image_noise
from maskdm_jax.models.layers import patchify, timestep_embedding, unpatchify
from maskdm_jax.models.representation import to_uint8
from maskdm_jax.parallel.sharding import make_mesh, to_global
from maskdm_jax.training import state, step

OUT = flags.DEFINE_string("out", "own_network.png", "File for the samples.")
STEPS = flags.DEFINE_integer("steps", 2000, "Training steps; 2,000 take a minute on two CPU cores.")


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x, t, labels, positions=None):
        positions = jnp.arange(16)[None] if positions is None else positions
        h = nn.Dense(64)(patchify(x, 2) if x.ndim == 4 else x) + nn.Embed(16, 64)(positions)
        h += (nn.Dense(64)(timestep_embedding(t, 64)) + nn.Embed(10, 64)(labels))[:, None]
        for _ in range(3):
            h += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h))
            h += nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(h))))
        out = nn.Dense(4)(nn.LayerNorm()(h))
        return unpatchify(out, 2, (4, 4)) if x.ndim == 4 else out


def main(_):
    c = config.default()
    c.data.update(path="digits", image_size=8, channels=1, labels=True, threads=1)
    c.model.update(patch_size=2, num_classes=10)
    c.update(dict(diffusion=dict(process="flow", objective="x0"), sampling=dict(method="heun", steps=25)))
    c.stages, c.stage = ("stage",), config.stage(batch_size=64, learning_rate=2e-3, b1=0.9, mask=config.patch(0.5))
    c = config.parse(c)
    network, stage, mesh = Transformer(), c.stage["stage"], make_mesh(devices=jax.devices()[:1])
    (x, noise), labels = image_noise(jax.random.key(2), jnp.arange(100), (8, 8, 1)), jnp.repeat(jnp.arange(10), 10)
    now = state.new_state(network.init(jax.random.key(0), x, jnp.zeros(100), labels), stage, jax.random.key(1))
    options = dict(loss=step.make_loss(c, network), stage=stage, mesh=mesh)
    draw = lambda key, batch: step.draw_inputs(c, "stage", key, batch)
    train = jax.jit(lambda now, batch: step.train_step(now, batch, draw=draw, **options), donate_argnums=0)
    for _, batch in zip(range(STEPS.value), run.open_training_data(c).batches(batch_size=64, seed=0), strict=False):
        now, metrics = train(now, to_global(mesh, batch))
    sample = jax.jit(lambda params, x: to_uint8(build.make_sampler(c, network)(params, x, noise, labels)))
    save_png(OUT.value, sample_grid(jax.device_get(sample(now.ema, x)), 10))
    print(f"step {now.step}: loss {metrics['loss']:.3f}; {OUT.value} shows samples")


if __name__ == "__main__":
    app.run(main)
