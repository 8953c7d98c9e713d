"""A stand-in for another laplace-torch, as far as plug-ins see one: what 0.4 to 0.5.1 did to theirs, and more.

Helpers are elsewhere (``_functional_utils.py``), only curvlinops' backends are exported, constructors have new arguments
between the old ones and other names for those, and with STAND_IN=registry in the environment the factory knows its own
classes alone. Everything that ``laplace_ella.host`` uses is there.
"""

from laplace.baselaplace import BaseLaplace, FullLaplace, ParametricLaplace
from laplace.laplace import Laplace

__all__ = ["BaseLaplace", "FullLaplace", "Laplace", "ParametricLaplace"]
