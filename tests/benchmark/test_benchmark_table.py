"""benchmark/README.md has the table of what r costs: predictions from formulas, measurements from committed results."""

import json
from pathlib import Path

import pytest

from megatron_vwn.benchmark import table
from megatron_vwn.benchmark.__main__ import main
from megatron_vwn.benchmark.report import RESULTS, SCHEMA
from megatron_vwn.benchmark.table import Rates
from megatron_vwn.planner import kernel_times

README = Path(__file__).parents[2] / "megatron_vwn" / "benchmark" / "README.md"


def cells(text):
    rows = [line for line in text.splitlines() if line.startswith("| (")][1:]
    return {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}


def test_predictions(tmp_path, monkeypatch):
    """(8, 64) at D = 1000, 1000 tokens: 45 D elements, and 3 * 2560 D FLOPs per token."""
    asked = []

    def connection_seconds(gpu, direction, width, tokens, *, bandwidth):
        asked.append((gpu, direction, width.n, tokens, bandwidth))
        return {"forward": 1e-4, "backward": 2e-4}[direction]

    monkeypatch.setattr(kernel_times, "connection_seconds", connection_seconds)
    rates = Rates(1e12, 1e15, 1e14, 50e6, 1000, 1000, "h100")
    found = cells(table.markdown(rates, tmp_path))
    assert list(found) == ["(2, 3)", "(4, 16)", "(1, 8)", "(4, 32)", "(8, 64)"]
    # Half a layer takes 1.5 ms.
    predicted = ["0.300 (30 %)", "6.0 %", "20 %", "no GPU yet"]
    assert found["(8, 64)"] == ["8", "90", "8", "traffic", "0.090", *predicted]
    assert found["(2, 3)"][:2] == ["1.5", "25"] and found["(2, 3)"][-3] == "1.7 %"
    assert asked[-2:] == [("h100", each, 64, 1000, 1e12) for each in ("forward", "backward")]
    slow = cells(table.markdown(Rates(1e12, 1e14, 1e14, 50e6, 1000, 1000), tmp_path))
    # Forward 2560 D FLOPs at 100 TFLOP/s against 36 D bytes at 1 TB/s: 0.0256 and 0.036; backward 54 D: 0.0512, 0.054.
    assert slow["(8, 64)"][2:5] == ["8", "traffic", "0.090"]
    assert cells(table.markdown(Rates(1e12, 1e13, 1e14, 50e6, 1000, 1000), tmp_path))["(8, 64)"][3:5] == [
        "products",
        "0.768",
    ]


def result(**changes):
    row = {"op": "write_read", "m": 4, "n": 16, "hidden_size": 2048, "tokens": 8192, "dtype": "bfloat16"}
    row |= {"variant": "triton", "status": "measured", "pass": "forward", "seconds": {"median": 2e-4}}
    return row | changes


def committed(folder, name, results, device="cuda", **changes):
    content = {"program": "vwn-benchmark", "schema": SCHEMA, "mode": "kernels", "results": results}
    content |= {"hardware": {"device": device, "name": "Some GPU"}}
    (folder / name).write_text(json.dumps(content | changes))


def test_measurements(tmp_path):
    backward = result(**{"pass": "backward", "seconds": {"median": 3e-4}})
    committed(tmp_path, "gpu.json", [result(), backward])
    assert {pair: row[-1] for pair, row in cells(table.markdown(Rates(), tmp_path)).items()} == {
        "(2, 3)": "no GPU yet", "(4, 16)": "0.500 ms (Some GPU)", "(1, 8)": "no GPU yet", "(4, 32)": "no GPU yet",
        "(8, 64)": "no GPU yet",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"variant": "torch"}, {"tokens": 4096}, {"status": "disagrees"}, {"dtype": "float32"}, {"op": "connection"}],
    ids=str,
)
def test_other_results_are_no_measurement_of_it(tmp_path, change):
    both = [result(**change), result(**change, **{"pass": "backward"})]
    committed(tmp_path, "gpu.json", both)
    assert cells(table.markdown(Rates(), tmp_path))["(4, 16)"][-1] == "no GPU yet"


def test_half_a_step_or_a_processor_is_no_measurement(tmp_path):
    committed(tmp_path, "half.json", [result()])
    committed(tmp_path, "cpu.json", [result(), result(**{"pass": "backward"})], device="cpu")
    assert cells(table.markdown(Rates(), tmp_path))["(4, 16)"][-1] == "no GPU yet"


@pytest.mark.parametrize("content", ["{", "[]", '{"program": "another"}'])
def test_what_is_no_result_is_refused(tmp_path, content, capsys):
    (tmp_path / "broken.json").write_text(content)
    assert main(["table", "--results", str(tmp_path)]) == 2
    assert "broken.json is no result of this version" in capsys.readouterr().err


def test_section_of_a_readme(tmp_path):
    text = table.markdown(Rates(), tmp_path)
    assert table.section(f"# Title\n\n{text}\nMore text\n\n| another | table |\n") == text
    assert table.section(f"# Title\n\n{text}") == text
    assert table.section("# Title\n") is None


def test_the_readme_has_the_table_that_the_program_prints(capsys):
    found = table.section(README.read_text())
    if found is None:
        pytest.skip(f"the README has no line {table.MARKER}")
    assert main(["table"]) == 0
    assert found == capsys.readouterr().out


def test_committed_results_can_be_read():
    for path in RESULTS.glob("*.json"):
        content = table._load(path)
        assert content["commit"] and content["results"], path
