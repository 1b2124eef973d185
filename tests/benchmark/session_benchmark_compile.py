"""vwn-benchmark --compile-only and --predict, in a process in which Triton is no interpreter."""

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from megatron_vwn.benchmark.__main__ import main
from megatron_vwn.benchmark.prediction import compile as compiling
from megatron_vwn.benchmark.prediction import model, predict
from megatron_vwn.benchmark.prediction.ttgir import Loop

FOLDER = Path(sys.argv[1])


@triton.jit
def double(x_ptr, y_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


@triton.jit
def spilling(x_ptr, y_ptr, B: tl.constexpr):
    """Two tiles of 256 registers per thread that are both needed at the end."""
    i = tl.arange(0, B)
    a, b = tl.load(x_ptr + i), tl.load(x_ptr + B + i)
    total = tl.sum(a, axis=0) * tl.sum(b, axis=0)
    tl.store(y_ptr + i, (a + total) * (b - total))


@triton.jit
def columns(x_ptr, w_ptr, y_ptr, T, R: tl.constexpr, E: tl.constexpr, B: tl.constexpr):
    """y[t, :] = the sum over channels of x[t, :] w: a loop, a mask, a tensor that all programs read."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    total = tl.zeros((R,), tl.float32)
    for start in tl.range(0, E, B, num_stages=3):
        e = start + tl.arange(0, B)
        x = tl.load(x_ptr + t[:, None] * E + e[None, :], mask=(t < T)[:, None], other=0.0)
        total += tl.sum(x * tl.load(w_ptr + e)[None, :], axis=1)
    tl.store(y_ptr + t, total, mask=t < T)


def machine_code() -> None:
    """Loops, bytes and instructions of a kernel of which all are known."""
    tokens, channels, rows, chunk = 1000, 512, 16, 64
    x, w, y = (torch.empty(size, device="meta") for size in (tokens * channels, channels, tokens))
    with compiling.launches_compiled("sm_90") as launched:
        columns[lambda meta: (triton.cdiv(tokens, meta["R"]),)](x, w, y, tokens, R=rows, E=channels, B=chunk)
    (launch,) = launched
    assert launch.name == "columns" and launch.grid == (63,) and launch.arguments["T"] == tokens
    kernel = predict.as_kernel(launch)
    loop, program = Loop(trips=channels // chunk, upper=channels, step=chunk), kernel.program
    assert program.loops == [loop], program.loops
    touched = program.accesses
    assert touched["x_ptr"].unique_loads == touched["x_ptr"].copied + touched["x_ptr"].loaded == 4 * rows * channels
    assert touched["w_ptr"].unique_loads == 4 * channels and touched["y_ptr"].unique_stores == 4 * rows
    assert model.traffic(kernel) == (4 * channels * (tokens + 1), 4 * tokens)
    code = kernel.code
    ((first, last),) = code.loops()
    indices, times = code.sequence(program.loops)
    assert times == 1 and indices.count(first) == indices.count(last) == loop.trips and 0 < first < last
    instructions = [code.instructions[i] for i in indices]
    loads = sum(i.bytes for i in instructions if i.name.startswith(("LDG.", "LDGSTS")))
    assert 4 * rows * channels <= kernel.warps * loads < 4 * 2 * (rows + kernel.warps) * channels * 1.5
    products = sum(i.name.startswith(("FFMA", "FMUL")) for i in instructions)
    assert 32 * kernel.warps * products >= rows * channels
    assert all(0 <= i.stall < 16 and 0 <= i.waits < 64 and i.sets < 8 for i in code.instructions)
    found = model.predict(kernel, model.GPUS["h200"])
    assert (
        found.bounds["DRAM"] > 0
        and found.seconds >= max(*found.bounds.values(), 0)
        and found.traffic == 4 * (channels * (tokens + 1) + tokens)
    )
    slower = model.predict(kernel, dataclasses.replace(model.GPUS["h200"], dram=1e9))
    assert slower.limit == "DRAM" and slower.seconds > sum(model.traffic(kernel)) / 1e9


def own_kernels() -> None:
    x, y = torch.zeros(1 << 14), torch.full((1 << 13,), 7.0)
    with compiling.launches_compiled("sm_90") as compiled:
        double[(1,)](x, y, B=256, num_warps=2)
        spilling[(1,)](x, y, B=1 << 13, num_warps=1)
    assert (y == 7).all(), "a kernel was launched"
    plain, spilled = map(compiling.usage, compiled)
    assert plain.kernel == "double" and plain.warps == 2 and not plain.spills and 0 < plain.registers < 64, plain
    assert spilled.spills and spilled.stack > 0 and spilled.local_loads > 0 and spilled.local_stores > 0, spilled


def program() -> None:
    path, said = FOLDER / "compiled.json", io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(f"--compile-only sm_90 --pairs 2,4 --hidden-size 64 --ops read --output {path}".split())
    content = json.loads(path.read_text())
    assert content["mode"] == "compile" and content["settings"] == {"architecture": "sm_90"}
    rows = content["results"]
    assert list(dict.fromkeys(row["pass"] for row in rows)) == ["forward", "backward"], rows
    for row in rows:
        assert row["usage"]["registers"] > 0 and row["usage"]["shared"] >= 0, row
        assert row["floor_bytes_per_token"] == 2 * 64 * {"forward": 3, "backward": 7}[row["pass"]]
        spills = any(row["usage"][key] for key in ("stack", "local_loads", "local_stores"))
        assert row["status"] == ("failed" if spills else "measured")
    assert code == int(any(row["status"] == "failed" for row in rows))
    assert rows[0]["usage"]["kernel"] in said.getvalue()


def prediction() -> None:
    path, said = FOLDER / "predicted.json", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(f"--predict h200 h100 --pairs 2,4 --hidden-size 64 --ops read --output {path}".split()) == 0
    content = json.loads(path.read_text())
    assert content["mode"] == "predict" and "within 20 %" in content["settings"]["calibration"]
    assert content["settings"]["gpus"]["h100"]["dram"] == 3.35e12
    rows = content["results"]
    wholes = [row for row in rows if row["kernel"] == "all"]
    assert [(row["pass"], row["gpu"]) for row in wholes] == [
        (direction, gpu) for direction in ("forward", "backward") for gpu in ("h200", "h100")
    ]
    for row in rows:
        assert row["status"] == "predicted" and row["seconds"] > 0 and 0 <= row["share_of_traffic"] < 1, row
    for whole in wholes:
        parts = [row for row in rows if (row["pass"], row["gpu"]) == (whole["pass"], whole["gpu"])]
        small = whole["small_operations"] * content["settings"]["gpus"][whole["gpu"]]["small_operation"]
        assert abs(sum(row["seconds"] for row in parts) - 2 * whole["seconds"] + small) < 1e-9
        assert whole["share_of_floor"] == whole["floor_seconds"] / whole["seconds"] < 1
    assert "A MODEL, not a measurement" in said.getvalue() and "latency" in said.getvalue()


def interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    for flags in ("--compile-only sm_90", "--predict h200"):
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            assert main(flags.split()) == 2
        assert "unset it" in error.getvalue()


if __name__ == "__main__":
    own_kernels()
    machine_code()
    program()
    prediction()
    interpreter()
