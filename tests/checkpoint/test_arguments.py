"""Megatron's arguments of a model and back, and the flags that a user would type."""

import argparse
import sys

import pytest
from hf.cases import MODELS
from megatron.training.arguments import parse_args, validate_args

from megatron_vwn.checkpoint.arguments import backbone, command_line, hf_config, megatron_arguments
from megatron_vwn.checkpoint.model_card import plain
from megatron_vwn.checkpoint.settings import check_arguments, check_config
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig
from megatron_vwn.training.flags.defaults import megatron_defaults, megatron_parser
from megatron_vwn.training.flags.vwn import add_arguments, record_virtual_width, virtual_width_from_args

OTHERS = {
    "half width, wide": {"vwn_m": 2, "vwn_n": 3, "hidden_size": 64, "rope_parameters": {"rope_theta": 1e6}},
    "biases, gelu by tanh": {"add_bias_linear": True, "hidden_act": "gelu_pytorch_tanh", "gated_mlp": False},
    "other small numbers": {"norm_eps": 3e-6, "initializer_range": 0.013},
    "kv heads as many as heads": {"num_key_value_heads": 8},
    "reduce norm off": {"vwn_m": 2, "vwn_n": 8, "vwn_reduce_norm": False},
}
CONFIGS = MODELS | OTHERS
WINDOW = "sliding window, partial rope"
CONFIGS[WINDOW] = MODELS[WINDOW] | {"hidden_act": "silu"}  # Megatron's flags have no gated gelu
# Of training, without which Megatron's validation ends.
TRAINING = "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --eval-interval 1 --eval-iters 0"
MACHINE = (
    "--use-cpu-initialization --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm"
)

LEARNED = "LayerNorm, biases, learned positions, tied"
CONFIGS[LEARNED] = MODELS[LEARNED] | {"num_mtp_layers": 0, "mtp_hybrid_pattern": ""}  # Megatron has no both


def stored(config):
    """What would be written; that all channels rotate, and that queries have the biases of all, may be said or not."""
    kept = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    rope = {"partial_rotary_factor": 1.0} | config.rope_parameters
    return kept | {"rope_parameters": rope, "add_qkv_bias": config.qkv_bias}


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_and_back(name):
    config = VWNConfig(**CONFIGS[name])
    args = argparse.Namespace(**(megatron_defaults() | megatron_arguments(config)))
    assert stored(hf_config(args)) == stored(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_flags_say_the_same_model(name, monkeypatch):
    config = VWNConfig(**CONFIGS[name])
    seen = {"seq_length": config.max_position_embeddings, "transformer_impl": "local"}
    seen["bf16"] = config.fp32_residual_connection  # which Megatron has around half precision only
    words = command_line(megatron_arguments(config) | seen)
    monkeypatch.setattr(sys, "argv", ["pretrain", *words, *TRAINING.split(), *MACHINE.split(), "--no-rope-fusion"])
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = parse_args(add_arguments)
    record_virtual_width(args, virtual_width_from_args(args))
    validate_args(args)
    args.vwn_document_end = config.vwn_document_end  # the tokenizer's, when there is one
    assert stored(hf_config(args)) == stored(config)


def test_flags_are_typed_as_megatron_wants_them():
    config = VWNConfig(**MODELS["window on every other attention"])
    words = command_line(megatron_arguments(config) | {"bf16": True, "transformer_impl": "transformer_engine"})
    assert "--swiglu" in words and "--disable-bias-linear" in words and "--bf16" in words
    assert words[words.index("--window-size") + 1] == "3,0"
    assert words[words.index("--window-attn-skip-freq") + 1] == "[1,0,0,0,1]"
    assert (
        words[words.index("--transformer-impl") + 1] == "transformer_engine"
        and "--num-layers" not in words
        and "--no-bias-gelu-fusion" not in words
    )


OF_MEGATRON = {
    "--spec": {"spec": ["a", "b"]},
    "--layernorm-zero-centered-gamma": {"layernorm_zero_centered_gamma": True},
    "--attention-output-gate": {"attention_output_gate": True},
    "--moe-router-force-load-balancing": {"moe_router_force_load_balancing": True},
    "--moe-mlp-glu-interleave-size": {"moe_mlp_glu_interleave_size": 32},
    "sinkhorn routing": {"moe_router_load_balancing_type": "sinkhorn"},
    "quantile_balancing routing": {"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]},
    "a rule of their own": {"window_size": (3, 0), "window_attn_skip_freq": 2},
    "no causal window": {"window_size": (-1, 0)},
    "further predictions \\*/- differ": {"hybrid_layer_pattern": "*E/*/-"},
    "may contain": {"hybrid_layer_pattern": "*M"},
    "position_embedding_type is 'yarn'": {"position_embedding_type": "yarn"},
}


@pytest.mark.parametrize("sentence", OF_MEGATRON)
def test_models_that_hugging_face_cannot_express(sentence):
    config = VWNConfig(**MODELS["experts by sigmoid"])
    args = argparse.Namespace(**(megatron_defaults() | megatron_arguments(config) | OF_MEGATRON[sentence]))
    with pytest.raises(VirtualWidthError, match=sentence):
        hf_config(args)


OF_HUGGING_FACE = {
    "no llama3 rotary": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope_theta 500.5 is none": {"rope_parameters": {"rope_theta": 500.5}},
    "no MLP with a gated gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("sentence", OF_HUGGING_FACE)
def test_models_that_megatron_cannot_express(sentence):
    with pytest.raises(VirtualWidthError, match=sentence):
        megatron_arguments(VWNConfig(**OF_HUGGING_FACE[sentence]))


def test_what_only_training_or_speed_knows_is_ignored():
    config = VWNConfig(**MODELS["experts by sigmoid"])
    noise = {"moe_input_jitter_eps": 0.1, "moe_expert_capacity_factor": 1.0, "hidden_dropout": 0.1, "fp8": "hybrid"}
    plain = megatron_defaults() | megatron_arguments(config)
    assert backbone(argparse.Namespace(**plain)) == backbone(argparse.Namespace(**(plain | noise)))


def test_gelu_is_transformer_engines_where_it_computed_it():
    config = VWNConfig(hidden_act="gelu", gated_mlp=False)
    args = argparse.Namespace(**(megatron_defaults() | megatron_arguments(config) | {"use_te_activation_func": True}))
    assert backbone(args)["hidden_act"] == "gelu_pytorch_tanh"


def test_what_megatron_gives_by_itself_is_let_through():
    defaults = plain(argparse.Namespace(**megatron_defaults()))
    assert len(defaults) > 500
    check_arguments(defaults, megatron_parser(), "defaults")
    check_config({"pad_token_id": -1, "eos_token_id": [1, 2], "moe_router_topk_scaling_factor": 2}, "settings")
