"""As where BackPACK is optional: the module can be imported, and its class be named."""

from laplace.curvature.curvature import EFInterface, GGNInterface


class BackPackGGN(GGNInterface):
    pass


class BackPackEF(EFInterface):
    pass
