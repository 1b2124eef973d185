"""The tiles of the kernels: a table by kernel, segments and architecture, which a measurement on the machine overrides.

Whatever tile a kernel gets, it computes the same function; only time, registers and shared memory depend on it.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver

# The largest n of each family of kernels, and of all.
MAX_SMALL, MAX_BATCHED, MAX_SEGMENTS = 8, 32, 64
_MIN_DOT = 16


class Tile(NamedTuple):
    """How a kernel cuts its work; a kernel ignores what it has no use for.

    Attributes:
        tokens: tokens of a program; rows of a chunk where these are what a product sums over.
        channels: channels of a chunk of the first walk over E.
        second_channels: of the second walk.
        warps: warps of a program.
        stages: depth of the software pipeline of the first walk.
        second_stages: of the second walk.
        maxnreg: the most registers of a thread; None leaves it to the compiler.
    """

    tokens: int = 1
    channels: int = 32
    second_channels: int = 32
    warps: int = 4
    stages: int = 3
    second_stages: int = 3
    maxnreg: int | None = None

    def fit(self, segment_size: int, dtype: torch.dtype) -> "Tile":
        """For segments of so many channels, a power of two of them a chunk; half as many where each takes 4 bytes, and
        then as many registers as there are: products of fp32 need them."""
        half = 2 if dtype.itemsize == 4 else 1
        most = max(_MIN_DOT, triton.next_power_of_2(segment_size))
        channels, second = (max(_MIN_DOT, min(c // half, most)) for c in (self.channels, self.second_channels))
        return self._replace(channels=channels, second_channels=second, maxnreg=self.maxnreg if half == 1 else None)


# {(kernel, n rounded up to a power of two, architecture or "any"): tile}; a kernel without an entry has Tile().
TABLE: dict[tuple[str, int, str], Tile] = {
    **{("small_forward", n, "any"): Tile(channels=256, warps=1, stages=1) for n in (1, 2, 4)},
    ("small_forward", 8, "any"): Tile(channels=128, warps=1, stages=1),
    **{("small_backward", n, "any"): Tile(channels=256, warps=1, stages=1) for n in (1, 2, 4)},
    # Without a bound the assembler aims at 168 registers there, and spills.
    ("small_backward", 4, "sm_100"): Tile(channels=256, warps=1, stages=1, maxnreg=200),
    ("small_backward", 8, "any"): Tile(channels=128, warps=1, stages=1),
    # With the above Triton 3.9 spills for sm_100; where no bound is given, long before registers run out.
    ("small_forward", 8, "sm_100"): Tile(channels=64, warps=1, stages=1, maxnreg=255),
    ("small_backward", 8, "sm_100"): Tile(channels=64, warps=1, stages=1),
    # Triton's interpreter takes as long for a small tile as for a larger one.
    **{
        (f"batched_{kernel}", n, "interpreter"): Tile(tokens=8, channels=128, second_channels=128)
        for kernel in ("forward", "gates", "stream")
        for n in (16, 32)
    },
    **{
        (f"wide_{kernel}", 64, "interpreter"): Tile(channels=128, second_channels=128)
        for kernel in ("forward", "gates", "stream")
    },
    ("batched_forward", 16, "any"): Tile(tokens=4, warps=4),
    ("batched_forward", 32, "any"): Tile(tokens=4, warps=4),
    ("batched_gates", 16, "any"): Tile(tokens=4, channels=128, warps=4),
    ("batched_gates", 32, "any"): Tile(tokens=4, channels=32, warps=4),
    ("batched_stream", 16, "any"): Tile(tokens=8, warps=8),
    ("batched_stream", 32, "any"): Tile(tokens=4, warps=4),
    ("wide_forward", 64, "any"): Tile(second_channels=64, maxnreg=128),
    ("wide_gates", 64, "any"): Tile(channels=64),
    # Three programs fit on a multiprocessor; products without wgmma need more registers.
    ("wide_stream", 64, "any"): Tile(stages=2, maxnreg=168),
    ("wide_stream", 64, "sm_80"): Tile(stages=3),
    **{("weight", n, "any"): Tile(tokens=64, channels=128, warps=4, stages=4) for n in (1, 2, 4, 8, 16)},
    ("weight", 32, "any"): Tile(tokens=128, channels=128, warps=4, stages=3),
    ("weight", 64, "any"): Tile(tokens=64, channels=128, warps=4, stages=3),
}


def tile(kernel: str, n: int, device: torch.device) -> Tile:
    """The tile of a kernel by name, as measured on this machine, else of the table."""
    return _tile(kernel, triton.next_power_of_2(n), _architecture(device))


def tuned_file() -> Path:
    """Where ``vwn-benchmark tune`` puts what it found: a list of objects with kernel, n, architecture, triton
    and tile."""
    return Path(os.environ.get("VWN_TILES") or Path.home() / ".cache" / "megatron_vwn" / "tiles.json")


def tuned() -> dict[tuple[str, int, str], Tile]:
    """What was measured on this machine with the installed Triton: {(kernel, n, architecture): tile}; another version
    compiles otherwise. ``Tile.fit`` makes a tile that was measured in bf16 one for fp32.

    Raises:
        ValueError: the file is not what ``vwn-benchmark tune`` writes.
    """
    return _tuned()


def forget_tuned() -> None:
    """Read the file again before the next launch."""
    _tuned.cache_clear()
    _tile.cache_clear()


@cache
def _tile(kernel: str, n: int, architecture: str) -> Tile:
    found = _tuned().get((kernel, n, architecture))
    for table_key in ((kernel, n, architecture), (kernel, n, "any")):
        found = found or TABLE.get(table_key)
    return found or Tile()


@cache
def _tuned() -> dict[tuple[str, int, str], Tile]:
    path = tuned_file()
    try:
        rows = [row for row in json.loads(path.read_text()) if row["triton"] == triton.__version__]
        return {(row["kernel"], row["n"], row["architecture"]): Tile(**row["tile"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} does not hold tiles of kernels ({type(error).__name__}): remove it, or run vwn-benchmark tune."
        ) from error


def _architecture(device: torch.device) -> str:
    if device.type == "cuda":
        return _architecture_of(device.index)
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return f"sm_{driver.active.get_current_target().arch}"


@cache
def _architecture_of(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{10 * major + minor}"
