"""Tests of the emulated GPU in one process; test_cpu_emulation.py runs them in a pytest of their own.

``install()`` changes torch for good, so the file is named such that pytest does not collect it beside other tests.
"""

import inspect
import logging
from datetime import timedelta
from pathlib import Path

import pytest

import megatron_vwn.cpu
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes import contract

assert megatron_vwn.cpu.install() is True

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

TASKS = Path("/proc/self/task")
CUDA = ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0))


def test_factories():
    for device in CUDA:
        tensors = [
            torch.empty(2, device=device),
            torch.tensor([1.0, 2.0], device=device),
            torch.arange(2, device=device),
            torch.randn(2, device=device),
            torch.zeros_like(torch.ones(2), device=device),
            torch.ones(2).new_empty(2, device=device),
            torch.as_tensor([1, 2], device=device),
            torch.nn.Linear(2, 2, device=device).weight,
        ]
        assert all(t.device == torch.device("cpu") for t in tensors), device
    with torch.device("cuda"):
        assert torch.ones(2).device == torch.device("cpu")


def test_moves():
    source = torch.tensor([1.0, 2.0])
    for device in CUDA:
        for moved in (source.to(device), source.to(device=device), source.to(device, non_blocking=True)):
            assert moved.device.type == "cpu" and moved.equal(source), device
        assert source.to(device, torch.float64).dtype == torch.float64
    assert source.cuda().equal(source) and source.cuda(0, non_blocking=True).equal(source)
    assert source.to(torch.float64).dtype == torch.float64
    assert source.to(torch.ones(1, dtype=torch.float16)).dtype == torch.float16
    copy = source.to("cuda", copy=True)
    assert copy.equal(source) and copy.data_ptr() != source.data_ptr()
    linear = torch.nn.Linear(2, 2)
    assert linear.cuda().weight.device == linear.to("cuda:0").weight.device == torch.device("cpu")
    assert torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight.device == torch.device("cpu")


def test_meta_device_is_left_alone():
    assert torch.empty(2, device="meta").is_meta and torch.ones(2).to("meta").is_meta


def test_tensor_type():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.nn.Parameter(torch.ones(1).half()).type() == "torch.cuda.HalfTensor"
    integers = torch.ones(1, dtype=torch.int32)
    assert integers.type(torch.float32).dtype == integers.type(torch.ones(1).type()).dtype == torch.float32


def test_tensors_stay_honest():
    tensor = torch.ones(1, device="cuda")
    assert not tensor.is_cuda and tensor.device.type == "cpu"


def test_pinned_memory():
    tensor = torch.ones(2, pin_memory=True).pin_memory()
    tensor.record_stream(torch.cuda.current_stream())
    assert tensor.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_data_loader_with_workers_and_pinned_memory():
    loader = torch.utils.data.DataLoader(range(4), batch_size=2, num_workers=1, pin_memory=True)
    assert [batch.cuda(non_blocking=True).tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_backward_sees_the_mode():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.full((2,), 2.0, device=torch.cuda.current_device())

    x = torch.ones(2, device="cuda", requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2]
    assert torch.autograd.grad(Double.apply(x).sum(), x)[0].tolist() == [2, 2]
    torch.utils.checkpoint.checkpoint(Double.apply, x, use_reentrant=True).sum().backward()
    assert x.grad.tolist() == [4, 4]


def test_random_state():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.rand(4, device="cuda").equal(first)
    torch.cuda.set_rng_state_all([state])
    assert torch.cuda.initial_seed() == 5 and torch.cuda.get_rng_state_all()[0].equal(state)
    torch.manual_seed(5)  # calls torch.cuda.manual_seed_all
    assert torch.rand(4, device="cuda").equal(first)
    before = torch.cuda.get_rng_state()
    with torch.random.fork_rng(devices=[0]):
        torch.rand(3)
    assert torch.cuda.get_rng_state().equal(before)


def test_megatron_tracker(caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.manual_seed(1)
    expected = torch.rand(4)
    torch.cuda.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    tracker.add("other", 2)
    with tracker.fork("other"):
        first = torch.rand(2, device="cuda")
    assert torch.rand(2).equal(expected[:2])  # the fork has not moved the generator around it
    with tracker.fork("other"):
        second = torch.rand(2, device="cuda")
    assert torch.rand(2).equal(expected[2:])
    torch.manual_seed(2)
    assert torch.rand(4).equal(torch.cat([first, second]))  # the second fork goes on where the first ended
    with caplog.at_level(logging.WARNING):
        logging.getLogger("megatron.core.tensor_parallel.random").warning("another warning")
    assert caplog.messages == ["another warning"]


def test_recompute_repeats_dropout():
    from megatron.core import tensor_parallel

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        x = torch.ones(64, requires_grad=True)
        y = tensor_parallel.checkpoint(F.dropout, False, x) if recompute else F.dropout(x)
        torch.rand(7)  # moves the generator between forward and recompute
        (y * torch.arange(64)).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].equal(gradients[1]) and gradients[0].count_nonzero() > 0


def test_generators():
    for device in CUDA[:2]:
        generator = torch.Generator(device=device)
        generator.manual_seed(1)
        draw = torch.rand(3, generator=generator, device="cuda")
        assert draw.equal(torch.rand(3, generator=torch.Generator().manual_seed(1)))
        assert isinstance(generator, torch.Generator)
    assert torch.multinomial(torch.ones(4), 2, generator=torch.Generator("cuda")).shape == (2,)
    assert isinstance(torch.default_generator, torch.Generator) and not isinstance(1, torch.Generator)
    assert torch.Tensor | torch.Generator  # annotations still work


def test_autocast():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda") == torch.bfloat16
        product = torch.ones(2, 2) @ weight
    assert product.dtype == torch.bfloat16 and not torch.is_autocast_enabled()
    assert (torch.ones(2, 2) @ weight).dtype == torch.float32
    with torch.autocast("cuda"):
        assert (torch.ones(2, 2) @ weight).dtype == torch.float16

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda")
        def forward(ctx, x):
            return x @ torch.ones(2, 2)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx, gradient):
            return (gradient @ torch.ones(2, 2)).float()  # bf16 @ fp32 works under autocast alone

    with torch.autocast("cuda", dtype=torch.bfloat16):
        product = Product.apply(weight)
    product.sum().backward()
    assert weight.grad.tolist() == [[2, 2], [2, 2]]


def test_runtime():
    cuda = torch.cuda
    assert cuda.is_available() and cuda.device_count() == 1 and cuda.current_device() == 0
    assert cuda.memory_allocated() == cuda.max_memory_allocated() == cuda.memory_stats()["anything"] == 0
    assert cuda.get_device_properties(0).total_memory > 0 and cuda.is_bf16_supported()
    cuda.set_device(0)
    cuda.synchronize()
    stream, start, end = cuda.Stream(priority=-1), cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    with cuda.stream(stream), cuda.device(0), cuda.nvtx.range("x"):
        stream.wait_stream(cuda.current_stream())
        stream.wait_event(stream.record_event())
    end.record()
    end.synchronize()
    assert stream.query() and end.query() and start.elapsed_time(end) >= 0


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads as Linux shows them")
def test_gloo_groups_share_one_network_device():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = len(list(TASKS.iterdir()))
    groups = [dist.new_group([0]) for _ in range(8)]
    # Two workers for each group, and not a third one for a device of its own.
    assert len(list(TASKS.iterdir())) - before == 2 * len(groups)
    assert all(isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo) for group in groups)
    dist.destroy_process_group()


def test_a_group_made_with_arguments_that_came_later():
    dist = torch.distributed
    how = {"timeout": timedelta(seconds=60), "argument_of_a_later_torch": False}
    assert isinstance(dist.ProcessGroupGloo(dist.HashStore(), 0, 1, **how), dist.ProcessGroupGloo)
    with pytest.raises(TypeError, match="argument_of_a_later_torch"):  # not dropped where it says something
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, **{**how, "argument_of_a_later_torch": True})


def test_what_is_replaced_takes_whatever_arguments_come():
    seen = set()
    for use in contract.USES:
        if use.how == "replace" and use.file.startswith("cpu/"):
            found = getattr(contract._owner(use.owner), use.name)
            if inspect.isfunction(found) and "megatron_vwn" in found.__code__.co_filename:
                seen.add(use.name)
                kinds = {each.kind for each in inspect.signature(found, follow_wrapped=False).parameters.values()}
                assert kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, use.name
    assert seen >= {"all_gather", "all_to_all_single", "is_autocast_enabled", "record_stream"}


def test_second_install_changes_nothing():
    before = (
        torch.cuda.Stream,
        torch.Generator,
        torch.autograd._engine_run_backward,
        torch.distributed.all_to_all_single,
    )
    assert megatron_vwn.cpu.install() is True
    after = torch.cuda.Stream, torch.Generator, torch.autograd._engine_run_backward, torch.distributed.all_to_all_single
    assert before == after


def test_unknown_checkpoint_writer_is_refused():
    with pytest.raises(VirtualWidthError, match=r"^megatron-core 0\.19.*\.$"):
        megatron_vwn.cpu.checkpoint_writer.install()  # already done, so it does not find what it expects
