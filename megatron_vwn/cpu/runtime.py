"""Stand-ins for the CUDA runtime: one synchronous device on which everything has already happened.

Only what Megatron reaches on its way through training and static inference is replaced; CUDA graphs, memory pools and
profilers stay as they are and refuse to work.
"""

import collections
import contextlib
import os
import time
import types

import torch

_ACTIONS = ("init", "set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats")
_MEMORY_COUNTERS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "device_memory_used",
)
_MEMORY_BYTES = 16 << 30  # what the device claims to have; Megatron only reports it


class Stream:
    """A CUDA stream whose work is always done."""

    device, device_index, cuda_stream = torch.device("cpu"), 0, 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    @staticmethod
    def priority_range(*args, **kwargs) -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return 0, 0

    def wait_stream(self, *args, **kwargs) -> None:
        """Nothing to wait for."""

    def wait_event(self, *args, **kwargs) -> None:
        """Nothing to wait for."""

    def synchronize(self, *args, **kwargs) -> None:
        """Nothing to wait for."""

    def query(self, *args, **kwargs) -> bool:
        """All work is done."""
        return True

    def record_event(self, event=None, *args, **kwargs):
        """An event that happens now."""
        event = Event() if event is None else event
        event.record(self)
        return event


class Event:
    """A CUDA event: it happens when it is recorded, so ``elapsed_time`` is wall time in milliseconds."""

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, *args, **kwargs) -> None:
        """Note the time."""
        self.seconds = time.perf_counter()

    def wait(self, *args, **kwargs) -> None:
        """Nothing to wait for."""

    def synchronize(self, *args, **kwargs) -> None:
        """Nothing to wait for."""

    def query(self, *args, **kwargs) -> bool:
        """The event has happened."""
        return True

    def elapsed_time(self, end: "Event", *args, **kwargs) -> float:
        """Milliseconds from this event to ``end``."""
        return (end.seconds - self.seconds) * 1e3


def _answer(value):
    """A function that takes anything and returns ``value``."""
    return lambda *args, **kwargs: value


def _no_context(*args, **kwargs):
    return contextlib.nullcontext()


def install() -> None:
    """Replace the CUDA runtime in ``torch.cuda``, and keep ``torch.accelerator`` from believing in it."""
    cuda, stream, properties = (
        torch.cuda,
        Stream(),
        # Compute capability 8.0: bf16, but none of the paths for Hopper and Blackwell.
        types.SimpleNamespace(
            name="cpu", major=8, minor=0, total_memory=_MEMORY_BYTES, multi_processor_count=os.cpu_count()
        ),
    )
    answers = {
        "is_available": True,  # "Megatron requires CUDA."
        "is_initialized": True,  # so torch.cuda never tries to initialise the real one
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,  # with 0, Megatron skips the set-up of model parallelism
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "mem_get_info": (_MEMORY_BYTES, _MEMORY_BYTES),
    }
    answers |= dict.fromkeys(_MEMORY_COUNTERS, 0)
    answers |= dict.fromkeys(_ACTIONS)
    for name, value in answers.items():
        setattr(cuda, name, _answer(value))
    cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream = cuda.device = cuda.nvtx.range = _no_context
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(cuda.nvtx, name, _answer(None))
    # It asks torch.cuda; a DataLoader asks it whether to start a thread that pins memory with the real runtime.
    torch.accelerator.is_available = _answer(False)
