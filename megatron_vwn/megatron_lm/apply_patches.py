"""Patch a Megatron-LM source checkout so that its own pretrain_hybrid.py takes --vwn-* flags, or take the patches back.

    python -m megatron_vwn.megatron_lm.apply_patches CHECKOUT [--check] [--revert]

A file that is patched already is left alone. If one file does not match, none is written.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_vwn.atomic import replace_files
from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError

_VERSION_FILE = Path("megatron/core/package_info.py")
# In a checkout, and where the wheel has them (setup.py).
_PATCHES = (Path(__file__).parents[2] / "patches", Path(__file__).parent / "patches")


@dataclass(frozen=True)
class Patch:
    """One patched file.

    Attributes:
        patch: the unified diff.
        target: the file that it changes, relative to the checkout.
        applied: whether the file has the change.
    """

    patch: Path
    target: Path
    applied: bool


def main(argv: list[str] | None = None) -> int:
    """Apply, revert or check; returns 0, or 2 for a checkout that does not match."""
    options = _parser().parse_args(argv)
    return exit_code("apply_patches", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    checkout = options.checkout.resolve()
    version = megatron_version(checkout)
    patches = find_patches(checkout, version)
    wanted = [patch for patch in patches if patch.applied == options.revert]
    names = ", ".join(str(patch.target) for patch in wanted)
    done = "reverted" if options.revert else "applied"
    about = f"{options.checkout} (megatron-core {version})"
    if not wanted:
        already = "has no patch of megatron_vwn" if options.revert else "already applied"
        print(f"{about}: {already}.")
    elif options.check:
        print(f"{about}: patches can be {done}: {names}.")
    else:
        contents = patched_files(checkout, wanted, reverse=options.revert)
        try:
            replace_files({checkout / target: content for target, content in contents.items()})
        except OSError as error:
            raise VirtualWidthError(
                f"{checkout} cannot be written ({error}) and is as it was: make it writable."
            ) from None
        print(f"{about}: patches {done}: {names}.")


def megatron_version(checkout: Path) -> str:
    """The version that a checkout says it has; nothing of it is imported.

    Raises:
        VirtualWidthError: if it says none.
    """
    path = checkout / _VERSION_FILE
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        raise VirtualWidthError(
            f"{checkout} has no readable {_VERSION_FILE}: give the root folder of a Megatron-LM checkout."
        ) from None
    parts = [re.search(rf"^{name} = (\d+)$", text, re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    if None in parts:
        raise VirtualWidthError(
            f"{path} does not say MAJOR, MINOR and PATCH: give a checkout of a Megatron-LM release."
        )
    return ".".join(part[1] for part in parts)


def find_patches(checkout: Path, version: str) -> list[Patch]:
    """The patches for a version, each applied or applicable.

    Raises:
        VirtualWidthError: for a version without patches, a missing file, or one that neither has nor takes its patch.
    """
    folder = _release_folder(version)
    patches = []
    for patch in sorted(folder.glob("*.patch")):
        target = Path(re.search(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)[1])
        if not (checkout / target).is_file():
            raise VirtualWidthError(
                f"{checkout} has no {target}, which the patches change: give a whole Megatron-LM checkout of {version}."
            )
        applied = next((reverse for reverse in (True, False) if _result(checkout, patch, target, reverse)), None)
        if applied is None:
            raise VirtualWidthError(
                f"{checkout / target} is not that of Megatron-LM {version} where {patch.name} changes it: restore it, "
                f"or make the changes of {patch} by hand."
            )
        patches.append(Patch(patch, target, applied))
    return patches


def patched_files(checkout: Path, patches: list[Patch], *, reverse: bool) -> dict[Path, bytes]:
    """What files become when patches are applied, or with ``reverse`` taken back; nothing is written."""
    return {patch.target: _result(checkout, patch.patch, patch.target, reverse) for patch in patches}


def _release_folder(version: str) -> Path:
    """The folder of the patches for a release line."""
    root = next((folder for folder in _PATCHES if folder.is_dir()), None)
    if root is None:
        raise VirtualWidthError("the folder patches/ is missing here: run this from a checkout of megatron_vwn.")
    folder = root / version.rpartition(".")[0]
    if not folder.is_dir():
        known = ", ".join(sorted(f"{each.name}.x" for each in root.iterdir() if each.is_dir()))
        raise VirtualWidthError(f"there are no patches for Megatron-LM {version}: check out a release of {known}.")
    return folder


def _result(checkout: Path, patch: Path, target: Path, reverse: bool) -> bytes | None:
    """The file after the patch, None if it does not match; ``git apply`` works on a copy outside of any repository."""
    with tempfile.TemporaryDirectory(prefix="megatron_vwn_") as folder:
        copy = Path(folder, target)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout / target, copy)
        command = ["git", "apply", "--whitespace=nowarn", *(["--reverse"] if reverse else []), str(patch)]
        try:
            done = subprocess.run(command, cwd=folder, env=_own_settings(folder), capture_output=True)
        except FileNotFoundError:
            raise VirtualWidthError("git is not installed, which applies the patches: install it.") from None
        return None if done.returncode else copy.read_bytes()


def _own_settings(folder: str) -> dict[str, str]:
    """The environment without what could make ``git apply`` find a repository, or the user's line endings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    ceiling = str(Path(folder).resolve().parent)
    return environment | {
        "GIT_CEILING_DIRECTORIES": ceiling,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apply_patches",
        description=__doc__.splitlines()[0],
        epilog="A patched checkout needs megatron_vwn installed; megatron_vwn.training.pretrain needs no patch.",
    )
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="the root folder of a Megatron-LM checkout")
    parser.add_argument("--check", action="store_true", help="only say what would be done; exit code 2 if it cannot be")
    parser.add_argument("--revert", action="store_true", help="take the patches back")
    return parser


if __name__ == "__main__":
    sys.exit(main())
