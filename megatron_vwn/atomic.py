"""Files that appear under their final names only when all of them are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging_folder(folder: Path, name: str) -> Iterator[Path]:
    """A hidden folder beside the results, on the same file system, that is gone afterwards whatever happens.

    Folders made on the way to it are removed again when nothing was published into them. Only a killed process leaves
    the hidden folder behind.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            if any(parent.iterdir()):
                break
            parent.rmdir()


def publish(staging: Path, folder: Path) -> list[Path]:
    """Move every staged file to its final place, replacing what is there; returns the final paths.

    Old indices leave first and new ones come last: a data set without its .idx is not taken for one, so a process that
    is killed in between leaves no index beside the tokens of another one.
    """
    staged = sorted(
        (path for path in staging.rglob("*") if path.is_file()), key=lambda path: (path.suffix == ".idx", path)
    )
    for path in staged:
        if path.suffix == ".idx":
            (folder / path.relative_to(staging)).unlink(missing_ok=True)
    published = []
    for path in staged:
        final = folder / path.relative_to(staging)
        final.parent.mkdir(exist_ok=True)
        os.replace(path, final)
        published.append(final)
    return published
