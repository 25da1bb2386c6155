"""How much of a catalogue, and of what its users did, a model says by heart: the contamination that results of public
data sets have to be read with (Di Palma et al., 2025, arXiv 2505.10212).

reads: nothing. writes: nothing. costs: one forward pass per title and two per query; greedy decoding says a text
exactly when each of its tokens is the most likely one after those before it, so nothing has to be generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cprec.errors import DataError
from cprec.eval.controls import SEED, shuffled_history
from cprec.eval.queries import DomainQueries, Prompts, encode_lines
from cprec.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cprec.eval.rankers import LoadedModel

SHORTEST = 4
"""Tokens of the shortest line that is asked for: of shorter ones the first half says too little."""


@dataclass(frozen=True)
class Memorised:
    """Of one domain: how many texts were asked for, and how many of them greedy decoding says to the last token."""

    titles: int
    completed: int
    """Lines whose second half follows from the first alone, without a history."""
    queries: int
    next_titles: int
    """Targets that follow from their user's history."""
    next_titles_of_others: int
    """Targets that follow from another user's history: what popularity explains."""

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def probe(model: LoadedModel, template: Template, queries: DomainQueries, *, limit: int) -> Memorised:
    """Ask for at most `limit` lines of the catalogue, drawn at random, and for the targets of the first `limit`
    queries. Raises DataError where no line is long enough, or where histories cannot be shuffled."""
    lines = encode_lines(template, model.tokenizer, queries.catalogue.lines)
    prompts = Prompts(template, model.tokenizer, lines, max_tokens=model.context - max(map(len, lines)))
    start = prompts.prompt(np.zeros(0, dtype=np.int64)).ids
    asked = queries.head(limit)
    halves = [(start + line[:len(line) // 2], line[len(line) // 2:]) for line in _drawn(queries.domain, lines, limit)]
    return Memorised(
        titles=len(halves), completed=sum(says(model.lm, before, rest) for before, rest in halves), queries=len(asked),
        next_titles=sum(_targets_said(model.lm, prompts, lines, asked)),
        next_titles_of_others=sum(_targets_said(model.lm, prompts, lines, shuffled_history(asked))))


@torch.inference_mode()
def says(lm: PreTrainedModel, before: Sequence[int], rest: Sequence[int]) -> bool:
    """Whether greedy decoding after the tokens `before` says exactly the tokens `rest`."""
    ids = torch.tensor([[*before, *rest]], device=lm.device)
    logits = lm(input_ids=ids, logits_to_keep=len(rest) + 1).logits[0, :-1]
    return bool((logits.argmax(-1) == ids[0, len(before):]).all())


def _targets_said(lm: PreTrainedModel, prompts: Prompts, lines: list[list[int]],
                  queries: DomainQueries) -> Iterator[bool]:
    for i, target in enumerate(queries.targets):
        yield says(lm, prompts.prompt(queries.histories[i]).ids, lines[target])


def _drawn(domain: str, lines: list[list[int]], limit: int) -> list[list[int]]:
    """Different lines of at least SHORTEST tokens."""
    long_enough = sorted({tuple(line) for line in lines if len(line) >= SHORTEST})
    if not long_enough:
        raise DataError(f"{domain}: no item's line has {SHORTEST} tokens; there is no second half to ask for")
    order = np.random.default_rng(SEED).permutation(len(long_enough))[:limit]
    return [list(long_enough[i]) for i in order]
