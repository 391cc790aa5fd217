"""The backbones against the published architectures: sizes, names, outputs re-stated from the state dict, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from partial_fc import models

IRESNETS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
# Parameters and multiply-adds (convolutions and linear layers) at 512-d, 112 x 112; the published figures are 24.03 to
# 118.83 M and 2.62 to 23.47 G, where the latter also count BatchNorm and PReLU.
SIZES = {
    "iresnet18": (24.03, 2.62),
    "iresnet34": (34.14, 4.48),
    "iresnet50": (43.59, 6.33),
    "iresnet100": (65.16, 12.13),
    "iresnet200": (118.83, 23.47),
    "mobilefacenet": (2.06, 0.45),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill parameters and buffers with values that hide no mistake (no BatchNorm scale of 1, no shift of 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() > 1:
                fan_in = math.prod(tensor.shape[1:])
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * fan_in**-0.5)
            elif name.endswith("running_var") or name.endswith("weight"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """BatchNorm with running statistics, written out: channels are dimension 1."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, var = state[f"{name}.running_mean"].view(shape), state[f"{name}.running_var"].view(shape)
    scale, shift = state[f"{name}.weight"].view(shape), state[f"{name}.bias"].view(shape)
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def prelu(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """PReLU, one slope a channel."""
    return x.clamp(min=0) + state[f"{name}.weight"].view(1, -1, 1, 1) * x.clamp(max=0)


def conv(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """Convolution without bias."""
    return functional.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding, groups=groups)


def iresnet_by_hand(state: dict[str, Tensor], blocks: tuple[int, ...], x: Tensor) -> Tensor:
    """The network from the published names of its parameters; sizes follow from the tensors."""
    x = prelu(state, "prelu", norm(state, "bn1", conv(state, "conv1", x, padding=1)))
    for stage, count in enumerate(blocks, start=1):
        for index in range(count):
            at, stride = f"layer{stage}.{index}", 2 if index == 0 else 1
            y = conv(state, f"{at}.conv1", norm(state, f"{at}.bn1", x), padding=1)
            y = conv(state, f"{at}.conv2", prelu(state, f"{at}.prelu", norm(state, f"{at}.bn2", y)), stride, 1)
            y = norm(state, f"{at}.bn3", y)
            if index == 0:
                x = norm(state, f"{at}.downsample.1", conv(state, f"{at}.downsample.0", x, stride))
            x = x + y
    x = norm(state, "bn2", x).flatten(1)
    return norm(state, "features", x @ state["fc.weight"].T + state["fc.bias"])


def mobilefacenet_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """MobileFaceNet from the published names of its parameters."""

    def unit(name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1, linear: bool = False) -> Tensor:
        x = norm(state, f"{name}.layers.1", conv(state, f"{name}.layers.0", x, stride, padding, groups))
        return x if linear else prelu(state, f"{name}.layers.2", x)

    def inverted(name: str, x: Tensor, stride: int) -> Tensor:
        y = unit(f"{name}.layers.0", x)
        y = unit(f"{name}.layers.1", y, stride, 1, groups=y.shape[1])
        y = unit(f"{name}.layers.2", y, linear=True)
        return y if stride == 2 else x + y

    x = unit("layers.0", x, 2, 1)
    x = unit("layers.1", x, 1, 1, groups=64)
    for stage, count in ((2, 4), (4, 6), (6, 2)):
        x = inverted(f"layers.{stage}", x, 2)
        for index in range(count):
            x = inverted(f"layers.{stage + 1}.layers.{index}", x, 1)
    x = unit("conv_sep", x)
    x = unit("features.layers.0", x, groups=512, linear=True).flatten(1)
    return norm(state, "features.layers.3", x @ state["features.layers.2.weight"].T)


def multiply_adds(model: nn.Module, image_size: int = 112) -> int:
    """Multiply-adds of the convolutions and linear layers for one image."""
    total = 0

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.get_parameter("weight")[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.empty(1, 3, image_size, image_size, device=next(model.parameters()).device))
    return total


@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    parameters, published = sum(p.numel() for p in model.parameters()), SIZES[name]
    assert round(parameters / 1e6, 2) == published[0]
    assert published[1] * 0.96 < multiply_adds(model) / 1e9 < published[1]


@pytest.mark.parametrize("name", IRESNETS)
def test_iresnet_has_the_published_blocks(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    state = model.state_dict()
    for stage, (count, channels) in enumerate(zip(IRESNETS[name], (64, 128, 256, 512), strict=True), start=1):
        assert [key for key in state if key.startswith(f"layer{stage}.") and key.endswith("conv2.weight")] == [
            f"layer{stage}.{index}.conv2.weight" for index in range(count)
        ]
        assert state[f"layer{stage}.0.conv2.weight"].shape == (channels, channels, 3, 3)
    assert state["fc.weight"].shape == (512, 512 * 7 * 7)
    assert not model.features.weight.requires_grad, "the published last BatchNorm has a fixed scale"
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["features.weight"]


def test_iresnet_computes_the_published_function() -> None:
    model = randomize(models.iresnet18(embedding_size=16, image_size=48)).double().eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = iresnet_by_hand(model.state_dict(), IRESNETS["iresnet18"], x)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_mobilefacenet_computes_the_published_function() -> None:
    model = randomize(models.mobilefacenet(embedding_size=16, image_size=48)).double().eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), mobilefacenet_by_hand(model.state_dict(), x), rtol=1e-10, atol=1e-10)


def test_iresnet_starts_as_published() -> None:
    torch.manual_seed(0)
    model = models.iresnet18(embedding_size=8, image_size=16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            assert module.weight.std().item() == pytest.approx(0.1, rel=0.1)
            assert abs(module.weight.mean().item()) < 0.01
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-5


@pytest.mark.parametrize(("image_size", "embedding_size"), [(16, 96), (48, 1)])
@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "SmallNet"])
def test_backward_reaches_every_parameter(name: str, image_size: int, embedding_size: int) -> None:
    torch.manual_seed(0)
    model = getattr(models, name)(embedding_size=embedding_size, image_size=image_size)
    out = model(torch.randn(3, 3, image_size, image_size))
    assert out.shape == (3, embedding_size) and out.dtype == torch.float32
    # A random direction: the last BatchNorm centres each column, so that a plain sum has no gradient.
    (out * torch.randn(3, embedding_size)).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "SmallNet"])
def test_embedding_layer_stays_float32_under_autocast(name: str) -> None:
    model = getattr(models, name)(embedding_size=8, image_size=32)
    seen: dict[str, torch.dtype] = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, inputs, _o: seen.update(linear=inputs[0].dtype))
        elif isinstance(module, nn.Conv2d) and not key.startswith(("conv_sep", "features")):
            module.register_forward_hook(lambda _m, _i, output: seen.update(conv=output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 3, 32, 32))
    assert out.dtype == torch.float32
    assert seen == {"conv": torch.bfloat16, "linear": torch.float32}


def test_recomputed_blocks_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = models.iresnet18(embedding_size=8, image_size=32, checkpoint_blocks=recompute)
        x = torch.randn(4, 3, 32, 32, requires_grad=True)
        model(x).square().sum(1).sqrt().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    model = models.iresnet18(embedding_size=8, image_size=16, dropout=0.5)
    x = torch.randn(4, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_small_net_sizes() -> None:
    model = models.SmallNet()
    assert multiply_adds(model) < 40e6 and sum(p.numel() for p in model.parameters()) < 1e6
    wide = models.SmallNet(embedding_size=64, image_size=64, width=32)
    assert wide(torch.randn(2, 3, 64, 64)).shape == (2, 64)
    assert wide.blocks[-1].first[0].weight.shape == (128, 128, 3, 3)


def test_small_net_takes_any_memory_layout() -> None:
    model = models.SmallNet(embedding_size=8, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


@pytest.mark.parametrize("name", ["iresnet50", "mobilefacenet", "SmallNet"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, "image_size is 100: it has to be a multiple of 16 pixels, for example 96"),
        ({"image_size": 0}, "image_size is 0: .* for example 16"),
        ({"embedding_size": 0}, "embedding_size is 0: it has to be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(models, name)(**arguments)


def test_other_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="dropout is 1.0: it's a probability"):
        models.iresnet18(dropout=1.0)
    with pytest.raises(ValueError, match="width is 7: it has to be an even number"):
        models.SmallNet(width=7)
    with pytest.raises(ValueError, match="four stages"):
        models.IResNet((2, 2, 2))


@pytest.mark.parametrize("shape", [(2, 3, 96, 112), (2, 1, 112, 112), (3, 112, 112)])
@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "SmallNet"])
def test_images_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
        x = torch.empty(shape)
    with pytest.raises(ValueError, match=r"images have shape .* built for \[b, 3, 112, 112\]"):
        model(x)
