"""Bayesian neural networks at reduced precision.

The names below are the public interface. Each is imported when it is first used, so that
`import bqnn` takes no time. The modules that they come from have further functions.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bqnn.checkpoints.model import load as load
    from bqnn.inference.predict import predictive as predictive
    from bqnn.layers.bayes import BayesConv2d as BayesConv2d
    from bqnn.layers.bayes import BayesLinear as BayesLinear
    from bqnn.layers.bayes import kl_divergence as kl_divergence
    from bqnn.layers.bayes import to_bayes as to_bayes
    from bqnn.layers.dropout import to_mcdropout as to_mcdropout
    from bqnn.layers.ensemble import Ensemble as Ensemble
    from bqnn.optim import SGHMC as SGHMC
    from bqnn.quant.integer import convert as convert
    from bqnn.quant.quantize import prepare_qat as prepare_qat
    from bqnn.quant.quantize import quantize as quantize
    from bqnn.quant.spec import QuantSpec as QuantSpec

    __version__: str

_MODULES = {
    "SGHMC": "bqnn.optim",
    "BayesConv2d": "bqnn.layers.bayes",
    "BayesLinear": "bqnn.layers.bayes",
    "Ensemble": "bqnn.layers.ensemble",
    "QuantSpec": "bqnn.quant.spec",
    "convert": "bqnn.quant.integer",
    "kl_divergence": "bqnn.layers.bayes",
    "load": "bqnn.checkpoints.model",
    "predictive": "bqnn.inference.predict",
    "prepare_qat": "bqnn.quant.quantize",
    "quantize": "bqnn.quant.quantize",
    "to_bayes": "bqnn.layers.bayes",
    "to_mcdropout": "bqnn.layers.dropout",
}
__all__ = list(_MODULES)


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return metadata.version("bqnn")
        if name not in _MODULES:
            raise AttributeError(f"module 'bqnn' has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value  # the next access does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
