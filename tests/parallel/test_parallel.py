"""The parallel checks, run once under torchrun (see session.py) and reported one by one."""

import json
from pathlib import Path

import launch
import pytest
from parallel.cases import CHECKS, RANKS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory, request):
    report = tmp_path_factory.mktemp("parallel") / "report.jsonl"
    wanted = [item.callspec.params["name"] for item in request.session.items if item.function.__name__ == "test_check"]
    run = launch.session(RANKS, HERE / "session.py", report, *wanted)
    lines = report.read_text().splitlines() if report.exists() else []
    done = {entry["check"]: entry for entry in map(json.loads, lines)}
    return done, f"session ended with {run.returncode}\n{run.stderr[-6000:]}"


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, outcomes):
    done, log = outcomes
    assert name in done, f"the session ended before this check; {log}"
    assert done[name]["passed"], done[name]["detail"]
