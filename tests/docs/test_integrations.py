"""docs/integrations.md: the code of each section runs, and the optimizer that it makes trains."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel

import fused_tricks as ft
from support.networks import Network, Tiny

pytestmark = pytest.mark.integration

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
INSTALL = "pip install fused_tricks[integrations]"


def sections() -> dict[str, list[str]]:
    """Returns the blocks of code of each section that has some."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    blocks = {
        heading: re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {heading: found for heading, found in blocks.items() if found}


def run(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "docs/integrations.md", "exec"), names)


def run_loop(block: str, names: dict[str, Any]) -> None:
    """Runs the lines that make the optimizer, then computes a loss, then runs the lines of the loop."""
    setup, loop = block.split("\n\n")
    run(setup, names)
    names["loss"] = loss_of(names["model"])
    run(loop, names)


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)
    return nn.functional.cross_entropy(model(images), labels)


def assert_trains(model: nn.Module, optimizer: Any) -> None:
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.zero_grad()
    optimizer.scale(loss_of(model)).backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) >= 3
    assert optimizer.stats().applied_steps >= 1


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """The default process group, of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_section_with_code_has_a_test() -> None:
    assert list(sections()) == [
        "Models that compute their loss",
        "FSDP2",
        "Gradients of another dtype",
        "ZeroRedundancyOptimizer",
        "Horovod",
        "PyTorch Lightning",
        "Hugging Face Accelerate",
        "Hugging Face Trainer",
        "timm",
        "Weight averages",
    ]


class Diffusion(nn.Module):
    """A model with the names of the section."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding, self.body = nn.Linear(1, 4), nn.Linear(4, 4)
        self.body.register_buffer("positions", torch.arange(4096.0))

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        return self.body(images) + self.time_embedding(times)


def test_models_that_compute_their_loss() -> None:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    part, whole = sections()["Models that compute their loss"]
    names = {
        "torch": torch,
        "ft": ft,
        # Without the download of weights.
        "fasterrcnn_resnet50_fpn": functools.partial(fasterrcnn_resnet50_fpn, weights_backbone=None),
    }
    run(part, names)
    assert names["model"].backbone.body.conv1.weight.dtype == torch.float16
    assert names["model"].rpn.head.cls_logits.weight.dtype == torch.float32
    names["model"] = Diffusion()
    run(whole, names)
    model = names["model"]
    assert model.body.weight.dtype == torch.bfloat16
    assert model.time_embedding.weight.dtype == model.body.positions.dtype == torch.float32
    assert model(torch.ones(2, 4), torch.full((2, 1), 999.0)).dtype == torch.float32


def test_fsdp2(one_process: None) -> None:
    (block,) = sections()["FSDP2"]
    names = {
        "torch": torch,
        "ft": ft,
        "model": ft.cast_model(Tiny(10), torch.bfloat16),
        "fully_shard": functools.partial(fully_shard, mesh=dist.init_device_mesh("cpu", (1,))),
    }
    run(block, names)
    model, optimizer = names["model"], names["optimizer"]
    optimizer.scale(model(torch.randn(2, 3, 32, 32)).square().mean()).backward()
    optimizer.step()
    assert optimizer.stats().applied_steps == 1


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_of_another_dtype(index: int) -> None:
    block = sections()["Gradients of another dtype"][index]
    names = {"torch": torch, "ft": ft, "model": nn.Linear(6, 3)}
    run(block, names)
    model = names["model"]
    optimizer = ft.FusedSGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    weight, other = model.weight.dtype, {0: torch.float32, 1: torch.bfloat16}[index]
    assert (model.weight.grad.dtype, weight == other) == (other, False)
    optimizer.step()


def test_zero_redundancy_optimizer(one_process: None) -> None:
    (block,) = sections()["ZeroRedundancyOptimizer"]
    names = {
        "torch": torch,
        "ft": ft,
        "dist": dist,
        "functools": functools,
        "ZeroRedundancyOptimizer": ZeroRedundancyOptimizer,
        "model": Network(),
    }
    run_loop(block, names)
    assert_trains(names["model"], names["optimizer"].optim)
    assert isinstance(names["optimizer"].optim.loss_scale, ft.DynamicLossScale)


def test_horovod() -> None:
    (block,) = sections()["Horovod"]
    names: dict[str, Any] = {"ft": ft}
    run(block, names)
    model = Network()
    first = names["Scaled"](model.parameters(), lr=0.1)
    again = type("DistributedScaled", (names["Scaled"],), {})(first.param_groups)
    assert again.max_grad_norm == 1.0
    assert_trains(model, again)


def test_pytorch_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason=f"needs Lightning: {INSTALL}")
    (block,) = sections()["PyTorch Lightning"]
    names = {"torch": torch, "ft": ft, "LightningModule": pl.LightningModule, "resnet50": Network}
    run(block, names)

    base: Any = names["Network"]

    class Trained(base):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.layers)

        def configure_optimizers(self) -> Any:
            return ft.FusedSGD(self.parameters(), lr=0.1, loss_scale=8.0)

        def train_dataloader(self) -> Any:
            return [0, 1, 2]

    monkeypatch.chdir(tmp_path)
    module = Trained()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module)
    assert module.optimizers(use_pl_optimizer=False).stats().applied_steps == 3


def test_hugging_face_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason=f"needs Accelerate: {INSTALL}")
    (block,) = sections()["Hugging Face Accelerate"]
    names = {
        "torch": torch,
        "ft": ft,
        "accelerator": accelerate.Accelerator(cpu=True),
        "model": Network(),
        "loader": torch.utils.data.DataLoader([0, 1]),
    }
    try:
        run_loop(block, names)
        assert names["optimizer"].stats().applied_steps + names["optimizer"].stats().skipped_steps == 1
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


class Regression(nn.Module):
    """A model that the Trainer can train."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.fc(inputs.to(self.fc.weight.dtype)).float()
        return {"loss": nn.functional.mse_loss(outputs, labels), "logits": outputs}


def test_hugging_face_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate", reason=f"needs Accelerate: {INSTALL}")
    transformers = pytest.importorskip("transformers", reason=f"needs Transformers: {INSTALL}")
    monkeypatch.chdir(tmp_path)
    (block,) = sections()["Hugging Face Trainer"]
    names = {
        "torch": torch,
        "ft": ft,
        "TrainingArguments": functools.partial(
            transformers.TrainingArguments, max_steps=2, use_cpu=True, report_to=[], save_strategy="no"
        ),
        "Trainer": transformers.Trainer,
        "model": Regression(),
        "dataset": [{"inputs": torch.ones(6), "labels": torch.zeros(3)}] * 16,
        "schedule": None,
    }
    try:
        run(block, names)
        names["trainer"].train()
        stats = names["optimizer"].stats()
        assert stats.applied_steps == 2
        assert 0.01 < stats.grad_norm < 100, "the norm of unscaled gradients"
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


def test_timm() -> None:
    pytest.importorskip("timm", reason=f"needs timm: {INSTALL}")
    import timm.optim
    from timm.optim._optim_factory import default_registry

    (block,) = sections()["timm"]
    names: dict[str, Any] = {"torch": torch, "ft": ft, "timm": timm, "model": Network()}
    try:
        run(block, names)
    finally:
        default_registry._optimizers.pop("fusedtricks", None)
    assert isinstance(names["optimizer"], ft.FusedSGD)
    assert_trains(names["model"], names["optimizer"])


def test_weight_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours, theirs = sections()["Weight averages"]
    names = {
        "torch": torch,
        "ft": ft,
        "copy": copy,
        "AveragedModel": AveragedModel,
        "evaluate": loss_of,
        "model": ft.cast_model(Network(), torch.bfloat16),
    }
    run(ours, names)
    model, optimizer = names["model"], names["optimizer"]
    assert_trains(model, optimizer)
    run(theirs, names)
    assert names["average"].module.body.weight.dtype == torch.float32
    assert torch.equal(
        names["average"].module.body.weight, optimizer.state[model.body.weight]["master_param"]
    )
