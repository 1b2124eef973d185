"""Megatron's side of the parity tests: every model of ``cases`` built, moved away from initialisation and run on one
rank, with what it computed saved to the file named on the command line."""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import sys  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402
from hf.cases import BATCH, HALF, MODELS, SEQUENCE  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE  # noqa: E402

from megatron_vwn.config import VirtualWidthConfig  # noqa: E402
from megatron_vwn.hf.configuration_vwn import VWNConfig  # noqa: E402
from megatron_vwn.modules.model import VirtualWidthModel  # noqa: E402
from megatron_vwn.modules.specs import stack_spec  # noqa: E402

ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu2": squared_relu}


def backbone(c: VWNConfig, half: bool) -> TransformerConfig:
    """Megatron's config of the model that a VWNConfig describes."""
    windows = [int(kind == "sliding_attention") for kind in c.layer_types]
    attention = iter(windows)
    settings = {
        "num_layers": len(c.hybrid_pattern),
        "mtp_num_layers": c.num_mtp_layers or None,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.num_attention_heads,
        "num_query_groups": c.num_key_value_heads,
        "kv_channels": c.head_dim,
        "ffn_hidden_size": c.intermediate_size,
        "normalization": c.normalization,
        "layernorm_epsilon": c.norm_eps,
        "qk_layernorm": c.qk_layernorm,
        "add_bias_linear": c.add_bias_linear,
        "add_qkv_bias": c.add_qkv_bias,
        "gated_linear_unit": c.gated_mlp,
        "activation_func": ACTIVATIONS[c.hidden_act],
        "window_size": (c.sliding_window - 1, 0) if c.sliding_window else None,
        "window_attn_skip_freq": [next(attention) if s == "*" else 0 for s in c.hybrid_pattern],
        "fp32_residual_connection": c.fp32_residual_connection,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
        "bf16": half,
        "params_dtype": torch.bfloat16 if half else torch.float32,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
    }
    if c.num_experts:
        settings |= {
            "num_moe_experts": c.num_experts,
            "moe_ffn_hidden_size": c.moe_intermediate_size,
            "moe_router_topk": c.num_experts_per_tok,
            "moe_router_score_function": c.moe_router_score_function,
            "moe_router_pre_softmax": c.moe_router_pre_softmax,
            "moe_router_topk_scaling_factor": c.moe_router_topk_scaling_factor,
            "moe_router_enable_expert_bias": c.moe_router_enable_expert_bias,
            "moe_router_dtype": c.moe_router_dtype,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "moe_shared_expert_intermediate_size": c.shared_expert_intermediate_size or None,
            "moe_shared_expert_gate": c.shared_expert_gate,
        }
    return TransformerConfig(**settings)


def build(c: VWNConfig, half: bool) -> harness.Session:
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = backbone(c, half)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual_width = VirtualWidthConfig(
        m=c.vwn_m,
        n=c.vwn_n,
        connection=c.vwn_connection,
        gate=c.vwn_gate,
        carry=c.vwn_carry,
        embedding=c.vwn_embedding,
        reduce_norm=c.vwn_reduce_norm,
        linear=c.vwn_linear,
        ngrams=tuple(c.vwn_ngrams),
        ngram_vocab=c.vwn_ngram_vocab,
        document_end=c.vwn_document_end,
    )
    rope = c.rope_parameters or {}
    model = VirtualWidthModel(
        config,
        stack_spec(virtual_width, config),
        virtual_width=virtual_width,
        vocab_size=c.vocab_size,
        max_sequence_length=c.max_position_embeddings,
        hybrid_layer_pattern="/".join([c.hybrid_pattern] + [c.mtp_hybrid_pattern] * c.num_mtp_layers),
        position_embedding_type=c.position_embedding_type,
        rotary_base=rope.get("rope_theta", 10000),
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        share_embeddings_and_output_weights=c.tie_word_embeddings,
        pg_collection=groups,
    )
    if half:
        model.bfloat16()
    session = harness.Session(ALONE, SimpleNamespace(hidden=c.hidden_size), config, [model.eval()], groups)
    harness.perturb(session)
    generator = torch.Generator().manual_seed(9)
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        # Norm weights, biases and the bias of the choice of experts: the identity hides every mistake with them.
        if torch.is_tensor(tensor) and tensor.dim() == 1 and not harness.is_virtual_width(name):
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return session


@torch.no_grad()
def run(session: harness.Session, tokens: torch.Tensor) -> dict:
    """Whole tensors under checkpoint names, and logits of the next and of all further predictions."""
    model, logits = session.models[0], []
    # Cloned: the loss of further predictions is computed in place.
    model.output_layer.register_forward_hook(lambda _, __, output: logits.append(output[0].transpose(0, 1).clone()))
    size = tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, size, size, dtype=torch.bool), 1)
    model(tokens, torch.arange(size).expand_as(tokens), mask)
    *further, next_token = logits
    parameters, _ = harness.collect(session)
    return {
        "parameters": {key: tensor.float() for key, tensor in parameters.items()},
        "logits": next_token.float(),
        "further": [entry.float() for entry in further],
    }


def balance(session: harness.Session) -> dict[str, torch.Tensor]:
    """The loss by which a router balances its experts, times one, where its bias sends every token to the first."""
    router = next(module for module in session.models[0].modules() if isinstance(module, TopKRouter)).train()
    router.routing_type, router.config.moe_aux_loss_coeff = "aux_loss", 1.0
    router.expert_bias.zero_()[0] = 50
    losses = []
    router.attach_and_log_load_balancing_loss = lambda probs, _, loss, *__, **___: losses.append(loss) or probs
    logits = torch.randn(18, 1, len(router.expert_bias), generator=torch.Generator().manual_seed(5))
    _, chosen = router.routing(logits)
    return {"logits": logits[:, 0], "chosen": chosen, "loss": losses[0]}


if __name__ == "__main__":
    harness.initialize_groups(ALONE)
    tokens = torch.randint(0, 96, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    results = {}
    for name, arguments in MODELS.items():
        results[name] = run(build(VWNConfig(**arguments), False), tokens)
        if name in HALF:
            results[f"{name}, bf16"] = run(build(VWNConfig(**arguments), True), tokens)
    balanced = balance(build(VWNConfig(**MODELS["experts by sigmoid"]), False))
    torch.save({"tokens": tokens, "results": results, "balance": balanced}, sys.argv[1])
