"""Why masked pre-training can help, in two dimensions: python experiments/swiss_roll.py --out=swiss_roll.png

Masked training sees only parts of images, so it learns marginal distributions. The paper calls the distribution that
pre-training learns the primer (Figure 2). Here, the data is a Swiss roll in two dimensions, and the primer is the
product of the roll's two marginals: the two coordinates of a point come from independent points of the roll.

The experiment trains a small diffusion model on the roll, from scratch and after pre-training on the primer. The plot
shows the Chamfer distance between generated points and points of the roll against the number of training steps on the
roll: its mean and range over seeds. A dotted line counts the steps on the primer, too. The last line of the output is
JSON. Needs matplotlib; takes half a minute on two CPU cores.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from maskdm_jax.diffusion import samplers
from maskdm_jax.diffusion.gaussian import make_schedule
from maskdm_jax.diffusion.process import ddpm, denoising_loss
from maskdm_jax.models.layers import timestep_embedding

OUT = flags.DEFINE_string("out", "swiss_roll.png", "PNG file to write.")
PRIMER = flags.DEFINE_integer("primer", 2000, "Training steps on the primer.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4000, "Training steps on the roll.", lower_bound=8)
SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each of the two methods.", lower_bound=1)
BATCH, WIDTH, WAVES, SAMPLES = 256, 128, 3, 2000
OPTIMIZER = optax.adam(1e-3)
SCHEDULE = make_schedule("cosine", 100)
PROCESS = ddpm(SCHEDULE)


def swiss_roll(key, n: int):
    """Sample the Swiss roll: [n, 2], within about -2..2."""
    turn_key, noise_key = jax.random.split(key)
    turn = 1.5 * jnp.pi * (1 + 2 * jax.random.uniform(turn_key, (n,)))
    points = turn[:, None] * jnp.stack([jnp.cos(turn), jnp.sin(turn)], 1) / (2.25 * jnp.pi)
    return points + 0.02 * jax.random.normal(noise_key, points.shape)


def primer(key, n: int):
    """Sample the primer, the product of the roll's marginals: [n, 2]."""
    first, second = jax.random.split(key)
    return jnp.stack([swiss_roll(first, n)[:, 0], swiss_roll(second, n)[:, 1]], 1)


def init(key):
    """Initial weights of an MLP with three hidden layers."""
    sizes = [2 * (1 + 2 * WAVES) + 32, WIDTH, WIDTH, WIDTH, 2]
    keys = jax.random.split(key, len(sizes) - 1)
    draw = lambda key, a, b: jax.random.normal(key, (a, b)) * (2 / a) ** 0.5
    return [(draw(key, a, b), jnp.zeros(b)) for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def predict(params, x, t):
    """Predict the noise in points x [n, 2] at time steps t [n]."""
    waves = [wave(2**i * x) for i in range(WAVES) for wave in (jnp.sin, jnp.cos)]  # features for thin curves
    h = jnp.concatenate([x, *waves, timestep_embedding(t, 32)], 1)
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias[None])
    weight, bias = params[-1]
    return h @ weight + bias[None]


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, 0))
def train(draw, steps: int, params, moments, key):
    """Train for `steps` steps on points from `draw`, for every seed; returns weights and Adam's moments."""

    def step(carry, key):
        params, moments = carry
        x_key, t_key, eps_key = jax.random.split(key, 3)
        x0, t = draw(x_key, BATCH), jax.random.randint(t_key, (BATCH,), 0, SCHEDULE.timesteps)
        eps = jax.random.normal(eps_key, x0.shape)
        loss = lambda params: denoising_loss(functools.partial(predict, params), PROCESS, x0, t, eps).mean()
        updates, moments = OPTIMIZER.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, (params, moments), jax.random.split(key, steps))[0]


@jax.jit
@jax.vmap
def sample(params, key):
    """Generate SAMPLES points by deterministic DDIM, for every seed."""
    x = jax.random.normal(key, (SAMPLES, 2))
    no_noise, bounds = lambda i: 0.0, (-2.2, 2.2)
    return samplers.ddim(functools.partial(predict, params), x, no_noise, PROCESS, clip=bounds, steps=50, eta=0.0)


def nearest_distance(a, b):
    """Chamfer distance: mean distance to the nearest point of the other set, averaged over both directions."""
    distances = jnp.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return (distances.min(0).mean() + distances.min(1).mean()) / 2


def learn(params, key, marks):
    """Train on the roll with a new optimizer; returns samples after each number of steps in `marks`, a list."""
    moments, done, found = jax.vmap(OPTIMIZER.init)(params), 0, []
    for mark in marks:
        keys = jax.random.split(jax.random.fold_in(key, mark), SEEDS.value)
        params, moments = train(swiss_roll, mark - done, params, moments, keys)
        found.append(sample(params, keys))
        done = mark
    return found


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    marks = [0] + [STEPS.value >> i for i in range(6, -1, -1) if STEPS.value >> i]
    keys = jax.random.split(jax.random.key(0), SEEDS.value)
    fresh = jax.vmap(init)(keys)
    primed, _ = train(primer, PRIMER.value, fresh, jax.vmap(OPTIMIZER.init)(fresh), keys)
    samples = {
        name: learn(params, jax.random.key(1), marks)
        for name, params in (("from scratch", fresh), ("from the primer", primed))
    }
    real = swiss_roll(jax.random.key(2), SAMPLES)
    far = jax.jit(jax.vmap(nearest_distance, (0, None)))
    distances = {name: np.array([far(points, real) for points in found]) for name, found in samples.items()}
    floor = float(nearest_distance(swiss_roll(jax.random.key(3), SAMPLES), real))
    plot(marks, samples, distances, floor)
    print(f"{'steps on the roll':20}" + "".join(f"{mark:>9,}" for mark in marks))
    for name, values in distances.items():
        print(f"{name:20}" + "".join(f"{value:9.4f}" for value in values.mean(1)))
    print(f"another draw of the roll: {floor:.4f}")
    rounded = {name: values.round(5).tolist() for name, values in distances.items()}
    print(json.dumps(dict(marks=marks, primer_steps=PRIMER.value, floor=round(floor, 5), distances=rounded)))


def plot(marks, samples, distances, floor):
    """Plot samples of the first seed at some of the marks, and all distances."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [i for i, mark in enumerate(marks) if i == 0 or (len(marks) - 1 - i) % 2 == 0]
    figure = pyplot.figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(len(shown) + 1, 3.2))
    axes = left.subplots(2, len(shown) + 1)
    draws = [swiss_roll(jax.random.key(3), SAMPLES), primer(jax.random.key(3), SAMPLES)]
    for row, (name, found) in enumerate(samples.items()):
        axes[row, 0].set_title(("the roll", "the primer")[row], fontsize=10)
        axes[row, 0].scatter(*draws[row].T, s=0.4, color="black")
        for axis, i in zip(axes[row, 1:], shown, strict=True):
            axis.scatter(*found[i][0].T, s=0.4, color=f"C{row}")
            axis.set_title(f"{name},\n{marks[i]:,} steps" if i == shown[0] else f"{marks[i]:,} steps", fontsize=10)
    for axis in axes.flat:
        axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
    axis = right.subplots()
    for color, (name, values) in zip(("C0", "C1"), distances.items(), strict=True):
        axis.plot(marks, values.mean(1), "o-", color=color, markersize=4, label=name)
        axis.fill_between(marks, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
    counted = [mark + PRIMER.value for mark in marks]
    axis.plot(counted, values.mean(1), "o:", color="C1", markersize=3, label="the same, steps on the primer counted")
    axis.axhline(floor, color="black", linewidth=0.8, linestyle="--", label="another draw of the roll")
    axis.set(yscale="log", xlabel="steps", ylabel="distance to the nearest point", xlim=(0, 1.5 * counted[-1]))
    axis.set_xscale("symlog", linthresh=max(1, marks[1]))
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(OUT.value, dpi=100)


if __name__ == "__main__":
    app.run(main)
