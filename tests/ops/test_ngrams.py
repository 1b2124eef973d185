"""N-gram rows equal what plain Python integers give, and n-grams stay within their document."""

import torch

from megatron_vwn.ops.ngrams import BASE, PRIME, ngram_rows

END = 5


def row(tokens, position, length, table_size):
    """The definition, with unbounded integers: only the tokens of position's own document take part."""
    start = max((i + 1 for i in range(position) if tokens[i] == END), default=0)
    taken = [position - i for i in range(length) if position - i >= start]
    return sum((tokens[t] + 1) * BASE ** (position - t) for t in taken) % PRIME % table_size


def test_rows_equal_the_definition():
    generator = torch.Generator().manual_seed(0)
    # Large ids: a product of two of them and BASE would overflow 64 bits.
    tokens = torch.randint(0, PRIME - 1, (3, 40), generator=generator)
    tokens[:, ::7] = END
    lengths, size = (2, 3, 5), 1009
    rows = ngram_rows(tokens, lengths, size, END)
    expected = [
        [[row(sample, t, length, size) for length in lengths] for t in range(len(sample))] for sample in tokens.tolist()
    ]
    assert rows.tolist() == expected


def test_no_ngram_crosses_the_end_of_a_document():
    after = [11, 12, 13, 14]
    one = ngram_rows(torch.tensor([[1, 2, END, *after]]), (2, 3), 10**6, END)[:, 3:]
    other = ngram_rows(torch.tensor([[3, 4, END, *after]]), (2, 3), 10**6, END)[:, 3:]
    alone = ngram_rows(torch.tensor([after]), (2, 3), 10**6, END)
    assert torch.equal(one, other) and torch.equal(one, alone)
    within = ngram_rows(torch.tensor([[1, 2, 9, *after]]), (2, 3), 10**6, END)[:, 3:]
    assert (within != alone).any(-1).tolist() == [[True, True, False, False]]


def test_the_end_itself_belongs_to_the_document_that_it_ends():
    rows = ngram_rows(torch.tensor([[1, END], [2, END]]), (2,), 10**6, END)
    assert rows[0, 1] != rows[1, 1]


def test_rows_spread_over_the_table():
    """Tables of a size that shares factors with everything must not collapse; chance gives 63 % of the rows."""
    size = 2**12
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64) * 64)
    used = ngram_rows(pairs, (2,), size, END)[:, 1].unique().numel()
    assert used > 0.55 * size
