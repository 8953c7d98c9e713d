"""ELLA for laplace-torch: linearised Laplace over all weights, at a price one can pay.

Importing this package registers ``subset_of_weights="all", hessian_structure="ella"``
with :func:`laplace.Laplace`.
"""

from .backends import AsdlNystromGGN, BackPackNystromGGN, NystromGGN, ReverseNystromGGN
from .ella import ELLALaplace, Laplace
from .fitting.plan import Plan
from .network.memory import raise_malloc_thresholds
from .nystrom.basis import NystromBasis
from .parallel.ranks import RankError

__version__ = "0.1.0"

__all__ = [
    "AsdlNystromGGN",
    "BackPackNystromGGN",
    "ELLALaplace",
    "Laplace",
    "NystromBasis",
    "NystromGGN",
    "Plan",
    "RankError",
    "ReverseNystromGGN",
    "raise_malloc_thresholds",
]
