"""Layers that give the same result however many processes share a batch, and those of the retrieval network."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Draw:
    """The random numbers of one training step.

    They are drawn for all `total` rows of the batch; a process uses those of its rows, from `first` on.
    """

    generator: torch.Generator
    first: int
    total: int


class Dropout(nn.Module):
    """Dropout whose mask of a row does not depend on how processes share the batch."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.draw: Draw | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.draw is None:
            return nn.functional.dropout(x, self.p)
        drawn = torch.rand((self.draw.total, *x.shape[1:]), generator=self.draw.generator, device=x.device)
        mask = drawn[self.draw.first : self.draw.first + len(x)] >= self.p
        return x * mask / (1.0 - self.p)


class _AllReduceSum(torch.autograd.Function):
    """Sum a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all processes, also on CPUs (torch has it for GPUs alone)."""

    group: Any = None

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accept any number of axes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        axes, shape = [0, *range(2, input.dim())], [1, -1, *[1] * (input.dim() - 2)]
        rows = torch.tensor(float(input.numel() // input.shape[1]), device=input.device)
        dist.all_reduce(rows, group=self.group)
        mean = self._sum_over_processes(input.sum(axes)) / rows
        centred = input - mean.reshape(shape)
        variance = self._sum_over_processes((centred**2).sum(axes)) / rows
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale.reshape(shape) + self.bias.reshape(shape)

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes; gradients flow back to every one of them."""
        total: torch.Tensor = _AllReduceSum.apply(values, self.group)  # type: ignore[no-untyped-call]
        return total


def synchronise(model: nn.Module) -> Any:
    """Make a model's batch normalisations use the rows of all processes; return their process group.

    Call it in every process, before the model is wrapped.
    """
    group = dist.new_group()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                synchronised = _SynchronisedBatchNorm(child.num_features, child.eps, child.momentum)
                # The same tensors, since the optimiser already refers to them.
                synchronised._parameters, synchronised._buffers = child._parameters, child._buffers
                synchronised.group = group
                setattr(module, name, synchronised)
    return group


class Block(nn.Module):
    """A residual block: two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        # A block starts as the identity, which makes deep networks trainable from the first step.
        nn.init.zeros_(self.second_norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(y + self.shortcut(x))


class GeneralisedMean(nn.Module):
    """Pool (N, C, H, W) to (N, C) by a power mean; the exponent is learned, between the mean (1) and the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1e-6).pow(self.exponent).mean((2, 3)).pow(1.0 / self.exponent)
