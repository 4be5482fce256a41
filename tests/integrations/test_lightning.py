"""FusedSGD in a PyTorch Lightning Trainer, under each of its precisions and with its own loss scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_tricks import DynamicLossScale, FusedSGD, cast_model
from support.comparison import assert_all_same_bits

REASON = "needs Lightning: pip install fused_tricks[integrations]"
pl: Any = pytest.importorskip("lightning.pytorch", reason=REASON)

pytestmark = pytest.mark.integration

BATCHES = 6
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * BATCHES, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, 2 * inputs[:, :4]), batch_size=8)


class Network(pl.LightningModule):
    def __init__(self, kind: type[torch.optim.Optimizer] = FusedSGD, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
        self.kind, self.options = kind, options

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]).float(), batch[1].float())

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), **OPTIONS, **self.options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LossScaledNetwork(Network):
    """A network with FP16 weights and its optimizer's loss scale. The two hooks are those of the documentation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        cast_model(self.layers, torch.float16)

    def backward(self, loss: Tensor) -> None:
        self.optimizers(use_pl_optimizer=False).scale(loss).backward()

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        optimizer.optimizer.step()


def trainer(folder: Path, precision: str = "32-true", **options: Any) -> Any:
    if precision == "16-mixed":
        # On the CPU, Lightning replaces the name 16-mixed by bf16-mixed.
        options["plugins"] = pl.plugins.MixedPrecision(precision, "cpu")
    else:
        options["precision"] = precision
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(**{**defaults, **quiet, **options})


def trained(folder: Path, network: Network, **options: Any) -> list[Tensor]:
    trainer(folder, **options).fit(network, batches())
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_fp32_weights_get_the_bits_of_torchs_sgd(tmp_path: Path, precision: str, options: Any) -> None:
    ours = trained(tmp_path, Network(FusedSGD, bias_decay=True), precision=precision, **options)
    torchs = trained(tmp_path, Network(torch.optim.SGD, foreach=False), precision=precision, **options)
    assert_all_same_bits(ours, torchs)


def test_the_trainers_clipping_gives_the_bits_of_torchs_sgd(tmp_path: Path) -> None:
    ours = trained(tmp_path, Network(FusedSGD, bias_decay=True), gradient_clip_val=0.3)
    torchs = trained(tmp_path, Network(torch.optim.SGD, foreach=False), gradient_clip_val=0.3)
    assert_all_same_bits(ours, torchs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_in_mixed_precision_the_optimizer_clips(tmp_path: Path, precision: str) -> None:
    """Lightning refuses to clip for every optimizer that can unscale in its step, as torch's fused optimizers."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(tmp_path, Network(), precision=precision, gradient_clip_val=0.3)
    network = Network(FusedSGD, bias_decay=True, max_grad_norm=0.3)
    ours = trained(tmp_path, network, precision=precision)
    assert network.trainer.optimizers[0].stats().grad_norm > 0.3
    clipped = {"precision": precision, "gradient_clip_val": 0.3}
    torchs = trained(tmp_path, Network(torch.optim.SGD, foreach=False), **clipped)
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "precision, dtype", [("bf16-true", torch.bfloat16), ("16-true", torch.float16)], ids=["bf16", "fp16"]
)
def test_lightnings_half_precision_trains_through_fp32_masters(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    network, reference = Network(), Network().to(dtype)
    trained(tmp_path, network, precision=precision)
    configured = reference.configure_optimizers()
    optimizer = configured["optimizer"]
    for inputs, targets in batches():
        optimizer.zero_grad()
        reference.training_step([inputs.to(dtype), targets.to(dtype)], 0).backward()
        optimizer.step()
        configured["lr_scheduler"]["scheduler"].step()
    assert_all_same_bits(network.parameters(), reference.parameters())
    state = network.trainer.optimizers[0].state[network.layers[0].weight]
    assert state["master_param"].dtype == torch.float32
    assert not torch.equal(state["master_param"], network.layers[0].weight.float())


def test_the_optimizers_own_loss_scale_needs_two_hooks(tmp_path: Path) -> None:
    scale = DynamicLossScale(init_scale=2.0**20, growth_interval=2)
    network = LossScaledNetwork(loss_scale=scale, max_grad_norm=1.0)
    before = [p.detach().clone() for p in network.parameters()]
    trained(tmp_path, network)
    stats = network.trainer.optimizers[0].stats()
    assert stats.skipped_steps > 0
    assert stats.applied_steps + stats.skipped_steps == network.trainer.global_step == BATCHES
    assert all(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


def test_with_the_hooks_the_optimizer_clips_and_nothing_else_runs_before_the_step(tmp_path: Path) -> None:
    class Observed(LossScaledNetwork):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise AssertionError("the documentation says that it is not called")

    ours = Observed(loss_scale=DynamicLossScale(init_scale=64.0))
    theirs = LossScaledNetwork(loss_scale=DynamicLossScale(init_scale=64.0))
    clipped = trained(tmp_path, ours, gradient_clip_val=1e-4)
    assert_all_same_bits(clipped, trained(tmp_path, theirs))


def test_without_the_hooks_a_loss_scale_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a closure cannot be combined with loss scaling"):
        trained(tmp_path, Network(loss_scale="dynamic"))


@pytest.mark.parametrize(
    "make, precision",
    [
        (lambda: Network(), "bf16-true"),
        (lambda: Network(), "16-mixed"),
        (lambda: LossScaledNetwork(loss_scale="dynamic"), "32-true"),
    ],
    ids=["bf16-true", "16-mixed", "own loss scale"],
)
def test_a_run_resumed_from_lightnings_checkpoint_continues_bit_for_bit(
    tmp_path: Path, make: Any, precision: str
) -> None:
    whole, first, second = make(), make(), make()
    trained(tmp_path, whole, precision=precision, max_epochs=2)
    interrupted = trainer(tmp_path, precision=precision)
    interrupted.fit(first, batches())
    interrupted.save_checkpoint(tmp_path / "run.ckpt")
    resumed = trainer(tmp_path, precision=precision, max_epochs=2)
    resumed.fit(second, batches(), ckpt_path=tmp_path / "run.ckpt")
    assert_all_same_bits(second.parameters(), whole.parameters())
    assert resumed.optimizers[0].stats() == whole.trainer.optimizers[0].stats()
    assert resumed.optimizers[0].stats().applied_steps > BATCHES
