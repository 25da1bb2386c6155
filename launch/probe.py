"""How much of the catalogues a model knows by heart, before its results on them are believed.

    python launch/probe.py --model HuggingFaceTB/SmolLM2-135M --queries prepared/queries
    python launch/probe.py --model runs/base-sqrt/hf --queries prepared/queries --domains movielens,steam --json

Of each domain: the share of titles whose second half greedy decoding says after the first, and the share of next titles
that it says after a user's history, beside that after another user's. reads: an exported model, a queries folder.
writes: nothing. costs: three forward passes per query of --limit.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cprec import cli
from cprec.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from cprec.eval.memory_probe import Memorised


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of an exported model (or a hub name)")
    parser.add_argument("--queries", required=True, help="folder of prepared queries")
    parser.add_argument("--domains", help="comma-separated; default: all")
    parser.add_argument("--limit", type=int, default=500, help="titles and queries of each domain; default 500")
    parser.add_argument("--dtype", default="float32", help="as of launch/rank.py; default float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    from cprec.eval.memory_probe import probe
    from cprec.eval.queries import load_queries
    from cprec.eval.rankers import DTYPES, load_model
    from cprec.eval.run import local_folder
    from cprec.format import read_queries_manifest

    manifest = read_queries_manifest(args.queries)
    domains = list(manifest.domains) if args.domains is None else args.domains.split(",")
    if args.limit < 2:
        raise ConfigError(f"--limit {args.limit}: give at least 2, one query's history is shown to another")
    if args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype} is none; {did_you_mean(args.dtype, DTYPES)}")
    queries = {d: load_queries(args.queries, d) for d in domains}
    model = load_model(local_folder(args.model), "open-1", args.dtype)
    found: dict[str, Memorised] = {}
    for domain, asked in queries.items():
        found[domain] = probe(model, manifest.template, asked, limit=args.limit)
        if not args.json:
            print(_line(domain, found[domain]), flush=True)
    if args.json:
        print(json.dumps({domain: m.as_json() for domain, m in found.items()}))


def _line(domain: str, m: Memorised) -> str:
    return (f"{domain}: {m.completed / m.titles:.1%} of {m.titles} titles completed from their first half; "
            f"{m.next_titles / m.queries:.1%} of {m.queries} next titles said after the user's history, "
            f"{m.next_titles_of_others / m.queries:.1%} after another's")


if __name__ == "__main__":
    cli.run(main)
