"""What launch/peek.py shows of packed data: rows as text, manifests, lengths, hashes, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shops

from cprec.data import peek
from cprec.errors import DataError
from cprec.format import ITEM_BITS, PackedCorpus, Row
from cprec.tokenizer import load_tokenizer
from data_prep.pipeline import prepare

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN, COLOUR = peek.Ink(has_colour=False), peek.Ink(has_colour=True)


@pytest.fixture(scope="module")
def mixed(prepared: Path) -> PackedCorpus:
    return PackedCorpus(prepared / "packed" / "mixed")


def of_several_documents(corpus: PackedCorpus) -> int:
    return next(i for i, row in enumerate(corpus) if len(row.doc_ids) > 1)


def test_a_row_is_shown_as_the_lines_of_its_documents_items(prepared: Path, mixed: PackedCorpus) -> None:
    i = of_several_documents(mixed)
    shown = "\n".join(peek.show_row(mixed, i, tokenizer=peek.tokenizer_of(mixed), ink=PLAIN))
    histories = pq.read_table(prepared / "histories" / "mixed.parquet")["items"].to_pylist()
    lines = pq.read_table(prepared / "catalogue.parquet")["line"].to_pylist()
    row, (shard, place) = mixed[i], mixed.locate(i)
    assert shown.startswith(f"row {i} ({shard}, place {place}): {len(row.doc_ids)} documents")
    bodies = [body for body in re.split(r"──── .*\n?", shown)[1:] if body]
    assert len(bodies) == len(row.doc_ids)
    for n, (doc_id, body) in enumerate(zip(row.doc_ids, bodies, strict=True)):
        history, first = divmod(int(doc_id), 1 << ITEM_BITS)
        n_items = body.count("\n") - 1  # a line each, below the lead-in
        items = histories[history][first:first + n_items]
        assert body.removesuffix("\n").endswith("\n" + "".join(lines[i] for i in items) + "⟦</s>⟧"), n
        assert f"document {n}: history {history} from item {first}, {row.doc_lens[n]} tokens" in shown


def test_neighbouring_documents_differ_in_colour_and_every_colour_ends_with_its_line(mixed: PackedCorpus) -> None:
    i = of_several_documents(mixed)
    shown = "\n".join(peek.show_row(mixed, i, tokenizer=peek.tokenizer_of(mixed), ink=COLOUR))
    assert "\x1b[33m" in shown and "\x1b[36m" in shown and "\x1b[36;7m⟦</s>⟧\x1b[0m" in shown
    for line in shown.split("\n"):
        assert line.endswith("\x1b[0m") or "\x1b" not in line
    plain = "\n".join(peek.show_row(mixed, i, tokenizer=peek.tokenizer_of(mixed), ink=PLAIN))
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == plain


def test_a_loss_mask_is_marked_in_the_text(tiny_tokenizer: str) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    given, target = tokenizer.encode_after("x\n", ["red lamp\n", "blue kite\n"])
    mask = np.array([False] * len(given) + [True] * len(target))
    row = Row(input_ids=np.array([*given, *target], dtype=np.uint16), doc_ids=np.array([0]), n_pad=0,
              n_labels=len(target), doc_lens=np.array([len(mask)], dtype=np.int32), loss_mask=mask)
    shown = "".join(peek._document_text(row, slice(0, len(mask)), 0, tokenizer=tokenizer, ink=PLAIN))
    assert shown == "red lamp\n[[blue kite\n]]"


def test_control_characters_in_a_text_cannot_steer_the_terminal() -> None:
    assert peek.printable("a\x1b[2Jb\nc\x07d\x9be é 東") == "a\\x1b[2Jb\nc\\x07d\\x9be é 東"


@pytest.mark.parametrize("ink", [PLAIN, COLOUR], ids=["plain", "colour"])
@pytest.mark.parametrize("name", ["tiny_tokenizer", "mistral_tokenizer", "qwen_tokenizer"])
def test_a_control_token_is_told_from_a_title_that_spells_it(
        name: str, ink: peek.Ink, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    eos = tokenizer.decode([tokenizer.eos_id])
    given = [*tokenizer.encode_start("Bag:\n"), *tokenizer.encode_after("x\n", [f"Knot {eos} ⟦{eos}⟧\n"])[0]]
    ids = np.array([*given, tokenizer.eos_id, *[tokenizer.pad_id] * 3], np.uint32)
    row = Row(input_ids=ids, doc_ids=np.array([0]), n_pad=3, n_labels=len(given),
              doc_lens=np.array([len(given) + 1, 3], np.int32))
    shown = "".join(peek._document_text(row, slice(0, len(given) + 1), 0, tokenizer=tokenizer, ink=ink))
    bos = "" if tokenizer.bos_id is None else "⟦<s>⟧"
    text = rf"Bag:\nKnot {eos} \u27e6{eos}\u27e7".replace(r"\n", "\n")
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == f"{bos}{text}\n⟦{eos}⟧"
    assert shown.count("\x1b[33;7m") == (ink.has_colour and (bos != "") + 1)


@pytest.fixture(scope="module")
def end_to_end(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    """The shops, their documents laid end to end and cut where a row ends."""
    values = shops.config_values(raw, tmp_path_factory.mktemp("concat") / "out")
    values["pack"] |= {"mode": "concat"}
    prepare(shops.config(values))
    return PackedCorpus(Path(values["out"]) / "packed" / "mixed")


def test_a_document_over_two_rows_says_in_both_where_its_rest_is(end_to_end: PackedCorpus, mixed: PackedCorpus) -> None:
    whole = {int(d): int(n) for row in mixed for d, n in zip(row.doc_ids, row.real_doc_lens, strict=True)}
    tokenizer = peek.tokenizer_of(end_to_end)
    n_cut, is_inside = 0, False  # of a document that the row before did not end
    for i, row in enumerate(end_to_end):
        shown = "\n".join(peek.show_row(end_to_end, i, tokenizer=tokenizer, ink=PLAIN))
        borders = re.findall(r"──── document .*", shown)
        ends = [body.removesuffix("\n").endswith("⟦</s>⟧") for body in re.split(r"──── .*\n?", shown)[1:] if body]
        assert ["goes on from the row before" in b for b in borders] == [is_inside] + [False] * (len(borders) - 1)
        assert ["cut, goes on in the next row" in b for b in borders] == [not e for e in ends]
        is_whole = [whole[int(d)] == n for d, n in zip(row.doc_ids, row.real_doc_lens, strict=True)]
        assert ["of it here" not in b for b in borders] == is_whole
        is_inside = not ends[-1]
        n_cut += is_inside
    assert n_cut > len(end_to_end) / 2 and not is_inside  # borders of documents seldom fall on those of rows


def test_the_manifest_is_told_with_its_audit(mixed: PackedCorpus) -> None:
    told = "\n".join(peek.show_manifest(mixed.manifest))
    assert f"{mixed.manifest.n_rows:,} of 256 tokens (uint16)" in told
    assert re.search(r"^audit +passed$", told, re.MULTILINE) and "no held-out event: ok" in told


def test_a_histogram_counts_every_value_once() -> None:
    # 0..25 in 12 classes at most: width 3, nine classes, the last of two values
    shown = [line.split() for line in peek.histogram(np.arange(26))]
    assert len(shown) == 9
    assert (shown[0], shown[-1][:3]) == (["0", "to", "2", "█" * 40, "3", "11.5%"], ["24", "to", "25"])
    (only,) = peek.histogram(np.array([7, 7]))
    assert only.split() == ["7", "█" * 40, "2", "100.0%"]


def test_lengths_are_those_of_all_documents(mixed: PackedCorpus) -> None:
    told = list(peek.show_lengths(mixed))
    m = mixed.manifest
    assert told[0].startswith(f"tokens in a document, in all {m.n_rows} rows: mean {m.n_tokens / m.n_documents:.1f}")
    counted = told[1:next(i for i, line in enumerate(told) if line.startswith("documents in"))]
    assert sum(int(line.split()[-2].replace(",", "")) for line in counted) == m.n_documents
    fill = told[next(i for i, line in enumerate(told) if line.startswith("real tokens")):]
    assert f"mean {100 * m.fill:.3f}" in fill[0]
    assert sum(int(line.split()[-2].replace(",", "")) for line in fill[1:]) == m.n_rows


def test_the_root_lists_all_corpora_and_is_no_place_for_a_row(prepared: Path) -> None:
    for root in (prepared, prepared / "packed"):
        folders = peek.find_corpora(root)
        table = list(peek.show_corpora(folders))
        assert len(folders) == 8 and len(table) == 9
    with pytest.raises(DataError, match=r"holds 8 corpora; name one: .*specific/toys"):
        peek.one_corpus(prepared)


def test_every_altered_or_missing_shard_is_named(copy_of_prepared: Path) -> None:
    packed = copy_of_prepared / "packed"
    assert peek.verify(peek.find_corpora(packed)).startswith("verified: ")
    shard = packed / "mixed" / "shard-00000-001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (packed / "valid" / "toys" / "shard-00000-000.arrow").unlink()
    with pytest.raises(DataError, match=r"2 problems") as e:
        peek.verify(peek.find_corpora(packed))
    for found in ("mixed/shard-00000-001.arrow has hash", "toys/shard-00000-000.arrow is missing"):
        assert found in str(e.value)


def test_another_tokenizer_is_refused_and_a_missing_one_asked_for(
        mixed: PackedCorpus, copy_of_prepared: Path, smollm_tokenizer: str) -> None:
    with pytest.raises(DataError, match="is not the one that"):
        peek.tokenizer_of(mixed, smollm_tokenizer)
    (copy_of_prepared / "tokenizer").rename(copy_of_prepared / "elsewhere")
    moved = PackedCorpus(copy_of_prepared / "packed" / "mixed")
    with pytest.raises(DataError, match="name it with --tokenizer"):
        peek.tokenizer_of(moved)
    found = peek.tokenizer_of(moved, str(copy_of_prepared / "elsewhere"))
    assert found.fingerprint == mixed.manifest.tokenizer.fingerprint


def test_a_row_or_a_folder_that_is_not_there_is_an_error(mixed: PackedCorpus, tmp_path: Path) -> None:
    tokenizer = peek.tokenizer_of(mixed)
    for i in (-1, len(mixed)):
        with pytest.raises(DataError, match=f"no row {i}; it has rows 0 to {len(mixed) - 1}"):
            list(peek.show_row(mixed, i, tokenizer=tokenizer, ink=PLAIN))
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no packed corpus there"):
            peek.find_corpora(path)


def test_the_script_prints_plainly_into_a_pipe(prepared: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "peek.py"), str(prepared / "packed" / "mixed")]
    row = subprocess.run([*command, "--row", "0"], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "\x1b" not in row.stdout and row.stdout.startswith("row 0 (shard-00000-000.arrow, place 0)")
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert told.stdout.startswith("corpus        mixed (train)") and "tokens in a document" in told.stdout
