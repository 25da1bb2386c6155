"""The commands of the documentation: found in its pages, and asked of the programs that they start.

Nothing is run here but argument parsers: those of the scripts themselves, of deepspeed and of torchrun.
"""

from __future__ import annotations

import argparse
import configparser
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cprec.config import RunConfig
from cprec.settings import load_settings
from data_prep.config import PrepConfig

REPO = Path(__file__).parents[2]
PAGES = sorted(p for pattern in ("*.md", "docs/**/*.md", "examples/*/README.md", "experiments/README.md",
                                 "launch/slurm/README.md", "ds_configs/README.md")
               for p in REPO.glob(pattern) if p.name != "CHANGELOG.md")
FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
STARTS = r"(?:make|python[\d.]*|deepspeed|torchrun|mpirun|srun|sbatch|spark-submit|pip|launch/[\w/]+\.(?:py|sh)) "
INLINE = re.compile(rf"`({STARTS}[^`]+)`")
INDENTED = re.compile(rf"^    ({STARTS}.*)$", re.MULTILINE)
NEEDS_NO_CHECK = {".", "apt-get", "cd", "docker", "git", "lm_eval", "ls", "mkdocs", "pre-commit", "scancel", "scontrol",
                  "sinfo", "squeue", "tail", "tensorboard"}
"""Programs that are not ours, in commands that name nothing of ours."""
LAUNCHERS = ("mpirun", "srun", "spark-submit")
WRITTEN_BY_THE_READER = {"run.yaml", "basket.yaml", "shop.yaml"}
"""Configs that a page shows or that stand for the reader's own."""
PLACEHOLDER = re.compile(r"\.\.\.|\$|(?<![\w/])[A-Z][A-Z_]*(?![\w/.=])")


@dataclass(frozen=True)
class Command:
    """One simple command of a page: no pipe, no list, no loop around it."""

    page: str
    words: tuple[str, ...]
    is_mentioned: bool = False
    """In the middle of a sentence."""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def is_sketch(self) -> bool:
        """It leaves something to the reader: it is mentioned, or has `...`, a variable or a word such as RUN."""
        return self.is_mentioned or any(PLACEHOLDER.search(w) for w in self.words)


def commands() -> list[Command]:
    """All of them, in the order of the pages."""
    found: dict[Command, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prose = FENCED.sub("", text)
        blocks = [m[3] for m in FENCED.finditer(text) if m[2] in ("bash", "sh", "console")]
        inline = [piece.replace("\n", " ") for piece in INLINE.findall(prose)]
        for is_mentioned, pieces in ((False, [*blocks, *INDENTED.findall(prose)]), (True, inline)):
            for words in (w for piece in pieces for w in simple_commands(piece)):
                found[Command(str(page.relative_to(REPO)), tuple(words), is_mentioned)] = None
    return list(found)


def simple_commands(text: str) -> list[list[str]]:
    """The commands of a piece of shell, in words; of `[--this x | --that y]` the first."""
    text = re.sub(r"(?<=\s)\[(-[^\]|]*)(?:\|[^\]]*)?\]", r"\1", text.replace("\\\n", " "))
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "||", "|", "&"):
                found.append(_bare(words))
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


def _bare(words: list[str]) -> list[str]:
    """Without keywords of loops, variables set before a command, and redirections."""
    if words[:1] in (["for"], ["done"], ["$"]):
        words = words[1:] if words[0] == "$" else []
    while words and (words[0] == "do" or re.fullmatch(r"\w+=\S*", words[0])):
        words = words[1:]
    if ">" in words:
        at = words.index(">")
        words = words[:at] + words[at + 2:]
    return words


def check(command: Command) -> None:
    """Fail where a program, script, option, file, target, template or package that it names is not there."""
    program, *arguments = command.words
    for word in command.words:
        _exists(word)
    if program == "make":
        _make(arguments)
    elif re.fullmatch(r"python[\d.]*", program) and arguments[0] == "-m":
        _module(command, arguments[1:])
    elif re.fullmatch(r"python[\d.]*", program):
        _script(command, arguments)
    elif program.endswith(".py"):
        _script(command, [program, *arguments])
    elif program == "deepspeed":
        _script(command, _after_launcher("deepspeed.launcher.runner", ("user_script", "user_args"), arguments))
    elif program == "torchrun":
        _script(command, _after_launcher("torch.distributed.run", ("training_script", "training_script_args"),
                                         arguments))
    elif program in LAUNCHERS:
        at = [i for i, w in enumerate(arguments) if w.endswith(".py")]
        if at or not command.is_mentioned:
            _script(command, arguments[at[0]:])
    elif program in ("launch/slurm/submit.sh", "launch/slurm/chain.sh"):
        _slurm_template(command, arguments)
    elif program == "pip":
        _pip(arguments)
    else:
        assert program in NEEDS_NO_CHECK, f"what is {program}?"


def _exists(word: str) -> None:
    ours = ("launch/", "data_prep/", "cprec/", "ds_configs/", "benchmarks/", "examples/", "tests/", "docs/")
    if word.startswith(ours) and not re.search(r"[$*<]|\.\.\.", word):
        assert (REPO / word).exists(), f"there is no {word}"


def _make(arguments: list[str]) -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} [?:]?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"


def _module(command: Command, arguments: list[str]) -> None:
    name, *rest = arguments
    assert importlib.util.find_spec(name) is not None, f"there is no module {name}"
    if name.startswith("benchmarks."):
        parse(command, importlib.import_module(name), rest)


def _script(command: Command, words: list[str]) -> None:
    script, *arguments = words
    assert (REPO / script).is_file(), f"there is no {script}"
    if not script.startswith("launch/"):
        return
    found = parse(command, script_module(script), arguments)
    if found is not None and hasattr(found, "config"):
        kind = PrepConfig if script == "launch/prepare.py" else RunConfig
        _config(found.config, list(getattr(found, "overrides", None) or []), kind)


def _config(path: str | None, overrides: list[str], kind: type[RunConfig] | type[PrepConfig]) -> None:
    if path is not None and path not in WRITTEN_BY_THE_READER:
        load_settings(kind, REPO / path, overrides)


def _after_launcher(module: str, names: tuple[str, str], arguments: list[str]) -> list[str]:
    """The script and its arguments, as the launcher's own parser finds them."""
    script, rest = (getattr(importlib.import_module(module).parse_args([a for a in arguments if a != "..."]), name)
                    for name in names)
    return [script, *rest]


def _slurm_template(command: Command, arguments: list[str]) -> None:
    template, *rest = [a for a in arguments if not a.startswith("--") and not a.isdecimal()]
    assert (REPO / "launch/slurm" / template).is_file(), f"there is no template {template}"
    if template in ("prepare.sbatch", "pretrain.sbatch") and not command.is_sketch:
        _config(rest[0], rest[1:], PrepConfig if template == "prepare.sbatch" else RunConfig)


def _pip(arguments: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg", encoding="utf-8")
    pinned = "\n".join((REPO / f).read_text(encoding="utf-8") for f in ("constraints.txt", "Makefile", ".ci/run"))
    for word in arguments:
        if extras := re.fullmatch(r"(?:cprec|\.)\[([\w,]+)\]", word):
            assert set(extras[1].split(",")) <= set(setup["options.extras_require"]), f"setup.cfg has not all of {word}"
        if "==" in word:
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\d.])", pinned), f"nothing here pins {word}"


class Parsed(Exception):
    """Raised in place of a script's work, with what its parser made of the arguments."""


@functools.cache
def script_module(script: str) -> ModuleType:
    """A launch script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(script).stem}", REPO / script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(command: Command, module: ModuleType, arguments: list[str]) -> argparse.Namespace | None:
    """What the module's own parser makes of the arguments; of a sketch only the options' names are asked for, and None
    is given."""
    whole = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}

    def stop_after(name: str) -> Any:
        def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
            if command.is_sketch:
                unknown = [a for a in arguments if a.startswith("--")
                           and a.partition("=")[0] not in self._option_string_actions]
                assert not unknown, f"{self.prog} has no {unknown}"
                raise Parsed(None)
            try:
                raise Parsed(whole[name](self, args, namespace))
            except SystemExit as e:
                raise AssertionError(f"{self.prog} refuses {arguments}") from e
        return parse_args

    with pytest.MonkeyPatch.context() as patch:
        for name in whole:
            patch.setattr(argparse.ArgumentParser, name, stop_after(name))
        patch.setattr("sys.argv", [module.__name__, *arguments])
        try:
            module.main()
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{module.__name__} worked without parsing its arguments")
