"""Whether a run goes on with the function that its checkpoint was trained to compute.

Both runs' arguments become Megatron's configurations of a model, and every field of the two is compared. A field that
differs is refused, unless it stands in one of the lists below: one that a later Megatron adds is refused until somebody
has thought about it.
"""

import argparse
import copy
from dataclasses import fields

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.model import model_config_from_args
from megatron_vwn.training.refusals.checkpoint import Checkpoint
from megatron_vwn.training.refusals.megatron import quoting_megatron

# Where and how the same numbers are computed: layout, communication, kernels, recompute, memory.
_LAYOUT = """
tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_size sequence_parallel
virtual_pipeline_model_parallel_size pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
context_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank cp_comm_type
expert_model_parallel_size expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards gtp_weight_remat_size
expert_gtp_weight_remat_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage mtp_standalone
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage
variable_seq_lengths moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend
moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
moe_ncclep_static_shape moe_ncclep_zero_copy hetereogenous_dist_checkpoint parallel_output
tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm delay_wgrad_compute
overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release overlap_p2p_comm batch_p2p_comm
batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit
overlap_p2p_comm_warmup_flush moe_shared_expert_overlap high_priority_a2a_comm_stream symmetric_ar_type
"""
_KERNELS = """
transformer_impl attention_backend flash_attention_version deterministic_mode batch_invariant_mode
gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl bias_activation_fusion
masked_softmax_fusion bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope fused_residual_rmsnorm
use_fused_weighted_squared_relu persist_layer_norm memory_efficient_layer_norm use_transformer_engine_op_fuser
use_te_activation_func use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp moe_grouped_gemm
moe_permute_fusion moe_router_fusion moe_permute_fusion_into_hybridep mla_down_proj_fusion use_mamba_mem_eff_path
mlp_chunks_for_training dsa_kernel_backend clone_scatter_output_in_embedding disable_parameter_transpose_cache
enable_cuda_graph external_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
cuda_graph_warmup_steps cuda_graph_impl cuda_graph_modules cuda_graph_scope
"""
_MEMORY = """
recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations
moe_layer_recompute num_microbatches_with_partial_activation_checkpoints cpu_offloading cpu_offloading_num_layers
_cpu_offloading_context cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
fine_grained_offloading_max_inflight_offloads moe_paged_stash moe_paged_stash_page_size
moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
"""
# How tensors are born, what is logged, what training sets later, inference, and the vocabulary's padding (a layout's).
_ELSEWHERE = """
perform_initialization use_cpu_initialization init_method output_layer_init_method init_method_std
embedding_init_method embedding_init_method_std init_model_with_meta_device use_te_rng_tracker
timers barrier_with_L1_time config_logger_dir log_max_attention_logit moe_per_layer_logging test_mode
finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func
param_sync_func experimental_attention_variant_loss_scale_func fp8_quantizer_factory fp4_quantizer_factory
restore_modelopt_state extra_checkpoint_metadata pre_wrap_hooks post_wrap_hooks
flash_decode inference_rng_tracker inference_sampling_seed inference_cuda_graph_scope use_inference_optimized_layers
inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type nccl_all_reduce_for_prefill
mlp_chunks_for_prefill moe_pad_experts_for_cuda_graph_inference cache_mla_latents
make_vocab_size_divisible_by vocab_size should_pad_vocab
"""
# What was read from the files and code that _NAMES name, which are compared in their place.
_READ = "quant_recipe hybrid_stack_spec"
MAY_DIFFER = frozenset(f"{_LAYOUT} {_KERNELS} {_MEMORY} {_ELSEWHERE} {_READ}".split())
"""Fields that leave the function alone, or are compared by name."""

# What a later phase of a training changes on purpose: longer contexts, other weights of losses, other precision.
_SAID = """
rotary_base rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
seq_len_interpolation_factor seq_length window_size window_attn_skip_freq
hidden_dropout attention_dropout moe_input_jitter_eps mtp_loss_scaling_factor mtp_detach_heads moe_aux_loss_coeff
moe_z_loss_coeff moe_router_load_balancing_type moe_router_bias_update_rate moe_router_quantile_balancing_ema
moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_dropping moe_token_drop_policy
moe_expert_rank_capacity_factor dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss calculate_per_token_loss
qk_clip qk_clip_alpha qk_clip_threshold
fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype disable_bf16_reduced_precision_matmul
fp8 fp8_recipe fp8_param fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj
fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red fp4 fp4_recipe fp4_param
first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 activation_func_fp8_input_store
use_kitchen use_kitchen_attention kitchen_attention_backend fp32_residual_connection attention_softmax_in_fp32
apply_query_key_layer_scaling moe_router_dtype moe_router_padding_for_quantization moe_router_padding_for_fp8
mamba_training_ssm_states_dtype fp16_lm_cross_entropy
"""
SAID = frozenset(_SAID.split())
"""Fields that change it as people do on purpose: they are named where training starts."""

# Which tensors there are, or their shapes: not even --finetune can use them.
_SHAPES = """
num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size hybrid_layer_pattern
mtp_num_layers normalization qk_layernorm add_bias_linear add_qkv_bias gated_linear_unit attention_output_gate
share_embeddings_and_output_weights multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim
v_head_dim num_moe_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
moe_latent_size mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
"""
_STRUCTURE = frozenset(_SHAPES.split())

# Arguments that name a recipe, a file or code: the configuration holds what they stand for, which cannot be compared,
# and a checkpoint's file need not be there any more.
_RECIPES = ("te_precision_config_file", "kitchen_config_file", "kitchen_recipe_number")
_NAMES = (*_RECIPES, "spec")


def refuse_other_function(checkpoint: Checkpoint, args: argparse.Namespace) -> list[str]:
    """Refuse a run that would go on with another function than the checkpoint's.

    Args:
        checkpoint: what training starts from; its virtual width is this run's.
        args: Megatron's arguments, validated.

    Returns:
        What the run changes of the function on purpose, each in words.

    Raises:
        VirtualWidthError: a field of the model's configuration differs that must not.
    """
    if checkpoint.args is None:
        return []
    with quoting_megatron():
        ours = _configuration(args, read=args)
    try:
        theirs = _configuration(checkpoint.completed_args(args), read=args)
    except (AssertionError, ValueError, AttributeError, TypeError, OSError, ImportError) as error:
        raise VirtualWidthError(
            f"the arguments of the checkpoint in {checkpoint.folder} describe no model that this Megatron builds "
            f"({error}): load it with the Megatron that saved it, or give another --load."
        ) from error
    changed = [name for name in theirs if name not in MAY_DIFFER and theirs[name] != ours.get(name)]
    said = set() if checkpoint.weights_alone(args) else set(changed) - SAID - set(_RECIPES)
    if "learned_absolute" in (theirs["position_embedding_type"], ours["position_embedding_type"]):
        said |= {"seq_length"} & set(changed)  # it is a shape of a tensor
    refused = [name for name in changed if name in said or name in _STRUCTURE]
    if refused:
        lost = any(name in _STRUCTURE for name in refused)
        raise VirtualWidthError(
            f"the checkpoint in {checkpoint.folder} was trained with {_words(theirs, refused)}, but this run has "
            f"{_words(ours, refused)}: give the checkpoint's setting, "
            + ("or another --load." if lost else "or add --finetune to begin anew with its weights.")
        )
    return [f"{name} {_word(theirs[name])} -> {_word(ours[name])}" for name in changed]


def _configuration(args: argparse.Namespace, read: argparse.Namespace) -> dict[str, object]:
    """Every field of the model that validated arguments describe, and what they name; ``read`` names what is read."""
    names = {name: getattr(args, name, None) for name in _NAMES}
    args = copy.copy(args)
    for name in _NAMES:
        setattr(args, name, getattr(read, name, None))
    args.padded_vocab_size = 1  # the tokenizer, which decides on it, is not built yet
    model = model_config_from_args(args, None)
    found = {each.name: getattr(model.transformer, each.name) for each in fields(model.transformer)}
    found |= {each.name: getattr(model, each.name) for each in fields(model) if each.name != "transformer"}
    found |= names
    found["hybrid_layer_pattern"] = args.hybrid_layer_pattern.replace("|", "")  # stages are the layout's
    return found


def _words(configuration: dict[str, object], names: list[str]) -> str:
    return ", ".join(f"{name} = {_word(configuration[name])}" for name in names)


def _word(value: object) -> object:
    return getattr(value, "__name__", value)
