"""Replacement by type: which layers are replaced, kept and refused."""

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils as torch_utils
from torch import nn
from torch.nn.utils import parametrizations, prune

from bqnn.layers.bayes import to_bayes
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.markers import DropoutSite, Enter, Leave
from bqnn.layers.swap import swap
from bqnn.quant.fuse import fuse
from bqnn.quant.simulated import is_prepared, prepare
from bqnn.quant.spec import QuantSpec


class Wider(nn.Linear):
    """A subclass, which a replacement of Linear must not match."""


def to_identity(layer: nn.Linear) -> nn.Module:
    return nn.Identity()


def test_every_layer_of_a_type_is_replaced_at_any_depth_and_counted():
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net = nn.Sequential(nn.Linear(2, 3), inner, nn.BatchNorm2d(3))
    replaced = []

    def remember(layer: nn.Linear) -> nn.Module:
        replaced.append(layer.in_features)
        return nn.Identity()

    assert swap(net, {nn.Linear: remember}, keep=(nn.BatchNorm2d,)) == 2
    assert replaced == [2, 3]
    assert isinstance(net[0], nn.Identity)
    assert isinstance(net[1][0], nn.Identity)
    assert isinstance(net[1][1], nn.ReLU)
    assert isinstance(net[2], nn.BatchNorm2d)


def test_a_replacement_may_contain_the_type_that_it_replaces():
    net = nn.Sequential(nn.Linear(2, 2))
    assert swap(net, {nn.Linear: lambda layer: nn.Sequential(layer, nn.ReLU())}) == 1
    assert isinstance(net[0][0], nn.Linear)


def test_nothing_to_replace_is_a_count_of_zero():
    assert swap(nn.Sequential(nn.ReLU()), {nn.Linear: to_identity}) == 0


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(1, 1, 1), nn.LayerNorm(1), nn.LSTM(1, 1), Wider(1, 1)], ids=repr
)
def test_an_unknown_layer_with_weights_is_refused_by_its_path(layer):
    net = nn.Sequential(nn.ReLU(), nn.ModuleDict({"deep": layer}))
    kind = type(layer).__name__
    with pytest.raises(
        TypeError, match=rf"1\.deep is an? {kind}.* it supports Linear, BatchNorm2d"
    ):
        swap(net, {nn.Linear: to_identity}, keep=(nn.BatchNorm2d,))


def test_an_unknown_layer_at_the_top_is_refused_by_its_name():
    with pytest.raises(TypeError, match=r"^0 is a Conv1d"):
        swap(nn.Sequential(nn.Conv1d(1, 1, 1)), {nn.Linear: to_identity})


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    to_bayes(net, prior_std=1.0, init_rho=-3.0)
    assert type(net[0]).__name__ == "BayesLinear"
    assert net[0] is net[2]


def plain() -> nn.Sequential:
    return nn.Sequential(
        Enter(),
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.Linear(8, 8, bias=False),
        Leave(),
    )


def share(net: nn.Sequential, name: str) -> None:
    setattr(net[6], name, getattr(net[5], name))


def share_memory(net: nn.Sequential) -> None:
    net[6].weight.data = net[5].weight.data


def make_plain(layer: nn.Module, name: str) -> None:
    value = getattr(layer, name).detach()
    delattr(layer, name)
    setattr(layer, name, value)


def make_buffer(layer: nn.Module, name: str) -> None:
    value = getattr(layer, name).detach()
    delattr(layer, name)
    layer.register_buffer(name, value)


def whole_numbers() -> nn.Parameter:
    return nn.Parameter(torch.ones(8, 8, dtype=torch.int32), requires_grad=False)


def replace(net: nn.Sequential, layer: nn.Module) -> None:
    net[6] = layer


# What is done to a network, and what the error then names.
LOST: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "spectral norm": (lambda net: torch_utils.spectral_norm(net[5]), r"^5 .*weight_orig"),
    "spectral norm of a convolution": (lambda net: torch_utils.spectral_norm(net[1]), r"^1 .*orig"),
    "weight norm": (lambda net: torch_utils.weight_norm(net[6]), r"^6 .*weight_g, weight_v"),
    "pruning": (lambda net: prune.l1_unstructured(net[1], "weight", 0.5), r"^1 .*weight_mask"),
    "pruned bias": (lambda net: prune.random_unstructured(net[5], "bias", 2), r"^5 .*bias_orig"),
    "new spectral norm": (lambda net: parametrizations.spectral_norm(net[5]), r"^5 .*remove_par"),
    "new weight norm": (lambda net: parametrizations.weight_norm(net[6]), r"^6 .*remove_param"),
    "orthogonal": (lambda net: parametrizations.orthogonal(net[6]), r"^6 .*remove_param"),
    "lazy": (lambda net: replace(net, nn.LazyLinear(8)), r"^6 is a LazyLinear.*pass a batch"),
    "parameter": (lambda net: setattr(net[5], "gain", nn.Parameter(torch.ones(1))), r"^5 .*gain"),
    "buffer": (lambda net: net[5].register_buffer("mask", torch.ones(1)), r"^5 .*mask"),
    "no weight": (lambda net: net[5]._parameters.pop("weight"), r"^5 .*no weight"),
    "weight is None": (lambda net: setattr(net[5], "weight", None), r"^5 .*no weight"),
    "no bias": (lambda net: net[5]._parameters.pop("bias"), r"^5 .*no bias"),
    "plain weight": (lambda net: make_plain(net[5], "weight"), r"^5 .*plain tensor weight"),
    "plain bias": (lambda net: make_plain(net[1], "bias"), r"^1 .*plain tensor bias"),
    "buffer as weight": (lambda net: make_buffer(net[5], "weight"), r"^5 .*buffer weight"),
    "buffer as bias": (lambda net: make_buffer(net[5], "bias"), r"^5 .*buffer bias"),
    "plain tensor": (
        lambda net: setattr(net[5], "scale", torch.ones(1)),
        r"^5 .*plain tensor scale",
    ),
    "parameter of the network": (
        lambda net: net.register_parameter("gain", nn.Parameter(torch.ones(1))),
        r"^the network is a Sequential, which .* does not support",
    ),
    "open sizes": (
        lambda net: setattr(net[5], "weight", nn.UninitializedParameter()),
        r"^5 is a Linear, which has no sizes yet; pass a batch",
    ),
    "complex numbers": (
        lambda net: replace(net, nn.Linear(8, 8, dtype=torch.complex64)),
        r"^6\.weight has dtype torch\.complex64",
    ),
    "whole numbers": (
        lambda net: setattr(net[5], "weight", whole_numbers()),
        r"^5\.weight has dtype torch\.int32",
    ),
    "subclass": (
        lambda net: replace(net, Wider(8, 8)),
        r"^6 is a Wider, which .* does not support",
    ),
    "reflected border": (
        lambda net: net.__setitem__(1, nn.Conv2d(1, 2, 3, padding_mode="reflect")),
        r"^1: padding_mode='reflect'",
    ),
    "state-dict hook": (
        lambda net: net[5].register_state_dict_post_hook(lambda *_: None),
        r"^5 has state dict hooks",
    ),
    "loading hook": (
        lambda net: net[5].register_load_state_dict_post_hook(print),
        r"^5 has load state dict post hooks",
    ),
    "child": (lambda net: net[5].add_module("adapter", nn.ReLU()), r"^5 .*adapter"),
    "hook": (lambda net: net[5].register_forward_hook(print), r"^5 has forward hooks"),
    "pre-hook": (lambda net: net[1].register_forward_pre_hook(print), r"^1 has forward pre hooks"),
    "gradient": (lambda net: net[5].register_full_backward_hook(print), r"^5 has backward hooks"),
    "forward": (
        lambda net: setattr(net[5], "forward", types.MethodType(nn.Linear.forward, net[5])),
        r"^5 has a replaced forward",
    ),
    "tied weight": (lambda net: share(net, "weight"), r"^5\.weight and 6\.weight are one"),
    "tied bias": (lambda net: share(net, "bias"), r"^5\.bias and 6\.bias are one"),
    "tied memory": (share_memory, r"^5\.weight and 6\.weight are one"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("convert", [lambda net: to_bayes(net, 1.0, -3.0), fuse], ids=["bbb", "q"])
@pytest.mark.parametrize("case", LOST)
def test_parts_that_a_conversion_would_lose_are_refused(case, convert):
    net = plain()
    change, message = LOST[case]
    change(net)
    children = list(net)
    with pytest.raises(TypeError, match=message) as caught:
        convert(net)
    assert "\n" not in str(caught.value)
    assert all(now is before for now, before in zip(net, children, strict=True))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(2, affine=False),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.LazyBatchNorm2d(),
        nn.SyncBatchNorm(2),
    ],
    ids=repr,
)
def test_a_batch_norm_that_cannot_be_fused_leaves_the_network_as_it_was(norm):
    net = plain()
    net[2] = norm
    children = list(net)
    with pytest.raises(TypeError, match=r"^[12]\b"):
        fuse(net)
    assert all(now is before for now, before in zip(net, children, strict=True))


def test_a_batch_norm_of_a_plain_mean_is_fused():
    net = plain()
    net[2] = nn.BatchNorm2d(2, momentum=None)
    x = torch.randn(3, 1, 4, 4)
    net(x)
    expected = net.eval()(x)
    torch.testing.assert_close(fuse(net)(x), expected)
    assert net[1].bn.momentum is None


def test_gradient_hooks_are_refused_where_parameters_are_made_anew_and_kept_elsewhere():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        net = plain()
        weight = net[5].weight
        getattr(weight, register)(lambda grad: None)
        with pytest.raises(TypeError, match=r"^5\.weight has gradient hooks"):
            to_bayes(net, 1.0, -3.0)
        prepare(fuse(net), QuantSpec())
        assert net[5].weight is weight


def test_a_refused_ensemble_is_prepared_in_no_member():
    net = Ensemble(fuse(plain()), 1)
    net.collect()
    net.members[0][0].register_forward_hook(print)
    with pytest.raises(TypeError, match="0 has forward hooks"):
        prepare(net, QuantSpec())
    assert not is_prepared(net)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_layers_without_their_parametrization_are_converted():
    net = plain()
    torch_utils.spectral_norm(net[5])
    prune.l1_unstructured(net[1], "weight", 0.5)
    net(torch.randn(2, 1, 4, 4))
    torch_utils.remove_spectral_norm(net[5])
    prune.remove(net[1], "weight")
    torch_utils.weight_norm(net[5])
    torch_utils.remove_weight_norm(net[5])
    lazy = nn.LazyLinear(8)
    net[6] = lazy
    x = torch.randn(3, 1, 4, 4)
    expected = net.eval()(x)
    to_bayes(net, prior_std=1.0, init_rho=-60.0)
    torch.testing.assert_close(net(x), expected)
    assert (net[1].mean == 0).sum() == 9


def test_parts_that_fusion_takes_in_are_checked_too():
    for index, name in ((2, "2 has forward hooks"), (3, "3 has forward hooks")):
        net = plain()
        net[index].register_forward_hook(print)
        with pytest.raises(TypeError, match=name):
            fuse(net)
        to_bayes(net, 1.0, -3.0)  # leaves them where they are
    net = plain()
    prune.l1_unstructured(net[2], "weight", 0.5)
    with pytest.raises(TypeError, match="2 is a BatchNorm2d with weight_orig"):
        fuse(net)


def test_hooks_on_other_modules_that_are_replaced_are_refused():
    net = fuse(plain())
    net[0].register_forward_hook(print)
    with pytest.raises(TypeError, match="0 has forward hooks"):
        prepare(net, QuantSpec())
    net = nn.Sequential(nn.Linear(2, 2), DropoutSite())
    net[1].register_forward_hook(print)
    with pytest.raises(TypeError, match="1 has forward hooks"):
        to_mcdropout(net, 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_conversions_keep_the_type_of_numbers_and_quantization_takes_float32(dtype):
    net = to_bayes(plain().to(dtype), 1.0, -3.0)
    assert {param.dtype for param in net.parameters()} == {dtype}
    assert net.eval()(torch.ones(2, 1, 4, 4, dtype=dtype)).dtype == dtype
    fuse(net)
    with pytest.raises(TypeError, match=rf"1\.layer\.mean has dtype {dtype}.* call float\(\)"):
        prepare(net, QuantSpec())
    assert not is_prepared(net)
    assert is_prepared(prepare(net.float(), QuantSpec()))


def test_networks_without_memory_are_converted():
    net = to_bayes(plain().to("meta"), 1.0, -3.0)
    prepare(fuse(net), QuantSpec())
    assert {param.device.type for param in net.parameters()} == {"meta"}


def test_one_gaussian_layer_in_two_places_is_not_quantized_to_two_draws():
    shared = nn.Linear(8, 8)
    net = nn.Sequential(Enter(), shared, nn.ReLU(), shared, Leave())
    fuse(to_bayes(plain(), 1.0, -3.0))
    with pytest.raises(TypeError, match="1 and 3 are one Bayesian layer"):
        fuse(to_bayes(net, 1.0, -3.0))


@pytest.mark.parametrize("mode", [True, False])
def test_converted_layers_keep_the_training_mode(mode):
    net = plain()
    net[4] = DropoutSite()
    net.train(mode)
    to_mcdropout(to_bayes(net, 1.0, -3.0), 0.5)
    assert all(module.training is mode for module in net.modules())


def test_frozen_parameters_stay_frozen():
    net = plain()
    net[5].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    to_bayes(net, 1.0, -3.0)
    trained = {name for name, param in net.named_parameters() if param.requires_grad}
    assert not trained & {"5.mean", "5.rho", "1.bias"}
    assert {"5.bias", "1.mean", "1.rho", "6.mean", "6.rho"} <= trained
