"""The checkpoint that was written once (fixture/make.py) is read, and computes what it computed then."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vwn.checkpoint.convert_cli import main as vwn_convert
from megatron_vwn.checkpoint.torch_dist import TorchDistReader

HERE = Path(__file__).parent / "fixture"
EXPECTED = json.loads((HERE / "expected.json").read_text())


def test_tensors():
    reader = TorchDistReader(HERE / "megatron")
    sums = {key: reader.read(key).double().sum().item() for key in reader.tensors}
    assert sums == pytest.approx(EXPECTED["sums"], rel=1e-6, abs=1e-6)
    assert reader.arguments.vwn_n == 6


@torch.no_grad()
def test_function(tmp_path, capsys):
    assert vwn_convert(["to-hf", str(HERE / "megatron"), str(tmp_path / "folder")]) == 0
    # As no checkpoint did when it was made; test_convert.py has those that do.
    assert "does not say how many of its 16 rows" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokens = torch.tensor(EXPECTED["tokens"])
    torch.testing.assert_close(model(tokens).logits[0, -1], torch.tensor(EXPECTED["last"]), rtol=1e-5, atol=1e-6)


def test_it_is_small():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 60_000
