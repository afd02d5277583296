"""What a step costs on a chip, read off the compiled program: memory, arithmetic, traffic, and the time they bound.

Works for chips that are not there: JAX compiles for a TPU topology on any Linux machine with libtpu.
"""

import dataclasses
import math
import re
import time

import jax
import jax.extend
from jax.experimental import topologies

from maskdm_jax.build import make_network
from maskdm_jax.config import Config
from maskdm_jax.errors import CostError
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import sharding
from maskdm_jax.sampling import compile_sampling
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.step import abstract_batch, jit_step


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
    streamed_traffic: float  # if each product read and wrote memory once (`product_traffic`), and the state, twice
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
    mesh, parts = make_run_mesh(alone, devices), alone.stage[name].micro_batches
    compiled, seconds = _compile(lambda: _lower_step(alone, name, mesh))
    flops, products = count_flops(config, name, batch_size // len(devices))
    return _cost(compiled, seconds, mesh, batch_size, flops, products, loops=parts)


def count_flops(config: Config, name: str, rows: int) -> tuple[float, int]:
    """FLOPs and `product_traffic` of a training step of stage `name` on so many images; nothing is compiled."""
    # XLA counts the body of a loop once, and not what is in fused kernels: the arithmetic is that of the rows of one
    # device, without micro-batches, before anything is fused.
    alone = _with_batch(_countable(config), name, rows, micro_batches=1)
    traced = _trace_step(alone, name, sharding.make_mesh(1, 1, jax.local_devices(backend="cpu")[:1]))
    return traced.lower().cost_analysis()["flops"], product_traffic(traced.jaxpr.jaxpr)


def product_traffic(jaxpr) -> int:
    """Bytes of the operands and results of all matrix products of a traced program.

    But for logits, known by two equal sides besides the batch, which a fused kernel keeps on the chip.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            first, second = equation.params["dimension_numbers"][1]
            values = (*equation.invars, *equation.outvars)
            for batch, value in zip((first, second, range(len(first))), values, strict=True):
                sides = [side for axis, side in enumerate(value.aval.shape) if axis not in batch and side > 1]
                logits = batch and len(sides) == 2 and sides[0] == sides[1]
                total += 0 if logits else math.prod(value.aval.shape) * value.aval.dtype.itemsize
        inner = [product_traffic(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
        total += max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)  # one branch, not all
    return total


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
        raise CostError(f"not even {unit} images fit; try --config.{name}.remat=True, more micro_batches or mesh.fsdp")
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
    steps = config.diffusion.timesteps if sampling.method == "ddpm" else sampling.steps
    place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
    everywhere = sharding.replicated(mesh)
    params = jax.tree.map(lambda leaf: place(leaf, everywhere), network.abstract_params())
    key = place(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    n = per_device * len(devices)
    index = jax.ShapeDtypeStruct((n,), "int32", sharding=sharding.batch_sharding(mesh))
    labels = index if config.model.num_classes else None
    compiled, seconds = _compile(lambda: compile_sampling(config, network, mesh).lower(params, key, index, labels))
    evaluations = steps * (2 if sampling.guidance else 1)
    flops, products = of_forward(config, per_device)
    return _cost(compiled, seconds, mesh, n, flops * evaluations, products * evaluations, loops=steps)


def of_forward(config: Config, images: int) -> tuple[float, int]:
    """FLOPs and `product_traffic` of the network for so many whole images."""
    network = make_network(_countable(config))
    x = jax.ShapeDtypeStruct((images, *make_representation(config).shape), "float32")
    t = jax.ShapeDtypeStruct((images,), "int32")
    labels = t if config.model.num_classes else None
    traced = jax.jit(network.apply).trace(network.abstract_params(), x, t, labels)
    return traced.lower().cost_analysis()["flops"], product_traffic(traced.jaxpr.jaxpr)


def _countable(config: Config) -> Config:
    """The config with an attention whose arithmetic XLA sees."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="plain"))


def _lower_step(config: Config, name: str, mesh):
    return _trace_step(config, name, mesh).lower()


def _trace_step(config: Config, name: str, mesh):
    state = abstract_state(config, 0, make_network(config), mesh)
    return jit_step(config, name, mesh, state).trace(state, abstract_batch(config, name, mesh))


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


def memory_of(compiled) -> tuple[int, int]:
    """Bytes per device of a program's arguments and results, and of all else at the fullest moment."""
    memory = compiled.memory_analysis()
    # Donated arguments are where results are written: they count once.
    state = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return state, memory.temp_size_in_bytes


def _cost(compiled, seconds: float, mesh, batch: int, flops: float, products: int, *, loops: int) -> Cost:
    state, temporary = memory_of(compiled)
    text, kind = compiled.as_text(), mesh.devices.flat[0].device_kind
    here = [
        (device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices() if device.device_kind == kind
    ]
    return Cost(
        chips=mesh.size,
        kind=kind,
        batch=batch,
        limit=here[0] if here and here[0] else CHIPS[kind].memory if kind in CHIPS else None,
        state=state,
        temporary=temporary,
        flops=flops,
        traffic=traffic(text, loops=loops),
        streamed_traffic=products + 2 * state,
        collectives=collectives(text),
        compile_seconds=seconds,
    )


_BITS = dict(f64=64, s64=64, u64=64, f32=32, s32=32, u32=32, bf16=16, f16=16, s16=16, u16=16, s8=8, u8=8, pred=8)
_ARRAY = re.compile(r"\b(" + "|".join(_BITS) + r")\[([\d,]*)\](?:\{([^}]*)\})?")


def _bytes(dtype: str, sides: str, layout: str = "") -> int:
    """Bytes of an array as it lies in memory: TPUs pad its two fastest axes to whole tiles."""
    sides = [int(side) for side in sides.split(",") if side]
    order, tile = re.match(r"([\d,]*)", layout).group(1), re.search(r"T\((\d+),(\d+)\)", layout)
    if tile and order and len(sides) > 1:
        for axis, step in zip(order.split(","), reversed(tile.groups()), strict=False):
            sides[int(axis)] = -(-sides[int(axis)] // int(step)) * int(step)
    return _BITS[dtype] // 8 * math.prod(sides)


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)")
# What moves nothing, and the ends of what is counted where it begins.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
_FREE |= {"copy-done", "slice-done", "async-update", "async-done", "all-reduce-done", "all-gather-done", "send-done"}
_FREE |= {"collective-permute-done", "recv-done", "opt-barrier"}


def traffic(text: str, *, loops: int = 1) -> int:
    """Bytes that a compiled program reads and writes in main memory, by its text.

    Operands and results of all instructions, without what the compiler keeps on the chip: XLA's own estimate ("bytes
    accessed") counts that, too. `loops` stands for the number of turns of loops whose text does not say.
    """
    bodies, types, body = {}, {}, []
    for line in text.splitlines():
        if line.rstrip().endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
            body = bodies.setdefault("ENTRY" if line.startswith("ENTRY") else name, [])
        elif match := _INSTRUCTION.match(line):
            body.append(match.groups())
            types[match.group(1)] = match.group(2)

    def parts(kind):
        """Bytes in main memory of an array or of each of a tuple's."""
        return [0 if "S(" in found[2] else _bytes(*found) for found in _ARRAY.findall(kind)]

    def of(name):
        total = 0
        for _, kind, operation, operands, rest in bodies[name]:
            if operation == "while":
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                inside = of(re.search(r"body=%?([\w.\-]+)", rest).group(1))
                total += inside * (int(turns.group(1)) if turns else loops)
            elif operation in ("call", "conditional"):
                inside = re.findall(r"(?:to_apply|_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}", rest)
                names = [name.strip(" %") for pair in inside for name in ",".join(pair).split(",") if name.strip()]
                total += max((of(name) for name in names), default=0)
            elif operation.endswith("-start") and operation.split("-")[0] in ("copy", "slice"):
                # Results: where to and from where for a copy, the other way round for a slice; both of the part's size.
                one, other = _ARRAY.findall(kind)[:2]
                size = min(_bytes(*one), _bytes(*other))
                total += sum(0 if "S(" in found[2] else size for found in (one, other))
            elif operation not in _FREE:
                used = re.findall(r"%([\w.\-]+)", operands)
                total += sum(parts(kind)) + sum(sum(parts(types.get(operand, ""))) for operand in used)
        return total

    return of("ENTRY")


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kinds of collectives in a compiled program's text -> (number, bytes of their results)."""
    found = {}
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            kind = match.group(2)
            size = sum(_bytes(dtype, sides) for dtype, sides, _ in _ARRAY.findall(match.group(1)))
            number, total = found.get(kind, (0, 0))
            found[kind] = number + 1, total + size
    return found
