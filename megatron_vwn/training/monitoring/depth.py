"""What routing matrices in a row mean together: how far back a sublayer reads, and what the carries amplify.

Plain arithmetic on the matrices of one chain of connections, such as the trunk of a model. With H_l the state that
sublayer l reads, B_l, C_l = A_carry and R_l = A_read its write, carry and read matrices,

    H_{l+1} = B_l^T Y_l + C_l^T H_l        X_l = R_l^T H_l

so that X_l contains Y_k through (B_k C_{k+1} ... C_{l-1} R_l)^T and the first state through (C_1 ... C_{l-1} R_l)^T.
Coefficients that depend on the token enter as their means over tokens: a product of means, not the mean of products.
Everything is fp64; rows of a matrix are sources, columns are destinations, as in the paper.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def participation_ratio(energy_N: Tensor) -> float:
    """(sum e)^2 / sum e^2: n where all of n energies are equal, 1 where one has everything, NaN where none has any."""
    return (energy_N.sum() ** 2 / energy_N.square().sum()).item()


def independent_directions(gram_NN: Tensor) -> float:
    """The participation ratio of the eigenvalues of a Gram matrix: how many directions its vectors span, copies
    counted once."""
    return (gram_NN.diagonal().sum() ** 2 / gram_NN.square().sum()).item()


def carry_gains(carries: Sequence[Tensor]) -> Tensor:
    """The gain of the carry product C_l ... C_L from every depth to the end, [L, 3].

    The measure of the mHC paper (arXiv 2512.24880): sums of absolute values of the composite matrix, over sources for
    what a segment of the last state can become (forward), over destinations for the gradient of a segment of H_l
    (backward).

    Args:
        carries: C_1 ... C_L, each [n, n].

    Returns:
        For each l: largest forward, largest backward, and the mean, which both directions have in common.
    """
    product_NN = torch.eye(carries[0].shape[0], dtype=torch.float64)
    rows = []
    for carry_NN in reversed(carries):
        product_NN = carry_NN @ product_NN
        forward_N, backward_N = product_NN.abs().sum(0), product_NN.abs().sum(1)
        rows.append(torch.stack([forward_N.max(), backward_N.max(), forward_N.mean()]))
    return torch.stack(rows[::-1])


def receptive_field(reads: Sequence[Tensor], carries: Sequence[Tensor], writes: Sequence[Tensor]) -> Tensor:
    """How much of what came before each sublayer reads, [L, 1 + L].

    Args:
        reads: R_1 ... R_L, each [n, m].
        carries: C_1 ... C_L, each [n, n].
        writes: B_1 ... B_L, each [m, n].

    Returns:
        Row l - 1: in column 0 the first state, in column k the output of sublayer k, each as the Frobenius norm of the
        matrix through which X_l contains it, over sqrt(m): 1 for an ordinary residual connection, whose matrix is the
        identity. Columns from l on are zero.
    """
    n, m = reads[0].shape
    found = torch.zeros(len(reads), 1 + len(reads), dtype=torch.float64)
    first_NN, outputs_LMN = torch.eye(n, dtype=torch.float64), torch.zeros(0, m, n, dtype=torch.float64)
    for row, (read_NM, carry_NN, write_MN) in enumerate(zip(reads, carries, writes, strict=True)):
        found[row, 0] = (first_NN @ read_NM).norm()
        found[row, 1 : 1 + row] = (outputs_LMN @ read_NM).flatten(1).norm(dim=1)
        first_NN = first_NN @ carry_NN
        outputs_LMN = torch.cat([outputs_LMN @ carry_NN, write_MN[None]])
    return found / m**0.5


def depth_windows(field: Tensor) -> Tensor:
    """How far back each sublayer reads on average, [L]: the distance l - k to the outputs of sublayers k < l, weighted
    with what ``receptive_field`` found.

    1 for a sublayer that reads the last output alone, l / 2 for one that reads all equally, 0 for one that reads none.
    """
    weights = field[:, 1:]
    number = torch.arange(weights.shape[0], dtype=torch.float64)
    distance = (number[:, None] - number[None, :]).clamp_min(0)
    total = weights.sum(1)
    return torch.where(total > 0, (weights * distance).sum(1) / total, total)
