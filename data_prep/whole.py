"""Documents tokenized whole, text by text: histories where a tokenizer merges over lines (`exact: slow`), plain text.

reads: texts. writes: one Arrow file per part with every document's id, number of items and token ids. Costs what the
tokenizer costs, for every document; keeps one part's tokens in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cprec.template import Template
from cprec.tokenizer import Tokenizer
from data_prep.plan import Documents, document_ids
from data_prep.ragged import Ints, Ragged, map_ragged, ragged, write_batch

TEXTS_AT_ONCE = 1024
DROPPED = "dropped"
"""Key of the file's metadata: item -> its events that no document holds, as JSON."""
NO_EVENTS = np.zeros(0, np.int32)


def tokenize_histories(items: npt.NDArray[np.int32], lengths: Ints, history_ids: Ints, *,
                       line_of: Callable[[npt.NDArray[np.int32]], list[str]], template: Template,
                       tokenizer: Tokenizer, room: int) -> tuple[Documents, Ragged]:
    """Documents of the histories (items end to end, how many each has) and their ids.

    A history that does not fit into `room` tokens is halved at an item border until it does; a single item that does
    not fit is dropped and counted. `line_of` gives the lines of items by catalogue number.
    """
    starts = np.cumsum(lengths) - lengths
    todo = [(place, 0, n) for place, n in enumerate(lengths.tolist())][::-1]
    found: dict[tuple[int, int, int], list[int]] = {}
    dropped: dict[int, int] = {}
    while todo:
        some = [todo.pop() for _ in range(min(TEXTS_AT_ONCE, len(todo)))]
        runs = [items[starts[place] + first:starts[place] + first + n] for place, first, n in some]
        for (place, first, n), run, ids in zip(
                some, runs, encode_whole((template.render(line_of(run)) for run in runs), tokenizer), strict=True):
            if len(ids) <= room:
                found[place, first, n] = ids
            elif n == 1:
                dropped[int(run[0])] = dropped.get(int(run[0]), 0) + 1
            else:
                todo += [(place, first + n // 2, n - n // 2), (place, first, n // 2)]
    cuts = sorted(found)
    places, firsts, n_items = np.array(cuts, dtype=np.int64).reshape(-1, 3).T
    lists = ragged([found[cut] for cut in cuts])
    return Documents(ids=document_ids(history_ids[places], firsts), n_items=n_items, n_tokens=lists.lens,
                     n_target_tokens=lists.lens, first_event=starts[places] + firsts, events=items,
                     dropped=dropped), lists


def tokenize_texts(texts: Sequence[str], text_ids: Ints, *, tokenizer: Tokenizer,
                   room: int) -> tuple[Documents, Ragged]:
    """Documents of plain texts and their ids; a text longer than `room` tokens goes on in the next document, so that
    no token is lost. A document's id is its text's number and, in the lowest bits, its place in it."""
    pieces: list[list[int]] = []
    of_text: list[tuple[int, int]] = []
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        for place, ids in enumerate(encode_whole(texts[begin:begin + TEXTS_AT_ONCE], tokenizer), start=begin):
            cuts = range(0, len(ids), room)
            pieces += [ids[cut:cut + room] for cut in cuts]
            of_text += [(place, number) for number in range(len(cuts))]
    places, numbers = np.array(of_text, dtype=np.int64).reshape(-1, 2).T
    lists = ragged(pieces)
    ones = np.ones(len(pieces), np.int64)
    return Documents(ids=document_ids(text_ids[places], numbers), n_items=ones, n_tokens=lists.lens,
                     n_target_tokens=lists.lens, first_event=0 * ones, events=NO_EVENTS, dropped={}), lists


def encode_whole(texts: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each text as one document: begin of sequence where the tokenizer has one, the text, end of sequence."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [[*bos, *ids, tokenizer.eos_id] for ids in tokenizer.encode([*texts])]


def write_whole(path: Path, documents: Documents, lists: Ragged, *, dtype: str) -> None:
    """Keep the documents and their ids, by rename."""
    batch = pa.record_batch({
        "doc_id": pa.array(documents.ids), "n_items": pa.array(documents.n_items),
        "first_event": pa.array(documents.first_event),
        "ids": pa.LargeListArray.from_arrays(pa.array(lists.offsets), pa.array(lists.ids.astype(dtype)))})
    batch = batch.replace_schema_metadata({DROPPED: json.dumps(documents.dropped)})
    write_batch(path, batch)


def map_whole(path: Path, events: npt.NDArray[np.int32] = NO_EVENTS) -> tuple[Documents, Ragged]:
    """The documents that were kept, as views into the mapped file."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    lists = map_ragged(path)
    dropped = json.loads(batch.schema.metadata[DROPPED.encode()])
    columns = {name: batch[name].to_numpy() for name in ("doc_id", "n_items", "first_event")}
    return Documents(ids=columns["doc_id"], n_items=columns["n_items"], n_tokens=lists.lens,
                     n_target_tokens=lists.lens, first_event=columns["first_event"], events=events,
                     dropped={int(item): n for item, n in dropped.items()}), lists
