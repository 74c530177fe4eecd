"""LoRA: low-rank adapters on a decoder whose own weights stand still (arXiv 2106.09685, equation 3).

    h = W x + b + alpha / r B A x         A (r, in), B (out, r), rank r far below both

B starts at zero, so that the adapted decoder starts as the decoder. An adapter keeps the names `weight` and `bias` of
what it adapts and adds `lora_a` and `lora_b`: a checkpoint of the plain decoder fits but for those.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Linear):
    """x (.., in) -> (.., out). Takes over the parameters of `base` as they are; the adapter has their dtype: what bf16
    cannot hold of its small steps is kept by the optimizer's fp32 copies."""

    def __init__(self, base, rank, alpha, generator):
        nn.Module.__init__(self)            # not nn.Linear's, which would make and draw a second W
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        # Drawn in fp32 where the generator lives: one seed gives one adapter on every device and in every dtype. The
        # bound is kaiming_uniform_'s with a = sqrt(5), as in the paper's code.
        drawn = torch.empty(rank, base.in_features, device=None if generator is None else generator.device)
        bound = base.in_features ** -0.5
        self.lora_a = nn.Parameter(base.weight.new_empty(drawn.shape))
        with torch.no_grad():
            self.lora_a.copy_(drawn.uniform_(-bound, bound, generator=generator))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale, self.on = alpha / rank, True

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        if not self.on:
            return out
        # Scaled where it is narrow.
        return out + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)


def adapters(module):
    """The LoraLinears inside `module`, a list, in its own order."""
    return [m for m in module.modules() if isinstance(m, LoraLinear)]


def _replace(module, kind, make):
    """Puts make(name, child) in the place of every sub-module of `kind` for which it gives one."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind) and (new := make(name, child)) is not None:
                setattr(parent, name, new)


def attach(module, targets, rank, alpha, generator=None):
    """Freezes the decoder `module` and adapts Linears of its blocks, in place; -> `module`.

    targets: their last names, "q_proj,v_proj", or "all"; not the head, whose weight is also read without its module.
    alpha: numerator of the scale alpha / rank. generator: of A; None: torch's own. Meta tensors and any device will do.
    Raises ValueError on a name that no Linear has, a rank or alpha that is not positive, and adapters already there.
    """
    linears = {name.rpartition(".")[2] for name, m in module.layers.named_modules() if isinstance(m, nn.Linear)}
    chosen = linears if targets == "all" else {name.strip() for name in targets.split(",")}
    if unknown := sorted(chosen - linears):
        raise ValueError(f"targets {targets!r}: {unknown[0]!r} must be all or some of {', '.join(sorted(linears))}")
    if rank < 1 or rank != int(rank):
        raise ValueError(f"rank {rank} must be a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha {alpha} must be positive and finite")
    if adapters(module):
        raise ValueError(f"targets {targets!r}: this decoder has adapters already; merge them first")
    module.requires_grad_(False)
    _replace(module.layers, nn.Linear,
             lambda name, base: LoraLinear(base, rank, alpha, generator) if name in chosen else None)
    return module


@torch.no_grad()
def _folded(layer):
    """W + alpha / r B A, summed in fp32 or wider and rounded once to the weight's dtype."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    sum_ = layer.weight.to(wide) + layer.scale * (layer.lora_b.to(wide) @ layer.lora_a.to(wide))
    return sum_.to(layer.weight.dtype)


def merged(module):
    """The state dict that `module` would have after `merge`; the module stays as it is."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            state[f"{name}.weight"] = _folded(layer)
            del state[f"{name}.lora_a"], state[f"{name}.lora_b"]
    return state


def merge(module):
    """Folds every adapter into its weight and puts plain Linears in their places, frozen as they were; -> `module`."""
    def plain(_, layer):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        layer.weight.data = _folded(layer)
        linear.weight = layer.weight
        linear.register_parameter("bias", layer.bias)
        return linear

    _replace(module, LoraLinear, plain)
    return module


@contextmanager
def off(module):
    """Inside it the adapters of `module` are ignored. One may stand inside another."""
    before = [(layer, layer.on) for layer in adapters(module)]
    try:
        for layer, _ in before:
            layer.on = False
        yield
    finally:
        for layer, on in before:
            layer.on = on
