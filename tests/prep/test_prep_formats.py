"""Amazon and MovieLens in their original layouts, small ones written here and real ones; JSON lines; mixed times."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingesting import events_of, ingested, items_of, parse

from cprec.errors import ConfigError, DataError

REVIEWS_2014 = [
    {"reviewerID": "A1", "asin": "0000031852", "reviewerName": "N", "helpful": [0, 0], "reviewText": "t",
     "overall": 4.0, "summary": "s", "unixReviewTime": 1252800000, "reviewTime": "09 13, 2009"},
    {"reviewerID": "A2", "asin": "B000000001", "overall": 5.0, "unixReviewTime": 1252886400}]
META_2014 = ("{'asin': '0000031852', 'title': 'Girls Ballet Tutu \"Zebra\"', 'price': 3.17, 'imUrl': 'http://x.jpg', "
             "'salesRank': {'Toys & Games': 211836}, 'brand': 'Coxlures', "
             "'categories': [['Sports & Outdoors', 'Dance'], ['Clothing']]}\n"
             "{'asin': 'B000000001', 'description': 'It\\'s fine'}\n")
REVIEWS_2018 = [{"overall": 5.0, "verified": True, "reviewTime": "01 1, 2018", "reviewerID": "A1", "asin": "0000031852",
                 "style": {"Size:": " L"}, "reviewText": "t", "unixReviewTime": 1514764800, "vote": "1,204"},
                {"overall": 3.0, "reviewerID": "A2", "asin": "B000000001", "unixReviewTime": 1514851200}]
META_2018 = [{"category": ["Clothing", "Girls"], "description": ["d"], "title": "Tutu", "brand": "Coxlures",
              "rank": "211,836 in Toys", "main_cat": "Fashion", "asin": "0000031852"},
             {"category": [], "title": "", "brand": "", "rank": [">#1"], "main_cat": "Fashion", "asin": "B000000001"}]
REVIEWS_2023 = [{"rating": 5.0, "title": "Such a lovely scent", "text": "t", "images": [], "asin": "B00YQ6X8EO",
                 "parent_asin": "0000031852", "user_id": "AGKH", "timestamp": 1588687728923, "verified_purchase": True},
                {"rating": 1.0, "title": "no", "asin": "B000000001", "parent_asin": "B000000001", "user_id": "AGKI",
                 "timestamp": 1588687728924}]
META_2023 = [{"main_category": "All Beauty", "title": "Howard LC0008", "average_rating": 4.8, "features": [],
              "price": None, "store": "Howard", "categories": [], "details": {}, "parent_asin": "0000031852"},
             {"main_category": "All Beauty", "title": "Yes", "store": None, "categories": ["Beauty", "Hair"],
              "parent_asin": "B000000001", "price": "from 3.14"}]


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(("reviews", "meta", "events", "items"), [
    (json_lines(REVIEWS_2014), META_2014,
     [("A1", "d", "0000031852", 1252800000_000, 4.0), ("A2", "d", "B000000001", 1252886400_000, 5.0)],
     [("d", "0000031852", 'Girls Ballet Tutu "Zebra"', "Coxlures", "Sports & Outdoors > Dance"),
      ("d", "B000000001", None, None, None)]),
    (json_lines(REVIEWS_2018), json_lines(META_2018),
     [("A1", "d", "0000031852", 1514764800_000, 5.0), ("A2", "d", "B000000001", 1514851200_000, 3.0)],
     [("d", "0000031852", "Tutu", "Coxlures", "Clothing > Girls"), ("d", "B000000001", None, None, None)]),
    (json_lines(REVIEWS_2023), json_lines(META_2023),
     [("AGKH", "d", "0000031852", 1588687728923, 5.0), ("AGKI", "d", "B000000001", 1588687728924, 1.0)],
     [("d", "0000031852", "Howard LC0008", "Howard", "All Beauty"), ("d", "B000000001", "Yes", None, "Beauty > Hair")]),
])
def test_amazon_reviews_and_metadata_of_each_year(
        tmp_path: Path, reviews: str, meta: str, events: list[Any], items: list[Any]) -> None:
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(reviews.encode()))
    (tmp_path / "meta_r.json.gz").write_bytes(gzip.compress(meta.encode()))
    for path in ("r.json.gz", "*.json.gz", ""):  # of several files those called meta_ are no reviews
        found = parse(tmp_path, parser="amazon", domain="d", path=str(tmp_path / path),
                      items=str(tmp_path / "meta_r.json.gz"))
        assert (events_of(found[0]), items_of(found[1])) == (events, items)


@pytest.mark.parametrize("where", ["", "*.jsonl"])
def test_reviews_and_metadata_may_lie_in_one_folder_named_for_both(tmp_path: Path, where: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "r.jsonl").write_text(json_lines(REVIEWS_2023))  # a review has a title too
    (raw / "meta_r.jsonl").write_text(json_lines(META_2023))
    values = {"parser": "amazon", "domain": "d", "path": str(raw / where)}
    events, items = parse(tmp_path, **values, items=str(raw / where))
    assert events.num_rows == 2
    assert [title for _, _, title, _, _ in items_of(items)] == ["Howard LC0008", "Yes"]
    with pytest.raises(DataError, match=r"r\.jsonl, given as `items`, holds reviews: its first line has a 'user_id'"):
        parse(tmp_path, **values, items=str(raw / "r.jsonl"))


def test_metadata_of_any_name_are_read_beside_those_called_meta(tmp_path: Path) -> None:
    titles = tmp_path / "items"
    titles.mkdir()
    (tmp_path / "r.jsonl").write_text(json_lines(REVIEWS_2023))
    (titles / "meta_r.jsonl").write_text(json_lines(META_2023[:1]))
    (titles / "extra_titles.jsonl").write_text(json_lines(META_2023[1:]))
    values = {"parser": "amazon", "domain": "d", "path": str(tmp_path / "r.jsonl"), "items": str(titles)}
    _, items = parse(tmp_path, **values)
    assert sorted(title for _, _, title, _, _ in items_of(items)) == ["Howard LC0008", "Yes"]
    (titles / "r.jsonl").write_text(json_lines(REVIEWS_2023))  # not the file at `path`: no guess which is meant
    with pytest.raises(DataError, match=r"items/r\.jsonl, given as `items`, holds reviews"):
        parse(tmp_path, **values)


CSV_2014 = "A1B2C3D4E5F6G,0000031852,4.0,1252800000\nA3B2C3D4E5F6G,B000000001,5.0,1252886400\n"
CSV_2018 = "0000031852,A1B2C3D4E5F6G,4.0,1252800000\nB000000001,A3B2C3D4E5F6G,5.0,1252886400\n"
CSV_2023 = "user_id,parent_asin,rating,timestamp,history\nA1B2C3D4E5F6G,0000031852,4.0,1252800000000,\n" \
           "A3B2C3D4E5F6G,B000000001,5.0,1252886400000,0000031852 B000000001\n"


@pytest.mark.parametrize("text", [CSV_2014, CSV_2018, CSV_2023])
def test_amazon_ratings_of_each_year_say_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "ratings.csv").write_text(text)
    (tmp_path / "meta.json").write_text(json_lines(META_2018))
    events, _ = parse(tmp_path, parser="amazon", domain="d", path=str(tmp_path / "ratings.csv"),
                      items=str(tmp_path / "meta.json"))
    assert events_of(events) == [("A1B2C3D4E5F6G", "d", "0000031852", 1252800000_000, 4.0),
                                 ("A3B2C3D4E5F6G", "d", "B000000001", 1252886400_000, 5.0)]


def test_amazon_ratings_whose_columns_are_not_clear_are_refused_until_the_config_says_them(tmp_path: Path) -> None:
    values = {"parser": "amazon", "domain": "d", "path": str(tmp_path / "ratings.csv"),
              "items": str(tmp_path / "meta.json")}
    (tmp_path / "meta.json").write_text(json_lines(META_2018))
    for text in ("u1,i1,4.0,1252800000\n", CSV_2014 + CSV_2018, "B000000001,B000000002,1,2\n"):
        (tmp_path / "ratings.csv").write_text(text)
        with pytest.raises(DataError, match=r"ratings\.csv: it is not clear which column .*`layout` to user_item"):
            parse(tmp_path, **values)
    (tmp_path / "ratings.csv").write_text("u1,i1,4.0,1252800000\n")
    events, _ = parse(tmp_path, **values, layout="item_user")
    assert events_of(events) == [("i1", "d", "u1", 1252800000_000, 4.0)]


@pytest.mark.parametrize(("values", "error", "message"), [
    ({"parser": "amazon", "domain": "d"}, DataError, "needs `items`, the metadata"),
    ({"parser": "amazon", "items": "x"}, DataError, "set `domain`"),
    ({"parser": "tabular", "layout": "item_user"}, ConfigError, "layout=item_user is of parser amazon only"),
    ({"parser": "movielens", "encoding": "latin-1"}, ConfigError, "parser movielens knows its own"),
    ({"parser": "movielens", "columns": {"title": "t"}}, ConfigError, "columns.title cannot be set"),
    ({"parser": "complete_journey", "items": "x"}, ConfigError, "items=x cannot be set"),
    ({"parser": "recbole", "columns": {"domain": "d"}}, ConfigError, "columns.domain=d cannot be set"),
    ({"parser": "tabular", "domain": "x", "columns": {"domain": "d"}}, ConfigError, "columns.domain=d and domain=x"),
    ({"parser": "complete_journey", "columns": {"timestamp_unit": "s"}}, ConfigError, "timestamp_unit cannot be set"),
    ({"parser": "tabular", "encoding": "utf-16"}, ConfigError, "no encoding in which a line ends as in ASCII"),
    ({"parser": "tabular", "encoding": "klingon"}, ConfigError, "encoding='klingon': no encoding"),
])
def test_what_a_parser_needs_or_does_not_heed_is_said(
        tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(tmp_path, path=str(tmp_path), **values)


def test_an_encoding_that_no_file_heeds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"user_id": "u", "item_id": "x", "timestamp": 5}\n')
    (tmp_path / "i.jsonl").write_text('{"item_id": "x", "title": "X"}\n')
    (tmp_path / "i.csv").write_bytes("item_id,title\nx,Cit\xe9\n".encode("latin-1"))
    values = {"parser": "tabular", "domain": "d", "encoding": "latin-1", "path": str(tmp_path / "e.jsonl")}
    with pytest.raises(DataError, match="encoding=latin-1 cannot be set, JSON lines and Parquet are UTF-8; remove it"):
        parse(tmp_path, **values, items=str(tmp_path / "i.jsonl"))
    _, items = parse(tmp_path, **values, items=str(tmp_path / "i.csv"))
    assert items_of(items) == [("d", "x", "Cit\xe9", None, None)]


def test_metadata_that_is_broken_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json_lines(REVIEWS_2018))
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(META_2014.encode())[:-5])
    with pytest.raises(DataError, match=r"meta\.json\.gz: broken, its compressed data end early"):
        parse(tmp_path, parser="amazon", domain="d", path=str(tmp_path / "r.json"), items=str(tmp_path / "*.gz"))


def test_two_files_where_one_is_meant_are_refused(tmp_path: Path) -> None:
    for name, text in MOVIELENS["100k"].items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"u\.\* means 2 files .*name the one"):
        parse(tmp_path, parser="movielens", path=str(tmp_path), items=f"{tmp_path}/u.*")


def test_metadata_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json_lines(REVIEWS_2018))
    (tmp_path / "meta.json").write_text("asin;title\n1;2\n")
    with pytest.raises(DataError, match="holds neither JSON lines nor Python literals"):
        parse(tmp_path, parser="amazon", domain="d", path=str(tmp_path / "r.json"), items=str(tmp_path / "meta.json"))


FLAGS = {"Toy Story (1995)": "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0", "unknown": "1" + "|0" * 18}
MOVIELENS = {
    "100k": {"u.data": "196\t242\t3\t881250949\n1\t1\t5\t881250950\n",
             "u.item": f"1|Toy Story (1995)|01-Jan-1995||http://x|{FLAGS['Toy Story (1995)']}\n"
                       f"242|Cit\xe9 (1995)|||http://x|{FLAGS['unknown']}\n"},
    "1m": {"ratings.dat": "196::242::3::881250949\n1::1::5::881250950\n",
           "movies.dat": "1::Toy Story (1995)::Animation|Children's|Comedy\n242::Cit\xe9 (1995)::\n"},
    "25m": {"ratings.csv": "userId,movieId,rating,timestamp\n196,242,3.0,881250949\n1,1,5.0,881250950\n",
            "movies.csv": "movieId,title,genres\n1,\"Toy Story (1995)\",Animation|Children's|Comedy\n"
                          "242,Cit\u00c3\u00a9 (1995),(no genres listed)\n"},
}


@pytest.mark.parametrize("edition", MOVIELENS)
@pytest.mark.parametrize("where", ["folder", "file"])
def test_every_edition_of_movielens_says_the_same(tmp_path: Path, edition: str, where: str) -> None:
    folder = tmp_path / "ml"
    folder.mkdir()
    for name, text in MOVIELENS[edition].items():
        (folder / name).write_bytes(text.encode("latin-1"))
    path = folder if where == "folder" else folder / next(iter(MOVIELENS[edition]))
    events, items = parse(tmp_path, parser="movielens", path=str(path))
    assert events_of(events) == [("1", "movielens", "1", 881250950_000, 5.0),
                                 ("196", "movielens", "242", 881250949_000, 3.0)]
    assert items_of(items) == [("movielens", "1", "Toy Story (1995)", None, "Animation, Children's, Comedy"),
                               ("movielens", "242", "Cité (1995)", None, None)]


def test_movielens_without_its_films_or_with_two_editions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text(MOVIELENS["100k"]["u.data"])
    with pytest.raises(DataError, match=r"u\.data has no u\.item beside it; give the dataset's `items`"):
        parse(tmp_path, parser="movielens", path=str(tmp_path))
    (tmp_path / "ratings.csv").write_text(MOVIELENS["25m"]["ratings.csv"])
    with pytest.raises(DataError, match=r"found .*u\.data, .*ratings\.csv; name a ratings file itself"):
        parse(tmp_path, parser="movielens", path=str(tmp_path))


def test_tabular_reads_json_lines_and_globs_of_several_kinds_of_text(tmp_path: Path) -> None:
    (tmp_path / "e1.jsonl").write_text('{"who": 7, "asin": "x", "when": 1500000000000, "stars": 1}\n')
    (tmp_path / "e2.csv").write_text("asin,who,when,stars\ny,b,5,2.5\n")
    (tmp_path / "items.jsonl.zst").write_bytes(pa.compress(
        b'{"asin": "x", "name": "An X", "maker": "M"}\n{"asin": "y", "name": "A \\"Y\\""}\n', "zstd", asbytes=True))
    events, items = parse(tmp_path, parser="tabular", domain="shop", path=str(tmp_path / "e*"),
                          items=str(tmp_path / "items.jsonl.zst"),
                          columns={"user_id": "who", "item_id": "asin", "timestamp": "when", "rating": "stars",
                                   "title": "name", "brand": "maker"})
    assert events_of(events) == [("7", "shop", "x", 1_500_000_000_000, 1.0), ("b", "shop", "y", 5, 2.5)]
    assert items_of(items) == [("shop", "x", "An X", "M", None), ("shop", "y", 'A "Y"', None, None)]


def test_a_list_in_parquet_is_a_category_path_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["x"], "timestamp": [5]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"item_id": ["x"], "title": ["X"], "category": [["A", "B"]]}), tmp_path / "i.parquet")
    _, items = parse(tmp_path, parser="tabular", domain="d", path=str(tmp_path / "e.parquet"),
                     items=str(tmp_path / "i.parquet"))
    assert items_of(items) == [("d", "x", "X", None, "A > B")]


def test_tabular_refuses_parquet_among_text_and_files_of_no_known_kind(tmp_path: Path) -> None:
    for names in (("a.parquet", "b.csv"), ("a.xlsx",)):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
        with pytest.raises(DataError, match=r"files cannot be read as one table|without any"):
            parse(tmp_path, parser="tabular", domain="d", path=str(folder), items=str(folder))
    with pytest.raises(DataError, match=r"\.xlsx files cannot be read as one table; use Parquet, or text"):
        parse(tmp_path, parser="tabular", domain="d", path=str(folder / "a.xlsx"), items=str(folder / "a.xlsx"))


@pytest.mark.parametrize(("stamps", "unit", "n_ms", "n_mixed", "ts_ms"), [
    ([1_500_000_000_000, 5, 1_500_000_001, 1_500_000_002], "auto", 2, 2,
     [5, 1_500_000_000_000, 1_500_000_001_000, 1_500_000_002_000]),
    ([1_500_000_000_000, 5, 1_500_000_001, 1_500_000_002], "ms", 4, None,  # the config is believed
     [5, 1_500_000_001, 1_500_000_002, 1_500_000_000_000]),
    ([1_500_000_001, 5], "auto", None, None, [5000, 1_500_000_001_000]),
])
def test_milliseconds_and_seconds_among_them_are_read_as_such_and_counted(
        tmp_path: Path, stamps: list[int], unit: str, n_ms: int | None, n_mixed: int | None,
        ts_ms: list[int]) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,x,{t}\n" for t in stamps))
    (tmp_path / "i.csv").write_text("item_id,title\nx,X\n")
    events, _, counts = ingested(tmp_path, parser="tabular", domain="d", path=str(tmp_path / "e.csv"),
                                 items=str(tmp_path / "i.csv"), columns={"timestamp_unit": unit})
    assert sorted(events["ts_ms"].to_pylist()) == ts_ms
    assert counts.get(f"{tmp_path}/e.csv: time stamps read as milliseconds") == n_ms
    assert counts.get(f"{tmp_path}/e.csv: time stamps in seconds among milliseconds, read as seconds") == n_mixed


def test_a_json_lines_file_with_a_few_malformed_lines_is_read_when_the_config_allows_it(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json_lines(REVIEWS_2018 * 50) + "{broken\n")
    (tmp_path / "meta.json").write_text(json_lines(META_2018))
    values = {"parser": "amazon", "domain": "d", "path": str(tmp_path / "r.json"),
              "items": str(tmp_path / "meta.json")}
    with pytest.raises(DataError, match=r"r\.json: 1 of 101 lines read are malformed \(0\.99%\)"):
        parse(tmp_path, **values)
    events, _, counts = ingested(tmp_path, max_malformed=0.01, **values)
    assert events.num_rows == 100 and counts[f"{tmp_path}/r.json: malformed lines set aside"] == 1


REAL = "raw_formats"


@pytest.mark.parametrize(("path", "items", "n_events", "n_items", "years"), [
    ("amazon2014_reserialised/reviews_Toys_and_Games_5.slice.json.gz",
     "amazon2014_reserialised/meta_Toys_and_Games.slice.json.gz", 12_769, 6_608, (2000, 2014)),
    ("amazon2018_original/Gift_Cards_5.json.gz", "amazon2018_original/meta_Gift_Cards.json.gz", 2_972, 1_547,
     (2012, 2018)),
    ("amazon2023_reserialised/*.jsonl.gz", "amazon2023_reserialised/meta_*.jsonl.gz", 2_764, 2_610, (2004, 2023)),
    ("amazon2023_reserialised/All_Beauty.csv.gz", "amazon2023_reserialised/meta_All_Beauty.jsonl.gz", 120, 115,
     (2004, 2023)),
    ("amazon_ratings_csv/ratings_Gift_Cards.2014style.csv", "amazon2018_original/meta_Gift_Cards.json.gz", 2_972, 1_547,
     (2012, 2018)),
    ("amazon_ratings_csv/Gift_Cards.2018style.csv", "amazon2018_original/meta_Gift_Cards.json.gz", 2_972, 1_547,
     (2012, 2018)),
    ("movielens/ml-100k", None, 100_000, 1_681, (1997, 1998)),  # this copy lacks film 267
    ("movielens/ml-1m", None, 150_000, 3_883, (2000, 2003)),
    ("movielens/ml-1m/ratings.dat", "movielens/ml-10m/movies.dat", 150_000, 10_681, (2000, 2003)),
])
def test_real_files(shared_data: Path, tmp_path: Path, path: str, items: str | None, n_events: int, n_items: int,
                    years: tuple[int, int]) -> None:
    events, titles, counts = ingested(
        tmp_path, parser="movielens" if path.startswith("movielens") else "amazon", domain="d",
        path=str(shared_data / REAL / path), items=str(shared_data / REAL / items) if items else None)
    assert (events.num_rows, titles.num_rows) == (n_events, n_items)
    year_ms = 365.2425 * 86_400_000
    stamps = events["ts_ms"].to_pylist()
    assert years[0] <= 1970 + min(stamps) / year_ms and 1970 + max(stamps) / year_ms < years[1] + 1
    for column in ("user_id", "item_id"):
        assert events[column].null_count == 0
    assert titles["title"].null_count == (57 if "*" in path else 0)  # some of 2023 have none
    assert not any("malformed" in reason for reason in counts)


def test_the_two_orders_of_real_ratings_and_the_reviews_themselves_agree(shared_data: Path, tmp_path: Path) -> None:
    meta = str(shared_data / REAL / "amazon2018_original/meta_Gift_Cards.json.gz")
    found = [events_of(parse(tmp_path / name, parser="amazon", domain="d", items=meta,
                             path=str(shared_data / REAL / path))[0])
             for name, path in (("a", "amazon_ratings_csv/ratings_Gift_Cards.2014style.csv"),
                                ("b", "amazon_ratings_csv/Gift_Cards.2018style.csv"),
                                ("c", "amazon2018_original/Gift_Cards_5.json.gz"))]
    assert found[0] == found[1] == found[2]


def test_real_films_have_their_genres_and_letters(shared_data: Path, tmp_path: Path) -> None:
    by_edition = {}
    for edition in ("ml-100k", "ml-1m"):
        _, items = parse(tmp_path / edition, parser="movielens", path=str(shared_data / REAL / "movielens" / edition))
        by_edition[edition] = {r["item_id"]: (r["title"], r["category"]) for r in items.to_pylist()}
    assert by_edition["ml-100k"]["1"] == by_edition["ml-1m"]["1"] == (
        "Toy Story (1995)", "Animation, Children's, Comedy")
    titles = {t for t, _ in by_edition["ml-1m"].values()}
    assert any("é" in t for t in titles) and not any("\ufffd" in t or "Ã" in t for t in titles)
