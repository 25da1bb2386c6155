"""Stage 5a, vocabulary: a small tokenizer trained on the items' texts that training will see.

reads: `catalogue.parquet`. writes: `tokenizer/tokenizer.model` (SentencePiece unigram with byte fallback) and an
equivalent Hugging Face tokenizer beside it (`tokenizer.json`, `tokenizer_config.json`). Nothing is written unless
both encode every line of the catalogue alike. Keeps the distinct texts in memory; one thread, so that the same
texts give the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import string
from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from cprec.errors import DataError
from cprec.format import replacing, write_atomically
from cprec.log import get_logger
from cprec.template import Template
from data_prep.records import Corpora, Counts, Layout

log = get_logger(__name__)

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
CONTROL_IDS = {UNK: 0, BOS: 1, EOS: 2, PAD: 3}
SCORE_STEP = 2.0**-6
"""Scores are multiples of it. `ppp` is `p pp` or `pp p` at one score, and rounding of the sums, in 32 bits in one
library and in 64 in the other, would decide. Sums of multiples are exact in both, and of equals both take the same."""
NEVER_IN_TEXT = -1000.0
"""Score of control and byte pieces in the Hugging Face copy. That library looks for every piece in the text, also
for `</s>`; at this score any spelling by characters wins. SentencePiece never looks for them."""
LINES_AT_ONCE = 16384
TITLES_PER_LEAD_IN = 32
"""Typical items of a document."""


def train_tokenizer(layout: Layout, *, vocab_size: int, template: Template, corpora: Corpora) -> Counts:
    """Train, prove both copies equal, write them. Says the size reached when the titles allow no more."""
    titles = sorted(_training_texts(layout, corpora))
    if not titles:
        raise DataError("no item of the pre-training domains has an event in the training window; nothing to train a "
                        "tokenizer on")
    try:
        model = _train([*titles, *_frames(template, len(titles))], vocab_size)
    except RuntimeError as e:  # SentencePiece's own; of more kinds of characters than pieces it says "512 vs 655"
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(e))
        raise DataError(f"tokenizer.train_vocab_size={vocab_size} does not do: "
                        + (f"each different character of the titles needs a piece; raise it to {least[1]} at the very "
                           f"least, better to several times as many" if least else str(e))) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    fast = _fast_copy(processor)
    n_lines = _prove_equal(processor, fast, _texts(layout, template))
    reached = processor.get_piece_size()
    if reached < vocab_size:
        log.warning("tokenizer: %d pieces, not %d: the titles hold no more", reached, vocab_size)
    _write(layout, model, fast)
    counts = Counts("vocabulary")
    counts.add("titles trained on", len(titles))
    counts.add("pieces asked for", vocab_size)
    counts.add("pieces reached", reached)
    counts.add("lines that both copies encode alike", n_lines)
    return counts


def _training_texts(layout: Layout, corpora: Corpora) -> set[str]:
    """Items' texts, each on one line."""
    texts: set[str] = set()
    for batch in pq.ParquetFile(layout.catalogue).iter_batches(columns=["domain", "line", "n_train"]):
        texts.update(" ".join(row["line"].split()) for row in batch.to_pylist()
                     if row["domain"] in corpora.pretrain and row["n_train"] > 0)
    return texts


def _frames(template: Template, n_titles: int) -> list[str]:
    """The template's own words as often as documents have them, every second time with another end to each word.

    SentencePiece makes pieces only of what occurs in two different words; otherwise the words of the lead-in, which
    starts every document, would be spelled letter by letter.
    """
    words = f"{template.lead_in} {template.before_target or ''} {template.tail}".split()
    n_times = max(n_titles // TITLES_PER_LEAD_IN, 1)
    # "%" after the bare word: in the original "," or ":" or nothing follows it
    return [" ".join(words), " ".join(f"{word.strip(string.punctuation)}%" for word in words)] * n_times


def _train(titles: Sequence[str], vocab_size: int) -> bytes:
    written = io.BytesIO()
    printable = string.digits + string.ascii_letters + string.punctuation
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(titles), model_writer=written, model_type="unigram", vocab_size=vocab_size,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, split_digits=True, required_chars=printable, num_threads=1,
        max_sentence_length=1 << 16, unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece=UNK, bos_piece=BOS,
        eos_piece=EOS, pad_piece=PAD, minloglevel=2)
    trained = ModelProto.FromString(written.getvalue())
    for piece in trained.pieces:
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    model: bytes = trained.SerializeToString(deterministic=True)
    return model


def _fast_copy(processor: sentencepiece.SentencePieceProcessor) -> FastTokenizer:
    """The same unigram model in the `tokenizers` library."""
    pieces = []
    for i in range(processor.get_piece_size()):
        is_text = not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        pieces.append((processor.id_to_piece(i), processor.get_score(i) if is_text else NEVER_IN_TEXT))
    fast = FastTokenizer(models.Unigram(pieces, unk_id=CONTROL_IDS[UNK], byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast


def _texts(layout: Layout, template: Template) -> Iterator[list[str]]:
    yield [template.render([template.any_line]), "</s> <s>\n", "<0x41>\n"]
    for batch in pq.ParquetFile(layout.catalogue).iter_batches(LINES_AT_ONCE, columns=["line"]):
        yield [template.any_line + line for line in batch["line"].to_pylist()]


def _prove_equal(processor: sentencepiece.SentencePieceProcessor, fast: FastTokenizer,
                 texts: Iterator[list[str]]) -> int:
    n_lines = 0
    for some in texts:
        wanted = processor.encode(some)
        found = [e.ids for e in fast.encode_batch(some, add_special_tokens=False)]
        for text, a, b in zip(some, wanted, found, strict=True):
            if a != b:
                raise DataError(f"the trained tokenizer's two copies encode {text!r} differently: SentencePiece {a}, "
                                f"Hugging Face {b}; try another tokenizer.train_vocab_size")
        n_lines += len(some)
    return n_lines


def _write(layout: Layout, model: bytes, fast: FastTokenizer) -> None:
    layout.tokenizer.mkdir(parents=True, exist_ok=True)
    with replacing(layout.tokenizer / "tokenizer.model") as partial:
        partial.write_bytes(model)
    fast.add_special_tokens(list(CONTROL_IDS))
    write_atomically(layout.tokenizer / "tokenizer.json", fast.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNK, "bos_token": BOS, "eos_token": EOS,
              "pad_token": PAD, "clean_up_tokenization_spaces": False, "model_max_length": int(1e30)}
    write_atomically(layout.tokenizer / "tokenizer_config.json", json.dumps(config, indent=1))
