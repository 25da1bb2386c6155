"""How full the rows are: the real data, not resampled, packed at several row lengths.

reads: a finished preparation of the real data. writes: packed corpora below the work folder, removed. Takes seconds.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.prep.ours import encode_and_pack
from data_prep.config import PackSettings
from data_prep.workers import Workers


@dataclass(frozen=True)
class Fill:
    """Shares of the rows that are real tokens, at one row length."""

    seq_len: int
    n_rows: int
    n_pad: int
    fill: float
    """Over all training corpora."""
    by_corpus: dict[str, float]


def measure(prepared: Path, work: Path, *, tokenizer: Path, seq_lens: tuple[int, ...], cores: int) -> list[Fill]:
    """Pack all training corpora of `prepared` at every row length."""
    workers = Workers(cores)
    found = []
    for seq_len in seq_lens:
        packed = encode_and_pack(prepared, work / f"fill-{seq_len}", tokenizer=tokenizer,
                                 settings=PackSettings(seq_len=seq_len), workers=workers)
        trained = {name: m for name, m in packed.manifests.items() if m.kind == "train"}
        n_rows, n_pad = (sum(getattr(m, k) for m in trained.values()) for k in ("n_rows", "n_pad"))
        found.append(Fill(seq_len, n_rows, n_pad, 1 - n_pad / (n_rows * seq_len),
                          {name: m.fill for name, m in trained.items()}))
        shutil.rmtree(packed.layout.out)
    workers.close()
    return found
