"""The fused kernels against the fp64 reference: in Triton's interpreter here, on a GPU where there is one."""

import json
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import launch
import pytest
import torch
from ops.kernel_cases import CASES, FAMILIES, GPU_CASES, TOLERANCE, TRAFFIC_PAIRS

TESTS = Path(__file__).parents[1]
NAMES = [
    *(f"parity {case.name}" for case in CASES),
    *(f"unused outputs ({m},{n})" for m, n in FAMILIES),
    *(f"group norm {dtype}" for dtype in TOLERANCE),
    *(f"traffic ({m},{n})" for m, n in TRAFFIC_PAIRS),
    "few programs",
    "odd inputs",
    "repeats",
    "saved",
    "small operations",
]


@pytest.fixture(scope="module")
def report():
    # It needs no Megatron: torch and Triton alone are imported sooner than a server would be ready to fork.
    run = launch.real(0, TESTS / "ops" / "session_kernels.py")
    assert run.returncode == 0, run.stderr[-4000:]
    return {line["name"]: line["fault"] for line in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(report, name):
    assert report[name] is None, report[name]


def test_every_check_is_known(report):
    assert sorted(report) == sorted(NAMES)


def test_a_new_number_of_tokens_compiles_nothing():
    """Triton compiles again for an argument that is 1 or a multiple of 16, unless it is told not to."""
    from triton import JITFunction

    from megatron_vwn.ops import kernels as package

    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    counts = {"T", "trips", "splits"}
    kernels = [function for function in functions if counts.intersection(function.arg_names)]
    assert len(kernels) >= 8
    for kernel in kernels:
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert {*counts, "rows"}.intersection(kernel.arg_names) <= free, kernel.__name__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_on_a_gpu(case):
    from ops.kernel_checks import check_parity

    errors = check_parity(case, "cuda")
    assert all(error <= TOLERANCE[case.dtype] for error in errors.values()), errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_group_norm_odd_inputs_and_repeats_on_a_gpu():
    from ops.kernel_checks import check_group_norm, check_odd_inputs, check_repeats

    for dtype, tolerance in TOLERANCE.items():
        assert all(error <= tolerance for error in check_group_norm(dtype, "cuda").values())
    check_odd_inputs("cuda")
    check_repeats("cuda")
