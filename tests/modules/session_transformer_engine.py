"""One process that builds models of Transformer Engine's layers without a GPU, and says what they are made of.

``python session_transformer_engine.py PATTERNS.json RESULTS.json``; the environment is that of a torchrun of one rank.
Construction needs "cuda" to be there, which the CPU emulation says it is; a forward pass would need a real one.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import json  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, stream  # noqa: E402

from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.modules.connection import Connection  # noqa: E402
from megatron_vwn.modules.layers import branch_only  # noqa: E402

WIDTH = stream(2, 8)
DIMENSIONS = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_num_heads": 8}


def shapes(session: harness.Session) -> dict[str, list[int]]:
    """Parameters by the name that state_dict() gives them."""
    return {name: list(parameter.shape) for name, parameter in session.parameters()}


def layer(module: MegatronModule) -> dict:
    """What became of one layer's connection and residual."""
    additions = [value for name, value in vars(module).items() if name.endswith("_bda")]
    return {
        "kind": type(module).__name__,
        "linears": sorted({type(part).__name__ for part in module.modules() if "Linear" in type(part).__name__}),
        "connection": isinstance(getattr(module, "connection", None), Connection),
        "branches": sum(addition is branch_only for addition in additions),
        "residuals": sum(addition is get_bias_dropout_add for addition in additions),
    }


def report(pattern: str, overrides: dict) -> dict:
    """The model with a virtual width against the one without."""
    case = Case(pattern=pattern).but(
        transformer_impl="transformer_engine", moe_grouped_gemm="E" in pattern, **DIMENSIONS, **overrides
    )
    baseline = harness.build(ALONE, Case(pattern, None, case.hidden, case.overrides))
    wide = harness.build(ALONE, Case(pattern, WIDTH, case.hidden, case.overrides))
    model = wide.models[0]
    further = [inner for depth in model.mtp.layers for inner in depth.mtp_model_layer.layers] if "/" in pattern else []
    return {
        "layers": [layer(module) for module in [*model.decoder.layers, *further]],
        "baseline": shapes(baseline),
        "wide": shapes(wide),
        "virtual width": [name for name in shapes(wide) if harness.is_virtual_width(name)],
        "sharded": {shard.key: list(shard.global_shape) for shard in harness.sharded_tensors(wide)},
    }


def main(patterns: Path, results: Path) -> None:
    apply_fixes()
    found = {}
    for name, (pattern, overrides) in json.loads(patterns.read_text()).items():
        # JSON knows no tuples, and a window is one.
        overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
        try:
            found[name] = report(pattern, overrides)
        except Exception:  # fails the tests of this pattern, and no others
            found[name] = {"error": traceback.format_exc()}
    results.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
