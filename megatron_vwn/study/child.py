"""Trainings as child processes: their launch, their end together with the study's, and how their log ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_vwn.cli import die_with_parent
from megatron_vwn.training.log_lines import ENVIRONMENT, launch_order

_TAIL = 15
_SECONDS_TO_END = 30


class Child:
    """One training that runs; its output is appended to a log, which is read as it grows.

    Args:
        flags: of the training program.
        ranks: processes.
        log: the file.
        gpus: visible to it; None leaves that alone.
        keep_open: file descriptors that it inherits.
    """

    def __init__(
        self,
        flags: Sequence[str],
        ranks: int,
        log: Path,
        gpus: Sequence[str] | None = None,
        keep_open: Sequence[int] = (),
    ):
        environment = os.environ | ENVIRONMENT | launch_order(flags)
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self._log = log
        with log.open("a") as file:
            self._read = file.tell()
            self._process = subprocess.Popen(
                launch(flags, ranks),
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the study alone, which then ends what it started.
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGTERM, os.getpid()),
                pass_fds=tuple(keep_open),
            )

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def new_lines(self) -> list[str]:
        """Complete lines that were written since the last call."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            text, _, _ = file.read().rpartition(b"\n")
        self._read += len(text) + 1 if text else 0
        return text.decode(errors="replace").splitlines()

    def end(self) -> None:
        """End it and its ranks, at once where they do not listen."""
        if self.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def launch(flags: Sequence[str], ranks: int) -> list[str]:
    """The command line of one training."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "megatron_vwn.training.pretrain", *flags]


def tail(log: Path) -> str:
    """The end of a log, or the refusal that it ends with."""
    lines = log.read_text(errors="replace").splitlines()
    refusals = [line for line in lines[-200:] if line.startswith("megatron_vwn: ")]
    refused = any("exitcode" in line and ": 2" in line for line in lines[-60:])
    return refusals[-1] if refused and refusals else "\n".join(lines[-_TAIL:])
