"""FusedSGD in the Trainer of Hugging Face Transformers, through its argument `optimizers`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_tricks import DynamicLossScale, FusedSGD, WarmupCosineLR, cast_model
from support.comparison import assert_all_same_bits

REASON = "needs Transformers and Accelerate: pip install fused_tricks[integrations]"
accelerate = pytest.importorskip("accelerate", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = pytest.mark.integration

STEPS = 8
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Resets the settings that Accelerate keeps for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def classifier(dtype: torch.dtype | None) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        # Without dropout, a resumed run requires no random numbers.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    return model if dtype is None else cast_model(model, dtype)


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": torch.tensor(index % 2)}
        for index in range(32)
    ]


class Run:
    def __init__(
        self,
        folder: Path,
        kind: type[torch.optim.Optimizer] = FusedSGD,
        *,
        dtype: torch.dtype | None = None,
        arguments: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model = classifier(dtype)
        self.optimizer = kind(self.model.parameters(), **OPTIONS, **options)
        schedule = WarmupCosineLR(self.optimizer, total_steps=STEPS, warmup_steps=2)
        self.trainer = transformers.Trainer(
            model=self.model,
            args=transformers.TrainingArguments(
                output_dir=str(folder),
                max_steps=STEPS,
                per_device_train_batch_size=4,
                use_cpu=True,
                report_to=[],
                save_steps=4,
                logging_steps=1,
                disable_tqdm=True,
                **(arguments or {}),
            ),
            train_dataset=sentences(),
            optimizers=(self.optimizer, schedule),
        )

    def train(self, **options: Any) -> list[Tensor]:
        self.trainer.train(**options)
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize(
    "arguments", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}], ids=str
)
def test_fp32_weights_get_the_bits_of_torchs_sgd(tmp_path: Path, arguments: Any) -> None:
    ours = Run(tmp_path, FusedSGD, arguments=arguments, bias_decay=True).train()
    assert_all_same_bits(ours, Run(tmp_path, torch.optim.SGD, arguments=arguments, foreach=False).train())


def with_own_loss_scale(folder: Path) -> Run:
    """Returns a run with FP16 weights. The line about `backward` and both `max_grad_norm` are in the documentation."""
    scale = DynamicLossScale(init_scale=2.0**22)
    run = Run(
        folder,
        dtype=torch.float16,
        loss_scale=scale,
        max_grad_norm=1.0,
        arguments={"max_grad_norm": 0.0},
    )
    accelerator, optimizer = run.trainer.accelerator, run.optimizer
    backward = accelerator.backward
    accelerator.backward = lambda loss, **options: backward(optimizer.scale(loss), **options)
    return run


def test_the_optimizers_own_loss_scale_trains_fp16_weights(tmp_path: Path) -> None:
    run = with_own_loss_scale(tmp_path)
    before = [p.detach().clone() for p in run.model.parameters()]
    after = run.train()
    stats = run.optimizer.stats()
    assert stats.skipped_steps > 0 and stats.applied_steps > 0
    assert stats.skipped_steps + stats.applied_steps == STEPS
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) > len(after) / 2
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert max(float(loss) for loss in losses) < 2.0, "the loss is logged unscaled"


RUNS: dict[str, Any] = {
    "FP32": lambda folder: Run(folder),
    "bf16 autocast": lambda folder: Run(folder, arguments={"bf16": True}),
    "BF16 weights": lambda folder: Run(folder, dtype=torch.bfloat16),
    "own loss scale": with_own_loss_scale,
}


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_a_run_resumed_from_the_trainers_checkpoint_continues_bit_for_bit(tmp_path: Path, make: Any) -> None:
    whole = make(tmp_path)
    expected = whole.train()
    resumed = make(tmp_path / "resumed")
    after = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_all_same_bits(after, expected)
    assert resumed.optimizer.stats() == whole.optimizer.stats()
