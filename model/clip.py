"""CLIP (arXiv 2103.00020): image tower, text tower, contrastive loss.

The modules and their parameter names are OpenAI's (as in open_clip), so weights move in and out by
name. Two options go beyond it, for training from nothing on 48-pixel pictures: an MLP stem in place
of the patch convolution, and mean pooling in place of the class token.

Shapes: B pictures, N patches, L text tokens, D width, H heads of width K, E joint embedding.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from model.runs.config import check_fields, choice, number


@dataclass(frozen=True)
class ClipConfig:
    image_size: int = 48
    patch: int = 12
    width: int = 128
    layers: int = 2
    heads: int = 4
    embed: int = 128
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_length: int = 32
    vocab: int = 512
    stem: str = "conv"          # conv: OpenAI's strided convolution | mlp: on each patch
    pool: str = "class"         # class: OpenAI's class token | mean: average of the patch tokens
    act: str = "quick_gelu"     # quick_gelu: OpenAI's weights | gelu: LAION's
    ff: int = 0                 # of the image tower's blocks; 0: 4 width
    eps: float = 1e-5           # of every LayerNorm
    # Statistics of the pixels that the weights expect, by channel: OpenAI's, as in most others.
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if not self.ff:
            object.__setattr__(self, "ff", 4 * self.width)
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch "
                             f"{self.patch}")
        if self.width % self.heads:
            raise ValueError(f"clip width {self.width} must be a multiple of its heads "
                             f"{self.heads}")
        if self.text_width % self.text_heads:
            raise ValueError(f"text width {self.text_width} must be a multiple of its heads "
                             f"{self.text_heads}")
        self._check_choice("stem", "conv", "mlp")
        self._check_choice("pool", "class", "mean")
        self._check_choice("act", "quick_gelu", "gelu")

    def _check_choice(self, name, *allowed):
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"clip {name} {value!r} must be one of {', '.join(allowed)}")

    @property
    def patches(self):
        """Patches of a picture, N."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class ClipOptions:
    """CLIP: weights to load, or the shape of one from nothing (OpenAI's architecture but for stem and pool)"""
    clip: str = ""                                # open_clip's NAME/TAG or NAME:FILE, or a folder; empty: from nothing
    image_size: int = number(48, "[1, 8192]")     # pixels
    patch: int = number(12, "[1, 8192]")          # pixels of a patch's side
    clip_width: int = number(128, "[1, 131072]")  # image tower
    clip_layers: int = number(2, "[1, 1024]")     # image tower
    clip_heads: int = number(4, "[1, 1024]")      # image tower
    clip_stem: str = choice("mlp", "conv")        # makes shapes readable from nothing | OpenAI's
    clip_pool: str = choice("mean", "class")      # average of patch tokens | OpenAI's class token
    clip_act: str = choice("quick_gelu", "gelu")  # OpenAI's weights | LAION's
    text_width: int = number(64, "[2, 131072]")   # text tower
    text_layers: int = number(1, "[1, 1024]")     # text tower
    text_heads: int = number(2, "[1, 1024]")      # text tower
    text_length: int = number(40, "[2, 131072]")  # tokens of a caption
    embed: int = number(128, "[1, 131072]")       # joint embedding of pictures and texts

    def __post_init__(self):
        check_fields(self)
        self.config(vocab=1)        # raises where shapes do not fit together

    def config(self, vocab):
        """The ClipConfig of a CLIP from nothing with so many pieces of text."""
        return ClipConfig(
            image_size=self.image_size, patch=self.patch, width=self.clip_width, layers=self.clip_layers,
            heads=self.clip_heads, embed=self.embed, text_width=self.text_width, text_layers=self.text_layers,
            text_heads=self.text_heads, text_length=self.text_length, vocab=vocab, stem=self.clip_stem,
            pool=self.clip_pool, act=self.clip_act)


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention under the parameter names of nn.MultiheadAttention: one projection makes
    q, k and v."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)               # (B, N, 3 D)
        q, k, v = rearrange(qkv, "b n (three h k) -> three b h n k", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)         # (B, H, N, K)
        return self.out_proj(rearrange(out, "b h n k -> b n (h k)"))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer MLP of hidden width ff."""

    def __init__(self, width, heads, ff, act, eps):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, ff))
        self.mlp.add_module("gelu", QuickGELU() if act == "quick_gelu" else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(ff, width))

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks of a tower, initialised as OpenAI's; the towers run them."""

    def __init__(self, width, layers, heads, ff, act, eps):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, ff, act, eps) for _ in range(layers))
        residual = (width * 2 * layers) ** -0.5     # 2 residual branches a block
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)


class ImageTower(nn.Module):
    """Pixels -> patch features for a language model (`features`), or one embedding (`forward`)."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = c = config
        scale = c.width ** -0.5
        if c.stem == "conv":
            self.conv1 = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)
        else:
            # Shape is not linearly readable from raw patch pixels; two hidden layers make it so.
            self.stem = nn.Sequential(nn.Linear(3 * c.patch ** 2, 2 * c.width), nn.GELU(),
                                      nn.Linear(2 * c.width, c.width))
        tokens = c.patches
        if c.pool == "class":
            tokens += 1
            self.class_embedding = nn.Parameter(scale * torch.randn(c.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, c.width))
        self.ln_pre = nn.LayerNorm(c.width, c.eps)
        self.transformer = Transformer(c.width, c.layers, c.heads, c.ff, c.act, c.eps)
        self.ln_post = nn.LayerNorm(c.width, c.eps)
        self.proj = nn.Parameter(scale * torch.randn(c.width, c.embed))

    def cut(self, layer):
        """Takes out what the features of block `layer` do not need: later blocks, the final norm
        and the joint projection."""
        del self.transformer.resblocks[self._depth(layer):]
        del self.ln_post
        del self.proj
        return self

    def _depth(self, layer):
        """Number of blocks up to and including block `layer`, counted from the end: -1 is the last.

        Raises ValueError when this tower does not have them.
        """
        layers = self.config.layers
        if not -layers <= layer < 0:
            raise ValueError(f"clip feature layer {layer} must lie in [-{layers}, -1]")
        depth = layers + 1 + layer
        have = len(self.transformer.resblocks)
        if depth > have:
            raise ValueError(f"clip feature layer {layer} needs {depth} blocks, this tower was cut "
                             f"to {have}")
        return depth

    def features(self, pixels, layer=-1):
        """Patch tokens after block `layer` (-1 last, -2 second to last as in LLaVA), no final norm,
        no class token.

        pixels (B, 3, S, S) -> (B, N, D). Blocks after `layer` are not computed.
        """
        depth = self._depth(layer)
        x = self._embed(pixels)
        for block in self.transformer.resblocks[:depth]:
            x = block(x)
        if self.config.pool == "class":
            x = x[:, 1:]
        return x

    def forward(self, pixels):
        """pixels (B, 3, S, S) -> embeddings (B, E), not normalised."""
        x = self._embed(pixels)
        for block in self.transformer.resblocks:
            x = block(x)
        if self.config.pool == "class":
            x = self.ln_post(x[:, 0])
        else:
            x = self.ln_post(x).mean(1)
        return x @ self.proj

    def _embed(self, pixels):
        """pixels (B, 3, S, S) -> input of the first block (B, N, D); a class token comes first, if
        there is one: (B, 1 + N, D)."""
        c = self.config
        if pixels.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"pixels {tuple(pixels.shape)} must be (B, 3, {c.image_size}, "
                             f"{c.image_size})")
        if c.stem == "conv":
            x = rearrange(self.conv1(pixels), "b d h w -> b (h w) d")
        else:
            patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=c.patch, q=c.patch)
            x = self.stem(patches)
        if c.pool == "class":
            first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([first, x], dim=1)
        return self.ln_pre(x + self.positional_embedding)


class Clip(nn.Module):
    """Both towers. The text tower's parameters are at the top level, as in OpenAI's state dict.

    With config.text_layers 0 there is no text tower, and `encode_text` raises ValueError.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = c = config
        self.visual = ImageTower(c)
        if not c.text_layers:
            return
        self.token_embedding = nn.Embedding(c.vocab, c.text_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.text_length, c.text_width))
        self.transformer = Transformer(c.text_width, c.text_layers, c.text_heads,
                                       4 * c.text_width, c.act, c.eps)
        self.ln_final = nn.LayerNorm(c.text_width, c.eps)
        scale = c.text_width ** -0.5
        self.text_projection = nn.Parameter(torch.randn(c.text_width, c.embed) * scale)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_config(cls, config: dict, state=None):
        """Rebuild from the dict of a checkpoint, with its weights when given."""
        model = cls(ClipConfig(**config))
        if state:
            model.load_state_dict(state)
        return model

    def encode_image(self, pixels):
        """pixels (B, 3, S, S) -> unit vectors (B, E)."""
        return F.normalize(self.visual(pixels), dim=-1)

    def encode_text(self, ids, length):
        """ids (B, L) right-padded, length (B,) -> unit vectors (B, E), read at each text's last
        token, its EOS."""
        B, L = ids.shape
        if not self.config.text_layers:
            raise ValueError("this CLIP was loaded without a text tower; text cannot be encoded")
        if L > self.config.text_length:
            raise ValueError(f"a caption of {L} tokens is longer than text_length "
                             f"{self.config.text_length}")
        x = self.token_embedding(ids) + self.positional_embedding[:L]           # (B, L, D)
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        last = self.ln_final(x)[torch.arange(B, device=x.device), length - 1]   # (B, D)
        return F.normalize(last @ self.text_projection, dim=-1)


def contrastive_loss(image, text, logit_scale, same=None):
    """Symmetric cross-entropy over all picture-caption pairs (arXiv 2103.00020, figure 3).

    image, text (B, E): unit vectors. logit_scale (): the log of the inverse temperature, which is
    capped at 100 as there. same (B, B) bool: True where two pairs have the same caption; those are
    positives of equal weight (UniCL, arXiv 2204.03610, eq. 3), since punishing one of two equal
    captions teaches noise. Without `same` only the diagonal is positive.
    """
    logits = logit_scale.clamp(max=math.log(100)).exp() * image @ text.T    # (pictures, texts)
    if same is None:
        same = torch.eye(len(image), dtype=torch.bool, device=image.device)
    target = same.to(logits.dtype) / same.sum(1, keepdim=True)
    text_of_image = F.cross_entropy(logits, target)
    image_of_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (text_of_image + image_of_text) / 2
