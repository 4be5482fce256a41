"""`cast_model`, and then `model.float()`, `model.half()` or `model.to(dtype)`: the casts follow the weights."""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_tricks import FusedSGD
from fused_tricks.cast import cast_model

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
later_dtype = pytest.mark.parametrize("later", [FP16, BF16, FP32, FP64], ids=str)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


class Network(nn.Module):
    """Norms with and without casts around them, a kept layer, an embedding, a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LocalResponseNorm(2), nn.ReLU()
        )
        self.fc = nn.Linear(4, 4)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.head(self.fc(self.features(x).mean((2, 3))) + self.embedding(index))


KEEP = [nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d, nn.LocalResponseNorm, "embedding"]


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("first", [FP16, BF16], ids=str)
@later_dtype
def test_the_model_computes_in_the_later_dtype(first: torch.dtype, later: torch.dtype) -> None:
    model = cast_model(Network(), first, keep_fp32=KEEP).to(later)
    # The expected model computes in full precision: on the CPU, torch has no local response norm in low precision.
    plain = cast_model(copy.deepcopy(model), FP32).to(FP64 if later == FP64 else FP32)
    images, index = inputs()
    output = model(images, index)
    expected = plain(images.to(plain.fc.weight.dtype), index).float()
    tolerance = 0.05 if later in (FP16, BF16) else 1e-5
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    output.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {later}


@later_dtype
def test_a_part_that_is_called_alone_works_in_the_later_dtype(later: torch.dtype) -> None:
    model = cast_model(Network(), BF16, keep_fp32=KEEP).to(later)
    assert model.features(inputs()[0].to(later)).dtype == later


def test_a_part_that_alone_is_made_float_works_in_itself() -> None:
    model = cast_model(Network(), BF16, keep_fp32=KEEP)
    model.features.float()
    assert model.features(inputs()[0]).dtype == FP32
    assert model.head(torch.randn(2, 4, dtype=BF16)).dtype == BF16


def test_float_after_the_cast_gives_the_bits_of_an_fp32_model_with_these_weights() -> None:
    model = cast_model(Network(), BF16).float().eval()
    plain = Network().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs()), plain(*inputs()))


def test_the_output_stays_in_the_dtype_asked_for_or_that_of_the_weights() -> None:
    assert cast_model(nn.Linear(2, 2), BF16).double()(torch.ones(1, 2)).dtype == FP32
    assert cast_model(nn.Linear(2, 2), BF16, output_dtype=None).double()(torch.ones(1, 2)).dtype == FP64


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, _saved_and_loaded])
def test_a_copy_follows_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = cast_model(Network(), BF16).eval()
    expected = model(*inputs())
    twin = copied(model).float()
    twin(*inputs())
    assert twin.features(inputs()[0]).dtype == FP32
    assert torch.equal(model(*inputs()), expected)


def test_float_on_swapped_parameters_is_followed() -> None:
    model = cast_model(Network(), BF16)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model(*inputs()).isfinite().all()


@pytest.mark.skipif(
    torch.__version__ < "2.14",
    reason="torch.compile before 2.14 does not notice that Module.to changed a dtype",
)
def test_a_compiled_model_follows() -> None:
    torch._dynamo.reset()
    model = cast_model(Network(), BF16).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()))
    model.float()
    assert torch.equal(compiled(*inputs()), model(*inputs()))


def test_a_model_made_float_goes_on_training() -> None:
    model = cast_model(Network(), BF16)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, backend="reference")
    for _ in range(2):
        model(*inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.float()
    assert all(p.dtype == FP32 and p.isfinite().all() for p in model.parameters())


def _without_the_first(model: nn.Sequential) -> None:
    del model[0]


def _with_another_first(model: nn.Sequential) -> None:
    model[0] = nn.Linear(4, 4, dtype=BF16)


def _with_no_weights_first(model: nn.Sequential) -> None:
    model[0] = nn.Identity()


def _with_a_norm_first(model: nn.Sequential) -> None:
    model[0] = nn.LayerNorm(4)


def _with_a_slice_as_block(model: nn.Sequential) -> None:
    model[1] = model[1][1:]


def _with_a_block_without_weights(model: nn.Sequential) -> None:
    model[1] = nn.Sequential(nn.Identity(), model[1][1])


def _with_a_norm_moved_out(model: nn.Sequential) -> None:
    model[1] = model[1][1]


@later_dtype
@pytest.mark.parametrize("keeps_former", [True, False], ids=["former parts live", "former parts are gone"])
@pytest.mark.parametrize(
    "change",
    [
        _without_the_first,
        _with_another_first,
        _with_no_weights_first,
        _with_a_norm_first,
        _with_a_slice_as_block,
        _with_a_block_without_weights,
        _with_a_norm_moved_out,
    ],
)
def test_the_casts_follow_the_layers_that_the_model_has_now(
    change: Callable[[nn.Sequential], None], keeps_former: bool, later: torch.dtype
) -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model = cast_model(nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 2)), BF16)
    former = list(model.modules()) if keeps_former else []
    del block
    change(model)
    model.to(later)
    assert model(torch.ones(2, 4)).isfinite().all()
    seen = []
    model[-1].register_forward_hook(lambda _, args, output: seen.append(args[0].dtype))
    model(torch.ones(2, 4))
    assert seen == [later]
    del former


@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(4), lambda: nn.BatchNorm1d(4), lambda: nn.GroupNorm(2, 4)]
)
def test_a_model_of_norms_alone_works_in_the_dtype_of_its_weights(make: Callable[[], nn.Module]) -> None:
    model = cast_model(nn.Sequential(make(), make()), BF16, output_dtype=None)
    dtypes = [model(torch.ones(2, 4)).dtype]
    for later in (FP16, FP64, BF16, FP32):
        dtypes.append(model.to(later)(torch.ones(2, 4)).dtype)
    assert dtypes == [FP32, FP16, FP64, BF16, FP32]


def test_a_part_that_is_copied_or_saved_brings_no_other_part() -> None:
    model = cast_model(
        nn.Sequential(nn.Linear(300, 300), nn.Sequential(nn.Linear(300, 4), nn.LayerNorm(4))), BF16
    )
    file = io.BytesIO()
    torch.save(model[1], file)
    assert file.tell() < 300 * 300
    twin = copy.deepcopy(model[1])
    model.double()
    assert twin(torch.ones(1, 300, dtype=BF16)).dtype == BF16


def test_a_norm_that_is_taken_out_holds_no_model_in_memory() -> None:
    model = cast_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), BF16)
    norm, first = model[1], weakref.ref(model[0])
    del model
    gc.collect()
    assert first() is None
    assert norm(torch.ones(1, 4)).dtype == BF16


@pytest.mark.skipif(
    torch.__version__ < "2.14",
    reason="torch.compile before 2.14 does not notice that Module.to changed a dtype",
)
def test_a_model_without_its_first_layer_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = cast_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), BF16)
    del model[0]
    model.float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2, 4)), model(torch.ones(2, 4)))
