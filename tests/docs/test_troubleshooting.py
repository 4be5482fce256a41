"""docs/troubleshooting.md: each message is raised by torch or the package, and the code of the page mends the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import fused_tricks as ft
from fused_tricks import FusedSGD, WarmupCosineLR
from support.mistakes import PROBLEMS, Convolution, Mixing, Names, Overflowing, half, loss_of, names_of
from support.networks import Network

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def sections(text: str, level: int) -> dict[str, str]:
    """The text of each heading of this level."""
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code_of(heading: str) -> list[str]:
    text = sections(PAGE, 3).get(heading, "").partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run(block: str, names: Names) -> None:
    """Runs code of the page. A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(block, "docs/troubleshooting.md", "exec"), names)


def parameter_of(heading: str) -> Any:
    reason = "only a CUDA device raises this message, and torch sees none"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)]
    return pytest.param(heading, marks=marks if "torch.cuda" in heading else [], id=heading)


def every(headings: Iterable[str]) -> Any:
    return pytest.mark.parametrize("heading", [parameter_of(heading) for heading in headings])


def test_every_message_of_the_page_is_raised_here():
    *kinds, last = sections(PAGE, 2).values()
    assert [heading for text in kinds for heading in sections(text, 3)] == list(PROBLEMS)
    assert list(sections(last, 3)) == [
        "Why was this step skipped?",
        "The loss scale falls to 1",
        "The loss is NaN from the first step",
    ]


@every(PROBLEMS)
def test_a_heading_is_the_message_or_its_beginning(heading):
    cause, model = PROBLEMS[heading]
    names = names_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, ValueError, AssertionError, UserWarning)) as caught:
            cause(names)
    # The page names the older form.
    assert str(caught.value).replace("at::Half", "c10::Half").startswith(heading)


SILENT = {
    "Why was this step skipped?": Network,
    "The loss scale falls to 1": Overflowing,
    "The loss is NaN from the first step": Network,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    heading: model for heading, (_, model) in PROBLEMS.items()
} | SILENT
LOOPS = [
    heading
    for heading in MODELS
    if any("for images" in block or "for index" in block for block in code_of(heading))
]


@every(MODELS)
def test_every_section_has_code(heading):
    assert code_of(heading)


@every(LOOPS)
def test_the_loop_of_a_section_trains_the_model(heading):
    names = names_of(MODELS[heading])
    before = {name: t.detach().clone() for name, t in names["model"].named_parameters()}
    for block in code_of(heading):
        run(block, names)
        assert names["optimizer"].stats().applied_steps >= 4
    for name, param in names["model"].named_parameters():
        assert param.isfinite().all(), name
        if param.dim() > 1:
            assert not torch.equal(param.float(), before[name]), name


@pytest.mark.parametrize(
    "heading",
    [
        "mat1 and mat2 must have the same dtype, but got Float and Half",
        "expected m1 and m2 to have the same dtype, but got: float != c10::Half",
        "Input type (torch.FloatTensor) and weight type (torch.HalfTensor) should be the same",
        "Found dtype Float but expected Half",
    ],
)
def test_a_cast_model_takes_fp32_inputs_and_targets(heading):
    names = names_of(MODELS[heading])
    (block,) = code_of(heading)
    run(block, names)
    names["loss"].backward()
    assert names["loss"].dtype == torch.float32
    assert names["model"].fc.weight.grad.dtype == torch.float16


@every([heading for heading in PROBLEMS if "torch.cuda" in heading])
def test_a_cast_model_takes_fp32_inputs_on_a_gpu(heading):
    names = names_of(Convolution)
    (block,) = code_of(heading)
    run(block, names)
    assert names["loss"].isfinite()


def test_a_part_of_a_model_that_is_cast_takes_fp32_inputs():
    names = names_of(Convolution)
    names["images"] = names["images"][:, None]
    (block,) = code_of("Input type (float) and bias type (c10::Half) should be the same")
    run(block, names)
    assert names["model"].body.weight.dtype == torch.float16
    assert names["features"].dtype == torch.float32


def test_the_casts_run_in_a_call_of_the_model_only():
    model = ft.cast_model(Convolution(), torch.float16)
    images = names_of()["images"]
    assert model(images).isfinite().all()
    with pytest.raises(RuntimeError, match="should be the same"):
        model.body(images[:, None])


def test_a_forward_pass_takes_the_dtype_from_a_tensor_that_is_there():
    names = names_of(Mixing)
    expected = names["model"](names["images"])
    (block,) = code_of("expected scalar type Half but found Float")
    run(block, names)
    cast = type("Mixed", (Mixing,), {"forward": names["forward"]})()
    cast.load_state_dict(names["model"].state_dict())
    torch.testing.assert_close(
        ft.cast_model(cast, torch.float16)(names["images"]), expected, rtol=1e-2, atol=1e-2
    )


def test_a_mask_takes_the_limit_of_its_dtype():
    names = names_of()
    (block,) = code_of("value cannot be converted to type c10::Half without overflow")
    run(block, names)
    assert torch.equal(names["scores"].softmax(1) == 0, names["mask"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, FusedSGD])
def test_unscaling_fp16_gradients_is_refused_with_every_optimizer(kind):
    names = half(names_of())
    optimizer, scaler = kind(names["model"].parameters(), lr=0.1), names["scaler"]
    scaler.scale(loss_of(names)).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_without_gradients_it_is_the_update_of_grad_scaler_that_fails_for_this_optimizer():
    names = names_of()
    scaler = names["scaler"]
    scaler.scale(loss_of(names)).backward()
    scaler.step(FusedSGD(Network().parameters(), lr=0.1))
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()


def test_a_schedule_of_the_page_does_not_run_ahead_of_skipped_steps():
    names = names_of(lambda: nn.Linear(6, 3))
    names["loader"][0][0].fill_(torch.inf)
    (block,) = code_of("Detected call of `lr_scheduler.step()` before `optimizer.step()`.")
    run(block, names)
    steps = len(names["loader"])
    stats = names["optimizer"].stats()
    assert stats.skipped_steps >= 1
    expected = WarmupCosineLR(
        FusedSGD([Parameter(torch.zeros(1))], lr=0.1), total_steps=90 * steps, warmup_steps=5 * steps
    )
    for _ in range(stats.applied_steps):
        expected.optimizer.step()
        expected.step()
    assert names["schedule"].get_last_lr() == expected.get_last_lr()


def findings(output: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in output.splitlines())


def broken_inputs(names: Names) -> None:
    names["images"][0, 0] = torch.nan


def broken_weights(names: Names) -> None:
    names["model"].body.weight.data[0, 0] = torch.nan


def broken_statistics(names: Names) -> None:
    names["model"](torch.full((4, 6), torch.inf))
    names["model"].norm.eval()


def broken_forward(names: Names) -> None:
    names["model"] = ft.cast_model(Overflowing(), torch.float16)


CAUSES: dict[str, tuple[Callable[[Names], None], dict[str, str]]] = {
    "inputs": (broken_inputs, {"inputs": "False"}),
    "weights": (
        broken_weights,
        {
            "inputs": "True",
            "weights and buffers": "['body.weight', 'norm.running_mean', 'norm.running_var']",
        },
    ),
    "statistics": (
        broken_statistics,
        {"inputs": "True", "weights and buffers": "['norm.running_mean', 'norm.running_var']"},
    ),
    "forward": (broken_forward, {"loss": "nan", "inputs": "True", "weights and buffers": "[]"}),
}


def found_by_the_page(names: Names, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Runs the lines for skipped steps after a backward pass, and returns what they print."""
    names["optimizer"] = FusedSGD(names["model"].named_parameters(), lr=0.1, loss_scale=1.0)
    names["loss"] = loss_of(names)
    names["optimizer"].scale(names["loss"]).backward()
    (block,) = code_of("the last 25 optimizer steps were skipped")
    run(block, names)
    return findings(capsys.readouterr().out)


@pytest.mark.parametrize("cause", CAUSES)
def test_the_lines_for_skipped_steps_tell_the_causes_apart(cause, capsys):
    breaks, expected = CAUSES[cause]
    names = names_of()
    breaks(names)
    found = found_by_the_page(names, capsys)
    assert {name: found[name] for name in expected} == expected
    assert "body.weight" in found["gradients"]


def test_a_gradient_of_the_norm_at_zero_is_the_cause_where_all_else_is_finite(capsys):
    names = names_of()
    names["criterion"] = lambda outputs, labels: (outputs * 0).square().sum().sqrt()
    found = found_by_the_page(names, capsys)
    assert found["loss"] == "0.0" and found["inputs"] == "True" and found["weights and buffers"] == "[]"
    assert "fc.weight" in found["gradients"]


def test_a_loop_prints_the_parameters_for_which_a_step_was_skipped(capsys):
    names = names_of()
    names["model"].fc.weight.register_hook(lambda grad: grad * torch.inf)
    (block,) = code_of("Why was this step skipped?")
    run(block, names)
    assert capsys.readouterr().out.splitlines() == ["['fc.weight']"] * len(names["loader"])


def test_an_overflow_is_carried_to_the_layers_before_it():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[2].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * torch.inf,))
    model(torch.ones(2, 4)).sum().backward()
    optimizer = FusedSGD(model.named_parameters(), lr=0.1)
    assert optimizer.find_overflow() == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "kind, options, is_finite",
    [
        (torch.optim.SGD, {"fused": True}, False),
        (torch.optim.SGD, {"fused": False}, True),
        (FusedSGD, {}, True),
    ],
    ids=["SGD(fused=True)", "SGD(fused=False)", "FusedSGD"],
)
def test_an_overflow_in_the_first_step_leaves_nan_in_the_fused_sgd_of_torch_only(
    filled_memory, kind, options, is_finite
):
    param = Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.1, momentum=0.9, **options)
    scaler = torch.amp.GradScaler("cpu")
    for value in (torch.inf, 1.0):
        scaler.scale(torch.ones(()))
        param.grad = torch.full_like(param, value)
        scaler.step(optimizer)
        scaler.update()
    assert bool(param.isfinite().all()) == is_finite


def test_a_layer_that_overflows_lowers_the_scale_to_its_floor_and_that_of_grad_scaler_to_zero():
    names = names_of(Overflowing)
    model = ft.cast_model(names["model"], torch.float16)
    ours = FusedSGD(model.named_parameters(), lr=0.1, loss_scale="dynamic", backend="reference")
    unscaled, scaler = FusedSGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with pytest.warns(UserWarning, match="were skipped with the loss scale at its floor of 1"):
        for _ in range(16 + 25):
            ours.zero_grad()
            ours.scale(loss_of(names)).backward()
            ours.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            scaler.scale(torch.ones(()))
            scaler.step(unscaled)
            scaler.update()
    assert (ours.stats().scale, scaler.get_scale()) == (1.0, 0.0)
    assert ours.stats().applied_steps == 0
