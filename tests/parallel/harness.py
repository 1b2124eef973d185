"""One tiny model in any parallel layout: build it, fill it from global tensors, train on one global batch, read it
back.

Everything is compared as GLOBAL tensors under checkpoint names: ``collect`` assembles them from the model's own
sharded_state_dict, so a wrong shard, a replica that differs and a wrong gradient all show.
"""

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training.training import wrap_model_chunks_with_ddp
from parallel.cases import Case, Layout
from parallel.gated_delta_net import allow_torch_gated_delta_net

from megatron_vwn.modules.model import VirtualWidthModel
from megatron_vwn.modules.specs import stack_spec
from megatron_vwn.modules.vocabulary import leave_out_padding
from megatron_vwn.parallel.pipeline import WideP2PCommunicator

# A rank that failed leaves the others waiting in a collective: not for longer than this.
TIMEOUT = timedelta(minutes=1)
BACKEND = "gloo"
VOCABULARY, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 96, 16, 2, 4


class Different(AssertionError):
    """A comparison failed, on all ranks alike: compared is what every rank has after the last collective."""


def expect(condition: object, message: object) -> None:
    """Raise Different unless the condition holds."""
    if not condition:
        raise Different(message)


@dataclass
class Session:
    """A built model with its layout."""

    layout: Layout
    case: Case
    config: TransformerConfig
    chunks: list
    groups: ProcessGroupCollection

    @property
    def models(self) -> list:
        """The chunks without their DDP wrapper."""
        return [getattr(chunk, "module", chunk) for chunk in self.chunks]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for model in self.models:
            yield from model.named_parameters()


def transformer_config(layout: Layout, case: Case) -> TransformerConfig:
    moe = "E" in case.pattern
    settings = {
        "num_layers": len(case.pattern.split("/")[0]),
        "mtp_num_layers": case.pattern.count("/") or None,
        "mtp_loss_scaling_factor": 0.3,
        "hidden_size": case.hidden,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Near ln(vocabulary) every model has the same loss and hardly any gradient.
        "init_method_std": 0.2,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": torch.float32,
        # Batched p2p is silently wrong in Megatron with two interleaved stages.
        "batch_p2p_comm": layout.vpp is None,
        "overlap_p2p_comm": layout.vpp is not None,
        "calculate_per_token_loss": True,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "deallocate_pipeline_outputs": True,
    }
    if moe:
        settings |= {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 24,
            "moe_router_topk": 2,
            "moe_aux_loss_coeff": 0.01,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_token_dispatcher_type": "alltoall",
            "moe_shared_expert_intermediate_size": 24,
        }
    if latent := "+" in case.pattern:
        settings |= {
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 6,
            "qk_layernorm": True,
            "rope_type": "rope",
        }
    if "G" in case.pattern:
        allow_torch_gated_delta_net()
        settings |= {
            "deterministic_mode": True,
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
    settings |= {key: value for key, value in case.overrides if not key.startswith("_")}
    if settings.get("bf16"):
        settings |= {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return (MLATransformerConfig if latent else TransformerConfig)(**settings)


@cache
def _store() -> torch.distributed.Store:
    """The store of this torchrun session."""
    return next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))[0]


_groups_of: tuple = ()
_generation = itertools.count()


def initialize_groups(layout: Layout) -> None:
    """Megatron's process groups of this layout. Groups of another are really destroyed: each gloo group keeps
    threads."""
    global _groups_of
    wanted = (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.etp)
    if wanted == _groups_of:
        return
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # The store still knows where the ranks of groups of the same name were listening: a new prefix forgets it.
    torch.distributed.init_process_group(
        BACKEND,
        store=torch.distributed.PrefixStore(f"layout{next(_generation)}", _store()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=TIMEOUT.seconds // 60,
    )
    _groups_of = wanted


def build(layout: Layout, case: Case, seed: int = 1, *, by_layers: bool = False) -> Session:
    """The model of this rank, wrapped for data parallelism unless the layout stands alone.

    Args:
        layout: parallel sizes.
        case: the model.
        seed: of its parameters.
        by_layers: in buffers of which each data-parallel rank has whole matrices, as training with dist_muon wraps it.
    """
    initialize_groups(layout)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    config = transformer_config(layout, case)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        arguments = {
            "vocab_size": dict(case.overrides).get("_rows", VOCABULARY),
            "max_sequence_length": SEQUENCE,
            "hybrid_layer_pattern": cut(case.pattern, layout.pp * (layout.vpp or 1)),
            "pre_process": parallel_state.is_pipeline_first_stage(**where),
            "post_process": parallel_state.is_pipeline_last_stage(**where),
            "position_embedding_type": dict(case.overrides).get("_position_embedding_type", "rope"),
            "share_embeddings_and_output_weights": "_share_embeddings_and_output_weights" in dict(case.overrides),
            "pg_collection": groups,
            "vp_stage": vp_stage,
        }
        spec = stack_spec(case.virtual_width, config)
        if case.virtual_width is None:
            model = HybridModel(config, spec, **arguments)
        else:
            model = VirtualWidthModel(config, spec, virtual_width=case.virtual_width, **arguments)
        if (tokens := dict(case.overrides).get("_tokens")) is not None:
            leave_out_padding(model, tokens)
        if config.bf16:
            model.bfloat16()
        chunks.append(model.cuda())
    if not layout.alone:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer
        )
        if by_layers:
            chunks = wrap_model_chunks_with_ddp(
                chunks, config, ddp, use_layer_wise_distributed_optimizer=True, pg_collection=groups
            )
        else:
            chunks = [DistributedDataParallel(config, ddp, chunk, pg_collection=groups) for chunk in chunks]
        config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    return Session(layout, case, config, chunks, groups)


def cut(pattern: str, stages: int) -> str:
    """Stage marks at equal distances in the trunk's pattern."""
    trunk, *further = pattern.split("/")
    length = len(trunk) // stages
    return "/".join(["|".join(trunk[i : i + length] for i in range(0, len(trunk), length)), *further])


# ---------------------------------------------------------------------------------------------- global tensors


def sharded_tensors(session: Session) -> Iterator[ShardedTensor]:
    for model in session.models:
        state = model.sharded_state_dict(prefix="", metadata={"dp_cp_group": session.groups.dp_cp})
        apply_factories(state)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                yield value


def region(shard: ShardedTensor) -> tuple[slice, ...]:
    """Where the shard lies in its global tensor, for the axes that the local tensor has."""
    spans = [slice(o, o + s) for o, s in zip(shard.global_offset, local_shape(shard), strict=True)]
    return tuple(spans)


def local_shape(shard: ShardedTensor) -> tuple[int, ...]:
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def load_globals(session: Session, tensors: dict[str, torch.Tensor]) -> None:
    """Fill every parameter from global tensors; each must be there."""
    with torch.no_grad():
        for shard in sharded_tensors(session):
            shard.data.copy_(tensors[shard.key][region(shard)].view(shard.data.shape))


@contextmanager
def holding(session: Session, replacement: dict[int, torch.Tensor]) -> Iterator[None]:
    """Parameters hold other tensors, by id of the parameter."""
    kept = [(p, p.data) for _, p in session.parameters()]
    try:
        for p, data in kept:
            p.data = replacement[id(p)].view(data.shape)
        yield
    finally:
        for p, data in kept:
            p.data = data


def collect(session: Session, what: str = "parameters") -> tuple[dict[str, torch.Tensor], list[str]]:
    """Global tensors on every rank, and the names of those whose replicas are not bitwise equal.

    Args:
        session: the model.
        what: "parameters" or "gradients".
    """
    if what == "gradients":
        if session.layout.distributed_optimizer:
            complete_gradients(session)
        with holding(session, {id(p): gradient(p) for _, p in session.parameters()}):
            local = local_tensors(session)
    else:
        local = local_tensors(session)
    if session.layout.alone:
        everyone = [local]
    else:
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, local)
    tensors, seen, unequal = {}, {}, set()
    for key, shape, where, data in (entry for rank in everyone for entry in rank):
        if key not in tensors:
            tensors[key] = torch.full(shape, math.nan, dtype=torch.float64)
        spot = (key, tuple((s.start, s.stop) for s in where))
        if spot in seen and not torch.equal(seen[spot], data):
            unequal.add(key)
        seen[spot] = data
        tensors[key][where] = data.double().view(tensors[key][where].shape)
    for key, tensor in tensors.items():
        expect(not tensor.isnan().any(), f"{key}: the ranks' shards leave holes, or a value is NaN")
    return tensors, sorted(unequal)


def local_tensors(session: Session) -> list[tuple]:
    """Name, global shape, place and values of every shard of this rank."""
    return [
        (shard.key, tuple(shard.global_shape), region(shard), shard.data.detach().clone().cpu())
        for shard in sharded_tensors(session)
    ]


def complete_gradients(session: Session) -> None:
    """With the distributed optimizer each data-parallel rank has reduced only its shard of every bucket: gather
    them."""
    for chunk in session.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            for bucket in buffer.buckets:
                group = buffer.data_parallel_group
                shards = list(bucket.grad_data.chunk(group.size()))
                torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if getattr(parameter, "main_grad", None) is not None:
        return parameter.main_grad.clone()
    assert parameter.grad is not None, "a parameter has no gradient"
    return parameter.grad.clone()


def perturb(session: Session, std: float = 0.1, seed: int = 3) -> None:
    """Move every VWN parameter away from initialisation; only for a model that stands alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(session.parameters()):
        if is_virtual_width(name):
            # W_expand and W_reduce are divided by the square root of what they sum over.
            divided = name.endswith(("expansion.weight", "reduction.weight"))
            p.data.add_(
                std * (session.case.hidden if divided else 1) * torch.randn(p.shape, generator=generator).to(p.device)
            )


def is_virtual_width(key: str) -> bool:
    return any(part in key for part in ("connection.", "expansion.", "reduction.", "fusion.", "ngram_"))


# ---------------------------------------------------------------------------------------------- training


def micro_batches(session: Session, step: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of a global batch that is the same for every layout."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (MICRO_BATCHES, MICRO_BATCH, SEQUENCE + 1), generator=generator)
    rank, size = (0, 1) if session.layout.alone else (session.groups.dp.rank(), session.groups.dp.size())
    for batch in tokens[rank::size]:
        position = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
        data = {"tokens": batch[:, :-1], "labels": batch[:, 1:], "position_ids": position}
        # Read by further predictions only. Megatron divides their loss by the tokens of each context-parallel rank;
        # these two gaps give every rank, and one alone, as many tokens before as after the shift to the next label.
        data["loss_mask"] = ((position != 0) & (position != 5)).float()
        yield {key: context_parallel_part(value, session).cuda() for key, value in data.items()}


def context_parallel_part(tensor_bs: torch.Tensor, session: Session) -> torch.Tensor:
    """Megatron's split for causal balance: of 2 CP chunks, rank i has chunks i and 2 CP - 1 - i."""
    if session.layout.alone or session.layout.cp == 1:
        return tensor_bs.contiguous()
    rank, chunks = session.groups.cp.rank(), tensor_bs.chunk(2 * session.layout.cp, dim=1)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim=1)


def _loss(output_bs: torch.Tensor):
    total, count = output_bs.float().sum(), torch.tensor(output_bs.numel(), dtype=torch.int, device=output_bs.device)
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}


def causal_mask() -> torch.Tensor:
    """Megatron's: True where a token must not look."""
    return torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1).cuda()


def _forward_step(iterator, model):
    batch = next(iterator)
    output = model(
        batch["tokens"], batch["position_ids"], causal_mask(), labels=batch["labels"], loss_mask=batch["loss_mask"]
    )
    return output, _loss


def forward_backward(session: Session, step: int = 0) -> float:
    """One global batch, gradients finalised; the mean loss per token, the same number on every rank."""
    for chunk in session.chunks:
        if session.layout.alone:
            chunk.zero_grad(set_to_none=True)
        else:
            chunk.zero_grad_buffer()
    batches = list(micro_batches(session, step))
    iterators = [iter(batches) for _ in session.chunks]
    arguments = {}
    if session.layout.pp > 1:
        communicator = WideP2PCommunicator(session.groups.pp, session.config, session.case.virtual_width)
        arguments = {"pg_collection": session.groups, "p2p_communicator": communicator}
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if session.layout.vpp else iterators[0],
        model=session.chunks if session.layout.vpp else session.chunks[0],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
        **arguments,
    )
    total = sum((entry["loss"].double() for entry in losses), torch.zeros(2, dtype=torch.float64).cuda())
    if session.layout.alone:
        # What Megatron's finalize_model_grads does with the token count when there is something to reduce.
        for _, p in session.parameters():
            p.grad.div_(total[1].item())
    else:
        # Tensor-parallel ranks all hold the same sum: count it once.
        if session.groups.tp.rank() != 0:
            total.zero_()
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def further_losses(session: Session) -> list[float]:
    """The mean loss of each further prediction in the last ``forward_backward``, the same numbers on every rank."""
    sums = torch.zeros(session.config.mtp_num_layers, dtype=torch.float64)
    tracker = MTPLossLoggingHelper.tracker
    if "loss_values" in tracker:
        sums += tracker["loss_values"].double().cpu() / (1 if session.layout.alone else session.groups.tp.size())
        tracker.clear()
    if not session.layout.alone:
        torch.distributed.all_reduce(sums)
    # One entry per micro-batch and context-parallel rank, each a mean over its own tokens.
    return (sums / (MICRO_BATCHES * session.layout.cp)).tolist()


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over norm, per tensor; the names must agree."""
    expect(actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys()))
    return {
        key: ((actual[key] - expected[key]).norm() / expected[key].norm().clamp_min(1e-12)).item() for key in expected
    }
