"""The faster convolution of a processor against PyTorch's in double precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from study.training import cpu_layers
from study.training.cpu_layers import use_cpu_layers


def trained(layer: nn.Module, images: Tensor, gradient: Tensor, *, bf16: bool = False) -> list[Tensor]:
    """Output, gradients of images and parameters, and buffers after one pass in training."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = layer(images)
    output.backward(gradient.to(output.dtype))
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [each for each in (output.detach(), images.grad, *gradients, *layer.buffers()) if each is not None]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "whole"),
    [
        (1, 3, 1, 1, True),
        (2, 3, 1, 1, True),
        (2, 3, 2, 1, True),
        (3, 5, 1, 2, True),
        ((1, 2), 3, 1, 1, True),
        (2, 2, 2, 0, True),
        (4, 3, 1, 1, False),
        (3, 3, 1, 1, False),
        (1, 1, 1, 0, False),
        (2, 3, 1, 2, False),
    ],
)
def test_a_convolution_that_sees_the_whole_map(
    size: int | tuple[int, int], kernel: int, stride: int, padding: int, whole: bool
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    images = drawn(6, 5, height, width)
    usual = nn.Conv2d(5, 7, kernel, stride, padding).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(usual)
    use_cpu_layers(ours)
    assert isinstance(ours, cpu_layers.Conv2d)
    assert (ours._windows(images) is not None) == whole
    gradient = drawn(*usual(images).shape)
    expected = trained(copy.deepcopy(usual).double(), images.double(), gradient.double())
    for one, other in zip(trained(copy.deepcopy(ours), images, gradient), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert all(
        map(torch.equal, trained(copy.deepcopy(ours), images, gradient), trained(copy.deepcopy(ours), images, gradient))
    )
    for one, other in zip(trained(copy.deepcopy(ours), images, gradient, bf16=True), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.1, atol=0.2)
    assert ours(images).stride() == usual(images).stride()


def pair(**options: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """PyTorch's layer and ours with the same weights, in double precision, on maps of 2x2 pixels."""
    usual = nn.Conv2d(3, 4, 3, padding=1, **options).double()
    ours = copy.deepcopy(usual)
    use_cpu_layers(ours)
    return usual, ours


@pytest.mark.parametrize("bias", [True, False])
def test_an_activation_in_place_after_it(bias: bool) -> None:
    gradients = []
    for layer in pair(bias=bias):
        images = drawn(2, 3, 2, 2).double().requires_grad_()
        nn.ReLU(inplace=True)(layer(images)).sum().backward()
        gradients.append((images.grad, layer.weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_that_uses_a_gradient_in_its_loss() -> None:
    gradients = []
    for layer in pair():
        images = drawn(2, 3, 2, 2).double().requires_grad_()
        (slope,) = torch.autograd.grad(layer(images).pow(2).sum(), images, create_graph=True)
        torch.autograd.backward(slope.pow(2).sum())
        gradients.append((images.grad, layer.weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_functional_transforms() -> None:
    images = drawn(2, 3, 2, 2).double()
    results = []
    for layer in pair():

        def loss(weight: Tensor, image: Tensor, convolution: nn.Conv2d = layer) -> Tensor:
            output: Tensor = torch.func.functional_call(convolution, {"weight": weight}, image[None])
            return output.pow(2).sum()

        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight.detach(), images))
    torch.testing.assert_close(*results)


def test_a_batch_without_images() -> None:
    usual, ours = pair()
    images = torch.zeros(0, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    output = ours(images)
    torch.autograd.backward(output.sum())
    assert output.shape == usual(images).shape
    assert ours.weight.grad is not None
    assert torch.equal(ours.weight.grad, torch.zeros_like(ours.weight))


def test_what_torch_refuses_is_refused() -> None:
    usual, ours = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
    use_cpu_layers(ours)
    wrong: tuple[Tensor, ...] = (torch.zeros(2, 3, 2, 2), torch.zeros(2, 1, 2, 2).double())
    for images in wrong:
        for layer in (usual, ours):
            with pytest.raises(RuntimeError):
                layer(images)


def test_double_precision_stays_under_autocast() -> None:
    images = drawn(2, 3, 2, 2).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual, ours = (layer(images) for layer in pair())
    assert ours.dtype == usual.dtype == torch.float64


def test_other_convolutions_stay_as_they_are() -> None:
    images = drawn(4, 4, 2, 2)
    for layer in (
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
    ):
        expected = layer(images)
        use_cpu_layers(layer)
        assert torch.equal(layer(images), expected)


def test_only_layers_of_torch_are_replaced_and_their_state_keeps_its_names() -> None:
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Own(4, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    names = list(network.state_dict())
    use_cpu_layers(network)
    assert [type(each) for each in network] == [cpu_layers.Conv2d, Own, nn.BatchNorm2d, nn.GroupNorm]
    assert list(network.state_dict()) == names
    assert list(copy.deepcopy(network).state_dict()) == names


def test_a_large_kernel_makes_no_huge_matrix() -> None:
    layer = nn.Conv2d(5, 7, 31, padding=15)
    use_cpu_layers(layer)
    assert isinstance(layer, cpu_layers.Conv2d)
    assert layer._windows(drawn(6, 5, 16, 16)) is None
