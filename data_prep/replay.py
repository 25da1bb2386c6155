"""Plain text for replay, against forgetting: documents out of JSON lines or Parquet, made clean.

reads: staged (or local) Parquet. writes: `texts/<name>.parquet`, one column `text`. Keeps a row group
of them in memory, `TEXTS_PER_GROUP` documents or `ROW_GROUP_TEXT_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from data_prep.config import Replay
from data_prep.engine import write_parquet
from data_prep.records import Counts
from data_prep.sources import JSON, PARQUET, Field, Input, Reader, find

TEXT = "text"
"""Our name of the documents' column."""
TEXTS = pa.schema([(TEXT, pa.string())])
TEXTS_PER_GROUP = 4096
"""Row groups are what packing reads at a time, and texts can be long."""
CHANGED = "documents changed: line ends, control characters, a byte order mark or white space around"
_UNWANTED = dict.fromkeys((*range(0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0)))


def replay_inputs(corpus: Replay) -> list[Input]:
    """The files of one replay corpus, and how they are read. Raises DataError when there is none."""
    found = find(corpus.path, PARQUET + JSON)
    odd = [s.label for s in found if s.suffix not in PARQUET + JSON]
    if odd:
        raise DataError(f"replay {corpus.name}: {odd[0]} is neither Parquet nor JSON lines; use files ending in "
                        f"{', '.join(PARQUET + JSON)}")
    field = Field(name=TEXT, of=(corpus.text,))
    return [Input(s, Reader(kind="parquet" if s.suffix in PARQUET else "json", fields=(field,),
                            key=f"`text` of replay {corpus.name}")) for s in found]


def clean_text(text: str) -> str:
    """The document with lines ended by a newline (a page break is one), without control characters but tabs, without
    a byte order mark or white space around it. Empty when nothing is left."""
    if "\r" in text or "\x0c" in text or "\x85" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n").replace("\x85", "\n")
    return text.removeprefix("\ufeff").translate(_UNWANTED).strip()


def write_texts(path: Path, files: Sequence[tuple[Path, str]], *, counts: Counts) -> None:
    """Write the documents of a replay corpus, cleaned, as one Parquet file. Raises DataError when there is none."""
    found = replay_texts(files, name=path.stem, counts=counts)
    batches = (pa.record_batch({TEXT: pa.array(texts, pa.string())}) for texts in found)
    if write_parquet(batches, path, schema=TEXTS, group_rows=TEXTS_PER_GROUP) == 0:
        raise DataError(f"replay {path.stem}: no document with any text in {files[0][0]}; correct its `path` or "
                        f"`text`, or take it out of `replay`")


def replay_texts(files: Sequence[tuple[Path, str]], *, name: str, counts: Counts,
                 n_docs: int = 128) -> Iterator[list[str]]:
    """Yield the documents of the corpus `name`, of Parquet files (path, name of the column) in their order, cleaned,
    in batches of up to `n_docs`; empty ones are left out and counted, changed ones counted. The batches depend on the
    files only.

    Raises DataError when a file has no such column of text, or cannot be read to its end.
    """
    for path, column in files:
        for raw in _documents(path, column, n_docs, name=name):
            cleaned = [(text, t) for text, t in ((clean_text(t), t) for t in raw if t is not None) if text]
            kept = [text for text, _ in cleaned]
            counts.add(f"replay {name}: documents read", len(raw))
            counts.add(f"replay {name}: documents dropped: empty", len(raw) - len(kept))
            counts.add(f"replay {name}: {CHANGED}", sum(text != t for text, t in cleaned))
            if kept:
                yield kept


def _documents(path: Path, column: str, n_docs: int, *, name: str) -> Iterator[list[str | None]]:
    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise DataError(f"{path} has no column {column!r}; its columns: {', '.join(file.schema_arrow.names)}; "
                        f"correct `text` of replay {name}")
    kind = file.schema_arrow.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values)):
        raise DataError(f"{path}: column {column!r} of type {kind} is no text; convert it to strings, or correct "
                        f"`text` of replay {name}")
    try:
        for batch in file.iter_batches(batch_size=n_docs, columns=[column]):
            yield batch[column].to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: damaged, column {column!r} cannot be read to its end: {str(e).splitlines()[0]}; "
                        f"replace the file") from None
