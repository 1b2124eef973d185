"""Event files as Megatron writes them, with losses that are known."""

import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

STEPS, BATCH, LENGTH = 400, 8, 128
_SECONDS = itertools.count()
TOKENS = BATCH * LENGTH
WIDTHS = (1, 2, 4, 8)
# By seed: an offset of all its losses, and how much its gain per doubling differs from 0.25.
SEEDS = {1: (0.3, -0.02), 2: (0.0, 0.0), 3: (-0.1, 0.02)}


def write_run(
    folder: Path,
    scalars: Mapping[str, Mapping[int, float]],
    arguments: Mapping[str, object] | None = None,
    *,
    samples: bool = True,
) -> Path:
    """One event file: scalars by tag and step, again under samples, and arguments as texts; returns the file."""
    writer = EventFileWriter(str(folder))
    clock = time.time() + next(_SECONDS)  # a file written later has later events, however fast this is
    for name, value in (arguments or {}).items():
        text = TensorProto(
            dtype=DT_STRING, string_val=[str(value).encode()], tensor_shape=TensorShapeProto(dim=[{"size": 1}])
        )
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        entry = Summary.Value(tag=f"{name}/text_summary", tensor=text, metadata=plugin)
        writer.add_event(Event(step=0, wall_time=clock, summary=Summary(value=[entry])))
    for tag, curve in scalars.items():
        for step, value in curve.items():
            clock += 1e-3
            entry = Summary.Value(tag=tag, simple_value=value)
            writer.add_event(Event(step=step, wall_time=clock, summary=Summary(value=[entry])))
            if samples and tag == "lm loss":
                entry = Summary.Value(tag=f"{tag} vs samples", simple_value=value)
                writer.add_event(Event(step=step * BATCH, wall_time=clock, summary=Summary(value=[entry])))
    writer.close()
    (written,) = folder.glob("events.out.tfevents*")
    return written


def megatron_arguments(r: float) -> dict[str, object]:
    """What Megatron logs of its arguments, of those that a report reads; m = 2."""
    width = {"vwn_m": None, "vwn_n": None} if r == 1 else {"vwn_m": 2, "vwn_n": round(2 * r)}
    return {"seq_length": LENGTH, "global_batch_size": BATCH, "vwn_embedding": "tiled", "do_test": 0, **width}


def falling(pace: float, start: float = 5.0, every: int = 40, steps: int = STEPS) -> dict[int, float]:
    """A loss that falls by ``pace`` in 400 steps, evenly."""
    return {step: start - pace * step / STEPS for step in range(every, steps + 1, every)}


def pace(r: float, seed: int) -> float:
    """Of a loss 5 + offset - pace step / 400: it reaches the baseline's end after 400 / pace steps."""
    return 1 + (0.25 + SEEDS[seed][1]) * math.log2(r)
