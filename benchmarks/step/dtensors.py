"""The optimizer step over the `DTensor`s of FSDP2, beside the same step over plain tensors.

`python -m benchmarks.step.dtensors` shards many small parameters by `fully_shard` over gloo processes of one thread
each. Each step has new gradients from a backward pass, which is not timed. Before a timed step the processes meet, so
that none waits for the backward pass of another; a step with a loss scale or clipping still waits for their decision.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import fused_tricks
from benchmarks.lib import command_line, machine, report
from benchmarks.lib.harness import Contestant, Spread, interleave, ratios
from benchmarks.lib.names import OURS

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"lr": 0.125, "momentum": 0.9, "weight_decay": 0.5}
MAX_NORM = 1.0
# The default scale does not fit FP16, in which these models compute their loss.
SCALE = 1024.0
CHECKED_STEPS = 3
REPEATS = 10
"""The steps back to back, with the same gradients."""
TOLERANCE = 0.01
FOREACH, FOR_LOOP = "torch.optim.SGD, foreach", "torch.optim.SGD, for-loop"


@dataclass(frozen=True)
class Way:
    """A way to update the parameters.

    Attributes:
        name: The name in the table.
        make: Builds the optimizer over parameters.
        dtype: The dtype of the weights.
        clips: True if the step clips by the global norm.
    """

    name: str
    make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32
    clips: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def _sgd(**form: bool) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **OPTIONS, **form)


def _ours(*, scales: bool = True, **options: Any) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    def make(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        scale = fused_tricks.DynamicLossScale(init_scale=SCALE) if scales else None
        return fused_tricks.FusedSGD(parameters, **OPTIONS, bias_decay=True, loss_scale=scale, **options)

    return make


WAYS = (
    Way(OURS, _ours(scales=False)),
    Way(f"{OURS}, loss scale", _ours()),
    Way(f"{OURS}, loss scale, clipping", _ours(max_grad_norm=MAX_NORM), clips=True),
    Way(f"{OURS}, FP16, loss scale", _ours(), torch.float16),
    Way(FOREACH, _sgd(foreach=True)),
    Way(f"{FOREACH}, clipping", _sgd(foreach=True), clips=True),
    Way(FOR_LOOP, _sgd(foreach=False)),
    Way(f"{FOR_LOOP}, clipping", _sgd(foreach=False), clips=True),
    Way("torch.optim.SGD, fused", _sgd(fused=True)),
)
"""The ways. Without and with clipping, the for-loop is the reference of the check."""


class Products(nn.Module):
    """Parameters whose gradients are the inputs, and 0 on average."""

    def __init__(self, count: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.randn(count, size, size, generator=torch.Generator().manual_seed(0)).half().to(dtype)
        self.weights = nn.ParameterList(value.clone() for value in values)

    def forward(self, inputs: Tensor) -> Tensor:
        return sum(((weight * values).sum() for weight, values in zip(self.weights, inputs)), torch.zeros(()))


class Training:
    """The training of one way."""

    def __init__(self, way: Way, count: int, size: int, *, sharded: bool) -> None:
        self.way = way
        self._model = Products(count, size, way.dtype)
        self._shape = (count, size, size)
        self._dice = torch.Generator().manual_seed(1)
        if sharded:
            fully_shard(self._model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.parameters = list(self._model.parameters())
        self._optimizer = way.make(self.parameters)

    def prepare(self) -> None:
        """Sets new gradients by a backward pass."""
        self._optimizer.zero_grad()
        # 8 bits, so that FP16 gradients and their sums over the processes are exact.
        inputs = torch.randint(-128, 128, self._shape, generator=self._dice) / 1024
        loss = self._model(inputs.to(self.way.dtype))
        if self.way.is_ours:
            assert isinstance(self._optimizer, fused_tricks.FusedSGD)
            loss = self._optimizer.scale(loss.float()) if self._optimizer.loss_scale is not None else loss
        loss.backward()

    def step(self) -> None:
        """Takes a step, and clips before it where the optimizer does not."""
        if self.way.clips and not self.way.is_ours:
            # torch's default for DTensors is the slower form.
            foreach = self.way.name.startswith(FOREACH)
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=foreach)
        self._optimizer.step()

    def weights(self) -> Tensor:
        """Returns the local weights in full precision."""
        held = self._optimizer.state
        full = [held[parameter].get("master_param", parameter) for parameter in self.parameters]
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in full]
        return torch.cat([tensor.detach().float().flatten() for tensor in local])


def checked(trainings: Sequence[Training]) -> tuple[dict[str, str], dict[str, str]]:
    """Takes the first steps of all ways and compares their weights with those of the for-loop.

    Returns:
        The outcome of each way that may be timed; the reason for each of the others.
    """
    outcomes, refused = {}, {}
    for training in trainings:
        try:
            for _ in range(CHECKED_STEPS):
                training.prepare()
                training.step()
        except RuntimeError as error:
            refused[training.way.name] = command_line.first_line(error)
    references = {
        training.way.clips: training.weights()
        for training in trainings
        if training.way.name.startswith(FOR_LOOP)
    }
    for training in trainings:
        name = training.way.name
        if name in refused:
            continue
        expected = references[training.way.clips]
        difference = float((training.weights() - expected).abs().max()) if expected.numel() else 0.0
        must_be_equal = name in (OURS, f"{OURS}, loss scale")
        # A comparison with NaN is false, so a way of NaN weights is refused.
        if not difference <= (0 if must_be_equal else TOLERANCE):
            refused[name] = f"check failed: differs by {difference:.0e} from the for-loop"
        else:
            outcomes[name] = "every bit" if difference == 0 else f"{difference:.0e}"
    return outcomes, refused


def measure(options: argparse.Namespace, *, sharded: bool) -> dict[str, Any]:
    """Returns the microseconds of every way in this process, and the ratios to foreach."""
    trainings = [Training(way, options.tensors, options.size, sharded=sharded) for way in WAYS]
    outcomes, refused = checked(trainings)
    timed = [training for training in trainings if training.way.name in outcomes]
    contestants = [Contestant(training.way.name, training.step, training.prepare) for training in timed]
    samples = interleave(
        contestants,
        rounds=options.rounds,
        warmup=3,
        device=CPU,
        between=dist.barrier if sharded else lambda: None,
    )
    repeated = interleave(contestants, rounds=options.rounds // 4 + 1, warmup=1, device=CPU, repeats=REPEATS)
    new, same = (
        {name: [1e6 * section.host for section in sections] for name, sections in found.items()}
        for found in (samples, repeated)
    )
    rows = {
        training.way.name: {
            "us": asdict(Spread.of(new[training.way.name])),
            "of_foreach": asdict(ratios(new[training.way.name], new[_foreach_of(training.way)])),
            "back_to_back_us": asdict(Spread.of(same[training.way.name])),
            "check": outcomes[training.way.name],
        }
        for training in timed
    }
    return {"rows": rows, "not_measured": refused}


def _foreach_of(way: Way) -> str:
    return f"{FOREACH}, clipping" if way.clips else FOREACH


def _process(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=Path(folder, "store").as_uri(), rank=rank, world_size=processes
    )
    found = measure(options, sharded=True)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_in(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what `measure` returns in the first of several processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (processes, folder, copy.copy(options)), nprocs=processes)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def markdown(result: dict[str, Any]) -> str:
    """Returns the page of the result."""
    parts = []
    for setting, found in result["settings"].items():
        rows = [
            [
                name,
                Spread(**row["us"]).text(0),
                f"{Spread(**row['of_foreach']).median:.2f}",
                Spread(**row["back_to_back_us"]).text(0),
                row["check"],
            ]
            for name, row in found["rows"].items()
        ]
        parts.append(f"## {setting}")
        parts.append(
            report.table(
                ["way", "µs (quartiles)", "of foreach", "µs back to back", "difference from the for-loop"],
                rows,
            )
        )
        parts += [f"*{name}* is not measured: {reason}" for name, reason in found["not_measured"].items()]
    return (
        "\n\n".join(
            [
                "# The step on DTensors",
                f"A step over {result['tensors']} parameters of {result['size']} × {result['size']} elements on a CPU, "
                "in processes of one thread. *Of foreach*: its time over that of foreach, with clipping over foreach "
                "with clipping, median of the ratios of a round. New gradients before each step come from a backward "
                f"pass, which is not timed, and leaves cold caches. *Back to back*: {REPEATS} steps with the same "
                f"gradients, whose caches are warm. The weights are compared after {CHECKED_STEPS} steps. In several "
                "processes, the first one reports. A step with a loss scale or clipping contains an all-reduce, so it "
                "waits for the slowest process.",
                *parts,
                report.machine_note(result["machine"]),
            ]
        )
        + "\n"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step.dtensors",
        description="Times the optimizer step over the DTensors of FSDP2 on a CPU.",
    )
    parser.add_argument("--tensors", type=command_line.positive, default=161)
    parser.add_argument("--size", type=command_line.positive, default=8, help="rows and columns of a tensor")
    parser.add_argument("--rounds", type=command_line.positive, default=100)
    parser.add_argument("--processes", type=command_line.positive, nargs="+", default=[1, 2])
    report.add_output_to(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measures all settings and writes step_dtensors.json and step_dtensors.md."""
    options = parse(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = machine.describe("benchmarks.step.dtensors", arguments, CPU)
        settings = {"Plain tensors, 1 process": measure(options, sharded=False)}
    finally:
        torch.set_num_threads(threads)
    for processes in options.processes:
        name = f"DTensors, {processes} process{'es' if processes > 1 else ''}"
        settings[name] = measure_in(processes, options)
    result = {
        "benchmark": "step_dtensors",
        "machine": record,
        "tensors": options.tensors,
        "size": options.size,
        "settings": settings,
    }
    report.write(options.output, result, markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
