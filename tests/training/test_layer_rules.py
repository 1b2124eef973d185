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
    "moe_router_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_flex_dispatcher_backend": "deepep",
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


def test_fused_routers_need_a_transformer_engine_that_has_them(monkeypatch):
    flags = {"hybrid_layer_pattern": "*E", "moe_router_fusion": True}
    monkeypatch.setattr(layer_rules, "fused_topk_with_score_function", None)
    assert refused_with("--moe-router-fusion", "Transformer Engine 2.6", **flags)
    monkeypatch.setattr(layer_rules, "fused_topk_with_score_function", print)
    assert sentences(**flags) == []


@pytest.mark.parametrize(
    ("backend", "flag"), [("deepep", "HAVE_DEEP_EP"), ("hybridep", "HAVE_HYBRIDEP"), ("ncclep", "HAVE_TE_EP")]
)
def test_a_flexible_dispatcher_needs_its_package(monkeypatch, backend, flag):
    flags = {"hybrid_layer_pattern": "*E", "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    assert refused_with("--moe-token-dispatcher-type flex", "alltoall", **flags)
    assert sentences(**flags | {"hybrid_layer_pattern": "*-"}) == []  # of no effect without experts
    monkeypatch.setattr(layer_rules, flag, True)
    assert sentences(**flags) == []


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
