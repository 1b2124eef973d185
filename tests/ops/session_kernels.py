"""The kernels in Triton's interpreter, in a process of their own: importing Triton decides what is interpreted.

Prints one line of JSON per check. Arguments choose checks by the beginning of their names.
"""

import json
import os
import sys
import time
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import torch
from ops.kernel_cases import CASES, FAMILIES, TOLERANCE, TRAFFIC_PAIRS
from ops.kernel_checks import (
    check_few_programs,
    check_group_norm,
    check_odd_inputs,
    check_parity,
    check_repeats,
    check_saved,
    check_small_operations,
    check_unused_outputs,
)
from ops.kernel_traffic import check_traffic


def within(errors, tolerance):
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong


CHECKS = {
    **{f"parity {case.name}": lambda case=case: within(check_parity(case), TOLERANCE[case.dtype]) for case in CASES},
    **{
        f"unused outputs ({m},{n})": lambda m=m, n=n: within(check_unused_outputs(m, n), TOLERANCE[torch.float32])
        for m, n in FAMILIES
    },
    **{
        f"group norm {dtype}": lambda dtype=dtype: within(check_group_norm(dtype), TOLERANCE[dtype])
        for dtype in TOLERANCE
    },
    **{f"traffic ({m},{n})": lambda m=m, n=n: check_traffic(m, n) for m, n in TRAFFIC_PAIRS},
    "few programs": lambda: within(check_few_programs(), TOLERANCE[torch.float32]),
    "odd inputs": check_odd_inputs,
    "repeats": check_repeats,
    "saved": check_saved,
    "small operations": check_small_operations,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, check in CHECKS.items():
        if sys.argv[1:] and not name.startswith(tuple(sys.argv[1:])):
            continue
        began = time.process_time()
        try:
            check()
            fault = None
        except Exception:
            fault = traceback.format_exc()
        print(json.dumps({"name": name, "fault": fault, "seconds": round(time.process_time() - began, 2)}), flush=True)
