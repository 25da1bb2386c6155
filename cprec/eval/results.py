"""What an evaluation leaves behind: the table of one domain's results, and the manifest. Writer's and reader's side.

reads: a finished evaluation's manifest. writes: nothing. `cprec.eval.run` makes these, `cprec.eval.answers` reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from cprec.errors import DataError
from cprec.format import MANIFEST, Target
from cprec.template import Template

INPUTS = "inputs.json"
ASKED = ("domains", "limit", "protocol", "seen", "items")
"""Fields of the inputs that, with the queries themselves, say what was asked."""
RESULT_SCHEMA = pa.schema([
    ("user_id", pa.string()), ("rank", pa.float64()), ("n_candidates", pa.int64()), ("nll", pa.float64()),
    ("n_nodes", pa.int64()), ("certified", pa.bool_()), ("top10", pa.list_(pa.int32())), ("is_repeat", pa.bool_()),
    ("is_cold", pa.bool_()), ("n_dropped", pa.int32()), ("score", pa.float64()), ("top_scores", pa.list_(pa.float64())),
    ("bound", pa.float64()), ("n_tokens", pa.int64()), ("valid_share", pa.float64()),
])
"""`rank`: infinite where the target is not in a generated list, or not among the first `rank_up_to`. `nll` in nats per
item, whatever the scoring; null where no likelihood of the whole line was computed. `top10`: the best `top_k` items.
`score`, `top_scores`: by the scoring, of the target and of `top10`. `bound`: no candidate that was not scored is above
it (-inf: all were scored; inf: nothing is known). `n_tokens`: put through the model, the prompt's included.
`n_dropped`: oldest items of the history that did not fit the context. `valid_share`: of open generation, texts that are
lines of the catalogue as they stand; null elsewhere."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvalInputs(_Record):
    """All that the results follow from; paths are for people, hashes decide."""

    model: str
    """Its folder or hub name, or `baseline:<name>`."""
    model_hash: str
    """Of its config, tokenizer and weights; of a baseline see `cprec.eval.baselines.baseline_hash`."""
    tokenizer_fingerprint: str
    queries: str
    queries_hash: str
    """Of the queries' manifest, which holds the hashes of its files."""
    domains: list[str]
    limit: int | None
    dtype: str
    top_k: int
    control: str | None = None
    """What was done to the queries on purpose, see `cprec.eval.controls`."""
    protocol: str = "full"
    scoring: str = "sum"
    rank_up_to: int | None = None
    seen: Literal["exclude", "include"]
    items: Literal["all", "warm"] = "all"

    def differs(self, other: EvalInputs) -> list[str]:
        """What the two evaluate differently, as `field: its value / the other's`."""
        named = ("model_hash", "tokenizer_fingerprint", "queries_hash", "domains", "limit", "dtype", "top_k",
                 "control", "protocol", "scoring", "rank_up_to", "seen", "items")
        different = [f for f in named if getattr(self, f) != getattr(other, f)]
        return [f"{f}: {getattr(self, f)} / {getattr(other, f)}" for f in different]


class DomainSummary(_Record):
    """Counts of one finished domain. `seconds`: summed over the processes, without loading."""

    kind: Literal["pretrain", "unseen"]
    n_queries: int
    n_items: int
    n_nodes: int
    n_certified: int
    n_histories_cut: int
    n_tokens: int
    seconds: float


class EvalManifest(_Record):
    """A finished evaluation. Field for field what a report has to say about how it was made."""

    inputs: EvalInputs
    domains: dict[str, DomainSummary]
    template: Template
    split: dict[str, int]
    split_hash: str
    regime: Literal["overlap", "disjoint"]
    target: Target
    seen: Literal["exclude", "include"]
    world_size: int
    versions: dict[str, str]


def read_evaluation(out: str | Path) -> EvalManifest:
    """Manifest of a finished evaluation. Raises DataError when there is none."""
    path = Path(out) / MANIFEST
    if not path.is_file():
        raise DataError(f"{out} holds no finished evaluation ({MANIFEST} is missing); run launch/rank.py with it "
                        f"as --out")
    try:
        return EvalManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as e:
        raise DataError(f"{path} is not the manifest of an evaluation: {e}; give another folder") from None
