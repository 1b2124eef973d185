"""The checkpoints that all conversion tests share."""

from pathlib import Path

import launch
import pytest
from checkpoint.saves import RANKS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def saves(tmp_path_factory):
    """Per name of ``SAVES`` a Megatron checkpoint, "... in HF" and "... and back"; not to be changed."""
    folder = tmp_path_factory.mktemp("saves")
    run = launch.session(RANKS, HERE / "session_convert.py", folder)
    assert run.returncode == 0, run.stderr[-6000:]
    return folder
