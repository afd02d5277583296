"""What a step costs on a chip, read off the compiled program: memory, arithmetic, traffic, and the time they bound.

Works for chips that are not there: JAX compiles for a TPU topology on any Linux machine with libtpu.
"""

import dataclasses
import math
import re
import time

import jax
from jax.experimental import topologies

from maskdm_jax import sharding, train
from maskdm_jax.config import Config
from maskdm_jax.generate import compile_sampling
from maskdm_jax.network import make_network
from maskdm_jax.representation import make_representation


class CostError(ValueError):
    """A program that cannot be compiled as asked; the message says why and what would work."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip, per second and in bytes: dense bfloat16 FLOP/s, memory, its traffic, and links."""

    flops: float
    memory: int
    traffic: float
    links: float  # all of a chip's links to others, in one direction


# By JAX's device kind. TPUs: cloud.google.com/tpu/docs/system-architecture; GPUs: the vendor's data sheets.
CHIPS = {
    "TPU v4": Chip(275e12, 32 << 30, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 << 30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 << 30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 << 30, 1640e9, 448e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80_000_000_000, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80_000_000_000, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141_000_000_000, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one execution of a program, per chip."""

    chips: int
    kind: str  # JAX's device kind
    batch: int  # images over all chips
    limit: int | None  # bytes of memory that a chip has, if it is known
    state: int  # bytes of arguments: parameters, EMA, moments, the batch
    temporary: int  # bytes besides, at the fullest moment
    flops: float  # of the algorithm, recomputation included
    traffic: float  # bytes read and written in memory
    collectives: dict[str, tuple[int, int]]  # kind -> (number, bytes of results)
    compile_seconds: float

    @property
    def chip(self) -> Chip | None:
        """Figures of the chip, if they are known."""
        return CHIPS.get(self.kind)

    @property
    def memory(self) -> int:
        """Bytes needed."""
        return self.state + self.temporary

    @property
    def fits(self) -> bool | None:
        """Whether the chip has that much; None where it is not known."""
        return None if self.limit is None else self.memory <= self.limit

    def bounds(self) -> dict[str, float]:
        """Least seconds by arithmetic, memory traffic and links; {} where the chip is not known."""
        if self.chip is None:
            return {}
        # A ring moves (n - 1) / n of the result, for an all-reduce twice; a scatter moves more than its result.
        n = self.chips
        factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
        moved = sum(factor.get(kind, (n - 1) / n) * size for kind, (_, size) in self.collectives.items())
        return dict(
            arithmetic=self.flops / self.chip.flops,
            memory=self.traffic / self.chip.traffic,
            links=moved / self.chip.links,
        )

    @property
    def seconds(self) -> float:
        """The least time of an execution: the largest bound."""
        return max(self.bounds().values(), default=math.nan)


def devices_of(topology: str) -> list:
    """Devices of a TPU topology, such as v5e:16x16 or 2*v5e:16x16 (two slices), or of this machine for `local`.

    Raises:
      CostError: the topology is unknown, or libtpu is not installed.
    """
    if topology == "local":
        return jax.devices()
    slices, _, name = topology.rpartition("*")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=int(slices or 1))
        return list(found.devices)
    except Exception as error:  # whatever libtpu throws
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CostError(
            f"there is no TPU compiler for topology {topology!r} ({reason}); topologies are like v5e:4x4, v5p:4x4x4, "
            '2*v6e:16x16, or local; the compiler comes with pip install "jax[tpu]"'
        ) from None


def of_training(config: Config, name: str, devices: list, batch_size: int) -> Cost:
    """Cost of a training step of stage `name` with another batch size, which must divide over the devices.

    Raises:
      CostError: it does not fit into memory.
      ConfigError: the batch or the mesh do not divide.
    """
    alone = _with_batch(config, name, batch_size)
    mesh, parts = train.make_mesh_for(alone, devices), alone.stage[name].micro_batches
    compiled, seconds = _compile(lambda: _lower_step(alone, name, mesh))
    # XLA counts the body of a loop once, and not what is in fused kernels: the arithmetic is that of the rows of one
    # device, without micro-batches, before anything is fused.
    rows = _with_batch(config, name, batch_size // len(devices), micro_batches=1)
    one = _lower_step(_countable(rows), name, sharding.make_mesh(1, 1, jax.local_devices(backend="cpu")[:1]))
    return _cost(compiled, seconds, mesh, batch_size, one.cost_analysis()["flops"], loops=parts)


def full_batch(config: Config, name: str, chips: int) -> int:
    """The stage's batch size, rounded up to what divides over that many chips."""
    stage = config.stage[name]
    return -(-stage.batch_size // (chips * stage.micro_batches)) * chips * stage.micro_batches


def largest_batch(config: Config, name: str, devices: list, progress=None) -> int:
    """The largest batch of a stage that fits into the chips' memory, to one part in eight.

    progress: called with each batch size that was tried and its `Cost`, None if it does not fit.

    Raises:
      CostError: not even one image per chip and micro-batch fits, or it is not known how much memory there is.
    """
    unit = len(devices) * config.stage[name].micro_batches

    def fits(units):
        try:
            found = of_training(config, name, devices, units * unit)
        except CostError:
            found = None
        good = found is not None and found.fits is not False
        if found is not None and found.limit is None:
            raise CostError(f"how much memory {found.kind} has is not known; choose a TPU topology")
        if progress:
            progress(units * unit, found if good else None)
        return good

    good, bad = 0, full_batch(config, name, len(devices)) // unit
    while fits(bad):
        good, bad = bad, 2 * bad
    while not good and bad > 1:
        good, bad = (bad // 2, bad) if fits(bad // 2) else (0, bad // 2)
    if not good:
        raise CostError(f"not even {unit} images fit; try --config.model.remat=True, more micro_batches or mesh.fsdp")
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good * unit


def _with_batch(config: Config, name: str, batch_size: int, **changes) -> Config:
    """A config of that stage alone."""
    stage = dataclasses.replace(config.stage[name], batch_size=batch_size, **changes)
    return dataclasses.replace(config, stages=(name,), stage={name: stage})


def of_sampling(config: Config, devices: list, per_device: int) -> Cost:
    """Cost of whole trajectories of `per_device` images on each device."""
    mesh, network, sampling = sharding.make_mesh(devices=devices), make_network(config), config.sampling
    evaluations = config.diffusion.timesteps if sampling.method == "ddpm" else sampling.steps
    place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
    everywhere = sharding.replicated(mesh)
    params = jax.tree.map(lambda leaf: place(leaf, everywhere), network.abstract_params())
    key = place(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    n = per_device * len(devices)
    index = jax.ShapeDtypeStruct((n,), "int32", sharding=sharding.batch_sharding(mesh))
    labels = index if config.model.num_classes else None
    compiled, seconds = _compile(lambda: compile_sampling(config, network, mesh).lower(params, key, index, labels))
    # The network once, for the images of one device; see `of_training`.
    x = jax.ShapeDtypeStruct((per_device, *make_representation(config).shape), "float32")
    t = jax.ShapeDtypeStruct((per_device,), "int32")
    apply = jax.jit(make_network(_countable(config)).apply).lower(
        network.abstract_params(), x, t, t if config.model.num_classes else None
    )
    flops = apply.cost_analysis()["flops"] * evaluations * (2 if sampling.guidance else 1)
    return _cost(compiled, seconds, mesh, n, flops, loops=evaluations)


def _countable(config: Config) -> Config:
    """The config with an attention whose arithmetic XLA sees."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="plain"))


def _lower_step(config: Config, name: str, mesh):
    network, stage, data = make_network(config), config.stage[name], config.data
    state = train.abstract_state(config, 0, network, mesh)
    place = sharding.batch_sharding(mesh)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((stage.batch_size, *shape), dtype, sharding=place)
    image = rows("uint8", data.image_size, data.image_size, data.channels)
    batch = dict(image=image, label=rows("int32"), index=rows("uint32"))
    return train.compile_step(config, name, network, mesh, state).lower(state, batch)


def _compile(lower):
    """The compiled program, and the seconds that it took.

    Raises:
      CostError: it does not fit into the chip's memory, or the compiler refuses.
    """
    lowered, start = lower(), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        lines = str(error).splitlines()
        needed = next((line.strip() for line in lines if "Used" in line and "of" in line), lines[0][:300])
        raise CostError(needed) from None
    return compiled, time.perf_counter() - start


def _cost(compiled, seconds: float, mesh, batch: int, flops: float, *, loops: int) -> Cost:
    memory = compiled.memory_analysis()
    # Donated arguments are where results are written: they count once.
    state = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    analysis, kind = compiled.cost_analysis(), mesh.devices.flat[0].device_kind
    here = [
        (device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices() if device.device_kind == kind
    ]
    return Cost(
        chips=mesh.size,
        kind=kind,
        batch=batch,
        limit=here[0] if here and here[0] else CHIPS[kind].memory if kind in CHIPS else None,
        state=state,
        temporary=memory.temp_size_in_bytes,
        flops=flops,
        traffic=analysis.get("bytes accessed", 0.0) * loops,
        collectives=collectives(compiled.as_text()),
        compile_seconds=seconds,
    )


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)
_BITS = dict(f64=64, s64=64, u64=64, f32=32, s32=32, u32=32, bf16=16, f16=16, s16=16, u16=16, s8=8, u8=8, pred=8)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kinds of collectives in a compiled program's text -> (number, bytes of their results)."""
    found = {}
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            shapes, kind = re.findall(r"\b(\w+)\[([\d,]*)\]", match.group(1)), match.group(2)
            size = sum(
                _BITS.get(dtype, 32) // 8 * math.prod(int(side) for side in sides.split(",") if side)
                for dtype, sides in shapes
            )
            number, total = found.get(kind, (0, 0))
            found[kind] = number + 1, total + size
    return found
