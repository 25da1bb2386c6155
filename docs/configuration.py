"""Writes docs/configuration.md: every key of the two kinds of config, from the models that check them.

    python docs/configuration.py

reads: the pydantic models of `cprec.config` and `data_prep.config`, and the strings below their fields. writes: the
page. A test compares the page with what this gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration

Made by `docs/configuration.py` from the models that check every config; do not edit. A key that is not here is an error
that names the nearest one, and all problems of a config are reported at once. Any key can be replaced on the command
line, with its value in YAML: `optimizer.peak_lr=3e-5`, `schedule.total='{tokens: 1e10}'`. `--dry-run` of
`launch/prepare.py`, `launch/pretrain.py` and `launch/anneal.py` prints the config as it was understood.

- [A run](#a-run): `launch/pretrain.py --config`, and `config.yaml` of every run folder
- [A preparation](#a-preparation): `launch/prepare.py --config`
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    from cprec.config import RunConfig
    from data_prep.config import PrepConfig

    return "".join([HEAD, "\n## A run\n", *blocks(RunConfig), "\n## A preparation\n", *blocks(PrepConfig)])


def choices() -> dict[tuple[str, str], list[str]]:
    """(block, key) -> the names that a registry knows, for keys that are text to the models."""
    from cprec.attention import BACKENDS
    from cprec.schedule import SHAPES
    from data_prep.records import PARSER_NAMES, TEMPLATE_NAMES

    return {("ModelConfig", "attention"): ["auto", *BACKENDS], ("AnnealConfig", "shape"): [*SHAPES],
            ("Dataset", "parser"): [*PARSER_NAMES], ("PrepConfig", "template"): [*TEMPLATE_NAMES]}


def blocks(root: type[BaseModel]) -> Iterator[str]:
    """The root's keys and, in the order in which they are met, those of every block below it."""
    schemas: dict[str, Any] = root.model_json_schema()
    titles = headings(root)
    for model, title in titles.items():
        schema = schemas if model is root else schemas["$defs"][model.__name__]
        yield f"\n### {title}\n" if title else ""
        yield f"\n{prose(model.__doc__ or '')}\n\n{table(model, schema['properties'], titles)}\n"


def headings(root: type[BaseModel]) -> dict[type[BaseModel], str]:
    """Every block, depth first, with its place in the config (`schedule.anneal`); its name where there are several."""
    places: dict[type[BaseModel], list[str]] = {}

    def visit(model: type[BaseModel], place: str) -> None:
        places.setdefault(model, []).append(place)
        for name, field in model.model_fields.items():
            for block in models_in(field.annotation):
                visit(block, f"{place}.{name}".lstrip("."))

    visit(root, "")
    return {m: f"`{p[0]}`" if len(p) == 1 and p[0] else m.__name__ if p[0] else "" for m, p in places.items()}


def table(model: type[BaseModel], properties: dict[str, Any], titles: dict[type[BaseModel], str]) -> str:
    """A line per key: name, type, default, meaning."""
    names = choices()
    links = {m.__name__: f"[{title.strip('`')}](#{title.strip('`').replace('.', '').lower()})"
             for m, title in titles.items()}
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if field.default_factory is not None:
            made = field.get_default(call_default_factory=True, validated_data={})
            default = "" if made else as_yaml(made)
        elif field.default is PydanticUndefined:
            default = "**required**"
        else:
            default = as_yaml(field.default)
        kind = type_text(properties[name], links)
        if listed := names.get((model.__name__, name)):
            kind = kind.replace("text", ", ".join(f"`{n}`" for n in listed), 1)
        of_block = next((m.__doc__ or "" for m in models_in(field.annotation)), "").partition(". ")[0].rstrip(".")
        text = field.description or of_block
        lines.append(f"| `{name}` | {kind} | {default} | {prose(text)} |")
    return "\n".join(lines)


def type_text(schema: dict[str, Any], links: dict[str, str]) -> str:
    """A JSON Schema in words, with its limits; a block as a link to its section."""
    if "$ref" in schema:
        return links[schema["$ref"].rpartition("/")[2]]
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(type_text(s, links) for s in schema[union]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array" and "prefixItems" in schema:
        return f"[{', '.join(type_text(s, links) for s in schema['prefixItems'])}]"
    if kind == "array":
        return f"list of {type_text(schema['items'], links)}"
    if kind == "object":
        return f"mapping to {type_text(schema['additionalProperties'], links)}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    word = {"integer": "int", "number": "float", "string": "text", "boolean": "bool"}.get(kind, kind)
    return f"{word} {limits}".strip()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Blocks that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in models_in(arg)]


def prose(text: str) -> str:
    """A docstring as a line of Markdown that can stand in a table; pages of docs/ become links."""
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", " ".join(text.split()).replace("|", "\\|"))


def as_yaml(value: Any) -> str:
    """A default as one would write it: of a block the keys that differ from the block's own defaults."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
        return f"`{yaml.safe_dump(value, default_flow_style=True).strip()}`" if value else ""
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


if __name__ == "__main__":
    main()
