"""Squared gradient norms of the virtual width's parameters, over all ranks, before they are clipped.

To be called when Megatron has finished the gradients (``finalize_model_grads``): replicas then agree, tensor-parallel
shards are each complete, and with the distributed optimizer a data-parallel rank has reduced its share of every bucket
and no more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vwn.modules.connection import Connection
from megatron_vwn.modules.embedding import Expansion
from megatron_vwn.modules.multi_token_prediction import Fusion
from megatron_vwn.modules.ngram_embedding import NGramEmbedding
from megatron_vwn.modules.reduction import Reduction
from megatron_vwn.training.monitoring.snapshot import OF_CONNECTIONS, OF_MODULES

_MODULES = dict(zip((Expansion, Reduction, Fusion, NGramEmbedding), OF_MODULES, strict=True))


def squared_norms(
    chunks: Sequence[torch.nn.Module],
    connections: Mapping[object, Connection],
    groups: ProcessGroupCollection,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of squares over data- and tensor-parallel ranks, of this pipeline stage.

    Args:
        chunks: the stage's model chunks in Megatron's data-parallel wrapper.
        connections: the stage's, in the order that the result shall have.
        groups: ``tp`` is used.
        scale: what the loss was multiplied with before the backward pass; None for one.

    Returns:
        [connections, len(OF_CONNECTIONS)] and [len(OF_MODULES)], fp64 on the device.
    """
    device = torch.cuda.current_device()
    row = {id(connection): number for number, connection in enumerate(connections.values())}
    by_connection = torch.zeros(len(row), len(OF_CONNECTIONS), dtype=torch.float64, device=device)
    by_module = torch.zeros(len(OF_MODULES), dtype=torch.float64, device=device)
    group = None
    for chunk in chunks:
        share_of, chunk_group = _shares(chunk)
        group = chunk_group or group
        for module, name, parameter in _parameters(chunk):
            if not param_is_not_tensor_parallel_duplicate(parameter, groups.tp):
                continue
            # In fp64 from the first: a scaled gradient in fp16 has a square that fp16 has not.
            square = torch.linalg.vector_norm(share_of(parameter), dtype=torch.float64).square()
            if isinstance(module, Connection):
                by_connection[row[id(module)], OF_CONNECTIONS.index(name)] += square
            else:
                by_module[OF_MODULES.index(_MODULES[type(module)])] += square
    squares = torch.cat([by_connection.flatten(), by_module])
    for over in (group, groups.tp):
        if over is not None and over.size() > 1:
            torch.distributed.all_reduce(squares, group=over)
    if scale is not None:
        squares /= scale.double().square()
    return squares[: by_connection.numel()].view_as(by_connection), squares[by_connection.numel() :]


def _parameters(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Every trained parameter of a virtual width, with the module that it is counted with and its name there."""
    for module in unwrap_model(chunk).modules():
        if isinstance(module, Connection) or type(module) in _MODULES:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield module, name, parameter


def _shares(
    chunk: torch.nn.Module,
) -> tuple[Callable[[torch.nn.Parameter], Tensor], torch.distributed.ProcessGroup | None]:
    """What of a parameter's gradient this data-parallel rank has to count, and the group whose ranks have the rest."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return lambda parameter: parameter.main_grad, None
    of_parameter = {p: group for group in chunk.bucket_groups for p in group.params}

    def share(parameter: torch.nn.Parameter) -> Tensor:
        bucket_group = of_parameter[parameter]
        bucket = bucket_group.param_to_bucket[parameter]
        size = bucket.grad_data.numel() // bucket_group.intra_distributed_optimizer_instance_size
        begin = bucket_group.intra_distributed_optimizer_instance_rank * size
        start, end = bucket.param_to_index[parameter]
        return bucket.grad_data[max(start, begin) : max(start, begin, min(end, begin + size))]

    group = chunk.bucket_groups[0].intra_distributed_optimizer_instance_group if chunk.bucket_groups else None
    return share, group
