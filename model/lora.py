"""LoRA: low-rank adapters on a decoder whose own weights stay frozen (arXiv 2106.09685, eq. 3).

    h = W x + b + alpha / r B A x         A (r, in), B (out, r), rank r far below both

B starts at zero, so that the adapted decoder starts as the decoder. An adapter keeps the names
`weight` and `bias` of what it adapts and adds `lora_a` and `lora_b`: a checkpoint of the plain
decoder fits but for those.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.runs.config import check_fields, number


@dataclass(frozen=True)
class LoraOptions:
    """low-rank adapters in the decoder's blocks"""
    lora_rank: int = number(0, "[0, 10000]")        # adapters in the decoder's blocks, which then stand still; 0: none
    lora_alpha: float = number(16.0, "(0, 1000000]")  # their output counts alpha / rank
    lora_targets: str = "q_proj,v_proj"             # Linears that get one, or all

    def __post_init__(self):
        check_fields(self)


class LoraLinear(nn.Linear):
    """x (.., in) -> (.., out). Takes over the parameters of `base` as they are. The adapter has
    their dtype: what bf16 cannot hold of its small steps, the optimizer's fp32 copies keep."""

    def __init__(self, base, rank, alpha, generator):
        nn.Module.__init__(self)            # not nn.Linear's, which would make and draw a second W
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        # Drawn in fp32 where the generator lives: one seed gives one adapter on every device and in
        # every dtype. The bound is kaiming_uniform_'s with a = sqrt(5), as in the paper's code.
        device = None if generator is None else generator.device
        drawn = torch.empty(rank, base.in_features, device=device)
        bound = base.in_features ** -0.5
        self.lora_a = nn.Parameter(base.weight.new_empty(drawn.shape))
        with torch.no_grad():
            self.lora_a.copy_(drawn.uniform_(-bound, bound, generator=generator))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank
        self.on = True                      # `off` turns it off for a while

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        if not self.on:
            return out
        narrow = F.linear(x, self.lora_a) * self.scale      # scaled where there is least to scale
        return out + F.linear(narrow, self.lora_b)


def adapters(module):
    """The LoraLinears inside `module`, a list, in its own order."""
    return [m for m in module.modules() if isinstance(m, LoraLinear)]


def replace_children(module, kind, make):
    """Puts make(name, child) in the place of every sub-module of `kind`, where it is not None."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, kind):
                continue
            new = make(name, child)
            if new is not None:
                setattr(parent, name, new)


def attach(module, targets, rank, alpha, generator=None):
    """Freezes the decoder `module` and adapts Linears of its blocks, in place; -> `module`.

    targets: their last names, "q_proj,v_proj", or "all"; not the head, whose weight is also read
    without its module.
    alpha: numerator of the scale alpha / rank. generator: of A; None: torch's own. Works on any
    device, meta included.
    Raises ValueError on a name that no Linear has, a rank or alpha that is not positive, and on
    adapters already there.
    """
    linears = _linear_names(module.layers)
    chosen = linears
    if targets != "all":
        chosen = {name.strip() for name in targets.split(",")}
    unknown = sorted(chosen - linears)
    if unknown:
        raise ValueError(f"targets {targets!r}: {unknown[0]!r} must be all or some of "
                         f"{', '.join(sorted(linears))}")
    if rank < 1 or rank != int(rank):
        raise ValueError(f"rank {rank} must be a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha {alpha} must be positive and finite")
    if adapters(module):
        raise ValueError(f"targets {targets!r}: this decoder has adapters already; merge them "
                         "first")

    def adapted(name, base):
        return LoraLinear(base, rank, alpha, generator) if name in chosen else None

    module.requires_grad_(False)
    replace_children(module.layers, nn.Linear, adapted)
    return module


def _linear_names(module):
    """The last names of all Linears inside, a set."""
    names = set()
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear):
            names.add(path.rpartition(".")[2])
    return names


@torch.no_grad()
def _folded(layer):
    """W + alpha / r B A, summed in fp32 or wider and rounded once to the weight's dtype."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    product = layer.lora_b.to(wide) @ layer.lora_a.to(wide)
    total = layer.weight.to(wide) + layer.scale * product
    return total.to(layer.weight.dtype)


def merged(module):
    """The state dict that `module` would have after `merge`; the module stays as it is."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            state[f"{name}.weight"] = _folded(layer)
            del state[f"{name}.lora_a"]
            del state[f"{name}.lora_b"]
    return state


def merge(module):
    """Folds every adapter into its weight and puts plain Linears in their places, which stay
    frozen; -> `module`."""
    replace_children(module, LoraLinear, _plain)
    return module


def _plain(_, layer):
    """The Linear that an adapter becomes, with its parameters."""
    has_bias = layer.bias is not None
    linear = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    layer.weight.data = _folded(layer)
    linear.weight = layer.weight
    linear.register_parameter("bias", layer.bias)
    return linear


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
