"""The floors of the house: imports go down only, none sideways; data_prep and cprec meet in a few files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
FLOORS = [
    "cprec.errors cprec.log",
    "cprec.template cprec.launcher",
    "cprec.format cprec.schedule cprec.dist cprec.attention cprec.loss cprec.settings cprec.tokenizer cprec.process "
    "cprec.storage",
    "cprec.data.remote cprec.cluster.probe cprec.cluster.watchdog "
    "data_prep.records data_prep.ragged data_prep.templates data_prep.sources data_prep.disk",
    "cprec.cli cprec.config cprec.cluster.straggler "
    "cprec.data.sampler cprec.data.corpora cprec.data.collate cprec.data.peek "
    "data_prep.config data_prep.engine data_prep.workers data_prep.plan",
    "cprec.data.dataset cprec.model cprec.base cprec.train.guard cprec.train.profile cprec.train.trackers "
    "cprec.train.order cprec.train.partitions cprec.train.disk cprec.train.starts cprec.train.hub "
    "cprec.eval.queries cprec.eval.trie cprec.eval.metrics cprec.eval.stats cprec.eval.results "
    "cprec.eval.tree_attention data_prep.mapping data_prep.replay data_prep.clean data_prep.split data_prep.sequences "
    "data_prep.duplicates data_prep.engines.duckdb data_prep.engines.spark "
    "data_prep.card data_prep.to_recbole "
    "data_prep.pictures data_prep.encode data_prep.rows data_prep.whole data_prep.vocabulary data_prep.queries "
    "data_prep.shots",
    "cprec.train.metrics cprec.train.plan cprec.train.lora cprec.train.optimizer cprec.train.zero_state "
    "cprec.eval.scoring cprec.eval.walk cprec.eval.protocols cprec.eval.events cprec.eval.controls "
    "data_prep.readers data_prep.parsers.amazon data_prep.parsers.complete_journey data_prep.parsers.movielens "
    "data_prep.parsers.recbole data_prep.parsers.tabular data_prep.pack data_prep.report data_prep.engines.registry",
    "cprec.train.engine cprec.train.checkpoint cprec.cluster.memory cprec.plots cprec.eval.neighbours "
    "cprec.eval.sequential cprec.eval.answers cprec.eval.rank cprec.eval.beam cprec.eval.choice "
    "data_prep.parsers.registry data_prep.staging data_prep.proof",
    "cprec.train.run_folder cprec.train.retention cprec.train.model_card cprec.train.validate cprec.train.watch "
    "cprec.train.stop cprec.cluster.facts cprec.cluster.cost cprec.eval.baselines cprec.eval.comparison "
    "cprec.report.markup",
    "cprec.cluster.preflight cprec.train.saving cprec.train.inventory cprec.eval.rankers cprec.eval.report "
    "cprec.report.charts",
    "cprec.train.loop cprec.train.steps cprec.train.branch cprec.train.family cprec.eval.memory_probe "
    "cprec.train.export cprec.train.average data_prep.ingest data_prep.audit",
    "cprec.eval.run cprec.train.sweep cprec.compare data_prep.pipeline data_prep.look",
    "cprec.report.page data_prep.estimate",
    "cprec.report.live",
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules.split()}
SHARED_WITH_DATA_PREP = {"cprec.errors", "cprec.log", "cprec.template", "cprec.format", "cprec.settings",
                         "cprec.tokenizer", "cprec.process", "cprec.storage"}
THROUGH_ONE_MODULE = {
    "deepspeed": {"cprec.train.engine"},
    "peft": {"cprec.train.lora"},
    "matplotlib": {"cprec.plots", "data_prep.pictures"},
    "duckdb": {"data_prep.engines.duckdb"},
    "pyspark": {"data_prep.engines.spark"},
    "py4j": {"data_prep.engines.spark"},
    "rapidfuzz": {"cprec.eval.beam"},
    "rectools": {"cprec.eval.sequential"},
}


def modules() -> dict[str, Path]:
    paths = [p for package in ("cprec", "data_prep") for p in sorted((REPO / package).rglob("*.py"))]
    return {".".join(p.relative_to(REPO).with_suffix("").parts): p for p in paths if p.name != "__init__.py"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; `from cprec import x` counts as `cprec.x`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    assert sorted(FLOOR_OF) == sorted(modules())


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_imports_go_down_only(module: str) -> None:
    ours = {name for name in imports(modules()[module]) if name in FLOOR_OF}
    upward = sorted(name for name in ours if FLOOR_OF[name] >= FLOOR_OF[module])
    assert not upward, f"{module} (floor {FLOOR_OF[module]}) imports {upward}"


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_preparation_and_training_meet_only_at_their_border(module: str) -> None:
    theirs = {name for name in imports(modules()[module]) if name in FLOOR_OF}
    if module.startswith("data_prep."):
        assert {n for n in theirs if n.startswith("cprec.")} <= SHARED_WITH_DATA_PREP
        assert not {n for n in imports(modules()[module]) if n.split(".")[0] in ("torch", "deepspeed", "transformers")}
    else:
        assert not {n for n in theirs if n.startswith("data_prep.")}


@pytest.mark.parametrize("package", THROUGH_ONE_MODULE)
def test_a_package_that_shapes_the_system_comes_in_through_one_module(package: str) -> None:
    users = {name for name, path in modules().items() if any(i.split(".")[0] == package for i in imports(path))}
    assert users <= THROUGH_ONE_MODULE[package]


def test_package_files_are_empty() -> None:
    for path in [p for package in ("cprec", "data_prep") for p in (REPO / package).rglob("__init__.py")]:
        assert path.read_text() == "", path


def test_no_launch_script_shadows_a_module() -> None:
    import importlib.metadata
    import sys

    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert not {p.stem for p in (REPO / "launch").glob("*.py")} & taken


def test_no_file_is_longer_than_750_lines() -> None:
    folders = ("cprec", "data_prep", "launch", "tests", "benchmarks", "experiments")
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for f in folders for p in (REPO / f).rglob("*.py")}
    assert len(lines) > 50 and max(lines.values()) <= 750, max(lines, key=lambda p: lines[p])


def test_a_page_names_every_file_of_the_house() -> None:
    page = (REPO / "docs/house.md").read_text(encoding="utf-8")
    scripts = {p.name for folder in ("launch", "experiments") for p in (REPO / folder).glob("*.py")}
    missing = sorted(n for n in {p.name for p in modules().values()} | scripts if n not in page)
    assert not missing
