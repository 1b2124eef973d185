"""Fused Triton kernels of read, write, write_read and the group norm: what runs on a GPU.

Imported only where they are used, because importing Triton takes time and is not possible everywhere. A read computes
the logits of ALL coefficients of its connection once and hands them to the write; gates and coefficients are formed
from them where they are used. The small numbers of segments (n <= 8) are vector arithmetic, n of 16 and 32 products of
one warp a token, n = 64 products of several warps. Nothing here uses atomics: two runs give the same bits, which is why
``--deterministic-mode`` has nothing to choose.
"""
