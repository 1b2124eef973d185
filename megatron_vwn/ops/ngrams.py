"""Hashed n-grams of token ids: which row of its table each n-gram of a sequence has.

Suffixes: B samples, S tokens of a sample, G lengths of n-grams.

The hash is a polynomial in the tokens modulo the Mersenne prime 2^31 - 1, evaluated at a fixed point, and then taken
modulo the table's size (Carter and Wegman, 1979): every product stays below 2^62, so no device can overflow, and two
n-grams share a row no more often than by chance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PRIME = 2**31 - 1
BASE = 1_103_515_245


def ngram_rows(tokens_BS: Tensor, lengths: Sequence[int], table_size: int, document_end: int) -> Tensor:
    """Row of the n-gram that ends at each token, for each length.

    row = (sum_i code(t - i) BASE^i mod PRIME) mod table_size, with code = token id + 1, or 0 where there is no such
    token: before the sequence, or in an earlier document. A document's last token is ``document_end``.

    Args:
        tokens_BS: token ids [B, S], integers below PRIME.
        lengths: lengths of the n-grams.
        table_size: rows of each length's table.
        document_end: the token id that ends a document.

    Returns:
        int64 [B, S, G], each in [0, table_size).
    """
    code_BS = tokens_BS.long() + 1
    codes, same_document = [code_BS], torch.ones_like(code_BS, dtype=torch.bool)
    for distance in range(1, max(lengths)):
        earlier_BS = torch.nn.functional.pad(code_BS, (distance, 0))[:, : code_BS.shape[1]]
        # Once an end lies between, everything before it belongs to another document.
        same_document = same_document & (earlier_BS != document_end + 1)
        codes.append(earlier_BS * same_document)
    rows = []
    for length in lengths:
        hash_BS = torch.zeros_like(code_BS)
        for code in reversed(codes[:length]):
            hash_BS = (hash_BS * BASE + code) % PRIME
        rows.append(hash_BS % table_size)
    return torch.stack(rows, dim=-1)
