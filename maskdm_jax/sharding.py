"""Placement: the mesh, which dimension of a parameter is split, and host batches becoming global arrays."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"))
MIN_SHARDED_SIZE = 2**14  # smaller leaves cost more to gather than to keep everywhere


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """Mesh with axes ('data', 'fsdp') over all devices; one device is a mesh of one.

    Args:
      data: copies of the parameters; -1 takes what `fsdp` leaves.
      fsdp: devices that share one copy of parameters, EMA and optimizer moments.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp or (data != -1 and data * fsdp != len(devices)):
        raise ValueError(f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices; their product must")
    # Auto axes: jax.make_mesh's default, explicit ones, rejects the gather of visible patches.
    return jax.make_mesh((len(devices) // fsdp, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices)


def state_sharding(mesh: Mesh, tree):
    """One rule for parameters, EMA and moments: each large leaf's largest divisible dimension over 'fsdp'.

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


def replicate(mesh: Mesh, tree):
    """Inside jit: every device gets all of each array (an all-gather where it was split)."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over all devices of the mesh."""
    return NamedSharding(mesh, BATCH)


def to_global(mesh: Mesh, batch):
    """This host's rows of a batch (NumPy arrays [B / hosts, ...]) -> global arrays [B, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
