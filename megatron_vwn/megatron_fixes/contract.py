"""Every name beyond a public interface that this package calls, overrides, replaces or reads.

``USES`` is the whole table. ``check_contract`` compares its Megatron part with the installed Megatron at every start;
tests compare all of it with all that is installed, and refuse a private name in the package that has no entry here.
Importing this file imports nothing foreign.
"""

import inspect
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import EllipsisType
from typing import NamedTuple

from megatron_vwn.config import VirtualWidthError

ADVICE = {
    "megatron": "install megatron-core 0.19.2",
    "torch": "install torch 2.11",
    "triton": "install triton 3.6",
    "transformers": "install the transformers of constraints.txt",
}
_DISTRIBUTIONS = {"megatron": "megatron-core"}
ATTRIBUTE = "attribute"  # set on instances: named in the source of its owner
PRESENT = "present"  # anything


class Use(NamedTuple):
    """One foreign name.

    Attributes:
        owner: dotted path of the module or class that has it.
        name: the name in it.
        expected: its parameters, an ellipsis for any that follow; or ATTRIBUTE, PRESENT, or the name of its type.
        file: who depends on it, below ``megatron_vwn``; its first part is the room.
        how: call, override, replace or read.
    """

    owner: str
    name: str
    expected: tuple[str | EllipsisType, ...] | str
    file: str
    how: str

    @property
    def package(self) -> str:
        """The package that has the name."""
        return self.owner.partition(".")[0]

    @property
    def room(self) -> str:
        """The room of this package that depends on it."""
        return self.file.partition("/")[0]


_CORE = "megatron.core."
_OPTIMIZER = _CORE + "optimizer.distrib_optimizer.DistributedOptimizer"
_CHAIN = _CORE + "optimizer.optimizer.ChainedOptimizer"
_HYBRID = _CORE + "models.hybrid.hybrid_model"
_LAYER = _CORE + "transformer.transformer_layer."
_MTP = _CORE + "transformer.multi_token_prediction."
_ADAM, _RESHARDING = "megatron_fixes/torch_adam.py", "megatron_fixes/resharding.py"
_INTERPRETER = "ops/kernels/interpreter.py"
_SHARDED = ("self", "prefix", "sharded_offsets", "metadata")
_TOKENS = ("self", "input_ids", "position_ids")

USES = (
    # What is repaired.
    Use(_CORE + "datasets.utils", "compile_helpers", (), "megatron_fixes/dataset_helpers.py", "replace"),
    Use(_CORE + "optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", "bool", _ADAM, "read"),
    Use(
        _CORE + "datasets.gpt_dataset.GPTDataset",
        "__init__",
        ("self", "indexed_dataset", "dataset_path", ...),
        "megatron_fixes/sample_index.py",
        "replace",
    ),
    Use(_OPTIMIZER, "state_dict", ("self",), _ADAM, "replace"),
    Use(_OPTIMIZER, "load_state_dict", ("self", "state_dict"), _ADAM, "replace"),
    Use(_OPTIMIZER, "_set_main_param_and_optimizer_states", ("self", "model_param", "tensors"), _ADAM, "replace"),
    Use(_OPTIMIZER, "optimizer_state_keys", ATTRIBUTE, _ADAM, "read"),
    Use(
        _OPTIMIZER,
        "sharded_param_state_fully_reshardable",
        ("self", "model_sharded_state_dict", "is_loading", "metadata"),
        _RESHARDING,
        "replace",
    ),
    Use(
        _OPTIMIZER,
        "get_parameter_state_dp_zero",
        ("self", "use_gloo_comm", "empty_data", "return_on_all_ranks"),
        _RESHARDING,
        "replace",
    ),
    Use(_CORE + "distributed.param_and_grad_buffer", "_ParamAndGradBuffer", "type", _RESHARDING, "read"),
    Use(_CORE + "distributed.param_and_grad_buffer._ParamAndGradBuffer", "buckets", ATTRIBUTE, _RESHARDING, "read"),
    Use(
        _CORE + "optimizer.optimizer.ChainedOptimizer",
        "load_state_dict",
        ("self", "state_dict"),
        _RESHARDING,
        "replace",
    ),
    Use(
        _CORE + "optimizer.optimizer.MegatronOptimizer",
        "_filter_and_reorder_param_groups",
        ("current_groups", "state_dict_groups"),
        "megatron_fixes/param_groups.py",
        "replace",
    ),
    Use(_OPTIMIZER, "load_state_dict", ("self", "state_dict"), "megatron_fixes/param_groups.py", "replace"),
    Use(
        _CORE + "optimizer.optimizer", "param_group_identifier_keys", "tuple", "megatron_fixes/param_groups.py", "read"
    ),
    Use(_CHAIN, "chained_optimizers", ATTRIBUTE, _RESHARDING, "read"),
    Use("torch.distributed.checkpoint.filesystem", "pickle", "module", "megatron_fixes/pickles.py", "replace"),
    Use(
        "torch.distributed.checkpoint.DefaultLoadPlanner",
        "load_bytes",
        ("self", "read_item", "value"),
        "megatron_fixes/pickles.py",
        "replace",
    ),
    Use(
        _CORE + "dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        ("mp_mode",),
        "megatron_fixes/children.py",
        "replace",
    ),
    Use(
        _CORE + "dist_checkpointing.strategies.filesystem_async",
        "_results_queue",
        PRESENT,
        "megatron_fixes/children.py",
        "replace",
    ),
    Use(
        _CORE + "dist_checkpointing.strategies.async_utils.PersistentAsyncCaller",
        "async_loop",
        ("rank", "queue", "preload_q", "comp_q", ...),
        "megatron_fixes/children.py",
        "replace",
    ),
    Use(
        _CORE + "dist_checkpointing.strategies.torch",
        "_get_filesystem_reader",
        ("checkpoint_dir", ...),
        "megatron_fixes/extra_states.py",
        "call",
    ),
    Use("megatron.training.checkpointing", "maybe_msc", PRESENT, "megatron_fixes/tracker.py", "replace"),
    # What the model replaces and overrides.
    Use(_HYBRID, "LanguageModelEmbedding", "type", "modules/model.py", "replace"),
    Use(_HYBRID, "MultiTokenPredictionBlock", "type", "modules/model.py", "replace"),
    Use(
        _HYBRID + ".HybridModel",
        "forward",
        (*_TOKENS, "attention_mask", "decoder_input", "labels", "inference_context", ...),
        "modules/model.py",
        "override",
    ),
    Use(_HYBRID + ".HybridModel", "mtp_process", ATTRIBUTE, "modules/model.py", "read"),
    Use(
        _CORE + "models.common.language_module.language_module.LanguageModule",
        "compute_language_model_loss",
        ("self", "labels", "logits"),
        "modules/vocabulary.py",
        "replace",
    ),
    Use(
        _CORE + "models.hybrid.hybrid_block.HybridStack",
        "forward",
        ("self", "hidden_states", "attention_mask", ...),
        "modules/stack.py",
        "override",
    ),
    Use(
        _CORE + "models.common.embeddings.language_model_embedding.LanguageModelEmbedding",
        "forward",
        (*_TOKENS, "tokentype_ids"),
        "modules/embedding.py",
        "override",
    ),
    Use(
        _CORE + "tensor_parallel.layers.VocabParallelEmbedding",
        "forward",
        ("self", "input_"),
        "modules/ngram_embedding.py",
        "override",
    ),
    Use(
        _CORE + "tensor_parallel.layers.VocabParallelEmbedding",
        "sharded_state_dict",
        _SHARDED,
        "modules/ngram_embedding.py",
        "override",
    ),
    Use(
        _CORE + "transformer.module.MegatronModule",
        "sharded_state_dict",
        _SHARDED,
        "modules/stream_module.py",
        "override",
    ),
    Use(
        _CORE + "transformer.torch_norm.WrappedTorchNorm",
        "__new__",
        ("cls", "config", "hidden_size", "eps", ...),
        "modules/norm.py",
        "override",
    ),
    Use(
        _CORE + "transformer.multi_latent_attention.MLASelfAttention",
        "_qkv_down_projection",
        ("self", "hidden_states"),
        "modules/latent_attention.py",
        "override",
    ),
    Use(
        _MTP + "MultiTokenPredictionLayer",
        "_concat_embeddings",
        ("self", "hidden_states", "decoder_input"),
        "modules/multi_token_prediction.py",
        "override",
    ),
    Use(
        _MTP + "MultiTokenPredictionLayer",
        "_postprocess",
        ("self", "hidden_states"),
        "modules/multi_token_prediction.py",
        "override",
    ),
    Use(
        _MTP + "MultiTokenPredictionLayer",
        "forward",
        (*_TOKENS, "hidden_states", "attention_mask", ...),
        "modules/multi_token_prediction.py",
        "override",
    ),
    Use(
        _MTP + "MultiTokenPredictionBlock",
        "forward",
        (*_TOKENS, "hidden_states", "attention_mask", ...),
        "modules/multi_token_prediction.py",
        "override",
    ),
    Use(
        _CORE + "pipeline_parallel.p2p_communication.P2PCommunicator",
        "_communicate",
        ("self", "tensor_send_next", "tensor_send_prev", "recv_prev", "recv_next", "tensor_shape", ...),
        "parallel/pipeline.py",
        "override",
    ),
    Use(_LAYER + "TransformerLayer", "forward", ("self", ...), "modules/layers.py", "override"),
    Use(_LAYER + "MoETransformerLayer", "forward", ("self", ...), "modules/layers.py", "override"),
    Use(_CORE + "ssm.mlp_layer.MLPLayer", "forward", ("self", ...), "modules/layers.py", "override"),
    Use(
        _CORE + "ssm.mamba_layer.MambaLayer",
        "forward",
        ("self", "hidden_states", ...),
        "modules/layers.py",
        "override",
    ),
    Use(
        _CORE + "optimizer.layer_wise_optimizer",
        "is_managed_by_layer_wise_optimizer",
        ("param",),
        "modules/muon.py",
        "replace",
    ),
    Use(_CORE + "optimizer.emerging_optimizers", "_EMERGING_OPTIMIZERS", "dict", "modules/muon.py", "replace"),
    Use(
        _CORE + "optimizer.emerging_optimizers.TensorParallelMuon",
        "orthogonalize",
        ("self", "p", "grad", "kwargs"),
        "modules/muon.py",
        "override",
    ),
    # What runs and checkpoints call.
    Use(
        _CORE + "model_parallel_config.ModelParallelConfig",
        "finalize_model_grads_func",
        PRESENT,
        "training/monitoring/monitor.py",
        "replace",
    ),
    Use(
        "megatron.training.initialize",
        "_initialize_distributed",
        ("get_embedding_ranks", "get_position_embedding_ranks", "store", ...),
        "training/run.py",
        "call",
    ),
    Use(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        ("load_dir", "args", "rank0", "sharded_state_dict", ...),
        "training/refusals/checkpoint.py",
        "call",
    ),
    Use(
        "megatron.training.models.hybrid.HybridModelBuilder",
        "build_model",
        ("self", "pg_collection", "pre_process", "post_process", "vp_stage"),
        "training/model.py",
        "override",
    ),
    Use(
        _CORE + "transformer.moe.router.TopKRouter",
        "_maintain_float32_expert_bias",
        ("self",),
        "checkpoint/verify.py",
        "call",
    ),
    Use(_CORE + "datasets.gpt_dataset.GPTDataset", "_pad_token_id", ATTRIBUTE, "data/dali.py", "read"),
    Use(
        _CORE + "dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        ("mp_mode",),
        "cpu/checkpoint_writer.py",
        "replace",
    ),
    # torch, as the CPU emulation replaces it.
    Use("torch.autograd", "_engine_run_backward", ("t_outputs", "args", "kwargs"), "cpu/tensors.py", "replace"),
    Use("torch", "Generator", "type", "cpu/tensors.py", "replace"),
    Use("torch", "autocast", ("device_type", "dtype", "enabled", "cache_enabled"), "cpu/tensors.py", "replace"),
    Use("torch", "is_autocast_enabled", PRESENT, "cpu/tensors.py", "replace"),
    Use("torch", "get_autocast_dtype", PRESENT, "cpu/tensors.py", "replace"),
    Use("torch.Tensor", "record_stream", PRESENT, "cpu/tensors.py", "replace"),
    Use("torch.cuda", "default_generators", "tuple", "cpu/rng.py", "replace"),
    Use("torch.utils.data.dataloader", "_BaseDataLoaderIter", "type", "cpu/rng.py", "read"),
    Use("torch.utils.data.dataloader._BaseDataLoaderIter", "__init__", ("self", "loader"), "cpu/rng.py", "replace"),
    Use("torch.cuda", "memory_stats", PRESENT, "cpu/runtime.py", "replace"),
    Use("torch.cuda", "stream", PRESENT, "cpu/runtime.py", "replace"),
    Use("torch.cuda", "device", PRESENT, "cpu/runtime.py", "replace"),
    Use("torch.cuda.nvtx", "range", PRESENT, "cpu/runtime.py", "replace"),
    Use("torch.accelerator", "is_available", (), "cpu/runtime.py", "replace"),
    Use("torch", "_dynamo", "module", "cpu/__init__.py", "read"),
    Use("torch._dynamo.config", "disable", "bool", "cpu/__init__.py", "replace"),
    Use(
        "torch.distributed",
        "all_to_all_single",
        ("output", "input", "output_split_sizes", "input_split_sizes", "group", "async_op"),
        "cpu/gloo.py",
        "replace",
    ),
    Use("torch.distributed", "all_gather", ("tensor_list", "tensor", "group", "async_op"), "cpu/gloo.py", "replace"),
    Use("torch.distributed", "ProcessGroupGloo", PRESENT, "cpu/gloo.py", "replace"),
    Use("torch.distributed.ProcessGroupGloo", "_Options", PRESENT, "cpu/gloo.py", "call"),
    Use("torch.distributed.ProcessGroupGloo._Options", "_devices", PRESENT, "cpu/gloo.py", "replace"),
    Use("torch.distributed.ProcessGroupGloo._Options", "_timeout", PRESENT, "cpu/gloo.py", "replace"),
    # torch, elsewhere.
    Use("torch.Tensor", "_version", PRESENT, "modules/recompute.py", "read"),
    Use("torch.Tensor", "_base", PRESENT, "checkpoint/folders.py", "read"),
    Use("torch.UntypedStorage", "_cdata", PRESENT, "benchmark/memory.py", "read"),
    Use("torch.utils._python_dispatch", "TorchDispatchMode", "type", "benchmark/memory.py", "override"),
    Use("torch.utils._python_dispatch", "TorchDispatchMode", "type", "benchmark/prediction/predict.py", "override"),
    Use("torch.utils._pytree", "tree_leaves", ("tree", "is_leaf"), "benchmark/memory.py", "call"),
    Use("torch.utils._pytree", "tree_leaves", ("tree", "is_leaf"), "benchmark/prediction/predict.py", "call"),
    Use("torch.cuda", "_sleep", ("cycles",), "benchmark/timing.py", "call"),
    Use("torch.testing._internal.distributed.fake_pg", "FakeStore", PRESENT, "planner/simulated_world.py", "call"),
    Use(
        "torch.distributed.checkpoint.FileSystemReader",
        "read_metadata",
        ("self", "args", "kwargs"),
        "checkpoint/torch_dist.py",
        "override",
    ),
    Use(
        "torch.distributed.checkpoint.DefaultSavePlanner",
        "resolve_data",
        ("self", "write_item"),
        "checkpoint/torch_dist.py",
        "override",
    ),
    # triton.
    Use("triton", "knobs", "module", "ops/kernels/launch.py", "read"),
    Use("triton.runtime.interpreter", "_patch_lang_tensor", ("tensor", "scope"), _INTERPRETER, "replace"),
    Use(
        "triton.runtime.interpreter",
        "_convert_float",
        ("input", "input_dtype", "output_dtype", "rounding_mode"),
        _INTERPRETER,
        "replace",
    ),
    Use(
        "triton.runtime.interpreter.InterpreterBuilder",
        "create_dot",
        ("self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"),
        _INTERPRETER,
        "replace",
    ),
    Use(
        "triton.runtime.jit.JITFunction",
        "run",
        ("self", "args", "grid", "warmup", "kwargs"),
        "benchmark/prediction/compile.py",
        "replace",
    ),
    Use("triton.runtime.driver.driver", "_active", PRESENT, "benchmark/prediction/compile.py", "read"),
    # transformers.
    Use("transformers.PreTrainedModel", "_init_weights", ("self", "module"), "hf/modeling_vwn.py", "override"),
    Use("transformers.PreTrainedConfig", "_attn_implementation", "property", "hf/modeling_vwn.py", "read"),
    Use("transformers.PreTrainedConfig", "__post_init__", ("self", "kwargs"), "hf/configuration_vwn.py", "override"),
    # Transformer Engine, where it is installed.
    Use(
        "transformer_engine.pytorch.fp8.FP8GlobalStateManager",
        "is_first_fp8_module",
        (),
        "modules/fp8_linear.py",
        "call",
    ),
    # Python.
    Use("os", "_exit", ("status",), "data/apart.py", "call"),
    Use("os", "_exit", ("status",), "data/windows.py", "call"),
    Use("argparse.ArgumentParser", "_actions", ATTRIBUTE, "checkpoint/arguments.py", "read"),
    Use("argparse.ArgumentParser", "_actions", ATTRIBUTE, "checkpoint/settings.py", "read"),
    Use("argparse.ArgumentParser", "_actions", ATTRIBUTE, "training/flags/defaults.py", "read"),
)


def check_contract(package: str = "megatron", uses: Iterable[Use] = USES) -> None:
    """Compare what ``uses`` say of ``package`` with the package that is installed.

    Of ``megatron.training``, which megatron-core can be installed without, nothing is asked where it is absent.

    Raises:
        VirtualWidthError: if a name is gone or is another than this package was written for.
    """
    found = [text for use in uses if use.package == package and (text := drift(use))]
    if found:
        raise drifted(" and ".join(found), package)


def drifted(what: str, package: str = "megatron") -> VirtualWidthError:
    """The refusal of a package that is not as expected; it quotes ``what`` is otherwise."""
    distribution = _DISTRIBUTIONS.get(package, package)
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        installed = "(unknown version)"
    advice = ADVICE.get(package, f"install another version of {distribution}")
    return VirtualWidthError(
        f"{distribution} {installed} is not the one that megatron_vwn was written for: {what}; {advice}."
    )


def drift(use: Use) -> str | None:
    """What became of a name, in words; None if it is what is expected."""
    full = f"{use.owner}.{use.name}"
    if use.owner.startswith("megatron.training") and find_spec("megatron.training") is None:
        return None
    try:
        owner = _owner(use.owner)
    except (ImportError, AttributeError):
        return f"{use.owner} is gone"
    if use.expected == ATTRIBUTE:
        return None if hasattr(owner, use.name) or _assigns(owner, use.name) else f"{full} is gone"
    # What a base class has under the name of a replaced method is not what was to be replaced.
    inherited = use.how == "replace" and inspect.isclass(owner) and use.name not in vars(owner)
    if not hasattr(owner, use.name) or (inherited and isinstance(use.expected, tuple)):
        return f"{full} is gone"
    found = getattr(owner, use.name)
    if isinstance(use.expected, tuple):
        parameters = _parameters(found)
        open_ended = bool(use.expected) and use.expected[-1] is ...
        wanted = use.expected[:-1] if open_ended else use.expected
        if parameters is None or (parameters[: len(wanted)] if open_ended else parameters) != wanted:
            takes = "is no function" if parameters is None else f"takes ({', '.join(parameters)})"
            return f"{full} {takes}, not ({', '.join(map(str, wanted))}{', ...' if open_ended else ''})"
    elif use.expected == "type":
        return None if isinstance(found, type) else f"{full} is no class"
    elif use.expected != PRESENT and type(found).__name__ != use.expected:
        return f"{full} is a {type(found).__name__}, not a {use.expected}"
    return None


def _owner(path: str) -> object:
    module, names = path, []
    while True:
        try:
            owner = import_module(module)
            break
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            if not module:
                raise
            names.insert(0, name)
    for name in names:
        owner = getattr(owner, name)
    return owner


def _parameters(function: object) -> tuple[str, ...] | None:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def _assigns(owner: type, name: str) -> bool:
    """Whether a method of the class or of its bases sets ``self.name``."""
    return any(
        f"self.{name}" in inspect.getsource(base) for base in inspect.getmro(owner) if base.__module__ != "builtins"
    )
