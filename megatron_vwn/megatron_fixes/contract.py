"""Whether the installed Megatron still has the functions that this package repairs."""

import inspect
from collections.abc import Callable

from megatron.core import __version__ as megatron_version

from megatron_vwn.config import VirtualWidthError


def expect_function(owner, name: str, *parameters: str) -> Callable:
    """The function ``owner.name``, if it still takes exactly these parameters.

    Raises:
        VirtualWidthError: if it does not.
    """
    function = getattr(owner, name, None)
    if function is None or tuple(inspect.signature(function).parameters) != parameters:
        raise VirtualWidthError(
            f"megatron-core {megatron_version} has no {owner.__name__}.{name}({', '.join(parameters)}), which "
            "megatron_vwn.training repairs: install a 0.19 release."
        )
    return function
