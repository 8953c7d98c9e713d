import torch

from laplace._functional_utils import evidence_step, optimizer_of, prior_of
from laplace.curvature.curvlinops import CurvlinopsGGN


class BaseLaplace:
    def __init__(
        self,
        model,
        likelihood,
        functional=False,  # new
        observation_scale=1.0,  # sigma_noise
        prior_precision=1.0,
        prior_mean=0.0,
        likelihood_temperature=1.0,  # temperature
        enable_backprop=False,
        input_key="input_ids",  # dict_key_x
        target_key="labels",  # dict_key_y
        curvature=None,  # backend
        curvature_kwargs=None,  # backend_kwargs
    ):
        assert likelihood in ("classification", "regression", "reward_modeling")
        self.model, self.likelihood = model, likelihood
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.is_subset_params = len(self.params) < len(list(model.parameters()))
        self.n_params, self.n_layers = sum(p.numel() for p in self.params), len(self.params)
        self.prior_precision, self.prior_mean = prior_precision, prior_mean
        self.sigma_noise, self.temperature = observation_scale, likelihood_temperature
        self.enable_backprop, self.input_key, self.target_key = enable_backprop, input_key, target_key
        self.curvature_cls = CurvlinopsGGN if curvature is None else curvature
        self.curvature_kwargs = curvature_kwargs or {}
        self.loss, self.n_outputs, self.n_data = 0.0, 0, 0

    @property
    def prior_precision_diag(self):
        one = torch.ones(self.n_params, dtype=self.prior_precision.dtype)
        if len(self.prior_precision) in (1, self.n_params):
            return self.prior_precision * one
        sizes = torch.tensor([p.numel() for p in self.params])
        return self.prior_precision.repeat_interleave(sizes)

    def optimize_prior_precision(
        self,
        pred_type,
        method="marglik",
        optimizer="adam",  # new
        n_steps=100,
        lr=0.1,
        init_prior_prec=1.0,
        prior_structure="diag",
        val_loader=None,
        progress_bar=False,
        **more,
    ):
        prior = torch.as_tensor(init_prior_prec)
        log_prior = prior_of(prior.reshape(-1), prior_structure, self.n_layers, self.n_params).log()
        steps = optimizer_of(log_prior, lr)
        for _ in range(n_steps):
            evidence_step(self, steps, log_prior)
        self.prior_precision = log_prior.detach().exp()


class ParametricLaplace(BaseLaplace):
    def __init__(self, model, likelihood, functional=False, **kwargs):
        super().__init__(model, likelihood, functional, **kwargs)
        if not hasattr(self, "H"):
            self._init_H()
            self.mean = self.prior_mean

    def _init_H(self):
        raise NotImplementedError


class FullLaplace(ParametricLaplace):
    _key = ("all", "full")

    def _init_H(self):
        self.H = None
