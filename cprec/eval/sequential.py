"""SASRec and BERT4Rec of RecTools on our events and queries: the only file that knows that library.

reads: nothing. writes: nothing. costs: trains on the GPU where there is one; scores queries in blocks of at most
`NUMBERS_PER_BLOCK` scores.

Items that the training window does not have are unknown to the network: they tie below all others. A history without
a known item is ranked by popularity; how many those are is logged.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import numpy as np

from cprec.errors import ConfigError
from cprec.eval.events import Sequences
from cprec.eval.metrics import Floats
from cprec.eval.queries import DomainQueries, Ragged
from cprec.log import get_logger

try:
    import pandas as pd
    import torch
    from pytorch_lightning import Trainer, seed_everything
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel, SASRecModel
except ImportError as e:
    raise ConfigError(f"this baseline needs RecTools ({e}); run: pip install 'cprec[baselines]' && pip install "
                      f"--no-deps rectools==0.19.0") from None

log = get_logger(__name__)
NUMBERS_PER_BLOCK = 1 << 22


class Network:
    """A network in training, and the scores that it gives."""

    def __init__(self, kind: Literal["sasrec", "bert4rec"], train: Sequences, *, max_items: int, n_factors: int,
                 dropout: float, seed: int, batch_size: int = 128, lr: float = 1e-3) -> None:
        seed_everything(seed, verbose=False)
        self._train = _dataset(train.items)
        self._n_items = train.n_items
        self._model = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}[kind](
            n_blocks=2, n_heads=2, n_factors=n_factors, dropout_rate=dropout, session_max_len=max_items,
            batch_size=batch_size, lr=lr, loss="softmax", get_trainer_func=_trainer)
        self._block: tuple[DomainQueries, int, Floats] | None = None

    def train(self, n_epochs: int) -> None:
        """Train so many epochs more."""
        self._model.fit_partial(self._train, min_epochs=n_epochs, max_epochs=n_epochs)
        self._block = None

    def state(self) -> object:
        """Its weights, for `restore`."""
        return deepcopy(self._model.torch_model.state_dict())

    def restore(self, state: object) -> None:
        """Take the weights that it had."""
        self._model.torch_model.load_state_dict(state)
        self._block = None

    def __call__(self, queries: DomainQueries, i: int) -> Floats:
        """Scores of all items for query i."""
        size = max(1, NUMBERS_PER_BLOCK // self._n_items)
        first = i // size * size
        if self._block is None or self._block[0] is not queries or self._block[1] != first:
            self._block = queries, first, self._scores(queries, range(first, min(first + size, len(queries))))
        scores: Floats = self._block[2][i - first]
        return scores

    def _scores(self, queries: DomainQueries, these: range) -> Floats:
        """(queries, items). Equal scores are what the network gives, or two items that it does not know."""
        values = queries.histories.values[queries.histories.offsets[these.start]:queries.histories.offsets[these.stop]]
        offsets = queries.histories.offsets[these.start:these.stop + 1] - queries.histories.offsets[these.start]
        found = self._model.recommend(
            users=np.arange(len(these)), dataset=_dataset(Ragged(values, offsets)), k=self._n_items,
            filter_viewed=False, add_rank_col=False, on_unsupported_targets="ignore")
        scores = np.full((len(these), self._n_items), np.nan)
        scores[found[Columns.User].to_numpy(), found[Columns.Item].to_numpy()] = found[Columns.Score].to_numpy()
        is_known = ~np.isnan(scores)
        scores[~is_known] = scores.min(initial=0, where=is_known) - 1
        unknown = ~is_known.any(axis=1)
        if unknown.any():
            log.info("%s: %d of %d histories hold no item of the training window; ranked by popularity",
                     queries.domain, unknown.sum(), len(these))
            scores[unknown] = queries.catalogue.n_train
        return scores


def _dataset(items: Ragged) -> Dataset:
    """Events of users 0, 1, ... in order, as RecTools wants them: with a time, here the place in the list."""
    lengths = np.diff(items.offsets)
    place = np.arange(len(items.values)) - np.repeat(items.offsets[:-1], lengths)
    return Dataset.construct(pd.DataFrame({
        Columns.User: np.repeat(np.arange(len(lengths)), lengths), Columns.Item: items.values,
        Columns.Datetime: pd.to_datetime(place, unit="s"), Columns.Weight: 1.0}))


def _trainer() -> Trainer:
    """A trainer that prints nothing and looks for no cluster: it is one process, also where others run beside it."""
    return Trainer(max_epochs=1, min_epochs=1, accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=1,
                   plugins=[LightningEnvironment()], enable_progress_bar=False, enable_model_summary=False,
                   enable_checkpointing=False, logger=False)
