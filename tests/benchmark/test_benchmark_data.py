"""benchmark_data: both loaders on the same samples, a table and a file; refusals in one sentence."""

import importlib.util
import json
import sys

import pytest

from megatron_vwn.benchmark.loaders import main

TINY = ["--tokens", "30000", "--seq-length", "32", "--micro-batch-size", "2", "--batches", "3", "--rounds", "2"]

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed: pip install 'megatron_vwn[dali]'",
)


@needs_dali
def test_table_and_file_say_what_was_measured(tmp_path, capsys):
    path = tmp_path / "data.json"
    arguments = [*TINY, "--num-workers", "0", "--attention-mask", "--output", str(path)]
    assert main(arguments) == 0
    written = json.loads(path.read_text())
    assert written["program"] == "benchmark_data"
    assert [result["loader"] for result in written["results"]] == ["Megatron, single", "DALI, external"]
    for result in written["results"]:
        rate, seconds = result["tokens_per_second"], result["seconds"]
        assert rate["low"] <= rate["median"] <= rate["high"]
        assert rate["low"] * seconds["high"] == pytest.approx(2 * 32)
    assert written["versions"]["nvidia-dali"] and written["hardware"]["processor"]
    assert "DALI, external" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "add --overwrite" in capsys.readouterr().err


@needs_dali
def test_loaders_that_disagree_are_not_timed(tmp_path, capsys, monkeypatch):
    from megatron_vwn.data import dali as dali_data

    sample = dali_data.DaliLoader._sample
    monkeypatch.setattr(dali_data.DaliLoader, "_sample", lambda self, text: sample(self, text + 1))
    assert main([*TINY, "--num-workers", "0", "--output", str(tmp_path / "data.json")]) == 1
    assert "batches differ" in capsys.readouterr().err
    assert not (tmp_path / "data.json").exists()


def test_missing_files_and_a_missing_dali_are_refused(tmp_path, capsys, monkeypatch):
    assert main(["--data-path", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert main(TINY) == 2
    refusal = capsys.readouterr().err
    assert "pip install 'megatron_vwn[dali]'" in refusal and refusal.count("\n") == 1
