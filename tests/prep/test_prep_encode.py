"""Encoding line by line gives the ids of the whole text, for three kinds of tokenizers; titles are never control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cprec.errors import DataError
from cprec.tokenizer import load_tokenizer
from data_prep.clean import clean_title
from data_prep.encode import Lines, encode_lines, prove, render, require_same
from data_prep.ragged import concatenate, map_ragged, ragged, spans, write_ragged
from data_prep.records import Corpora, Layout
from data_prep.templates import TEMPLATES
from data_prep.workers import cached_tokenizer

TEMPLATE = TEMPLATES["cprec"]
CONTROL = ["</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "<0x41>"]
ODD = ["▁", "🙂", "👩\u200d👧", "東京", "e\u0301", "\u0301", "\u200b", "!",
        ".", ",", "(", "'s", "10%", "2.5", "\u00ad", "ﬁ", "한국"]
TITLES = st.lists(st.one_of(st.sampled_from(CONTROL + ODD), st.text(max_size=12)), min_size=1, max_size=6).map("".join)
TOKENIZERS = ["tiny_tokenizer", "mistral_tokenizer", "smollm_tokenizer"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> str:
    name: str = request.getfixturevalue(request.param)
    return name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
          derandomize=True)
@given(titles=st.lists(TITLES, min_size=1, max_size=5))
@example(titles=CONTROL)
@example(titles=ODD)
def test_gathered_ids_are_those_of_the_whole_text(tokenizer: str, titles: list[str]) -> None:
    cleaned = [clean_title(t, max_chars=300) for t in titles]
    lines = [TEMPLATE.line({"title": t.text}) for t in cleaned if t]
    known = cached_tokenizer(tokenizer)
    segments = encode_lines(Lines(tokenizer, lines))
    gathered = known.encode([TEMPLATE.lead_in])[0] + segments.ids.tolist()
    require_same(known, render(TEMPLATE, lines), gathered=gathered, whole=known.encode([render(TEMPLATE, lines)])[0])
    assert known.control_ids.isdisjoint(gathered)


def test_a_title_that_looks_like_control_decodes_to_itself(tokenizer: str) -> None:
    known = load_tokenizer(tokenizer)
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
    altered[segments.offsets[2:-1]] += 1  # the first token of every item's line
    for name in ("histories", "catalogue.parquet"):
        (tmp_path / name).symlink_to(prepared / name)
    write_ragged(tmp_path / "segments.arrow", type(segments)(altered, segments.offsets))
    with pytest.raises(DataError, match=r"line by line differs(.|\n)*line by line: (.|\n)*whole text:(.|\n)*slow"):
        prove(Layout(tmp_path), corpora, tokenizer=tiny_tokenizer, template=TEMPLATE, seed=17)


def test_a_tokenizer_that_merges_over_the_line_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = tmp_path / "merging"
    folder.mkdir()
    vocab = {"\n": 0, "a": 1, "\na": 2, "</s>": 3}
    merging = Tokenizer(models.BPE(vocab, [("\n", "a")]))
    merging.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match=r"merges a line break with the line 'a\\n'.*exact=slow"):
        encode_lines(Lines(str(folder), ["a\n"]))


def test_spans_are_the_indices_of_each_stretch_end_to_end() -> None:
    assert spans(np.array([5, 0, 9]), np.array([2, 3, 0])).tolist() == [5, 6, 0, 1, 2]


def test_ragged_lists_survive_joining_writing_and_mapping(tmp_path: Path) -> None:
    joined = concatenate([ragged([[1, 2], []]), ragged([[3]])])
    write_ragged(tmp_path / "x.arrow", joined)
    mapped = map_ragged(tmp_path / "x.arrow")
    assert [mapped[i].tolist() for i in range(3)] == [[1, 2], [], [3]]
    assert mapped.gather(np.array([2, 0, 2])).tolist() == [3, 1, 2, 3]
