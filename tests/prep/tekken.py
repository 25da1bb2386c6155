"""Mistral's tekken as a Hugging Face folder: what a `tekken.json` needs to be a tokenizer."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from benchmarks.prep.vocabularies import byte_level, file_of, write_tokenizer

CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]


def write_tekken(folder: Path) -> Path:
    """131,072 ids, the first 1,000 of them control, out of the package mistral-common. ConfigError without it."""
    known = json.loads(file_of("mistral-common", "mistral_common/data/tekken_240911.json").read_bytes())
    n_control = known["config"]["default_num_special_tokens"]
    n_pieces = known["config"]["default_vocab_size"] - n_control
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] + n_control for t in known["vocab"][:n_pieces]}
    control = [*CONTROL, *(f"<SPECIAL_{i}>" for i in range(len(CONTROL), n_control))]
    spec = byte_level(ranks, pattern=known["config"]["pattern"], control={name: i for i, name in enumerate(control)})
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, text],
                              "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    write_tokenizer(folder, spec, {"bos_token": "<s>", "eos_token": "</s>"})
    return folder
