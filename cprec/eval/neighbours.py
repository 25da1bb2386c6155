"""Baselines that count: what follows what, what goes with what, which titles share words.

reads: nothing. writes: nothing. costs: `item_knn` holds a sparse matrix of the items that any user had both.
Equal scores are ordered by popularity, as all of a catalogue that was never counted together would else be one tie.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from cprec.errors import ConfigError
from cprec.eval.events import Sequences
from cprec.eval.metrics import Floats
from cprec.eval.queries import Catalogue, DomainQueries, Ints


class Neighbours:
    """Scores by the summed rows of an item-to-item matrix that belong to the last `last` items of a history."""

    def __init__(self, similarity: Any, catalogue: Catalogue, *, last: int) -> None:
        self._similarity, self._last = similarity, last
        self._popularity = catalogue.n_train

    def __call__(self, queries: DomainQueries, i: int) -> Floats:
        recent = queries.histories[i][-self._last:]
        return then_popular(np.asarray(self._similarity[recent].sum(axis=0)).ravel(), self._popularity)


class TitleSimilarity:
    """Cosine of every title to those of the last `last` items of a history, summed."""

    def __init__(self, vectors: Any, catalogue: Catalogue, *, last: int) -> None:
        self._vectors, self._last = vectors, last
        self._popularity = catalogue.n_train

    def __call__(self, queries: DomainQueries, i: int) -> Floats:
        recent = np.asarray(self._vectors[queries.histories[i][-self._last:]].sum(axis=0)).ravel()
        return then_popular(self._vectors @ recent, self._popularity)


def markov(train: Sequences, catalogue: Catalogue, *, gap: int) -> Neighbours:
    """How often an item came within `gap` events after the last one of the history; n events later counts 1/n."""
    rows, columns, weights = [], [], []
    user = np.repeat(np.arange(len(train)), np.diff(train.items.offsets))
    items = train.items.values
    for n in range(1, gap + 1):
        same = user[n:] == user[:-n]
        rows.append(items[:-n][same])
        columns.append(items[n:][same])
        weights.append(np.full(int(same.sum()), 1 / n))
    where = (np.concatenate(rows), np.concatenate(columns))
    return Neighbours(sp.csr_array((np.concatenate(weights), where), shape=(train.n_items,) * 2), catalogue, last=1)


def item_knn(train: Sequences, catalogue: Catalogue, *, last: int) -> Neighbours:
    """Cosine between items as sets of users: |users of both| / sqrt(|users of one| x |users of the other|)."""
    user = np.repeat(np.arange(len(train)), np.diff(train.items.offsets))
    had = sp.csr_array((np.ones(len(user)), (user, train.items.values)), shape=(len(train), train.n_items))
    had.data[:] = 1  # an item bought twice is one user
    norms = np.sqrt(np.maximum(had.sum(axis=0), 1))
    scaled = sp.csr_array(had @ sp.diags_array(1 / norms))
    similarity = sp.csr_array(scaled.T @ scaled)
    similarity.setdiag(0)
    return Neighbours(similarity, catalogue, last=last)


def title_similarity(_train: Sequences, catalogue: Catalogue, *, analyzer: Literal["word", "char_wb"],
                     last: int) -> TitleSimilarity:
    """TF-IDF of words (`word`) or of 3 to 5 characters within words (`char_wb`); nothing is learned from behaviour."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as e:
        raise ConfigError(f"baseline title needs scikit-learn ({e}); run: pip install 'cprec[baselines]'") from None
    ngrams = (1, 1) if analyzer == "word" else (3, 5)
    vectors = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, sublinear_tf=True).fit_transform(catalogue.titles)
    return TitleSimilarity(vectors, catalogue, last=last)


def then_popular(scores: Floats, n_train: Ints) -> Floats:
    """The same order as whole numbers, equal scores by their number of training events; both equal stay equal."""
    order = np.lexsort((n_train, scores))
    higher = (np.diff(scores[order]) > 0) | (np.diff(n_train[order]) > 0)
    levels = np.empty(len(scores))
    levels[order] = np.concatenate([[0], np.cumsum(higher)])
    return levels
