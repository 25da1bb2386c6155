"""What an experiment is made of: a form (which model, how many tokens, seeds, shots) on a world (which shops, whose
clock). Both are YAML files of `experiments/configs/`, checked as a whole.

reads: YAML. writes: nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cprec.settings import Settings, load_settings

CONFIGS = Path(__file__).parent / "configs"


class Source(Settings):
    """One domain of a data folder: `interactions/<file>.parquet` and `items/<file>.parquet`."""

    file: str
    clock: Literal["real", "own", "order"] = "real"
    """`real`: its time stamps are those of the one clock. `own`: its events lie in other years; a straight line brings
    its own 0.8 and 0.9 quantiles onto the clock's two moments. `order`: only each user's order is known; the last event
    comes to stand at the test clock, the one before it at the validation clock."""


class World(Settings):
    """The shops. `prepare` is the config of a preparation, all but its `out`, tokenizer and sizes; with a `split`, so
    that all preparations of one experiment have one clock."""

    about: str
    """In words, for the report."""
    sources: dict[str, Source] = Field(default_factory=dict)
    """Of a data folder, by domain; empty: `prepare` names its datasets itself."""
    prepare: dict[str, Any]
    single: str
    """The pre-training domain of the single-domain arm."""
    few: list[str]
    """Those of the arm in between one and all."""

    @property
    def pretrain(self) -> list[str]:
        return list(self.prepare["domains"]["pretrain"])

    @property
    def unseen(self) -> list[str]:
        return list(self.prepare["domains"]["unseen"])


class ModelForm(Settings):
    """What is trained: SmolLM2-135M, or a Llama of this shape, which then reads plain text first."""

    kind: Literal["small", "smollm2"]
    hidden_size: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    vocab_size: PositiveInt = 2048
    text_steps: PositiveInt = 60
    """Of the small one: its updates on plain text, which make the base that all arms start from."""


class DataForm(Settings):
    """How much of the world."""

    users_pretrain: float = Field(1.0, gt=0, le=1)
    """Share of the pre-training domains' users, drawn by a hash of their ids."""
    users_unseen: float = Field(1.0, gt=0, le=1)
    text_chars: PositiveInt
    """Characters of plain text, about; a twentieth of the documents more are held out."""
    prepare: dict[str, Any] = Field(default_factory=dict)
    """On top of the world's: dotted key -> value."""


class TrainForm(Settings):
    """Continual pre-training: the same tokens and peak for every arm."""

    steps: PositiveInt
    """Optimizer steps, of the annealing too; a multiple of 20, so that a twentieth is whole."""
    warmup: PositiveInt
    batch_rows: PositiveInt
    micro_rows: PositiveInt
    peak_lr: PositiveFloat
    text_lr: PositiveFloat
    """Of the small model's first reading."""


class TuneForm(Settings):
    """Fine-tuning on k documents of a domain."""

    shots: list[PositiveInt | Literal["all"]]
    epochs: PositiveFloat
    batch_rows: PositiveInt
    micro_rows: PositiveInt
    peak_lr: PositiveFloat
    n_domains: PositiveInt | None = None
    """Only on so many of the unseen domains, the last ones named; null: on all."""


class RankForm(Settings):
    """How answers are scored: `launch/rank.py`."""

    up_to: PositiveInt
    """Ranks beyond are not told apart; at least 10."""
    dtype: str = "float32"
    baselines: list[str]
    loss_rows: PositiveInt = 8
    """Rows of each validation corpus, and of the held-out text, that losses are measured on."""


class Speed(Settings):
    """What the estimates of time are made of, on the machine that the form is for."""

    start_s: float
    """Of one launch script."""
    tokens_per_s: float
    """In training, of one job."""
    query_s: float
    prepare_s: float


class Form(Settings):
    """One size of the experiments."""

    about: str
    model: ModelForm
    data: DataForm
    train: TrainForm
    tune: TuneForm
    rank: RankForm
    seeds: PositiveInt
    """Of every arm."""
    headline_seeds: PositiveInt
    """Of the arm of the first claim."""
    jobs: PositiveInt = 1
    """Steps that run at the same time; each gets its share of the cores."""
    speed: Speed

    @property
    def seq_len(self) -> int:
        return int(self.data.prepare["pack.seq_len"])

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_rows * self.seq_len

    @property
    def tokens(self) -> int:
        """Of continual pre-training."""
        return self.train.steps * self.tokens_per_step


def load_form(name: str) -> Form:
    """The form of `experiments/configs/<name>.yaml`."""
    return load_settings(Form, CONFIGS / f"{name}.yaml")


def load_world(data: str | None, name: str | None = None) -> World:
    """The world of a data folder, or without one that of the Complete Journey, which PyPI has."""
    return load_settings(World, CONFIGS / f"{name or ('amazon' if data else 'journey')}.yaml")
