"""Compile every kernel that an operation launches, for a GPU that is not here, and read what the assembler says.

The operations themselves run, on tensors without memory (torch's meta device), while Triton believes in a GPU of the
wanted architecture and every launch ends after compilation. So what is compiled is exactly what would be launched: the
same kernels, tiles, warps, grids and specialisations of arguments, and no list of kernels that could grow stale.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_vwn.benchmark.operations import Problem, Variant, differentiated
from megatron_vwn.benchmark.prediction.sass import Code
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops import costs
from megatron_vwn.ops.costs import PASSES, Pass, Width

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# More than any tile has, and no multiple of one.
TOKENS = 131
_MATRIX_UNITS = ("HGMMA", "QGMMA", "HMMA", "DMMA", "UTCMMA")


@dataclass(frozen=True)
class Launch:
    """One launch that ended after compilation.

    Attributes:
        compiled: Triton's compiled kernel.
        grid: programs by axis.
        arguments: by name, options such as ``num_warps`` among them.
    """

    compiled: object
    grid: tuple[int, ...]
    arguments: Mapping[str, object]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.compiled.metadata.name

    @property
    def programs(self) -> int:
        """In all."""
        return math.prod(self.grid)


class _AbsentGpu:
    """What Triton asks a driver before it compiles; it is never asked to launch."""

    def __init__(self, capability: int):
        self._capability = capability
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self._capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


@contextmanager
def launches_compiled(architecture: str) -> Iterator[list[Launch]]:
    """Within, launches of Triton kernels compile only; yields the list that they are added to."""
    if not hasattr(JITFunction, "run"):
        raise VirtualWidthError(f"triton {triton.__version__} launches kernels otherwise: install 3.6.")
    run, launched = JITFunction.run, []

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launched.append(Launch(compiled, tuple(grid(arguments)) if callable(grid) else tuple(grid), arguments))
        return compiled

    # Without a GPU there is no driver to ask for, and none must be put back.
    previous = driver._active
    driver.set_active(_AbsentGpu(ARCHITECTURES[architecture]))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver.set_active(previous)


def passes(variant: Variant, problem: Problem) -> dict[Pass, Callable[[], None]]:
    """The two passes of an operation, to be called in this order."""
    leaves, outputs = variant.leaves(problem, None), []

    def backward() -> None:
        ours = [output for output in outputs if output.grad_fn is not None]
        torch.autograd.grad(ours, list(differentiated(leaves).values()), [torch.empty_like(output) for output in ours])

    return {"forward": lambda: outputs.extend(variant.outputs(problem, leaves)), "backward": backward}


@dataclass(frozen=True)
class Usage:
    """What the assembler reports of one compiled kernel.

    Attributes:
        kernel: its name.
        warps: of a program.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        stack: bytes of local memory of a thread.
        local_loads: LDL instructions.
        local_stores: STL instructions.
        matrix: instructions of matrix units, by name.
        instructions: all.
        code: bytes of the cubin.
    """

    kernel: str
    warps: int
    registers: int
    shared: int
    stack: int
    local_loads: int
    local_stores: int
    matrix: dict[str, int]
    instructions: int
    code: int

    @property
    def spills(self) -> bool:
        """Whether anything that belongs in a register lies in memory."""
        return bool(self.stack or self.local_loads or self.local_stores)


def usage(launch: Launch) -> Usage:
    """Read a compiled kernel's machine code."""
    metadata, code = launch.compiled.metadata, Code.of(launch.compiled.asm["cubin"])
    found = Counter(x.name.partition(".")[0] for x in code.instructions)
    return Usage(
        kernel=metadata.name,
        warps=metadata.num_warps,
        registers=code.registers,
        shared=metadata.shared,
        stack=code.stack,
        local_loads=found["LDL"],
        local_stores=found["STL"],
        matrix={name: found[name] for name in _MATRIX_UNITS if found[name]},
        instructions=found.total(),
        code=code.size,
    )


def compile_problem(variant: Variant, op: costs.Op, width: Width, dtype: torch.dtype, architecture: str) -> list[dict]:
    """Compile the kernels of both passes of one operation.

    Returns:
        One result per kernel, in the order of their launches; see ``_benchmark_report.report``.
    """
    problem = Problem(op, width, TOKENS, dtype, torch.device("meta"))
    both = passes(variant, problem)
    results: list[dict] = []
    for direction in PASSES:
        row = {key: value for key, value in problem.label.items() if key != "tokens"}
        row |= {"pass": direction, "architecture": architecture}
        row["floor_bytes_per_token"] = costs.elements(op, direction, width) * dtype.itemsize
        try:
            with launches_compiled(architecture) as launched:
                both[direction]()
        except Exception as error:  # whatever Triton raises for a kernel it cannot compile
            results.append({**row, "status": "failed", "reason": phrase(error)})
            return results
        for launch in launched:
            found = usage(launch)
            status = {"status": "measured"}
            if found.spills:
                status = {"status": "failed", "reason": "spills registers to memory"}
            results.append({**row, **status, "usage": vars(found)})
    return results


def phrase(error: Exception) -> str:
    """What is wrong, which Triton says last, after the source."""
    said = str(error.__cause__ or error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[-1].strip()[:200]}"


HEADER = (
    "op", "pass", "(m,n)", "D", "dtype", "kernel", "warps", "registers", "shared", "stack", "LDL", "STL", "matrix unit",
    "cubin bytes", "floor bytes per token", "remark",
)  # fmt: skip


def table_rows(results: list[dict]) -> list[list[str]]:
    """One line of the printed table per kernel."""
    rows = []
    for result in results:
        head = [result["op"], result["pass"], f"({result['m']},{result['n']})", result["hidden_size"], result["dtype"]]
        tail = [result["floor_bytes_per_token"], result.get("reason", "")]
        found = result.get("usage")
        cells = [""] * 9
        if found:
            matrix = " ".join(f"{name} {count}" for name, count in found["matrix"].items())
            cells = [found[key] for key in ("kernel", "warps", "registers", "shared", "stack")]
            cells += [found["local_loads"], found["local_stores"], matrix, found["code"]]
        rows.append([str(cell) for cell in (*head, *cells, *tail)])
    return rows
