"""One stream's kernels against fp64 on a GPU, or in Triton's interpreter: prints one line of JSON per case.

python tests/gpu/parity.py M,N D TOKENS [--dtypes bf16 fp16 fp32] [--more [N]]
"""

import argparse
import json
import os
import traceback

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ops.kernel_cases import PRODUCT, TOLERANCE, Case
from ops.kernel_checks import check_group_norm, check_odd_inputs, check_parity, check_repeats

from megatron_vwn.benchmark.arguments import DTYPES


def checks(options: argparse.Namespace, device: str):
    """(name, errors by name, tolerance) of each case, computed when it is asked for."""
    m, n = map(int, options.pair.split(","))
    for name in options.dtypes:
        case = Case(m, n, getattr(torch, DTYPES[name]), options.tokens, options.hidden_size // m, "tanh, full")
        yield case.name, lambda case=case: check_parity(case, device), TOLERANCE[case.dtype]
    if not options.more:
        return
    for case in [case for case in PRODUCT if (case.m, case.n) == (m, n)][: options.more]:
        yield case.name, lambda case=case: check_parity(case, device), TOLERANCE[case.dtype]
    for dtype in TOLERANCE:
        yield f"group norm {dtype}", lambda dtype=dtype: check_group_norm(dtype, device), TOLERANCE[dtype]
    yield "odd inputs", lambda: check_odd_inputs(device) or {}, 0.0
    yield "repeats", lambda: check_repeats(device) or {}, 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair")
    parser.add_argument("hidden_size", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--more", type=int, nargs="?", const=1000, help="N of the suite's cases for this pair, too; all"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    for name, compute, tolerance in checks(options, device):
        row = {"pair": options.pair, "case": name, "allowed": tolerance}
        try:
            errors = compute()
            worst = max(errors, key=errors.get, default=None)
            row |= {"worst": worst, "error": errors.get(worst, 0.0)}
            # NaN passes no comparison.
            row["passed"] = all(error <= tolerance for error in errors.values())
        except Exception as fault:
            row |= {"passed": False, "reason": f"{type(fault).__name__}: {str(fault).strip()[:300]}"}
            traceback.print_exc()
        failed += not row["passed"]
        print(json.dumps(row), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
