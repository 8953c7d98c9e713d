"""What a call may not change: the model, and the process."""

import signal
import warnings

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from laplace_ella.network import safety


def process_flags():
    """Return the switches, modes and stacks of torch and Python that calls go near."""
    cuda, private = torch.backends.cuda, torch._C
    level = private._functorch.peek_interpreter_stack()
    attention = ("flash", "mem_efficient", "math", "cudnn")
    return {
        "grad": (torch.is_grad_enabled(), private._is_fwd_grad_enabled()),
        "inference": torch.is_inference_mode_enabled(),
        "attention": [getattr(cuda, f"{kind}_sdp_enabled")() for kind in attention],
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "vmap": (private._functorch._is_vmap_fallback_enabled(), safety._vmap_warns),
        "transforms": (None if level is None else level.level(), eager_transforms.JVP_NESTING),
        "dual level": forward_ad._current_level,
        "modes": (private._len_torch_function_stack(), private._len_torch_dispatch_stack()),
        "warnings": list(warnings.filters),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "lock": safety.LOCK._is_owned(),
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
        parts = list(m.modules())
        return {
            "parameters": {k: p.detach().clone() for k, p in m.named_parameters()},
            "buffers": {k: b.clone() for k, b in m.named_buffers()},
            "grads": {k: None if p.grad is None else p.grad.clone() for k, p in m.named_parameters()},
            "identities": [(id(p), p.data_ptr(), p.requires_grad, p.grad_fn) for p in m.parameters()],
            "buffer identities": [(id(b), b.data_ptr()) for b in m.buffers()],
            "training": [s.training for s in parts],
            "classes": [type(s) for s in parts],
            "attributes": [sorted(set(vars(s)) - {"output_size", "calls"}) for s in parts],
            "tensors": [{k: id(v) for k, v in vars(s).items() if isinstance(v, Tensor)} for s in parts],
            "parameter attributes": [sorted(vars(p)) for p in m.parameters()],
            "hooks": [
                (len(s._forward_hooks), len(s._forward_pre_hooks), len(s._backward_hooks)) for s in parts
            ],
            "flags": process_flags(),
        }

    def check(self, where=""):
        after = self._look()
        for name, before in self.before.items():
            if isinstance(before, dict) and name != "flags":
                assert before.keys() == after[name].keys(), where
                for key, value in before.items():
                    got = after[name][key]
                    assert got is value or torch.equal(got, value), (name, key, where)
            else:
                assert after[name] == before, (name, where)
