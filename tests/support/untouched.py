"""What a call may not change: the model, and the process."""

import warnings

import torch


def process_flags():
    cuda = torch.backends.cuda
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn_sdp": cuda.cudnn_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "warnings": list(warnings.filters),
    }


class Untouched:
    """Everything of a model and of the process that must be as before."""

    def __init__(self, model):
        self.model = model
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
        self.before = self._look()

    def _look(self):
        m = self.model
        return {
            "parameters": {k: p.detach().clone() for k, p in m.named_parameters()},
            "buffers": {k: b.clone() for k, b in m.named_buffers()},
            "grads": {k: None if p.grad is None else p.grad.clone() for k, p in m.named_parameters()},
            "identities": [(id(p), p.data_ptr(), p.requires_grad, p.grad_fn) for p in m.parameters()],
            "buffer identities": [(id(b), b.data_ptr()) for b in m.buffers()],
            "training": [s.training for s in m.modules()],
            "classes": [type(s) for s in m.modules()],
            "attributes": [sorted(set(vars(s)) - {"output_size", "calls"}) for s in m.modules()],
            "parameter attributes": [sorted(vars(p)) for p in m.parameters()],
            "hooks": [
                (len(s._forward_hooks), len(s._forward_pre_hooks), len(s._backward_hooks))
                for s in m.modules()
            ],
            "flags": process_flags(),
        }

    def check(self):
        after = self._look()
        for name, before in self.before.items():
            if isinstance(before, dict) and name != "flags":
                assert before.keys() == after[name].keys()
                for key, value in before.items():
                    got = after[name][key]
                    assert got is value or torch.equal(got, value), (name, key)
            else:
                assert after[name] == before, name
