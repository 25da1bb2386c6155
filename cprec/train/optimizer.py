"""Which parameters are decayed and which are held still: the optimizer's parameter groups, by what a parameter is.

reads: the model's modules. DeepSpeed keeps a group's weights, moments and step count in flat tensors of their own, so a
group is also the unit that can be left out of an update altogether.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from cprec.config import OptimizerConfig
from cprec.model import TrainingModel

Kind = Literal["embeddings", "output", "matrices", "vectors"]
EMBEDDINGS: tuple[Kind, ...] = ("embeddings", "output")


def parameter_groups(model: TrainingModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups for AdamW, named by kind: input embeddings (with an output layer tied to them),
    an output layer of its own, matrices, and vectors. Norms and biases are vectors, whatever their shape."""
    kinds: dict[Kind, list[nn.Parameter]] = {"embeddings": [], "output": [], "matrices": [], "vectors": []}
    decay = {"embeddings": config.decay_embeddings, "output": True, "matrices": True, "vectors": False}
    kind_of = {id(p): _kind(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False)}
    kind_of[id(model.lm.get_output_embeddings().weight)] = "output"
    kind_of |= {id(m.weight): "embeddings" for m in model.modules() if isinstance(m, nn.Embedding)}
    for p in model.parameters():
        if p.requires_grad:
            kinds[kind_of[id(p)]].append(p)
    return [{"name": kind, "params": params, "weight_decay": config.weight_decay if decay[kind] else 0.0}
            for kind, params in kinds.items() if params]


def _kind(module: nn.Module, name: str, parameter: Tensor) -> Kind:
    n_dims = len(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 its own shape is the partition's
    is_norm = "norm" in type(module).__name__.lower()
    return "vectors" if n_dims < 2 or name == "bias" or is_norm else "matrices"


class EmbeddingsOnly:
    """A phase in which only the embeddings are trained: nothing of the other groups changes, to the last bit.

    Their parameters want no gradient, so that they add nothing to the gradient norm, and the optimizer does not see
    them: no decay, no moments, no count of steps. When the phase ends they begin as if it were their first step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._held = [p for group in optimizer.param_groups if group["name"] not in EMBEDDINGS for p in group["params"]]
        self._active = False
        self._left_out: list[tuple[dict[str, Any], list[Tensor]]] = []
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: self._leave_out(opt))
        optimizer.register_step_post_hook(lambda opt, args, kwargs: self._put_back())

    def set(self, active: bool) -> None:
        """Begin the phase, end it, or stay as it is."""
        if active != self._active:
            for parameter in self._held:
                parameter.requires_grad_(not active)
            self._active = active

    def _leave_out(self, optimizer: torch.optim.Optimizer) -> None:
        if self._active:
            self._left_out = [(g, g["params"]) for g in optimizer.param_groups if g["name"] not in EMBEDDINGS]
            for group, _ in self._left_out:
                group["params"] = []

    def _put_back(self) -> None:
        for group, parameters in self._left_out:
            group["params"] = parameters
        self._left_out = []
