"""Requests for a CUDA tensor become requests for a CPU tensor.

One ``TorchFunctionMode`` (the mechanism behind ``torch.set_default_device``) sees every call of torch's tensor API made
from Python, so the eighty places where Megatron writes ``device="cuda"`` need no patch each.
"""

from functools import wraps

import torch
from torch.overrides import TorchFunctionMode

from megatron_vwn.cpu.stand_in import constructed_by

_ASK_FOR_DEVICES = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.type, torch.Tensor.to})


def _is_cuda(device) -> bool:
    """Whether a device argument in any of its spellings ("cuda", "cuda:0", 0, torch.device) means a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, int)


class CudaIsCpu(TorchFunctionMode):
    """While active, every tensor asked for on a CUDA device is made, or stays, on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Almost always, and thousands of times in a step.
        if not kwargs and (func not in _ASK_FOR_DEVICES or (len(args) == 2 and isinstance(args[1], torch.dtype))):
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type:
            return _tensor_type(func, *args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _tensor_type(func, tensor, dtype=None, **kwargs):
    """``Tensor.type``: Megatron's optimizers sort parameters by the name "torch.cuda.FloatTensor" and its like."""
    if dtype is None:
        return func(tensor, **kwargs).replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return func(tensor, dtype, **kwargs)


def _keep_mode_in_backward() -> None:
    """Let the bodies of custom ``Function.backward`` see the mode.

    ``torch.autograd.backward`` is itself a function that modes may override, so the mode is popped while it runs; the
    engine call inside it pushes the mode again. The CPU engine runs on the calling thread, where modes live.
    """
    engine = torch.autograd._engine_run_backward

    @wraps(engine)
    def run(*args, **kwargs):
        with CudaIsCpu():
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run


def _accept_cuda_generators() -> None:
    """``torch.Generator(device="cuda")`` makes a CPU generator; modes cannot see the construction of one."""
    real = torch.Generator

    def on_cpu(device):
        return "cpu" if _is_cuda(device) else device

    def make(*args, **kwargs):
        named = {name: on_cpu(value) if name == "device" else value for name, value in kwargs.items()}
        return real(*map(on_cpu, args[:1]), *args[1:], **named)

    torch.Generator = constructed_by(real, make)


def _autocast_cpu() -> None:
    """``torch.autocast("cuda")`` governs the CPU's operations; left alone it would silently govern none."""
    real, enabled, dtype_of = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class autocast(real):
        """``torch.autocast`` for which "cuda" is "cpu", with CUDA's default dtype."""

        def __init__(self, device_type, dtype=None, *args, **kwargs):
            if device_type == "cuda":
                dtype = dtype_of("cuda") if dtype is None else dtype
                device_type = "cpu"
            super().__init__(device_type, dtype, *args, **kwargs)

    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = autocast
    # custom_fwd and custom_bwd ask these whether, and in which dtype, backward must autocast.
    torch.is_autocast_enabled = lambda device_type="cuda", *args, **kwargs: enabled(
        "cpu" if device_type == "cuda" else device_type, *args, **kwargs
    )
    torch.get_autocast_dtype = lambda device_type, *args, **kwargs: dtype_of(
        "cpu" if device_type == "cuda" else device_type, *args, **kwargs
    )


def install() -> None:
    """Activate the mode for the rest of this thread's life."""
    # It refuses the stand-in for a stream before modes are asked.
    torch.Tensor.record_stream = lambda self, *args, **kwargs: None
    _accept_cuda_generators()
    _autocast_cpu()
    _keep_mode_in_backward()
    CudaIsCpu().__enter__()
