"""A transformer in plain torch whose residual stream is four times as wide as its backbone learns one batch."""

import torch
from torch import nn

from megatron_vwn import Connection, ops

M, N, D, VOCABULARY, LENGTH = 2, 8, 64, 50, 16  # N/M = 4 times as wide
MASK = nn.Transformer.generate_square_subsequent_mask(LENGTH)


class _Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, attn_mask=MASK, need_weights=False)[0]


def _layer():
    mlp = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
    return nn.Sequential(nn.RMSNorm(D), _Attention(D, 4, batch_first=True)), mlp


sublayers = nn.ModuleList([*_layer(), *_layer()])  # each with its norm and without a residual
connections = nn.ModuleList(Connection(M, N, D) for _ in sublayers)
embedding, head = nn.Embedding(VOCABULARY, D), nn.Sequential(nn.RMSNorm(D), nn.Linear(D, VOCABULARY))
optimizer = torch.optim.AdamW(nn.ModuleList([embedding, sublayers, connections, head]).parameters(), lr=3e-3)
tokens = torch.randint(VOCABULARY, (4, LENGTH + 1))
for _step in range(20):
    h = ops.tile(embedding(tokens[:, :-1]).unflatten(-1, (M, -1)), N).flatten(-2)  # [batch, length, N/M * D]
    for connection, sublayer in zip(connections, sublayers, strict=True):
        h = connection(h, sublayer)
    x = ops.average_copies(h.unflatten(-1, (N, -1)), M).flatten(-2)  # [batch, length, D]
    loss = nn.functional.cross_entropy(head(x).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")
