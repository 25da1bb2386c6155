"""Lists that are generated: a beam inside the trie, and plain text grounded to the catalogue. Neither is exact.

reads: a model, a trie, prompts. writes: nothing. costs: a beam forwards at most width x depth prefixes per user; plain
text is `generate` of transformers, one query at a time.

Both are what others do at serving time, to be compared with the exact ranks: a target that is not in the list is a
miss, with an infinite rank. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from cprec.errors import ConfigError
from cprec.eval.metrics import Ranked, best
from cprec.eval.queries import Catalogue
from cprec.eval.trie import Bools, Floats, Ints, Trie
from cprec.eval.walk import Candidates, TrieTensors, Walk
from cprec.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def beam_lists(model: PreTrainedModel, trie: Trie, prompts: Sequence[Sequence[int]], targets: Sequence[int],
               candidates: Bools, *, width: int, top_k: int = 10) -> list[Ranked]:
    """The best `top_k` candidates that a beam of `width` prefixes a level completes, and the target's place there.

    Lines that end leave the beam to the others; prefixes without a candidate below them do not enter it. Every item
    listed is a candidate by construction.
    """
    tensors = TrieTensors.of(trie, model.device)
    walk = Walk(model, tensors, prompts)
    counted = Candidates(tensors, candidates)
    found, completed = walk.roots(), []
    while True:
        complete, below = counted.count(found.user, found.node)
        done = found[complete > 0]
        completed.append(torch.stack([done.user.double(), done.node.double(), done.score]))
        beam = found[below > 0]
        beam = beam[torch.argsort(beam.score, descending=True, stable=True)]
        beam = beam[torch.argsort(beam.user, stable=True)]
        counts = torch.bincount(beam.user, minlength=walk.n_users)
        place = torch.arange(len(beam), device=walk.device) - (counts.cumsum(0) - counts)[beam.user]
        beam = walk.make_room(beam[place < width])
        if not len(beam):
            break
        chunks = torch.split(torch.arange(len(beam), device=walk.device), walk.max_nodes)
        found = walk.expand(beam[chunks[0]])
        for chunk in chunks[1:]:
            found = found + walk.expand(beam[chunk])
    users, nodes, scores = torch.cat(completed, dim=1).cpu().numpy()
    n_nodes = walk.n_forwarded.tolist()
    return [_listed(trie, nodes[users == u].astype(np.int64), scores[users == u], int(targets[u]), candidates[u],
                    top_k=top_k, n_nodes=n_nodes[u]) for u in range(walk.n_users)]


def _listed(trie: Trie, nodes: Ints, scores: Floats, target: int, candidates: Bools, *, top_k: int,
            n_nodes: int) -> Ranked:
    items = [trie.items[trie.item_start[n]:trie.item_start[n] + trie.n_complete[n]] for n in nodes]
    items = [own[candidates[own]] for own in items]
    top_items, top_scores = best(np.concatenate(items), np.repeat(scores, [len(own) for own in items]), top_k)
    return list_rank(top_items, top_scores, target, n_candidates=int(candidates.sum()), n_nodes=n_nodes)


def list_rank(top_items: Ints | np.typing.NDArray[np.int32], top_scores: Floats, target: int, *, n_candidates: int,
              n_nodes: int = 0) -> Ranked:
    """A list as a ranking: the target's mid-rank in it, or infinity. Its bound is infinite: nothing is certified."""
    at = np.flatnonzero(np.asarray(top_items) == target)
    score = float(top_scores[at[0]]) if len(at) else -np.inf
    rank = 1 + (top_scores > score).sum() + ((top_scores == score).sum() - 1) / 2 if len(at) else np.inf
    return Ranked(rank=float(rank), score=score, n_candidates=n_candidates, n_nodes=n_nodes,
                  top_items=np.asarray(top_items, dtype=np.int32), top_scores=top_scores, bound=np.inf)


class OpenGeneration:
    """Plain text, beam by beam, grounded to a catalogue: the same line if there is one, else the nearest.

    Nearest is the highest `rapidfuzz.fuzz.ratio` (normalised insertions and deletions) between case-folded lines, the
    first of equals. Raises ConfigError when rapidfuzz is not installed.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, catalogue: Catalogue,
                 lines: Sequence[Sequence[int]], *, width: int) -> None:
        try:
            import rapidfuzz
        except ImportError:
            raise ConfigError("protocol=open grounds texts with rapidfuzz, which is not installed: "
                              "pip install rapidfuzz") from None
        self._fuzz = rapidfuzz
        self.model, self.tokenizer, self.width = model, tokenizer, width
        self.lines = [_plain(line) for line in catalogue.lines]
        self.items_of: dict[str, list[int]] = {}
        for item, line in enumerate(self.lines):
            self.items_of.setdefault(line, []).append(item)
        self.ends = sorted({int(ids[-1]) for ids in lines} | {tokenizer.eos_id})
        self.longest = max(len(ids) for ids in lines)

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], target: int, candidates: Bools, *, top_k: int) -> tuple[Ranked, float]:
        """The list of grounded texts with the target's place in it, and the share of texts that are lines as such."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=self.width, num_return_sequences=self.width,
            do_sample=False, temperature=None, top_p=None, top_k=None, length_penalty=0.0, use_cache=True,
            max_new_tokens=self.longest, eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_id,
            return_dict_in_generate=True, output_scores=True)
        texts = [_plain(self.tokenizer.decode([t for t in seq[len(prompt):].tolist()
                                               if t not in self.tokenizer.control_ids])) for seq in out.sequences]
        scores = out.sequences_scores.double().tolist() if self.width > 1 else [0.0] * len(texts)
        score_of: dict[int, float] = {}
        for text, score in sorted(zip(texts, scores, strict=True), key=lambda pair: -pair[1]):
            for item in self._grounded(text):
                if candidates[item]:
                    score_of.setdefault(item, score)
        items, item_scores = np.array(list(score_of), dtype=np.int64), np.array(list(score_of.values()))
        ranked = list_rank(*best(items, item_scores, top_k), target, n_candidates=int(candidates.sum()))
        return ranked, float(np.mean([text in self.items_of for text in texts]))

    def _grounded(self, text: str) -> list[int]:
        """Items of the line that is `text`, or of the nearest."""
        if text in self.items_of:
            return self.items_of[text]
        nearest = self._fuzz.process.extractOne(text, self.items_of.keys(), scorer=self._fuzz.fuzz.ratio)
        return self.items_of[nearest[0]]


def _plain(line: str) -> str:
    """A line without what surrounds it: the first line of the text, case-folded, its white space made single."""
    stripped = line.strip()
    return " ".join(stripped.split("\n", 1)[0].casefold().split())
