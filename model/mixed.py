"""Mixed precision (arXiv 1710.03740) for a decoder in fp32: only the products of its blocks are in bf16.

    out = bf16(x) bf16(W)^T + b         dx = bf16(g) bf16(W)         dW = bf16(g)^T bf16(x)

summed in fp32, rounded to bf16 where the product ends, and fp32 from there: weights, their gradients and the
optimizer, the residual stream, norms, attention and the head. So small steps are not lost. It is faster only where the
hardware multiplies bf16 (GPUs; CPUs with avx512_bf16 or amx_bf16).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from model.lora import adapters, replace_children
from model.runs.device import pick_dtype


class _Product(torch.autograd.Function):
    """x (.., in) -> (.., out) in x's dtype; narrow: the weight in bf16, which the gradient does not go through."""

    @staticmethod
    def forward(ctx, x, weight, narrow):
        rows = x.to(narrow.dtype)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, narrow)
        return F.linear(rows, narrow).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        rows, narrow = ctx.saved_tensors
        narrow_g = g.to(narrow.dtype)
        dx = None
        dw = None
        if ctx.needs_input_grad[0]:
            dx = (narrow_g @ narrow).to(g.dtype)
        if ctx.needs_input_grad[1]:
            dw = (narrow_g.flatten(0, -2).T @ rows.flatten(0, -2)).to(g.dtype)
        return dx, dw, None


class MixedLinear(nn.Linear):
    """x (.., in) -> (.., out). Takes over the parameters of `base` as they are.

    steps: taken by any optimizer so far. torch's fused AdamW changes weights without a change of their version.
    """
    steps = 0

    def __init__(self, base):
        nn.Module.__init__(self)            # not nn.Linear's, which would make and draw a second W
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.narrow = None                  # the weight in bf16
        self.narrow_of = (None,)            # the weight that it was made of, and its state then

    def narrow_weight(self):
        """The weight in bf16, cast anew where a step was taken or the weight was written to or replaced: a step of
        sampling has so few rows that a cast of its own would take as long as the product. What is written through
        `weight.data` is not seen."""
        weight, *state = self.narrow_of
        now = [self.weight._version, self.weight.data_ptr(), MixedLinear.steps]
        if weight is not self.weight or state != now:
            self.narrow = self.weight.detach().bfloat16()
            self.narrow_of = (self.weight, *now)
        return self.narrow

    def forward(self, x):
        narrow = self.narrow_weight()
        if torch.is_grad_enabled():
            out = _Product.apply(x, self.weight, narrow)
        else:
            out = F.linear(x.to(narrow.dtype), narrow).to(x.dtype)
        if self.bias is None:
            return out
        return out + self.bias


def _count_step(*_):
    MixedLinear.steps += 1


register_optimizer_step_post_hook(_count_step)


def mix(llm):
    """Puts a MixedLinear in the place of every Linear in the blocks of a decoder; -> `llm`. Raises ValueError on one
    with adapters."""
    if adapters(llm):
        raise ValueError("--dtype=mixed takes no decoder with adapters; expected --dtype=bfloat16, or merged ones")
    replace_children(llm.layers, nn.Linear, _mixed)
    return llm


def _mixed(_, linear):
    """The MixedLinear of a Linear; None, so that it stays, of one that is mixed already."""
    if isinstance(linear, MixedLinear):
        return None
    return MixedLinear(linear)


def in_dtype(vlm, name):
    """A model computing as --dtype=name says; -> `vlm`."""
    vlm = vlm.to(pick_dtype(name))
    if name == "mixed":
        mix(vlm.llm)
    return vlm
