"""The model card of an export: what the model is of, as Hugging Face's hub and a stranger read it.

reads: the run's config, data record, metrics and its ancestors' configs; the base model's card, if it is at hand.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cprec.config import RunConfig
from cprec.data.corpora import DataRecord, read_data_record
from cprec.errors import CPRecError
from cprec.format import file_hash
from cprec.template import Template
from cprec.train.checkpoint import CONFIG, Checkpoint, read_run_config
from cprec.train.metrics import read_metrics

LICENSE = "LICENSE"
"""File of a base model that an export takes along."""


def model_card(config: RunConfig, checkpoint: Checkpoint) -> str:
    """Model card of an export: base model, licence, data with hashes, tokens, schedule, lineage and last losses."""
    s, lora = checkpoint.state, config.model.lora
    data = read_data_record(checkpoint.run_dir)
    return "\n".join([
        "---", yaml.safe_dump(_metadata(config), sort_keys=False).rstrip(), "---", "", f"# {checkpoint.run_dir.name}",
        "", f"Continual pre-training of `{config.model.path}` on behaviour sequences of {len(data.corpora)} corpora "
        f"with CPRec (after arXiv:2504.08949).", "",
        f"- step {s.step:,}, {s.tokens_seen:,} tokens seen, {s.phase} phase next",
        f"- learning rate: peak {config.optimizer.peak_lr:g}, warm-up {config.schedule.warmup.steps} steps, "
        f"{config.schedule.text()}",
        *([f"- LoRA adapters: r={lora.r}, alpha={lora.alpha:g}, on {lora.target_modules}"] if lora else []),
        f"- prompt template {data.template.name!r}: {_shape(data.template)}" if data.template else "- plain text only",
        f"- leak audit of the training data: {'passed' if data.is_audited else 'not passed'}",
        f"- `state.json` of the checkpoint: {checkpoint.state_hash}",
        f"- `config.yaml` of the run: {_state_of_config(checkpoint)}",
        "", "## Lineage", "", *_lineage(config, checkpoint), "", "## Data", "", *_data(data), "",
        "## Validation", "", *_validation(checkpoint), "", "## Licence", "",
        f"The licence of the base model, `{config.model.path}`, applies to these weights; the terms of the training "
        f"data may add to it.", "",
    ])


def _state_of_config(checkpoint: Checkpoint) -> str:
    """Its hash, and whether it is still what the checkpoint was trained under."""
    found = file_hash(checkpoint.run_dir / CONFIG)
    known = checkpoint.state.config_hash
    return found if found == known else f"{found}; when the checkpoint was saved {known}: the run has since gone on " \
                                        f"with other settings, of those that may change"


def _metadata(config: RunConfig) -> dict[str, object]:
    """The card's metadata, as the hub takes it; a base model in a folder has no name there, and is left out."""
    path = config.model.path
    base, name = _base_card(path), _name_on_hub(path)
    language = {"language": base["language"]} if "language" in base else {}
    return {**({"base_model": name} if name else {}), **_licence(path, base, name), **language,
            "library_name": "transformers", "pipeline_tag": "text-generation",
            "tags": ["recommendation", "continual-pretraining", "cprec"]}


def _licence(path: str, base: dict[str, object], name: str | None) -> dict[str, object]:
    """Licence fields; a link is a URL, or the LICENSE that the export has beside the card."""
    found: dict[str, object] = {k: base[k] for k in ("license", "license_name", "license_link") if k in base} or {
        "license": "other", "license_name": "as-base-model",
        "license_link": f"https://huggingface.co/{name}" if name else LICENSE}
    link = str(found.get("license_link"))
    is_there = link.startswith("https://") or (link == LICENSE and (Path(path) / LICENSE).is_file())
    return found if is_there else {k: v for k, v in found.items() if k != "license_link"}


def _name_on_hub(path: str) -> str | None:
    """The base model's name on Hugging Face's hub; None for a folder."""
    return None if Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else path


def _base_card(path: str) -> dict[str, object]:
    """Metadata of the base model's card, where its folder has one."""
    card = Path(path) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _lineage(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """This run and its ancestors, as far as their folders are there."""
    lines = [f"1. `{checkpoint.run_dir}`, step {checkpoint.state.step:,}"]
    parent = config.parent
    while parent:
        lines.append(f"{len(lines) + 1}. branch of `{parent.run_dir}` at step {parent.step:,} (its state.json: "
                     f"{parent.state_hash})")
        try:
            config = read_run_config(Path(parent.run_dir))
        except CPRecError:
            lines.append(f"{len(lines) + 1}. of an origin that is not known: the folder of that run is not there")
            return lines
        parent = config.parent
    lines.append(f"{len(lines) + 1}. base model `{config.model.path}`")
    return lines


def _data(data: DataRecord) -> list[str]:
    return ["| training corpus | documents | tokens | hash of its rows |", "|---|---:|---:|---|",
            *(f"| {n} | {c.n_documents:,} | {c.n_tokens:,} | {c.rows_hash} |" for n, c in data.corpora.items())]


def _validation(checkpoint: Checkpoint) -> list[str]:
    """The last validation up to the checkpoint's step."""
    known = [r for r in read_metrics(checkpoint.run_dir) if r["kind"] == "valid" and r["step"] <= checkpoint.state.step]
    if not known:
        return ["none was made"]
    last = known[-1]
    return [f"After step {last['step']:,}, over all corpora {last['loss']:.4f}.", "",
            "| validation corpus | nats per token |", "|---|---:|",
            *(f"| {name} | {loss:.4f} |" for name, loss in last["loss_by_corpus"].items())]


def _shape(template: Template) -> str:
    """The template in words."""
    target = ("" if template.before_target is None else
              f", {template.before_target!r} before the last item, which alone (with what follows) carries loss")
    tail = f", {template.tail!r}" if template.tail else ""
    return f"{template.lead_in!r}, then {template.item!r} per item{target}{tail}"
