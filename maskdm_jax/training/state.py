"""The state that a step updates: parameters, EMA, optimizer. AdamW with warm-up, and the decay of the EMA."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import optax

EMA_COPY_STEPS = 100  # steps in which the reference's EMA copies the parameters, before it averages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree. `params` and each of `emas` are nested dicts of float32 arrays of equal structure."""

    step: typing.Any  # int32 scalar, steps done in this stage
    params: typing.Any
    emas: tuple  # one or more
    opt_state: typing.Any
    key: typing.Any  # typed PRNG key of the stage; never advanced, folded with the step and the example's index

    @property
    def ema(self):
        """The first EMA."""
        return self.emas[0]

    @property
    def weights(self) -> dict:
        """All sets of weights by name: params, ema, ema2, ..."""
        return {"params": self.params} | dict(zip(ema_names(len(self.emas)), self.emas, strict=True))


def ema_names(count: int) -> list[str]:
    """Names of `count` EMAs: ema, ema2, ..."""
    return ["ema", *(f"ema{i}" for i in range(2, count + 1))][:count]


def make_optimizer(stage) -> optax.GradientTransformation:
    """AdamW of a `config.Stage`, with clipping by global norm when `clip_norm` is positive.

    Weight decay acts on every tensor but `mask_token`, which stages without a mask do not use.

    The learning rate is learning_rate * min(step / warmup_steps, 1) with the step counted from 0, so the first update
    of a stage with warm-up has rate 0, as in the reference. If a batch gives one of the two tensors of the label token
    no gradient (all labels hidden, or none), the step does not update it; each of the two has its own step count.
    """
    # The state is the same with and without clipping, so that a resumed run can change the setting.
    clip = _clip_by_global_norm(stage.clip_norm) if stage.clip_norm else optax.identity()
    adamw = optax.chain(optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=1e-8), _add_decay(stage.weight_decay))
    groups = {"all": adamw} | {name: _resting_at_zero(adamw) for name in LABEL_TENSORS}
    return optax.chain(clip, optax.partition(groups, _groups_of), optax.scale_by_learning_rate(learning_rate(stage)))


def _add_decay(rate: float) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` for all but `mask_token`; its own `mask` would change the state in checkpoints."""

    def update(updates, state, params):
        add = lambda path, u, p: u if path[-1].key == "mask_token" else u + rate * p
        return jax.tree_util.tree_map_with_path(add, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one multiplication, which XLA fuses; its division is a separate pass."""

    def update(grads, state, params=None):
        del params
        factor = limit / jnp.maximum(optax.tree.norm(grads), limit)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


LABEL_TENSORS = ("label_embed", "uncond_embed")  # of `models.backbone.Backbone`


def _groups_of(params):
    """Name the optimizer's group of each tensor."""

    def group(path, _):
        return next((key.key for key in path if key.key in LABEL_TENSORS), "all")

    return jax.tree_util.tree_map_with_path(group, params)


def _resting_at_zero(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Update neither state nor parameters when the gradient is zero.

    PyTorch, and therefore the reference, does this for tensors that a step does not use.
    """

    def update(grads, state, params):
        used = jnp.any(jnp.array([jnp.any(g != 0) for g in jax.tree.leaves(grads)]))
        updates, moved = inner.update(grads, state, params)
        choose = lambda new, old: jax.tree.map(lambda n, o: jnp.where(used, n, o), new, old)
        return choose(updates, jax.tree.map(jnp.zeros_like, updates)), choose(moved, state)

    return optax.GradientTransformation(inner.init, update)


def learning_rate(stage) -> optax.Schedule:
    """Learning rate by step of the stage."""
    if not stage.warmup_steps:
        return optax.constant_schedule(stage.learning_rate)
    return lambda step: stage.learning_rate * jnp.minimum(step / stage.warmup_steps, 1.0)


def new_state(params, stage, key) -> TrainState:
    """State at the start of a `config.Stage`. The EMAs are copies, because donation needs separate buffers."""
    emas = tuple(jax.tree.map(jnp.copy, params) for _ in ema_decays(stage))
    return TrainState(jnp.int32(0), params, emas, make_optimizer(stage).init(params), key)


def ema_decays(stage) -> tuple[float, ...]:
    """Decays of the EMAs of a `config.Stage`."""
    return (stage.ema_decay, *stage.more_ema_decays)


def ema_step_size(step, *, decay: float, every: int, law: str = "reference"):
    """1 - decay of the EMA at its call number `step` (0, 1, ...): 1 copies the parameters, 0 keeps the EMA.

    The EMA is updated when `step` is a multiple of `every`. With the law `plain`, its decay is always `decay`. With
    that of the reference, it copies up to step 100; then its decay is min(decay, 1 - (1 + e)^(-2/3)), e = step - 100.
    """
    step = jnp.asarray(step)
    e = jnp.maximum(step - EMA_COPY_STEPS, 0)
    size = 1 - decay
    if law == "reference":
        size = jnp.maximum(size, (1.0 + e) ** (-2 / 3))  # 1 while e is 0
    return jnp.where(step % every == 0, size, 0.0)
