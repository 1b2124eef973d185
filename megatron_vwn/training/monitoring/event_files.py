"""TensorBoard's event files are a log: a disk that is full of them does not end a training."""

import threading
from collections.abc import Callable

from torch.utils.tensorboard import SummaryWriter


def survive_failures(writer: SummaryWriter, say: Callable[[str], object]) -> None:
    """Let a writer whose files cannot be written any more drop what it is given, and say so once.

    Args:
        writer: what Megatron and the monitor write to.
        say: prints a warning.
    """
    writer.file_writer.event_writer = _Events(writer.file_writer.event_writer, writer.log_dir, say)
    print_error = threading.excepthook

    def excepthook(args):
        # The thread that writes ends by raising what it has handed to the training loop.
        of_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_writer and isinstance(args.exc_value, OSError)):
            print_error(args)

    threading.excepthook = excepthook


class _Events:
    """TensorBoard's ``EventFileWriter`` until it fails, then nothing."""

    def __init__(self, events, folder: str, say: Callable[[str], object]):
        self._events, self._folder, self._say = events, folder, say

    def add_event(self, event) -> None:
        """Write an event."""
        self._do("add_event", event)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._do("flush")

    def close(self) -> None:
        """Write everything and close the file."""
        self._do("close")

    def get_logdir(self) -> str:
        """The folder."""
        return self._folder

    def _do(self, what: str, *arguments) -> None:
        if self._events is None:
            return
        try:
            getattr(self._events, what)(*arguments)
        except OSError as error:
            self._events = None
            self._say(
                f"warning: --tensorboard-dir {self._folder} cannot be written to any more ({error.strerror or error}): "
                "training goes on without event files; make room and start again to have them."
            )
