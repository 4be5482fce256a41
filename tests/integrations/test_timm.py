"""FusedSGD in timm: its optimizer factory, schedulers, loss scaler, weight averages and checkpoints."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks import FusedSGD, cast_model, ema_state_dict, ema_weights, fp32_state_dict
from support.comparison import assert_all_same_bits, assert_same_bits

REASON = "needs timm: pip install fused_tricks[integrations]"
timm = pytest.importorskip("timm", reason=REASON)
timm_loss = pytest.importorskip("timm.loss", reason=REASON)
timm_optim = pytest.importorskip("timm.optim", reason=REASON)
timm_factory = pytest.importorskip("timm.optim._optim_factory", reason=REASON)
timm_scheduler = pytest.importorskip("timm.scheduler", reason=REASON)
timm_utils = pytest.importorskip("timm.utils", reason=REASON)

pytestmark = pytest.mark.integration

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Registers a name without underscores: timm reads a wrapper before an underscore, as in `lookahead_sgd`."""
    timm_factory.default_registry.register(
        timm_factory.OptimInfo(
            name="fusedtricks",
            opt_class=FusedSGD,
            has_eps=False,
            has_momentum=True,
            defaults={"nesterov": True},
        )
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 4, (4,), generator=generator))
        for _ in range(count)
    ]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    scaler: Any = None,
    clip: float | None = None,
) -> list[Tensor]:
    """Trains on batches as timm's training script does."""
    schedule, _ = timm_scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=10, warmup_epochs=2, warmup_lr=1e-3, step_on_epochs=False,
        updates_per_epoch=2,
    )  # fmt: skip
    criterion = timm_loss.LabelSmoothingCrossEntropy(0.1)
    for update, (images, targets) in enumerate(batches(steps), start=1):
        loss = criterion(model(images), targets)
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=clip, parameters=timm.models.model_parameters(model))
        else:
            loss.backward()
            if clip is not None:
                timm_utils.dispatch_clip_grad(timm.models.model_parameters(model), value=clip)
            optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(update)
    return weights(model)


def created(name: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    return model, timm_optim.create_optimizer_v2(model, name, **OPTIONS, **options)


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_registered_optimizer_gives_the_bits_of_timms_sgd(
    options: Any, clip: float | None, scaled: bool
) -> None:
    def scaler() -> Any:
        return timm_utils.NativeScaler("cpu") if scaled else None

    ours = created("fusedtricks", **options)
    assert isinstance(ours[1], FusedSGD)
    theirs = created("sgd", foreach=False, **options)
    assert_all_same_bits(train(*ours, 4, scaler(), clip), train(*theirs, 4, scaler(), clip))


def test_timms_groups_and_no_bias_decay_leave_the_same_parameters_undecayed() -> None:
    _, by_timm = created("fusedtricks", bias_decay=True)
    _, by_both = created("fusedtricks")
    decayed = [
        [
            p.shape
            for group in optimizer.param_groups
            for p in group["params"]
            if group["weight_decay"] and (p.ndim > 1 or group["bias_decay"])
        ]
        for optimizer in (by_timm, by_both)
    ]
    assert decayed[0] == decayed[1]
    assert all(len(shape) > 1 for shape in decayed[0])


def test_lookahead_around_it_gives_the_bits_of_lookahead_around_sgd() -> None:
    results = [
        train(*created(name, foreach=False), 13) for name in ("lookahead_fusedtricks", "lookahead_sgd")
    ]
    assert_all_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_are_trained_through_masters(dtype: torch.dtype) -> None:
    model = cast_model(network(), dtype)
    scale = None if dtype == torch.bfloat16 else 128.0
    optimizer = timm_optim.create_optimizer_v2(model, "fusedtricks", loss_scale=scale, **OPTIONS)
    before = weights(model)
    for images, targets in batches(3):
        optimizer.scale(nn.functional.cross_entropy(model(images), targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.stats().applied_steps == 3
    assert all(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("way", ["with steps", "without"])
def test_the_average_of_the_update_is_that_of_model_ema_v3(way: str) -> None:
    """From timm's second average on: without steps its first one mixes the initial weights with the new ones."""
    model = network()
    optimizer = timm_optim.create_optimizer_v2(model, "fusedtricks", ema_decay=0.9, **OPTIONS)
    ema = timm_utils.ModelEmaV3(model, decay=0.9)
    for step, (images, targets) in enumerate(batches(4), start=1):
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if way == "with steps":
            ema.update(model, step)
        elif step == 1:
            ema.set(model)
        else:
            ema.update(model)
    ours = ema_state_dict(model, optimizer)
    assert_all_same_bits([ours[name] for name, _ in model.named_parameters()], ema.module.parameters())
    images = batches(1)[0][0]
    ema.module.load_state_dict({**ours, **dict(model.named_buffers())})  # timm averages buffers too
    model.eval()
    with ema_weights(model, optimizer):
        assert_same_bits(model(images), ema(images))


EMAS: dict[str, Any] = {
    "ModelEmaV2": lambda model: timm_utils.ModelEmaV2(model, decay=0.9),
    "ModelEmaV3": lambda model: timm_utils.ModelEmaV3(model, decay=0.9),
}


@pytest.mark.parametrize("make", EMAS.values(), ids=EMAS)
def test_a_weight_average_of_the_masters_is_kept_in_an_fp32_twin(make: Any) -> None:
    """An average in FP16 would lose every change that is smaller than half of its last bit."""
    model = cast_model(network(), torch.bfloat16)
    optimizer = timm_optim.create_optimizer_v2(model, "fusedtricks", **OPTIONS)
    twin = cast_model(deepcopy(model), torch.float32)
    ema = make(twin)
    name = "fc.weight"
    expected = dict(twin.named_parameters())[name].detach().double()
    for images, targets in batches(3):
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = fp32_state_dict(model, optimizer)
        twin.load_state_dict(state)
        ema.update(twin)
        expected = 0.9 * expected + 0.1 * state[name].double()
    average = dict(ema.module.named_parameters())[name].detach()
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-8)
    assert ema(batches(1)[0][0]).dtype == torch.float32


def test_a_run_resumed_from_timms_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, FusedSGD]:
        model = cast_model(network(), torch.float16)
        return model, timm_optim.create_optimizer_v2(model, "fusedtricks", loss_scale="dynamic", **OPTIONS)

    def go(model: nn.Module, optimizer: FusedSGD, part: list[tuple[Tensor, Tensor]]) -> None:
        for images, targets in part:
            optimizer.scale(nn.functional.cross_entropy(model(images), targets)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    go(model, optimizer, batches(4)[:2])
    saver = timm_utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    go(model, optimizer, batches(4)[2:])
    resumed, other = start()
    timm.models.resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), other, log_info=False)
    go(resumed, other, batches(4)[2:])
    assert_all_same_bits(resumed.parameters(), model.parameters())
    for theirs, ours in zip(other.state.values(), optimizer.state.values(), strict=True):
        for key, value in theirs.items():
            assert_same_bits(value, ours[key], key)
    assert other.stats() == optimizer.stats()
