"""A snapshot goes to Megatron's TensorBoard and wandb writers, warnings and a verdict to the log."""

from collections.abc import Callable, Iterator

import numpy as np

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.training.monitoring import scalars as monitoring_scalars
from megatron_vwn.training.monitoring.charts import layout, layout_summary
from megatron_vwn.training.monitoring.descriptions import Descriptions
from megatron_vwn.training.monitoring.images import images
from megatron_vwn.training.monitoring.reference import reference_scalars
from megatron_vwn.training.monitoring.snapshot import Snapshot
from megatron_vwn.training.monitoring.verdict import verdict
from megatron_vwn.training.monitoring.warnings import StabilityWarnings


class Report:
    """Writes snapshots on the rank that has Megatron's writers, which is the last.

    Args:
        virtual_width: of the run.
        tensorboard: gives this rank's ``SummaryWriter``, or None.
        wandb: gives this rank's wandb module, or None.
        say: prints a line.
    """

    def __init__(
        self,
        virtual_width: VirtualWidthConfig,
        *,
        tensorboard: Callable,
        wandb: Callable,
        say: Callable[[str], object] = print,
    ):
        self._virtual_width = virtual_width
        self._tensorboard, self._wandb, self._say = tensorboard, wandb, say
        self._warnings = StabilityWarnings(virtual_width.carry)
        self._has_layout = False

    def here(self) -> Callable[[Snapshot], None] | None:
        """What takes snapshots on this rank; None on a rank without a writer."""
        if self._tensorboard() is None and self._wandb() is None:
            return None
        return self.write

    def write(self, snapshot: Snapshot) -> None:
        """Write everything under the snapshot's step; print whether the width is used, and what is wrong for the first
        time."""
        values = monitoring_scalars.per_connection(snapshot)
        references = reference_scalars(self._virtual_width, len(snapshot.chains[0]))
        scalars = monitoring_scalars.scalars(snapshot, values) | references
        # A histogram has no bin for what is no number; the scalars show it.
        histograms = {
            tag: finite
            for tag, tensor in monitoring_scalars.histograms(snapshot).items()
            if (finite := tensor[tensor.isfinite()].numpy()).size
        }
        pictures = images(snapshot)
        if (writer := self._tensorboard()) is not None:
            describe = None
            if not self._has_layout:  # what TensorBoard takes from the first event of a tag
                writer.file_writer.add_summary(layout_summary(layout(snapshot, references)))
                describe, self._has_layout = Descriptions(self._virtual_width, snapshot).of, True
            for summary in _summaries(scalars, histograms, pictures, writer.default_bins, describe):
                writer.file_writer.add_summary(summary, snapshot.iteration)
        if (wandb := self._wandb()) is not None:
            logged = {tag: wandb.Histogram(np_histogram=np.histogram(array, 64)) for tag, array in histograms.items()}
            logged |= {tag: wandb.Image(pixels) for tag, pixels in pictures.items()}
            wandb.log(scalars | logged, snapshot.iteration)
        for line in (verdict(snapshot, values, self._virtual_width), *self._warnings.of(snapshot, values)):
            self._say(f"megatron_vwn: {line}")


def _summaries(
    scalars: dict[str, float],
    histograms: dict[str, np.ndarray],
    pictures: dict[str, np.ndarray],
    bins: list[float],
    describe: Callable[[str], str] | None,
) -> Iterator:
    """What ``SummaryWriter`` would write of each tag, with a description, which its methods cannot take."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_SCALAR, DATA_CLASS_TENSOR
    from torch.utils.tensorboard import summary

    for plugin, data_class, made in (
        ("scalars", DATA_CLASS_SCALAR, (summary.scalar(*each) for each in scalars.items())),
        ("histograms", DATA_CLASS_TENSOR, (summary.histogram(*each, bins) for each in histograms.items())),
        ("images", DATA_CLASS_BLOB_SEQUENCE, (summary.image(*each, dataformats="HWC") for each in pictures.items())),
    ):
        for each in made:
            if describe is not None:
                (value,) = each.value
                value.metadata.summary_description = describe(value.tag)
                # Without both of these TensorBoard's data server replaces the metadata, and with it the description.
                value.metadata.plugin_data.plugin_name, value.metadata.data_class = plugin, data_class
            yield each
