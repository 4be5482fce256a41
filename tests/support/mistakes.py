"""Mistakes of training in low precision that docs/troubleshooting.md explains, and the models that make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_tricks as ft
from fused_tricks import FusedSGD
from support.networks import Network

Names = dict[str, Any]


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3, bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images)


class Convolution(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv1d(1, 3, 4, bias=bias), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images[:, None])[:, :, 0])


class Mixing(nn.Module):
    """A model whose forward pass creates an FP32 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.fc(images)
        return torch.bmm(features[:, None], torch.eye(3).expand(len(features), 3, 3))[:, 0]


class Head(nn.Module):
    """A layer that overflows FP16 in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, features: Tensor) -> Tensor:
        return (self.fc(features).exp() * 1e6).log() - 14.0


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), Head()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.body(images)))


def names_of(model: Callable[[], nn.Module] = Network) -> Names:
    """The names that the code of the page uses, with a model of fixed weights."""
    torch.manual_seed(0)
    loader = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(8)]
    return {
        "torch": torch,
        "ft": ft,
        "model": model(),
        "loader": loader,
        "images": loader[0][0],
        "labels": loader[0][1],
        "targets": torch.rand(4, 3),
        "scores": torch.randn(3, 3).half(),
        "mask": torch.eye(3, dtype=torch.bool),
        "criterion": nn.functional.cross_entropy,
        "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0),
    }


def loss_of(names: Names) -> Tensor:
    return names["criterion"](names["model"](names["images"]), names["labels"])


def sgd(names: Names, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(names["model"].parameters(), lr=0.1, **options)


PROBLEMS: dict[str, tuple[Callable[[Names], object], Callable[[], nn.Module]]] = {}


def problem(heading: str, model: Callable[[], nn.Module] = Network) -> Callable[[Any], Any]:
    """Registers the function that causes the message of a heading, and the model of the section."""

    def register(cause: Callable[[Names], object]) -> Callable[[Names], object]:
        PROBLEMS[heading] = cause, model
        return cause

    return register


def half(names: Names) -> Names:
    names["model"].half()
    return {**names, "images": names["images"].half()}


@problem("Attempting to unscale FP16 gradients.")
def fp16_weights_under_a_grad_scaler(names: Names) -> None:
    names = half(names)
    optimizer, scaler = sgd(names), names["scaler"]
    scaler.scale(loss_of(names)).backward()
    scaler.step(optimizer)


@problem("Detected call of `lr_scheduler.step()` before `optimizer.step()`.")
def overflow_in_the_first_step(names: Names) -> None:
    optimizer, scaler = sgd(names), names["scaler"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    names["images"][0, 0] = torch.inf
    scaler.scale(loss_of(names)).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()


@problem("No inf checks were recorded for this optimizer.")
def optimizer_of_another_model(names: Names) -> None:
    optimizer, scaler = torch.optim.SGD(Network().parameters(), lr=0.1), names["scaler"]
    scaler.scale(loss_of(names)).backward()
    scaler.step(optimizer)


@problem("No inf checks were recorded prior to update.")
def update_without_a_step(names: Names) -> None:
    names["scaler"].scale(loss_of(names)).backward()
    names["scaler"].update()


@problem("unscale_() has already been called on this optimizer since the last update().")
def unscaling_in_every_micro_batch(names: Names) -> None:
    optimizer, scaler = sgd(names), names["scaler"]
    for _ in range(2):
        scaler.scale(loss_of(names)).backward()
        scaler.unscale_(optimizer)


@problem("Attempted step but _scale is None.")
def step_without_a_scaled_loss(names: Names) -> None:
    optimizer = sgd(names)
    loss_of(names).backward()
    names["scaler"].step(optimizer)


@problem(
    "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped."
)
def clipping_an_infinite_gradient(names: Names) -> None:
    params = list(names["model"].parameters())
    (loss_of(names) * torch.inf).backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)


@problem("mat1 and mat2 must have the same dtype, but got Float and Half")
def fp32_input_of_a_linear_layer(names: Names) -> None:
    names["model"].half()(names["images"])


@problem("expected m1 and m2 to have the same dtype, but got: float != c10::Half", partial(Layer, bias=False))
def fp32_input_of_a_linear_layer_without_a_bias(names: Names) -> None:
    names["model"].half()(names["images"])


@problem(
    "Input type (torch.FloatTensor) and weight type (torch.HalfTensor) should be the same",
    partial(Convolution, bias=False),
)
def fp32_input_of_a_convolution_without_a_bias(names: Names) -> None:
    names["model"].half()(names["images"])


@problem("Input type (float) and bias type (c10::Half) should be the same", Convolution)
def fp32_input_of_a_convolution(names: Names) -> None:
    names["model"].half()(names["images"])


@problem(
    "Input type (torch.cuda.FloatTensor) and weight type (torch.cuda.HalfTensor) should be the same",
    Convolution,
)
def fp32_input_of_a_convolution_on_a_gpu(names: Names) -> None:
    names["model"].cuda().half()(names["images"].cuda())


@problem("expected scalar type Half but found Float", Mixing)
def fp32_tensor_made_in_the_forward_pass(names: Names) -> None:
    ft.cast_model(names["model"], torch.float16)(names["images"])


@problem("Found dtype Float but expected Half")
def fp16_outputs_and_fp32_targets(names: Names) -> None:
    names = half(names)
    nn.functional.binary_cross_entropy(names["model"](names["images"]).sigmoid(), names["targets"])


@problem("value cannot be converted to type c10::Half without overflow")
def large_number_in_a_mask(names: Names) -> None:
    names["scores"].masked_fill(names["mask"], -1e9)


@problem(
    "optimizer.step() divides the gradients by the loss scale, but optimizer.scale() has never been called"
)
def loss_that_is_not_scaled(names: Names) -> None:
    optimizer = FusedSGD(names["model"].parameters(), lr=0.1, loss_scale="dynamic")
    loss_of(names).backward()
    optimizer.step()


@problem("no parameter of the optimizer has a gradient, so optimizer.step() updates nothing")
def gradients_dropped_before_the_step(names: Names) -> None:
    optimizer = FusedSGD(names["model"].parameters(), lr=0.1, loss_scale="dynamic")
    optimizer.scale(loss_of(names)).backward()
    optimizer.zero_grad()
    optimizer.step()


@problem("schedule.step() was called before the first optimizer.step()")
def schedule_before_the_optimizer(names: Names) -> None:
    optimizer = FusedSGD(names["model"].parameters(), lr=0.1)
    ft.WarmupCosineLR(optimizer, total_steps=8).step()


@problem("FusedSGD updates from float16 gradients without a loss scale")
def fp16_gradients_without_a_scale(names: Names) -> None:
    names = half(names)
    optimizer = FusedSGD(names["model"].parameters(), lr=0.1)
    loss_of(names).backward()
    optimizer.step()


@problem("the last 25 optimizer steps were skipped")
def every_gradient_overflows(names: Names) -> None:
    rule = ft.DynamicLossScale(init_scale=1.0)
    optimizer = FusedSGD(names["model"].parameters(), lr=0.1, loss_scale=rule, backend="reference")
    for _ in range(25):
        optimizer.zero_grad()
        optimizer.scale(loss_of(names) * torch.inf).backward()
        optimizer.step()
