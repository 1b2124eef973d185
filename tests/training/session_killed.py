"""Training that kills itself as ``kill -9`` would: ``python session_killed.py ITERATION FLAGS...``.

The rank that logs dies right after the line of that iteration, whose scalars are in the event file; whoever started the
ranks kills the others.
"""

import os
import runpy
import signal
import sys


class Killing:
    """A stream that ends the process when a text has been written."""

    def __init__(self, stream, text: str):
        self.stream, self.text = stream, text

    def write(self, text: str) -> int:
        written = self.stream.write(text)
        if self.text in text:
            from megatron.training import get_tensorboard_writer

            get_tensorboard_writer().flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


if __name__ == "__main__":
    iteration = int(sys.argv.pop(1))
    sys.stdout = Killing(sys.stdout, f"iteration {iteration:8d}/")
    runpy.run_module("megatron_vwn.training.pretrain", run_name="__main__")
