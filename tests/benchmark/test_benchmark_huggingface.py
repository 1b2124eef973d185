"""The Hugging Face model against Llama: what the command prints and writes. Its times are nobody's here."""

import json

import pytest
import torch

from megatron_vwn.benchmark.huggingface import main

SIZES = {"m": 2, "n": 6, "layers": 1, "hidden-size": 16, "intermediate-size": 24, "heads": 2, "vocab-size": 32}
SIZES |= {"prompt": 12, "new-tokens": 3, "rounds": 2}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_models_run_and_are_compared(dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    path = tmp_path / "result.json"
    assert main([*TINY, "--dtype", dtype, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    for rates in result["tokens_per_second"].values():
        assert rates["ratio"] == pytest.approx(rates["VWN"] / rates["Llama"])
    assert set(result["tokens_per_second"]) == {"prefill", "decode"}
    assert result["settings"]["dtype"] == dtype and result["versions"]["torch"]
    assert capsys.readouterr().out.count("ratio") == 2
