class CurvatureInterface:
    def __init__(
        self,
        model,
        likelihood,
        functional=False,  # new
        last_layer=False,
        subnetwork_indices=None,
        input_key="input_ids",  # dict_key_x
        target_key="labels",  # dict_key_y
    ):
        assert likelihood in ("classification", "regression")
        self.model, self.likelihood = model, likelihood
        self.last_layer, self.subnetwork_indices = last_layer, subnetwork_indices


class GGNInterface(CurvatureInterface):
    def __init__(self, model, likelihood, functional=False, stochastic=False, **kwargs):
        super().__init__(model, likelihood, functional, **kwargs)
        self.stochastic = stochastic


class EFInterface(CurvatureInterface):
    pass
