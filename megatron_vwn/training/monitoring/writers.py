"""A snapshot goes to Megatron's TensorBoard and wandb writers, and warnings to the log."""

from collections.abc import Callable

import numpy as np

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.training.monitoring import scalars as monitoring_scalars
from megatron_vwn.training.monitoring.images import images
from megatron_vwn.training.monitoring.snapshot import Snapshot
from megatron_vwn.training.monitoring.warnings import StabilityWarnings


class Report:
    """Writes snapshots on the rank that has Megatron's writers, which is the last.

    Args:
        virtual_width: of the run.
        tensorboard: gives this rank's ``SummaryWriter``, or None.
        wandb: gives this rank's wandb module, or None.
        say: prints a warning.
    """

    def __init__(
        self,
        virtual_width: VirtualWidthConfig,
        *,
        tensorboard: Callable,
        wandb: Callable,
        say: Callable[[str], object] = print,
    ):
        self._tensorboard, self._wandb, self._say = tensorboard, wandb, say
        self._warnings = StabilityWarnings(virtual_width.carry)
        self._has_layout = False

    def here(self) -> Callable[[Snapshot], None] | None:
        """What takes snapshots on this rank; None on a rank without a writer."""
        if self._tensorboard() is None and self._wandb() is None:
            return None
        return self.write

    def write(self, snapshot: Snapshot) -> None:
        """Write everything under the snapshot's step, and print what is wrong for the first time."""
        values = monitoring_scalars.per_connection(snapshot)
        scalars = monitoring_scalars.scalars(snapshot, values)
        # A histogram has no bin for what is no number; the scalars show it.
        histograms = {
            tag: finite
            for tag, tensor in monitoring_scalars.histograms(snapshot).items()
            if (finite := tensor[tensor.isfinite()].numpy()).size
        }
        pictures = images(snapshot)
        if (writer := self._tensorboard()) is not None:
            if not self._has_layout:
                writer.add_custom_scalars(monitoring_scalars.layout(snapshot))
                self._has_layout = True
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, snapshot.iteration)
            for tag, array in histograms.items():
                writer.add_histogram(tag, array, snapshot.iteration)
            for tag, pixels in pictures.items():
                writer.add_image(tag, pixels, snapshot.iteration, dataformats="HWC")
        if (wandb := self._wandb()) is not None:
            logged = {tag: wandb.Histogram(np_histogram=np.histogram(array, 64)) for tag, array in histograms.items()}
            logged |= {tag: wandb.Image(pixels) for tag, pixels in pictures.items()}
            wandb.log(scalars | logged, snapshot.iteration)
        for line in self._warnings.of(snapshot, values):
            self._say(f"megatron_vwn: {line}")
