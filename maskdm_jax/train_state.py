"""What a run carries from step to step, and the laws that change it: AdamW with warm-up, and the EMA."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import optax

EMA_COPY_STEPS = 100  # the reference's EMA copies the parameters this long before it averages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree. `params` and `ema` are nested dicts of float32 arrays of equal structure."""

    step: typing.Any  # int32 scalar, steps done in this stage
    params: typing.Any
    ema: typing.Any
    opt_state: typing.Any
    key: typing.Any  # typed PRNG key of the run; never advanced, folded with the step and the example's index


def make_optimizer(stage) -> optax.GradientTransformation:
    """AdamW of a `config.Stage`: decay on every tensor, clipping by global norm when `clip_norm` is positive.

    The rate is learning_rate * min(step / warmup_steps, 1) with the step counted from 0, so the first update
    of a warmed-up stage has rate 0, as in the reference.
    """
    # The same state with and without clipping, so that a run can be resumed with it switched on.
    clip = optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm else optax.identity()
    return optax.chain(
        clip, optax.adamw(learning_rate(stage), b1=stage.b1, b2=stage.b2, eps=1e-8, weight_decay=stage.weight_decay)
    )


def learning_rate(stage) -> optax.Schedule:
    """Rate by step of the stage."""
    if not stage.warmup_steps:
        return optax.constant_schedule(stage.learning_rate)
    return lambda step: stage.learning_rate * jnp.minimum(step / stage.warmup_steps, 1.0)


def new_state(params, optimizer: optax.GradientTransformation, key) -> TrainState:
    """State at the start of a stage. The EMA starts as a copy: donation needs buffers of its own."""
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params), key)


def ema_step_size(step, *, decay: float, every: int):
    """1 - decay of the EMA at its call number `step` (0, 1, ...): 1 copies the parameters, 0 leaves the EMA alone.

    The law of the reference: it acts when `step` is a multiple of `every`; it copies up to step 100 and once
    more when it first acts after that; then the decay is min(decay, 1 - (1 + e)^(-2/3)), e = step - 100.
    """
    step = jnp.asarray(step)
    e = jnp.maximum(step - EMA_COPY_STEPS, 0)
    size = jnp.maximum(1 - decay, (1.0 + e) ** (-2 / 3))
    size = jnp.where(step <= EMA_COPY_STEPS + every, 1.0, size)
    return jnp.where(step % every == 0, size, 0.0)
