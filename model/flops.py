"""Matmul FLOPs as executed: padding, frozen forwards, sampling and sharing included, elementwise work left out.

A product (m, k) @ (k, n) is 2 m k n. Attention counts the full square of its scores, causal or not, because that is
what torch's FlopCounterMode counts; a test holds the two equal.
"""


def linear_weights(module):
    """Parameters that multiply activations: those of the Linear layers, the embedding lookup is free."""
    from torch import nn
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


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


def _attention(vlm, batch, shape):
    c, (P, T) = vlm.llm.config, batch.ids.shape
    total = P * T * T
    if shape is not None:
        P, G, C = shape
        total += P * G * C * (T + C)
    return c.layers * 4 * total * c.heads * c.head_width


def _head_rows(batch, shape):
    return int(batch.target[:, 1:].sum()) if shape is None else shape[0] * shape[1] * shape[2]


def forward(vlm, batch, shape=None, with_head=True):
    """`VLM.forward` on encoded pictures. shape: (P, G, C) of the completions, or None for the batch's own targets;
    without its head: `VLM.states`."""
    streams = prompt(vlm, batch)
    if shape is not None:
        streams += completions(vlm, *shape, batch.ids.shape[1])
    return streams + with_head * head(vlm.llm, _head_rows(batch, shape))


def exact_kl(vlm, shape, backward):
    """`VLM.kl` between two models of one size: two heads; a backward computes both again, and two products more."""
    P, G, C = shape
    return head(vlm.llm, P * G * C) * (6 if backward else 2)


def update(vlm, batch, shape=None, with_head=True):
    """Forward and backward of `VLM.forward`, or of `VLM.states`.

    A backward costs two products for one of the forward; five for two under fused attention, whose scores are
    recomputed; three for one in the head, whose logits are too. The projector's input is frozen: one product in its
    first layer.
    """
    ahead = forward(vlm, batch, shape, with_head)
    attention, last = _attention(vlm, batch, shape), with_head * head(vlm.llm, _head_rows(batch, shape))
    projector = 2 * len(batch.pixels) * vlm.config.clip.patches * vlm.config.clip.width * vlm.config.llm.width
    return ahead + 2 * (ahead - attention - last) + 5 * attention // 2 + 3 * last - projector
