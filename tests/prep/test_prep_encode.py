"""Encoding part by part gives the ids of the whole text, for every template and kind of tokenizer; titles are never
control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cprec.errors import DataError
from cprec.template import Template
from data_prep.clean import clean_title
from data_prep.encode import (
    Lines,
    border_documents,
    encode_frame,
    encode_lines,
    prove,
    read_some_lines,
    require_same,
)
from data_prep.ragged import (
    FIRST_ITEM,
    concatenate,
    document_rows,
    map_ragged,
    ragged,
    spans,
    write_parts,
    write_ragged,
)
from data_prep.records import Corpora, Layout
from data_prep.templates import TEMPLATES
from data_prep.workers import cached_tokenizer

TEMPLATE = TEMPLATES["cprec"]
OWN = Template(name="own", lead_in="Bag", item=" {title}{ (brand)}", before_target=" ->", tail=" Done.\n")
ALL_TEMPLATES = [*TEMPLATES.values(), OWN]
CONTROL = ["</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]",
           "<0x41>", "<SPECIAL_20>"]
ODD = ["▁", "🙂", "👩\u200d👧", "東京", "e\u0301", "\u0301", "\u200b", "!", ".", ",", "(", "'s", "10%", "2.5", "\u00ad",
       "ﬁ", "한국", "/", "//", ";", "\\", "{title}", "a\u2028b", "\u0085", "\ufeff", "\u037e", "\u0338"]
TITLES = st.lists(st.one_of(st.sampled_from(CONTROL + ODD), st.text(max_size=12)), min_size=1, max_size=6).map("".join)
ITEMS = st.fixed_dictionaries({"title": TITLES.filter(lambda t: bool(t.split())),
                               "domain": st.sampled_from(["books", "Home & Garden", "INST"]),
                               "brand": st.one_of(st.just(""), TITLES), "category": st.one_of(st.just(""), TITLES)})
TOKENIZERS = ["tiny_tokenizer", "mistral_tokenizer", "mistral_v3_tokenizer", "smollm_tokenizer", "qwen_tokenizer",
              "tekken_tokenizer"]


@pytest.fixture(scope="module", params=TOKENIZERS)  # by module: the tests of one tokenizer follow each other
def tokenizer(request: pytest.FixtureRequest) -> str:
    name: str = request.getfixturevalue(request.param)
    return name


def require_exact(tokenizer: str, template: Template, lines: list[str]) -> None:
    """A document of `lines`: the ids gathered from segments are those of its whole text, and none is control but at
    its two ends."""
    known = cached_tokenizer(tokenizer)
    segments = concatenate([ragged(encode_frame(known, template)),
                            encode_lines(Lines(tokenizer, template.any_line, lines))])
    gathered = segments.gather(document_rows(np.arange(len(lines)))).tolist()
    text = template.render(lines)
    require_same(known, text, gathered=gathered, whole=[*known.encode_start(text), known.eos_id])
    assert gathered[-1] == known.eos_id and known.bos_id in (None, gathered[0])
    assert known.control_ids.isdisjoint(gathered[known.bos_id is not None:-1])


@settings(max_examples=60)
@given(items=st.lists(ITEMS, min_size=1, max_size=5))
@example(items=[{"title": t, "brand": t, "category": t, "domain": t} for t in CONTROL])
@example(items=[{"title": t} for t in ODD if t.split()])
@example(items=[{"title": t} for t in ("Wow!", "/dev/null", "ends in a slash/", "/", "(2.5 oz)", "//", "10%", "/")])
def test_gathered_ids_are_those_of_the_whole_text(tokenizer: str, items: list[dict[str, str]]) -> None:
    for template in ALL_TEMPLATES:
        require_exact(tokenizer, template, [template.line(item) for item in items])


def test_gathered_ids_are_those_of_the_whole_text_over_real_catalogues(tokenizer: str, shared_data: Path) -> None:
    columns = [pq.read_table(shared_data / "items" / f"{name}.parquet")["title"].to_pylist()
               for name in ("amazon_industrial_scientific", "ml_1m")]
    titles = [t.text for column in columns for raw in column if raw and (t := clean_title(raw, max_chars=300))]
    assert len(titles) > 5000
    for template in ALL_TEMPLATES:
        lines = [template.line({"title": t, "domain": "industry", "brand": t.split()[-1]}) for t in titles]
        for first in range(0, len(lines), 500):
            require_exact(tokenizer, template, lines[first:first + 500])


def test_a_document_without_history_is_its_target_alone(tokenizer: str) -> None:
    for template in ALL_TEMPLATES:
        require_exact(tokenizer, template, [template.line({"title": "Red lamp"})])


def test_a_title_that_looks_like_control_decodes_to_itself(tokenizer: str) -> None:
    known = cached_tokenizer(tokenizer)
    text = "a " + " ".join(CONTROL)
    ids = known.encode([text])[0]
    assert known.decode(ids) == text
    assert known.control_ids.isdisjoint(ids)


def test_the_proof_accepts_the_prepared_shops_and_refuses_one_altered_segment(prepared: Path, tmp_path: Path,
                                                                              tiny_tokenizer: str) -> None:
    corpora = Corpora(("books", "games", "toys"), ("garden",)).all
    layout = Layout(prepared)
    assert prove(layout, corpora, tokenizer=tiny_tokenizer, template=TEMPLATE, seed=17) > 100
    segments = map_ragged(layout.segments)
    altered = segments.ids.copy()
    altered[segments.offsets[FIRST_ITEM:-1]] += 1  # the first token of every item's line
    for name in ("histories", "catalogue.parquet"):
        (tmp_path / name).symlink_to(prepared / name)
    write_ragged(tmp_path / "segments.arrow", type(segments)(altered, segments.offsets))
    with pytest.raises(DataError, match=r"part by part differs(.|\n)*part by part: (.|\n)*whole text:(.|\n)*slow"):
        prove(Layout(tmp_path), corpora, tokenizer=tiny_tokenizer, template=TEMPLATE, seed=17)


def test_every_history_of_the_prepared_shops_has_the_ids_of_its_whole_text(
        prepared: Path, tiny_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora, layout = Corpora(("books", "games", "toys"), ("garden",)).all, Layout(prepared)
    n_histories = sum(pq.ParquetFile(layout.histories(c)).metadata.num_rows for c in corpora)
    lines = pq.read_table(layout.catalogue)["line"].chunks
    monkeypatch.setattr("data_prep.encode.SAMPLED_PER_CORPUS", n_histories)
    n_proved = prove(layout, corpora, tokenizer=tiny_tokenizer, template=TEMPLATE, seed=17)
    assert n_proved == n_histories + len(list(border_documents(lines, TEMPLATE)))


def test_each_kind_of_beginning_is_proved_after_each_kind_of_end() -> None:
    # beginnings: "R" upper case, "o" lower case, "(" a sign, "1" a digit, a letter of no case; "A" is another upper
    # ends before the line break: "p" lower case, "k", ")" a sign, "京" a letter of no case
    lines = [["Red lamp\n", "oak desk\n"], ["(box)\n", "100 p\n", "東京\n", "Also p\n"]]
    found = [d.tolist() for d in border_documents(map(pa.array, lines), TEMPLATE)]
    assert found == [[0], [0, 0], [1], [1, 1], [2], [2, 2], [3], [3, 3], [4], [4, 4],
                     [0, 0, 0, 1, 0, 2, 0, 3, 0, 4], [2, 0, 2, 1, 2, 2, 2, 3, 2, 4], [4, 0, 4, 1, 4, 2, 4, 3, 4, 4]]


def test_a_border_that_no_sampled_history_shows_is_still_refused(tmp_path: Path, tekken_tokenizer: str) -> None:
    # what Template.line would never give: tekken joins the slash with the line break after a sign
    lines = ["Red lamp\n", "Wow!\n", "/dev/null\n"]
    pq.write_table(pa.table({"line": lines}), tmp_path / "catalogue.parquet")
    known = cached_tokenizer(tekken_tokenizer)
    frame = ragged(encode_frame(known, TEMPLATE))
    write_ragged(tmp_path / "segments.arrow", concatenate([frame, encode_lines(Lines(tekken_tokenizer, "x\n", lines))]))
    with pytest.raises(DataError, match=r"part by part differs from .* at token \d+(.|\n)*exact: slow"):
        prove(Layout(tmp_path), [], tokenizer=tekken_tokenizer, template=TEMPLATE, seed=17)


def test_a_tokenizer_that_merges_over_the_line_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = tmp_path / "merging"
    folder.mkdir()
    vocab = {"\n": 0, "a": 1, "\na": 2, "</s>": 3}
    merging = Tokenizer(models.BPE(vocab, [("\n", "a")]))
    merging.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match=r"merges 'x\\n' with 'a\\n' behind it.*exact=slow"):
        encode_lines(Lines(str(folder), "x\n", ["a\n"]))


def test_spans_are_the_indices_of_each_stretch_end_to_end() -> None:
    assert spans(np.array([5, 0, 9]), np.array([2, 3, 0])).tolist() == [5, 6, 0, 1, 2]


def test_ragged_lists_survive_joining_writing_and_mapping(tmp_path: Path) -> None:
    joined = concatenate([ragged([[1, 2], []]), ragged([[3]])])
    write_ragged(tmp_path / "x.arrow", joined)
    mapped = map_ragged(tmp_path / "x.arrow")
    assert [mapped[i].tolist() for i in range(3)] == [[1, 2], [], [3]]
    assert mapped.gather(np.array([2, 0, 2])).tolist() == [3, 1, 2, 3]


def test_parts_are_written_one_by_one_with_the_bytes_of_all_of_them_joined(tmp_path: Path) -> None:
    parts = [ragged([[1, 2], []]), ragged([]), ragged([[3], [4, 65535]])]
    written = write_parts(tmp_path / "parts.arrow", iter(parts), dtype="uint16")
    joined = concatenate(parts)
    write_ragged(tmp_path / "joined.arrow", type(joined)(joined.ids.astype(np.uint16), joined.offsets))
    assert [written[i].tolist() for i in range(4)] == [[1, 2], [], [3], [4, 65535]]
    assert written.lens.tolist() == [2, 0, 1, 2] and written.lens is written.lens
    assert (tmp_path / "parts.arrow").read_bytes() == (tmp_path / "joined.arrow").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joined.arrow", "parts.arrow"]


def test_some_lines_are_read_over_row_groups_and_a_number_beyond_the_catalogue_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.parquet"
    pq.write_table(pa.table({"line": ["a", "b", "c", "d", "e"]}), path, row_group_size=2)
    lines = read_some_lines(path, np.array([4, 1, 0, 4]))
    assert lines.items.tolist() == [0, 1, 4] and lines.of([4, 0, 1, 4]) == ["e", "a", "b", "e"]
    assert read_some_lines(path, np.zeros(0, np.int64)).of([]) == []
    with pytest.raises(DataError, match="has no item 5, which a history names"):
        read_some_lines(path, np.array([3, 5]))
