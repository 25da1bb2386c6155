"""The preparation from raw files to packed corpora and frozen queries, stage by stage, restartable at any point.

reads: what the config names. writes: everything below `out`; a finished stage leaves `stages/<stage>.json`, written
last by rename. A restart skips finished stages; a folder that was prepared otherwise is refused and left as it is.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from cprec.errors import ConfigError, DataError
from cprec.format import MANIFEST, TokenizerInfo, list_corpora, read_manifest, write_atomically
from cprec.log import get_logger
from cprec.process import only_writer
from cprec.settings import dump_settings
from cprec.template import Template
from cprec.tokenizer import TRAINED
from data_prep.audit import audit
from data_prep.card import CARD, write_card
from data_prep.clean import clean, k_core
from data_prep.config import PrepConfig
from data_prep.disk import name_a_full_disk
from data_prep.duplicates import write_duplicates
from data_prep.encode import SEGMENTS_VERSION, encode_catalogue, prove, tokenizer_info
from data_prep.engine import Engine
from data_prep.engines.registry import connect
from data_prep.ingest import Staging, ingest, plan_staging
from data_prep.pack import Corpus, pack
from data_prep.queries import write_queries
from data_prep.records import Counts, Layout, Split, Stamp, digest
from data_prep.report import write_report
from data_prep.sequences import write_catalogue, write_histories
from data_prep.split import read_split, require_parts, split, write_split
from data_prep.templates import template_of
from data_prep.to_recbole import write_recbole
from data_prep.vocabulary import train_tokenizer
from data_prep.workers import Workers

log = get_logger(__name__)

SHOWN = {"ingest": ("events", "items"), "clean": ("events kept", "items kept"), "split": ("training events",),
         "sequences": ("items in the catalogue",), "vocabulary": ("pieces reached",), "encode": ("segments",),
         "audit": ("corpora audited",)}
"""Counts of a stage that are said when it is done; report.md has all."""


@dataclass(frozen=True)
class Stage:
    """One step: what decides its output, what it needs, what it leaves; `folders` are those that are its alone."""

    name: str
    needs: tuple[str, ...]
    settings: dict[str, Any]
    run: Callable[[], Counts]
    outputs: Callable[[], Sequence[Path]]
    folders: tuple[Path, ...] = ()


class Preparation:
    """The stages of one config, bound to its output folder."""

    def __init__(self, config: PrepConfig, workers: Workers | None = None) -> None:
        self.config = config
        self._given_workers = workers
        self.layout = Layout(Path(config.out))
        self.corpora = config.domains.corpora
        self.template: Template = template_of(config.template)

    @cached_property
    def staging(self) -> Staging:
        """Where every source file is staged. Raises one DataError naming all datasets that lack a file."""
        return plan_staging(self.config, self.layout.staged)

    @cached_property
    def source_hashes(self) -> dict[str, str]:
        return self.staging.source_hashes()

    @cached_property
    def engine(self) -> Engine:
        settings = self.config.engine
        spill = Path(settings.spill) if settings.spill else self._own_spill
        return connect(settings, spill=spill)

    @property
    def _own_spill(self) -> Path:
        return self.layout.out / ".spill"

    @cached_property
    def workers(self) -> Workers:
        return self._given_workers or Workers(self.config.workers)

    def close(self) -> None:
        """End the worker processes; give the engine's memory and its own spill folder back."""
        self.workers.close()
        if "engine" in self.__dict__:  # not so in a folder that was refused: nothing there is this process' own
            self.engine.close()
            if not self.config.engine.spill:
                shutil.rmtree(self._own_spill, ignore_errors=True)

    def written(self) -> list[str]:
        """Everything that a finished preparation leaves below `out`, files and folders (ending in `/`), sorted; a
        corpus without a history is left out of `packed/`."""
        at, replay = self.layout, [r.name for r in self.config.replay]
        files = [at.raw_interactions, at.interactions, at.train, at.raw_items, at.titled_items, at.items,
                 at.item_mapping, at.duplicates, at.split, at.holdout, at.catalogue, at.segments_info, at.audit,
                 *map(at.histories, self.corpora.all), *map(at.texts, replay), at.packed / CARD,
                 *(at.out / name for name in ("config.yaml", "report.md", "report.json"))]
        if self.config.tokenizer.exact != "slow":
            files.append(at.segments)
        folders = [at.stamp("").parent, at.queries, at.out / "report",
                   *(at.packed / name for name in (*self.corpora.all, *(f"replay/{r}" for r in replay)))]
        if self.config.tokenizer.train_vocab_size is not None:
            folders.append(at.tokenizer)
        if any(not task.is_in_place for task in self.staging.tasks):
            folders.append(at.staged)
        return sorted([str(p.relative_to(at.out)) for p in files] + [f"{p.relative_to(at.out)}/" for p in folders])

    @property
    def tokenizer(self) -> str:
        """What loads the tokenizer."""
        return self.config.tokenizer.path or str(self.layout.tokenizer)

    @cached_property
    def tokenizer_info(self) -> TokenizerInfo:
        return tokenizer_info(self.tokenizer, self.config.tokenizer.path or TRAINED)

    @cached_property
    def split(self) -> Split:
        return read_split(self.layout)

    def stages(self) -> list[Stage]:
        """All stages in order. Settings are what would change the output: not workers, not the engine's limits."""
        c, at = self.config, self.layout
        domains = c.domains.model_dump(mode="json")
        minima = {"min_user_events": c.clean.min_user_events, "min_item_events": c.clean.min_item_events}
        trains = c.tokenizer.train_vocab_size is not None
        vocabulary = Stage("vocabulary", ("sequences",), {"train_vocab_size": c.tokenizer.train_vocab_size},
                           self._vocabulary, lambda: sorted(at.tokenizer.iterdir()), (at.tokenizer,))
        return [
            Stage("ingest", (), {"datasets": [d.model_dump(mode="json") for d in c.datasets],
                                 "replay": [r.model_dump(mode="json") for r in c.replay]},
                  self._ingest, lambda: [at.raw_interactions, at.raw_items, *self.staging.outputs,
                                          *(at.texts(r.name) for r in c.replay)]),
            Stage("clean", ("ingest",), {"seed": c.seed, "domains": domains, "clean": {
                k: v for k, v in c.clean.model_dump(mode="json").items() if k not in minima}},
                  self._clean, lambda: [at.titled_items, at.duplicates, at.items, at.interactions]),
            Stage("split", ("clean",), {"split": c.split.model_dump(mode="json"), "regime": c.regime, "clean": minima},
                  self._split, lambda: [at.split, at.holdout, at.train]),
            Stage("sequences", ("split",), {"sequences": c.sequences.model_dump(mode="json"),
                                            "template": self.template.model_dump(mode="json")},
                  self._sequences, lambda: [at.catalogue, *map(at.histories, self.corpora.all)],
                  (at.histories("").parent,)),
            *([vocabulary] if trains else []),
            Stage("encode", ("vocabulary",) if trains else ("sequences",),
                  {"tokenizer": {"path": c.tokenizer.path, "exact": c.tokenizer.exact}, "layout": SEGMENTS_VERSION},
                  self._encode, lambda: [at.segments, at.segments_info]),
            Stage("pack", ("encode",), {"pack": c.pack.model_dump(mode="json")},
                  self._pack, lambda: sorted(p for p in at.packed.rglob("*") if p.is_file() and p.name != CARD),
                  (at.packed,)),
            Stage("queries", ("sequences",), {"queries": c.queries.model_dump(mode="json")},
                  self._queries, lambda: sorted(at.queries.iterdir()), (at.queries,)),
            Stage("audit", ("pack",), {}, self._audit, lambda: [at.audit]),
        ]

    def _ingest(self) -> Counts:
        ingested = ingest(self.engine, self.layout, self.config, self.staging, self.workers)
        self.source_hashes = ingested.source_hashes
        return ingested.counts

    def _clean(self) -> Counts:
        counts = clean(self.engine, self.layout, self.config.clean, corpora=self.corpora, seed=self.config.seed)
        write_duplicates(self.engine, self.layout, corpora=self.corpora, counts=counts)
        return counts

    def _split(self) -> Counts:
        counts = Counts("split")
        made = split(self.engine, self.layout, self.config.split, corpora=self.corpora, regime=self.config.regime,
                     counts=counts)
        require_parts(self.engine, self.layout, self.config.split, made=made, corpora=self.corpora)
        k_core(self.engine, self.layout.train, self.config.clean, counts)
        counts.add("training events", pq.ParquetFile(self.layout.train).metadata.num_rows)
        write_split(self.layout, made)
        return counts

    def _sequences(self) -> Counts:
        counts = Counts("sequences")
        write_catalogue(self.engine, self.layout, template=self.template, split=self.split, counts=counts)
        write_histories(self.engine, self.layout, self.config.sequences, corpora=self.corpora, split=self.split,
                        counts=counts)
        return counts

    def _vocabulary(self) -> Counts:
        size = self.config.tokenizer.train_vocab_size
        assert size is not None, "the stage exists only where a tokenizer is to be trained"
        return train_tokenizer(self.layout, vocab_size=size, template=self.template, corpora=self.corpora)

    def _encode(self) -> Counts:
        if self.config.tokenizer.exact == "slow":
            write_atomically(self.layout.segments_info, self.tokenizer_info.model_dump_json(indent=1))
            return Counts("encode", {"segments (exact: slow tokenizes documents whole)": 0})
        counts = encode_catalogue(self.layout, tokenizer=self.tokenizer, info=self.tokenizer_info,
                                  template=self.template, workers=self.workers)
        n = prove(self.layout, self.corpora.all, tokenizer=self.tokenizer, template=self.template,
                  seed=self.config.seed)
        counts.add("sampled documents whose gathered ids are those of the whole text", n)
        return counts

    def _pack(self) -> Counts:
        counts = Counts("pack")
        pack(self.packed_corpora(), self.config.pack, workers=self.workers, counts=counts)
        return counts

    def packed_corpora(self) -> list[Corpus]:
        """Every corpus that has a history, and every plain text."""
        with_histories = [name for name in self.corpora.all
                          if pq.ParquetFile(self.layout.histories(name)).metadata.num_rows]
        return [self._corpus(name) for name in with_histories] + [self._replay(r.name) for r in self.config.replay]

    def _corpus(self, name: str) -> Corpus:
        kind, _, domain = name.partition("/")
        is_whole = self.config.tokenizer.exact == "slow"
        return Corpus(
            name=name, kind="valid" if kind == "valid" else "train", domain=domain or name,
            folder=self.layout.packed / name, histories=self.layout.histories(name),
            segments=None if is_whole else self.layout.segments, catalogue=self.layout.catalogue,
            tokenizer_name=self.tokenizer, tokenizer=self.tokenizer_info, template=self.template,
            seed=self.config.seed, split_hash=self.split.hash, sources=self.source_hashes,
            inputs_key=read_stamp(self.layout, "encode").key)

    def _replay(self, name: str) -> Corpus:
        corpus = f"replay/{name}"
        return replace(self._corpus(corpus), domain=name, folder=self.layout.packed / corpus,
                       histories=self.layout.texts(name), segments=None, template=None)

    def _queries(self) -> Counts:
        return write_queries(self.engine, self.layout, self.config.queries, corpora=self.corpora, split=self.split,
                             template=self.template, regime=self.config.regime, seed=self.config.seed)

    def _audit(self) -> Counts:
        return audit(self.engine, self.layout, self.config, split=self.split, corpora=self.packed_corpora(),
                     workers=self.workers)


def prepare(config: PrepConfig, workers: Workers | None = None) -> None:
    """Run every stage that is not finished yet, on `workers` or, without them, on `config.workers` processes.

    Raises ConfigError or DataError; a restart goes on from there.
    """
    with only_writer(Path(config.out), wait_s=5), name_a_full_disk(Path(config.out)):
        _prepare(Preparation(config, workers))


def _prepare(preparation: Preparation) -> None:
    config = preparation.config
    try:
        stages = preparation.stages()
        finished = finished_stages(preparation, stages)
        if config.tokenizer.path:
            _ = preparation.tokenizer_info  # one that cannot be loaded is said now, not after hours of other stages
        preparation.layout.out.mkdir(parents=True, exist_ok=True)
        preparation.layout.stamp("").parent.mkdir(exist_ok=True)
        if len(finished) < len(stages):
            write_atomically(preparation.layout.out / "config.yaml", dump_settings(config))
        try:
            for stage in stages:
                if stage.name in finished:
                    log.info("stage %s: finished earlier, kept", stage.name)
                else:
                    finished[stage.name] = _run(preparation, stage, finished)
        except DataError:  # what stops a stage is often understood by what the ones before it dropped
            _report(preparation, finished)
            raise
        _report(preparation, finished)
        write_card(preparation.layout, read_split(preparation.layout))
    finally:
        preparation.close()
    for line in summary(preparation.layout, finished):
        log.info("%s", line)


def _report(preparation: Preparation, finished: dict[str, Stamp]) -> None:
    write_report(preparation.engine, preparation.layout, corpora=preparation.corpora, stamps=finished)


def export_recbole(config: PrepConfig) -> Path:
    """Write the finished preparation as RecBole's files; their folder. Raises DataError when a stage is not finished,
    and ConfigError when the folder is of another config."""
    with only_writer(Path(config.out), wait_s=5), name_a_full_disk(Path(config.out)):
        preparation = Preparation(config)
        try:
            stages = preparation.stages()
            finished = finished_stages(preparation, stages)
            missing = [s.name for s in stages if s.name not in finished]
            if missing:
                raise DataError(f"{config.out}: {', '.join(missing)} not finished; run launch/prepare.py without "
                                f"--export first")
            return write_recbole(preparation.engine, preparation.layout, corpora=preparation.corpora,
                                 split=read_split(preparation.layout))
        finally:
            preparation.close()


def finished_stages(preparation: Preparation, stages: Sequence[Stage]) -> dict[str, Stamp]:
    """Stamps of the stages that need not run again. Writes nothing.

    Raises ConfigError when the folder holds something else, or the work of another config or of other sources.
    """
    layout = preparation.layout
    _ = preparation.staging  # a missing one is said before anything else happens
    if layout.out.is_dir() and any(layout.out.iterdir()) and not layout.stamp("").parent.is_dir():
        raise ConfigError(f"out={layout.out} is not empty and is no prepared folder; give another out")
    finished: dict[str, Stamp] = {}
    different: dict[str, list[str]] = {}
    for stage in stages:
        if not layout.stamp(stage.name).is_file():
            continue
        stamp = read_stamp(layout, stage.name)
        found = _differences(stamp, stage, _inputs(preparation, stage, finished))
        if found:
            different[stage.name] = found
        elif all(name in finished for name in stage.needs):
            if changed := _changed_outputs(layout, stamp):
                log.warning("stage %s: %s %s missing or of another size, made anew", stage.name, ", ".join(changed[:3]),
                            "is" if len(changed) == 1 else "are" if len(changed) < 4 else "and more are")
            else:
                finished[stage.name] = stamp
    if different:
        raise _prepared_otherwise(layout, stages, different)
    return finished


def _prepared_otherwise(layout: Layout, stages: Sequence[Stage], different: dict[str, list[str]]) -> ConfigError:
    """The error for a folder of another config: the keys that differ, by the first stage that they decide, which stages
    depend on them, and the command that removes just these stages' work."""
    touched = set(different).union(*(dependents(stages, name) for name in different))
    listed = "\n".join(f"  stage {name}: {line}" for name, lines in different.items() for line in lines)
    again = [s for s in stages if s.name in touched]
    names = [s.name for s in stages if s.name not in touched and layout.stamp(s.name).is_file()]
    kept = f" (kept: {', '.join(names)})" if names else ""
    gone = [path for s in again for path in (layout.stamp(s.name), *s.folders) if path.exists()]
    return ConfigError(
        f"out={layout.out} was prepared otherwise; nothing was changed\n{listed}\n"
        f"  either give another out; or have stages {', '.join(s.name for s in again)} made anew there"
        f"{kept}: run the same command after\n"
        f"    rm -r {shlex.join(map(str, gone))}")


def _run(preparation: Preparation, stage: Stage, finished: dict[str, Stamp]) -> Stamp:
    start_s = time.monotonic()
    layout = preparation.layout
    for name in {stage.name, *dependents(preparation.stages(), stage.name)}:  # of what is about to be made anew
        layout.stamp(name).unlink(missing_ok=True)
    counts = stage.run()
    inputs = _inputs(preparation, stage, finished)
    outputs = {str(p.relative_to(layout.out)): -1 if p.name == MANIFEST else p.stat().st_size
               for p in stage.outputs() if p.is_file()}
    stamp = Stamp(stage=stage.name, settings=stage.settings, inputs=inputs, outputs=outputs, counts=counts.by_reason,
                  key=digest([stage.name, stage.settings, inputs]))
    write_atomically(layout.stamp(stage.name), stamp.model_dump_json(indent=1))
    shown = [f"{counts.by_reason[what]:,} {what}" for what in SHOWN.get(stage.name, ()) if what in counts.by_reason]
    log.info("stage %s: done in %.1f s%s", stage.name, time.monotonic() - start_s, "".join(f", {s}" for s in shown))
    return stamp


def dependents(stages: Sequence[Stage], name: str) -> set[str]:
    """Names of all stages that need stage `name`, directly or through others."""
    found = {s.name for s in stages if name in s.needs}
    return found.union(*(dependents(stages, other) for other in found))


def read_stamp(layout: Layout, stage: str) -> Stamp:
    """The stamp of a finished stage."""
    path = layout.stamp(stage)
    try:
        return Stamp.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise DataError(f"{path} is not of this version of the program; give another out, or delete {layout.out} to "
                        f"prepare it anew") from None


def _inputs(preparation: Preparation, stage: Stage, finished: dict[str, Stamp]) -> dict[str, str]:
    """What the stage is made from: upstream keys, the sources, the tokenizer."""
    inputs = {name: finished[name].key for name in stage.needs if name in finished}
    if stage.name == "ingest":
        inputs = preparation.source_hashes
    if stage.name == "encode" and preparation.config.tokenizer.path is not None:
        inputs = inputs | {"tokenizer": preparation.tokenizer_info.fingerprint}
    return inputs


def _differences(stamp: Stamp, stage: Stage, inputs: dict[str, str]) -> list[str]:
    """What the finished stage was made with that is not so now; a missing upstream stage is made again first."""
    was, now = _flat(stamp.settings), _flat(stage.settings)
    found = [f"{k}: {was.get(k, '(not set)')!r} there, {now.get(k, '(not set)')!r} now"
             for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    found += [f"{name} is not what it was made from" for name, key in inputs.items() if stamp.inputs.get(name) != key]
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): value}


def _changed_outputs(layout: Layout, stamp: Stamp) -> list[str]:
    """Files of a finished stage that are gone or have another size."""
    paths = {name: layout.out / name for name in stamp.outputs}
    return [name for name, size in stamp.outputs.items()
            if not paths[name].is_file() or size not in (-1, paths[name].stat().st_size)]


def summary(layout: Layout, finished: dict[str, Stamp]) -> list[str]:
    """The result in a table for people: each corpus' rows, tokens and fill, each domain's queries, the verdict."""
    lines = [f"{'corpus':<28} {'documents':>10} {'rows':>8} {'tokens':>12} {'fill':>8}  audit"]
    for name in list_corpora(layout.packed):
        m = read_manifest(layout.packed / name)
        verdict = "missing" if m.audit is None else "passed" if m.audit.passed else "FAILED"
        lines.append(f"{name:<28} {m.n_documents:>10,} {m.n_rows:>8,} {m.n_tokens:>12,} {m.fill:>8.3%}  {verdict}")
    counted = finished["queries"].counts
    domains = [reason.removesuffix(": queries") for reason in counted if reason.endswith(": queries")]
    lines += [f"queries in {d}: {counted[f'{d}: queries']:,} over {counted[f'{d}: items to rank']:,} items"
              for d in domains]
    lines.append(f"everything dropped or changed is counted in {layout.out / 'report.md'}")
    return lines
