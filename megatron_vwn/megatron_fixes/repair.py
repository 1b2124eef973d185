"""How a function of Megatron is replaced: at most once by the same repair in a process."""

import inspect
from collections.abc import Callable
from functools import wraps

_MARK = "repaired_by_megatron_vwn"


def repair(owner, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(owner.name)``, unless ``make`` has made it, or what it replaced, already."""
    stock = getattr(owner, name)
    made = getattr(stock, _MARK, ())
    if make.__qualname__ in made:
        return
    repaired = wraps(stock)(make(stock))
    setattr(repaired, _MARK, (*made, make.__qualname__))
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(repaired) if static else repaired)
