"""Fused Triton kernels of read, write, write_read and the group norm: what runs on a GPU.

Imported only where they are used, because importing Triton takes time and is not possible everywhere. Each operation is
an autograd function that keeps the state, the sublayer's output and the parameters; coefficients never reach memory and
are computed again in the backward pass. A read normalises the sublayer's input, too, if asked to, and keeps 1/rms of
each token instead of the input. Nothing here uses atomics: two runs give the same bits, which is why
``--deterministic-mode`` has nothing to choose.
"""
