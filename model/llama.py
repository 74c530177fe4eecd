"""The decoder: a Llama-type transformer whose every block carries two streams at once.

    x (P, T, D)      prompts: text with pictures, right-padded, causal
    y (P, G, C, D)   completions: G of each prompt; each attends to its prompt and itself, causal

The prompt is the same for the G completions of its group, so no token of it is computed twice.
Parameter names are Hugging Face's (`layers.N.self_attn.q_proj`, ...); RoPE is the rotate-half form
those weights expect. One configuration covers LLaMA 1, 2 and 3, Vicuna, TinyLlama, Mistral,
SmolLM2, Qwen 2, 2.5 and 3.

Shapes: P prompts, T prompt tokens, G completions of a prompt, C completion tokens, D width, H
heads, Hk key/value heads (grouped-query attention, arXiv 2305.13245), K width of a head; L tokens
of either stream.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import prefix_attention, rms_norm
from model.runs.config import check_fields, number


@dataclass(frozen=True)
class LlamaConfig:
    vocab: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    ff: int = 256
    theta: float = 10000.0      # RoPE base (arXiv 2104.09864)
    eps: float = 1e-5
    tied: bool = True           # the head is the embedding
    head_width: int = 0         # 0: width / heads
    qkv_bias: bool = False      # on q, k, v: Qwen 2
    out_bias: bool = False      # on o, too: Hugging Face's attention_bias
    qk_norm: bool = False       # RMSNorm of each head's q and k: Qwen 3
    rope_factor: float = 1.0    # stretches the waves: all alike, or with rope_context as LLaMA 3.1
    rope_context: int = 0       # tokens of the first training; a wave that fits into them
    rope_low: float = 1.0       # this often or less is stretched in full,
    rope_high: float = 4.0      # this often or more is left alone
    context: int = 4096         # positions of the weights' training; only an export reads it
    window: int = 0             # longest sequence that full attention is right for; 0: any

    def __post_init__(self):
        if not self.head_width:
            if self.width % (2 * self.heads):
                raise ValueError(f"width {self.width} must be an even multiple of heads "
                                 f"{self.heads}")
            object.__setattr__(self, "head_width", self.width // self.heads)
        if self.head_width % 2:
            raise ValueError(f"head_width {self.head_width} must be even: RoPE turns pairs")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")


@dataclass(frozen=True)
class LlmOptions:
    """the decoder: weights to load, or the shape of one from nothing"""
    llm: str = ""                                # a Hugging Face folder or name; empty: from nothing
    width: int = number(128, "[2, 131072]")      # of the hidden states
    layers: int = number(4, "[1, 1024]")         # blocks
    heads: int = number(4, "[1, 1024]")          # query heads
    kv_heads: int = number(4, "[1, 1024]")       # key/value heads (grouped-query attention)
    ff: int = number(256, "[1, 1048576]")        # SwiGLU width
    theta: float = number(10000.0, "[1, 1e12]")  # RoPE base
    eps: float = number(1e-5, "[0, 0.1]")        # RMSNorm
    tied: bool = True                            # the head is the embedding
    qkv_bias: bool = False                       # on q, k, v (Qwen 2)
    vocab: int = number(512, "[2, 1000000]")     # at most this many pieces

    def __post_init__(self):
        check_fields(self)
        self.config(vocab=1)        # raises where shapes do not fit together

    def config(self, vocab):
        """The LlamaConfig of a decoder from nothing with so many pieces of text."""
        return LlamaConfig(
            vocab=vocab, width=self.width, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, ff=self.ff,
            theta=self.theta, eps=self.eps, tied=self.tied, qkv_bias=self.qkv_bias)


class RMSNorm(nn.Module):
    """Root mean square layer norm (arXiv 1910.07467), statistics in fp32 or wider."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


# Rotary position embedding (arXiv 2104.09864): a head's entries turn in pairs, each pair at a
# frequency of its own, by an angle that grows with the position. Only `rotate` touches queries
# and keys.

def rope_frequencies(c: LlamaConfig, device=None):
    """Radians a position (K / 2,) of the pairs of a head, fp64; longer contexts stretch some or all
    of the waves."""
    width = c.head_width
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    frequency = c.theta ** -exponent
    if not c.rope_context:
        return frequency / c.rope_factor
    fits = c.rope_context * frequency / (2 * math.pi)     # waves of each pair in the first context
    keep = ((fits - c.rope_low) / (c.rope_high - c.rope_low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / c.rope_factor


def rope_tables(position, frequency, dtype):
    """cos and signed sin (..., K) of integer positions (...), for `rotate`. Angles are in fp64,
    exact at any position."""
    angle = position[..., None].double() * frequency        # (..., K / 2)
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, rope):
    """Turns each pair (x_i, x_{i + K/2}) by its angle. x (..., L, H, K); rope: cos, signed sin,
    each (..., L, 1, K)."""
    cos, sin = rope
    own = x * cos
    partner = x.roll(x.shape[-1] // 2, -1)      # rolled by half: each entry's partner in its place
    return torch.addcmul(own, partner, sin)


class Attention(nn.Module):
    """Projections around attention, and attention itself: of the prompts, of the completions."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_width, c.width, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_width, c.eps)
            self.k_norm = RMSNorm(c.head_width, c.eps)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.c.head_width))     # (..., L, H, K)

    def qkv(self, h, rope):
        """h (..., L, D) -> q (..., H, L, K) and k, v (..., Hk, L, K), q and k rotated."""
        q = self.split_heads(self.q_proj(h))
        k = self.split_heads(self.k_proj(h))
        v = self.split_heads(self.v_proj(h))
        if self.c.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        # Turned as they lie in memory, which is faster; only then seen head by head.
        q = rotate(q, rope)
        k = rotate(k, rope)
        return q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)

    def out(self, attended):
        """What the queries gathered, (..., H, L, K) -> (..., L, D)."""
        return self.o_proj(rearrange(attended, "... h l k -> ... l (h k)"))

    def prompts(self, q, k, v):
        """Prompts attend to themselves, causally. q (P, H, T, K) on k, v (P, Hk, T, K) -> (P, H, T,
        K); query heads that share a key head get a copy of it."""
        repeats = self.c.heads // self.c.kv_heads
        if repeats > 1:
            k = repeat(k, "b h s k -> b (h r) s k", r=repeats)
            v = repeat(v, "b h s k -> b (h r) s k", r=repeats)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def completions(self, q, ky, vy, kx, vx, lengths):
        """Completions attend to the keys and values of their prompt and, causally, to their own.

        q (P, G, H, C, K); ky, vy (P, G, Hk, C, K); kx, vx (P, Hk, T, K), the same for all G;
        lengths: P ints, the real tokens of each prompt -> (P, G, H, C, K).
        """
        return prefix_attention(q, ky, vy, kx, vx, lengths)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.ff, bias=False)
        self.up_proj = nn.Linear(c.width, c.ff, bias=False)
        self.down_proj = nn.Linear(c.ff, c.width, bias=False)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))        # (..., ff)
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """One layer. All of it but attention lies in two halves, `before` and `after`, which training
    and cached sampling share, and which --compile fuses."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = MLP(c)

    def before(self, x, rope):
        """x (..., L, D) -> what attention needs: q (..., H, L, K), k and v (..., Hk, L, K)."""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def after(self, x, attended):
        """x and what its queries gathered, (..., H, L, K) -> the block's output (..., L, D)."""
        x = x + self.self_attn.out(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def prompt(self, x, rope):
        """The prompts attend to themselves -> (x, k, v). Right padding needs no mask: no real token
        looks at it."""
        q, k, v = self.before(x, rope)
        attended = self.self_attn.prompts(q, k, v)
        return self.after(x, attended), k, v

    def forward(self, x, y, rope_x, rope_y, lengths):
        """One block over both streams -> (x, y); y may be None."""
        x, kx, vx = self.prompt(x, rope_x)
        if y is not None:
            q, ky, vy = self.before(y, rope_y)
            attended = self.self_attn.completions(q, ky, vy, kx, vx, lengths)
            y = self.after(y, attended)
        return x, y


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = c = config
        self.checkpointing = False      # a backward computes each block again, its inside not kept
        self.compiled = False
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.eps)
        if not c.tied:
            self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        self.apply(self._init)

    def _init(self, module):
        # Unit-scale activations at any width; residual branches shrink with depth so that their sum
        # keeps that scale. The usual 0.02 for words drowns them in what the first block adds:
        # learning to copy then takes twice as long.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.25)
        if isinstance(module, Block):
            branches = 2 * self.config.layers
            for last in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(last.weight, std=(last.in_features * branches) ** -0.5)

    def compile_blocks(self):
        """torch.compile fuses what a block does around attention, in sampling and in training; it
        needs a C++ compiler."""
        self.compiled = True
        for layer in self.layers:
            # From the class: in a copied model layer.before may still be the original's.
            layer.before = torch.compile(Block.before.__get__(layer))
            layer.after = torch.compile(Block.after.__get__(layer))

    @property
    def head(self):
        """Weight of the language-model head, (V, D)."""
        if self.config.tied:
            return self.embed_tokens.weight
        return self.lm_head.weight

    def check_length(self, tokens):
        """Raises ValueError when a sequence is longer than the attention window that the weights
        were trained with."""
        if 0 < self.config.window < tokens:
            raise ValueError(f"a sequence of {tokens} tokens is longer than the sliding window of "
                             f"{self.config.window} that this decoder's weights expect; its "
                             "attention here is full")

    def rope(self, position, dtype):
        """position (..., L) -> cos, sin (..., L, 1, K), the 1 standing for the heads."""
        frequency = rope_frequencies(self.config, position.device)
        cos, sin = rope_tables(position, frequency, dtype)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def forward(self, x, length, y=None):
        """Embedded streams -> normed hidden states of x (P, T, D) and of y, (P, G, C + 1, D) or
        None.

        length (P,): real tokens of each prompt. Position t of y's states predicts completion token
        t: position 0 is the prompt's last state, the same for all G; position C, after the last
        token, bootstraps a value.
        """
        P, T, _ = x.shape
        rope_x = self.rope(torch.arange(T, device=x.device), x.dtype)
        rope_y = lengths = None
        if y is None:
            self.check_length(T)
        else:
            _, G, C, _ = y.shape
            self.check_length(T + C)
            position = length[:, None] + torch.arange(C, device=x.device)       # (P, C)
            rope_y = self.rope(position[:, None], x.dtype)      # (P, 1, C, 1, K), one for the group
            lengths = length.tolist()           # waits for a GPU, once a forward
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random: there is no generator's state to keep for the second
                # time.
                x, y = checkpoint(layer, x, y, rope_x, rope_y, lengths, use_reentrant=False,
                                  preserve_rng_state=False)
            else:
                x, y = layer(x, y, rope_x, rope_y, lengths)
        x = self.norm(x)
        if y is not None:
            last = x[torch.arange(P, device=x.device), length - 1]              # (P, D)
            y = torch.cat([repeat(last, "p d -> p g 1 d", g=G), self.norm(y)], dim=2)
        return x, y
