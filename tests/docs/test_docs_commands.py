"""Every command of README and docs names programs, options, files, targets and packages that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from cprec.config import RunConfig
from cprec.settings import parse_settings
from data_prep.config import PrepConfig
from tests.docs.commands import FENCED, PAGES, REPO, Command, check, commands, script_module, simple_commands

COMMANDS = commands()


def test_shell_is_taken_apart_as_a_shell_does() -> None:
    text = """for k in 1 2; do
    A=b deepspeed --num_gpus 8 x.py --shots $k \\
        'a b=c'   # a comment
    python y.py [--one 1 | --two 2] [--three] > log && pip install z
done
$ make test"""
    assert simple_commands(text) == [
        ["deepspeed", "--num_gpus", "8", "x.py", "--shots", "$k", "a b=c"], ["python", "y.py", "--one", "1", "--three"],
        ["pip", "install", "z"], ["make", "test"]]


@pytest.mark.parametrize(("text", "complaint"), [
    ("make tset", "no tset"),
    ("make bench-rank OUTPUT=docs", "no OUTPUT"),
    ("python launch/pretrian.py --config x.yaml", "no launch/pretrian.py"),
    ("python launch/rank.py --modle a --queries b --out c", "refuses"),
    ("deepspeed launch/anneal.py --from RUN --stepz 3", "has no"),
    ("torchrun --nproc_per_node 2 launch/rank.py --model a --queries b", "refuses"),
    ("python launch/pretrain.py --config launch/configs/quickstart.yaml optimizer.peek_lr=1", "peek_lr"),
    ("launch/slurm/submit.sh trian.sbatch launch/configs/quickstart.yaml", "no template"),
    ("pip install 'cprec[s4]'", "s4"),
    ("pip install torch==1.0.0", "nothing here pins"),
    ("frobnicate", "what is"),
])
def test_a_command_that_is_wrong_is_found(text: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    [words] = simple_commands(text)
    with pytest.raises(Exception, match=complaint):
        check(Command("a page", tuple(words)))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_is_one_that_works(command: Command) -> None:
    check(command)


def test_the_commands_are_found_and_use_every_script() -> None:
    used = {w for c in COMMANDS for w in c.words if w.startswith("launch/") and w.endswith(".py")}
    assert len(COMMANDS) > 100
    assert used == {f"launch/{p.name}" for p in (REPO / "launch").glob("*.py")}


@pytest.mark.parametrize("script", sorted(p.name for p in (REPO / "launch").glob("*.py")))
def test_every_script_helps(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        script_module(f"launch/{script}").main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage:" in shown and f"launch/{script}" in shown  # an example of how it is called


YAML = [(page, m[3]) for page in PAGES for m in FENCED.finditer(page.read_text(encoding="utf-8")) if m[2] == "yaml"]


@pytest.mark.parametrize(("page", "text"), YAML, ids=lambda x: x.name if isinstance(x, Path) else x[:20])
def test_every_piece_of_config_is_one_that_the_models_take(page: Path, text: str) -> None:
    if re.search(r"^datasets:", text, re.MULTILINE):
        parse_settings(PrepConfig, yaml.safe_load(text), source=page.name)
        return
    for key, value in yaml.compose(text).value:  # keys may come twice: one way, or another
        kind = next(k for k in (RunConfig, PrepConfig) if key.value in k.model_fields)
        given = yaml.SafeLoader("").construct_object(value, deep=True)
        try:
            TypeAdapter(kind.model_fields[key.value].annotation).validate_python(given)
        except ValidationError as e:
            assert {problem["type"] for problem in e.errors()} == {"missing"}, e  # the rest of the block is elsewhere


def test_every_file_of_the_repository_that_a_page_names_is_there() -> None:
    ours = re.compile(r"`((?:launch|cprec|data_prep|docs|benchmarks|tests|ds_configs|examples)/[\w/.-]+\.\w+)`")
    named = {(page.name, m) for page in PAGES for m in ours.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 50
    missing = sorted((page, path) for page, path in named if not (REPO / path).exists())
    assert not missing
