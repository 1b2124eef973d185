"""The first GPU hour: its rehearsal on a CPU, what a failing step does to the rest, and what becomes of its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import hour, steps
from gpu.steps import Step, check_losses, training_log

from megatron_vwn.benchmark import results
from megatron_vwn.benchmark.__main__ import main
from megatron_vwn.benchmark.prediction import calibration
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.planner import kernel_times

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    output = tmp_path_factory.mktemp("hour")
    run = subprocess.run(
        ["bash", "tests/gpu/run.sh", "--rehearse", "--minutes", "30", "--output", output],
        cwd=ROOT,
        env=os.environ | {"VWN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    return run, json.loads((output / "results.json").read_text())


def test_every_step_is_rehearsed(rehearsed):
    run, content = rehearsed
    states = {row["name"]: (row["state"], row.get("said"), row.get("logs")) for row in content["steps"]}
    assert {state for state, *_ in states.values()} == {hour.PASSED}, states
    assert run.returncode == 0, run.stderr
    assert list(states) == [step.name for step in steps.steps(Path("unused"), rehearse=True)]


def test_a_rehearsal_becomes_tables_but_no_measurement(rehearsed, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rehearsed[1]))
    assert main(["results", str(path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "A REHEARSAL" in printed and "| torch operations | 3 |" in printed and "| layer, experts r4 | VWN |" in printed
    )
    assert main(["results", str(path), "--commit-results"]) == 2
    assert "nothing in this file was measured on a GPU" in capsys.readouterr().err


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ran(tmp_path, *commands, seconds=60.0, left=60.0, collect=None, **more) -> dict:
    step = Step("a step", seconds, list(commands), collect or (lambda outputs, done: (outputs, "fine")), **more)
    return hour.run_step(step, tmp_path / "step", left, [])


def test_a_step_that_fails_or_hangs_or_says_nonsense_is_a_row(tmp_path):
    assert ran(tmp_path, python("print(1)"))["state"] == hour.PASSED
    failed = ran(tmp_path, python("raise SystemExit('no luck')"), python("print(1)"))
    assert failed["state"] == hour.FAILED and "no luck" in failed["logs"][0]
    # What one command printed before the end is kept, also of a child that ignores everything but SIGKILL.
    hanging = python(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('so far', flush=True); time.sleep(99)"
    )
    late = ran(tmp_path, hanging, seconds=2)
    assert late["state"] == hour.OUT_OF_TIME and late["seconds"] < 10 and "so far" in late["logs"][0]

    def broken(outputs, done):
        raise KeyError("results")

    assert ran(tmp_path, python("print(1)"), collect=broken)["state"] == hour.FAILED
    assert ran(tmp_path, python("print(1)"), left=1)["state"] == hour.NOT_REACHED
    assert ran(tmp_path, lacks="no GPU") == {"name": "a step", "seconds": 0.0, "state": hour.SKIPPED, "said": "no GPU"}
    large = ran(tmp_path, python("print(1)"), collect=lambda outputs, done: ("x" * 2_000_000, ""))
    assert len(json.dumps(large)) < 1000 and "2000002 bytes" in large["result"]


def test_another_curve_is_no_success():
    log = "elapsed time per iteration (ms): {} | lm loss: {:.6E} |\n"
    text = "".join(log.format(10 + i, 5 - 0.1 * i) for i in range(4)) + " max allocated: 812.50"
    found = training_log(text)
    assert found == {"losses": [5.0, 4.9, 4.8, 4.7], "milliseconds": 12.0, "peak_mb": 852.0}
    check_losses([5.0, 4.0], [5.01, 4.0])
    for other in ([5.1, 4.0], [5.0, 3.6], [5.0, float("nan")], [5.0]):
        with pytest.raises(ValueError):
            check_losses([5.0, 4.0], other)
    with pytest.raises(ValueError, match="no losses"):
        training_log("Traceback")


def measured(factor: float) -> dict:
    """A file of an hour on a GPU whose kernels take ``factor`` times the model's time; layers and all else left out."""
    rows = []
    for m, n in ((4, 16), (4, 32)):
        for direction in ("forward", "backward"):
            row = {"op": "write_read", "m": m, "n": n, "hidden_size": 2048, "tokens": 8192, "dtype": "bfloat16"}
            row |= {"pass": direction, "variant": "triton", "status": "measured", "share_of_floor": 0.5}
            seconds = factor * calibration.modelled_seconds(row, "h200")
            rows.append(row | {"seconds": {"median": seconds, "low": seconds, "high": seconds}})
    hardware = {"device": "cuda", "name": "NVIDIA H200"}
    report = {"program": "vwn-benchmark", "schema": 1, "mode": "kernels", "hardware": hardware, "results": rows}
    environment = {"hardware": hardware, "versions": {"torch": "2.11.0"}, "commit": None}
    named = {"environment": environment, "kernels": report}
    done = [{"name": name, "state": "passed", "seconds": 1.0, "result": result} for name, result in named.items()]
    return {"program": "vwn gpu hour", "schema": 1, "rehearsed": False, "date": "2027-01-01", "steps": done}


def test_measurements_calibrate_the_prediction(tmp_path, monkeypatch):
    content = measured(1.5)
    assert "(1.50)" in results.markdown(content)
    path = tmp_path / "calibration.json"
    written = results.commit(content, tmp_path, path)
    assert [each.name for each in written] == ["nvidia-h200-kernels.json", "calibration.json"]
    monkeypatch.setattr(calibration, "PATH", path)
    found = calibration.factor("h200", "forward")
    assert found.mean == pytest.approx(1.5) and found.low == pytest.approx(found.high) and found.streams == 2
    assert calibration.factor("h100", "forward") is None and "x 1.50" in calibration.said("h200")
    # The planner's file has the factor in its times from then on; a second hour is measured against the model again.
    stored = json.loads(kernel_times.PATH.read_text())
    for row in stored["passes"]:
        row["share_of_floor"] /= 1.5
        row["fixed_seconds"] *= 1.5
    stored["factors"] = {"h200": {"forward": 1.5, "backward": 1.5}}
    monkeypatch.setattr(kernel_times, "_content", lambda: stored)
    kernel_times.speed.cache_clear()
    again = calibration.factors_of(content["steps"][1]["result"]["results"], "h200")
    kernel_times.speed.cache_clear()
    assert again["backward"].mean == pytest.approx(1.5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"program": "vwn-benchmark"}', "null"])
def test_other_files_are_refused(text, tmp_path, capsys):
    (tmp_path / "file.json").write_text(text)
    assert main(["results", str(tmp_path / "file.json")]) == 2
    assert "was not written by tests/gpu/run.sh" in capsys.readouterr().err
    with pytest.raises(VirtualWidthError, match="cannot be read"):
        results.read(tmp_path)
