from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN

__all__ = ["CurvatureInterface", "CurvlinopsEF", "CurvlinopsGGN", "EFInterface", "GGNInterface"]
