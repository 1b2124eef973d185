"""Sublayers' norms in the reads of the connections: kernels in Triton's interpreter against torch with ordinary norms.

``torchrun session_input_norm.py RESULTS.json`` on two ranks; each alone with a run of its own, and both with sequence
parallelism. The interpreter's time goes with the programs of a launch: here they are two, the second half full.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE, TP2_SP, Case, stream  # noqa: E402

from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.modules.norm import SharedNorm  # noqa: E402

CASE = Case("*E-", stream(n=3, embedding="tiled", kernels="torch"))
OVERRIDES = {
    "ordinary": {},
    "layer norm": {"normalization": "LayerNorm"},
    "recomputed norm": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
}


def trained(layout, kernels: str, parameters=None, **switches):
    """Global parameters and gradients, loss, and how many norms the reads did."""
    width = dataclasses.replace(CASE.virtual_width, kernels=kernels, **switches)
    session = harness.build(layout, dataclasses.replace(CASE, virtual_width=width))
    if parameters is None:
        harness.perturb(session)
        for name, parameter in session.parameters():
            if name.endswith("layernorm.weight"):
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        parameters, _ = harness.collect(session)
    else:
        harness.load_globals(session, parameters)
    with patch.object(SharedNorm, "done", autospec=True, side_effect=SharedNorm.done) as done:
        loss = harness.forward_backward(session)
    gradients, unequal = harness.collect(session, "gradients")
    assert not unequal, unequal
    return parameters, gradients, loss, done.call_count


def shared(overrides: dict) -> list[bool]:
    """Which layers' norms a read may do."""
    (model,) = harness.build(ALONE, CASE.but(**overrides)).models
    return [layer.connection.input_norm is not None for layer in model.decoder.layers]


def main(results: Path) -> None:
    torch.set_num_threads(1)
    apply_fixes()
    harness.SEQUENCE, harness.MICRO_BATCH, harness.MICRO_BATCHES = 12, 1, 2
    harness.initialize_groups(ALONE)
    rank = torch.distributed.get_rank()
    parameters, wanted, loss, without = trained(ALONE, "torch")
    runs = {"without": without}
    alone = [("alone", ALONE, {}), ("stream recompute", ALONE, {"recompute_block": 2})]
    for name, layout, switches in (alone[rank], ("TP2+SP", TP2_SP, {})):
        _, gradients, actual, normed = trained(layout, "triton", parameters, **switches)
        errors = harness.relative_errors(gradients, wanted) | {"loss": abs(actual - loss) / loss}
        runs[name] = {"errors": errors, "normed": normed}
        runs[name]["norms"] = sorted(name for name in gradients if name.endswith("layernorm.weight"))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, runs)
    runs = everyone[1] | everyone[0]
    report = {"runs": runs, "shared": {name: shared(overrides) for name, overrides in OVERRIDES.items()}}
    if rank == 0:
        results.write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
