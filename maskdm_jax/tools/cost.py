"""Cost of a compiled program per chip: memory and whether it fits, FLOPs, and the time at the chip's peak.

The chips need not be present: JAX compiles for a TPU topology on any Linux machine with libtpu.
"""

import dataclasses
import os
import time

import jax
from jax.experimental import topologies

from maskdm_jax.build import compute_dtype, make_network, weak_inputs
from maskdm_jax.config import Config
from maskdm_jax.diffusion.samplers import SAMPLERS
from maskdm_jax.errors import CostError
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import sharding
from maskdm_jax.sampling import compile_sampling
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.step import abstract_batch, jit_step, memory_bytes


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip."""

    flops: float  # dense bfloat16 FLOP/s
    memory: int  # bytes


# By JAX's device kind. TPUs: cloud.google.com/tpu/docs/system-architecture; GPUs: the vendor's data sheets.
CHIPS = {
    "TPU v4": Chip(275e12, 32 << 30),
    "TPU v5 lite": Chip(197e12, 16 << 30),
    "TPU v5": Chip(459e12, 95 << 30),
    "TPU v6 lite": Chip(918e12, 32 << 30),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80_000_000_000),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80_000_000_000),
    "NVIDIA H200": Chip(989e12, 141_000_000_000),
}

# Use libtpu only as a compiler: query no metadata server, and lock no chip.
_COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one execution of a program; bytes and FLOPs are per chip."""

    program: jax.stages.Compiled
    chips: int
    kind: str  # JAX's device kind
    batch: int  # images over all chips
    limit: int | None  # bytes of memory of a chip; None if unknown
    state: int  # bytes of arguments and results: parameters, EMA, moments, the batch
    temporary: int  # peak temporary bytes
    flops: float  # of the algorithm, recomputation included
    compile_seconds: float

    @property
    def memory(self) -> int:
        """Bytes needed."""
        return self.state + self.temporary

    @property
    def fits(self) -> bool | None:
        """Whether the program fits into memory; None if its size is unknown."""
        return None if self.limit is None else self.memory <= self.limit

    @property
    def seconds(self) -> float | None:
        """Time of the FLOPs at the chip's peak, a lower bound; None if the peak is unknown."""
        return self.flops / CHIPS[self.kind].flops if self.kind in CHIPS else None


def topology_devices(topology: str) -> list:
    """Devices of a TPU topology, such as v5e:16x16 or 2*v5e:16x16 (two slices), or of this machine for `local`.

    For a topology, this sets environment variables for libtpu.

    Raises:
      CostError: the topology is unknown, or libtpu is not installed.
    """
    if topology == "local":
        return jax.devices()
    for name, value in _COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    slices, _, name = topology.rpartition("*")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=int(slices or 1))
        return list(found.devices)
    except Exception as error:  # libtpu raises many types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CostError(
            f"there is no TPU compiler for topology {topology!r} ({reason}); topologies are like v5e:4x4, v5p:4x4x4, "
            '2*v6e:16x16, or local; the compiler comes with pip install "jax[tpu]"'
        ) from None


def training_step(config: Config, name: str, devices: list, batch_size: int) -> Cost:
    """Cost of a training step of stage `name` with a given batch size, which the number of devices must divide.

    Raises:
      CostError: it does not fit into memory, or the compiler refuses.
      ConfigError: the batch or the mesh does not divide over the devices.
    """
    alone = with_batch(_on(devices, config), name, batch_size)
    mesh = make_run_mesh(alone, devices)
    lowered = _trace_step(alone, name, mesh).lower()
    return _compile(lowered, mesh, batch_size, count_flops(config, name, batch_size // len(devices)))


def sampling(config: Config, devices: list, per_device: int) -> Cost:
    """Cost of whole trajectories of `per_device` images on each device; raises as `training_step` does."""
    config = _on(devices, config)
    mesh, network, n = sharding.make_mesh(devices=devices), make_network(config), per_device * len(devices)
    everywhere = sharding.replicated(mesh)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
    params, key = jax.tree.map(place, (network.abstract_params(), jax.eval_shape(lambda: jax.random.key(0))))
    index = jax.ShapeDtypeStruct((n,), "int32", sharding=sharding.batch_sharding(mesh))
    labels = index if config.model.num_classes else None
    lowered = compile_sampling(config, network, mesh).lower(params, key, index, labels)
    flops = trace_forward(config, per_device, guided=True).lower().cost_analysis()["flops"]
    return _compile(lowered, mesh, n, flops * evaluations(config))


def sampling_steps(config: Config) -> int:
    """Steps of a trajectory."""
    return config.diffusion.timesteps if config.sampling.method == "ddpm" else config.sampling.steps


def evaluations(config: Config) -> int:
    """Predictions in a trajectory; with guidance, each is two forward passes."""
    return SAMPLERS[config.sampling.method].calls(config.sampling.steps, config.diffusion.timesteps)


def count_flops(config: Config, name: str, images: int) -> float:
    """FLOPs of a training step of stage `name` on this number of images; compiles nothing."""
    return trace_step(config, name, images).lower().cost_analysis()["flops"]


def count_forward_flops(config: Config, images: int) -> float:
    """FLOPs of a forward pass of the network on this number of whole images; compiles nothing."""
    return trace_forward(config, images).lower().cost_analysis()["flops"]


def trace_step(config: Config, name: str, images: int) -> jax.stages.Traced:
    """A training step on one device in which XLA sees all arithmetic: no loop over micro-batches, no fused kernel."""
    alone = with_batch(_with_plain_attention(config), name, images, micro_batches=1)
    return _trace_step(alone, name, sharding.make_mesh(1, 1, jax.local_devices(backend="cpu")[:1]))


def trace_forward(config: Config, images: int, *, guided: bool = False) -> jax.stages.Traced:
    """A forward pass of the network in which XLA sees all arithmetic; `guided`: and of the weak one of guidance."""
    network = make_network(_with_plain_attention(config))

    def predict(params, x, t, labels):
        inputs = [(labels, None)]
        inputs += [weak_inputs(config, labels, images)] * (guided and config.sampling.guidance > 0)
        return [network.apply(params, x, t, *each) for each in inputs]

    x = jax.ShapeDtypeStruct((images, *make_representation(config).shape), "float32")
    t = jax.ShapeDtypeStruct((images,), "int32")
    return jax.jit(predict).trace(network.abstract_params(), x, t, t if config.model.num_classes else None)


def round_up_batch(config: Config, name: str, chips: int) -> int:
    """The stage's batch size, rounded up to a multiple of chips and micro-batches."""
    stage = config.stage[name]
    return -(-stage.batch_size // (chips * stage.micro_batches)) * chips * stage.micro_batches


def largest_batch(config: Config, name: str, devices: list, progress=None) -> int:
    """The largest batch of a stage that fits into the chips' memory, up to a tolerance of 1/8.

    progress: called with each batch size that is tried, and its `Cost` or None if it does not fit.

    Raises:
      CostError: not even one image per chip and micro-batch fits, or the size of the memory is unknown.
    """
    unit = len(devices) * config.stage[name].micro_batches

    def fits(units):
        try:
            found = training_step(config, name, devices, units * unit)
        except CostError:
            found = None
        good = found is not None and found.fits is not False
        if found is not None and found.limit is None:
            raise CostError(f"the memory size of {found.kind} is not known; choose a TPU topology")
        if progress:
            progress(units * unit, found if good else None)
        return good

    good, bad = 0, round_up_batch(config, name, len(devices)) // unit
    while fits(bad):
        good, bad = bad, 2 * bad
    while not good and bad > 1:
        good, bad = (bad // 2, bad) if fits(bad // 2) else (0, bad // 2)
    if not good:
        raise CostError(f"not even {unit} images fit; try --config.{name}.remat=True, more micro_batches or mesh.fsdp")
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good * unit


def with_batch(config: Config, name: str, batch_size: int, **changes) -> Config:
    """A config with only this stage."""
    stage = dataclasses.replace(config.stage[name], batch_size=batch_size, **changes)
    return dataclasses.replace(config, stages=(name,), stage={name: stage})


def _on(devices: list, config: Config) -> Config:
    """A config with the dtype that is computed in on these devices, whatever this machine has."""
    dtype = compute_dtype(config.model, devices[0].platform)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def _with_plain_attention(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="plain"))


def _trace_step(config: Config, name: str, mesh) -> jax.stages.Traced:
    state = abstract_state(config, 0, make_network(config), mesh)
    return jit_step(config, name, mesh, state).trace(state, abstract_batch(config, name, mesh))


def _compile(lowered: jax.stages.Lowered, mesh, batch: int, flops: float) -> Cost:
    """Compile a program and compute its cost.

    Raises:
      CostError: it does not fit into the chip's memory, or the compiler refuses.
    """
    start = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        lines = str(error).splitlines()
        needed = next((line.strip() for line in lines if "Used" in line and "of" in line), lines[0][:300])
        raise CostError(needed) from None
    seconds, kind = time.perf_counter() - start, mesh.devices.flat[0].device_kind
    local = [device.memory_stats() or {} for device in jax.local_devices() if device.device_kind == kind]
    published = CHIPS[kind].memory if kind in CHIPS else None
    limit = next((stats["bytes_limit"] for stats in local if "bytes_limit" in stats), published)
    return Cost(program, mesh.size, kind, batch, limit, *memory_bytes(program), flops, compile_seconds=seconds)
