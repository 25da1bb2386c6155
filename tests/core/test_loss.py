"""The chunked loss is the plain one, in value and gradients, and holds no more logits than it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cprec import loss
from cprec.loss import IGNORE_INDEX, row_losses

V, H, B, T = 300, 16, 3, 40


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels: two rows with holes, the last one without any label."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, ::7] = labels[1, 3:20] = labels[2] = IGNORE_INDEX
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Row losses from all logits at once, in float64."""
    logits = hidden.double() @ weight.double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.stack([F.cross_entropy(x, y, ignore_index=IGNORE_INDEX, reduction="sum")
                        for x, y in zip(logits, labels, strict=True)])


@pytest.mark.parametrize("chunk_logits", [1, 7 * V, 1 << 25])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("row_weights", [(1.0, 1.0, 1.0), (0.25, 0.25, 0.25), (2.0, -0.5, 3.0)])
def test_row_losses_and_gradients_are_those_of_the_full_logits(
        monkeypatch: pytest.MonkeyPatch, chunk_logits: int, softcap: float | None,
        row_weights: tuple[float, ...]) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    hidden, weight, labels = inputs()
    factors = torch.tensor(row_weights, dtype=torch.float64)
    found, expected = row_losses(hidden, weight, labels, softcap=softcap), plain(hidden, weight, labels, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found[2] == 0
    for a, b in zip(torch.autograd.grad(found @ factors, (hidden, weight)),
                    torch.autograd.grad(expected @ factors, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_sum_of_bfloat16_rows_is_as_exact_as_float32_and_so_are_its_gradients() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    found, expected = row_losses(hidden, weight, labels), plain(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(found.sum(), (hidden, weight)),
                    torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2 ** -8  # their own rounding


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(plain(hidden, weight, labels).sum(), hidden)[0]
    row_losses(hidden, weight.detach(), labels).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)
    with torch.no_grad():
        assert not row_losses(hidden, weight, labels).requires_grad


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient() -> None:
    total = row_losses(*inputs()).sum()
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()  # type: ignore[no-untyped-call]


def test_no_tensor_has_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 5 * V)
    sizes: list[int] = []
    product = loss._wide_product

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        logits = product(x, weight)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(loss, "_wide_product", noted)
    hidden, weight, labels = inputs()
    row_losses(hidden, weight, labels)
    n_labels = int((labels != IGNORE_INDEX).sum())
    assert max(sizes) == 5 * V and sum(sizes) == n_labels * V  # positions without a label cost nothing
