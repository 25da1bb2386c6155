"""Every attention backend computes what a plain masked float64 attention computes, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface

from cprec.attention import BACKENDS, Documents, kernel_arguments, select
from cprec.errors import ConfigError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SEQ_LEN = 24
LAYOUTS = {
    "one document per row": [SEQ_LEN],
    "several rows": [SEQ_LEN, 7, 17, 1, 1, 22],
    "every length": list(range(1, SEQ_LEN + 1)),
    "single tokens": [1] * SEQ_LEN,
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here; the others say what they lack."""
    name: str = request.param
    if reason := BACKENDS[name].missing(DEVICE):
        pytest.skip(f"{name}: {reason}")
    return name


def precision(backend: str) -> tuple[torch.dtype, float]:
    """What a backend computes in, at best, and how far it may be from float64."""
    if BACKENDS[backend].only_16_bit:
        return torch.bfloat16, 3e-2
    return (torch.float64, 1e-12) if DEVICE.type == "cpu" else (torch.float32, 3e-3)


class Layer(nn.Module):
    """What a backend asks of an attention layer."""

    is_causal = True
    layer_idx = 0

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": implementation})()


def attend(backend: str, qkv: tuple[Tensor, ...], lens: list[int], **options: object) -> Tensor:
    implementation = BACKENDS[backend].implementation
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=qkv[0].device)
    forward = AttentionInterface()[implementation]
    arguments = {**kernel_arguments(cu, max(lens)), **options}
    out: Tensor = forward(Layer(implementation), *qkv, None, dropout=0.0, **arguments)[0]
    return out


def reference(qkv: tuple[Tensor, ...], lens: list[int], *, scaling: float, sliding_window: int | None = None,
              softcap: float | None = None) -> Tensor:
    """softmax(q k' scale) v in float64, under a mask that says for each pair of tokens whether one sees the other."""
    q, k, v = (x[0].double() for x in qkv)
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    doc = [i for i, n in enumerate(lens) for _ in range(n)]
    reach = sliding_window or len(doc)
    visible = torch.tensor([[doc[s] == doc[t] and 0 <= t - s < reach for s in range(len(doc))]
                            for t in range(len(doc))], device=q.device)
    scores = q @ k.transpose(1, 2) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(0, 1)[None]


def inputs(n: int, dtype: torch.dtype, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> tuple[Tensor, ...]:
    """Query, key and value as models give them: (1, n, heads, head_dim) in memory, heads moved to the front."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(1, n, h, head_dim, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
                 .transpose(1, 2).requires_grad_() for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("options", [
    {}, {"sliding_window": 5}, {"sliding_window": 1}, {"sliding_window": SEQ_LEN}, {"softcap": 0.7},
    {"softcap": 0.7, "sliding_window": 5},
], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_a_plain_masked_attention(
        backend: str, layout: str, options: dict[str, float]) -> None:
    if "softcap" in options and not BACKENDS[backend].caps_scores:
        pytest.skip(f"{backend} does not cap scores, and models that do are refused")
    lens = LAYOUTS[layout]
    dtype, tolerance = precision(backend)
    qkv = inputs(sum(lens), dtype)
    expected = reference(qkv, lens, scaling=0.3, **options)  # type: ignore[arg-type]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(DEVICE)
    found = attend(backend, qkv, lens, scaling=0.3, **options)
    print("largest difference:", float((found.double() - expected).detach().abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad((found.double() * weights).sum(), qkv),
                    torch.autograd.grad((expected * weights).sum(), qkv), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_query_heads_share_their_groups_keys(backend: str, heads: int, kv_heads: int) -> None:
    lens = LAYOUTS["several rows"]
    dtype, tolerance = precision(backend)
    qkv = inputs(sum(lens), dtype, heads=heads, kv_heads=kv_heads)
    found = attend(backend, qkv, lens, scaling=0.25)
    torch.testing.assert_close(found.double(), reference(qkv, lens, scaling=0.25), rtol=0, atol=tolerance)


def test_without_a_scale_it_is_the_root_of_the_head_dimension(backend: str) -> None:
    dtype, tolerance = precision(backend)
    qkv = inputs(20, dtype)
    found = attend(backend, qkv, [13, 7], scaling=None)
    torch.testing.assert_close(found.double(), reference(qkv, [13, 7], scaling=1 / math.sqrt(16)), rtol=0,
                               atol=tolerance)


@pytest.mark.parametrize("victim", [0, 2, 5])
def test_changing_one_document_changes_no_bit_of_another_nor_of_its_gradients(backend: str, victim: int) -> None:
    lens = LAYOUTS["several rows"]
    begin = sum(lens[:victim])
    inside = torch.zeros(sum(lens), dtype=torch.bool, device=DEVICE)
    inside[begin:begin + lens[victim]] = True
    results = []
    for shift in (0.0, 1.0):
        qkv = inputs(sum(lens), precision(backend)[0])
        for x in qkv:
            x.data[:, :, inside] += shift * torch.arange(1, x.shape[-1] + 1, device=DEVICE)
        out = attend(backend, qkv, lens, scaling=0.3)
        grads = torch.autograd.grad(out.square().sum(), qkv)
        results.append([out, *(g.transpose(1, 2) for g in grads)])
    for before, after in zip(*results, strict=True):
        assert not torch.equal(before[:, inside], after[:, inside])
        assert torch.equal(before[:, ~inside], after[:, ~inside])


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("lens", [[700], [100, 28, 1, 127, 256, 3, 400], [1] * 300, [129, 130, 131]])
def test_the_block_mask_lists_exactly_the_blocks_that_hold_something(lens: list[int], window: int | None) -> None:
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32)
    ours = Documents(cu, max(lens)).block_mask(window)
    n = sum(lens)
    theirs = create_block_mask(ours.mask_mod, None, None, n, n, device="cpu")  # looks at every pair of tokens
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    seen = Documents(cu, max(lens)).mask(window)
    for row, (n_whole, whole) in enumerate(zip(ours.full_kv_num_blocks[0, 0], ours.full_kv_indices[0, 0], strict=True)):
        for column in whole[:n_whole]:  # these are computed without looking at the mask
            assert seen[row * 128:(row + 1) * 128, column * 128:(column + 1) * 128].all()
    assert ours.full_kv_num_blocks.sum() == theirs.full_kv_num_blocks.sum()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 0.7, "sliding_window": 5}], ids=str)
def test_flex_computes_the_reference_where_it_has_no_gradients(options: dict[str, float]) -> None:
    lens = LAYOUTS["several rows"]
    with torch.no_grad():
        qkv = tuple(x.detach().cpu() for x in inputs(sum(lens), torch.float64))
        found = attend("flex", qkv, lens, scaling=0.3, **options)
    torch.testing.assert_close(found, reference(qkv, lens, scaling=0.3, **options),  # type: ignore[arg-type]
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize(("change", "says"), [
    ({"s_aux": torch.zeros(4)}, r"uses \['s_aux'\], which no backend computes"),
    ({"documents": None}, "is not told the documents' borders"),
    ({"is_causal": False}, "is not causal"),
])
def test_a_model_that_asks_for_more_than_a_backend_knows_is_refused(change: dict[str, object], says: str) -> None:
    cu = torch.tensor([0, 4], dtype=torch.int32)
    forward = AttentionInterface()["cprec_documents"]
    with pytest.raises(ConfigError, match=says):
        forward(Layer("cprec_documents"), *inputs(4, torch.float32), None, **{**kernel_arguments(cu, 4), **change})


def test_a_backend_that_cannot_run_here_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"flash2.* cannot run here: flash-attn needs a CUDA device"):
        select("flash2", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"varlen.* cannot run here: it computes in 16 bits, model.dtype is float32"):
        select("varlen", torch.device("cuda"), torch.float32)
    with pytest.raises(ConfigError, match=r"flex.* cannot run here: FlexAttention has no gradients without"):
        select("flex", CPU, torch.float32)
    with pytest.raises(ConfigError, match="did you mean 'flash"):
        select("flash5", CPU, torch.float32)


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    reason = BACKENDS["flash4"].missing(torch.device("cuda"))
    if reason is None:
        pytest.skip("flash-attn-4 is installed")
    assert reason == "the package is not installed: pip install flash-attn-4"


def test_auto_takes_the_documents_one_by_one_on_a_cpu() -> None:
    assert select("auto", CPU, torch.float32) == "doc_sdpa"
