"""Networks: hand-counted parameters, shapes, and refused inputs."""

import pytest
import torch
from torch import nn

from bqnn.layers.markers import Add, Enter, Leave, Pool
from bqnn.nets import MLP, NETS, LeNet, ResNet


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# Three hidden layers of 100 with biases on 13 inputs, and two outputs.
MLP_PARAMETERS = (13 * 100 + 100) + 2 * (100 * 100 + 100) + 2 * (100 + 1)

# Two convolutions of 5x5, 20 and 50 channels, and two linear layers; no biases.
LENET_CONVOLUTIONS = 1 * 20 * 25 + 20 * 50 * 25
LENET_28 = LENET_CONVOLUTIONS + 50 * 7 * 7 * 500 + 500 * 10
LENET_8 = LENET_CONVOLUTIONS + 50 * 2 * 2 * 500 + 500 * 10


def stage_parameters(width: int) -> int:
    """Count a stage that halves the image: 3x3 from half the channels, 1x1, three 3x3."""
    half = width // 2
    return half * width * 9 + half * width + 3 * width * width * 9 + 5 * (2 * width)


RESNET_24 = (
    (3 * 24 * 9 + 2 * 24)
    + 4 * (24 * 24 * 9 + 2 * 24)
    + stage_parameters(48)
    + stage_parameters(96)
    + stage_parameters(192)
    + 192 * 10
)


@pytest.mark.parametrize(
    ("net", "input_shape", "heads", "expected"),
    [
        pytest.param("mlp", [13], [1, 1], MLP_PARAMETERS, id="mlp"),
        pytest.param("lenet", [1, 28, 28], [10], LENET_28, id="lenet-28"),
        pytest.param("lenet", [1, 8, 8], [10], LENET_8, id="lenet-8"),
        pytest.param("resnet", [3, 32, 32], [10], RESNET_24, id="resnet-24"),
    ],
)
def test_parameters_are_as_many_as_counted_by_hand(net, input_shape, heads, expected):
    assert num_parameters(NETS[net](input_shape, heads)) == expected


def test_the_counts_by_hand_are_the_published_sizes():
    assert (MLP_PARAMETERS, LENET_28, LENET_8) == (21_802, 1_255_500, 130_500)
    assert RESNET_24 == 1_575_192


def test_resnet_18_of_width_64_has_the_standard_size_without_the_bias_of_its_output():
    # 11,173,962 is the usual CIFAR-10 ResNet-18
    assert num_parameters(ResNet([3, 32, 32], [10], width=64)) == 11_173_962 - 10


@pytest.mark.parametrize(
    ("net", "input_shape"),
    [
        ("mlp", [5]),
        ("mlp", [1, 4, 4]),
        ("lenet", [1, 28, 28]),
        ("lenet", [3, 4, 5]),
        ("lenet", [1, 9, 15]),
        ("resnet", [3, 8, 8]),
        ("resnet", [1, 13, 9]),
    ],
)
@pytest.mark.parametrize("heads", [(10,), (1, 1), (2, 3)], ids=str)
def test_heads_stand_side_by_side_in_order(net, input_shape, heads):
    torch.manual_seed(0)
    net = NETS[net](input_shape, heads).eval()
    answers = []
    for head in net.output.heads:
        head.register_forward_hook(lambda _module, _inputs, answer: answers.append(answer))
    out = net(torch.randn(4, *input_shape))
    assert out.shape == (4, sum(heads))
    assert [answer.shape[1] for answer in answers] == list(heads)
    assert torch.equal(out, torch.cat(answers, dim=1))


def test_every_output_of_a_resnet_depends_on_every_pixel():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    out = ResNet([3, 16, 16], [2], width=4).eval()(x)
    for value in out[0]:
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        assert gradient.count_nonzero() == gradient.numel()


def test_add_is_a_sum_with_a_relu_and_pool_an_average():
    x, y = torch.tensor([1.0, -3.0]), torch.tensor([2.0, 1.0])
    assert Add()(x, y).tolist() == [3, 0]
    image = torch.arange(8.0).view(1, 2, 2, 2)
    assert Pool()(image).tolist() == [[1.5, 5.5]]


@pytest.mark.parametrize("net", NETS)
def test_one_way_into_the_integer_region_and_one_out_of_it_per_head(net):
    modules = list(NETS[net]([3, 16, 16], [1, 1]).modules())
    assert sum(isinstance(module, Enter) for module in modules) == 1
    assert sum(isinstance(module, Leave) for module in modules) == 2  # one per head


@pytest.mark.parametrize(("net", "smallest"), [(LeNet, 4), (ResNet, 8)])
def test_images_that_are_too_small_and_tables_are_refused(net, smallest):
    net([1, smallest, smallest], [2])
    with pytest.raises(ValueError, match=rf"images of {smallest}x{smallest - 1} are too small"):
        net([1, smallest, smallest - 1], [2])
    with pytest.raises(ValueError, match=r"inputs of shape \(13,\) are not images"):
        net([13], [2])


def test_an_mlp_without_hidden_layers_is_refused():
    with pytest.raises(ValueError, match=r"hidden_features=\[\]"):
        MLP([3], [1], hidden_features=[])
