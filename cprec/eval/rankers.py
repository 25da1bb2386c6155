"""A model or baseline as something that answers queries, by protocol and scoring.

reads: a Hugging Face folder. writes: nothing. costs: a group of users at a time, `USERS_ON_CPU` or `USERS_ON_GPU`; PMI
scoring puts the whole trie of a domain through the model once, without a history.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cprec import dist
from cprec.errors import ConfigError, raise_all
from cprec.eval.baselines import Baseline, rank_by_baseline
from cprec.eval.beam import OpenGeneration, beam_lists
from cprec.eval.choice import N_ORDERS, letter_ids, options_text, rank_choices
from cprec.eval.metrics import Ranked
from cprec.eval.protocols import negatives, orders, parse_protocol, sampled
from cprec.eval.queries import DomainQueries, Prompt, Prompts, encode_lines
from cprec.eval.rank import Ranker, null_log_probs
from cprec.eval.scoring import MeanScoring, PmiScoring, Scoring, SumScoring
from cprec.eval.tree_attention import TREE_ATTENTION
from cprec.eval.trie import Bools, Trie, build_trie
from cprec.eval.walk import TrieTensors
from cprec.log import get_logger
from cprec.model import load_config, load_for_inference, longrope_limit, misfits, refuse_own_attention
from cprec.template import Template
from cprec.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = get_logger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
USERS_ON_CPU, USERS_ON_GPU = 8, 32


@dataclass(frozen=True)
class Answered:
    """One query's result under any protocol; `nll` None where the line's likelihood was not computed."""

    ranked: Ranked
    certified: bool
    n_dropped: int = 0
    nll: float | None = None
    n_tokens: int = 0
    valid_share: float | None = None


Answer = Callable[[Sequence[int]], list[Answered]]
"""Answers the queries of these numbers of one domain."""
Fit = Callable[[DomainQueries], Baseline]
"""Fits a baseline to a domain."""


@dataclass(frozen=True)
class ScoringName:
    """A kind of score with its number: the power of the length, or the weight of the null prompt."""

    kind: str
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "sum" else f"{self.kind}-{self.value:g}"


def parse_scoring(text: str) -> ScoringName:
    """`sum`, `mean-A` (by length^A) or `pmi-W` (minus W times the log-probability without a history).

    Raises ConfigError.
    """
    found = re.fullmatch(r"(mean|pmi)-(\d+(?:\.\d+)?)", text)
    if text == "sum":
        return ScoringName("sum")
    if not found:
        raise ConfigError(f"scoring={text!r} is none; give sum, mean-1 (log-probability per token; any power of the "
                          f"length) or pmi-0.5 (minus half the log-probability without a history; any weight)")
    return ScoringName(found[1], float(found[2]))


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer; `context` is the tokens that it can see."""

    lm: PreTrainedModel
    tokenizer: Tokenizer
    context: int


def load_model(folder: Path, protocol: str, dtype: str) -> LoadedModel:
    """The model of a folder on this process's device. Raises ConfigError for one that cannot be ranked exactly.

    Of a model with LongRoPE the context is what its positions mean the same in, whoever is ranked with whom.
    """
    config = load_config(str(folder), trust_remote_code=False)
    raise_all(misfits(config), of=f"the model in {folder}")
    attention = TREE_ATTENTION
    if parse_protocol(protocol).kind == "open":  # transformers' sdpa silently leaves capped scores uncapped
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    lm = load_for_inference(str(folder), attention=attention, dtype=DTYPES[dtype], device=dist.device())
    refuse_own_attention(lm, f"the model in {folder}")
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.vocab_size > lm.config.vocab_size:
        raise ConfigError(f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, the model knows "
                          f"{lm.config.vocab_size}; they do not belong together")
    context, steady = int(config.max_position_embeddings), longrope_limit(config)
    if steady is not None and steady < context:
        log.warning("the model's positions change beyond %d tokens (LongRoPE): longer prompts lose their oldest items",
                    steady)
        context = steady
    return LoadedModel(lm, tokenizer, context)


class Answerer:
    """What answers queries of any domain: a model or a baseline, under one protocol and scoring."""

    def __init__(self, protocol: str, scoring: str, *, template: Template, seed: int, top_k: int,
                 rank_up_to: int | None, by: LoadedModel | Fit) -> None:
        """`seed`: of what a protocol draws. `by`: the model, or what fits the baseline."""
        self.protocol, self.scoring = parse_protocol(protocol), parse_scoring(scoring)
        self.template, self.seed, self.top_k, self.rank_up_to = template, seed, top_k, rank_up_to
        self.by = by

    def of_domain(self, queries: DomainQueries) -> Answer:
        """What answers this domain's queries."""
        if isinstance(self.by, LoadedModel):
            return self._by_model(queries, self.by)
        return self._by_baseline(queries, self.by)

    def _by_model(self, queries: DomainQueries, model: LoadedModel) -> Answer:
        lines = encode_lines(self.template, model.tokenizer, queries.catalogue.lines)
        if self.protocol.kind == "choice":
            return self._by_choice(queries, model, lines)
        room = model.context - max(map(len, lines))
        prompts = Prompts(self.template, model.tokenizer, lines, max_tokens=room)
        if self.protocol.kind == "open":
            return self._by_generation(queries, model, lines, prompts)
        trie = build_trie(lines)
        answer_group = (self._by_beam(queries, model, trie) if self.protocol.kind == "beam"
                        else self._by_search(queries, model, trie, prompts))
        size = USERS_ON_GPU if model.lm.device.type == "cuda" else USERS_ON_CPU

        def answer(numbers: Sequence[int]) -> list[Answered]:
            groups = [numbers[start:start + size] for start in range(0, len(numbers), size)]
            return [a for group in groups
                    for a in answer_group(group, [prompts.prompt(queries.histories[i]) for i in group])]
        return answer

    def _candidates(self, queries: DomainQueries, numbers: Sequence[int]) -> Bools:
        """Masks (queries, items) of the protocol."""
        if self.protocol.is_sampled:
            return np.stack([sampled(self.protocol, queries, i, seed=self.seed) for i in numbers])
        return np.stack([queries.candidates(i) for i in numbers])

    def _by_baseline(self, queries: DomainQueries, fit: Fit) -> Answer:
        score = fit(queries)

        def answer(numbers: Sequence[int]) -> list[Answered]:
            masks = self._candidates(queries, numbers)
            ranked = [rank_by_baseline(score, queries, i, top_k=self.top_k, candidates=mask)
                      for i, mask in zip(numbers, masks, strict=True)]
            return [Answered(r, r.certified) for r in ranked]
        return answer

    def _by_search(self, queries: DomainQueries, model: LoadedModel, trie: Trie,
                   prompts: Prompts) -> Callable[[Sequence[int], list[Prompt]], list[Answered]]:
        ranker = Ranker(model.lm, trie, scoring=self._make_scoring(model, trie, prompts), top_k=self.top_k,
                        rank_up_to=self.rank_up_to)

        def answer(group: Sequence[int], shown: list[Prompt]) -> list[Answered]:
            found = ranker.rank([p.ids for p in shown], [int(queries.targets[i]) for i in group],
                                self._candidates(queries, group))
            assert all(a.certified for a in found), f"a query of {queries.domain} came back without its proof"
            return [Answered(a.ranked, a.certified, p.n_dropped, -a.log_prob, a.n_tokens)
                    for a, p in zip(found, shown, strict=True)]
        return answer

    def _make_scoring(self, model: LoadedModel, trie: Trie, prompts: Prompts) -> Scoring:
        if self.scoring.kind == "mean":
            return MeanScoring.of(trie, self.scoring.value, model.lm.device)
        if self.scoring.kind == "pmi":
            log.info("pmi: %d prefixes without a history go through the model first", int((trie.n_children > 0).sum()))
            null = null_log_probs(model.lm, trie, prompts.prompt(np.zeros(0, dtype=np.int64)).ids)
            return PmiScoring.of(trie, null, self.scoring.value, model.lm.device)
        return SumScoring()

    def _by_beam(self, queries: DomainQueries, model: LoadedModel,
                 trie: Trie) -> Callable[[Sequence[int], list[Prompt]], list[Answered]]:
        def answer(group: Sequence[int], shown: list[Prompt]) -> list[Answered]:
            found = beam_lists(model.lm, trie, [p.ids for p in shown], [int(queries.targets[i]) for i in group],
                               self._candidates(queries, group), width=self.protocol.n, top_k=self.top_k)
            return [Answered(r, False, p.n_dropped, n_tokens=len(p.ids) + r.n_nodes)
                    for r, p in zip(found, shown, strict=True)]
        return answer

    def _by_generation(self, queries: DomainQueries, model: LoadedModel, lines: list[list[int]],
                       prompts: Prompts) -> Answer:
        generation = OpenGeneration(model.lm, model.tokenizer, queries.catalogue, lines, width=self.protocol.n)

        def answer(numbers: Sequence[int]) -> list[Answered]:
            answered = []
            for i in numbers:
                prompt = prompts.prompt(queries.histories[i])
                ranked, valid = generation.answer(prompt.ids, int(queries.targets[i]), queries.candidates(i),
                                                  top_k=self.top_k)
                answered.append(Answered(ranked, False, prompt.n_dropped, valid_share=valid))
            return answered
        return answer

    def _by_choice(self, queries: DomainQueries, model: LoadedModel, lines: list[list[int]]) -> Answer:
        tokenizer, catalogue = model.tokenizer, queries.catalogue
        letters = letter_ids(tokenizer, self.protocol.n + 1)
        tensors = TrieTensors.of(build_trie(lines), model.lm.device)

        def answer(numbers: Sequence[int]) -> list[Answered]:
            return [one(i) for i in numbers]

        def one(i: int) -> Answered:
            drawn = np.append(negatives(self.protocol, queries, i, seed=self.seed), queries.targets[i])
            shuffled = orders(drawn, queries, i, n=N_ORDERS, seed=self.seed)
            tails = [options_text(catalogue, order) for order in shuffled]
            room = model.context - max(map(len, tokenizer.encode(tails)))
            kept = Prompts(self.template, tokenizer, lines, max_tokens=room).prompt(queries.histories[i])
            shown = "".join(catalogue.lines[j] for j in queries.histories[i][kept.n_dropped:])
            ids = [tokenizer.encode_start(f"{self.template.lead_in}{shown}{tail}") for tail in tails]
            ranked = rank_choices(model.lm, tensors, ids, shuffled, int(queries.targets[i]), letters[:len(drawn)],
                                  top_k=self.top_k)
            return Answered(ranked, True, kept.n_dropped, n_tokens=sum(map(len, ids)))
        return answer
