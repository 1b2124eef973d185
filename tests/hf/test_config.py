"""Settings that no model can have are refused in one sentence."""

import pytest
from hf.cases import MODELS

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.hf import VWNConfig

WRONG = {
    "vwn_n = 2 must be at least": {"vwn_m": 4, "vwn_n": 2},
    "not divisible by vwn_m = 3": {"vwn_m": 3, "vwn_n": 3},
    "vwn_gate is 'relu'": {"vwn_gate": "relu"},
    "moe_router_dtype is 'bf16'": {"moe_router_dtype": "bf16"},
    "cannot be tied": {"vwn_embedding": "wide", "tie_word_embeddings": True},
    "multiple of vwn_m, and 3 is none of 2": {"vwn_m": 2, "vwn_n": 3, "vwn_reduce_norm": True},
    "may contain": {"hybrid_pattern": "*-M-"},
    "has no attention": {"hybrid_pattern": "--"},
    "leave them out": {"hybrid_pattern": "*-*-", "num_hidden_layers": 4},
    "which needs sliding_window": {"hybrid_pattern": "*-", "layer_types": ["sliding_attention"]},
    "not divisible by num_key_value_heads": {"num_attention_heads": 4, "num_key_value_heads": 3},
    "0 < num_experts_per_tok": {"hybrid_pattern": "*E"},
    "experts have no biases": {"hybrid_pattern": "*E", "num_experts": 4, "add_bias_linear": True},
    "needs moe_router_score_function sigmoid": {"moe_router_enable_expert_bias": True},
    "give both or neither": {"num_mtp_layers": 1},
    "must then be all alike": {
        "hybrid_pattern": "**",
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_mtp_layers": 1,
        "mtp_hybrid_pattern": "*",
    },
}


@pytest.mark.parametrize("sentence", WRONG)
def test_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        VWNConfig(**WRONG[sentence])


@pytest.mark.parametrize("m,n", [(1, 1), (1, 4), (2, 3), (2, 4), (2, 5), (2, 6), (4, 4), (4, 16)])
def test_defaults_are_those_of_training(m, n):
    ours, training = VWNConfig(vwn_m=m, vwn_n=n), VirtualWidthConfig(m=m, n=n)
    assert (ours.vwn_embedding, ours.vwn_reduce_norm) == (training.embedding, training.reduce_norm)
    for name in ("connection", "gate", "carry", "linear"):
        assert getattr(ours, f"vwn_{name}") == getattr(training, name)
    assert ours.linear_divisor(9) == training.linear_divisor(9)
    assert ours.over_width == training.over_width(ours.hidden_size)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    config = VWNConfig(**MODELS[name])
    config.save_pretrained(tmp_path)
    assert VWNConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.num_hidden_layers == len(config.layer_types) == config.hybrid_pattern.count("*")
