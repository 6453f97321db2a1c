"""Without torch's quantized tensors, only the engines fbgemm and x86 are missing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLUGIN = "tests.quant.engines.no_quantized_tensors"
ENGINES = ("onednn", "onnxruntime", "reference")


@pytest.mark.parametrize("name", ENGINES)
def test_the_other_engines_make_no_quantized_tensor(name: str) -> None:
    tests = ROOT / "tests" / "quant" / "engines" / f"test_{name}.py"
    chosen = "int8_computes or max_pools or copies or residual or networks_of_plain"
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-q", str(tests), "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


CODE = f"""
import {PLUGIN}
import torch
from torch import nn
from bqnn import QuantSpec, convert, prepare_qat, quantize
from bqnn.quant.engines import engine, usable_engine

assert [engine(name).missing() is None for name in ("fbgemm", "x86")] == [False, False]
assert usable_engine("fbgemm").name == "reference"
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
x = torch.randn(16, 3)
simulated = prepare_qat(net, QuantSpec(weight_bits=4)).train()
simulated(x).sum().backward()
with torch.no_grad():
    expected = simulated.eval()(x)
assert torch.equal(convert(simulated)(x), expected)
assert (quantize(net, [x])(x) - net(x)).abs().max() < 0.05
"""


def test_the_default_engine_falls_back_to_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "engine=fbgemm: this version of torch has no operators on quantized tensors" in (
        done.stdout + done.stderr
    )
