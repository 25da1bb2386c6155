"""The dataset card of packed data: what a stranger, the hub and `datasets.load_dataset` need to know of it.

reads: the corpora's manifests, `split.json`. writes: `packed/README.md`, after the audit, when its text is another.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from cprec.format import Manifest, list_corpora, read_manifest, write_atomically
from data_prep.records import Layout, Split, utc

CARD = "README.md"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
"""The hub's names for numbers of rows below these."""


def write_card(layout: Layout, split: Split) -> None:
    """Write the card of a finished preparation; a card with the same text is left as it is."""
    path = layout.packed / CARD
    text = card([read_manifest(layout.packed / name) for name in list_corpora(layout.packed)], split)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def card(manifests: Sequence[Manifest], split: Split) -> str:
    """The card: the hub's metadata, with a configuration per corpus, then what it is, as Markdown."""
    first = next((m for m in manifests if m.template), manifests[0])
    template = first.template
    passed = all(m.audit is not None and m.audit.passed for m in manifests)
    rows = [f"| {m.corpus} | {m.kind} | {m.n_rows:,} | {m.n_documents:,} | {m.n_tokens:,} | {m.fill:.3%} |"
            for m in manifests]
    example = next((m for m in manifests if m.kind == "train"), first)
    return "\n".join([
        "---", yaml.safe_dump(_metadata(manifests), sort_keys=False).rstrip(), "---", "",
        "# Behaviour sequences, packed into rows of tokens", "",
        f"Made by CPRec: what people did in {len({d for m in manifests for d in m.n_documents_by_domain})} domains, as "
        f"text, tokenized and packed into rows of exactly {first.seq_len:,} tokens.", "",
        f"- tokenizer: `{first.tokenizer.name}`, {first.tokenizer.vocab_size:,} entries, fingerprint "
        f"{first.tokenizer.fingerprint}; token ids mean nothing to another one",
        *([f"- prompt template {template.name!r}, version {template.version}: `{template.lead_in!r}`, then "
           f"`{template.item!r}` per item"] if template else []),
        f"- one global clock: training corpora end before {utc(split.t_valid)}, validation corpora before "
        f"{utc(split.t_test)}; what is later is in no corpus (split {split.hash[:16]})",
        f"- leak audit: {'passed' if passed else 'NOT PASSED'}",
        "", "| corpus | for | rows | documents | tokens | full |", "|---|---|---:|---:|---:|---:|", *rows, "",
        "## A row", "",
        f"- `input_ids`: {first.seq_len:,} token ids, several documents one after the other",
        "- `doc_lens`: their lengths, in order; their sum is the row's length. A document is not to see another",
        "- `n_pad`: padding at the row's end, which is then the last entry of `doc_lens`",
        *(["- `loss_mask`: 1 where a token carries loss"] if any(m.has_loss_mask for m in manifests) else []),
        "", "```python", "from datasets import load_dataset",
        f'rows = load_dataset("THIS FOLDER", "{config_name(example.corpus)}", split="train")', "```", "",
        "Every corpus has a `manifest.json` with the hash of every file.", "", "## Licence", "",
        "The terms of the sources apply: behaviour of people, even under pseudonyms, may be personal data.", ""])


def config_name(corpus: str) -> str:
    """A corpus' name as the hub allows it for a configuration."""
    return corpus.replace("/", "--")


def _metadata(manifests: Sequence[Manifest]) -> dict[str, object]:
    n_rows = sum(m.n_rows for m in manifests)
    return {
        "license": "other", "license_name": "as-sources", "task_categories": ["text-generation"],
        "tags": ["recommendation", "sequences", "packed", "cprec"],
        "size_categories": [next((name for below, name in SIZES if n_rows < below), "n>1B")],
        "configs": [{"config_name": config_name(m.corpus), "data_files": [
            {"split": "train" if m.kind == "train" else "validation", "path": f"{m.corpus}/shard-*.arrow"}]}
            for m in manifests if m.shards]}
