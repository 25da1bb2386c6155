"""JSON Schemas of the configs, by which an editor completes keys, shows what they mean and marks misspelt ones.

    python launch/schemas.py --out schemas        # run.json and prepare.json; `make schemas` does it

A YAML file says which is its own in its first line: # yaml-language-server: $schema=../../schemas/run.json (a path from
the file, read by the language servers of VS Code, Vim, Emacs and others). No key is required: the command line may give
what a file leaves out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cprec import cli
from cprec.settings import Settings


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("schemas"), help="folder; default: %(default)s")
    args = parser.parse_args()
    from cprec.config import RunConfig
    from data_prep.config import PrepConfig

    args.out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, type[Settings]] = {"run": RunConfig, "prepare": PrepConfig}
    for name, kind in kinds.items():
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(schema_of(kind), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {path}")


def schema_of(kind: type[Settings]) -> dict[str, Any]:
    """The schema of a config, draft 2020-12, with the docstrings as descriptions."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
    for block in [schema, *schema.get("$defs", {}).values()]:
        block.pop("required", None)
    return schema


if __name__ == "__main__":
    cli.run(main)
