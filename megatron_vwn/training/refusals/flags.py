"""What this entry point cannot run, decided from the parsed flags before anything is built.

A flag of Megatron either works or is refused here with a sentence that says what to change; none is silently ignored.
The rules are rows of a table, in the order in which a user would want to hear of them. What Megatron refuses by itself
stays Megatron's; rows repeat one of its assertions only where the virtual width gives a better sentence.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron.core.models.hybrid.hybrid_layer_allocation import (
    Symbols,
    get_hybrid_total_layer_count,
    get_hybrid_total_pipeline_segment_count,
)
from megatron.core.transformer.enums import AttnBackend

from megatron_vwn.config import LARGEST_SEED, VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.flags.defaults import megatron_defaults
from megatron_vwn.training.refusals.fp8 import FP8_RULES
from megatron_vwn.training.refusals.layers import LAYER_RULES, pattern_of
from megatron_vwn.training.refusals.optimizer_choice import MUON, OPTIMIZER_RULES, WIDE_OPTIMIZER_RULES, divides_layers
from megatron_vwn.training.refusals.stages import (
    BLOCKS_OF_ONE,
    check_experts,
    check_pattern,
    recomputes_single_sublayers,
    stages_of_ranks,
)

Args = argparse.Namespace


@dataclass(frozen=True)
class Refusal:
    """One rule: whether it applies to parsed (not yet validated) flags, and the sentence that is then printed."""

    applies: Callable[[Args], object]
    sentence: str


def _flag(name: str, sentence: str) -> Refusal:
    """A rule about one flag that must stay unset; ``sentence`` follows the flag's name."""
    flag = f"--{name.replace('_', '-')}"
    return Refusal(lambda args: getattr(args, name, None), f"{flag} {sentence}")


def _depths(args: Args) -> int:
    """Further predictions in the pattern."""
    return pattern_of(args).count(Symbols.MTP_SEPARATOR)


def _interleaved_without_overlap(args: Args) -> bool:
    stages = args.pipeline_model_parallel_size
    return not args.overlap_p2p_comm and stages == 2 < get_hybrid_total_pipeline_segment_count(pattern_of(args))


def _stages(args: Args) -> list[list[str]]:
    return stages_of_ranks(
        pattern_of(args),
        args.pipeline_model_parallel_size,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )


def _blocks_of_one(args: Args) -> bool:
    how = args.recompute_granularity, args.recompute_method, args.recompute_num_layers
    return args.vwn_recompute_block and recomputes_single_sublayers(*how, _stages(args))


# For every run, the ordinary model included.
_ALWAYS = (
    Refusal(
        lambda args: args.use_checkpoint_args and not (args.load or args.pretrained_checkpoint),
        "--use-checkpoint-args takes them from a checkpoint: add --load.",
    ),
    Refusal(
        lambda args: not pattern_of(args),
        "--hybrid-layer-pattern is missing: give one symbol per sublayer, such as '*-*-' for twice attention and MLP.",
    ),
    Refusal(
        lambda args: args.num_layers not in (None, get_hybrid_total_layer_count(pattern_of(args))),
        "--num-layers contradicts the number of sublayers in --hybrid-layer-pattern: drop --num-layers.",
    ),
    Refusal(
        lambda args: args.transformer_impl == "inference_optimized",
        "--transformer-impl inference_optimized cannot be trained: choose transformer_engine or local.",
    ),
    *(Refusal(applies, sentence) for applies, sentence in (*FP8_RULES, *LAYER_RULES, *OPTIMIZER_RULES)),
    Refusal(
        lambda args: (args.mtp_num_layers or args.mtp_hybrid_override_pattern) and not _depths(args),
        "further predictions of a HybridModel are written into --hybrid-layer-pattern, such as '*-*-/*-' for one: drop "
        "--mtp-num-layers.",
    ),
    # Megatron would give the last stage a head of its own and stop at the first checkpoint.
    Refusal(
        lambda args: (
            _depths(args) and args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights
        ),
        "multi-token prediction on several pipeline stages cannot share embedding and head: add "
        "--untie-embeddings-and-output-weights.",
    ),
    # A HybridModel would be without positions, and without a word about it.
    Refusal(
        lambda args: args.position_embedding_type in ("relative", "mrope"),
        "--position-embedding-type relative and mrope are unknown to a HybridModel: choose rope, yarn, "
        "learned_absolute or none.",
    ),
    Refusal(
        lambda args: args.reset_position_ids and args.position_embedding_type != "learned_absolute",
        "--reset-position-ids changes nothing but learned positions: drop it, or give --position-embedding-type "
        "learned_absolute.",
    ),
    # The layers' torch norms would hand an fp32 stream on to half-precision linears.
    Refusal(
        lambda args: args.fp32_residual_connection and args.transformer_impl == "local" and args.vwn_m is None,
        "--fp32-residual-connection without a virtual width needs Transformer Engine, which --transformer-impl local "
        "does not use: drop it.",
    ),
    Refusal(
        lambda args: args.attention_backend == AttnBackend.local,
        "--attention-backend local is chosen by --transformer-impl local: give that.",
    ),
    Refusal(
        lambda args: (
            args.transformer_impl == "local" and args.attention_backend in (AttnBackend.flash, AttnBackend.fused)
        ),
        "--attention-backend flash and fused need Transformer Engine, which --transformer-impl local does not use: "
        "drop it.",
    ),
    Refusal(
        lambda args: not args.eval_interval,
        "--eval-interval is missing, by which Megatron plans validation: give it, with --eval-iters 0 for none.",
    ),
    # Megatron's batched send and receive between the same two ranks is silently wrong here.
    Refusal(
        _interleaved_without_overlap,
        "--no-overlap-p2p-communication computes wrong results on two pipeline ranks of several stages each: drop it.",
    ),
    # An assertion of Megatron's in the first forward pass.
    Refusal(
        lambda args: _depths(args) and args.recompute_method == "uniform" and (args.recompute_num_layers or 1) > 1,
        "--recompute-method uniform recomputes further predictions one layer at a time only: set "
        "--recompute-num-layers 1.",
    ),
    # Megatron would find out on every rank, behind its process groups.
    Refusal(
        lambda args: not 1 <= args.seed <= LARGEST_SEED,
        f"--seed must be at least 1 and at most {LARGEST_SEED}: give another.",
    ),
    _flag("heterogeneous_layers_config_path", "does not apply to a HybridModel: drop it."),
    _flag("heterogeneous_layers_config_encoded_json", "does not apply to a HybridModel: drop it."),
    _flag("perform_rl_step", "is reinforcement learning, which this entry point does not do: drop it."),
    _flag("inprocess_restart", "is not supported by this entry point: use torchrun --max-restarts."),
)

_UNTESTED = "is not supported together with a virtual width: drop it, or drop --vwn-m and --vwn-n."
_FSDP = "shards parameters in ways that the virtual width does not know: use --use-distributed-optimizer."
_CUDA_GRAPH = "captures layers in ways that the virtual width does not know: drop it."
_NO_RESIDUAL = "changes a residual connection that a virtual width replaces: drop it."
_OFFLOAD = "does not know the virtual-width stream: drop it and use --recompute-granularity full to save memory."
_WEIGHT_SHARDS = "shards weights in ways that the virtual width does not know: drop it."

# With --vwn-m and --vwn-n.
_WITH_VIRTUAL_WIDTH = (
    _flag("spec", "names other layers than the virtual width has: drop it."),
    _flag("apply_residual_connection_post_layernorm", _NO_RESIDUAL),
    _flag("fused_residual_rmsnorm", _NO_RESIDUAL),
    _flag("use_transformer_engine_op_fuser", _UNTESTED),
    _flag("use_megatron_fsdp", _FSDP),
    _flag("use_torch_fsdp2", _FSDP),
    _flag("init_model_with_meta_device", _FSDP),
    _flag("tensor_parallel_num_weight_shards", _WEIGHT_SHARDS),
    _flag("expert_tensor_parallel_num_weight_shards", _WEIGHT_SHARDS),
    Refusal(lambda args: args.cuda_graph_impl != "none", f"--cuda-graph-impl {_CUDA_GRAPH}"),
    _flag("enable_cuda_graph", _CUDA_GRAPH),
    _flag("external_cuda_graph", _CUDA_GRAPH),
    _flag("optimizer_cuda_graph", _UNTESTED),
    _flag("overlap_moe_expert_parallel_comm", "runs the parts of a layer without its connection: drop it."),
    _flag("delay_wgrad_compute", _UNTESTED),
    # The width partition holds another slice on every tensor-parallel rank; Megatron would gather them as one tensor.
    _flag(
        "distribute_saved_activations", "would mix the slices that tensor-parallel ranks hold of the stream: drop it."
    ),
    _flag("fine_grained_activation_offloading", _OFFLOAD),
    _flag("cpu_offloading_num_layers", _OFFLOAD),
    _flag("moe_paged_stash", _OFFLOAD),
    # Megatron detaches the embedding behind the layer's own W_expand, which would stay as it was drawn.
    Refusal(
        lambda args: args.mtp_detach_heads and args.vwn_embedding == "projected",
        "--mtp-detach-heads would never train the embedding's expansion of further predictions: choose --vwn-embedding "
        "wide or tiled, or drop it.",
    ),
    # The last stage has a table of its own, whose gradients Megatron does not add to those of the first.
    Refusal(
        lambda args: (
            _depths(args)
            and args.pipeline_model_parallel_size > 1
            and args.position_embedding_type == "learned_absolute"
        ),
        "multi-token prediction on several pipeline stages would train two tables of learned positions apart: choose "
        "--position-embedding-type rope.",
    ),
    Refusal(_blocks_of_one, BLOCKS_OF_ONE),
    Refusal(
        lambda args: args.seq_length is not None and max(args.vwn_ngrams or (), default=0) > args.seq_length,
        "--vwn-ngrams are longer than the sequences of --seq-length, so that a table would never be looked up: shorten "
        "them.",
    ),
    _flag("use_mup", "scales learning rates by width and has no rule for a virtual width: drop it."),
    *(Refusal(applies, sentence) for applies, sentence in WIDE_OPTIMIZER_RULES),
    Refusal(
        lambda args: args.ckpt_format != "torch_dist",
        "--ckpt-format must be torch_dist with a virtual width: it is the only format that other layouts can load.",
    ),
    Refusal(
        lambda args: args.non_persistent_ckpt_type in ("local", "in_memory"),
        "--non-persistent-ckpt-type must be global with a virtual width.",
    ),
    _flag("ckpt_convert_format", "is not supported with a virtual width, which has only torch_dist: drop it."),
    _flag("moe_use_upcycling", _UNTESTED),
)

# Megatron's parser knows the flags of all its programs and models. Given here, each of these would be ignored, or fail
# deep inside. What is said, and patterns of names in the parsed arguments that must keep their defaults.
_Patterns = dict[str, tuple[str, ...]]
# fmt: off
_WITHOUT_EFFECT: _Patterns = {
    "belongs to reinforcement learning, which this entry point does not do: drop it.": (
        "rl_*", "grpo_*", "langrl_env_config", "refit_method", "moe_enable_routing_replay",
    ),
    "belongs to inference, which this entry point does not do: drop it.": (
        "inference_*", "mamba_inference_*", "flash_decode", "nccl_all_reduce_for_prefill", "mlp_chunks_for_prefill",
        "cache_mla_latents", "moe_pad_experts_for_cuda_graph_inference", "max_tokens_to_oom", "decode_only_cuda_graphs",
        "use_legacy_static_engine", "enable_chunked_prefill", "num_speculative_tokens",
        "offset_sampling_seed_by_dp_rank",
    ),
    "belongs to vision models: drop it.": (
        "num_classes", "img_h", "img_w", "num_channels", "patch_dim", "classes_fraction", "data_per_class_fraction",
        "head_lr_mult", "vision_*", "swin_*", "mask_type", "mask_factor", "iter_per_epoch", "dino_*", "mrope_section",
    ),
    "belongs to BERT, T5 or retrieval models: drop it.": (
        "bert_*", "output_bert_embeddings", "mask_prob", "short_seq_prob", "sample_rate", "decoder_num_layers",
        "decoder_seq_length", "vocab_extra_ids", "relative_attention_*", "ict_*", "biencoder_*", "titles_data_path",
        "query_in_block_prob", "use_one_sent_docs", "evidence_data_path", "retriever_*", "block_data_path",
        "embedding_path", "indexer_*",
    ),
    "wants data that this entry point does not build: drop it.": ("fim_*", "sft", "sft_*"),
    "distils from stored logits, which this entry point does not do: drop it.": ("logits_load_*",),
    "is not supported by this entry point: use torchrun --max-restarts.": ("inprocess_*",),
    "is read by other models than a HybridModel: drop it.": (
        "use_rope_scaling", "rope_scaling_factor", "qk_l2_norm", "experimental_attention_variant",
        "linear_attention_freq", "moe_layer_freq", "use_grouped_gemm_for_dense_mlp", "defer_embedding_wgrad_compute",
        "wgrad_deferral_limit", "mtp_standalone",
    ),
    "is read by nothing in Megatron 0.19: drop it.": (
        "use_flash_attn", "onnx_safe", "openai_gelu", "rampup_batch_size", "exit_signal_handler_for_dataloader",
        "dist_ckpt_save_pre_mcore_014",
    ),
    "fails inside Megatron 0.19: drop it.": ("init_method_xavier_uniform", "config_logger_dir", "lazy_mpu_init"),
}
_OF_TRANSFORMER_ENGINE: _Patterns = {
    "needs Transformer Engine, which --transformer-impl local does not use: drop it.": (
        "fp8", "fp8_*", "fp4", "fp4_*", "first_last_layers_bf16", "num_layers_at_start_in_bf16",
        "num_layers_at_end_in_bf16", "reuse_grad_buf_for_mxfp8_param_ag", "te_precision_config_file", "tp_comm_*",
        "layernorm_zero_centered_gamma", "use_te_activation_func", "flash_attention_version", "symmetric_ar_type",
        "batch_invariant_mode", "use_kitchen_attention", "kitchen_attention_backend", "moe_latent_size",
        "moe_grouped_gemm", "moe_single_grouped_*", "use_grouped_gemm_for_shared_expert", "save_activations_interval",
        "save_dgrads_interval", "save_tokens_per_expert_interval",
    ),
}
_OF_MUON: _Patterns = {"belongs to Muon, which --optimizer does not name: drop it.": ("muon_*",)}
_OF_LAYERS: _Patterns = {
    "belongs to --optimizer dist_muon: give that, or drop it.": ("use_layer_wise_param_layout",),
}
_OF_LION: _Patterns = {"belongs to --muon-scalar-optimizer lion: give that, or drop it.": ("lion_*",)}
# How something would be done that a virtual width has not.
_OF_REFUSED_FLAGS: _Patterns = {
    "belongs to CUDA graphs, which a virtual width does not support: drop it.": (
        "cuda_graph_modules", "cuda_graph_scope_deprecated", "cuda_graph_warmup_steps",
    ),
    "belongs to FSDP, which a virtual width does not support: drop it.": (
        "megatron_fsdp_*", "fsdp_*", "torch_fsdp2_*", "data_parallel_sharding_strategy", "outer_dp_sharding_strategy",
        "keep_fp8_transpose_cache", "enable_full_sharding_in_hsdp", "suggested_communication_unit_size",
        "create_all_gather_group", "strict_fsdp_dtensor_load",
    ),
    "belongs to activation offloading, which a virtual width does not support: drop it.": (
        "cpu_offloading_retain_pinned_cpu_buffers", "offload_modules", "min_offloaded_tensor_size",
        "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction",
        "fine_grained_offloading_*", "moe_paged_stash_*",
    ),
    "belongs to --use-mup, which a virtual width does not support: drop it.": ("mup_*",),
    "belongs to local checkpoints, which a virtual width does not support: drop it.": (
        "non_persistent_local_*", "replication", "replication_*",
    ),
    "belongs to a flag that a virtual width does not support: drop it.": (
        "ep_overlap_early_attn_memory_release", "moe_upcycling_granularity", "ckpt_convert_*",
    ),
}
# fmt: on
_SPELLED_DIFFERENTLY = {
    "offset_sampling_seed_by_dp_rank": "use_same_sampling_seed_across_dp_ranks",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "bert_binary_head": "bert_no_binary_head",
    "cuda_graph_scope_deprecated": "cuda_graph_scope",
    "strict_fsdp_dtensor_load": "no_strict_fsdp_dtensor_load",
    "torch_fsdp2_reshard_after_forward": "torch_fsdp2_no_reshard_after_forward",
    "muon_split_qkv": "muon_no_split_qkv",
    "use_layer_wise_param_layout": "no_use_layer_wise_param_layout",
    "fp8": "fp8_format",
    "fp4": "fp4_format",
    "fp8_wgrad": "no_fp8_wgrad",
    "inference_dynamic_batching_enable_prefix_caching": "inference_dynamic_batching_prefix_caching",
    **{name: f"no_{name}" for name in ("tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag")},
    **{name: f"no_{name}" for name in ("tp_comm_overlap_rs", "tp_comm_split_ag", "tp_comm_split_rs")},
}


def refuse_yaml(argv: Sequence[str]) -> None:
    """Refuse ``--yaml-cfg``, which makes Megatron's parser throw away all flags, ``--vwn-*`` among them."""
    if any(token.partition("=")[0] == "--yaml-cfg" for token in argv):
        raise VirtualWidthError(
            "--yaml-cfg would replace the --vwn-* flags: give Megatron's flags on the command line."
        )


def refuse_unsupported(args: Args, virtual_width: VirtualWidthConfig | None) -> None:
    """Refuse flags, and models and layouts that flags ask for, that cannot run.

    Args:
        args: parsed flags, before Megatron's ``validate_args``.
        virtual_width: None for the ordinary model.

    Raises:
        VirtualWidthError: the sentence of the first rule that applies.
    """
    if pattern_of(args):
        check_pattern(pattern_of(args), args.num_experts)
    for rule in _ALWAYS if virtual_width is None else _ALWAYS + _WITH_VIRTUAL_WIDTH:
        if rule.applies(args):
            raise VirtualWidthError(rule.sentence)
    _refuse_changed(
        args,
        _WITHOUT_EFFECT
        | (_OF_TRANSFORMER_ENGINE if args.transformer_impl == "local" else {})
        | ({} if args.optimizer in MUON else _OF_MUON)
        | ({} if divides_layers(args) else _OF_LAYERS)
        | ({} if args.optimizer in MUON and args.muon_scalar_optimizer == "lion" else _OF_LION)
        | (_OF_REFUSED_FLAGS if virtual_width is not None else {}),
    )
    check_experts(_stages(args), args.moe_router_load_balancing_type, args.moe_aux_loss_coeff, args.moe_z_loss_coeff)
    if virtual_width is None or args.hidden_size is None:  # a missing --hidden-size is Megatron's to refuse
        return
    virtual_width.check_model(
        hidden_size=args.hidden_size, tied_embeddings=not args.untie_embeddings_and_output_weights
    )
    virtual_width.check_parallel(
        hidden_size=args.hidden_size,
        tensor_parallel_size=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )


def _refuse_changed(args: Args, table: _Patterns) -> None:
    """Refuse the first argument of the table's patterns that has not its default."""
    defaults = megatron_defaults()
    for reason, patterns in table.items():
        for name, value in vars(args).items():
            if name in defaults and value != defaults[name] and any(fnmatchcase(name, each) for each in patterns):
                raise VirtualWidthError(f"--{_SPELLED_DIFFERENTLY.get(name, name).replace('_', '-')} {reason}")
