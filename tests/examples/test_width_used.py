"""examples/study/width_used.py on models whose answers are known: a fresh one, whose copies are equal, and others."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hf.cases import SMALL
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_vwn.hf import VWNConfig, VWNForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "study"))

import width_used

TOKENS = torch.arange(48).view(2, 24) * 7 % SMALL["vocab_size"]


@pytest.fixture(params=[4, 5], ids=["whole copies", "a copy in part"])
def fresh(request):
    torch.manual_seed(1)
    return VWNForCausalLM(
        VWNConfig(**SMALL, hybrid_pattern="*-*-", vwn_m=2, vwn_n=request.param, vwn_embedding="tiled")
    ).eval()


def test_a_fresh_model_has_equal_copies_and_static_coefficients(fresh):
    connections = width_used.connections_of(fresh)
    assert len(connections) == 4
    whole = width_used.loss(fresh, TOKENS)
    # Sums in another order: fp32.
    assert width_used.energy_of_differences(fresh, TOKENS) == pytest.approx([0] * 4, abs=1e-10)
    with width_used.equal_copies(connections):
        assert width_used.loss(fresh, TOKENS) == pytest.approx(whole, abs=1e-5)


def test_what_was_learned_is_taken_away_and_comes_back(fresh):
    with torch.no_grad():
        for connection in width_used.connections_of(fresh):
            for name, parameter in connection.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if name != "norm" else 0))
    connections, whole = width_used.connections_of(fresh), width_used.loss(fresh, TOKENS)
    shares = width_used.energy_of_differences(fresh, TOKENS)
    # By hand, from the states themselves.
    fresh.config.output_wide_hidden_states = True
    *_, state = fresh(TOKENS, output_hidden_states=True).hidden_states
    h = state.detach().unflatten(-1, (fresh.config.vwn_n, -1)).flatten(0, 1)
    means = [h[:, copy::2].mean(1, keepdim=True) for copy in (0, 1)]
    apart = sum((h[:, copy::2] - means[copy]).square().sum() for copy in (0, 1))
    assert shares[-1] == pytest.approx((apart / h.square().sum()).item(), rel=1e-4)
    contexts = [width_used.equal_copies(connections), width_used.equal_copies(connections[1:2])]
    contexts += [width_used.zeroed(connections, name) for name in ("weight", "routing")]
    for without in contexts:
        with without:
            assert abs(width_used.loss(fresh, TOKENS) - whole) > 1e-4
        assert width_used.loss(fresh, TOKENS) == whole


def test_the_table_and_refusals(fresh, tmp_path, capsys):
    fresh.save_pretrained(tmp_path / "model")
    folder, prefix = str(tmp_path / "model"), str(tmp_path / "held")
    assert width_used.main([folder, "--data", prefix]) == 2
    assert "held.idx" in capsys.readouterr().err
    _write(prefix, np.arange(300) % SMALL["vocab_size"])
    assert width_used.main([folder, "--data", prefix, "--sequences", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("256 tokens of") and len([line for line in lines if line.startswith("| ")]) == 8
    assert width_used.main([folder, "--data", prefix, "--sequences", "3"]) == 2
    assert "2 sequences of 128" in capsys.readouterr().err
    _write(prefix, np.arange(300))
    assert width_used.main([folder, "--data", prefix, "--sequences", "2"]) == 2
    assert "the token 255, and the model ends at 95" in capsys.readouterr().err
    assert width_used.main([str(tmp_path), "--data", prefix]) == 2
    assert "vwn-convert to-hf" in capsys.readouterr().err


def _write(prefix, tokens):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_item(torch.from_numpy(tokens))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
