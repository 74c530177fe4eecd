"""Matmul FLOPs as executed: padding, frozen forwards, sampling and sharing included, elementwise work left out.

A product (m, k) @ (k, n) is 2 m k n. Attention counts the full square of its scores, causal or not, because that is
what torch's FlopCounterMode counts; a test holds the two equal, and counts a CPU's fused attention itself where torch
(before 2.15) does not.
"""
from torch import nn

from model.lora import LoraLinear, off


def linear_weights(module):
    """Parameters that multiply activations: those of the Linear layers and of their adapters, unless those are off; the
    embedding lookup is free."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.numel() for m in linears) + sum(
        m.lora_a.numel() + m.lora_b.numel() for m in linears if isinstance(m, LoraLinear) and m.on)


def encode(vlm, images):
    """Frozen forward of the image tower up to the feature layer; `images` pictures."""
    c, tower = vlm.config.clip, vlm.visual
    tokens = c.patches + (c.pool == "class")
    if c.stem == "conv":
        stem = 2 * c.patches * tower.conv1.weight.numel()
    else:
        stem = 2 * c.patches * linear_weights(tower.stem)
    blocks = c.layers + 1 + vlm.config.feature_layer
    block = 2 * tokens * 12 * c.width ** 2 + 4 * tokens ** 2 * c.width
    return images * (stem + blocks * block)


def _blocks(llm, tokens):
    return 2 * tokens * sum(linear_weights(layer) for layer in llm.layers)


def head(llm, rows):
    """Logits of `rows` hidden states."""
    return 2 * rows * llm.config.vocab * llm.config.width


def prompt(vlm, batch):
    """Forward of the prompt stream with its projector, without head."""
    P, T = batch.ids.shape
    c = vlm.llm.config
    images = len(batch.pixels) * vlm.config.clip.patches
    return (2 * images * linear_weights(vlm.projector) + _blocks(vlm.llm, P * T)
            + c.layers * 4 * P * T * T * c.heads * c.head_width)


def completions(vlm, P, G, C, T):
    """Forward of the completion stream, without head."""
    c = vlm.llm.config
    return _blocks(vlm.llm, P * G * C) + c.layers * 4 * P * G * C * (T + C) * c.heads * c.head_width


def cached(llm, tokens, slots):
    """Sampler.extend: `tokens` new ones, each multiplied with the `slots` of its group, those hidden from it too."""
    c = llm.config
    return _blocks(llm, tokens) + c.layers * 4 * tokens * slots * c.heads * c.head_width


def _head_rows(batch, shape):
    return int(batch.target[:, 1:].sum()) if shape is None else shape[0] * shape[1] * shape[2]


def forward(vlm, batch, shape=None, with_head=True):
    """`VLM.forward` on encoded pictures. shape: (P, G, C) of the completions, or None for the batch's own targets;
    without its head: `VLM.states`."""
    streams = prompt(vlm, batch)
    if shape is not None:
        streams += completions(vlm, *shape, batch.ids.shape[1])
    return streams + with_head * head(vlm.llm, _head_rows(batch, shape))


def reference(vlm, batch, shape=None, with_head=True):
    """The same of `vlm.base()`, or of a twin: without adapters."""
    with off(vlm.llm):
        return forward(vlm, batch, shape, with_head)


def exact_kl(vlm, shape, backward):
    """`VLM.kl` between two models of one size: two heads; a backward computes both again, then the gradient of the
    states and, where it trains, of the head."""
    P, G, C = shape
    return head(vlm.llm, P * G * C) * (5 + vlm.llm.head.requires_grad if backward else 2)


# ---------------------------------------------------------------- backward, by what needs a gradient

def trains(module):
    return any(p.requires_grad for p in module.parameters())


def flow(block, needs, seen=False):
    """How far a gradient must reach in a decoder block whose input needs one, or not; seen: of completions, whether the
    keys and values of their prompt need one.

    -> (linears: [(Linear, whether its input needs a gradient)] in the order they run, whether the attention needs one,
    whether the output does).
    """
    a, m = block.self_attn, block.mlp
    normed = needs or trains(block.input_layernorm)
    linears = [(linear, normed) for linear in (a.q_proj, a.k_proj, a.v_proj)]
    attended = seen or normed or trains(a.q_proj) or trains(a.k_proj) or trains(a.v_proj) or (
        a.c.qk_norm and (trains(a.q_norm) or trains(a.k_norm)))
    middle = needs or attended or trains(a.o_proj)
    normed = middle or trains(block.post_attention_layernorm)
    product = normed or trains(m.gate_proj) or trains(m.up_proj)
    linears += [(a.o_proj, attended), (m.gate_proj, normed), (m.up_proj, normed), (m.down_proj, product)]
    return linears, attended, middle or product or trains(m.down_proj)


def _linear_backward(linear, needs):
    """A backward's products a token: the gradient of the input where that needs one, of each weight that trains."""
    work = linear.weight.numel() * (needs + linear.weight.requires_grad)
    if isinstance(linear, LoraLinear) and linear.on:
        a, b = linear.lora_a, linear.lora_b
        work += a.numel() * (needs + a.requires_grad) + b.numel() * ((needs or a.requires_grad) + b.requires_grad)
    return 2 * work


def _projector_backward(projector):
    """Of one picture's patch, whose features need no gradient."""
    work = needs = 0
    for linear in (m for m in projector.modules() if isinstance(m, nn.Linear)):
        work += _linear_backward(linear, needs)
        needs = needs or trains(linear)
    return work


def input_trains(vlm, pictures):
    """Whether the embedded prompts need a gradient; pictures: whether there are any."""
    positions = vlm.config.image_positions and vlm.image_position.requires_grad
    return trains(vlm.llm.embed_tokens) or bool(pictures) and (trains(vlm.projector) or positions)


def _again(vlm, P, T, shape):
    """A block's forward for a second time, up to the last tensor that the backward asks for: its down_proj of the last
    stream, or the second factor of an adapter there, is not reached."""
    c, last = vlm.llm.config, vlm.llm.layers[0].mlp.down_proj
    tokens, scores = [P * T], P * T * T
    if shape is not None:
        _, G, C = shape
        tokens.append(P * G * C)
        scores += P * G * C * (T + C)
    skipped = last.lora_b if isinstance(last, LoraLinear) and last.on else last.weight
    return (2 * sum(tokens) * linear_weights(vlm.llm.layers[0]) + 4 * scores * c.heads * c.head_width
            - 2 * tokens[-1] * skipped.numel())


def update(vlm, batch, shape=None, with_head=True):
    """Forward and backward of `VLM.forward`, or of `VLM.states`, as far as something trains.

    A backward costs, for each product of the forward, one where the input needs a gradient and one where the weight
    trains; in fused attention five for two, since its scores are computed again, and in the head one more for its
    logits. With the decoder's `checkpointing` its blocks are computed again.
    """
    (P, T), c, llm = batch.ids.shape, vlm.llm.config, vlm.llm
    total = forward(vlm, batch, shape, with_head)
    total += len(batch.pixels) * vlm.config.clip.patches * _projector_backward(vlm.projector)
    x, y = input_trains(vlm, len(batch.pixels)), trains(llm.embed_tokens)
    for block in llm.layers:
        linears, attended, x = flow(block, x)
        total += P * T * sum(_linear_backward(*pair) for pair in linears)
        total += attended * 10 * P * T * T * c.heads * c.head_width
        if shape is not None:
            _, G, C = shape
            linears, attended, y = flow(block, y, attended)
            total += P * G * C * sum(_linear_backward(*pair) for pair in linears)
            total += attended * 10 * P * G * C * (T + C) * c.heads * c.head_width
        if llm.checkpointing and (x or y):
            total += _again(vlm, P, T, shape)
    states, weight = x or trains(llm.norm), llm.head.requires_grad
    if with_head and (states or weight):
        total += head(llm, _head_rows(batch, shape)) * (1 + states + weight)
    return total


class Meter:
    """Adds up the matmul FLOPs of a stage, one call beside each piece of work, of the functions above."""

    def __init__(self, total=0):
        self.total = total

    def encode(self, vlm, pictures):
        self.total += encode(vlm, pictures)

    def prompt(self, vlm, batch):
        self.total += prompt(vlm, batch)

    def cached(self, llm, tokens, slots):
        self.total += cached(llm, tokens, slots)

    def head(self, llm, rows):
        self.total += head(llm, rows)

    def forward(self, vlm, batch, shape=None, with_head=True):
        self.total += forward(vlm, batch, shape, with_head)

    def reference(self, vlm, batch, shape=None, with_head=True):
        self.total += reference(vlm, batch, shape, with_head)

    def exact_kl(self, vlm, shape, backward):
        self.total += exact_kl(vlm, shape, backward)

    def update(self, vlm, batch, shape=None, with_head=True):
        self.total += update(vlm, batch, shape, with_head)
