"""What becomes of a training's event files when their disk is full."""

import errno
import threading

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from megatron_vwn.training.monitoring.event_files import survive_failures


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    said = []
    writer = SummaryWriter(tmp_path)
    survive_failures(writer, said.append)
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()

    def no_space(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", no_space)
    for step in range(2, 30):
        writer.add_scalar("loss", 1.0, step)
        writer.flush()
    writer.close()
    assert len(said) == 1 and f"--tensorboard-dir {tmp_path}" in said[0] and "(No space left on device)" in said[0]
    assert "Traceback" not in capfd.readouterr().err
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1]
