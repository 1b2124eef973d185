"""What a benchmark ran on: hardware, versions, commit, and the two rates that floors are computed from."""

import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from megatron_vwn import cpu
from megatron_vwn.benchmark.timing import CpuClock, CudaClock, Timed, interleave

PACKAGES = ("megatron_vwn", "megatron-core", "torch", "triton", "transformer-engine", "liger-kernel", "numpy")
_CHECKOUT = Path(__file__).parents[2]
_UNKNOWN_CACHE = 32 << 20
_MOST_SETS = 16
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of a machine.

    Attributes:
        bandwidth: bytes per second of a large copy, reads and writes together.
        flop_rate: FLOPs per second of a large matrix product in one dtype.
    """

    bandwidth: float
    flop_rate: float


def has_gpu() -> bool:
    """Whether there is a GPU, and not one that ``megatron_vwn.cpu`` stands in for."""
    return torch.cuda.is_available() and not cpu._active


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The copy bandwidth, and the rate of a matrix product of ``dtype`` (fp32 without tf32)."""
    clock = make_clock(device, cold=False)
    values = _COPY_BYTES[device.type] // 4
    source = torch.rand(values, device=device)
    target = torch.empty_like(source)
    copy = interleave({"copy": Timed(lambda _: target.copy_(source))}, clock, sets=1, warmup=3, rounds=11)["copy"]
    size = _PRODUCT_SIZE[device.type]
    # Random numbers: a product of zeros is faster than real ones.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = interleave({"product": Timed(lambda _: a @ b)}, clock, sets=1, warmup=3, rounds=11)["product"]
    return Rates(2 * source.nbytes / copy.median, 2 * size**3 / product.median)


def make_clock(device: torch.device, *, cold: bool, hide_launches: bool = True) -> CpuClock | CudaClock:
    """The clock of a device; ``cold`` empties its caches before every sample."""
    size = cache_bytes(device) if cold else None
    return CudaClock(size, hide_launches=hide_launches) if device.type == "cuda" else CpuClock(size)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kilobytes = [int(size[:-1]) * {"K": 1, "M": 1024}[size[-1]] for size in sizes if re.fullmatch(r"\d+[KM]", size)]
    return max(kilobytes) * 1024 if kilobytes else _UNKNOWN_CACHE


def buffer_sets(device: torch.device, bytes_of_a_set: int) -> int:
    """How many sets of buffers exceed the cache twice, so that none is still there when its turn comes again.

    Of tiny buffers no more than 16, which leave it to the clock to empty the cache.
    """
    return min(max(2, -(-2 * cache_bytes(device) // max(bytes_of_a_set, 1))), _MOST_SETS)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with its number of usable threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def hardware(device: torch.device) -> dict:
    """For the JSON file."""
    facts = {
        "device": device.type,
        "name": device_name(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    return facts


def versions() -> dict[str, str | None]:
    """Of Python, CUDA and the packages that have a part in it; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit(given: str | None = None) -> dict | None:
    """The commit of this checkout and whether files differ from it; None outside of a git checkout.

    Args:
        given: a commit to record where there is no checkout; whether files differ is then unknown (None).
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None if given is None else {"hash": given, "dirty": None}
    return {"hash": head.strip(), "dirty": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
