from laplace.curvature.curvature import EFInterface, GGNInterface


class CurvlinopsGGN(GGNInterface):
    pass


class CurvlinopsEF(EFInterface):
    pass
