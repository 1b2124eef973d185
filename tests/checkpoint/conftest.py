"""The checkpoints that all conversion tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.saves import RANKS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def saves(tmp_path_factory):
    """Per name of ``SAVES`` a Megatron checkpoint, "... in HF" and "... and back"; not to be changed."""
    folder = tmp_path_factory.mktemp("saves")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    run = subprocess.run(
        [*command, HERE / "session_convert.py", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return folder
