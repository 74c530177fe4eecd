"""Root mean square layer norm (arXiv 1910.07467) with its gradient written out.

    r = (mean_d x_d^2 + eps)^-1/2,      n = r x,      out = w n
    dw = sum over rows of g n,          dx = r (g w - n mean_d(g w n))

On a CPU torch composes the norm and its gradient out of a dozen passes over the tensor, most of the
time of a layer's elementwise work; these are four forward and five back. CUDA and half precision
have torch's own fused form.
"""
import torch
import torch.nn.functional as F

from kernels.backend import accumulator


# ---------------------------------------------------------------- reference

def rms_norm_reference(x, weight, eps):
    """The formula, statistics in fp32 or wider."""
    wide = x.to(accumulator(x.dtype))
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * r).to(x.dtype) * weight


# ---------------------------------------------------------------- PyTorch form, for CPUs

def _normalise(x, eps):
    """-> n, r of the formula."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    r = torch.addcmul(norm.new_full((1,), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return x * r, r


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        n, r = _normalise(x, eps)
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx, g):
        n, r, weight = ctx.saved_tensors
        gn = g * n
        dx = None
        dw = None
        if ctx.needs_input_grad[0]:
            mean = (gn @ weight).div_(weight.numel())[..., None]
            dx = torch.addcmul(g * weight, n, mean, value=-1).mul_(r)
        if ctx.needs_input_grad[1]:
            dw = gn.flatten(0, -2).sum(0)
        return dx, dw, None


# ---------------------------------------------------------------- op

def rms_norm(x, weight, eps):
    """x (.., D), weight (D,) -> (.., D), each row over its root mean square, times weight."""
    if torch.compiler.is_compiling():
        return rms_norm_reference(x, weight, eps)       # torch.compile fuses the plain formula with what is around it
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    if not torch.is_grad_enabled():         # sampling: a Function costs as much as the norm of few rows
        n, _ = _normalise(x, eps)
        return n.mul_(weight)
    return _RMSNorm.apply(x, weight, eps)
