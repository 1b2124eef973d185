"""The fused kernels against the fp64 reference: in Triton's interpreter here, on a GPU where there is one."""

import json
from pathlib import Path

import launch
import pytest
import torch
from ops.kernel_cases import CASES, GPU_CASES, NORMED_CASES, TOLERANCE, TRAFFIC_PAIRS

TESTS = Path(__file__).parents[1]
NAMES = [
    *(f"parity {case.name}" for case in CASES),
    *(f"normed parity {case.name}" for case in NORMED_CASES),
    *(f"group norm {dtype}" for dtype in TOLERANCE),
    *(f"traffic ({m},{n})" for m, n in TRAFFIC_PAIRS),
    "odd inputs",
    "repeats",
    "saved",
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
    from megatron_vwn.ops.kernels import group_norm
    from megatron_vwn.ops.kernels import read as read_kernels
    from megatron_vwn.ops.kernels import write as write_kernels
    from megatron_vwn.ops.kernels import write_read as write_read_kernels

    modules = (read_kernels, write_kernels, write_read_kernels, group_norm)
    kernels = {
        name: k
        for module in modules
        for name, k in vars(module).items()
        if name.endswith(("_forward", "_backward")) and k.fn.__module__ == module.__name__
    }
    assert len(kernels) >= 8
    for name, kernel in kernels.items():
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert "T" in free or "T" not in kernel.arg_names, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_on_a_gpu(case):
    from ops.kernel_checks import check_parity

    errors = check_parity(case, "cuda")
    assert all(error <= TOLERANCE[case.dtype] for error in errors.values()), errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", NORMED_CASES, ids=lambda case: case.name)
def test_normed_on_a_gpu(case):
    from ops.kernel_checks import check_parity

    errors = check_parity(case, "cuda", normed=True)
    assert all(error <= TOLERANCE[case.dtype] for error in errors.values()), errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_group_norm_odd_inputs_and_repeats_on_a_gpu():
    from ops.kernel_checks import check_group_norm, check_odd_inputs, check_repeats

    for dtype, tolerance in TOLERANCE.items():
        assert all(error <= tolerance for error in check_group_norm(dtype, "cuda").values())
    check_odd_inputs("cuda")
    check_repeats("cuda")
