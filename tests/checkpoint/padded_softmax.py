"""Training as it was while the rows that pad the vocabulary, which no token has, were in the softmax."""

import sys

from megatron_vwn import cpu

cpu.install()

from megatron_vwn.training import model  # noqa: E402
from megatron_vwn.training.pretrain import main  # noqa: E402

model.leave_out_padding = lambda *_: None
sys.exit(main())
