"""A GPT of four layers with Megatron's local spec, its data and one forward-backward; imported after install()."""

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, HIDDEN, LAYERS, SEQUENCE, BATCH, MICROBATCHES = 64, 32, 4, 16, 2, 4


def layout(**sizes):
    """Split the two ranks anew and seed every generator."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def build(*, tensor=1, pipeline=1, chunks=1, expert=1, experts=None, dtype=torch.float32):
    """The model chunks of this rank: a GPT of four local-spec layers, on "cuda"."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=expert,
        num_moe_experts=experts,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        add_bias_linear=experts is None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        batch_p2p_comm=chunks == 1,
        overlap_p2p_comm=chunks > 1,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(num_experts=experts)
    models = []
    for chunk in range(chunks):
        stage = chunk if chunks > 1 else None
        model = GPTModel(
            config,
            spec,
            VOCABULARY,
            SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=stage,
        )
        models.append(model.cuda(torch.cuda.current_device()).to(dtype))
    return models


def batches(seed):
    """Endless token batches [b, s] on "cuda"; the same seed gives the same data."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator).cuda(non_blocking=True)
        yield tokens[:, :-1], tokens[:, 1:]


def forward_step(iterator, model):
    tokens, labels = next(iterator)
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=torch.cuda.current_device()).triu(1)
    output = model(tokens, positions, mask, labels=labels)
    return output, lambda out: (out.float().mean(), {"loss": out.detach().float().mean()})


def forward_backward(models, seed=7, iterators=None):
    """Mean loss over the microbatches on the last stage, None elsewhere."""
    if iterators is None:
        iterators = [batches(seed) for _ in models]
    several = len(models) > 1
    parts = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=models if several else models[0],
        num_microbatches=MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return sum(part["loss"].item() for part in parts) / len(parts) if parts else None
