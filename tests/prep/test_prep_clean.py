"""Cleaning: titles, dropped rows with their counts, merging, the overlap with unseen shops, the k-core."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shops

from cprec.errors import DataError
from data_prep.clean import (
    CODE,
    CONTROL,
    CUT,
    ENTITIES,
    NOTHING,
    SPACES,
    TAGS,
    Title,
    clean,
    clean_title,
    is_page_code,
    k_core,
)
from data_prep.config import CleanSettings
from data_prep.records import ITEMS, Corpora, Counts, Layout, title_key

CORPORA = Corpora(pretrain=("books",), unseen=("garden",))


@pytest.mark.parametrize(("raw", "plain"), [
    ("Tom &amp; Jerry&#39;s", "Tom & Jerry's"),  # entities
    ("  a \t b\n\nc ", "a b c"),  # every run of white space is one space
    ("a\x00b\x1fc\x85d\u00a0e\u2028f\u3000g", "a b c d e f g"),  # control characters, exotic spaces and line ends
    ("&lt;/s&gt; <|im_start|>", "</s> <|im_start|>"),  # looks like control, is text
    ("café 東京 🙂 e\u0301", "café 東京 🙂 e\u0301"),  # left as it is
])
def test_a_title_becomes_one_plain_line(raw: str, plain: str) -> None:
    title = clean_title(raw, max_chars=300)
    assert title is not None and title.text == plain


@pytest.mark.parametrize("raw", ["", "  \n", "&nbsp;", "\x00", "<div><br></div>", "<script>var a = 1;</script>"])
def test_a_title_of_nothing_is_none(raw: str) -> None:
    assert clean_title(raw, max_chars=300) is None


@pytest.mark.parametrize(("raw", "text", "repairs"), [
    ("plain", "plain", set()),
    ("a  b", "a b", {SPACES}),
    ("Tom &amp;  Jerry", "Tom & Jerry", {ENTITIES}),
    ("AT&amp;amp;T", "AT&amp;T", {ENTITIES}),  # once: what an entity spells is text
    ("a\x00b", "a b", {CONTROL}),
    ("R&D <3 a<b>c", "R&D <3 a c", {TAGS}),  # no entity, no tag but <b>
    ('<span class="a-size-large">Gift &#36;50</span>', "Gift $50", {TAGS, ENTITIES}),
    ("Mug<br/>Blue <SCRIPT type=x>alert(1)</SCRIPT>", "Mug Blue", {TAGS}),
    ("Mug <span id=\"productTi", "Mug", {TAGS}),  # cut off in its tag
    ("</s> <|im_start|> <unk> <sea>", "</s> <|im_start|> <unk> <sea>", set()),  # tags of no web page
    ("&lt;b&gt;", "<b>", {ENTITIES}),  # spelled out: text
    ("a <b and c <br", "a <b and c <br", set()),
    ("The Function (of War)", "The Function (of War)", set()),
])
def test_what_is_done_to_a_title_is_said(raw: str, text: str, repairs: set[str]) -> None:
    assert clean_title(raw, max_chars=300) == Title(text, frozenset(repairs))


def test_page_code_is_no_title() -> None:
    code = "var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();"
    assert clean_title(code, max_chars=300) is None and is_page_code(code)
    assert not is_page_code("The Function (of War): var. ed. = 2") and not is_page_code("")


def test_a_title_of_ten_thousand_characters_is_cut_at_a_word_border() -> None:
    title = clean_title("word " * 2000, max_chars=300)
    assert title == Title(("word " * 60).strip(), frozenset({SPACES, CUT}))  # 60 words and 59 spaces: 299 characters


@pytest.mark.parametrize(("raw", "kept"), [
    ("abcd efgh", "abcd"),  # 9 characters: cut at the border before the 8th
    ("abcd efg hij", "abcd efg"),  # the border is right after the 8th
    ("abcdefghij", "abcdefgh"),  # no border: inside the word
])
def test_a_long_title_is_cut_at_a_word_border(raw: str, kept: str) -> None:
    assert clean_title(raw, max_chars=8) == Title(kept, frozenset({CUT}))


@pytest.mark.parametrize(("a", "b", "same"), [
    ("The Garden Almanac, Vol. 1", "the garden-almanac VOL 1", True),
    ("STRASSE", "Straße", True),
    ("Ｆｕｌｌ width", "full WIDTH", True),
    ("Vol. 1", "Vol. 2", False),
    ("!!!", "???", False),  # nothing but punctuation: compared as it is
])
def test_titles_are_one_up_to_case_space_and_punctuation(a: str, b: str, same: bool) -> None:
    assert (title_key(a) == title_key(b)) is same


def run_clean(tmp_path: Path, settings: CleanSettings) -> tuple[Layout, dict[str, int]]:
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [
        ("books", "b1", "Dune"), ("books", "b2", "DUNE."), ("books", "b3", " "), ("books", "b4", "Garden: Almanac"),
        ("books", "b5", "Emma"), ("books", "b5", "Emma again"), ("books", "b6", "Never bought"),
        ("garden", "g1", "garden almanac"), ("music", "m1", "Song")])
    shops.write_events(layout.raw_interactions, [
        ("u1", "books", "b1", 10), ("u1", "books", "b2", 10),  # the same once b2 stands for b1
        ("u1", "books", "b1", 10),  # the same event again
        ("u1", "books", "b3", 11),  # no title
        ("u1", "books", "b4", 12),  # its title is in the garden
        ("u1", "books", "b5", 13), ("u1", "books", "b9", 14),  # b9: no such item
        ("u1", "books", "b5", 0), ("u1", "books", "b5", -86_400_000),  # no time after 1970
        ("u1", "garden", "g1", 15), ("u1", "music", "m1", 16)])
    engine = shops.engine(tmp_path)
    counts = clean(engine, layout, settings, corpora=CORPORA, seed=1)
    engine.close()
    return layout, counts.by_reason


def test_each_unusable_row_is_dropped_for_its_own_counted_reason(tmp_path: Path) -> None:
    layout, counts = run_clean(tmp_path, CleanSettings(untitled_items="drop"))
    assert {k: v for k, v in counts.items() if k.startswith("events")} == {
        "events read": 11,
        "events dropped: user, item or time is missing": 0,  # looked for and not found
        "events dropped: its domain is unknown": 0,
        "events dropped: its domain is not chosen": 1,
        "events dropped: its item has no title": 1,
        "events dropped: its time is not positive": 2,
        "events dropped: its title is in an unseen domain's catalogue": 1,
        "events dropped: the catalogue has no such item": 1,
        "events dropped: the same user, item and time again": 1,
        "events kept": 4,
    }
    assert counts["items of books dropped: its title is in an unseen domain's catalogue"] == 1
    assert counts["items of books dropped: its item has no title"] == 1
    assert counts["item rows repeated in the source"] == 1
    assert counts["items with several titles, the first in code point order kept"] == 1  # b5
    assert counts["item ids listed in several domains"] == 0
    assert counts["items without a usable event"] == 1
    items = pq.read_table(layout.items).select(["item_id", "title"]).to_pylist()
    assert items == [{"item_id": "b1", "title": "Dune"}, {"item_id": "b2", "title": "DUNE."},
                     {"item_id": "b5", "title": "Emma"}, {"item_id": "g1", "title": "garden almanac"}]


def test_an_item_without_a_title_is_an_error_that_names_it_unless_it_may_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 item has no title: b3 of books; .*set clean.untitled_items=drop"):
        run_clean(tmp_path, CleanSettings())
    assert not Layout(tmp_path).interactions.exists()


def test_items_of_one_title_are_merged_into_the_smallest_id_when_asked(tmp_path: Path) -> None:
    layout, counts = run_clean(tmp_path, CleanSettings(untitled_items="drop", merge_same_titles=True))
    assert counts["items merged into one of the same title"] == 1
    assert counts["events dropped: the same user, item and time again"] == 2
    assert pq.read_table(layout.items)["item_id"].to_pylist() == ["b1", "b5", "g1"]
    assert pq.read_table(layout.interactions)["item_id"].to_pylist() == ["b1", "b5", "g1"]


@pytest.mark.parametrize(("shared", "kept"), [(False, ["b1", "b2"]), (True, ["b2"])])
def test_an_item_with_the_id_of_an_unseen_one_is_dropped_where_ids_are_shared_also_when_that_has_no_title(
        tmp_path: Path, shared: bool, kept: list[str]) -> None:
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [
        ("books", "b1", "Dune"), ("books", "b2", "Emma"), ("books", "b3", "Rake"), ("garden", "b1", None),
        ("garden", "b3", "rake"), ("garden", "g1", "Spade"), ("music", "b2", "Song")])
    shops.write_events(layout.raw_interactions, [
        ("u1", "books", "b1", 10), ("u2", "books", "b1", 11), ("u1", "books", "b2", 12), ("u1", "books", "b3", 13),
        ("u1", "garden", "b3", 14), ("u1", "garden", "g1", 15)])
    engine = shops.engine(tmp_path)
    counts = clean(engine, layout, CleanSettings(untitled_items="drop", shared_item_ids=shared), corpora=CORPORA,
                   seed=1).by_reason
    engine.close()
    items = pq.read_table(layout.items).select(["domain", "item_id"]).to_pylist()
    assert [i["item_id"] for i in items if i["domain"] == "books"] == kept
    assert [i["item_id"] for i in items if i["domain"] == "garden"] == ["b3", "g1"]
    reason = "its id is in an unseen domain's catalogue"
    assert counts.get(f"items of books dropped: {reason}", 0) == (1 if shared else 0)
    assert counts.get(f"events dropped: {reason}", 0) == (2 if shared else 0)
    assert counts["items of books dropped: its title is in an unseen domain's catalogue"] == 1  # b3: for its title
    assert counts["item ids listed in several domains"] == 2  # b1, b3; music is no domain of ours


def test_every_title_of_an_unseen_item_that_the_source_repeats_is_kept_out(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [("books", "b1", "Dune"), ("books", "b2", "Emma"), ("books", "b3", "Ivanhoe"),
                                         ("garden", "g1", "Dune"), ("garden", "g1", "Emma")])
    shops.write_events(layout.raw_interactions, [("u1", "books", "b1", 1), ("u1", "books", "b2", 2),
                                                 ("u1", "books", "b3", 3), ("u1", "garden", "g1", 3)])
    engine = shops.engine(tmp_path)
    counts = clean(engine, layout, CleanSettings(), corpora=CORPORA, seed=1).by_reason
    engine.close()
    assert counts["events dropped: its title is in an unseen domain's catalogue"] == 2


def test_a_kept_item_is_never_merged_into_a_dropped_one_of_the_same_title(tmp_path: Path) -> None:
    # b1 is dropped, for its id is sold in the garden; b2 and b3 stay, and stand for b2
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [("books", "b1", "Dune"), ("books", "b2", "Dune"), ("books", "b3", "Dune"),
                                         ("garden", "b1", "Rake")])
    shops.write_events(layout.raw_interactions, [("u1", "books", "b1", 1), ("u1", "books", "b2", 2),
                                                 ("u1", "books", "b3", 3), ("u1", "garden", "b1", 4)])
    engine = shops.engine(tmp_path)
    counts = clean(engine, layout, CleanSettings(merge_same_titles=True, shared_item_ids=True), corpora=CORPORA,
                   seed=1).by_reason
    engine.close()
    assert pq.read_table(layout.items).select(["domain", "item_id"]).to_pylist() == [
        {"domain": "books", "item_id": "b2"}, {"domain": "garden", "item_id": "b1"}]
    assert pq.read_table(layout.interactions)["item_id"].to_pylist() == ["b2", "b2", "b1"]
    assert (counts["items merged into one of the same title"], counts["events kept"]) == (1, 3)


def test_brands_and_categories_are_cleaned_as_titles_are_and_counted(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    items = [("b1", "Dune", "Tom &amp; Co", "A &gt; B\n"), ("b2", "Emma", "Tom &amp; Co", "word " * 2000),
             ("b3", "Rope", "var ue_t0=1; getTime()", None), ("b4", "Kite", "<b> </b>", "plain")]
    columns = {"domain": ["books"] * 4} | {n: [i[k] for i in items] for k, n in enumerate(
        ("item_id", "title", "brand", "category"))}
    layout.raw_items.parent.mkdir()
    pq.write_table(pa.table(columns, schema=ITEMS), layout.raw_items)
    shops.write_events(layout.raw_interactions, [("u1", "books", i[0], 1) for i in items])
    engine = shops.engine(tmp_path)
    counts = clean(engine, layout, CleanSettings(), corpora=Corpora(("books",), ()), seed=1).by_reason
    engine.close()
    found = pq.read_table(layout.items)
    assert found["brand"].to_pylist() == ["Tom & Co", "Tom & Co", None, None]
    assert found["category"].to_pylist() == ["A > B", ("word " * 60).strip(), None, "plain"]
    assert {k: n for k, n in counts.items() if k.startswith("brands and categories")} == {
        f"brands and categories: {what}": n for what, n in (
            (TAGS, 0), (CODE, 1), (ENTITIES, 3), (CONTROL, 1), (SPACES, 1), (NOTHING, 1),
            ("cut to 300 characters", 1))}


def test_each_rule_for_titles_has_its_count(tmp_path: Path) -> None:
    titles = ["Plain", "Tom &amp; Jerry", "<i>Rope</i> &amp; Kite", "bell\x07", "two  spaces", "word " * 2000,
              "<b> </b>", "var ue_t0=1; getTime()"]
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [("books", f"b{i}", title) for i, title in enumerate(titles)])
    shops.write_events(layout.raw_interactions, [("u1", "books", f"b{i}", 1) for i in range(len(titles))])
    engine = shops.engine(tmp_path)
    counts = clean(engine, layout, CleanSettings(untitled_items="drop"), corpora=Corpora(("books",), ()), seed=1)
    engine.close()
    assert {k: n for k, n in counts.by_reason.items() if k.startswith("titles: ")} == {
        f"titles: {what}": n for what, n in (
            (TAGS, 1), (CODE, 1), (ENTITIES, 2), (CONTROL, 1), (SPACES, 2), (NOTHING, 1), ("cut to 300 characters", 1))}
    assert counts.by_reason["items of books dropped: its item has no title"] == 2


def test_the_hash_is_the_md5_of_seed_user_domain_item_and_time(tmp_path: Path) -> None:
    layout, _ = run_clean(tmp_path, CleanSettings(untitled_items="drop"))
    for row in pq.read_table(layout.interactions).to_pylist():
        text = "\x1f".join(["1", row["user_id"], row["domain"], row["item_id"], str(row["ts_ms"])])
        assert row["h"] == hashlib.md5(text.encode()).hexdigest()


def test_the_k_core_is_iterated_until_nothing_changes(tmp_path: Path) -> None:
    # with 2 and 2: c goes (1 event); then u3 has 1 event and goes; then b has 1 and goes; then u2 has 1 and goes;
    # a then has u1's two events, u1 has two
    layout = Layout(tmp_path)
    shops.write_items(layout.raw_items, [("books", i, f"title {i}") for i in "abc"])
    shops.write_events(layout.raw_interactions, [
        ("u1", "books", "a", 1), ("u1", "books", "a", 2), ("u2", "books", "a", 3), ("u2", "books", "b", 4),
        ("u3", "books", "b", 5), ("u3", "books", "c", 6)])
    engine = shops.engine(tmp_path)
    clean(engine, layout, CleanSettings(), corpora=Corpora(("books",), ()), seed=1)
    counts = Counts("split")
    k_core(engine, layout.interactions, CleanSettings(min_user_events=2, min_item_events=2), counts)
    assert pq.read_table(layout.interactions).select(["user_id", "item_id", "ts_ms"]).to_pylist() == [
        {"user_id": "u1", "item_id": "a", "ts_ms": 1}, {"user_id": "u1", "item_id": "a", "ts_ms": 2}]
    assert counts.by_reason == {"training events outside the k-core": 4}
