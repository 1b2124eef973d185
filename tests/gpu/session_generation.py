"""One GPU: Megatron's dynamic batching generates with a virtual-width model of Transformer Engine's layers."""

import os

import torch

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case  # noqa: E402
from parallel.generation import NEW, engine, forward  # noqa: E402

# bf16, because flash attention has no fp32: a token may be one of several that are as good to this share of the spread.
TOLERANCE = 2e-2


def main() -> None:
    harness.BACKEND = "nccl"
    case = Case(hidden=128).but(transformer_impl="transformer_engine", use_cpu_initialization=False, bf16=True)
    session = harness.build(ALONE, case)
    harness.perturb(session)
    session.models[0].eval()
    for sequence in engine(session, legacy=False):
        logits = forward(session, sequence).float()[:-1]
        chosen = logits.gather(1, torch.tensor(sequence[1:], device=logits.device)[:, None])[:, 0]
        behind = (logits.max(-1).values - chosen) / logits.std(-1)
        assert (behind[-NEW:] <= TOLERANCE).all(), (sequence, behind)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
