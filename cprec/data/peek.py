"""What a packed corpus looks like to a person: its manifest, its rows as text, its lengths, its hashes. Lines of text.

reads: a corpus' manifest and shards (mapped), and the tokenizer for rows. writes: nothing. Costs: a row is read alone;
lengths are counted over at most `MOST_ROWS` rows, evenly spread; verifying reads every byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cprec.errors import DataError, n_of, raise_all
from cprec.format import (
    ITEM_BITS,
    MANIFEST,
    Manifest,
    PackedCorpus,
    Row,
    Tokens,
    check_hash,
    list_corpora,
    read_manifest,
)
from cprec.log import progress
from cprec.tokenizer import TRAINED, Tokenizer, load_tokenizer

MOST_ROWS = 20_000
BAR = 40
"""Width of the longest bar, in characters."""
N_BINS = 12
CONTROL = "⟦{}⟧"
"""A control token in a row's text; these two brackets in the text itself are written as escapes."""
_CONTROLS = re.compile("(⟦[^⟧]*⟧)")
FILLS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
"""Lower borders of the classes of how full a row is; the last is only what is full."""


@dataclass(frozen=True)
class Ink:
    """How things are told apart: by colour on a terminal, by plain marks elsewhere. Control tokens have their marks on
    both, and are reversed on a terminal."""

    has_colour: bool

    def document(self, text: str, n: int) -> str:
        """Text of the row's n-th document; neighbours differ."""
        return self._each_line(text, "36" if n % 2 else "33")

    def border(self, text: str) -> str:
        return self._each_line(text, "1")

    def dim(self, text: str) -> str:
        return self._each_line(text, "2")

    def learned(self, text: str) -> str:
        """Text on which there is a loss, in a row where that is not all of it."""
        return self._each_line(text, "1;32") if self.has_colour else f"[[{text}]]"

    def _each_line(self, text: str, code: str) -> str:
        if not self.has_colour:
            return text
        return "\n".join("".join(f"\x1b[{code}{';7' * (n % 2)}m{part}\x1b[0m" for n, part in
                                 enumerate(_CONTROLS.split(line)) if part) for line in text.split("\n"))


def find_corpora(path: str | Path) -> list[Path]:
    """Folders of the finished corpora that `path` means: itself, or all below it (or below its `packed`).

    Raises DataError when there is none.
    """
    root = Path(path)
    if (root / "packed").is_dir():
        root = root / "packed"
    if (root / MANIFEST).is_file():
        return [root]
    found = [root / name for name in list_corpora(root)] if root.is_dir() else []
    if not found:
        raise DataError(f"{path}: no packed corpus there; give a folder with a {MANIFEST} and shards, or the folder "
                        f"`packed` of a finished preparation")
    return found


def one_corpus(path: str | Path) -> PackedCorpus:
    """The only corpus at `path`. Raises DataError that lists them when there are several."""
    found = find_corpora(path)
    if len(found) > 1:
        raise DataError(f"{path} holds {len(found)} corpora; name one: {', '.join(str(f) for f in found)}")
    return PackedCorpus(found[0])


def show_corpora(folders: Sequence[Path]) -> Iterator[str]:
    """A table of corpora, one line each."""
    manifests = [read_manifest(f) for f in folders]
    width = max(len(m.corpus) for m in manifests)
    yield (f"{'corpus':<{width}}  {'kind':<5} {'documents':>12} {'rows':>10} {'seq_len':>7} {'tokens':>15} "
           f"{'tokens/doc':>10} {'fill':>8}  audit")
    for m in manifests:
        yield (f"{m.corpus:<{width}}  {m.kind:<5} {m.n_documents:>12,} {m.n_rows:>10,} {m.seq_len:>7,} "
               f"{m.n_tokens:>15,} {m.n_tokens / max(m.n_documents, 1):>10.1f} {m.fill:>8.3%}  {_verdict(m)}")


def show_manifest(m: Manifest) -> Iterator[str]:
    """The manifest, readable: what is in the corpus and where it came from."""
    latest = datetime.fromtimestamp(m.max_timestamp_ms / 1000, UTC)
    n_bytes = sum(s.bytes for s in m.shards)
    facts = {
        "corpus": f"{m.corpus} ({m.kind}), format {m.format_version}",
        "rows": f"{m.n_rows:,} of {m.seq_len:,} tokens ({m.dtype})",
        "tokens": f"{m.n_tokens:,} and {m.n_pad:,} of padding: {m.fill:.3%} full",
        "documents": f"{m.n_documents:,}, {m.n_tokens / max(m.n_documents, 1):.1f} tokens each, "
                     f"{m.n_documents / max(m.n_rows, 1):.1f} in a row; "
                     + ", ".join(f"{d} {n:,}" for d, n in m.n_documents_by_domain.items()),
        "latest event": f"{latest:%Y-%m-%d %H:%M:%S} UTC" if m.template else "none: plain text",
        "tokenizer": f"{m.tokenizer.name}, {m.tokenizer.vocab_size:,} ids, fingerprint {m.tokenizer.fingerprint[:16]}",
        "template": f"{m.template.name} version {m.template.version}, hash {m.template_hash[:16]}" if m.template else
                    "none: plain text",
        "seed, split": f"{m.seed}, {m.split_hash[:16]}",
        "shards": f"{len(m.shards)}, {n_bytes:,} bytes",
    }
    for name, value in facts.items():
        yield f"{name:<14}{value}"
    for i, (file, known) in enumerate(m.sources.items()):
        yield f"{'sources' if i == 0 else '':<14}{file}  {known}"
    yield f"{'audit':<14}{_verdict(m)}"
    for check, finding in (m.audit.checks if m.audit else {}).items():
        yield f"{'':<14}  {check}: {finding}"


def _verdict(m: Manifest) -> str:
    return "missing" if m.audit is None else "passed" if m.audit.passed else "FAILED"


def show_row(corpus: PackedCorpus, i: int, *, tokenizer: Tokenizer, ink: Ink) -> Iterator[str]:
    """Row `i` as text, document by document, control tokens marked. Of a document that does not stand in this row
    alone (`pack.mode: concat`) it says on which side the rest is. Raises DataError when there is no such row."""
    if not 0 <= i < len(corpus):
        raise DataError(f"{corpus.folder}: no row {i}; it has rows 0 to {len(corpus) - 1}")
    row = corpus[i]
    shard, place = corpus.locate(i)
    lens = row.real_doc_lens
    yield ink.border(f"row {i} ({shard}, place {place}): {n_of(len(lens), 'document')}, {int(lens.sum()):,} tokens, "
                     f"{row.n_pad} of padding")
    ends = np.cumsum(lens)
    for n, (doc_id, end, n_tokens) in enumerate(zip(row.doc_ids, ends, lens, strict=True)):
        inside = slice(int(end - n_tokens), int(end))
        history, first = divmod(int(doc_id), 1 << ITEM_BITS)
        origin = (f"history {history} from item {first}" if corpus.manifest.template else
                  f"text {history}, piece {first}")
        rest = [side for side, is_there in (
            ("goes on from the row before", n == 0 and _is_at(corpus, i - 1, -1, doc_id)),
            ("cut, goes on in the next row", n == len(lens) - 1 and _is_at(corpus, i + 1, 0, doc_id))) if is_there]
        yield ink.border(f"──── document {n}: {', '.join([origin, *rest])}, {n_of(n_tokens, 'token')} "
                         f"{'of it here ' if rest else ''}{'─' * 20}")
        yield "".join(_document_text(row, inside, n, tokenizer=tokenizer, ink=ink)).removesuffix("\n")
    if row.n_pad:
        pad = row.input_ids[-1:]
        yield ink.border(f"──── padding: {row.n_pad} times {_readable(pad, tokenizer)}, id {pad[0]} {'─' * 20}")


def _is_at(corpus: PackedCorpus, i: int, place: int, doc_id: np.int64) -> bool:
    """Whether row `i`, if there is one, has the document at that place among its own."""
    return 0 <= i < len(corpus) and bool(corpus[i].doc_ids[place] == doc_id)


def _document_text(row: Row, inside: slice, n: int, *, tokenizer: Tokenizer, ink: Ink) -> Iterator[str]:
    """The document in pieces, parted where the loss begins or ends if the row says so."""
    ids = row.input_ids[inside]
    mask = row.loss_mask
    if mask is None:
        yield ink.document(_readable(ids, tokenizer), n)
        return
    is_learned = np.asarray(mask[inside], dtype=bool)
    for start, end in pairwise(_changes(is_learned)):
        text = _readable(ids[start:end], tokenizer)
        yield ink.learned(text) if is_learned[start] else ink.dim(text)


def _readable(ids: Tokens, tokenizer: Tokenizer) -> str:
    """The text of the ids with control tokens in their marks: what a title only spells like one has none."""
    is_control = np.isin(ids, [*tokenizer.control_ids])
    parts: list[str] = []
    for start, end in pairwise(_changes(is_control)):
        if is_control[start]:
            parts += [CONTROL.format(printable(tokenizer.decode([i]))) for i in ids[start:end].tolist()]
        else:
            parts.append(printable(tokenizer.decode(ids[start:end].tolist())))
    return "".join(parts)


def _changes(flags: npt.NDArray[np.bool_]) -> list[int]:
    """Places where runs of equal flags begin, and the end."""
    return [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]


def printable(text: str) -> str:
    """The text with control characters, which could steer a terminal, and the marks of control tokens written as
    escapes; line breaks stay."""
    return "".join(c if c == "\n" or not (_is_control(c) or c in CONTROL.format("")) else
                   c.encode("unicode_escape").decode() for c in text)


def _is_control(c: str) -> bool:
    return ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0


def tokenizer_of(corpus: PackedCorpus, name: str | None = None) -> Tokenizer:
    """The tokenizer that the corpus was packed with: `name`, or what its manifest names.

    Raises DataError when it cannot be found or is another one.
    """
    known = corpus.manifest.tokenizer
    if name is None and known.name == TRAINED:
        near = [p / "tokenizer" for p in corpus.folder.resolve().parents if (p / "tokenizer").is_dir()]
        if not near:
            raise DataError(f"{corpus.folder} was packed with a tokenizer trained in its preparation, but none of the "
                            f"folders above it has a folder `tokenizer`; name it with --tokenizer")
        name = str(near[0])
    try:
        tokenizer = load_tokenizer(name or known.name)
    except DataError as e:
        raise DataError(f"{e}\n  {corpus.folder} was packed with it; name its place with --tokenizer") from None
    if tokenizer.fingerprint != known.fingerprint:
        raise DataError(f"tokenizer {tokenizer.name} (fingerprint {tokenizer.fingerprint[:16]}) is not the one that "
                        f"{corpus.folder} was packed with ({known.name}, {known.fingerprint[:16]}); name that one with "
                        f"--tokenizer")
    return tokenizer


def show_lengths(corpus: PackedCorpus) -> Iterator[str]:
    """Histograms of the documents' lengths, of documents per row and of how full the rows are."""
    at = np.unique(np.linspace(0, len(corpus) - 1, min(len(corpus), MOST_ROWS)).astype(np.int64))
    rows = [corpus[int(i)] for i in at]
    if not rows:
        return
    of = f"all {len(rows):,} rows" if len(rows) == len(corpus) else f"{len(rows):,} of {len(corpus):,} rows"
    lens = np.concatenate([row.real_doc_lens for row in rows])
    yield f"tokens in a document, in {of}: {_spread(lens)}"
    yield from histogram(lens)
    n_docs = np.array([len(row.real_doc_lens) for row in rows])
    yield f"documents in a row: {_spread(n_docs)}"
    yield from histogram(n_docs)
    fill = 1 - np.array([row.n_pad for row in rows]) / corpus.manifest.seq_len
    yield f"real tokens in a row, in %: mean {100 * fill.mean():.3f}"
    counts = [int(((fill >= low) & (fill < high)).sum()) for low, high in zip(FILLS, (*FILLS[1:], 2.0), strict=True)]
    names = [*(f"{100 * low:g} to {100 * high:g}" for low, high in pairwise(FILLS)), "full"]
    yield from bars(names, counts)


def _spread(values: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return (f"mean {values.mean():.1f}, median {middle:.0f}, 5 to 95 % {low:.0f} to {high:.0f}, "
            f"least {values.min()}, most {values.max()}")


def histogram(values: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> Iterator[str]:
    """Whole numbers counted in at most `N_BINS` classes of equal width, one bar each."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // N_BINS)
    counts = np.bincount((values - low) // width)
    starts = [low + width * i for i in range(len(counts))]
    names = [str(s) if width == 1 else f"{s} to {min(s + width - 1, high)}" for s in starts]
    yield from bars(names, counts.tolist())


def bars(names: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """One line per class: its name, a bar as long as its count is large, the count and its share."""
    most, total = max([*counts, 1]), max(sum(counts), 1)
    width = max(len(n) for n in names)
    for name, n in zip(names, counts, strict=True):
        bar = "█" * -(-n * BAR // most)
        yield f"  {name:>{width}} {bar:<{BAR}} {n:>10,} {n / total:>6.1%}"


def verify(folders: Sequence[Path]) -> str:
    """Compare the hash of every shard with its manifest's; what was looked at. Raises one DataError naming all that
    differ or are missing."""
    problems: list[str] = []
    corpora: list[PackedCorpus] = []
    for folder in folders:
        try:
            corpora.append(PackedCorpus(folder))
        except DataError as e:
            problems.append(str(e))
    shards = [(corpus, info) for corpus in corpora for info in corpus.manifest.files]
    for corpus, info in progress(shards, total=len(shards), label="verify", unit="shard"):
        try:
            check_hash(corpus.folder / info.file, info)
        except DataError as e:
            problems.append(str(e))
    raise_all(problems, of="packed data", error=DataError)
    n_bytes = sum(info.bytes for _, info in shards)
    return f"verified: {n_of(len(shards), 'shard')}, {n_bytes:,} bytes, each as its manifest says"
