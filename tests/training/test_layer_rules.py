"""Rules about sublayers that no command line of a machine without a GPU reaches: flags as a GPU machine parses them."""

from argparse import Namespace

import pytest

from megatron_vwn.training.refusals import layers as layer_rules

FLAGS = {
    "hybrid_layer_pattern": "*-",
    "hybrid_override_pattern": None,
    "transformer_impl": "transformer_engine",
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "context_parallel_size": 1,
    "multi_latent_attention": False,
    "mla_down_proj_fusion": False,
    "qk_layernorm": False,
    "q_lora_rank": None,
    "window_size": None,
    "masked_softmax_fusion": True,
    "group_query_attention": False,
    "num_query_groups": 1,
    "add_bias_linear": False,
    "recompute_modules": None,
}


def sentences(**flags):
    args = Namespace(**{**FLAGS, **flags})
    return [sentence for applies, sentence in layer_rules.LAYER_RULES if applies(args)]


def refused_with(*words, **flags):
    (sentence,) = sentences(**flags)
    return all(word in sentence for word in words) and sentence.endswith(".")


@pytest.mark.parametrize(
    ("symbol", "flag", "package"),
    [("M", "HAVE_MAMBA_SSM", "mamba-ssm"), ("G", "HAVE_FLA", "flash-linear-attention")],
)
def test_a_sublayer_needs_its_package(monkeypatch, symbol, flag, package):
    monkeypatch.setattr(layer_rules, flag, False)
    assert refused_with(package, "install it", hybrid_layer_pattern=f"{symbol}-")
    monkeypatch.setattr(layer_rules, flag, True)
    assert sentences(hybrid_layer_pattern=f"{symbol}-") == []


@pytest.mark.parametrize("symbol", ["+", "D", "G", "E"])
def test_sublayers_that_share_something_between_ranks_need_sequence_parallelism(monkeypatch, symbol):
    monkeypatch.setattr(layer_rules, "HAVE_FLA", True)
    flags = {"hybrid_layer_pattern": f"{symbol}-", "tensor_model_parallel_size": 2}
    assert refused_with("--sequence-parallel: add it", **flags)
    assert sentences(**flags, sequence_parallel=True) == []


def test_a_fused_softmax_has_no_window():
    window = {"transformer_impl": "local", "window_size": (4, 0)}
    assert refused_with("--window-size", "--no-masked-softmax-fusion", **window)
    assert sentences(**window, masked_softmax_fusion=False) == []
    assert sentences(window_size=(4, 0)) == []
