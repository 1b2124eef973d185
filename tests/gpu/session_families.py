"""One GPU: fresh virtual-width models of Transformer Engine's layers against their baselines. Run by torchrun.

``python session_families.py FAMILY...``; names are those of FAMILIES.
"""

import dataclasses
import os
import sys

import torch

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, stream  # noqa: E402

# bf16, because the kernels of flash attention and of the delta rule have no fp32; both models round alike but for sums
# of a wide stream, hence these tolerances per loss and per gradient tensor.
LOSS_TOLERANCE, TOLERANCE = 1e-2, 5e-2
MAMBA = {"mamba_state_dim": 16, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_num_heads": 8}
GATED_DELTA_NET = {
    "deterministic_mode": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# 64 channels for the keys and 32 for the values of a head, as the attention kernels like them.
LATENT = {"qk_head_dim": 32, "qk_pos_emb_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32, "q_lora_rank": 32}
FAMILIES = {
    "attention": Case(hidden=128),
    "sliding window": Case(hidden=128).but(num_query_groups=2, window_size=(3, 0)),
    "latent attention": Case(pattern="+-+-", hidden=128).but(**LATENT),
    "Mamba": Case(pattern="M-M-", hidden=128).but(**MAMBA),
    "gated delta net": Case(pattern="G-G-", hidden=128).but(**GATED_DELTA_NET),
}
TILED = stream(2, 8, embedding="tiled", reduce_norm=False)


def differences(case: Case) -> dict[str, float]:
    """Loss and gradients of a fresh VWN with the baseline's backbone, relative to the baseline's."""
    case = case.but(
        transformer_impl="transformer_engine",
        use_cpu_initialization=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    baseline = harness.build(ALONE, dataclasses.replace(case, virtual_width=None))
    weights, _ = harness.collect(baseline)
    loss = harness.forward_backward(baseline)
    gradients, _ = harness.collect(baseline, "gradients")
    wide = harness.build(ALONE, dataclasses.replace(case, virtual_width=TILED), seed=2)
    fresh, _ = harness.collect(wide)
    harness.load_globals(wide, {**fresh, **weights})
    off = abs(harness.forward_backward(wide) - loss) / loss
    wide_gradients, _ = harness.collect(wide, "gradients")
    errors = harness.relative_errors({key: wide_gradients[key] for key in gradients}, gradients)
    return {**errors, "loss": off * TOLERANCE / LOSS_TOLERANCE}


def main(families: list[str]) -> None:
    harness.BACKEND = "nccl"
    for family in families:
        errors = differences(FAMILIES[family])
        beyond = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        assert not beyond, (family, beyond)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
