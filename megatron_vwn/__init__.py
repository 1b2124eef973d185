"""Virtual Width Networks for released megatron-core.

The names of ``__all__`` are imported when they are first used: without a GPU, ``megatron_vwn.cpu.install()`` must come
before the first import of Megatron, and ``Connection`` works where Megatron is not installed.
"""

from typing import TYPE_CHECKING

from megatron_vwn.lazy import lazily

if TYPE_CHECKING:
    from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
    from megatron_vwn.megatron_fixes import apply_fixes
    from megatron_vwn.modules.model import VirtualWidthModel
    from megatron_vwn.modules.specs import stack_spec
    from megatron_vwn.ops.connection import Connection
    from megatron_vwn.parallel.pipeline import WideP2PCommunicator

__version__ = "0.1.0"

__all__ = [
    "Connection",
    "VirtualWidthConfig",
    "VirtualWidthError",
    "VirtualWidthModel",
    "WideP2PCommunicator",
    "apply_fixes",
    "stack_spec",
]

_HOMES = {
    "Connection": "megatron_vwn.ops.connection",
    "VirtualWidthConfig": "megatron_vwn.config",
    "VirtualWidthError": "megatron_vwn.config",
    "VirtualWidthModel": "megatron_vwn.modules.model",
    "WideP2PCommunicator": "megatron_vwn.parallel.pipeline",
    "apply_fixes": "megatron_vwn.megatron_fixes",
    "stack_spec": "megatron_vwn.modules.specs",
}


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
