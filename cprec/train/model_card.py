"""The model card of an export: what the model is of, as Hugging Face's hub and a stranger read it; of any model its
metadata and the files of its licence.

reads: the run's config, data record, metrics and its ancestors' configs; the base model's card, if it is at hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from cprec.config import RunConfig
from cprec.data.corpora import DataRecord, read_data_record
from cprec.errors import CPRecError
from cprec.format import file_hash
from cprec.log import get_logger
from cprec.template import Template
from cprec.train.checkpoint import CONFIG, Checkpoint, read_run_config
from cprec.train.metrics import read_metrics

log = get_logger(__name__)
LINKABLE = ("LICENSE", "LICENSE.md")
"""Names of a model's own file that the hub takes for `license_link`."""


def model_card(config: RunConfig, checkpoint: Checkpoint) -> str:
    """Model card of an export: base model, licence, data with hashes, tokens, schedule, lineage and last losses."""
    s, lora = checkpoint.state, config.model.lora
    data = read_data_record(checkpoint.run_dir)
    return "\n".join([
        front_matter(config.model.path, base_model=_name_on_hub(config.model.path)), "", f"# {checkpoint.run_dir.name}",
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


def front_matter(model: str, *, base_model: object, tags: Sequence[str] = ()) -> str:
    """A card's metadata, as the hub takes it, with licence and language of `model`, a folder or a name on the hub.

    `base_model`: name, or names, on the hub; None is left out, as a folder has no name there.
    """
    card = read_card(model)
    language = {"language": card["language"]} if "language" in card else {}
    values = {**({"base_model": base_model} if base_model else {}), **_licence(model, card), **language,
              "library_name": "transformers", "pipeline_tag": "text-generation",
              "tags": ["recommendation", "continual-pretraining", *tags, "cprec"]}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def licence_files(model: str) -> list[Path]:
    """Files of a model's folder that go with its weights: what its card links to as the licence, or else LICENSE,
    LICENSE.txt and the like; none of a model on the hub."""
    folder = Path(model)
    linked = folder / str(read_card(model).get("license_link", ""))
    if linked.parent == folder and linked.is_file():
        return [linked]
    return sorted(p for p in folder.glob("LICENSE*") if p.is_file())


def _licence(model: str, card: dict[str, object]) -> dict[str, object]:
    """Licence fields; a link is a URL, or one of the files that stand beside the new card, too."""
    files = [p.name for p in licence_files(model)]
    name = _name_on_hub(model)
    found: dict[str, object] = {k: card[k] for k in ("license", "license_name", "license_link") if k in card} or {
        "license": "other", "license_name": "as-base-model",
        "license_link": f"https://huggingface.co/{name}" if name else next((f for f in LINKABLE if f in files), None)}
    link = found.pop("license_link", None)
    if link is None:
        return found
    if str(link).startswith(("https://", "http://")) or str(Path(str(link))) in files:
        return {**found, "license_link": link}
    log.warning("license_link %r in the card of %s is neither a URL nor a file of that folder: the new card has none",
                link, model)
    return found


def _name_on_hub(path: str) -> str | None:
    """The base model's name on Hugging Face's hub; None for a folder."""
    return None if Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else path


def read_card(model: str) -> dict[str, object]:
    """Metadata of a model's card, where its folder has one."""
    card = Path(model) / "README.md"
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
