"""The training step: draw masks, time steps and noise; loss on the visible patches; gradient; AdamW; EMA."""

import functools
import typing

import jax
import jax.numpy as jnp
import optax

from maskdm_jax.build import Network, make_network, make_process, mask_plans
from maskdm_jax.config import Config, Stage, steps_before
from maskdm_jax.diffusion import masking
from maskdm_jax.diffusion.process import denoising_loss
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.training.state import TrainState, ema_decays, ema_step_size, learning_rate, make_optimizer


class Inputs(typing.NamedTuple):
    """Inputs of the loss: V visible patches of size d per image, or all N if hidden ones only skip the inner blocks.

    For a wavelet model, tuples with an entry per band.
    """

    x0: jax.Array  # [B, V, d] clean patches
    t: jax.Array  # [B], times of the process
    eps: jax.Array  # [B, V, d] noise
    positions: jax.Array | None  # [B, V] int32, of the visible patches; None when nothing is hidden
    labels: jax.Array | None  # [B] int32, -1 where the label is hidden; None for an unconditional model
    dropout: jax.Array | None = None  # [B] keys for dropout in the network; None without dropout
    shallow: jax.Array | None = None  # [B] bool, images that skip the inner blocks; None if there are none


def draw_inputs(config: Config, stage: str, key, batch) -> Inputs:
    """Draw flip, mask, time, noise and label dropout of each image, by the step's key and its global index only.

    batch: image uint8 [B, S, S, C], label int32 [B], index uint32 [B].
    """
    space, plans, process = make_representation(config), mask_plans(config, stage), make_process(config)
    skipping = config.stage[stage].shallow

    def one(image, label, index):
        flip_key, mask_key, t_key, eps_key, label_key = jax.random.split(jax.random.fold_in(key, index), 5)
        if config.data.flip:
            image = jnp.where(jax.random.bernoulli(flip_key, config.data.flip), image[:, ::-1], image)
        bands, structure = jax.tree.flatten(space.cut(space.encode(image[None])))  # pixels are one band [1, N, d]
        patches, positions, eps = [], [], []
        for i, (band, plan) in enumerate(zip(bands, plans, strict=True)):
            positions.append(masking.sample_positions(plan, jax.random.fold_in(mask_key, i)))
            # Hidden patches are dropped here, unless they only skip the inner blocks.
            all_seen = plan.hides_nothing or config.model.outer_blocks
            patches.append(band[0] if all_seen else band[0][positions[-1]])
            eps.append(jax.random.normal(jax.random.fold_in(eps_key, i), patches[-1].shape))
        # Not from the split above: one more key there would change all other draws.
        shallow = jax.random.bernoulli(jax.random.fold_in(label_key, 1), skipping)
        label = jnp.where(jax.random.bernoulli(label_key, config.data.label_dropout) | shallow, -1, label)
        restore = lambda parts: jax.tree.unflatten(structure, parts)
        return Inputs(
            x0=restore(patches),
            t=process.draw(t_key),
            eps=restore(eps),
            positions=None if all(plan.hides_nothing for plan in plans) else restore(positions),
            labels=label if config.model.num_classes else None,
            dropout=jax.random.fold_in(eps_key, len(plans)) if drops_out(config) else None,
            shallow=shallow if skipping else None,
        )

    return jax.vmap(one)(batch["image"], batch["label"], batch["index"])


def drops_out(config: Config) -> bool:
    """Whether the network has dropout."""
    return config.model.network == "jit" and config.model.jit.dropout > 0


def make_loss(config: Config, network: Network) -> typing.Callable:
    """Build `loss(params, inputs)` -> mean loss over the images, a float32 scalar.

    Raises:
      ConfigError: a setting of `config.diffusion` is invalid.
    """
    process = make_process(config)

    def loss(params, inputs: Inputs):
        options = dict(dropout=inputs.dropout, shallow=inputs.shallow)
        options = {name: value for name, value in options.items() if value is not None}

        def predict(x, t):
            return network.apply(params, x, t, inputs.labels, inputs.positions, **options)

        return denoising_loss(predict, process, inputs.x0, inputs.t, inputs.eps, loss=config.diffusion.loss).mean()

    return loss


def train_step(state: TrainState, batch, *, draw, loss, stage: Stage, mesh, before: int = 0) -> tuple[TrainState, dict]:
    """One optimizer step.

    Args:
      state, batch: see `TrainState` and `draw_inputs`; B = stage.batch_size.
      draw: (key, batch) -> `Inputs`.
      loss: (params, inputs) -> scalar.
      mesh: devices of state and batch.
      before: steps of the stages that this one continues.

    Returns:
      the next state and float32 scalars: loss, grad_norm (before clipping), learning_rate.
    """
    key, done = jax.random.fold_in(state.key, state.step), state.step + before

    def value_and_grad(params, rows):
        return jax.value_and_grad(lambda params: loss(params, draw(key, rows)))(params)

    value, grads = sharding.data_parallel_grad(
        value_and_grad, state.params, batch, parts=stage.micro_batches, mesh=mesh
    )
    updates, opt_state = make_optimizer(stage).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    emas = tuple(
        optax.incremental_update(
            params, ema, ema_step_size(done, decay=decay, every=stage.ema_every, law=stage.ema_law)
        )
        for ema, decay in zip(state.emas, ema_decays(stage), strict=True)
    )
    metrics = dict(loss=value, grad_norm=optax.tree.norm(grads), learning_rate=learning_rate(stage)(done))
    return TrainState(state.step + 1, params, emas, opt_state, state.key), metrics


def jit_step(config: Config, name: str, mesh, abstract: TrainState):
    """Jit the step of stage `name`; the state is donated and keeps the shardings of `abstract`."""
    stage = config.stage[name]
    network = make_network(config, remat=stage.remat)
    draw = functools.partial(draw_inputs, config, name)
    options = dict(loss=make_loss(config, network), stage=stage, mesh=mesh, before=steps_before(config, name))
    step = functools.partial(train_step, draw=draw, **options)
    placed = sharding.placement(abstract)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placed, sharding.batch_sharding(mesh)),
        out_shardings=(placed, sharding.replicated(mesh)),
    )


def compile_step(config: Config, name: str, mesh, state: TrainState):
    """Compile the step of stage `name` for a state, in all processes of the mesh."""
    lowered = jit_step(config, name, mesh, state).lower(state, abstract_batch(config, name, mesh))
    return processes.compile_together(lowered, mesh)


def memory_bytes(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes per device of a program's arguments and results, and its peak temporary bytes."""
    memory = compiled.memory_analysis()
    # Results overwrite donated arguments, which therefore count once.
    state = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return state, memory.temp_size_in_bytes


def abstract_batch(config: Config, name: str, mesh) -> dict:
    """Shapes, dtypes and placement of a batch of stage `name`; see `draw_inputs`."""
    n, size, place = config.stage[name].batch_size, config.data.image_size, sharding.batch_sharding(mesh)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=place)
    return dict(image=rows("uint8", size, size, config.data.channels), label=rows("int32"), index=rows("uint32"))
