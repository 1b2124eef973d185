"""What one program of a kernel touches in global memory, and how often its loops run, from its TTGIR.

TTGIR is the last form of a kernel in which a load names its tensor: pointers are ``argument + offsets``, masks and
offsets are arithmetic on ranges, program numbers and scalar arguments. That arithmetic is carried out here, with
numpy, for one program of the launch; numbers that come out of memory are not needed and stay unknown. So bytes are
counted as they are asked for (rows that a mask leaves out are not), whatever the kernel, and no formula can grow stale.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_vwn.config import VirtualWidthError

SECTOR = 32  # bytes, what L2 hands out
# Of a longer loop, and of a loop around another one, so many iterations stand for all.
_MOST_ITERATIONS = 256
_MOST_TILES = 1

_UNCOUNTED = ("tt.descriptor", "tt.atomic", "tt.call", "ttng.async_tma")

_OPERATION = re.compile(r"^(?:(%[\w-]+)(?::(\d+))? = )?\"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_TYPE = re.compile(r"tensor<((?:\d+x)*)(!tt\.ptr<\w+>|\w+)")
_BYTES = {"i1": 1, "i8": 1, "f8E4M3FN": 1, "f8E5M2": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}


class Pointers(NamedTuple):
    """Addresses: an argument of the kernel and offsets in elements."""

    argument: str
    offsets: np.ndarray


@dataclass
class Operation:
    """One line of TTGIR with what stands in its braces."""

    results: list[str]
    name: str
    text: str
    operands: list[str]
    regions: list[list["Operation"]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result: the last tensor that the line names."""
        found = _TYPE.findall(self.text)
        return tuple(int(size) for size in found[-1][0].split("x") if size) if found else ()


@dataclass(frozen=True)
class Loop:
    """A loop in the order of the text: how often it runs and where it ends, which the machine code compares with."""

    trips: int
    upper: int
    step: int


@dataclass
class Access:
    """What a program asks of one tensor, in bytes of whole sectors.

    Attributes:
        copied: by asynchronous copies, which pass L1.
        loaded: by ordinary loads.
        stored: by stores.
        unique_loads: bytes that are loaded at least once.
        unique_stores: bytes that are stored at least once.
        stored_first: whether the program stores before it loads, so that what it loads is its own.
    """

    copied: float = 0
    loaded: float = 0
    stored: float = 0
    unique_loads: float = 0
    unique_stores: float = 0
    stored_first: bool = False


class Program(NamedTuple):
    """What a program does: its loops in order of the text and its accesses by argument."""

    loops: list[Loop]
    accesses: dict[str, Access]


def read_program(text: str, arguments: Mapping[str, object], grid: tuple[int, ...]) -> Program:
    """Walk through the first program of a launch.

    Args:
        text: TTGIR.
        arguments: of the launch, by name; only numbers are looked at.
        grid: programs by axis.
    """
    lines = iter(re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line).strip() for line in text.splitlines())
    signature = next((line for line in lines if line.startswith("tt.func")), None)
    if signature is None:
        raise VirtualWidthError("the compiler's output has no kernel: this version of Triton writes another form.")
    walk = _Walk(_block(lines)[0], grid)
    for name, kind in re.findall(r"%([\w-]+): (!tt\.ptr<\w+>|\w+)", signature):
        if kind.startswith("!tt.ptr"):
            walk.values[f"%{name}"] = Pointers(name, np.zeros((), np.int64))
            walk.element_bytes[name] = _BYTES[kind[8:-1]]
        elif kind in _BYTES and kind[0] == "i":
            walk.values[f"%{name}"] = np.int64(arguments[name])
    walk.run(walk.operations, 1.0)
    return Program([walk.loops[key] for key in sorted(walk.loops)], walk.totals())


def _block(lines: Iterator[str]) -> tuple[list[Operation], str]:
    """Operations up to the closing brace, and the line of the brace."""
    operations: list[Operation] = []
    for line in lines:
        if line.startswith("}"):
            return operations, line
        found = _OPERATION.match(line)
        if not found or not line or line.startswith(("^", "//")):
            continue
        result, count, name, text = found.groups()
        results = [] if result is None else [result] if count is None else [f"{result}#{i}" for i in range(int(count))]
        operation = Operation(results, name, text, _VALUE.findall(text))
        operations.append(operation)
        while line.endswith("{"):
            region, line = _block(lines)
            operation.regions.append(region)
    return operations, "}"


class _Walk:
    """Values of what is known, and the accesses so far."""

    def __init__(self, operations: list[Operation], grid: tuple[int, ...]):
        self.operations, self.grid = operations, (*grid, 1, 1)[:3]
        self.values: dict[str, np.ndarray | Pointers | None] = {}
        self.element_bytes: dict[str, int] = {}
        self.loops: dict[int, Loop] = {}
        self.order = {id(op): i for i, op in enumerate(_every(operations)) if op.name == "scf.for"}
        self.accesses: dict[str, Access] = {}
        self.sectors: dict[tuple[str, str], list[tuple[np.ndarray, float]]] = {}

    def run(self, operations: list[Operation], times: float) -> list:
        """Carry out a block that stands for ``times`` executions of itself; returns what it yields."""
        for operation in operations:
            if operation.name == "scf.yield":
                return [self.values.get(name) for name in operation.operands]
            if operation.name == "scf.for":
                self._loop(operation, times)
            elif operation.name == "scf.if":
                self._branch(operation, times)
            elif operation.name == "scf.while":
                raise VirtualWidthError("a kernel has a while loop, whose trips nobody knows: it cannot be predicted.")
            elif operation.name.startswith(_UNCOUNTED):
                raise VirtualWidthError(f"a kernel has {operation.name}, whose bytes are not counted.")
            elif operation.name in ("tt.load", "tt.store", "ttg.async_copy_global_to_local"):
                self._access(operation, times)
            elif operation.results:
                self.values[operation.results[0]] = self._value(operation)
        return []

    def _loop(self, operation: Operation, times: float) -> None:
        head, _, carried = operation.text.partition("iter_args(")
        counter, *bounds = _VALUE.findall(head)
        lower, upper, step = (int(self._known(name)) for name in bounds[:3])
        names, starts = _VALUE.findall(carried.partition(")")[0])[::2], _VALUE.findall(carried.partition(")")[0])[1::2]
        trips = max(0, math.ceil((upper - lower) / step))
        self.loops.setdefault(self.order[id(operation)], Loop(trips, upper, step))
        nested = any(op.name == "scf.for" for op in _every(operation.regions[0]))
        done = min(trips, _MOST_TILES if nested else _MOST_ITERATIONS)
        state = [self.values.get(name) for name in starts]
        for i in range(done):
            self.values |= {counter: np.int64(lower + i * step), **dict(zip(names, state, strict=True))}
            state = self.run(operation.regions[0], times * trips / done)
        self.values |= dict(zip(operation.results, state, strict=False))

    def _branch(self, operation: Operation, times: float) -> None:
        """The branch that is taken; where nobody knows, the first."""
        taken = self.values.get(operation.operands[0])
        region = 0 if taken is None or bool(taken) else 1
        yielded = self.run(operation.regions[region], times) if region < len(operation.regions) else []
        self.values |= dict(zip(operation.results, yielded, strict=False))

    def _known(self, name: str):
        value = self.values.get(name)
        if value is None:
            raise VirtualWidthError(f"the bound {name} of a loop depends on memory: the kernel cannot be predicted.")
        return value

    def _access(self, operation: Operation, times: float) -> None:
        operands = [self.values.get(name) for name in operation.operands]
        if operation.results:
            self.values[operation.results[0]] = None
        pointers, mask = operands[0], None
        if operation.name == "tt.load":
            mask = operands[1] if len(operands) > 1 else None
        elif operation.name == "tt.store":
            mask = operands[2] if len(operands) > 2 else None
        elif " mask " in operation.text:
            mask = operands[2]
        if not isinstance(pointers, Pointers):
            raise VirtualWidthError("a kernel follows an address out of memory: it cannot be predicted.")
        size = self.element_bytes[pointers.argument]
        offsets = pointers.offsets
        if mask is not None:
            offsets = offsets[np.broadcast_to(mask, offsets.shape).astype(bool)]
        sectors = np.unique(offsets * size // SECTOR)
        access = self.accesses.setdefault(pointers.argument, Access(stored_first=operation.name == "tt.store"))
        kind = {"tt.load": "loaded", "tt.store": "stored"}.get(operation.name, "copied")
        setattr(access, kind, getattr(access, kind) + times * SECTOR * sectors.size)
        key = pointers.argument, "unique_stores" if kind == "stored" else "unique_loads"
        self.sectors.setdefault(key, []).append((sectors, times))

    def totals(self) -> dict[str, Access]:
        """The accesses with the sizes of their unions."""
        for (argument, kind), parts in self.sectors.items():
            union = np.unique(np.concatenate([sectors for sectors, _ in parts]))
            share = union.size / max(1, sum(sectors.size for sectors, _ in parts))
            asked = sum(sectors.size * times for sectors, times in parts)
            setattr(self.accesses[argument], kind, SECTOR * share * asked)
        return self.accesses

    def _value(self, op: Operation):
        operands = [self.values.get(name) for name in op.operands]
        if op.name == "arith.constant":
            found = re.match(r" (?:dense<)?(-?\d+|true|false)>?(?: :|$)", op.text)
            number = found and {"true": 1, "false": 0}.get(found[1], found[1])
            return None if number is None else np.broadcast_to(np.int64(number), op.shape)
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(op.text.split()[0])
            return np.int64(0 if op.name == "tt.get_program_id" else self.grid[axis])
        if op.name == "tt.make_range":
            return np.arange(_attribute(op, "start"), _attribute(op, "end"), dtype=np.int64)
        if not operands or any(value is None for value in operands):
            return None
        if op.name == "tt.addptr":
            return Pointers(operands[0].argument, operands[0].offsets + operands[1])
        if op.name == "arith.select":
            return _select(*operands)
        if op.name in _ARITHMETIC:
            return _ARITHMETIC[op.name](*operands)
        if op.name == "arith.cmpi":
            return _COMPARISONS[op.text.split(",")[0].strip().lstrip("su")](*operands)
        if op.name not in _SHAPES:
            return None
        reshape = _SHAPES[op.name]
        if isinstance(operands[0], Pointers):
            return Pointers(operands[0].argument, reshape(op, operands[0].offsets))
        return reshape(op, operands[0])


def _every(operations: list[Operation]) -> Iterator[Operation]:
    for operation in operations:
        yield operation
        for region in operation.regions:
            yield from _every(region)


def _attribute(op: Operation, name: str) -> int:
    return int(re.search(rf"\b{name} = (-?\d+)", op.text)[1])


def _select(condition, yes, no):
    if isinstance(yes, Pointers):
        return Pointers(yes.argument, np.where(condition, yes.offsets, no.offsets))
    return np.where(condition, yes, no)


def _order(op: Operation) -> list[int]:
    return [int(axis) for axis in re.search(r"array<i32: ([\d, ]+)>", op.text)[1].split(",")]


def _toward_zero(a, b):
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


_ARITHMETIC = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": _toward_zero,
    "arith.divui": np.floor_divide,
    "arith.remsi": lambda a, b: a - b * _toward_zero(a, b),
    "arith.remui": np.remainder,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
    "arith.shrui": np.right_shift,
    "arith.minsi": np.minimum,
    "arith.minui": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.maxui": np.maximum,
} | dict.fromkeys(("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"), lambda a: a)
_COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_SHAPES = {
    "tt.splat": lambda op, a: np.broadcast_to(a, op.shape),
    "tt.broadcast": lambda op, a: np.broadcast_to(a, op.shape),
    "tt.expand_dims": lambda op, a: np.expand_dims(a, _attribute(op, "axis")),
    "tt.reshape": lambda op, a: np.reshape(a, op.shape),
    "tt.trans": lambda op, a: np.transpose(a, _order(op)),
    "ttg.convert_layout": lambda op, a: a,
}
