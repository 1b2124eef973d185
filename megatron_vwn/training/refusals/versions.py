"""What is installed, against what this package was run with; asked before any of it is imported."""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_vwn.config import VirtualWidthError

ALLOW_UNTESTED = "--allow-untested"
MEGATRON = (0, 19)
# Oldest and newest; tests/versions.sh runs the tests with both, and pyproject.toml declares them.
TESTED = {"torch": ((2, 11), (2, 14))}


def refuse_versions(argv: Sequence[str]) -> None:
    """Refuse a megatron-core that this package was not run with, unless --allow-untested is typed.

    Args:
        argv: the command line, before it is parsed: the parser is Megatron's.

    Raises:
        VirtualWidthError: another megatron-core than 0.19, or none.
    """
    untested = untested_megatron()
    if untested is not None and ALLOW_UNTESTED not in argv:
        raise VirtualWidthError(
            f"{untested} was not tried with this package: install megatron-core 0.19.2, or give {ALLOW_UNTESTED} to "
            "try it."
        )


def untested_megatron() -> str | None:
    """The megatron-core that would be imported, if it is none of the releases that this package was run with.

    Raises:
        VirtualWidthError: there is none.
    """
    spec = find_spec("megatron") and find_spec("megatron.core")
    if spec is None or not spec.submodule_search_locations:
        raise VirtualWidthError("megatron-core is not installed: install megatron_vwn[train].")
    # A source checkout on PYTHONPATH has no metadata, or stands before a wheel that has.
    file = Path(next(iter(spec.submodule_search_locations)), "package_info.py")
    text = file.read_text() if file.is_file() else ""
    found = {name: int(number) for name, number in re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)$", text, re.MULTILINE)}
    if (found.get("MAJOR"), found.get("MINOR")) == MEGATRON:
        return None
    return f"megatron-core {'.'.join(map(str, found.values())) or '(of unknown version)'}"


def untested_packages() -> list[str]:
    """Sentences about packages outside of the range that was tested, without the final full stop."""
    said = []
    for package, (oldest, newest) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not oldest <= tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) <= newest:
            oldest, newest = (".".join(map(str, each)) for each in (oldest, newest))
            said.append(
                f"{package} {installed} was not tried, {oldest} to {newest} were: install with -c constraints.txt"
            )
    return said
