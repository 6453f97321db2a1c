"""The methods; a new one is a file here, a line below, and conf/method/<name>.yaml."""

from bqnn.methods.base import Method
from bqnn.methods.bbb import BayesByBackprop
from bqnn.methods.compiled import CompileSteps
from bqnn.methods.ensemble import DeepEnsemble
from bqnn.methods.laplace import Laplace
from bqnn.methods.mcdropout import MCDropoutMethod
from bqnn.methods.members import EnsembleMethod, MemberTraining, MemberTuning
from bqnn.methods.pointwise import Pointwise
from bqnn.methods.posthoc import PostHocGaussian
from bqnn.methods.sghmc import SGHMCEnsemble
from bqnn.methods.start import PointwiseStart
from bqnn.methods.swag import SWAG

__all__ = [
    "METHODS",
    "SWAG",
    "BayesByBackprop",
    "CompileSteps",
    "DeepEnsemble",
    "EnsembleMethod",
    "Laplace",
    "MCDropoutMethod",
    "MemberTraining",
    "MemberTuning",
    "Method",
    "Pointwise",
    "PointwiseStart",
    "PostHocGaussian",
    "SGHMCEnsemble",
]

METHODS: dict[str, type[Method]] = {
    "pointwise": Pointwise,
    "bbb": BayesByBackprop,
    "mcdropout": MCDropoutMethod,
    "sghmc": SGHMCEnsemble,
    "swag": SWAG,
    "laplace": Laplace,
    "ensemble": DeepEnsemble,
}
