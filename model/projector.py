"""Projectors: from the image tower's features to tokens of the decoder.

A projector is a class and a line of PROJECTORS; `--projector=NAME` picks it. Its contract:

    Projector(config)               made from a VlmConfig
    forward(features)               (I, N, Dv) -> (I, M, D)
    tokens(config)                  M, how many tokens a picture becomes; static, asked before there
                                    are weights
    flops(pictures)                 matmul FLOPs of a forward over so many pictures
    backward_flops(pictures, features_train=False)
                                    of its backward, as far as something trains

A chain of Linears and activations that every patch goes through, with the forward that it inherits,
needs neither of the last two. Any other, one that pools for instance, does: the Meter refuses to guess.

Shapes: I pictures, N patches, Dv vision width, M tokens of a picture, D decoder width, H heads of
width K.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from model.flops import trains


class Linear(nn.Linear):
    """W of LLaVA (arXiv 2304.08485, section 4.1): every patch becomes a token."""

    def __init__(self, config):
        super().__init__(config.clip.width, config.llm.width)

    @staticmethod
    def tokens(config):
        return config.clip.patches


class Mlp(nn.Sequential):
    """Two layers with GELU between them, as in LLaVA-1.5 (arXiv 2310.03744, section 3.3); every
    patch becomes a token."""

    def __init__(self, config):
        width = config.llm.width
        super().__init__(nn.Linear(config.clip.width, width), nn.GELU(), nn.Linear(width, width))

    @staticmethod
    def tokens(config):
        return config.clip.patches


class Resampler(nn.Module):
    """M learned queries, each of which gathers one token from the patches by cross-attention:

        tokens = W_o attention(W_q norm(queries), W_k norm(features), W_v norm(features))

    One layer, as in Qwen-VL (arXiv 2308.12966, section 2.1), of what Flamingo repeats six times
    with an MLP behind each (Perceiver resampler, arXiv 2204.14198, section 3.1.1). Qwen-VL adds 2-D
    sinusoids to queries and keys; here the positions come with the features, from the tower. The
    heads are as many and as wide as the decoder's.
    """

    def __init__(self, config):
        super().__init__()
        vision = config.clip.width
        width = config.llm.width
        self.heads = config.llm.heads
        inner = self.heads * config.llm.head_width
        self.patches = config.clip.patches
        # Small, as in Qwen-VL: the norm gives them unit scale, and small ones still turn quickly.
        self.queries = nn.Parameter(0.02 * torch.randn(self.tokens(config), width))
        self.q_norm = nn.LayerNorm(width)
        self.kv_norm = nn.LayerNorm(vision)
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(vision, inner, bias=False)      # softmax would not see a bias
        self.v_proj = nn.Linear(vision, inner)
        self.o_proj = nn.Linear(inner, width)

    @staticmethod
    def tokens(config):
        return config.queries or max(1, config.clip.patches // 4)

    def forward(self, features):
        q = self.q_proj(self.q_norm(self.queries)).expand(len(features), -1, -1)    # (I, M, H K)
        normed = self.kv_norm(features)                                             # (I, N, Dv)
        q = rearrange(q, "i m (h k) -> i h m k", h=self.heads)
        k = rearrange(self.k_proj(normed), "i n (h k) -> i h n k", h=self.heads)
        v = rearrange(self.v_proj(normed), "i n (h k) -> i h n k", h=self.heads)
        gathered = F.scaled_dot_product_attention(q, k, v)                          # (I, H, M, K)
        return self.o_proj(rearrange(gathered, "i h m k -> i m (h k)"))             # (I, M, D)

    def _rows(self, pictures):
        """(Linear, rows that it multiplies) of a forward: the queries are the same for all
        pictures, so q_proj sees them once."""
        queries = len(self.queries)
        return [(self.q_proj, queries), (self.k_proj, pictures * self.patches),
                (self.v_proj, pictures * self.patches), (self.o_proj, pictures * queries)]

    def _product(self, pictures):
        """FLOPs of one product of attention: queries with keys, or probabilities with values."""
        return 2 * pictures * len(self.queries) * self.patches * self.q_proj.out_features

    def flops(self, pictures):
        """Matmul FLOPs of a forward."""
        if not pictures:
            return 0
        total = 2 * self._product(pictures)
        for linear, rows in self._rows(pictures):
            total += 2 * rows * linear.weight.numel()
        return total

    def backward_flops(self, pictures, features_train=False):
        """Matmul FLOPs of a backward: a product for each weight that trains, one for each input
        that needs a gradient; five in fused attention, which computes its scores again.

        features_train: whether the features need a gradient, since the image tower trains.
        """
        if not pictures:
            return 0
        query = self.queries.requires_grad or trains(self.q_norm)
        patch = features_train or trains(self.kv_norm)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        attended = query or patch or any(trains(linear) for linear in projections)
        needs = {self.q_proj: query, self.k_proj: patch, self.v_proj: patch, self.o_proj: attended}
        total = 0
        if attended:
            total += 5 * self._product(pictures)
        for linear, rows in self._rows(pictures):
            products = linear.weight.requires_grad + needs[linear]
            total += 2 * products * rows * linear.weight.numel()
        return total


PROJECTORS = {"linear": Linear, "mlp2x_gelu": Mlp, "resampler": Resampler}
