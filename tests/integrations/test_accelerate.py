"""FusedSGD prepared by Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_tricks import DynamicLossScale, FusedSGD, cast_model
from support.comparison import assert_all_same_bits

REASON = "needs Accelerate: pip install fused_tricks[integrations]"
accelerate = pytest.importorskip("accelerate", reason=REASON)

pytestmark = pytest.mark.integration

BATCHES = 8
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def forget_accelerators() -> None:
    """Resets the settings that Accelerate keeps for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    forget_accelerators()


class Run:
    """A small network and its optimizer, prepared by an Accelerator."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer] = FusedSGD,
        *,
        scaler: torch.amp.GradScaler | None = None,
        low_precision: torch.dtype | None = None,
        accelerator: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        forget_accelerators()
        self.accelerator = accelerate.Accelerator(cpu=True, **(accelerator or {}))
        if scaler is not None:
            # Accelerate makes no scaler on the CPU.
            self.accelerator.scaler = scaler
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
        if low_precision is not None:
            cast_model(model, low_precision)
        optimizer = kind(model.parameters(), **OPTIONS, **options)
        self.unwrapped = optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * BATCHES)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(8 * BATCHES, 8, generator=generator)
        batches = DataLoader(TensorDataset(inputs, 2 * inputs[:, :4]), batch_size=8)
        prepared = self.accelerator.prepare(model, optimizer, batches, schedule)
        self.model, self.optimizer, self.batches, self.schedule = prepared

    def epoch(self, max_norm: float | None = None) -> list[Tensor]:
        for inputs, targets in self.batches:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(inputs), targets)
                scale = getattr(self.unwrapped, "scale", lambda unscaled: unscaled)
                self.accelerator.backward(scale(loss))
                if max_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return [p.detach().clone() for p in self.model.parameters()]


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_fp32_weights_get_the_bits_of_torchs_sgd(
    precision: str, accumulation: int, max_norm: float | None
) -> None:
    settings = {"mixed_precision": precision, "gradient_accumulation_steps": accumulation}
    ours = Run(FusedSGD, bias_decay=True, accelerator=settings).epoch(max_norm)
    torchs = Run(torch.optim.SGD, foreach=False, accelerator=settings).epoch(max_norm)
    assert_all_same_bits(ours, torchs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_under_accelerates_scaler_the_bits_are_those_of_torchs_sgd(
    accumulation: int, max_norm: float | None
) -> None:
    settings = {"gradient_accumulation_steps": accumulation}
    run = Run(FusedSGD, bias_decay=True, accelerator=settings, scaler=scaler())
    ours = run.epoch(max_norm)
    torchs = Run(torch.optim.SGD, foreach=False, accelerator=settings, scaler=scaler()).epoch(max_norm)
    assert_all_same_bits(ours, torchs)
    assert run.unwrapped.stats().applied_steps == BATCHES // accumulation
    assert run.accelerator.scaler.get_scale() > 1024.0


def test_a_step_that_the_optimizer_skips_is_told_by_its_statistics() -> None:
    """The scaler calls `step()` at an overflow, as for torch's fused optimizers. Accelerate reports no skipped step."""
    run = Run(scaler=scaler())
    before = [p.detach().clone() for p in run.model.parameters()]
    run.accelerator.backward(run.model(torch.full((2, 8), torch.inf)).sum())
    run.optimizer.step()
    assert_all_same_bits(run.model.parameters(), before)
    assert run.unwrapped.stats().last_step_skipped
    assert not run.accelerator.optimizer_step_was_skipped


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimizers_own_loss_scale_trains_fp16_weights(accumulation: int) -> None:
    scale = DynamicLossScale(init_scale=2.0**17)
    run = Run(
        low_precision=torch.float16,
        loss_scale=scale,
        max_grad_norm=1.0,
        accelerator={"gradient_accumulation_steps": accumulation},
    )
    before = [p.detach().clone() for p in run.model.parameters()]
    after = run.epoch()
    stats = run.unwrapped.stats()
    assert stats.skipped_steps > 0 and stats.applied_steps > 0
    assert stats.skipped_steps + stats.applied_steps == BATCHES // accumulation
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


RUNS: dict[str, Any] = {
    "FP32": lambda: Run(),
    "bf16 autocast": lambda: Run(accelerator={"mixed_precision": "bf16"}),
    "grad scaler": lambda: Run(scaler=scaler()),
    "BF16 weights": lambda: Run(low_precision=torch.bfloat16),
    "own loss scale": lambda: Run(low_precision=torch.float16, loss_scale="dynamic"),
}


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_a_run_resumed_from_accelerates_checkpoint_continues_bit_for_bit(tmp_path: Path, make: Any) -> None:
    whole = make()
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    expected = whole.epoch()
    statistics = whole.unwrapped.stats()
    resumed = make()
    with torch.no_grad():
        for param in resumed.model.parameters():
            param.zero_()
    resumed.accelerator.load_state(str(tmp_path))
    assert_all_same_bits(resumed.epoch(), expected)
    assert resumed.unwrapped.stats() == statistics
