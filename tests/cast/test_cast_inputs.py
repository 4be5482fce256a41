"""`cast_model`: the casts of inputs and outputs, within any nesting."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks.cast import cast_model

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Echo(nn.Module):
    """A module that returns its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass(frozen=True)
class Batch:
    image: Tensor
    label: Tensor


@dataclasses.dataclass
class Unfinished:
    image: Tensor
    label: Tensor = dataclasses.field(init=False)

    def __repr__(self) -> str:
        return str(vars(self))


@dataclasses.dataclass(eq=False)
class ModelOutput(OrderedDict[str, Any]):
    """A dict with an item for each field that has a value, as the outputs of Hugging Face's models."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __repr__(self) -> str:
        return f"{list(self.items())} {self.loss} {self.logits}"


class Images(list[Tensor]):
    """A subclass of list."""


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: (t, [t, (t,)]),
        lambda t: {"a": {"b": t}},
        lambda t: OrderedDict(a=t),
        lambda t: defaultdict(list, a=[t]),
        lambda t: Pair(t, t),
        lambda t: Batch(t, t),
        lambda t: Unfinished(t),
        lambda t: ModelOutput(logits=t),
        lambda t: Images([t]),
        lambda t: UserDict(a=t),
        lambda t: nn.utils.rnn.pack_sequence([t, t]),
        lambda t: torch.max(t, 0),
    ],
)
def test_inputs_are_cast_within_any_nesting_and_keep_their_types(make: Callable[[Tensor], Any]) -> None:
    model = cast_model(nn.Sequential(Echo()), FP16, output_dtype=None)
    t = torch.tensor([[1.0, 2.0]])
    (given,), _ = model(make(t))
    expected = make(t.half())
    assert type(given) is type(expected)
    assert str(given) == str(expected)


def test_keyword_arguments_are_cast() -> None:
    args, kwargs = cast_model(Echo(), BF16, output_dtype=None)(torch.ones(2), mask=torch.ones(2))
    assert args[0].dtype == kwargs["mask"].dtype == BF16


def test_fp64_is_cast_and_everything_that_is_not_floating_passes_as_it_is() -> None:
    passed = [
        torch.arange(3),
        torch.tensor([True]),
        torch.ones(2, dtype=torch.complex64),
        None,
        "text",
        1.5,
        object(),
    ]
    args, _ = cast_model(Echo(), FP16, output_dtype=None)(torch.ones(2, dtype=torch.float64), *passed)
    assert args[0].dtype == FP16
    assert all(a is b for a, b in zip(args[1:], passed, strict=True))


def test_a_tensor_passed_several_times_stays_one_tensor() -> None:
    x = torch.ones(2)
    (first, second, third), _ = cast_model(Echo(), FP16, output_dtype=None)(x, x, torch.ones(2))
    assert first is second and first is not third


def test_the_callers_containers_are_left_alone() -> None:
    batch = {"image": torch.ones(2), "more": [torch.ones(2)]}
    cast_model(Echo(), FP16)(batch)
    assert batch["image"].dtype == batch["more"][0].dtype == FP32


def test_the_model_can_write_into_containers_in_which_nothing_is_cast() -> None:
    class Recorder(nn.Module):
        def forward(
            self, x: Tensor, features: dict[str, Tensor], calls: list[int], state: Unfinished
        ) -> Tensor:
            features["x"] = state.label = x
            calls.append(8)
            return x

    features: dict[str, Tensor] = {}
    calls, state = [7], Unfinished(torch.ones(2, dtype=BF16))
    cast_model(Recorder(), BF16)(torch.ones(2), features, calls, state)
    assert features["x"] is state.label
    assert calls == [7, 8]


@pytest.mark.parametrize(
    "output_dtype, expected", [(FP32, FP32), (None, FP16), (torch.float64, torch.float64)]
)
def test_outputs_are_cast_to_the_chosen_dtype(
    output_dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    (inner, index), _ = cast_model(Echo(), FP16, output_dtype=output_dtype)(
        {"a": torch.ones(2)}, torch.arange(2)
    )
    assert (inner["a"].dtype, index.dtype) == (expected, torch.int64)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: [t],
        lambda t: {"a": t},
        lambda t: OrderedDict(a=t),
        lambda t: Pair(t, t),
        lambda t: Batch(t, t),
        lambda t: ModelOutput(logits=t),
    ],
)
def test_nested_inputs_and_outputs_compile_to_one_graph(make: Callable[[Tensor], Any]) -> None:
    torch._dynamo.reset()
    model = cast_model(Echo(), BF16)
    given = make(torch.ones(2))
    assert str(torch.compile(model, backend="eager", fullgraph=True)(given)) == str(model(given))


class Detector(nn.Module):
    """A model of images that also takes boxes and times, and records the dtypes of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.time = nn.Linear(1, 1)

    def forward(
        self, images: Tensor, boxes: list[Tensor], *times: Tensor, scale: Any = None, **more: Tensor
    ) -> Any:
        self.seen = images.dtype, boxes[0].dtype, [time.dtype for time in times], scale, more
        return self.conv(images).sum(), boxes[0], self.time(times[0])


@pytest.mark.parametrize("names", ["images", ("images",), iter(["images"])], ids=["one", "several", "once"])
def test_only_the_named_arguments_are_cast(names: Any) -> None:
    model = cast_model(Detector(), BF16, keep_fp32="time", cast_inputs=names)
    boxes, time, scale = torch.tensor([1013.7]), torch.tensor([[999.0]]), torch.tensor(0.3)
    _, returned, _ = model(torch.ones(1, 3, 4, 4), [boxes], time, scale=scale, other=scale)
    assert model.seen == (BF16, FP32, [FP32], scale, {"other": scale})
    assert torch.equal(returned, boxes)


def test_named_arguments_are_cast_by_position_by_name_and_among_the_rest() -> None:
    model = cast_model(Detector(), BF16, cast_inputs=["images", "times", "scale", "other"])
    one = torch.ones(1, 1)
    model(torch.ones(1, 3, 4, 4), [one], one, one, scale=[one], other=one, more=one)
    images, boxes, times, [scale], more = model.seen
    assert (images, boxes, times, scale.dtype) == (BF16, FP32, [BF16, BF16], BF16)
    assert {name: value.dtype for name, value in more.items()} == {"other": BF16, "more": FP32}


def test_without_casts_of_inputs_only_kept_modules_cast_theirs() -> None:
    model = cast_model(Detector(), BF16, keep_fp32="time", cast_inputs=False)
    time = torch.tensor([[999.0]])
    with model.time.register_forward_pre_hook(lambda _, args: received.extend(args)):
        received: list[Tensor] = []
        model(torch.ones(1, 3, 4, 4, dtype=BF16), [torch.tensor([1013.7])], time)
    assert model.seen[:3] == (BF16, FP32, [FP32])
    assert torch.equal(received[0], time)


def test_a_choice_of_inputs_compiles_to_one_graph() -> None:
    torch._dynamo.reset()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.fc(x).float() * factor

    model = cast_model(Scaled(), BF16, cast_inputs="x")
    arguments = torch.ones(1, 2), torch.tensor(1.0 + 2.0**-20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), model(*arguments))


@pytest.mark.parametrize("output_dtype", [FP32, None])
@pytest.mark.parametrize("make", [lambda t: t, lambda t: [t], lambda t: {"images": t}])
def test_the_error_about_images_in_integers_says_what_to_write(make: Any, output_dtype: Any) -> None:
    class First(nn.Conv2d):
        def forward(self, images: Any) -> Tensor:
            return super().forward(
                next(iter(images.values() if isinstance(images, dict) else images), images)
            )

    model = cast_model(
        First(3, 4, 3) if make(1) != 1 else nn.Conv2d(3, 4, 3), FP16, output_dtype=output_dtype
    )
    with pytest.raises(RuntimeError, match=r"(?s)should be the same.*write model\(images\.float\(\) / 255\)"):
        model(make(torch.ones(1, 3, 4, 4, dtype=torch.uint8)))


def test_other_errors_are_as_they_were() -> None:
    model = cast_model(nn.Sequential(nn.Conv2d(3, 4, 3)), FP16)
    with pytest.raises(RuntimeError) as refused:
        model(torch.ones(1, 2, 4, 4))
    assert "255" not in str(refused.value)


def test_a_model_that_converts_integers_itself_is_left_to_it() -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images.half() / 255)

    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert cast_model(Normalized(), FP16)(images).dtype == FP32


@dataclasses.dataclass
class Node:
    value: Any
    parent: Any = None


def _endless_list(*items: Any) -> list[Any]:
    endless: list[Any] = [None, *items]
    endless.append(endless)
    return endless


def _endless_dict(*items: Any) -> dict[str, Any]:
    endless: dict[str, Any] = {"items": items}
    endless["within"] = (endless,)
    return endless


def _endless_dataclass(*items: Any) -> Node:
    endless = Node(items)
    endless.parent = Node(None, parent=endless)
    return endless


@pytest.mark.parametrize(
    "items", [[torch.ones(2)], [torch.ones(2, dtype=torch.int64)]], ids=["floats", "integers"]
)
@pytest.mark.parametrize(
    "make, name", [(_endless_list, "list"), (_endless_dict, "dict"), (_endless_dataclass, "Node")]
)
def test_a_container_that_contains_itself_is_refused_by_name(
    make: Callable[..., Any], name: str, items: list[Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(ValueError, match=f"a {name} among the inputs or outputs contains itself"):
        cast_model(Echo(), BF16)(make(*items))
    with pytest.raises(ValueError, match=f"a {name} among the inputs or outputs contains itself"):
        cast_model(Echo(), BF16, cast_inputs=False)(make(*(item.double() for item in items)))
    assert not recwarn.list


def test_a_container_that_contains_itself_passes_where_nothing_is_to_be_cast() -> None:
    endless = _endless_list(torch.ones(2))
    (returned,), _ = cast_model(Echo(), BF16, output_dtype=None, cast_inputs=False)(endless)
    assert returned is endless
