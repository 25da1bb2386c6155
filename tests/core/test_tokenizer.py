"""What becomes of a tokenizer's files that are broken, or of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cprec.errors import DataError
from cprec.tokenizer import load_tokenizer

TEKKEN = {"config": {"pattern": ".", "default_vocab_size": 3}, "vocab": [{"rank": 0, "token_bytes": "YQ=="}]}
EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}


@pytest.mark.parametrize(("name", "content"), [
    ("tekken.json", json.dumps(TEKKEN).encode()),  # JSON of another kind
    ("tokenizer.json", json.dumps(EMPTY)[:-9].encode()),  # cut off
    ("tokenizer.json", b"[]"), ("tokenizer.json", b""),
    ("tokenizer.model.v3", b"\n\xff\xfe"),  # a SentencePiece model under a name that does not say so
])
def test_a_file_that_is_no_tokenizer_is_one_error_with_its_name_and_a_way_out(
        tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no file of a Hugging Face fast .*, or broken \(.+\); give a folder") as error:
        load_tokenizer(str(path))
    assert str(path) in str(error.value)


def test_a_broken_tokenizer_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(EMPTY))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match=r"tokenizer_config\.json is no file of a Hugging Face fast tokenizer"):
        load_tokenizer(str(tmp_path))
