"""``vwn-benchmark kernels --predict``: what operations would take on a GPU that is not here, by a model.

Every kernel that an operation launches is compiled, its machine code counted and walked through (``model``),
and what it touches is taken from its TTGIR (``ttgir``). Torch's own operations around the launches are
recorded, too: a matrix product or a sum takes the bytes of its tensors, anything small the time of a launch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_vwn.benchmark.operations import Problem, Variant
from megatron_vwn.benchmark.prediction import calibration
from megatron_vwn.benchmark.prediction import compile as compiling
from megatron_vwn.benchmark.prediction.compile import Launch
from megatron_vwn.benchmark.prediction.model import CALIBRATION, GPUS, Gpu, Kernel, predict
from megatron_vwn.benchmark.prediction.sass import Code
from megatron_vwn.benchmark.prediction.ttgir import read_program
from megatron_vwn.ops import costs
from megatron_vwn.ops.costs import PASSES, Width
from megatron_vwn.planner.kernel_times import WHOLE

ARCHITECTURE = {"h100": "sm_90", "h200": "sm_90"}
_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "set_")


@dataclass(frozen=True)
class Library:
    """An operation of torch: its bytes, FLOPs, and name."""

    name: str
    moved: int
    flops: int

    def seconds(self, gpu: Gpu) -> float:
        """At the share of the GPU's rates that libraries reach, and no less than a launch."""
        moving, multiplying = self.moved / gpu.dram, self.flops / gpu.matrix
        return max(gpu.small_operation, max(moving, multiplying) / gpu.library_share)

    def small(self, gpu: Gpu) -> bool:
        """Whether the launch is what takes its time."""
        return self.seconds(gpu) == gpu.small_operation


class _Recorded(TorchDispatchMode):
    """Operations of torch that would be launched; views and allocations are not."""

    def __init__(self):
        super().__init__()
        self.found: list[Library] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        name = operation.name().removeprefix("aten::").partition(".")[0]
        if not operation.is_view and name not in _ALLOCATIONS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            count = flop_registry.get(operation.overloadpacket)
            flops = count(*args, **kwargs, out_val=output) if count else 0
            self.found.append(Library(name, sum(tensor.nbytes for tensor in tensors), flops))
        return output


def predict_problem(
    variant: Variant, op: costs.Op, width: Width, tokens: int, dtype: torch.dtype, names: list[str]
) -> list[dict]:
    """Compile both passes of one operation and predict them on some GPUs of the same architecture.

    Returns:
        For each GPU and pass one result per kernel and large operation of torch in order, and one of the whole.
    """
    problem = Problem(op, width, tokens, dtype, torch.device("meta"))
    both = compiling.passes(variant, problem)
    results: list[dict] = []
    for direction in PASSES:
        row = {**problem.label, "pass": direction}
        try:
            with compiling.launches_compiled(ARCHITECTURE[names[0]]) as launched, _Recorded() as recorded:
                both[direction]()
            kernels = [(launch.name, as_kernel(launch)) for launch in launched]
            for name in names:
                results += _of_a_pass({**row, "gpu": name}, kernels, recorded.found, GPUS[name], op, width, dtype)
        except Exception as error:  # whatever Triton raises for a kernel it cannot compile
            return [*results, {**row, "kernel": WHOLE, "status": "failed", "reason": compiling.phrase(error)}]
    return results


def as_kernel(launch: Launch) -> Kernel:
    """What the model needs of a launch."""
    metadata = launch.compiled.metadata
    return Kernel(
        code=Code.of(launch.compiled.asm["cubin"]),
        program=read_program(launch.compiled.asm["ttgir"], launch.arguments, launch.grid),
        programs=launch.programs,
        warps=metadata.num_warps,
        shared=metadata.shared,
        tensor_bytes={name: x.nbytes for name, x in launch.arguments.items() if isinstance(x, Tensor)},
    )


def _of_a_pass(row: dict, kernels, library: list[Library], gpu: Gpu, op, width: Width, dtype) -> list[dict]:
    row["status"] = "predicted"
    results = []
    for name, kernel in kernels:
        found = predict(kernel, gpu)
        results.append(
            {
                **row,
                "kernel": name,
                "seconds": found.seconds,
                "limit": found.limit,
                "traffic_bytes": found.traffic,
                "l2_bytes": found.l2,
                "share_of_traffic": found.traffic / gpu.dram / found.seconds,
                "bound_seconds": found.bounds,
                "simulated_seconds": found.simulated,
                "instructions": found.instructions,
                "programs": kernel.programs,
                "warps": kernel.warps,
                "resident": found.resident,
                "registers": kernel.code.registers,
                "stack": kernel.code.stack,
            }
        )
    large = [each for each in library if not each.small(gpu)]
    for each in large:
        seconds = each.seconds(gpu)
        limit = "tensor" if each.flops / gpu.matrix > each.moved / gpu.dram else "DRAM"
        results.append({**row, "kernel": f"torch {each.name}", "seconds": seconds, "limit": limit})
        results[-1] |= {"traffic_bytes": each.moved, "share_of_traffic": each.moved / gpu.dram / seconds}
    small = len(library) - len(large)
    seconds = sum(result["seconds"] for result in results) + small * gpu.small_operation
    moved = sum(result["traffic_bytes"] for result in results)
    floor = costs.floor_seconds(
        op,
        row["pass"],
        width,
        row["tokens"],
        bandwidth=gpu.dram,
        flop_rate=gpu.matrix,
        element_bytes=dtype.itemsize,
    )
    measured = calibration.factor(row["gpu"], row["pass"])
    modelled, seconds = seconds, seconds * (measured.mean if measured else 1)
    whole = {
        **row,
        "kernel": WHOLE,
        "seconds": seconds,
        "modelled_seconds": modelled,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "traffic_bytes": moved,
        "share_of_traffic": moved / gpu.dram / seconds,
        "small_operations": small,
        "fixed_seconds": small * gpu.small_operation + len(kernels) * gpu.launch,
    }
    return [*results, whole]


def assumptions(names: list[str]) -> list[str]:
    """What the model was calibrated with and its constants, a line each."""
    lines = [f"A MODEL, not a measurement; calibrated with {CALIBRATION}. Read every time as +-1.5 times."]
    for name in names:
        gpu = GPUS[name]
        lines += filter(None, [calibration.said(name)])
        lines.append(
            f"{name}: {gpu.multiprocessors} multiprocessors at {gpu.hertz / 1e9:g} GHz, DRAM {gpu.dram / 1e12:g} TB/s "
            f"(a copy {gpu.dram_share:.0%}, libraries {gpu.library_share:.0%}), L2 {gpu.l2 / 1e12:g} TB/s, products "
            f"{gpu.matrix / 1e12:g} TFLOP/s, a small operation {gpu.small_operation * 1e6:g} us"
        )
    return lines


HEADER = (
    "gpu", "op", "pass", "(m,n)", "D", "kernel", "limit", "us", "% of floor", "% of own traffic",
    "issue", "tensor", "LSU", "L2", "DRAM", "simulated", "registers", "stack", "resident", "remark",
)  # fmt: skip


def table_rows(results: list[dict]) -> list[list[str]]:
    """One line of the printed table per result; times in microseconds."""
    rows = []
    for result in results:
        bounds = result.get("bound_seconds", {})
        cells = [result.get("gpu", ""), result["op"], result["pass"], f"({result['m']},{result['n']})"]
        cells += [result["hidden_size"], result["kernel"], result.get("limit", ""), _micro(result.get("seconds"))]
        cells += [_percent(result.get("share_of_floor")), _percent(result.get("share_of_traffic"))]
        cells += [_micro(bounds.get(name)) for name in ("issue", "tensor", "LSU", "L2", "DRAM")]
        cells += [_micro(result.get("simulated_seconds")), *(result.get(n, "") for n in ("registers", "stack"))]
        cells += [f"{result['resident']} x {result['warps']}" if "resident" in result else ""]
        small = result.get("small_operations", 0)
        cells += [result.get("reason") or (f"with {small} small operations" if small else "")]
        rows.append([str(cell) for cell in cells])
    return rows


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.0f}"
