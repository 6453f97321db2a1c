"""int8 kernels of this CPU: `requantize` equals them at rounding ties, on every engine."""

import os
import subprocess
import sys

import pytest
import torch
from bqnn.quant.fbgemm import PackedWeight, make_fake_quant, quantized_weight, requantize
from torch import Tensor

from bqnn.layers.linear_map import Geometry, linear_map
from bqnn.quant import fbgemm, kernels

SUPPORTED = torch.backends.quantized.supported_engines
ENGINES = [engine for engine in ("fbgemm", "x86", "onednn") if engine in SUPPORTED]
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
    weight = make_fake_quant(8, signed=True, channels=shape[0] if per_channel else None)
    jitter = torch.randint(-8, 9, weight.scale.shape, generator=generator)
    weight.scale.copy_(step * (1 + jitter * 2.0**-23))
    weight.zero_point.fill_(3 if affine else 0)
    sums = linear_map(x.double(), integers.double(), None, geometry).float()
    spread = max(1, round(float(sums.abs().max()) / 60))
    bias = torch.randint(-20, 20, shape[:1], generator=generator) * (in_scale * step)
    return {
        "geometry": geometry,
        "weight": weight,
        "integers": integers,
        "x": x,
        "in_scale": in_scale,
        "sums": sums,
        "bias": bias * (1 + torch.randint(-8, 9, shape[:1], generator=generator) * 2.0**-23),
        "out_scale": 2 * spread * in_scale * step,
    }


def executed_and_expected(
    made: dict, engine: str, *, has_bias: bool, relu: bool, offset: int
) -> tuple[Tensor, Tensor]:
    weight, bias = made["weight"], made["bias"] if has_bias else None
    output = make_fake_quant(8, signed=False)
    output.scale.fill_(made["out_scale"])
    output.zero_point.fill_(0 if relu else 80)
    floats = made["integers"] * weight.along(made["integers"], weight.scale)
    packed = PackedWeight(quantized_weight(floats, weight), bias, made["geometry"], engine)
    x = torch.quantize_per_tensor(
        made["x"] * made["in_scale"], made["in_scale"], offset, torch.quint8
    )
    got = packed(x, relu, float(output.scale), int(output.zero_point)).int_repr().int()
    layer = kernels.Layer(
        engine,
        tuple(made["integers"].shape),
        made["geometry"],
        per_channel=weight.channels is not None,
        has_bias=has_bias,
        relu=relu,
        is_zero=(not weight.zero_point.any(), offset == 0, relu),
    )
    rounding = kernels.rounding_of(layer, x.shape)
    floats = requantize(made["sums"], made["in_scale"], weight, bias, output, relu, rounding)
    return got, (floats / output.scale).round().int() + int(output.zero_point)


@pytest.mark.parametrize("scheme", ["channel", "tensor", "affine"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_ties_fall_on_the_side_that_the_kernel_takes(engine: str, kind: str, scheme: str) -> None:
    if engine == "onednn" and scheme == "affine":
        pytest.skip("oneDNN supports only symmetric weights")
    for seed, rows in enumerate((1, 2, 16, 16)):
        made = near_ties(
            kind, rows, seed, per_channel=scheme == "channel", affine=scheme == "affine"
        )
        for has_bias in (False, True):
            for relu in (False, True):
                for offset in (0, 5):
                    got, expected = executed_and_expected(
                        made, engine, has_bias=has_bias, relu=relu, offset=offset
                    )
                    assert torch.equal(got, expected), (rows, has_bias, relu, offset)


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_ties_are_followed_on_lesser_cpus(isa: str) -> None:
    """An environment variable limits the CPU features of oneDNN; FBGEMM ignores it."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "ties_fall and not fbgemm"]
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_only_bits_that_leave_16_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = kernels.Layer("fbgemm", (4, 8), None, True, False, False, (True, True, True))
    monkeypatch.setattr(fbgemm, "has_vnni", lambda: False)
    found = {(w, a) for w in range(2, 9) for a in range(2, 9) if kernels.saturates(layer, w, a)}
    assert found == {(8, 8)}
