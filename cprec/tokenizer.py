"""Any tokenizer as a pure map from text to ids, and its fingerprint. Text is data: no string in it is ever control.

reads: a Hugging Face folder (`tokenizer.json`), a hub name, a SentencePiece `.model`, or a GGUF file. Needs no torch,
and transformers for GGUF alone. Preparation encodes the catalogue with it; the trainer compares its fingerprint with
the manifest's; ranking encodes the titles of a frozen catalogue with it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cprec.errors import DataError

PROBE = "Title: A-1 (2.5 oz), 10% off!\n naïve café 東京 🙂\n</s><|endoftext|>  two  spaces\n"
"""Encoded into the fingerprint, so that two tokenizers with one vocabulary but other rules differ."""
TRAINED = "trained"
"""The name of a tokenizer that its preparation trained: the folder `tokenizer` beside `packed`."""

_HUB_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]


class _Backend(Protocol):
    """What differs between the two libraries; ids are plain ints, no special token is added or parsed."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Tokenizer:
    """Text to ids, without ever making a control token out of text.

    `bos_id` is set only where the tokenizer's own convention starts a text with it; `pad_id` falls back to `eos_id`.
    `vocab_size` is the largest id plus one. `name` is what the user called it, for messages and manifests.
    """

    def __init__(self, backend: _Backend, *, name: str, pieces: dict[int, str], bos_id: int | None, eos_id: int,
                 pad_id: int | None, control_ids: frozenset[int]) -> None:
        self._backend = backend
        self.name = name
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.control_ids = control_ids
        self.vocab_size = max(pieces) + 1
        self.fingerprint = self._fingerprint(pieces)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text on its own. Raises DataError if one would hold a control token."""
        encoded = self._backend.encode(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if not self.control_ids.isdisjoint(ids):
                raise DataError(f"tokenizer {self.name} makes a control token of the plain text {text[:200]!r}; "
                                f"use a tokenizer that can encode it as text, or drop the item")
        return encoded

    def encode_start(self, text: str) -> list[int]:
        """Ids of what a text starts with: the beginning-of-sequence token, if texts have one, and `text`."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode([text])[0]

    def encode_after(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands inside a document, behind `before`; an empty text has none.

        A tokenizer may treat the start of a text in its own way (SentencePiece puts a space there), so each is encoded
        behind `before`, whose ids are then taken off. Raises DataError where the two merge.
        """
        known = self.encode([before])[0]
        encoded = self.encode([f"{before}{text}" for text in texts])
        for text, ids in zip(texts, encoded, strict=True):
            if ids[:len(known)] != known or (text and len(ids) == len(known)):
                raise DataError(f"tokenizer {self.name} merges {before[-20:]!r} with {text[:200]!r} behind it, so the "
                                f"parts of a text have no ids of their own: prepare with tokenizer.exact=slow or "
                                f"another template; titles cannot be ranked with it")
        return [ids[len(known):] for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of `ids`, control tokens shown."""
        return self._backend.decode([int(i) for i in ids])

    def _fingerprint(self, pieces: dict[int, str]) -> str:
        known = {"pieces": sorted(pieces.items()), "bos": self.bos_id, "eos": self.eos_id,
                 "probe": self._backend.encode([PROBE])[0]}
        return hashlib.sha256(json.dumps(known, ensure_ascii=True).encode()).hexdigest()


class _HuggingFace:
    """A fast tokenizer with its added tokens taken out of the text rules: `</s>` in a title is four characters."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._shown = FastTokenizer.from_str(json.dumps(spec))
        plain = {**spec, "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
        self._plain = FastTokenizer.from_str(json.dumps(plain))
        self._plain.encode_special_tokens = True
        self.pieces = {i: piece for piece, i in self._shown.get_vocab(with_added_tokens=True).items()}
        self.adds_first: int | None = next(iter(self._shown.encode("a", add_special_tokens=True).ids), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._shown.decode(list(ids), skip_special_tokens=False))


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise DataError(f"{path} is not a readable SentencePiece model: {e}") from None
        self.pieces = {i: self.model.id_to_piece(i) for i in range(self.model.get_piece_size())}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.model.encode(list(texts)))

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if self.model.is_control(i):
                parts += [self.model.decode(run), self.pieces[i]]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self.model.decode(run)])


def load_tokenizer(name: str) -> Tokenizer:
    """Tokenizer of a local folder, a `.json`, SentencePiece `.model` or GGUF file, or a hub name (needs the network
    once). A folder with neither of the first but one GGUF file stands for that.

    Raises DataError when nothing of that name can be read, or when it has no end-of-sequence token.
    """
    path = Path(name)
    if path.suffix == ".model":
        return _from_sentencepiece(path, name)
    inside = sorted(path.glob("*.gguf")) if path.is_dir() and not any((path / f).is_file() for f in _HUB_FILES) else []
    if path.suffix == ".gguf" or len(inside) == 1:
        return _from_gguf(inside[0] if inside else path, name)
    if not path.exists() and not path.is_absolute() and name.count("/") <= 1 and not name.startswith("."):
        path = _download(name)
    return _from_folder(path, name)


def _from_sentencepiece(path: Path, name: str) -> Tokenizer:
    if not path.is_file():
        raise DataError(f"tokenizer {name}: no such file")
    backend = _SentencePiece(path)
    sp = backend.model
    if sp.eos_id() < 0:
        raise DataError(f"tokenizer {name} has no end-of-sequence piece; train it with eos_id >= 0")
    control = frozenset(i for i in backend.pieces if sp.is_control(i))
    return Tokenizer(backend, name=name, pieces=backend.pieces, bos_id=sp.bos_id() if sp.bos_id() >= 0 else None,
                     eos_id=sp.eos_id(), pad_id=sp.pad_id() if sp.pad_id() >= 0 else None, control_ids=control)


def _from_folder(path: Path, name: str) -> Tokenizer:
    spec_path = path / "tokenizer.json" if path.is_dir() else path
    if not spec_path.is_file() and (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path / "tokenizer.model", name)
    if not spec_path.is_file():
        raise DataError(f"tokenizer {name}: neither tokenizer.json nor tokenizer.model in {path}; "
                        f"give a Hugging Face folder with a fast tokenizer, or a SentencePiece .model file")
    spec = _read_json(spec_path, name)
    config_path = spec_path.with_name("tokenizer_config.json")
    config = _read_json(config_path, name) if config_path.is_file() else {}
    try:
        backend = _HuggingFace(spec)
    except Exception as e:  # the library raises nothing more special
        raise _unusable(spec_path, name, e) from None
    ids = {piece: i for i, piece in backend.pieces.items()}

    def token_id(role: str) -> int | None:
        token = config.get(f"{role}_token")
        return ids.get(token["content"] if isinstance(token, dict) else token) if token else None

    eos_id, bos_id = token_id("eos"), token_id("bos")
    if eos_id is None:
        raise DataError(f"tokenizer {name}: tokenizer_config.json names no eos_token that is in the vocabulary")
    control = frozenset(t["id"] for t in spec.get("added_tokens", []) if t["special"]) | {eos_id}
    return Tokenizer(backend, name=name, pieces=backend.pieces, bos_id=bos_id if bos_id == backend.adds_first else None,
                     eos_id=eos_id, pad_id=token_id("pad"), control_ids=control)


def _from_gguf(path: Path, name: str) -> Tokenizer:
    """By way of the folder that transformers would write."""
    from transformers import AutoTokenizer

    if not path.is_file():
        raise DataError(f"tokenizer {name}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        except (ImportError, OSError, ValueError, KeyError) as e:
            raise _unusable(path, name, e) from None
        return _from_folder(Path(folder), name)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # neither JSON, or not even text
        raise _unusable(path, name, e) from None
    if not isinstance(found, dict):
        raise _unusable(path, name, ValueError("it holds no object"))
    return found


def _unusable(path: Path, name: str, error: Exception) -> DataError:
    return DataError(f"tokenizer {name}: {path} is no file of a Hugging Face fast tokenizer, or broken "
                     f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); give a folder with a "
                     f"whole tokenizer.json (tekken.json has to be converted to one), or a SentencePiece .model file")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise DataError(f"tokenizer {name!r} is no local path and could not be fetched from the hub: {e}") from None
