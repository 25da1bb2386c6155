"""Plain text whose licence allows it, made at run time: the documentation strings of installed packages.

    python -m experiments.text --out work/experiments/cpu/text --chars 2000000

reads: the Python sources of `PACKAGES`, which this project depends on. writes: `learned/text.parquet` and
`held_out/text.parquet` (column `text`, a document each; every twentieth is held out), and `sources.json`, which says
what came from which package, version and licence. Raises DataError for a package that no longer says that licence.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cprec import cli
from cprec.errors import DataError
from cprec.format import replacing, write_atomically
from cprec.log import get_logger

log = get_logger(__name__)
PACKAGES = {"scipy": "BSD", "numpy": "BSD", "pydantic": "MIT", "transformers": "Apache", "accelerate": "Apache",
            "torch": "BSD"}
"""Package -> a word of its licence, all of them permissive. In this order, until there is enough."""
LEAST_CHARS = 200
"""A shorter string says too little to be a document."""
HELD_OUT_EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--chars", required=True, type=int, help="about how many characters to learn from")
    args = parser.parse_args()
    write_text(args.out, n_chars=args.chars)


def write_text(out: Path, *, n_chars: int) -> None:
    """Both parts and `sources.json`. Raises DataError where the packages hold less."""
    learned: list[str] = []
    held_out: list[str] = []
    taken: dict[str, dict[str, object]] = {}
    seen: set[str] = set()
    left = n_chars
    for name, licence in PACKAGES.items():
        package, n_before = distribution(name), left
        for text in docstrings(package):
            key = hashlib.md5(text.encode("utf-8", "replace")).hexdigest()
            if left <= 0 or key in seen:
                continue
            seen.add(key)
            is_held_out = int(key[:8], 16) % HELD_OUT_EVERY == 0
            (held_out if is_held_out else learned).append(text)
            left -= 0 if is_held_out else len(text)
        if left < n_before:
            taken[name] = {"version": package.version, "licence": _licence(package, licence), "chars": n_before - left}
        if left <= 0:
            break
    if left > 0 or not held_out:
        raise DataError(f"the documentation of {', '.join(PACKAGES)} holds {n_chars - left:,} characters, not "
                        f"{n_chars:,}; lower data.text_chars of the form")
    for part, texts in (("learned", learned), ("held_out", held_out)):
        path = out / part / "text.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            pq.write_table(pa.table({"text": texts}), partial)
    write_atomically(out / "sources.json", json.dumps(taken, indent=1) + "\n")
    log.info("%d documents to learn from, %d held out, of %s", len(learned), len(held_out), ", ".join(taken))


def docstrings(package: Distribution) -> Iterator[str]:
    """The documentation strings of a package's modules, classes and functions, file by file in order of their names."""
    files = sorted(str(f) for f in package.files or [] if f.suffix == ".py" and "tests" not in f.parts)
    for name in files:
        path = Path(str(package.locate_file(name)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):  # templates of code, and files that are not there
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= LEAST_CHARS:
                    yield text


def _licence(package: Distribution, expected: str) -> str:
    """The licence as the package states it. Raises DataError unless it is the expected one."""
    said = [package.metadata.get("License-Expression"), *(package.metadata.get_all("Classifier") or []),
            (package.metadata.get("License") or "").partition("\n")[0]]
    found = next((s for s in said if s and expected in s), None)
    if found is None:
        raise DataError(f"{package.name} {package.version} does not say that its licence is {expected}; take it out of "
                        f"PACKAGES in experiments/text.py")
    return found.removeprefix("License :: OSI Approved :: ")


if __name__ == "__main__":
    cli.run(main)
