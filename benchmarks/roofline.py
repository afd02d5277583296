"""Lower bounds of a program's time on a chip: arithmetic, HBM bytes and interconnect, from its compiled HLO text."""

import dataclasses
import math
import re

import jax
import jax.extend

from maskdm_jax.config import Config
from maskdm_jax.tools import cost


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Published figures of a chip, in bytes per second."""

    hbm: float
    interconnect: float  # sum over the links of a chip, in one direction


# By JAX's device kind; sources as for `cost.CHIPS`.
BANDWIDTHS = {
    "TPU v4": Bandwidth(1228e9, 300e9),
    "TPU v5 lite": Bandwidth(819e9, 200e9),
    "TPU v5": Bandwidth(2765e9, 600e9),
    "TPU v6 lite": Bandwidth(1640e9, 448e9),
    "NVIDIA A100-SXM4-80GB": Bandwidth(2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Bandwidth(3350e9, 450e9),
    "NVIDIA H200": Bandwidth(4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A program's cost with its bytes per chip."""

    cost: cost.Cost
    hbm_bytes: int  # read and written in main memory
    least_hbm_bytes: int  # if each matrix product accesses memory once (`product_bytes`), and the state twice
    collectives: dict[str, tuple[int, int]]  # kind -> (number, bytes of results)

    def bounds(self) -> dict[str, float]:
        """Lower bounds in seconds by arithmetic, HBM and interconnect; {} if the chip is unknown."""
        kind, n = self.cost.kind, self.cost.chips
        if kind not in BANDWIDTHS:
            return {}
        # A ring moves (n - 1) / n of the result, twice for an all-reduce, and n - 1 times the result for a
        # reduce-scatter.
        factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
        moved = sum(factor.get(name, (n - 1) / n) * size for name, (_, size) in self.collectives.items())
        return dict(
            arithmetic=self.cost.seconds,
            hbm=self.hbm_bytes / BANDWIDTHS[kind].hbm,
            interconnect=moved / BANDWIDTHS[kind].interconnect,
        )

    @property
    def seconds(self) -> float:
        """The largest bound."""
        return max(self.bounds().values(), default=math.nan)


def training_step(config: Config, name: str, devices: list, batch_size: int) -> Roofline:
    """Roofline of a training step; see `cost.training_step`."""
    found = cost.training_step(config, name, devices, batch_size)
    products = product_bytes(cost.trace_step(config, name, batch_size // len(devices)).jaxpr.jaxpr)
    return _roofline(found, products, loops=config.stage[name].micro_batches)


def sampling(config: Config, devices: list, per_device: int) -> Roofline:
    """Roofline of whole trajectories of `per_device` images on each device; see `cost.sampling`."""
    found = cost.sampling(config, devices, per_device)
    products = product_bytes(cost.trace_forward(config, per_device, guided=True).jaxpr.jaxpr) * cost.evaluations(config)
    return _roofline(found, products, loops=cost.sampling_steps(config))


def _roofline(found: cost.Cost, products: int, *, loops: int) -> Roofline:
    text = found.program.as_text()
    return Roofline(found, hbm_bytes(text, loops=loops), products + 2 * found.state, collectives(text))


def product_bytes(jaxpr) -> int:
    """Bytes of the operands and results of all matrix products of a traced program.

    Attention logits are excluded, because a fused kernel keeps them on the chip. They are recognized by two equal sides
    in addition to the batch.
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
        inner = [product_bytes(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
        total += max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)  # one branch, not all
    return total


_BITS = dict(f64=64, s64=64, u64=64, f32=32, s32=32, u32=32, bf16=16, f16=16, s16=16, u16=16, s8=8, u8=8, pred=8)
_ARRAY = re.compile(r"\b(" + "|".join(_BITS) + r")\[([\d,]*)\](?:\{([^}]*)\})?")


def _array_bytes(dtype: str, sides: str, layout: str = "") -> int:
    """Bytes of an array in memory: TPUs pad its two fastest axes to whole tiles."""
    sides = [int(side) for side in sides.split(",") if side]
    order, tile = re.match(r"([\d,]*)", layout).group(1), re.search(r"T\((\d+),(\d+)\)", layout)
    if tile and order and len(sides) > 1:
        for axis, step in zip(order.split(","), reversed(tile.groups()), strict=False):
            sides[int(axis)] = -(-sides[int(axis)] // int(step)) * int(step)
    return _BITS[dtype] // 8 * math.prod(sides)


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)")
# Instructions that move no bytes, and the ends of asynchronous ones, which are counted at their start.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
_FREE |= {"copy-done", "slice-done", "async-update", "async-done", "all-reduce-done", "all-gather-done", "send-done"}
_FREE |= {"collective-permute-done", "recv-done", "opt-barrier"}


def hbm_bytes(text: str, *, loops: int = 1) -> int:
    """Bytes that a compiled program reads and writes in main memory, by its HLO text.

    It counts the operands and results of all instructions except those that the compiler keeps on the chip; XLA's own
    estimate ("bytes accessed") includes the latter. `loops` is the trip count of loops without one in the text.
    """
    bodies, types, body = {}, {}, []
    for line in text.splitlines():
        if line.rstrip().endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
            body = bodies.setdefault("ENTRY" if line.startswith("ENTRY") else name, [])
        elif match := _INSTRUCTION.match(line):
            body.append(match.groups())
            types[match.group(1)] = match.group(2)

    def in_hbm(kind):
        """Bytes in main memory of an array or of a tuple's arrays."""
        return sum(0 if "S(" in found[2] else _array_bytes(*found) for found in _ARRAY.findall(kind))

    def total_of(name):
        total = 0
        for _, kind, operation, operands, rest in bodies[name]:
            if operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                inside = total_of(re.search(r"body=%?([\w.\-]+)", rest).group(1))
                total += inside * (int(trips.group(1)) if trips else loops)
            elif operation in ("call", "conditional"):
                total += max(map(total_of, _called(rest)), default=0)
            elif operation.endswith("-start") and operation.split("-")[0] in ("copy", "slice"):
                # The results are destination and source (for a slice, source and destination); the smaller one moves.
                ends = _ARRAY.findall(kind)[:2]
                size = min(_array_bytes(*end) for end in ends)
                total += sum(0 if "S(" in end[2] else size for end in ends)
            elif operation not in _FREE:
                used = re.findall(r"%([\w.\-]+)", operands)
                total += in_hbm(kind) + sum(in_hbm(types.get(operand, "")) for operand in used)
        return total

    return total_of("ENTRY")


def _called(attributes: str) -> list[str]:
    """Names of the computations of a call or of a conditional's branches."""
    pairs = re.findall(r"(?:to_apply|_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}", attributes)
    return [name.strip(" %") for pair in pairs for name in ",".join(pair).split(",") if name.strip()]


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kinds of collectives in a compiled program's HLO text -> (number, bytes of their results)."""
    found = {}
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            size = sum(_array_bytes(dtype, sides) for dtype, sides, _ in _ARRAY.findall(match.group(1)))
            number, total = found.get(match.group(2), (0, 0))
            found[match.group(2)] = number + 1, total + size
    return found
