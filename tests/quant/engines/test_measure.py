"""int8 kernels of this CPU: `requantize` equals them at rounding ties, on every engine."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.quant.engines import engine, measure
from bqnn.quant.engines.contract import ActivationGrid, Layer, LayerEngine, Weight
from bqnn.quant.engines.rounding import as_floats, requantize, sum_within_layer

ENGINES = [name for name in ("fbgemm", "x86", "onednn") if engine(name).missing() is None]
KINDS: dict[str, tuple[tuple[int, ...], int]] = {  # the weight's shape, and groups
    "linear": ((24, 40), 1),
    "wide": ((10, 300), 1),
    "conv": ((16, 8, 3, 3), 1),
    "stem": ((8, 1, 5, 5), 1),
    "1x1": ((16, 24, 1, 1), 1),
    "grouped": ((16, 4, 3, 3), 4),
    "depthwise": ((16, 1, 3, 3), 16),
    "many groups": ((104, 1, 3, 3), 104),
}


def inputs_of(kind: str, rows: int) -> tuple[int, ...]:
    shape, groups = KINDS[kind]
    return (rows, shape[1] * groups) + ((6, 6) if len(shape) == 4 else ())


def near_ties(kind: str, rows: int, seed: int, *, per_channel: bool, affine: bool) -> dict:
    """Create a layer whose sums are often halfway between two integers, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    shape, groups = KINDS[kind]
    geometry = Geometry((1, 1), (1, 1), (1, 1), groups) if len(shape) == 4 else None
    integers = torch.randint(-3, 4, shape, generator=generator).float()
    x = torch.randint(0, 4, inputs_of(kind, rows), generator=generator).float()
    step = float(torch.rand(1, generator=generator) * 0.01 + 0.001)
    in_scale = float(torch.rand(1, generator=generator) * 0.05 + 0.01)
    scale = torch.full((shape[0] if per_channel else 1,), step)
    scale *= 1 + torch.randint(-8, 9, scale.shape, generator=generator) * 2.0**-23
    zero_point = torch.full(scale.shape, 3 if affine else 0, dtype=torch.int32)
    sums = linear_map(x.double(), integers.double(), None, geometry).float()
    spread = max(1, round(float(sums.abs().max()) / 60))
    bias = torch.randint(-20, 20, shape[:1], generator=generator) * (in_scale * step)
    return {
        "geometry": geometry,
        "steps": integers,
        "scale": scale,
        "zero_point": zero_point,
        "x": x,
        "in_scale": in_scale,
        "sums": sums,
        "bias": bias * (1 + torch.randint(-8, 9, shape[:1], generator=generator) * 2.0**-23),
        "out_scale": 2 * spread * in_scale * step,
    }


def executed_and_expected(
    made: dict, name: str, *, has_bias: bool, relu: bool, offset: int
) -> tuple[Tensor, Tensor]:
    bias = made["bias"] if has_bias else None
    output = ActivationGrid(float(torch.tensor(made["out_scale"])), 0 if relu else 80, 255)
    integers = (made["steps"] + made["zero_point"][0]).to(torch.int8)
    geometry = made["geometry"]
    chosen = engine(name)
    assert isinstance(chosen, LayerEngine)
    packed = chosen.pack(Weight(integers, made["scale"], made["zero_point"], bias, geometry))
    x = chosen.wrap((made["x"] + offset).to(torch.uint8), made["in_scale"], offset)
    got = chosen.integers(packed(x, relu, output)).int()
    layer = Layer(
        tuple(integers.shape),
        geometry,
        per_channel=len(made["scale"]) > 1,
        has_bias=has_bias,
        relu=relu,
        is_zero=(not made["zero_point"].any(), offset == 0, relu),
    )
    rounding = chosen.rounding(layer, x.shape)
    steps = requantize(
        made["sums"], made["in_scale"], made["scale"], bias, output, relu=relu, rounding=rounding
    )
    return got, steps.int() + output.zero_point


@pytest.mark.parametrize("scheme", ["channel", "tensor", "affine"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENGINES)
def test_ties_fall_on_the_side_that_the_kernel_takes(name: str, kind: str, scheme: str) -> None:
    if name == "onednn" and scheme == "affine":
        pytest.skip("oneDNN supports only symmetric weights")
    for seed, rows in enumerate((1, 2, 16, 16)):
        made = near_ties(
            kind, rows, seed, per_channel=scheme == "channel", affine=scheme == "affine"
        )
        for has_bias in (False, True):
            for relu in (False, True):
                for offset in (0, 5):
                    got, expected = executed_and_expected(
                        made, name, has_bias=has_bias, relu=relu, offset=offset
                    )
                    assert torch.equal(got, expected), (rows, has_bias, relu, offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in ENGINES if engine(name).adds_within_layers])
def test_ties_fall_alike_in_sums_that_a_layer_rounds(name: str, kind: str) -> None:
    chosen = engine(name)
    assert isinstance(chosen, LayerEngine)
    for seed, rows in enumerate((1, 16, 16)):
        made = near_ties(kind, rows, seed, per_channel=True, affine=False)
        generator = torch.Generator().manual_seed(seed)
        others = torch.randint(0, 200, made["sums"].shape, generator=generator).float()
        for has_bias, relu, offset, shift in product((False, True), (False, True), (0, 5), (0, 7)):
            bias = made["bias"] if has_bias else None
            weight = Weight(
                made["steps"].to(torch.int8),
                made["scale"],
                made["zero_point"],
                bias,
                made["geometry"],
            )
            x = chosen.wrap((made["x"] + offset).to(torch.uint8), made["in_scale"], offset)
            other_scale = made["out_scale"] / 2
            other = chosen.wrap(others.to(torch.uint8), other_scale, shift)
            output = ActivationGrid(float(torch.tensor(made["out_scale"])), 80, 255)
            got = chosen.integers(chosen.pack(weight).add(x, other, relu, output)).int()
            layer = Layer(
                tuple(weight.integers.shape),
                made["geometry"],
                per_channel=True,
                has_bias=has_bias,
                relu=relu,
                is_zero=(True, offset == 0, False),
                other_is_zero=shift == 0,
            )
            rounding = chosen.rounding(layer, x.shape)
            floats = as_floats(made["sums"], made["in_scale"], made["scale"], bias, rounding)
            summand = (others - shift, other_scale, shift)
            steps = sum_within_layer(floats, summand, output, relu=relu)
            assert torch.equal(got, steps.int() + 80), (rows, has_bias, relu, offset, shift)


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_ties_are_followed_on_lesser_cpus(isa: str) -> None:
    """An environment variable limits the CPU features of oneDNN; FBGEMM ignores it."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "ties_fall and not fbgemm"]
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_only_bits_that_leave_16_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer((4, 8), None, True, False, False, (True, True, True))
    monkeypatch.setattr(measure, "has_vnni", lambda: False)
    for name in ENGINES:
        found = {
            (weight_bits, activation_bits)
            for weight_bits in range(2, 9)
            for activation_bits in range(2, 9)
            if engine(name).can_be_wrong(layer, weight_bits, activation_bits)
        }
        assert found == {(8, 8)}
