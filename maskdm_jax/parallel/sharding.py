"""Sharding: the mesh, the sharding of parameters, the reduction of gradients, host batches as global arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"))  # examples over all devices
EVERYWHERE = P()  # the whole array on every device
MIN_SHARDED_SIZE = 2**14  # smaller leaves are replicated: gathering them costs more than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """Mesh with axes ('data', 'fsdp') over all devices, also over a single one.

    Args:
      data: number of copies of the parameters; -1 computes it from the number of devices.
      fsdp: devices over which parameters, EMA and optimizer state are sharded.

    Raises:
      ValueError: the devices do not form such a mesh.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"mesh fsdp={fsdp} does not divide {len(devices)} devices")
    if data not in (-1, len(devices) // fsdp):
        raise ValueError(f"mesh data={data} x fsdp={fsdp} are not {len(devices)} devices; data=-1 takes the rest")
    # Auto axes, because explicit axes, the default of jax.make_mesh, reject the gather of visible patches.
    axes = dict(axis_names=("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})
    if slices == 1:
        return jax.make_mesh((len(devices) // fsdp, fsdp), devices=devices, **axes)
    if len(devices) // fsdp % slices:
        raise ValueError(
            f"mesh fsdp={fsdp} reaches beyond one of {slices} TPU slices of {len(devices) // slices} chips"
        )
    # The network between slices is slow: only the sum over "data" crosses it.
    within, across = (len(devices) // fsdp // slices, fsdp), (slices, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, **axes)


def state_sharding(mesh: Mesh, tree):
    """Shardings of parameters, EMA and moments: split each large leaf's largest divisible dimension over 'fsdp'.

    `tree` holds arrays or ShapeDtypeStructs; returns a tree of NamedShardings.
    """
    n = mesh.shape["fsdp"]

    def place(leaf):
        sides = [(side, axis) for axis, side in enumerate(leaf.shape) if side % n == 0]
        if n == 1 or not sides or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return NamedSharding(mesh, P())
        axis = max(sides, key=lambda pair: (pair[0], -pair[1]))[1]
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

    return jax.tree.map(place, tree)


def placement(tree):
    """The shardings of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over all devices of the mesh."""
    return NamedSharding(mesh, BATCH)


def data_parallel_grad(value_and_grad, params, batch, *, parts: int, mesh: Mesh):
    """Mean of `value_and_grad(params, rows)` -> (scalar, tree like params) over all rows of a batch, inside jit.

    Sharded parameters are gathered once. Each device sums the gradients of its rows over `parts` sequential
    micro-batches. A single reduction over the devices follows, for any number of micro-batches. It leaves each device
    with the part of the gradient that `state_sharding` assigns to it.
    """
    places = jax.tree.map(lambda place: place.spec, state_sharding(mesh, params))

    def on_device(params, rows):
        if parts == 1:
            total = value_and_grad(params, rows)
        else:
            micro = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), rows)
            add = lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(params, part)), None)
            total, _ = jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), micro)
        value, grads = jax.tree.map(lambda x: x / (parts * mesh.size), total)
        if mesh.size == 1:  # a psum over one device would copy all gradients
            return value, grads
        return jax.lax.psum(value, mesh.axis_names), jax.tree.map(add_up, grads, places)

    def add_up(grad, place):
        if "fsdp" in place:
            grad = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=place.index("fsdp"), tiled=True)
            return jax.lax.psum(grad, "data")
        return jax.lax.psum(grad, mesh.axis_names)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(P(), BATCH), out_specs=(P(), places), check_vma=False)(
        params, batch
    )


def put(tree, placed):
    """Make global arrays from NumPy arrays that are equal on every host, by a tree of shardings or a single one."""

    def one(array, place):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, place, lambda part: array[part])

    return jax.tree.map(lambda place, part: jax.tree.map(lambda array: one(array, place), part), placed, tree)


def to_global(mesh: Mesh, batch):
    """Make global arrays [B, ...] from this host's rows of a batch, NumPy arrays [B / hosts, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
