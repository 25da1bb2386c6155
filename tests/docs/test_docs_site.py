"""What is made from code is what the code gives now, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    """docs/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPO / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_the_models_give() -> None:
    made = script("configuration").page()
    committed = (REPO / "docs/configuration.md").read_text(encoding="utf-8")
    assert made == committed, "run: python docs/configuration.py"


def test_the_configuration_page_has_every_key_with_its_limits_and_default() -> None:
    page = (REPO / "docs/configuration.md").read_text(encoding="utf-8")
    for line in (  # read off the models by hand
            "| `global_batch_size` | int > 0 | **required** | Rows per optimizer step, over all ranks. |",
            "| `seq_len` | int >= 16, < 65536 | `1024` | Tokens per row. |",
            "| `warmup` | [Length](#length) | `{share: 0.02}` |",
            "`linear`, `cosine`, `sqrt`, `exponential`, `inverse` | `\"sqrt\"` |"):
        assert line in page, line


def test_every_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    script("pictures").draw(tmp_path)
    pictures = sorted(p.name for p in tmp_path.iterdir())
    assert pictures == sorted(p.name for p in (REPO / "docs/pictures").iterdir()) and len(pictures) == 4
    for name in pictures:
        committed = REPO / "docs/pictures" / name
        assert (tmp_path / name).read_bytes() == committed.read_bytes(), f"{name}: run: python docs/pictures.py"
        assert committed.stat().st_size < 50_000


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'cprec[docs]', or make docs")
    build = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
                           cwd=REPO, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert build.returncode == 0, build.stdout + build.stderr
    pages = {p.parent.name for p in (tmp_path / "site").rglob("index.html")}
    wanted = {p.stem for p in (REPO / "docs").glob("*.md")} | {"CONTRIBUTING", "CHANGELOG"}
    assert wanted | {p.name for p in (REPO / "examples").iterdir()} <= pages
    start = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "<title>CPRec</title>" in start and 'href="decisions/"' in start
    assert "fonts.googleapis.com" not in start
    assert (tmp_path / "site/data_prep/configs/amazon7.yaml").is_file()  # linked to by a page, so part of the site
