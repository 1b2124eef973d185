"""Ctrl-C of a training run, in this process."""

import os
import signal
from argparse import Namespace

import pytest

from megatron_vwn.training import interrupt
from megatron_vwn.training.interrupt import saving_when_interrupted


@pytest.fixture
def scheduler():
    """The signals that a scheduler's handler of Megatron would have heard."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def arguments(**changes):
    return Namespace(
        **{"exit_signal_handler": True, "exit_signal": signal.SIGTERM, "save": "there", "rank": 0} | changes
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, ["a checkpoint is saved"]), ({"save": None}, ["nothing is saved without --save"]), ({"rank": 1}, [])],
)
def test_ctrl_c_is_what_the_scheduler_says_and_its_repetition_by_torchrun_nothing(scheduler, capfd, changes, said):
    with saving_when_interrupted(arguments(**changes)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert scheduler == [signal.SIGTERM]
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


def test_asked_again_later_it_ends_at_once(scheduler, monkeypatch):
    monkeypatch.setattr(interrupt, "_NO_REPETITION", -1.0)
    with pytest.raises(KeyboardInterrupt), saving_when_interrupted(arguments()):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_fork_leaves_it_to_its_rank(scheduler, capfd):
    with saving_when_interrupted(arguments()):
        if not (pid := os.fork()):
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(len(scheduler))
        assert os.waitpid(pid, 0)[1] == 0
    assert "interrupted" not in capfd.readouterr().err


def test_without_the_flag_python_interrupts():
    with pytest.raises(KeyboardInterrupt), saving_when_interrupted(arguments(exit_signal_handler=False)):
        os.kill(os.getpid(), signal.SIGINT)
