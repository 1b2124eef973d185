"""Two GPUs: a virtual-width model with Transformer Engine's attention, CP2 against each GPU alone. Run by torchrun."""

import os

import torch

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, Layout  # noqa: E402

# bf16, because flash attention has no fp32; both runs round alike up to the order of sums, hence 2e-2 per tensor.
TOLERANCE = 2e-2


def main() -> None:
    harness.BACKEND = "nccl"
    case = Case().but(
        transformer_impl="transformer_engine",
        use_cpu_initialization=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    alone = harness.build(ALONE, case)
    harness.perturb(alone)
    parameters, _ = harness.collect(alone)
    loss = harness.forward_backward(alone)
    gradients, _ = harness.collect(alone, "gradients")

    parallel = harness.build(Layout(cp=2), case, seed=2)
    harness.load_globals(parallel, parameters)
    assert abs(harness.forward_backward(parallel) - loss) <= 1e-2 * loss
    actual, unequal = harness.collect(parallel, "gradients")
    assert not unequal, unequal
    errors = harness.relative_errors(actual, gradients)
    beyond = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not beyond, beyond
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
