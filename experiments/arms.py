"""The steps that experiments are put together from: each is the launch scripts that a user would type.

reads: nothing. writes: nothing; `experiments.steps` runs what is made here. All paths are below the work folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.forms import Form, World
from experiments.steps import Command, Step

PRETRAIN = "experiments/configs/pretrain.yaml"
BOTH = {"specific/*": 1.0, "mixed": 1.0}
NETWORKS = ("sasrec", "bert4rec")
ANNEAL_SHARE = 0.1
FINAL_LR_RATIO = 0.1


@dataclass(frozen=True)
class Model:
    """A trained model: the step that exports it, and its folder."""

    name: str
    step: str
    folder: str


@dataclass(frozen=True)
class Answers:
    """What one seed of a model answered: evaluation folders that together hold the domains, and measured losses."""

    folders: tuple[str, ...]
    losses: str | None = None


@dataclass
class Line:
    """Collects steps. Every method adds one, once, and says what it makes; `claim` marks who asked."""

    form_name: str
    form: Form
    world_name: str
    world: World
    data: str | None
    work: Path
    steps: dict[str, Step] = field(default_factory=dict)

    def add(self, name: str, commands: Sequence[Command], needs: Sequence[str], seconds: float,
            claim: int | None = None, scratch: Sequence[str] = ()) -> str:
        before = self.steps[name].claims if name in self.steps else frozenset()
        claims = before | ({claim} if claim else set())
        self.steps[name] = Step(name, tuple(commands), tuple(dict.fromkeys(needs)), claims, seconds, tuple(scratch))
        return name

    def at(self, *parts: str) -> str:
        return str(self.work.joinpath(*parts))

    # -- data ---------------------------------------------------------------------------------------------------------

    def sources(self) -> str:
        data = ["--data", self.data] if self.data else []
        command = ("python", "-m", "experiments.sources", "--world", self.world_name, "--form", self.form_name, *data,
                   "--out", self.at("sources"))
        return self.add("sources", [command], [], self.form.speed.prepare_s / 4)

    def text(self) -> str:
        command = ("python", "-m", "experiments.text", "--out", self.at("text"), "--chars",
                   str(self.form.data.text_chars))
        return self.add("text", [command], [], 10)

    def prepare(self, name: str = "main") -> str:
        """`main`; `disjoint`: without the users of unseen test events; `supervised`: the unseen domains, to fine-tune
        on; `shuffled`, `titles`: controls made of `main`. Returns the step's name; see `prepared`."""
        out, config, commands = self.prepared(name), self.at("sources/prepare.yaml"), list[Command]()
        given = [f"out={out}"]
        if name == "main":
            needs = [self.sources(), self.text()]
            given += [self._tokenizer(), "replay=" + json.dumps([
                {"name": part, "path": self.at("text", part, "text.parquet")} for part in ("learned", "held_out")])]
            if self.form.model.kind == "smollm2":
                needs.append(self.base())
        else:
            needs = [self.prepare()]
            given.append("tokenizer=" + json.dumps({"path": self._tokenizer_folder()}))
        if name == "disjoint":
            given.append("regime=disjoint")
        elif name == "supervised":
            given += ["template=supervised", "domains=" + json.dumps({"pretrain": self.world.unseen})]
        elif name in ("shuffled", "titles"):
            config = self.at("prepare", name, "sources/prepare.yaml")
            commands.append(("python", "-m", "experiments.sources", "--control", name, "--prepared", self.prepared(),
                             "--out", self.at("prepare", name, "sources")))
        commands.append(("python", "launch/prepare.py", "--config", config, *given))
        return self.add(f"prepare/{name}", commands, needs, self.form.speed.prepare_s)

    def prepared(self, name: str = "main") -> str:
        return self.at("prepare", name, "prepared")

    def _tokenizer(self) -> str:
        if self.form.model.kind == "small":
            return "tokenizer=" + json.dumps({"train_vocab_size": self.form.model.vocab_size})
        return "tokenizer=" + json.dumps({"path": self._tokenizer_folder()})

    def _tokenizer_folder(self) -> str:
        return f"{self.prepared()}/tokenizer" if self.form.model.kind == "small" else self.at("base/hf")

    # -- models -------------------------------------------------------------------------------------------------------

    def base(self) -> str:
        """What all arms start from, in `base/hf`."""
        m, t = self.form.model, self.form.train
        if m.kind == "smollm2":
            command = ("python", "launch/base_model.py", "smollm2", "--out", self.at("base/hf"))
            return self.add("base", [command], [], 60)
        raw, run = self.at("base/random"), self.at("base/run")
        commands = [("python", "launch/base_model.py", "small", "--tokenizer", self._tokenizer_folder(), "--out", raw,
                     "--hidden-size", str(m.hidden_size), "--layers", str(m.layers), "--heads", str(m.heads)),
                    self._pretrain(run, raw, "main", {"replay/learned": 1.0}, 0, {
                        "schedule.total": {"steps": m.text_steps}, "optimizer.peak_lr": t.text_lr,
                        "schedule.anneal": _anneal(max(m.text_steps // 10, 1), "linear")}),
                    _export(run, self.at("base/hf"))]
        return self.add("base", commands, [self.prepare()],
                        3 * self.form.speed.start_s + m.text_steps * self._step_s, scratch=["run/checkpoints"])

    def base_model(self) -> Model:
        return Model("base", self.base(), self.at("base/hf"))

    def pretrain(self, name: str, mix: Mapping[str, float], *, seed: int, prepared: str = "main",
                 schedule: Mapping[str, Any] | None = None) -> Model:
        """An arm of its own: `form.train.steps` updates of the base, Warmup-Stable-Annealing unless told otherwise."""
        step, n = f"train/{name}-{seed}", self.form.train.steps
        wsa = {"schedule.anneal": _anneal(round(ANNEAL_SHARE * n), "sqrt")}
        command = self._pretrain(self.at(step, "run"), self.at("base/hf"), prepared, mix, seed, {
            "schedule.total": {"steps": n}, **(wsa if schedule is None else schedule)})
        self.add(step, [command, _export(self.at(step, "run"), self.at(step, "hf"))],
                 [self.base(), self.prepare(prepared)], self._train_s, scratch=["run/checkpoints"])
        return Model(f"{name}-{seed}", step, self.at(step, "hf"))

    def trunk(self, seed: int) -> str:
        """The run that stays at its stable rate, to the end of all tokens; branches and marks are taken from it."""
        step, n = f"trunk/{seed}", self.form.train.steps
        every = n // 20 if seed == 0 else round((1 - ANNEAL_SHARE) * n)
        command = self._pretrain(self.at(step, "run"), self.at("base/hf"), "main", BOTH, seed, {
            "schedule.total": {"steps": n}, "checkpoint.every": every, "checkpoint.keep_stable_every": every})
        return self.add(step, [command], [self.base(), self.prepare()], self._train_s)

    def mark(self, share: float, seed: int = 0) -> Model:
        """A trunk after a share of its tokens, at its stable rate; of seeds other than 0 only its end is kept."""
        at = round(share * self.form.train.steps)
        step = f"mark/{at}-{seed}"
        self.add(step, [_export(f"{self.at(f'trunk/{seed}/run')}@{at}", self.at(step, "hf"))], [self.trunk(seed)],
                 self.form.speed.start_s)
        return Model(f"trunk@{at}-{seed}", step, self.at(step, "hf"))

    def branch(self, shape: str, share: float, seed: int = 0) -> Model:
        """A trunk annealed over the last `share` of all tokens."""
        n = self.form.train.steps
        length = round(share * n)
        step = f"branch/{shape}-{length}-{seed}"
        anneal = ("python", "launch/anneal.py", "--from", f"{self.at(f'trunk/{seed}/run')}@{n - length}", "--steps",
                  str(length), "--shape", shape, "--final-lr-ratio", str(FINAL_LR_RATIO), "--run-dir",
                  self.at(step, "run"), f"checkpoint.every={length}")
        self.add(step, [anneal, _export(self.at(step, "run"), self.at(step, "hf"))], [self.trunk(seed)],
                 2 * self.form.speed.start_s + length * self._step_s, scratch=["run/checkpoints"])
        return Model(f"{shape}-{length}-{seed}", step, self.at(step, "hf"))

    def cprec(self, seed: int) -> Model:
        """The arm that all others are held against: both kinds of histories of all domains, annealed over a tenth."""
        return self.branch("sqrt", ANNEAL_SHARE, seed)

    # -- answers ------------------------------------------------------------------------------------------------------

    def rank(self, model: Model, claim: int, *, measure: bool = False) -> Answers:
        """Zero-shot, on the unseen domains; with `measure` the losses on text and validation corpora too."""
        out = f"rank/{model.name}"
        commands = [self._rank(["--model", model.folder], self.prepared(), self.world.unseen, self.at(out, "eval"))]
        self.add(out, commands, [model.step, self.prepare()], self._rank_s(len(self.world.unseen)), claim)
        return Answers((self.at(out, "eval"),), self.measure(model, claim) if measure else None)

    def measure(self, model: Model, claim: int) -> str:
        out = self.at("loss", model.name, "losses.json")
        command = ("python", "-m", "experiments.measure", "--model", model.folder, "--packed",
                   f"{self.prepared()}/packed", "--corpora", "valid/*", "replay/held_out", "--rows",
                   str(self.form.rank.loss_rows), "--out", out)
        self.add(f"loss/{model.name}", [command], [model.step, self.prepare()], self.form.speed.start_s + 5, claim)
        return out

    def baseline(self, name: str, claim: int) -> Answers:
        """One step; of a network, which is trained anew in every domain, one step a domain."""
        parts = {f"-{d}": [d] for d in self.world.unseen} if name in NETWORKS else {"": self.world.unseen}
        folders = []
        for part, domains in parts.items():
            out = f"baseline/{name}{part}"
            command = self._rank(["--baseline", name], self.prepared(), domains, self.at(out, "eval"))
            self.add(out, [command], [self.prepare()], self.form.speed.prepare_s / 2, claim)
            folders.append(self.at(out, "eval"))
        return Answers(tuple(folders))

    def tune(self, model: Model, shots: int | str, seed: int, claim: int, *, tokens: int | None = None) -> Answers:
        """Fine-tuned on k documents of each domain, one at a time, and ranked there; `tokens`: for so many."""
        t, folders = self.form.tune, []
        for domain in self.tuned_domains:
            step = f"tune/{domain}-{shots}-{model.name}-{seed}{'-longer' if tokens else ''}"
            run, packed = self.at(step, "run"), f"{self.prepared('supervised')}/packed"
            total = [f"schedule.total={{tokens: {tokens}}}"] if tokens else []
            tune = ("python", "launch/finetune.py", "--model", model.folder, "--packed", packed, "--corpus",
                    f"specific/{domain}", "--shots", str(shots), "--run-dir", run, "--epochs", f"{t.epochs:g}",
                    "--seed", str(seed), f"batch.global_batch_size={t.batch_rows}",
                    f"batch.micro_batch_size={t.micro_rows}", f"optimizer.peak_lr={t.peak_lr:g}",
                    "validation.every=null", "deepspeed=ds_configs/zero1.json", *total)
            rank = self._rank(["--model", self.at(step, "hf")], self.prepared("supervised"), [domain],
                              self.at(step, "eval"))
            seconds = self.form.speed.start_s * 2 + self._rank_s(1) + self._tuned_tokens(
                shots, tokens) / self.form.speed.tokens_per_s
            self.add(step, [tune, _export(run, self.at(step, "hf")), rank],
                     [model.step, self.prepare("supervised")], seconds, claim, scratch=["run/checkpoints", "hf"])
            folders.append(self.at(step, "eval"))
        return Answers(tuple(folders))

    @property
    def tuned_domains(self) -> list[str]:
        return self.world.unseen[-(self.form.tune.n_domains or len(self.world.unseen)):]

    # -- commands and their cost --------------------------------------------------------------------------------------

    def _pretrain(self, run: str, model: str, prepared: str, mix: Mapping[str, float], seed: int,
                  given: Mapping[str, Any]) -> Command:
        t = self.form.train
        values = {"run_dir": run, "model.path": model, "data.packed": f"{self.prepared(prepared)}/packed",
                  "data.mix.stable": dict(mix), "data.seed": seed, "batch.global_batch_size": t.batch_rows,
                  "batch.micro_batch_size": t.micro_rows, "optimizer.peak_lr": t.peak_lr,
                  "schedule.warmup": {"steps": t.warmup}, "checkpoint.every": max(t.steps // 4, 1), **given}
        return ("python", "launch/pretrain.py", "--config", PRETRAIN,
                *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()))

    def _rank(self, what: Sequence[str], prepared: str, domains: Sequence[str], out: str) -> Command:
        r = self.form.rank
        # the exact best ten cost more than the target's rank; nothing here asks for them
        options = [] if "--baseline" in what else ["--rank-up-to", str(r.up_to), "--dtype", r.dtype, "--top-k", "1"]
        return ("python", "launch/rank.py", *what, "--queries", f"{prepared}/queries", "--domains", ",".join(domains),
                "--out", out, *options)

    @property
    def _step_s(self) -> float:
        return self.form.tokens_per_step / self.form.speed.tokens_per_s

    @property
    def _train_s(self) -> float:
        return 2 * self.form.speed.start_s + self.form.train.steps * self._step_s

    def _rank_s(self, n_domains: int) -> float:
        per_domain = int(self.form.data.prepare["queries.max_per_domain"])
        return self.form.speed.start_s + n_domains * per_domain * self.form.speed.query_s

    def _tuned_tokens(self, shots: int | str, tokens: int | None) -> float:
        """About: documents of 150 tokens; `all` taken for 20,000 of them."""
        return tokens or self.form.tune.epochs * 150 * (20_000 if shots == "all" else int(shots))


def _anneal(steps: int, shape: str) -> dict[str, Any]:
    return {"length": {"steps": steps}, "shape": shape, "final_lr_ratio": FINAL_LR_RATIO}


def _export(run: str, out: str) -> Command:
    return ("python", "launch/export.py", "--from", run, "--out", out)
