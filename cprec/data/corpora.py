"""Which corpora a run reads: where they lie, whether they fit together, and the record that is kept of them.

reads: the manifests of packed corpora, in one folder or several; a run's `data.json`. Costs: manifests only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash
from pydantic import ValidationError

from cprec.data.remote import ShardCache, list_remote_corpora, manifest_at
from cprec.errors import CheckpointError, DataError, raise_all
from cprec.format import Manifest, list_corpora
from cprec.settings import Settings
from cprec.storage import is_url
from cprec.template import Template

DATA = "data.json"
Packed = str | Path | Sequence[str | Path]
"""One folder of packed corpora, or several; URLs too."""


class CorpusRecord(Settings):
    """What a run remembers of a training corpus: enough to know it again, to count on without it, and to tell of it in
    a model card."""

    n_rows: int
    n_documents: int
    n_tokens: int
    rows_hash: str
    """Over the hashes of its shards: the same rows, wherever the folder is."""
    split_hash: str


class DataRecord(Settings):
    """The data of a run, as `data.json` in its folder. A run never goes on with other data than it began with.

    A branch's record also has the trunk's corpora that it no longer reads: its rows are counted on from theirs.
    """

    seq_len: int
    template: Template | None
    """None where all of it is plain text."""
    is_audited: bool
    corpora: dict[str, CorpusRecord]
    """By name, sorted."""


def find_corpora(packed: Packed, cache: ShardCache | None = None) -> dict[str, str]:
    """Folder or URL of every finished corpus below `packed`, by name, sorted; a folder that is a corpus has its own
    name.

    Raises DataError for a folder that does not exist and for a name that two folders have.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for root in roots_of(packed):
        if not is_url(root) and not Path(root).is_dir():
            problems.append(f"{root}: no such folder; run launch/prepare.py first")
            continue
        for name in list_remote_corpora(root) if is_url(root) else list_corpora(root):
            place = root if name == "." else f"{root.rstrip('/')}/{name}"
            name = manifest_at(place, cache).corpus if name == "." else name
            if name in found:
                problems.append(f"corpus {name} is in {found[name]} and in {place}; leave one folder out, or name of "
                                f"it only the folders of the corpora that you want")
            found.setdefault(name, place)
    raise_all(problems, of="data.packed", error=DataError)
    return dict(sorted(found.items()))


def manifests_of(places: Mapping[str, str], kind: str, packed: Packed, cache: ShardCache | None) -> dict[str, Manifest]:
    """`of_kind` of the corpora in `places`, for who wants one kind only. Raises DataError."""
    return of_kind(read_manifests(places, cache), kind, packed)


def read_manifests(places: Mapping[str, str], cache: ShardCache | None) -> dict[str, Manifest]:
    """Manifest of every corpus in `places`, by name, in their order. Raises DataError."""
    return {name: manifest_at(place, cache) for name, place in places.items()}


def of_kind(manifests: Mapping[str, Manifest], kind: str, packed: Packed) -> dict[str, Manifest]:
    """Those of the corpora of `kind` ("train" or "valid") that have rows. Raises DataError when there is none."""
    chosen = {name: m for name, m in manifests.items() if m.kind == kind and m.n_rows > 0}
    if not chosen:
        raise DataError(f"data.packed={shown(packed)}: no finished {kind} corpus below it; run launch/prepare.py to "
                        f"its end")
    return chosen


def open_manifests(packed: Packed, kind: str, cache: ShardCache | None = None) -> dict[str, Manifest]:
    """Manifests of the finished corpora of `kind` below `packed`. Raises DataError, also when there is none."""
    return manifests_of(find_corpora(packed, cache), kind, packed, cache)


def cache_for(packed: Packed, *, folder: str, gb: float) -> ShardCache | None:
    """The machine's cache of shards, in `folder`, where some of the data lie at a URL."""
    return ShardCache(folder, round(gb * 1e9)) if any(is_url(root) for root in roots_of(packed)) else None


def check_alike(manifests: Mapping[str, Manifest], packed: Packed, *, allow_unaudited: bool = False) -> None:
    """Raise DataError when corpora that serve one run disagree about seq_len, template, tokenizer or split.

    Plain text has no template to disagree about. Two splits are two clocks: the audit of one corpus says nothing about
    what is held out by the other's, so `allow_unaudited` lets that pass.
    """
    first_name, first = next(((name, m) for name, m in manifests.items() if m.template), next(iter(manifests.items())))
    for name, m in manifests.items():
        for field in ("seq_len", "template_hash"):
            if getattr(m, field) != getattr(first, field) and not (field == "template_hash" and m.template is None):
                raise DataError(f"{shown(packed)}: corpora {first_name} and {name} differ in {field} "
                                f"({getattr(first, field)} and {getattr(m, field)}); prepare them alike")
        if m.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise DataError(f"{shown(packed)}: corpora {first_name} and {name} were packed with different tokenizers "
                            f"({first.tokenizer.name}, {m.tokenizer.name}); prepare them with one")
        if m.split_hash != first.split_hash and not allow_unaudited:
            raise DataError(_two_splits(first_name, first.split_hash, name, m.split_hash, packed))


def check_fits(data: DataRecord, train: Mapping[str, Manifest], run_dir: str, packed: Packed, *,
               allow_unaudited: bool) -> None:
    """Raise DataError when corpora differ in seq_len, template or split from what the trunk in `run_dir` read, as
    `check_alike` does for corpora that are there."""
    known_name, known = next(iter(data.corpora.items()))
    for name, m in train.items():
        if m.seq_len != data.seq_len:
            raise DataError(f"{shown(packed)}: corpus {name} has rows of seq_len={m.seq_len} tokens, {run_dir} was "
                            f"trained on rows of {data.seq_len}; prepare it alike")
        if m.template and data.template and m.template.hash != data.template.hash:
            raise DataError(f"{shown(packed)}: corpus {name} was made with another template ({m.template.name!r}) than "
                            f"what {run_dir} was trained on ({data.template.name!r}); prepare it alike")
        if m.split_hash != known.split_hash and name not in data.corpora and not allow_unaudited:
            raise DataError(_two_splits(f"{known_name} of {run_dir}", known.split_hash, name, m.split_hash, packed))


def _two_splits(a: str, split_a: str, b: str, split_b: str, packed: Packed) -> str:
    return (f"{shown(packed)}: corpora {a} and {b} differ in split_hash ({split_a} and {split_b}), so what one holds "
            f"out may be in the other; prepare them together, or set data.allow_unaudited=true knowingly")


def shown(packed: Packed) -> str:
    """The folders as a message names them."""
    return ", ".join(roots_of(packed))


def roots_of(packed: Packed) -> list[str]:
    """The folders and URLs that `packed` names."""
    return [str(packed)] if isinstance(packed, str | Path) else [str(p) for p in packed]


def record_of(train: Mapping[str, Manifest], trunk: DataRecord | None = None) -> DataRecord:
    """The record of the corpora that are there and, for a branch, of those of its trunk that are not."""
    corpora = {} if trunk is None else dict(trunk.corpora)
    corpora |= {name: CorpusRecord(n_rows=m.n_rows, n_documents=m.n_documents, n_tokens=m.n_tokens,
                                   rows_hash=_rows_hash(m), split_hash=m.split_hash) for name, m in train.items()}
    templates = [m.template for m in train.values() if m.template]
    return DataRecord(
        seq_len=next(iter(train.values())).seq_len, corpora=dict(sorted(corpora.items())),
        template=templates[0] if templates else trunk.template if trunk else None,
        is_audited=all(m.audit is not None and m.audit.passed for m in train.values())
        and (trunk is None or trunk.is_audited))


def _rows_hash(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest("".join(s.xxh3_128 for s in manifest.shards).encode())


def read_data_record(run_dir: Path) -> DataRecord:
    """The record of the data of the run in `run_dir`. Raises CheckpointError when it has none that can be read."""
    path = run_dir / DATA
    try:
        return DataRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}; {run_dir} is no run that has begun") from None
    except ValidationError as e:
        raise CheckpointError(f"{path} is not a record of a run's data that this version of CPRec wrote "
                              f"({e.error_count()} problems, such as {e.errors()[0]['loc']}: {e.errors()[0]['msg']}); "
                              f"go on with the version that began the run") from None
