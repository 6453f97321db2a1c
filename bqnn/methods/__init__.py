"""The methods; a new one is a file here, a line below, and conf/method/<name>.yaml."""

from bqnn.methods.base import Method
from bqnn.methods.bbb import BayesByBackprop
from bqnn.methods.ensemble import DeepEnsemble
from bqnn.methods.mcdropout import MCDropoutMethod
from bqnn.methods.members import MemberTuning
from bqnn.methods.pointwise import Pointwise
from bqnn.methods.sghmc import SGHMCEnsemble

__all__ = [
    "METHODS",
    "BayesByBackprop",
    "DeepEnsemble",
    "MCDropoutMethod",
    "MemberTuning",
    "Method",
    "Pointwise",
    "SGHMCEnsemble",
]

METHODS: dict[str, type[Method]] = {
    "pointwise": Pointwise,
    "bbb": BayesByBackprop,
    "mcdropout": MCDropoutMethod,
    "sghmc": SGHMCEnsemble,
    "ensemble": DeepEnsemble,
}
