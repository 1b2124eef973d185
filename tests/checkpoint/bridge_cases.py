"""What the tests of Megatron-Bridge build, as data: imported by pytest and by the ranks."""

from hf.cases import EXPERTS, MODELS, SMALL

RANKS = 2
LAYOUTS = {
    "alone": {},
    "TP2, by token": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "TP2, by width": {"tensor_model_parallel_size": 2, "vwn_partition": "width"},
    "TP2, replicated": {"tensor_model_parallel_size": 2, "vwn_partition": "replicated"},
    "EP2": {"expert_model_parallel_size": 2},
}
# Megatron has no MLP with a gated gelu.
REFUSED = "sliding window, partial rope"
EXPRESSIBLE = {name: settings for name, settings in MODELS.items() if name != REFUSED}
CHECKPOINTS = ("experts by sigmoid", "n-grams", "window on every other attention")

BASE = SMALL | EXPERTS | {"hybrid_pattern": "*-*E", "vwn_m": 2, "vwn_n": 6, "initializer_range": 0.03}
_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
_MTP = {"num_mtp_layers": 1, "mtp_hybrid_pattern": "*-"}
_SIGMOID = {"moe_router_score_function": "sigmoid"}
_NGRAMS = {"vwn_ngrams": [2, 3], "vwn_ngram_vocab": 50, "vwn_document_end": 7}
# field of VWNConfig -> another value of it, and what else such a model has.
CHANGED: dict[str, tuple[object, dict]] = {
    "vocab_size": (128, {}),
    "hidden_size": (64, {}),
    "hybrid_pattern": ("*E*-", {}),
    "num_attention_heads": (8, {}),
    "num_key_value_heads": (4, {}),
    "head_dim": (12, {}),
    "qk_layernorm": (True, {}),
    "add_bias_linear": (True, {"hybrid_pattern": "*-*-", "hidden_act": "gelu", "gated_mlp": False}),
    "add_qkv_bias": (True, {}),
    "attention_dropout": (0.1, {}),
    "sliding_window": (5, {}),
    "layer_types": (["sliding_attention", "full_attention"], {"sliding_window": 5}),
    "position_embedding_type": ("none", {}),
    "max_position_embeddings": (64, {}),
    "rope_parameters": (_ROPE, {}),
    "intermediate_size": (64, {}),
    "hidden_act": ("gelu", {"hidden_act": "relu2", "gated_mlp": False}),
    "gated_mlp": (False, {"hidden_act": "silu"}),
    "normalization": ("LayerNorm", {}),
    "norm_eps": (1e-6, {}),
    "fp32_residual_connection": (True, {}),
    "num_experts": (8, {}),
    "num_experts_per_tok": (1, {}),
    "moe_intermediate_size": (32, {}),
    "shared_expert_intermediate_size": (32, {}),
    "shared_expert_gate": (True, {}),
    "moe_router_score_function": ("sqrtsoftplus", {}),
    "moe_router_pre_softmax": (True, {}),
    "moe_router_topk_scaling_factor": (2.5, _SIGMOID),
    "moe_router_enable_expert_bias": (True, _SIGMOID),
    "moe_router_dtype": ("fp32", {}),
    "router_aux_loss_coef": (0.01, {}),
    "num_mtp_layers": (2, _MTP),
    "mtp_hybrid_pattern": ("*E", _MTP),
    "mtp_loss_scaling_factor": (0.3, _MTP),
    "vwn_m": (1, {}),
    "vwn_n": (8, {}),
    "vwn_connection": ("static", {}),
    "vwn_gate": ("sigmoid", {}),
    "vwn_carry": ("identity", {}),
    "vwn_embedding": ("tiled", {}),
    "vwn_reduce_norm": (False, {}),
    "vwn_linear": ("plain", {}),
    "vwn_ngrams": ([2, 4], _NGRAMS),
    "vwn_ngram_vocab": (60, _NGRAMS),
    "vwn_document_end": (8, _NGRAMS),
    "initializer_range": (0.02, {}),
    "tie_word_embeddings": (True, {}),
}
# Another value of it is no model.
SAID_BY_THE_PATTERN = ("num_hidden_layers",)
# Megatron has no such model.
INEXPRESSIBLE = ("gated_mlp",)
