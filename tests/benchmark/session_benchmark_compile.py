"""vwn-benchmark --compile-only, in a process in which Triton is no interpreter."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from megatron_vwn.benchmark import compile as compiling
from megatron_vwn.benchmark.__main__ import main

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
    assert [row["pass"] for row in rows] == ["forward", "backward"], rows
    for row, elements in zip(rows, (3 * 64, 7 * 64), strict=True):
        assert row["usage"]["registers"] > 0 and row["usage"]["shared"] >= 0, row
        assert row["floor_bytes_per_token"] == 2 * elements
        spills = any(row["usage"][key] for key in ("stack", "local_loads", "local_stores"))
        assert row["status"] == ("failed" if spills else "measured")
    assert code == int(any(row["status"] == "failed" for row in rows))
    assert rows[0]["usage"]["kernel"] in said.getvalue()


def interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        assert main(["--compile-only", "sm_90"]) == 2
    assert "unset it" in error.getvalue()


if __name__ == "__main__":
    own_kernels()
    program()
    interpreter()
