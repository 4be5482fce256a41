"""The training example: its command line, and what each option changes."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn", reason="the example takes its smallest data set from scikit-learn")
pytest.importorskip("torchvision", reason="the example takes its networks from torchvision")
pytest.importorskip("tqdm", reason="the example shows its progress with tqdm")

from PIL import Image
from torchvision import models

import train
from fused_tricks import DynamicLossScale, FusedSGD, zero_gamma_names
from fused_tricks.schedule.curve import WarmupCosine
from support.comparison import assert_all_same_bits, assert_same_bits

pytestmark = pytest.mark.slow

SCRIPT = Path(train.__file__)
DIGITS = ["--dataset", "digits", "--device", "cpu", "--workers", "0"]
SMALL = [*DIGITS, "--model", "squeezenet1_1"]


def test_torchrun_trains_two_epochs_and_exports_weights_in_fp32(tmp_path: Path) -> None:
    options = ["--batch-size", "128", "--epochs", "2", "--ema", "0.9", "--output", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run([*torchrun, str(SCRIPT), *SMALL, *options], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(": test accuracy ") == 2
    assert finished.stdout.count(", test accuracy of the average ") == 2
    for name in ("weights", "weights_ema"):
        weights = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        models.squeezenet1_1(num_classes=10).load_state_dict(weights)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2 * (1437 // 256)


def test_help_tells_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), mock.patch.dict("os.environ", COLUMNS="200"):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    # The others have none, or one that depends on something else.
    assert shown.count("(default: ") == len(vars(train.parse([]))) - len({"data", "tensorboard"})


def test_help_needs_none_of_the_packages_of_a_run() -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['torchvision', 'tqdm', 'mlxtend', 'fused_tricks']))\n"
        f"sys.path[0], sys.argv = {str(SCRIPT.parent)!r}, [{str(SCRIPT)!r}, '--help']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0 and "--bias-decay" in finished.stdout


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (["tqdm"], "tqdm"),
        (["torchvision", "tqdm"], "torchvision and tqdm"),
        (["fused_tricks"], "fused_tricks"),
        (["sklearn"], "sklearn"),
        (["torch"], "torch"),
    ],
    ids=str,
)
def test_a_run_without_a_package_says_in_one_line_what_to_install(
    monkeypatch: pytest.MonkeyPatch, modules: list[str], named: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *DIGITS])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == (
        f'examples/train.py needs {named}, which is not installed: pip install ".[examples]" in the checkout'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--lr", "-1"], "argument --lr: must be at least 0, got -1"),
        (["--lr", "nan"], "argument --lr: must be at least 0, got nan"),
        (["--momentum", "2"], "argument --momentum: must be from 0 to 1, got 2"),
        (["--momentum", "0"], "--momentum 0 requires --no-nesterov"),
        (["--label-smoothing", "1.5"], "argument --label-smoothing: must be from 0 to 1, got 1.5"),
        (["--mixup", "inf"], "argument --mixup: must be at least 0, got inf"),
        (["--ema", "1.5"], "argument --ema: must be from 0 to 1, got 1.5"),
        (["--max-grad-norm", "0"], "argument --max-grad-norm: must be at least 1e-06, got 0"),
        (["--image-size", "28"], "argument --image-size: must be at least 32, got 28"),
        (["--warmup-epochs", "5"], "--warmup-epochs 5 must be less than --epochs 5"),
        (["--low-precision", "float8"], "argument --low-precision: invalid choice: 'float8'"),
        (["--periods", "2"], "--periods requires --schedule restarts or step"),
        (["--dataset", "cifar10"], "--data is required for cifar10 and imagefolder"),
        (["--data", "somewhere"], "--data is required for cifar10 and imagefolder"),
    ],
    ids=str,
)
def test_a_command_line_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        train.parse([*DIGITS, *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gpu_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("torch.cuda.is_available", return_value=False), pytest.raises(SystemExit):
        train.parse(["--device", "cuda"])
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu", "chosen"), [(True, ("cuda", "float16")), (False, ("cpu", "bfloat16"))])
def test_the_precision_goes_by_the_device(gpu: bool, chosen: tuple[str, str]) -> None:
    with mock.patch("torch.cuda.is_available", return_value=gpu):
        options = train.parse([])
    assert (options.device, options.low_precision) == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet17"], "--model resnet17 is not in torchvision.models.list_models"),
        (["--resnet-d"], "--resnet-d requires a ResNet of torchvision, got squeezenet1_1"),
        (["--zero-gamma"], "--zero-gamma: SqueezeNet has no norm"),
        (["--batch-size", "2000"], "--batch-size: a step takes 2000 images, and there are 1437"),
        (["--dataset", "cifar10", "--data", "nowhere"], "--data nowhere: Dataset not found"),
        (["--dataset", "imagefolder", "--data", "nowhere"], "--data nowhere: .*nowhere/train"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train.main([*SMALL, "--output", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())


DEFAULTS = {
    "lr": 0.1 * 64 / 256,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "nesterov": True,
    "bias_decay": False,
    "max_grad_norm": math.inf,
    "ema_decay": None,
    "ema_warmup": False,
    "dynamic": False,
}


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ([], {}),
        (["--lr", "0.2"], {"lr": 0.2 * 64 / 256}),
        (["--batch-size", "256"], {"lr": 0.1}),
        (["--no-linear-scaling"], {"lr": 0.1}),
        (["--momentum", "0.5"], {"momentum": 0.5}),
        (["--weight-decay", "0.1"], {"weight_decay": 0.1}),
        (["--no-nesterov"], {"nesterov": False}),
        (["--bias-decay"], {"bias_decay": True}),
        (["--ema", "0.99"], {"ema_decay": 0.99, "ema_warmup": True}),
        (["--max-grad-norm", "2"], {"max_grad_norm": 2}),
        (["--low-precision", "float16"], {"dynamic": True}),
        (["--low-precision", "none"], {}),
    ],
    ids=str,
)
def test_an_option_of_the_optimizer_changes_that_and_nothing_else(
    arguments: list[str], change: dict[str, Any]
) -> None:
    optimizer = train.build_optimizer(train.parse([*DIGITS, *arguments]), nn.Linear(2, 2))
    (group,) = optimizer.param_groups
    found = {name: group[name] for name in DEFAULTS if name in group}
    found["max_grad_norm"] = optimizer.max_grad_norm
    found["dynamic"] = isinstance(optimizer.loss_scale, DynamicLossScale)
    assert found == DEFAULTS | change


@pytest.mark.parametrize(
    ("arguments", "curve"),
    [
        ([], WarmupCosine(50, 10)),
        (["--warmup-epochs", "0"], WarmupCosine(50)),
        (["--epochs", "7", "--warmup-epochs", "3"], WarmupCosine(70, 30)),
        (["--schedule", "restarts"], WarmupCosine(50, 10, T_0=14)),
        (["--schedule", "restarts", "--periods", "2"], WarmupCosine(50, 10, T_0=20)),
    ],
    ids=str,
)
def test_the_schedule_is_a_cosine_or_several_after_a_warm_up(
    arguments: list[str], curve: WarmupCosine
) -> None:
    optimizer = FusedSGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = train.build_schedule(train.parse([*DIGITS, *arguments]), optimizer, steps_per_epoch=10)
    assert schedule.curve == curve


def test_the_schedule_in_steps_has_a_tenth_of_the_rate_in_each_period() -> None:
    optimizer = FusedSGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = train.build_schedule(
        train.parse([*DIGITS, "--schedule", "step"]), optimizer, steps_per_epoch=10
    )
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [(t + 1) / 10 for t in range(10)] + [1.0] * 14 + [0.1] * 14 + [0.01] * 12
    assert rates == pytest.approx(expected, rel=1e-15)


def model_of(*arguments: str) -> nn.Module:
    torch.manual_seed(0)
    return train.build_model(train.parse([*DIGITS, *arguments]), classes=10)


@pytest.mark.parametrize(
    ("arguments", "gamma"), [([], 0), (["--zero-gamma"], 0), (["--no-zero-gamma"], 1)], ids=str
)
def test_residual_branches_begin_with_a_gamma_of_zero(arguments: list[str], gamma: float) -> None:
    model = model_of("--model", "mobilenet_v3_small", *arguments)
    names = zero_gamma_names(model)
    assert len(names) == 6
    assert all((model.get_submodule(name).weight == gamma).all() for name in names)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("none", torch.float32)],
)
def test_weights_are_in_low_precision_and_norms_in_fp32(precision: str, dtype: torch.dtype) -> None:
    model = model_of("--model", "mobilenet_v3_small", "--low-precision", precision)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.dtype == dtype
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.dtype == torch.float32


def test_without_its_options_the_model_is_torchvisions() -> None:
    model = model_of("--no-resnet-d", "--no-zero-gamma", "--low-precision", "none")
    torch.manual_seed(0)
    expected = models.resnet18(num_classes=10)
    assert str(model) == str(expected)
    assert_all_same_bits(model.state_dict().values(), expected.state_dict().values())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_d_is_timms(name: str) -> None:
    timm = pytest.importorskip("timm", reason="the reference is timm's ResNet-D")
    model = model_of("--model", name, "--low-precision", "none", "--no-zero-gamma")
    reference = timm.create_model(f"{name}d", num_classes=10).to(memory_format=torch.channels_last)
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 75, 75)
    assert_same_bits(model.eval()(images), reference.eval()(images))


def trainer_of(*arguments: str) -> train.Trainer:
    return train.Trainer(train.parse([*SMALL, *arguments]), classes=10, steps_per_epoch=10, world=1)


@pytest.mark.parametrize(
    ("arguments", "smoothing"),
    [([], 0.1), (["--label-smoothing", "0"], 0), (["--label-smoothing", "0.3"], 0.3)],
)
def test_labels_are_smoothed(arguments: list[str], smoothing: float) -> None:
    assert trainer_of(*arguments).criterion.label_smoothing == smoothing


@pytest.mark.parametrize("arguments", [[], ["--mixup", "1"], ["--mixup", "0"]], ids=str)
def test_images_and_labels_are_mixed_by_the_same_share(arguments: list[str]) -> None:
    trainer = trainer_of("--low-precision", "none", *arguments)
    trainer.criterion = mock.Mock(wraps=trainer.criterion)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    trainer.train(images, labels)
    trained_on = trainer.criterion.call_args.args[1]
    if "0" in arguments:
        assert_same_bits(trained_on, labels)
        assert_same_bits(seen[0], images)
    else:
        share = trained_on[0, 0]
        assert 0 < share < 1
        torch.testing.assert_close(seen[0], share * images + (1 - share) * images.roll(1, 0))
        torch.testing.assert_close(trained_on[1], torch.tensor([1 - share, share] + [0.0] * 8))


def test_batches_are_permutations_shared_by_the_processes_and_can_begin_anywhere() -> None:
    def batches(first: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
        return list(train.batches(50, 12, range(first, 12), seed=3, rank=rank, world=world))

    whole = batches(0, 0, 1)
    for epoch in range(3):
        keys = [key for batch in whole[4 * epoch : 4 * epoch + 4] for key in batch]
        assert len(set(keys)) == 48
        assert all(number == epoch and 0 <= index < 50 for number, index in keys)
    assert len({tuple(index for _, index in whole[4 * epoch]) for epoch in range(3)}) == 3
    shares = [batches(0, rank, 3) for rank in range(3)]
    assert all(sorted(chain(*parts)) == sorted(batch) for *parts, batch in zip(*shares, whole))
    assert all(batches(first, 1, 3) == shares[1][first:] for first in range(12))


def test_an_image_is_augmented_anew_in_each_epoch_and_alike_whenever_it_is_loaded() -> None:
    images, for_test, classes = train.load_images(train.parse(DIGITS))
    assert (len(images), len(for_test), classes) == (1437, 360, 10)
    first, label = images[0, 7]
    torch.rand(5)
    assert_same_bits(images[0, 7][0], first)
    assert not torch.equal(images[1, 7][0], first)
    assert images[1, 7][1] == label
    assert_same_bits(for_test[0, 7][0], for_test[1, 7][0])


def draw_folders(folder: Path, parts: dict[str, list[str]]) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, names in parts.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{number}.png")


def test_folders_of_images_are_read(tmp_path: Path) -> None:
    draw_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    options = train.parse(["--dataset", "imagefolder", "--data", str(tmp_path), "--image-size", "48"])
    images, for_test, classes = train.load_images(options)
    assert (len(images), len(for_test), classes) == (4, 4, 2)
    for key, label in (((0, 0), 0), ((1, 3), 1)):
        for image, found in (images[key], for_test[key]):
            assert (image.shape, image.dtype, found) == ((3, 48, 48), torch.float32, label)


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    draw_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "cow"]})
    options = train.parse(["--dataset", "imagefolder", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="train and val must have folders of the same names"):
        train.load_images(options)


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    trainer_of("--lr", "0.1").save(checkpoint)
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is from a run with lr 0\.1, and this run has 0\.2"):
        trainer_of("--lr", "0.2").load(checkpoint)


def test_a_run_may_go_on_with_other_options_that_do_not_change_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    trainer = trainer_of()
    trainer.step = 7
    trainer.save(checkpoint)
    resumed = trainer_of(
        "--workers", "3", "--log-every", "2", "--checkpoint-every", "9", "--output", "elsewhere"
    )
    resumed.load(checkpoint)
    assert resumed.step == 7


def test_the_average_is_evaluated_and_saved_beside_the_weights(tmp_path: Path) -> None:
    command = [*SMALL, "--batch-size", "479", "--epochs", "2", "--ema", "0.5", "--output", str(tmp_path)]
    evaluated = []

    def accuracy(model: nn.Module, *others: Any) -> float:
        evaluated.append([param.detach().clone() for param in model.parameters()])
        return 0.0

    with mock.patch.object(train, "accuracy", accuracy):
        trained = train.main(command)
    optimizer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    *_, weights, averages = evaluated
    for index, name in enumerate(trained["weights"]):
        state = optimizer["state"][index]
        for key, shown, of in (
            ("master_param", weights, trained["weights"]),
            ("ema_param", averages, trained["weights_ema"]),
        ):
            assert_same_bits(of[name], state[key])
            assert_same_bits(shown[index], state[key].to(shown[index].dtype))
    assert not torch.equal(weights[0], averages[0])


def test_curves_of_a_run_that_was_killed_have_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="it reads what was written for it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [*SMALL, "--batch-size", "479", "--epochs", "2", "--log-every", "1", "--output", str(tmp_path)]
    command += ["--tensorboard", str(tmp_path / "curves")]
    step = train.Trainer.train

    def step_or_die(trainer: train.Trainer, *batch: Tensor) -> None:
        if trainer.step == 5:
            raise KeyboardInterrupt
        step(trainer, *batch)

    with mock.patch.object(train.Trainer, "train", step_or_die), pytest.raises(KeyboardInterrupt):
        train.main(command)
    train.main(command)
    curves = EventAccumulator(str(tmp_path / "curves"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in curves.Scalars("test accuracy")] == [3, 6]
    assert {"learning rate", "gradient norm", "skipped steps"} <= set(curves.Tags()["scalars"])


def test_curves_need_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(train, "find_spec", return_value=None), pytest.raises(SystemExit):
        train.parse(["--tensorboard", "curves"])
    message = "--tensorboard requires a package that is not installed: pip install tensorboard"
    assert message in capsys.readouterr().err
