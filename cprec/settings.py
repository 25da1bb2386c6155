"""Typed, immutable settings from YAML with dotted overrides; every problem is reported at once.

reads: one YAML file. writes: one YAML file (the resolved settings, valid input again). Used by the configs of
preparation, training and ranking alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cprec.errors import ConfigError, did_you_mean, raise_all


class Settings(BaseModel):
    """Base of every block of a config: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> S:
    """Settings of `kind` from the YAML file `path`, with `overrides` such as `schedule.total_steps=100` on top.

    Raises ConfigError naming every unknown key (with the nearest known one), bad value and missing field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read config {path}: {e.strerror}; give an existing YAML file") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"config {path} is no UTF-8 text: {e}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, found {type(raw).__name__}")
    return parse_settings(kind, apply_overrides(raw, overrides), source=str(path))


def parse_settings(kind: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """Settings of `kind` from a mapping; raises one ConfigError with all problems, each with field, value, remedy."""
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise_all(describe_problems(kind, e), of=source)
        raise AssertionError("unreachable: a ValidationError has problems") from e


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b.c=value` set; the value is read as YAML (`=null`, `=[1,2]`, `={x: 1}` work)."""
    out: dict[str, Any] = _copy(values)
    for override in overrides:
        dotted, eq, text = override.partition("=")
        if not eq or not dotted:
            raise ConfigError(f"override {override!r} is not of the form key.subkey=value")
        node = out
        *parents, leaf = dotted.split(".")
        for name in parents:
            child = node.get(name)
            if not isinstance(child, dict):
                child = node[name] = {}
            node = child
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {e}") from None
    return out


def dump_settings(settings: Settings) -> str:
    """The settings as YAML that `load_settings` reads back to an equal object."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return text


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def describe_problems(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """Each problem of a record of `kind` as `field=value: what is wrong; the way out`."""
    return [_describe(kind, dict(p)) for p in error.errors()]


def _describe(kind: type[BaseModel], problem: dict[str, Any]) -> str:
    """One problem of pydantic's as `field=value: what is wrong; the way out`."""
    loc: tuple[str | int, ...] = problem["loc"]
    field = ".".join(str(p) for p in loc) or "(whole config)"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown key; {did_you_mean(str(loc[-1]), _keys_at(kind, loc[:-1]))}"
    if problem["type"] == "missing":
        return f"{field}: missing; this field is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not loc or isinstance(problem["input"], Mapping):
        return message if not loc else f"{field}: {message}"
    return f"{field}={problem['input']!r}: {message}"


def _keys_at(kind: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Field names of the block that `loc` leads to, as far as the annotations say."""
    for name in loc:
        if isinstance(name, int):  # place in a list, whose blocks are all of one kind
            continue
        field = kind.model_fields.get(str(name))
        blocks = _blocks_of(field.annotation) if field else []
        if not blocks:
            return []
        kind = blocks[0]
    return list(kind.model_fields)


def _blocks_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [b for arg in getattr(annotation, "__args__", ()) for b in _blocks_of(arg)]
