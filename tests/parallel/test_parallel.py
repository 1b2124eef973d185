"""The parallel checks, run once under torchrun (see session.py) and reported one by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel.cases import CHECKS, RANKS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory, request):
    report = tmp_path_factory.mktemp("parallel") / "report.jsonl"
    wanted = [item.callspec.params["name"] for item in request.session.items if item.function.__name__ == "test_check"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    run = subprocess.run(
        [*command, HERE / "session.py", report, *wanted],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    lines = report.read_text().splitlines() if report.exists() else []
    done = {entry["check"]: entry for entry in map(json.loads, lines)}
    return done, f"session ended with {run.returncode}\n{run.stderr[-6000:]}"


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, outcomes):
    done, log = outcomes
    assert name in done, f"the session ended before this check; {log}"
    assert done[name]["passed"], done[name]["detail"]
