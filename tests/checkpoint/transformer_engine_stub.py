"""A stand-in for Transformer Engine, whose names Megatron-Bridge mentions when it is imported and uses nowhere here.

To be installed when Megatron has been imported: Megatron must find that there is none.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Names(type):
    """A class whose attributes are such classes."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


def install() -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        return
    modules = {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch")}
    for name, module in modules.items():
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        module.__getattr__ = _Names(name, (), {}).__getattr__
        sys.modules[name] = module
