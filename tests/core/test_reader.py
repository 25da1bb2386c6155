"""Packed corpora, collation and dealing: borders, isolation of ranks, verification."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from cprec.data.collate import Batch, assemble, collate
from cprec.data.corpora import open_manifests
from cprec.data.dataset import PackedDataset, _growing
from cprec.data.sampler import Phase, Sampler, quotas_of
from cprec.errors import ConfigError, DataError
from cprec.format import (
    Manifest,
    PackedCorpus,
    PackedRows,
    Row,
    TokenBuffer,
    TokenizerInfo,
    _read_tokens,
    read_manifest,
    read_rows,
    row_cost,
    write_manifest,
    write_row_facts,
    write_shard,
)
from cprec.loss import IGNORE_INDEX as X


def test_a_batch_has_the_labels_positions_and_borders_worked_out_by_hand() -> None:
    rows = [
        Row(np.array([5, 6, 7, 8, 9, 1], dtype=np.uint16), np.array([4, 2], dtype=np.int32), np.array([0, 1]), 0, 4),
        Row(np.array([3, 4, 1, 2, 1, 1], dtype=np.uint16), np.array([3, 1, 2], dtype=np.int32), np.array([2, 3]), 2, 2),
    ]
    batch = collate(rows, [7, 8])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 3, 4, 1, 2, 1, 1]]
    assert batch.labels.tolist() == [
        [6, 7, 8, X, 1, X],  # a document's last token predicts nothing
        [4, 1, X, X, X, X],  # a document of one token, and padding, predict nothing
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 9, 10, 12] and batch.cu_seqlens.dtype.itemsize == 4
    assert (batch.max_seqlen, batch.n_valid, batch.n_pad) == (4, 6, 2)
    assert batch.n_valid_by_row.tolist() == [4, 2] and batch.corpus.tolist() == [7, 8]
    assert batch.doc_ids.tolist() == [0, 1, 2, 3, -1] and batch.doc_corpus.tolist() == [7, 7, 8, 8, 8]
    assert row_cost(rows[1].doc_lens) == 9 + 1 + 4


def test_with_a_loss_mask_only_its_tokens_are_labels() -> None:
    # one document "lead-in 5, item 6, target 7, end 1", one "lead-in 8, target 9, end 1", padding 1 1
    ids, lens = np.array([5, 6, 7, 1, 8, 9, 1, 1, 1], dtype=np.uint16), np.array([4, 3, 2], dtype=np.int32)
    mask = np.array([0, 0, 1, 1, 0, 1, 1, 0, 0], dtype=np.bool_)
    plain = Row(ids, lens, np.array([0, 1]), 2, 5)
    masked = Row(ids, lens, np.array([0, 1]), 2, 4, mask)
    batch = collate([masked, plain], [0, 0])
    assert batch.labels.tolist() == [
        [X, 7, 1, X, 9, 1, X, X, X],
        [6, 7, 1, X, 9, 1, X, X, X],
    ]
    assert batch.n_valid_by_row.tolist() == [4, 5] and batch.n_valid == 9
    # a mask over a document's first token and over padding makes no labels of them
    everything = Row(ids, lens, np.array([0, 1]), 2, 5, np.ones(9, dtype=np.bool_))
    assert collate([everything], [0]).labels.tolist() == collate([plain], [0]).labels.tolist()
    assert (mask == [0, 0, 1, 1, 0, 1, 1, 0, 0]).all()  # what was given is as it was


def shard_with_mask(folder: Path, *, has_loss_mask: bool) -> npt.NDArray[np.bool_]:
    """A corpus of 5 rows of 9 tokens with a seeded mask; its manifest says `has_loss_mask`."""
    rng = np.random.default_rng(3)
    mask = rng.random((5, 9)) < 0.5
    folder.mkdir()
    lens = np.full(5, 9, dtype=np.int32)
    info = write_shard(folder / "shard-00000.arrow", PackedRows(
        np.full((5, 9), 2, dtype=np.uint16), lens, np.ones(5, np.int64), np.arange(5), np.ones(5, np.int64),
        np.zeros(5, np.int32), mask))
    write_manifest(folder, Manifest(
        corpus="a", kind="train", seq_len=9, dtype="uint16", n_rows=5, n_tokens=45, n_pad=0, n_documents=5,
        n_documents_by_domain={"a": 5}, sum_squared_doc_lens=405, seed=0, split_hash="0", max_timestamp_ms=0,
        sources={}, template=tiny.TEMPLATE, template_hash=tiny.TEMPLATE.hash, has_loss_mask=has_loss_mask,
        shards=[info], row_facts=write_row_facts(folder, [info]),
        tokenizer=TokenizerInfo(name="t", fingerprint="0", vocab_size=9, eos_id=1, pad_id=1)))
    return mask


def test_a_loss_mask_reads_back_as_written(tmp_path: Path) -> None:
    mask = shard_with_mask(tmp_path / "a", has_loss_mask=True)
    corpus = PackedCorpus(tmp_path / "a")
    assert [row.loss_mask.tolist() for row in corpus if row.loss_mask is not None] == mask.tolist()
    sampler = Sampler(("a",), (5,), (Phase(0, quotas_of([1])),), seed=3)
    reader = PackedDataset([corpus], sampler, global_batch_size=4, micro_batch_size=2)
    step = reader.step(0)
    read = [int(i) for i in sampler.rows(0, 4).row]
    assert step.n_valid == sum(b.n_valid for b in step.batches) == mask[read, 1:].sum()


def test_a_shard_that_lacks_the_mask_of_its_manifest_is_refused(tmp_path: Path) -> None:
    shard_with_mask(tmp_path / "a", has_loss_mask=False)
    with pytest.raises(DataError, match=r"has_loss_mask=False, columns input_ids, .*loss_mask; prepare"):
        PackedCorpus(tmp_path / "a")[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reader")
    model = tiny.write_model(root / "model")
    tiny.write_corpus(root / "packed", "a", model=model, n_rows=37, seed=1, shard_rows=10)
    tiny.write_corpus(root / "packed", "b", model=model, n_rows=20, seed=2)
    return root / "packed"


def dataset(packed: Path, *, rank: int = 0, world_size: int = 1, micro: int = 2) -> PackedDataset:
    sampler = Sampler(("a", "b"), (37, 20), (Phase(0, quotas_of([2, 1])),), seed=3)
    return PackedDataset([PackedCorpus(packed / name, at_random=True) for name in "ab"], sampler, global_batch_size=16,
                         micro_batch_size=micro, rank=rank, world_size=world_size)


def read_by(packed: Path, rank: int, step: int, **sizes: int) -> list[tuple[int, int]]:
    """Corpus and row of what one rank reads of a step."""
    rows = dataset(packed, rank=rank, **sizes).step_rows(step)
    mine = rows.dealt[:, :, rank].reshape(-1)
    return list(zip(rows.corpus[mine].tolist(), rows.row[mine].tolist(), strict=True))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, 2), (4, 1), (8, 2), (16, 1)])
def test_ranks_share_out_a_steps_rows_and_any_world_size_reads_the_same(
        packed: Path, world_size: int, micro: int) -> None:
    for step in (0, 1, 5):
        alone = sorted(read_by(packed, 0, step))
        by_rank = [read_by(packed, r, step, world_size=world_size, micro=micro) for r in range(world_size)]
        assert sorted(row for rank in by_rank for row in rank) == alone
        assert {len(rank) for rank in by_rank} == {16 // world_size}
        parts = [dataset(packed, rank=r, world_size=world_size, micro=micro).step(step) for r in range(world_size)]
        assert sum(b.n_valid for p in parts for b in p.batches) == parts[0].n_valid
        assert sum(b.n_pad for p in parts for b in p.batches) == parts[0].n_pad


def test_the_ranks_of_a_micro_step_get_rows_of_nearly_equal_cost(packed: Path) -> None:
    def spread(cost: npt.NDArray[np.int64]) -> float:
        by_rank = cost.sum(axis=1)
        return float((by_rank.max(axis=1) / by_rank.mean(axis=1)).mean())

    rows = dataset(packed, world_size=4).step_rows(2)
    at, corpora = dataset(packed).sampler.rows(32, 16), dataset(packed).corpora
    costs = [row_cost(corpora[c][int(r)].doc_lens) for c, r in zip(at.corpus, at.row, strict=True)]
    assert rows.cost.tolist() == costs
    assert spread(rows.cost[rows.dealt]) < spread(rows.cost.reshape(2, 2, 4))
    assert sorted(rows.dealt.reshape(-1)) == list(range(16))


def test_the_prefetched_steps_are_the_steps(packed: Path) -> None:
    reader = dataset(packed)
    for n, step in zip(range(3, 6), reader.steps(3, 6), strict=True):
        again = reader.step(n)
        assert [b.input_ids.tolist() for b in step.batches] == [b.input_ids.tolist() for b in again.batches]
    assert list(reader.steps(4, 4)) == []


def shard_with_padding(folder: Path, *, like: Path) -> None:
    """A corpus of 5 rows of 9 tokens without a mask: documents of 4 and of 0 to 4 tokens, then padding."""
    folder.mkdir()
    second = np.arange(5)
    lens = np.stack([np.full(5, 4), second, 5 - second], axis=1).reshape(-1)
    info = write_shard(folder / "shard-00000.arrow", PackedRows(
        np.arange(45, dtype=np.uint16).reshape(5, 9), lens[lens > 0].astype(np.int32), np.array([2, 3, 3, 3, 3]),
        np.arange(10, 19), np.array([1, 2, 2, 2, 2]), (5 - second).astype(np.int32)))
    write_manifest(folder, read_manifest(like).model_copy(update={
        "corpus": folder.name, "has_loss_mask": False, "shards": [info], "row_facts": write_row_facts(folder, [info])}))


def shown(batch: Batch) -> dict[str, object]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}


def test_batches_made_together_are_those_of_their_rows_alone(tmp_path: Path) -> None:
    shard_with_mask(tmp_path / "masked", has_loss_mask=True)
    shard_with_padding(tmp_path / "padded", like=tmp_path / "masked")
    corpora = [PackedCorpus(tmp_path / "masked"), PackedCorpus(tmp_path / "padded")]
    rows = [(0, 3), (1, 0), (0, 0), (1, 4), (1, 2), (0, 4)]
    found = [corpora[c].find(np.array([i]))[0] for c, i in rows]
    alone = [corpora[c][i] for c, i in rows]
    buffer = TokenBuffer(8, 9, "uint16")
    corpus, n_labels = np.array([c for c, _ in rows]), np.array([row.n_labels for row in alone])
    for micro in (1, 2, 3, 6):
        read = read_rows(found, np.array([row.n_pad for row in alone], dtype=np.int32), buffer)
        made = assemble(read, corpus, n_labels, micro_batch_size=micro)
        assert len(made) == 6 // micro
        for i, batch in enumerate(made):
            here = slice(i * micro, (i + 1) * micro)
            assert shown(batch) == shown(collate(alone[here], corpus[here].tolist()))


def test_rows_are_the_same_where_the_system_cannot_say_which_are_in_memory(
        packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids_of(dataset(packed).step(0).batches)
    monkeypatch.setattr("cprec.format._NO_WAIT", 1 << 30)  # a flag that no system knows
    assert ids_of(dataset(packed).step(0).batches) == expected


def test_corpora_whose_rows_have_other_forms_are_not_read_together(packed: Path, tmp_path: Path) -> None:
    shard_with_mask(tmp_path / "m", has_loss_mask=True)
    sampler = Sampler(("a", "m"), (37, 5), (Phase(0, quotas_of([2, 1])),), seed=3)
    reader = PackedDataset([PackedCorpus(packed / "a"), PackedCorpus(tmp_path / "m")], sampler, global_batch_size=4,
                           micro_batch_size=2)
    with pytest.raises(DataError, match=r"differ in \(seq_len, dtype\): \[\(9, 'uint16'\), \(64, 'uint16'\)\]"):
        reader.step(0)


def test_a_shard_that_is_cut_short_while_it_is_open_is_named(packed: Path, tmp_path: Path) -> None:
    shard = copy(packed, tmp_path) / "shard-00003.arrow"
    corpus = PackedCorpus(tmp_path / "a", at_random=True)
    places = corpus.find(np.array([36]))
    os.truncate(shard, 200)
    with pytest.raises(DataError, match=r"shard-00003.arrow has become shorter: nothing at byte [\d,]+, where it had"):
        _read_tokens(places, TokenBuffer(1, tiny.SEQ_LEN, "uint16").rows)


def test_the_first_parts_of_a_run_are_small() -> None:
    assert list(_growing(5, 25, 8)) == [range(5, 6), range(6, 8), range(8, 12), range(12, 20), range(20, 25)]
    assert list(_growing(0, 2, 0)) == [range(0, 1), range(1, 2)]  # a step that is a part of its own
    assert list(itertools.islice(_growing(0, None, 2), 3)) == [range(0, 1), range(1, 3), range(3, 5)]


def test_opened_alone_a_dataset_warns_of_a_weight_that_whole_rows_do_not_hold(
        packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="cprec"):
        PackedDataset.open(packed, global_batch_size=16, mix={"a": 1, "b": 1e-6})
    assert "mix: b wants 0.0164 of 16384 rows and gets 1" in caplog.text


def ids_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.input_ids[0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_plain_data_loader_gives_a_ranks_micro_batches_in_order_with_any_workers(packed: Path, workers: int) -> None:
    expected = ids_of(b for step in dataset(packed, rank=1, world_size=2).steps(0, 2) for b in step.batches)
    loader = DataLoader(dataset(packed, rank=1, world_size=2), batch_size=None, num_workers=workers)
    assert ids_of(itertools.islice(loader, 8)) == expected


def test_the_state_of_an_iteration_goes_on_at_the_very_batch(packed: Path) -> None:
    reader = dataset(packed, world_size=2)
    whole = ids_of(itertools.islice(reader, 9))
    first = dataset(packed, world_size=2)
    assert ids_of(itertools.islice(first, 5)) == whole[:5]
    second = dataset(packed, world_size=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids_of(itertools.islice(second, 4)) == whole[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader_saves_and_restores_it(packed: Path, workers: int) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    whole = ids_of(itertools.islice(dataset(packed), 9))
    loader = loaders.StatefulDataLoader(dataset(packed), batch_size=None, num_workers=workers)
    assert ids_of(itertools.islice(loader, 5)) == whole[:5]
    again = loaders.StatefulDataLoader(dataset(packed), batch_size=None, num_workers=workers)
    again.load_state_dict(loader.state_dict())
    assert ids_of(itertools.islice(again, 4)) == whole[5:]


def test_at_a_steps_border_the_state_serves_any_number_of_ranks_and_within_one_only_its_own(packed: Path) -> None:
    reader = dataset(packed, world_size=2)
    list(itertools.islice(reader, 8))  # two steps of four micro-batches
    elsewhere = dataset(packed, world_size=4, rank=3)
    elsewhere.load_state_dict(reader.state_dict())
    assert ids_of(itertools.islice(elsewhere, 2)) == ids_of(dataset(packed, world_size=4, rank=3).step(2).batches)
    next(iter(reader))
    with pytest.raises(ConfigError, match="within step 2, which had 4 micro-batches per rank and now has 2"):
        elsewhere.load_state_dict(reader.state_dict())
    other = Sampler(("a", "b"), (37, 20), (Phase(0, quotas_of([2, 1])),), seed=4)
    with pytest.raises(ConfigError, match="other corpora, weights, seed or global_batch_size"):
        PackedDataset(reader.corpora, other, global_batch_size=16, micro_batch_size=2).load_state_dict(
            reader.state_dict())


def test_opened_alone_a_dataset_mixes_by_size_or_by_weights(packed: Path) -> None:
    corpora = PackedDataset.open(packed, global_batch_size=16).step_rows(0).corpus
    assert 9 <= (corpora == 0).sum() <= 11  # 37 of 57 rows
    only = PackedDataset.open(packed, global_batch_size=16, mix={"b": 1})
    assert set(only.step_rows(0).corpus.tolist()) == {1}
    with pytest.raises(ConfigError, match="global_batch_size=16 does not divide by micro_batch_size=5"):
        PackedDataset.open(packed, global_batch_size=16, micro_batch_size=5)


def test_a_batch_that_is_held_keeps_its_values_while_memory_of_others_is_used_again(packed: Path) -> None:
    reader = iter(dataset(packed))
    held = [next(reader) for _ in range(300)][::90]  # by now 64 batches are made at once
    before, where = [b.input_ids.clone() for b in held], {b.input_ids.data_ptr() for b in held}
    used = [next(reader).input_ids.data_ptr() for _ in range(64 * 12)]
    assert len(set(used)) <= 64 * 4 and not where & set(used)
    assert all(torch.equal(b.input_ids, ids) for b, ids in zip(held, before, strict=True))


def test_no_more_shards_stay_open_than_the_process_may_have_files(
        packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [row.input_ids.tolist() for row in PackedCorpus(packed / "a")]
    monkeypatch.setattr("cprec.format._most_open", lambda: 2)
    corpus = PackedCorpus(packed / "a")
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    for i in (0, 36, 11, 22, 3, 35, 1):
        assert corpus[i].input_ids.tolist() == expected[i]
        assert len(list(files.iterdir())) <= before + 2 * 2  # a shard's own and its mapping's


def resident_kb(path: Path) -> int:
    """Of the file's mappings, how much is in this process's memory."""
    mapped, kb = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = line.endswith(str(path))
        elif mapped and line.startswith("Rss:"):
            kb += int(line.split()[1])
    return kb


def test_pages_that_were_read_are_given_back_and_views_of_them_stay_valid(packed: Path, tmp_path: Path) -> None:
    packed = copy(packed, tmp_path).parent  # others may have mapped the fixture's
    corpus = PackedCorpus(packed / "a", at_random=True)
    rows = [corpus[i] for i in range(37)]
    costs = corpus.facts(np.arange(37))["cost"].tolist()
    shard = packed / "a" / "shard-00001.arrow"
    assert resident_kb(shard) > 0 and resident_kb(packed / "a" / "rows.npy") > 0
    corpus.release()
    assert resident_kb(shard) == resident_kb(packed / "a" / "rows.npy") == 0
    assert [r.input_ids.tolist() for r in rows] == [r.input_ids.tolist() for r in PackedCorpus(packed / "a")]
    assert costs == [row_cost(r.doc_lens) for r in rows]


def test_a_dataset_gives_its_pages_back_while_it_reads(
        packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(packed, tmp_path)
    reader = PackedDataset.open(tmp_path, global_batch_size=16)
    reader.step(0)
    assert sum(resident_kb(folder / f"shard-{i:05d}.arrow") for i in range(4)) > 0
    monkeypatch.setattr("cprec.data.dataset._RELEASE_ROWS", 16)
    monkeypatch.setattr("cprec.data.dataset._RELEASE_BYTES", 0)
    for step in range(3):
        reader.step(step)
        assert sum(resident_kb(folder / f"shard-{i:05d}.arrow") for i in range(4)) == 0


@pytest.mark.parametrize(("what", "found"), [
    ({"dtype": "uint32"}, "has 10 rows of 64 uint16, its manifest says 10 rows of 64 uint32"),
    ({"seq_len": 32}, "has 10 rows of 64 uint16, its manifest says 10 rows of 32 uint16")])
def test_a_manifest_that_disagrees_with_its_shards_is_told(
        packed: Path, tmp_path: Path, what: dict[str, object], found: str) -> None:
    manifest = copy(packed, tmp_path) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **what}))
    with pytest.raises(DataError, match=found):
        PackedCorpus(tmp_path / "a")[0]


def test_a_rank_that_there_is_not_is_refused(packed: Path) -> None:
    for rank in (-1, 2):
        with pytest.raises(ConfigError, match=f"rank={rank}: with world_size=2 there are ranks 0 to 1"):
            dataset(packed, rank=rank, world_size=2)


def test_a_rows_facts_are_those_of_its_tokens(packed: Path, tmp_path: Path) -> None:
    shard_with_mask(tmp_path / "m", has_loss_mask=True)
    for corpus in (PackedCorpus(packed / "a"), PackedCorpus(tmp_path / "m")):
        for i, row in enumerate(corpus):
            assert corpus.facts(np.array([i])).item() == (row_cost(row.doc_lens), row.is_label.sum(), row.n_pad)
            assert row.n_labels == row.is_label.sum()


def test_a_corpus_reads_back_what_was_written_across_shards(packed: Path) -> None:
    corpus = PackedCorpus(packed / "a")
    assert len(corpus) == 37 and [s.rows for s in corpus.manifest.shards] == [10, 10, 10, 7]
    assert corpus.locate(25) == ("shard-00002.arrow", 5)
    for row in corpus:
        assert row.doc_lens.sum() == tiny.SEQ_LEN and (row.n_pad == 0 or row.doc_lens[-1] == row.n_pad)
        ends = np.cumsum(row.real_doc_lens) - 1
        assert (row.input_ids[ends] == 1).all()  # every document ends with the end-of-sequence token
    assert sum(len(r.doc_ids) for r in corpus) == corpus.manifest.n_documents
    corpus.verify()


def copy(packed: Path, to: Path) -> Path:
    (to / "a").mkdir(parents=True)
    for file in (packed / "a").iterdir():
        (to / "a" / file.name).write_bytes(file.read_bytes())
    return to / "a"


def test_a_flipped_byte_is_found_and_its_shard_named(packed: Path, tmp_path: Path) -> None:
    shard = copy(packed, tmp_path) / "shard-00002.arrow"
    data = bytearray(shard.read_bytes())
    data[700] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00002.arrow has hash .*were altered"):
        PackedCorpus(tmp_path / "a").verify()


def test_a_truncated_and_a_missing_shard_are_named_at_opening(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path)
    shard = folder / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"shard-00001.arrow has \d+ bytes, its manifest says \d+"):
        PackedCorpus(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.arrow is missing"):
        PackedCorpus(folder)


def test_an_unfinished_folder_and_one_of_another_format_are_refused(packed: Path, tmp_path: Path) -> None:
    folder = copy(packed, tmp_path)
    manifest = folder / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(DataError, match="format_version=99"):
        PackedCorpus(folder)
    manifest.unlink()
    with pytest.raises(DataError, match="did not finish"):
        PackedCorpus(folder)
    with pytest.raises(DataError, match="no finished train corpus"):
        open_manifests(tmp_path, "train")
