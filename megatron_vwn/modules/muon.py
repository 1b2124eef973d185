"""Which parameters of the stream Muon trains, where it is a run's optimizer.

Muon replaces the gradient of a matrix by the nearest matrix whose singular values are one: the right step for a map
between two spaces of features, whose entries mean nothing alone. Megatron gives it every parameter with two dimensions
that is neither embedding nor head, and gives the others to Adam (``--muon-scalar-optimizer``). That rule stays for the
backbone, so that a baseline and its virtual width train it alike; ``_MUON`` answers for every parameter of the stream.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
from megatron.core.optimizer import emerging_optimizers, layer_wise_optimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor

from megatron_vwn.megatron_fixes.repair import repair
from megatron_vwn.modules.connection import Connection
from megatron_vwn.modules.embedding import Expansion
from megatron_vwn.modules.group_norm import GroupNorm
from megatron_vwn.modules.multi_token_prediction import Fusion
from megatron_vwn.modules.ngram_embedding import NGramEmbedding
from megatron_vwn.modules.reduction import Reduction
from megatron_vwn.modules.stream_module import PartitionedModule

_MUON = {
    # A, S and a norm's weight are vectors or tables of single coefficients: no product is taken with them.
    (Connection, "routing"): False,
    (Connection, "scale"): False,
    (Connection, "norm"): False,
    (GroupNorm, "weight"): False,
    (GroupNorm, "bias"): False,
    # Each column of W gives the logits of one coefficient. Reads, carries and writes have gradients of different sizes,
    # which Muon would make equal; and two of its scale modes take E, the first dimension, for what a matrix puts out.
    (Connection, "weight"): False,
    # Factors of the embedding and of the head, which Adam trains: W_expand E is the table of the wide stream. Both are
    # divided by the square root of what they sum over, because Adam moves all entries by one rate, and such moves can
    # add up to a singular value of that size. Those of a step of Muon are equal: divided, the step would be too small.
    (Expansion, "weight"): False,
    (Reduction, "weight"): False,
    # A table of rows that are looked up.
    (NGramEmbedding, "weight"): False,
    # As Megatron's own fusion, which it stands for: [I (x) W_e | I (x) W_h] made orthogonal is that of [W_e | W_h].
    (Fusion, "weight"): True,
}
_MARK = "trained_by_muon"


def choose_for_muon(model: torch.nn.Module) -> None:
    """Mark every parameter of the stream, and have Megatron follow the marks.

    Args:
        model: one stage; nothing of it is wrapped yet.

    Raises:
        KeyError: a parameter of the stream has no choice here.
    """
    for module in model.modules():
        if isinstance(module, PartitionedModule | NGramEmbedding):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(parameter, _MARK, _MUON[type(module), name])
    repair(layer_wise_optimizer, "is_managed_by_layer_wise_optimizer", _as_marked)
    registered = emerging_optimizers._EMERGING_OPTIMIZERS
    if registered["muon"].optimizer_cls is not StreamMuon:
        others = ParamPredicate(name="not_trained_by_muon", fn=lambda parameter: not trained_by_muon(parameter))
        registered["muon"] = replace(
            registered["muon"],
            optimizer_cls=StreamMuon,
            default_param_overrides={ParamKey(predicate=others): {"optimizer": "adam"}},
        )


def trained_by_muon(parameter: torch.nn.Parameter) -> bool:
    """Whether Muon trains a parameter; of a model that ``choose_for_muon`` has seen."""
    return layer_wise_optimizer.is_managed_by_layer_wise_optimizer(parameter)


def _as_marked(stock):
    def is_managed(param):
        return getattr(param, _MARK) if hasattr(param, _MARK) else stock(param)

    return is_managed


class StreamMuon(TensorParallelMuon):
    """Megatron's Muon, which also takes the fusion's [E_out, 2, E_in] as the matrix [E_out, 2 E_in] that it is."""

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs) -> Tensor:
        """The update of a parameter from its momentum, in the momentum's shape.

        Ranks that hold some channels of W_e and W_h each hold some columns of the matrix, in another order: the update
        of a matrix with its columns in another order is the update with its columns in that order.
        """
        if grad.dim() == 2:
            return super().orthogonalize(p, grad, **kwargs)
        matrix = SimpleNamespace(partition_dim=min(getattr(p, "partition_dim", -1), 1))
        return super().orthogonalize(matrix, grad.flatten(1), **kwargs).reshape(grad.shape)
