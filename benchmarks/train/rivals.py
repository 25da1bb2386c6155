"""The other sides: `transformers.Trainer` with its DeepSpeed ZeRO-3 integration in two ways, and TRL's SFTTrainer.

Each is set up as its documentation advises for speed: data tokenized beforehand, PyTorch's SDPA, no cache, the fused
AdamW that is their default, grouping by length where rows are padded. All read the same documents as our packed rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.train.data import CORPUS, documents
from benchmarks.train.job import Job
from benchmarks.train.ours import REPO, Seen
from cprec.format import read_manifest

Build = Callable[[type[Trainer]], Trainer]


def padded(job: Job) -> Seen:
    """One document per row, padded to the longest of its batch, batches of documents of like length."""
    docs = documents(job.rows)
    mean = sum(map(len, docs)) / len(docs)
    batch = round(job.rows_per_forward * _seq_len(job) / mean)  # as many tokens as of packed rows, on average
    args = TrainingArguments(**_arguments(job, batch), train_sampling_strategy="group_by_length")
    model, tokenizer = _model(job)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    data = [{"input_ids": d, "attention_mask": [1] * len(d), "labels": d} for d in docs]
    return _train(job, lambda cls: cls(model=model, args=args, train_dataset=data, data_collator=collator))


def concatenated(job: Job) -> Seen:
    """All documents end to end, cut into rows, plain causal attention over the whole row: what `run_clm` does."""
    docs, seq_len = documents(job.rows), _seq_len(job)
    order = np.random.default_rng(job.seed).permutation(len(docs))
    tokens = torch.tensor([t for i in order for t in docs[i]])
    blocks = tokens[:len(tokens) // seq_len * seq_len].view(-1, seq_len)
    args = TrainingArguments(**_arguments(job, job.rows_per_forward))
    model, _ = _model(job)
    data = [{"input_ids": b, "labels": b} for b in blocks]
    return _train(job, lambda cls: cls(model=model, args=args, train_dataset=data))


def trl_packed(job: Job) -> Seen:
    """TRL's best-fit packing. Its rows are documents by position ids; torch's SDPA gets the mask that follows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    docs, seq_len = documents(job.rows), _seq_len(job)
    # Rows of a batch are laid end to end, under one dense mask: a row at a time is its faster way on a CPU.
    args = SFTConfig(**_arguments(job, 1, accumulation=job.rows_per_step // job.world_size), packing=True,
                     packing_strategy="bfd", max_length=seq_len, gradient_checkpointing=False)
    model, tokenizer = _model(job)
    data = Dataset.from_dict({"input_ids": docs})
    return _train(job, lambda cls: cls(model=model, args=args, train_dataset=data, processing_class=tokenizer),
                  of=SFTTrainer)


def _seq_len(job: Job) -> int:
    return read_manifest(job.rows / CORPUS).seq_len


def _arguments(job: Job, batch: int, accumulation: int | None = None) -> dict[str, Any]:
    """What all of them are told. Without a GPU batches are read in the process itself: its core is busy computing."""
    _join()
    ds_config = json.loads((REPO / "ds_configs/zero3.json").read_text())
    ds_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    ds_config |= dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                                "gradient_clipping"), "auto")
    return {
        "output_dir": str(job.out), "per_device_train_batch_size": batch, "max_steps": job.steps,
        "gradient_accumulation_steps": accumulation or job.accumulation, "learning_rate": job.peak_lr,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": job.warmup_steps, "weight_decay": 0.1,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "seed": job.seed,
        "bf16": job.bf16, "dataloader_num_workers": 4 if torch.cuda.is_available() else 0, "logging_steps": 10,
        "save_strategy": "no", "report_to": "none", "deepspeed": ds_config, "disable_tqdm": True,
        "accelerator_config": {"use_configured_state": True},
    }


def _join() -> None:
    """Join the ranks under DeepSpeed. Left to itself, the Trainer takes ranks without a GPU for runs of their own."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="nccl" if torch.cuda.is_available() else "gloo")


def _model(job: Job) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer; the parameters are partitioned as they are loaded, since the arguments are there."""
    model = AutoModelForCausalLM.from_pretrained(job.base, attn_implementation=job.attention,
                                                 dtype=torch.bfloat16 if job.bf16 else torch.float32)
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(job.base)


def _train(job: Job, build: Build, of: type[Trainer] = Trainer) -> Seen:
    """Train with the subclass of `of` that counts tokens, and save."""
    seen, counted = Seen(), []  # counts of the step under way, on the device

    class Counted(of):  # type: ignore[valid-type,misc]
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            counted.append((ids.numel(), ids.numel() if mask is None else mask.sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    class Stamps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.slots.append(sum(n for n, _ in counted))
            seen.useful.append(int(sum(n for _, n in counted)))  # waits for the device, as our loop does once a step
            seen.ends_s.append(time.perf_counter())
            counted.clear()

    trainer = build(Counted)
    trainer.add_callback(Stamps())
    trainer.train()
    if job.weights:
        trainer.save_model(str(job.out / "hf"))
    return seen


def missing(side: str) -> str | None:
    """What hinders a side here, or None."""
    wanted = {"trl packed": ("trl", "datasets")}.get(side, ())
    gone = [package for package in wanted if importlib.util.find_spec(package) is None]
    return f"{', '.join(gone)} not installed: make bench-train installs it" if gone else None
