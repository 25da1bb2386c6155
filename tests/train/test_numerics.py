"""What is computed in which precision, what is decayed, recomputed, compiled; and that runs can be repeated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import in_ranks
import pytest
import tiny
import torch
from torch import Tensor

from cprec.config import OptimizerConfig
from cprec.data.collate import collate
from cprec.format import PackedCorpus
from cprec.model import TrainingModel, decoder_blocks, load_for_training
from cprec.train.checkpoint import list_checkpoints
from cprec.train.metrics import read_metrics
from cprec.train.optimizer import parameter_groups
from cprec.train.partitions import SavedWeights
from cprec.train.plan import build_plan

STAGES = ["zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_world(tmp_path_factory.mktemp("numerics"))


@pytest.fixture(scope="module")
def runs(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One step of 32 micro-batches of a row in bfloat16 on 2 ranks, by ds_config; and a deterministic run, twice."""
    root = tmp_path_factory.mktemp("runs")
    one_step = {**world, "schedule": {"total": {"steps": 1}, "warmup": {"steps": 1}}, "validation": {"every": None},
                "batch": {"global_batch_size": 32, "micro_batch_size": 1},
                "model": {**world["model"], "dtype": "bfloat16"}}
    configs = {s: {**one_step, "run_dir": str(root / s), "deepspeed": str(tiny.REPO / f"ds_configs/{s}.json")}
               for s in STAGES}
    short = {**world, "schedule": {"total": {"steps": 4}, "warmup": {"steps": 1}}, "deterministic": True}
    configs |= {name: {**short, "run_dir": str(root / name)} for name in ("first", "second")}
    assert in_ranks.train_all(configs, root) == dict.fromkeys(configs, "")
    return {name: root / name for name in configs}


def load(world: dict[str, Any], *, dtype: torch.dtype = torch.float32, **options: Any) -> TrainingModel:
    return load_for_training(world["model"]["path"], backend="doc_sdpa", dtype=dtype, seq_len=tiny.SEQ_LEN,
                             vocab_size=258, trust_remote_code=False, **{"activation_checkpointing": None, **options})


def gradients_of_32_rows(world: dict[str, Any]) -> list[list[Tensor]]:
    """Gradients of the token mean's 32 terms in bfloat16, as one micro-batch each gives them."""
    plan = build_plan(tiny.run_config({**world, "batch": {"global_batch_size": 32, "micro_batch_size": 1}}), 1)
    at = plan.sampler.rows(0, 32)
    corpora = [PackedCorpus(Path(world["data"]["packed"]) / name) for name in plan.sampler.names]
    batches = [collate([corpora[c][int(r)]], [int(c)]) for c, r in zip(at.corpus, at.row, strict=True)]
    n_valid = sum(b.n_valid for b in batches)
    model = load(world, dtype=torch.bfloat16)
    terms = []
    for batch in batches:
        model.zero_grad()
        (model(batch).sum() * 32 / n_valid).backward()
        terms.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return terms


def norm_of_mean(terms: list[list[Tensor]], dtype: torch.dtype) -> float:
    """Norm of the mean over `terms`, added up one after the other in `dtype`."""
    total = [torch.zeros_like(g, dtype=dtype) for g in terms[0]]
    for term in terms:
        for t, g in zip(total, term, strict=True):
            t += g.to(dtype)
    return float(torch.cat([t.double().flatten() / len(terms) for t in total]).norm())


def test_gradients_of_a_bfloat16_model_are_accumulated_and_reduced_in_float32(
        world: dict[str, Any], runs: dict[str, Path]) -> None:
    terms = gradients_of_32_rows(world)
    exact, in_16_bits = norm_of_mean(terms, torch.float64), norm_of_mean(terms, torch.bfloat16)
    assert abs(in_16_bits / exact - 1) > 1e-6, "adding up in bfloat16 must show for this to prove anything"
    for stage in STAGES:
        norm = next(r["grad_norm"] for r in read_metrics(runs[stage]) if r["kind"] == "train")
        print(f"{stage}: {norm / exact - 1:.1e} from the exact norm; added up in bfloat16 {in_16_bits / exact - 1:.1e}")
        assert abs(norm / exact - 1) < abs(in_16_bits / exact - 1) / 20, stage


def test_a_deterministic_run_repeats_itself_to_the_last_bit(runs: dict[str, Path]) -> None:
    first, second = ([(r["step"], r["loss"], r.get("grad_norm")) for r in read_metrics(runs[n])]
                     for n in ("first", "second"))
    assert first == second and len(first) > 4
    a, b = (SavedWeights(list_checkpoints(runs[n])[-1].folder) for n in ("first", "second"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("k", "twice"), [(1, {0, 1, 2, 3}), (2, {0, 2}), (3, {0, 3})])
def test_every_kth_block_is_recomputed_and_no_number_changes_by_it(tmp_path: Path, k: int, twice: set[int]) -> None:
    model = tiny.write_model(tmp_path / "model", num_hidden_layers=4)
    tiny.write_corpus(tmp_path, "mixed", model=model, n_rows=2, seed=1)
    corpus = PackedCorpus(tmp_path / "mixed")
    batch = collate([corpus[0], corpus[1]], [0, 0])
    found = []
    for every in (None, k):
        m = load({"model": {"path": str(model)}}, activation_checkpointing=every)
        calls: list[int] = []
        for i, block in enumerate(decoder_blocks(m.lm)):
            block.mlp.register_forward_hook(lambda *_, calls=calls, i=i: calls.append(i))
        loss = m(batch).sum()
        loss.backward()
        found.append((calls, loss, [p.grad for p in m.parameters()]))
    (_, loss, grads), (calls, same_loss, same_grads) = found
    assert {i for i in range(4) if calls.count(i) == 2} == twice
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


@pytest.mark.parametrize(("tied", "decay_embeddings", "decayed"), [
    (True, True, {"embeddings", "matrices"}),
    (True, False, {"matrices"}),
    (False, True, {"embeddings", "output", "matrices"}),
    (False, False, {"output", "matrices"}),
])
def test_weight_decay_goes_by_what_a_parameter_is(
        tmp_path: Path, tied: bool, decay_embeddings: bool, decayed: set[str]) -> None:
    path = tiny.write_model(tmp_path / "model", tie_word_embeddings=tied, attention_bias=True)
    model = load({"model": {"path": str(path)}})
    groups = parameter_groups(model, OptimizerConfig(peak_lr=1, weight_decay=0.3, decay_embeddings=decay_embeddings))
    assert {g["name"] for g in groups if g["weight_decay"] == 0.3} == decayed
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = {g["name"]: {name_of[id(p)] for p in g["params"]} for g in groups}
    assert names["embeddings"] == {"lm.model.embed_tokens.weight"}
    assert names.get("output", set()) == (set() if tied else {"lm.lm_head.weight"})
    assert {n.split(".")[-2] for n in names["matrices"]} == \
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("norm" in n or n.endswith(".bias") for n in names["vectors"])
    assert sum(len(g["params"]) for g in groups) == len(name_of)  # each parameter once


def test_compiled_blocks_train_like_plain_ones_and_stage_3_refuses_them(world: dict[str, Any], tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU: there is no g++")
    short = {**world, "schedule": {"total": {"steps": 4}, "warmup": {"steps": 1}}, "validation": {"every": None},
             "deepspeed": str(tiny.REPO / "ds_configs/zero1.json")}
    compiled = {**world["model"], "compile": True}
    configs = {"plain": {**short, "run_dir": str(tmp_path / "plain")},
               "compiled": {**short, "run_dir": str(tmp_path / "compiled"), "model": compiled},
               "stage 3": {**world, "run_dir": str(tmp_path / "refused"), "model": compiled}}
    errors = in_ranks.train_all(configs, tmp_path, ranks=1)
    assert errors["plain"] == errors["compiled"] == ""
    assert "model.compile=true does not go with ZeRO stage 3" in errors["stage 3"]
    plain, ours = ([r["loss"] for r in read_metrics(tmp_path / n)] for n in ("plain", "compiled"))
    assert len(ours) == 4 and ours == pytest.approx(plain, rel=1e-5)
