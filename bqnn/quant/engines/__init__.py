"""Engines: how an int8 network is executed, and how its sums are rounded.

`contract` says what an engine must do, and each other file is one engine: `fbgemm` (and x86) on
torch's quantized tensors, `onednn` and `reference` on plain integers, and `onnxruntime`. `rounding`
has the formulas that the simulation shares with them, and `measure` finds out which formula a
kernel of this CPU follows.
"""

import functools
import logging
import warnings
from importlib import import_module

from bqnn.quant.engines.contract import Engine
from bqnn.quant.spec import ENGINES

log = logging.getLogger(__name__)

# torch 2.13 and newer warn of each quantized type, which fbgemm.py makes. Only the warnings of this
# package are silenced. The filter is set here, since fbgemm.py is imported where it is first used,
# perhaps in a `catch_warnings`.
warnings.filterwarnings(
    "ignore",
    message=r"torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor "
    r"creation functions that produce tensors with dtype torch.quint8, torch.qint8, and "
    r"torch.qint32 are deprecated",
    category=UserWarning,
    module=r"bqnn\.quant\.",
)

_MODULES = {name: "fbgemm" if name == "x86" else name for name in ENGINES}


@functools.cache
def engine(name: str) -> Engine:
    """Return the engine with a name, whether or not it can run on this machine.

    Args:
        name: One of `bqnn.quant.spec.ENGINES`.

    Examples:
        >>> engine("reference").missing() is None
        True
    """
    package = Engine.__module__.rpartition(".")[0]
    module = import_module(f"{package}.{_MODULES[name]}")
    made: Engine = module.make(name)
    return made


@functools.cache
def usable_engine(name: str) -> Engine:
    """Return the engine with a name if it can run here; otherwise `reference`, with a warning.

    Args:
        name: One of `bqnn.quant.spec.ENGINES`.
    """
    found = engine(name)
    reason = found.missing()
    if reason is None:
        return found
    log.warning(
        "engine=%s: %s; using engine=reference, which is slower and rounds ties in its own way",
        name,
        reason,
    )
    return engine("reference")
