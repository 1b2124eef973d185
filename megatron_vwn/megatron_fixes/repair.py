"""How a function of Megatron is replaced: at most once in a process."""

from collections.abc import Callable
from functools import wraps


def repair(owner, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(owner.name)``, unless it is such a replacement already."""
    stock = getattr(owner, name)
    if not hasattr(stock, "repaired_by_megatron_vwn"):
        repaired = wraps(stock)(make(stock))
        repaired.repaired_by_megatron_vwn = True
        setattr(owner, name, repaired)
