"""Any rank's model of a run on any number of GPUs, built on the meta device in one process within seconds.

The command line goes through the parser, the refusals and the builder that training uses, and Megatron makes all its
process groups, over torch's fake backend: nothing is communicated and nothing is allocated, but what is built is what
that rank would hold. Where there is no GPU call ``megatron_vwn.cpu.install()`` before importing this module.

    with simulated_world(flags, world_size=1024) as world:
        total = world.count()
        last = world.build(1023)
"""

import argparse
import io
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import dataclass
from functools import cache

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.dist_utils import build_virtual_pipeline_stages
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes
from megatron_vwn.training.model import VirtualWidthModelBuilder, VirtualWidthModelConfig, model_config_from_args
from megatron_vwn.training.run import Run


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one tensor of the checkpoint; ranks that hold the same have equal shards.

    Attributes:
        key: the tensor's name in a checkpoint, the same in every layout.
        global_shape: its shape there; experts have an axis of their own in front.
        offset: where the shard begins in it.
        shape: the shard's shape, in as many axes.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """Numbers of parameters of a whole model; a shared or replicated parameter counts once.

    Attributes:
        total: all of them.
        mtp: those of the layers that predict further tokens, without the embedding and head that they share.
        experts: routed experts of the trunk.
        embedding: the over-width embedding, W_expand included.
        head: the output layer.
        active_experts: of ``experts``, those that one token is routed to.
    """

    total: int
    mtp: int
    experts: int
    embedding: int
    head: int
    active_experts: int

    @property
    def trunk(self) -> int:
        """What a model is usually named by: embedding and head included, further predictions not."""
        return self.total - self.mtp

    @property
    def active(self) -> int:
        """The part of ``trunk`` that one token meets: all but the experts that it is not routed to."""
        return self.trunk - self.experts + self.active_experts


@dataclass(frozen=True)
class SimulatedRank:
    """One rank's model.

    Attributes:
        rank: in the whole world.
        tensor, pipeline, expert, data: its coordinates.
        chunks: one model per virtual pipeline stage, on the meta device.
    """

    rank: int
    tensor: int
    pipeline: int
    expert: int
    data: int
    chunks: tuple[HybridModel, ...]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, which repeat where there are several chunks, and parameters.

        Expert parameters have ``allreduce`` False; those split over tensor-parallel ranks ``tensor_model_parallel``.
        """
        for chunk in self.chunks:
            yield from chunk.named_parameters()

    def shards(self) -> list[Shard]:
        """The shards of all tensors that this rank would save, buffers included."""
        groups = ProcessGroupCollection.use_mpu_process_groups()
        shards = []
        for chunk in self.chunks:
            state = chunk.sharded_state_dict(prefix="", metadata={"dp_cp_group": groups.dp_cp})
            apply_factories(state)
            for tensor in nested_values(state):
                if isinstance(tensor, ShardedTensor):
                    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
                    shards.append(Shard(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), shape))
        return shards


class SimulatedWorld:
    """A run's arguments, and its ranks' models on demand; one is built at a time.

    Attributes:
        args: Megatron's, validated, as every rank of the run would have them.
        virtual_width: None for the ordinary model.
        model_config: what the models are built from.
        world_size: number of ranks.
    """

    def __init__(self, args: argparse.Namespace, virtual_width: VirtualWidthConfig | None):
        self.args = args
        self.virtual_width = virtual_width
        self.model_config: VirtualWidthModelConfig = model_config_from_args(args, virtual_width)
        self.world_size: int = args.world_size

    def build(self, rank: int) -> SimulatedRank:
        """The model of one rank; its process groups are Megatron's global ones until the next call.

        Raises:
            VirtualWidthError: Megatron or the virtual width refuses to build it.
        """
        _join(self.args, rank)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        # Nothing is drawn on the meta device, and calling what would draw takes longer than all the rest.
        undrawn = copy(self.model_config)
        undrawn.transformer = copy(undrawn.transformer)
        undrawn.transformer.perform_initialization = False
        builder = VirtualWidthModelBuilder(undrawn)
        with _quietly(), torch.device("meta"):
            chunks = build_virtual_pipeline_stages(
                builder.build_model, groups, self.model_config.transformer.virtual_pipeline_model_parallel_size
            )
        return SimulatedRank(
            rank,
            tensor=parallel_state.get_tensor_model_parallel_rank(),
            pipeline=parallel_state.get_pipeline_model_parallel_rank(),
            expert=parallel_state.get_expert_model_parallel_rank(),
            data=parallel_state.get_data_parallel_rank(),
            chunks=tuple(chunks),
        )

    def stage_ranks(self) -> list[int]:
        """The first rank of every pipeline stage."""
        stages = self.args.pipeline_model_parallel_size
        if self.args.use_tp_pp_dp_mapping:
            width = self.args.tensor_model_parallel_size * self.args.context_parallel_size
        else:
            width = self.world_size // stages
        return [stage * width for stage in range(stages)]

    def distinct_ranks(self) -> list[int]:
        """Ranks that together hold everything, as few as that takes.

        Within a pipeline stage ranks are numbered along tensor parallelism first, and the experts' grid is numbered
        along expert tensor, then expert parallelism: so the first max(TP, ETP EP) ranks of a stage have every
        tensor-parallel and every expert coordinate, and all further ones are data-parallel copies of them.
        """
        if self.args.use_tp_pp_dp_mapping:
            raise VirtualWidthError("--use-tp-pp-dp-mapping numbers ranks otherwise than is simulated here: drop it.")
        experts = self.args.expert_tensor_parallel_size * self.args.expert_model_parallel_size
        several = max(self.args.tensor_model_parallel_size, experts)
        return [first + each for first in self.stage_ranks() for each in range(several)]

    def count(self) -> Count:
        """The parameters of the whole model, exactly, from one rank of every pipeline stage.

        One rank suffices because every shard states the shape of the whole tensor.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for rank in self.stage_ranks():
            built = self.build(rank)
            trained = sum(parameter.numel() for _, parameter in built.parameters())
            shards = [shard for shard in built.shards() if not _is_buffer(shard.key)]
            if trained != sum(math.prod(shard.shape) for shard in shards):
                raise RuntimeError(f"rank {rank} would not save exactly its parameters")
            shapes |= {shard.key: shard.global_shape for shard in shards}
        sums: defaultdict[str, int] = defaultdict(int)
        for key, shape in shapes.items():
            sums[_kind(key)] += math.prod(shape)
        chosen, offered = self.args.moe_router_topk, self.args.num_experts or 1
        return Count(
            total=sum(sums.values()),
            mtp=sums["mtp"],
            experts=sums["experts"],
            embedding=sums["embedding"],
            head=sums["head"],
            active_experts=sums["experts"] * chosen // offered,
        )


@contextmanager
def simulated_world(argv: Sequence[str], world_size: int) -> Iterator[SimulatedWorld]:
    """Parse a run's command line as one rank of ``world_size`` would, without data, checkpoints or a tokenizer.

    Layers are Megatron's local ones: those of Transformer Engine have the same parameters, but want a GPU.

    Args:
        argv: the flags of ``megatron_vwn.training.pretrain``; the vocabulary must be given by --padded-vocab-size or
            --vocab-size. Flags that need Transformer Engine are refused.
        world_size: GPUs of the run.

    Yields:
        The world; its process groups are gone afterwards.

    Raises:
        VirtualWidthError: the command line cannot be run.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("this process belongs to a real run already")
    surroundings = dict(os.environ), list(sys.argv)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    try:
        run = _checked(argv)
        yield SimulatedWorld(run.args, run.virtual_width)
    finally:
        _leave()
        os.environ.clear()
        os.environ.update(surroundings[0])
        sys.argv[:] = surroundings[1]


# Looks through Megatron's sources each time.
_fix_once = cache(apply_fixes)


def _checked(argv: Sequence[str]) -> Run:
    _fix_once()
    run = Run.parse(argv, gpu=False, simulated=True)
    with _quietly():
        run.check()
    if run.args.padded_vocab_size is None and run.args.vocab_size is None:
        raise VirtualWidthError("the size of the vocabulary is not known without a tokenizer: add --padded-vocab-size.")
    return run


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what Megatron prints and logs for every rank."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _join(args: argparse.Namespace, rank: int) -> None:
    """Become one rank: process groups as ``megatron.training.initialize`` makes them, over the fake backend."""
    _leave()
    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)


def _leave() -> None:
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _is_buffer(key: str) -> bool:
    """Whether a saved tensor is no parameter: the bias of routers that balance without a loss, rotary frequencies."""
    return key.rsplit(".", 1)[-1] in ("expert_bias", "local_tokens_per_expert", "inv_freq")


def _kind(key: str) -> str:
    if key.startswith("mtp."):
        return "mtp"
    if key.startswith("embedding."):
        return "embedding"
    if key.startswith("output_layer."):
        return "head"
    return "experts" if ".experts." in key else "rest"
