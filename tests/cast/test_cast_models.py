"""`cast_model` on layers that read each other's weights, and on whole networks, against FP32 and autocast."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_tricks.cast import cast_model

pytestmark = pytest.mark.slow

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
both_dtypes = pytest.mark.parametrize("dtype", [FP16, BF16])
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# One network of each family; benchmarks/results/cast_models.md has all networks.
MODELS = [
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs on one thread: threads on busy processors would wait for each other at each of thousands of operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@both_dtypes
@pytest.mark.parametrize(
    "name, kept",
    [("weight_norm", False), ("spectral_norm", False), ("weight_norm", True), ("orthogonal", True)],
)
def test_a_parametrized_layer_trains(name: str, kept: bool, dtype: torch.dtype) -> None:
    layer = getattr(nn.utils.parametrizations, name)(nn.Linear(4, 4))
    model = cast_model(nn.Sequential(layer, nn.LayerNorm(4)), dtype, keep_fp32="?" if kept else nn.LayerNorm)
    output = model(torch.randn(3, 4))
    (output * torch.randn(3, 4)).sum().backward()
    assert layer.weight.dtype == (FP32 if kept else dtype)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@both_dtypes
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_takes_packed_sequences(layer: type[nn.RNNBase], dtype: torch.dtype) -> None:
    model = cast_model(layer(4, 5, num_layers=2), dtype)
    output, _ = model(nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]))
    output.data.sum().backward()
    assert output.data.dtype == FP32
    assert model.weight_ih_l0.grad.dtype == dtype


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.attention(x, x, x)[0]


@both_dtypes
@train_and_eval
@pytest.mark.parametrize("keep", [None, nn.Linear, "attention", "attention.out_proj"])
def test_self_attention_is_close_to_fp32(keep: Any, training: bool, dtype: torch.dtype) -> None:
    reference = SelfAttention().train(training)
    model = cast_model(copy.deepcopy(reference), dtype, keep_fp32=keep)
    x = torch.randn(3, 5, 16)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(x), reference(x), rtol=0.02, atol=0.02)
    assert len({p.dtype for p in model.attention.parameters()}) == 1


@both_dtypes
@train_and_eval
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("keep", [None, (), nn.MultiheadAttention])
def test_a_transformer_encoder_is_close_to_fp32(
    keep: Any, padded: bool, training: bool, dtype: torch.dtype
) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    reference = nn.TransformerEncoder(layer, 2).train(training)
    model = cast_model(copy.deepcopy(reference), dtype, keep_fp32=keep)
    padding = (
        torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
        if padded
        else None
    )
    x = torch.randn(3, 5, 16)
    with torch.set_grad_enabled(training):
        output, expected = (m(x, src_key_padding_mask=padding) for m in (model, reference))
    used = slice(None) if padding is None else ~padding
    torch.testing.assert_close(output[used], expected[used], rtol=0.05, atol=0.05)


def test_a_table_of_positions_keeps_all_of_them() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1)
            self.register_buffer("table", torch.arange(4096.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * (self.table[:, None] / 4096).to(x.dtype)

    model = cast_model(nn.Sequential(Positions()), BF16, keep_fp32="*.table")
    assert model[0].table.unique().numel() == 4096
    assert model(torch.ones(1, 1)).shape == (4096, 1)


@pytest.mark.usefixtures("one_thread")
def test_a_detector_with_its_backbone_cast_computes_its_losses_in_fp32() -> None:
    detection = pytest.importorskip("torchvision.models.detection", reason="the detector is torchvision's")
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )
    cast_model(model.backbone, BF16)
    boxes = torch.tensor([[10.25, 10.25, 1013.7, 1013.7]])
    losses = model([torch.rand(3, 1024, 1024)], [{"boxes": boxes, "labels": torch.tensor([1])}])
    assert {loss.dtype for loss in losses.values()} == {FP32}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    convolutions = [m.weight for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    gradients = {weight.grad.dtype for weight in convolutions if weight.grad is not None}
    assert gradients == {BF16}
    assert model.rpn.head.cls_logits.weight.grad.dtype == FP32


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MODELS)
def test_a_torchvision_model_trains_and_is_at_most_twice_as_far_from_fp32_as_under_autocast(
    name: str,
) -> None:
    pytest.importorskip("torchvision", reason="the models are torchvision's")
    pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
    pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
    from benchmarks.cast_models import compare

    assert_at_most_twice_as_far(compare(name))


@pytest.mark.usefixtures("one_thread")
def test_a_vision_transformer_is_at_most_twice_as_far_from_fp32_as_under_autocast() -> None:
    """Autocast adds residuals in FP32, and few outputs may exceed the bound by chance, so there are many images."""
    torchvision = pytest.importorskip("torchvision", reason="the models are torchvision's")
    pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")
    pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
    from benchmarks.cast_models import compare_model

    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=12, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)
    assert_at_most_twice_as_far(compare_model("vit", model, torch.randn(64, 3, 32, 32)))


def assert_at_most_twice_as_far(comparison: Any) -> None:
    assert comparison.finite
    assert comparison.cast.output <= 2 * comparison.autocast.output
    assert comparison.cast.gradient <= 2 * comparison.autocast.gradient
