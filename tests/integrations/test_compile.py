"""torch.compile of the model and of whole training steps: the same results, nothing compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fused_tricks import DynamicLossScale, FusedSGD, WarmupCosineLR, cast_model
from support.comparison import assert_all_same_bits, assert_same_bits, parameters, set_gradients

pytestmark = pytest.mark.integration

EXACT_COMPILERS = ["eager", "aot_eager"]
"""Compilers that keep the arithmetic of torch's own kernels."""


@pytest.fixture(autouse=True)
def no_recompilation() -> Iterator[None]:
    """Starts every test without compiled code, and raises if anything is compiled again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


class Training:
    """A small network in low precision, trained step by step on batches that depend on their number only."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        torch.manual_seed(0)
        layers: Any = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
        self.model: Any = cast_model(layers, dtype)
        self.optimizer = FusedSGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, **options)
        self.schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.loss = self.scaled_loss
        self.step = self.whole_step

    def scaled_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.optimizer.scale(nn.functional.mse_loss(self.model(images), targets))

    def whole_step(self, images: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(images, targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, steps: int, overflows: tuple[int, ...] = ()) -> list[Tensor]:
        """Takes steps, and returns the scaled losses, then the weights."""
        generator = torch.Generator().manual_seed(1)
        losses = []
        for index in range(steps):
            images = torch.randn(16, 8, generator=generator)
            if index in overflows:
                images[0, 0] = torch.inf
            losses.append(self.step(images, torch.randn(16, 4, generator=generator)).clone())
            self.schedule.step()
        return [*losses, *(p.detach().clone() for p in self.model.parameters())]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss_scale": 1024.0, "max_grad_norm": 0.5},
    {"loss_scale": "dynamic", "nesterov": True},
]


@pytest.mark.parametrize("compiler", EXACT_COMPILERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_training_step_gives_the_bits_of_the_eager_one(compiler: str, options: Any) -> None:
    eager, compiled = Training(**options), Training(**options)
    compiled.step = torch.compile(compiled.step, backend=compiler)
    overflows = (0, 4) if options.get("loss_scale") == "dynamic" else ()
    assert_all_same_bits(compiled.run(8, overflows), eager.run(8, overflows))
    assert compiled.optimizer.stats() == eager.optimizer.stats()
    assert compiled.optimizer.stats().skipped_steps == len(overflows)


@pytest.mark.parametrize("compiler", EXACT_COMPILERS)
def test_a_compiled_model_gives_the_bits_of_the_eager_one_and_takes_every_batch(compiler: str) -> None:
    eager, compiled = Training(loss_scale="dynamic"), Training(loss_scale="dynamic")
    compiled.model = torch.compile(compiled.model, backend=compiler, fullgraph=True)
    assert_all_same_bits(compiled.run(8), eager.run(8))


@pytest.mark.parametrize("count", ["calls", "applied"])
def test_a_schedule_inside_a_compiled_step_is_followed_and_not_compiled(count: Any) -> None:
    def result(compiled: bool) -> list[Tensor]:
        training = Training(loss_scale="dynamic")
        training.optimizer.register_step_post_hook(lambda *args: None)
        schedule = WarmupCosineLR(training.optimizer, total_steps=12, warmup_steps=3, count=count)

        def step(images: Tensor, targets: Tensor) -> Tensor:
            loss = training.whole_step(images, targets)
            schedule.step()
            return loss

        training.step = torch.compile(step, backend="aot_eager") if compiled else step
        training.schedule = SimpleNamespace(step=lambda: None)
        return training.run(10, (2,))

    assert_all_same_bits(result(compiled=True), result(compiled=False))


def test_inductor_trains_to_nearly_the_same_weights() -> None:
    eager, compiled = Training(loss_scale="dynamic"), Training(loss_scale="dynamic")
    compiled.step = torch.compile(compiled.step)
    torch.testing.assert_close(
        compiled.run(8, (2,)), eager.run(8, (2,)), rtol=0.05, atol=0.05, equal_nan=True
    )
    assert compiled.optimizer.stats() == eager.optimizer.stats()


def test_nothing_of_a_step_is_compiled(backend: str, device: torch.device) -> None:
    params = parameters([(5,), (4, 3)], torch.float16, device)
    optimizer = FusedSGD(
        params, lr=0.1, momentum=0.9, loss_scale="dynamic", max_grad_norm=1.0, backend=backend
    )
    counter = CompileCounter()
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    for index in range(3):
        set_gradients(params, [torch.ones(p.shape).half() for p in params])
        optimizer.param_groups[0]["lr"] = 0.1 / (index + 1)
        step()
    assert counter.frame_count == 0
    assert optimizer.stats().applied_steps == 3


def test_nothing_of_a_step_with_hooks_is_compiled() -> None:
    params = parameters([(5,)])
    optimizer = FusedSGD(params, lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *args: seen.append(params[0].detach().clone()))
    counter = CompileCounter()
    set_gradients(params, [torch.ones(5)])
    torch.compile(lambda: optimizer.step(), backend=counter)()
    assert counter.frame_count == 0
    assert_same_bits(seen[0], params[0])


def test_the_scaled_loss_is_one_graph_and_follows_the_scale() -> None:
    """A scale compiled as a constant would stay at 1024 after the overflow."""
    training = Training(loss_scale=DynamicLossScale(init_scale=1024.0))
    training.loss = torch.compile(training.scaled_loss, backend="aot_eager", fullgraph=True)
    plain = Training(loss_scale=DynamicLossScale(init_scale=1024.0))
    assert_all_same_bits(training.run(6, (1, 3)), plain.run(6, (1, 3)))
    assert training.optimizer.stats().scale == 256.0


def test_a_closure_may_run_a_compiled_model() -> None:
    counter = CompileCounter()

    def result(compiled: bool) -> list[Tensor]:
        training = Training()
        model: Any = torch.compile(training.model, backend=counter) if compiled else training.model

        def closure() -> Tensor:
            training.optimizer.zero_grad()
            loss = model(torch.ones(2, 8)).square().mean()
            loss.backward()
            return loss

        losses = [training.optimizer.step(closure).detach() for _ in range(3)]
        return [*losses, *(p.detach() for p in training.model.parameters())]

    assert_all_same_bits(result(compiled=True), result(compiled=False))
    assert counter.frame_count == 1


def test_a_step_under_grad_scaler_may_be_compiled() -> None:
    results = []
    for compiler in (None, "aot_eager"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

        def forward(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float().square().mean()

        if compiler is not None:
            forward = torch.compile(forward, backend=compiler, fullgraph=True)
        for index in range(4):
            optimizer.zero_grad()
            scaler.scale(forward(torch.full((2, 4), torch.inf if index == 1 else 1.0))).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.stats().skipped_steps == 1
        results.append([p.detach() for p in model.parameters()])
    assert_all_same_bits(results[1], results[0])
