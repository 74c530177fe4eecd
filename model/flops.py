"""Matmul FLOPs as executed: padding, frozen forwards, sampling and sharing included, elementwise
work left out.

    meter = Meter()
    meter.encode(vlm, pictures)             # beside vlm.encode(batch)
    meter.update(vlm, batch, shape)         # beside the forward and backward of an update
    meter.total                             # an exact integer

A product (m, k) @ (k, n) is 2 m k n. Attention counts the full square of its scores, causal or not,
because that is what torch's FlopCounterMode counts; a test holds the two equal, and counts a CPU's
fused attention itself where torch (before 2.15) does not.

A module that is not known here is refused, with a ValueError, before anything is counted: a wrong
count would silently change a comparison at equal FLOPs. A module of a new class states its own cost
by two methods:

    projector or image tower
        flops(pictures)             matmul FLOPs of a forward of so many pictures
        backward_flops(pictures)    of its backward beyond that, by what needs a gradient; a
                                    projector is asked backward_flops(pictures, features_train=True)
                                    where its input needs one, because the image tower trains
    decoder block, once for each of its two streams
        flops(tokens, pairs)        pairs: of a query and a key that it meets, over all rows
        backward_flops(tokens, pairs, input_trains)

Shapes: P prompts of T tokens, G completions of each, C tokens of a completion.
"""
import weakref

from torch import nn

from model import clip, llama, parallel, sharding
from model.lora import LoraLinear, off
from model.mixed import MixedLinear

# ---------------------------------------------------------------- which modules are known

# Classes of torch that multiply nothing; so does a subclass that inherits their forward.
FREE = (nn.Identity, nn.Dropout, nn.Embedding, nn.LayerNorm, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh,
        nn.Sigmoid)

# What belongs in a place: LINEAR, a Linear, with an adapter or not; CHAIN, a Linear or a Sequential
# of such; WEIGHT, a parameter that the functions below know of; or a class.
LINEAR = "a Linear"
CHAIN = "a Linear or a Sequential"
WEIGHT = "a weight"

# Of each class that is counted below: its parts that are not free, and what belongs there.
PARTS = {
    clip.ImageTower: dict(conv1=nn.Conv2d, stem=CHAIN, positional_embedding=WEIGHT,
                          transformer=clip.Transformer, proj=WEIGHT),
    clip.Transformer: dict(resblocks=clip.Block),
    clip.Block: dict(attn=clip.Attention, mlp=CHAIN),
    clip.Attention: dict(in_proj_weight=WEIGHT, out_proj=LINEAR),
    llama.Block: dict(self_attn=llama.Attention, mlp=llama.MLP),
    llama.Attention: dict(q_proj=LINEAR, k_proj=LINEAR, v_proj=LINEAR, o_proj=LINEAR),
    llama.MLP: dict(gate_proj=LINEAR, up_proj=LINEAR, down_proj=LINEAR),
}

_checked = weakref.WeakKeyDictionary()      # module that `check` has walked through -> its `_anatomy` then


def states_cost(module):
    """Whether a module says itself what it costs."""
    return hasattr(module, "flops") and hasattr(module, "backward_flops")


def _is(module, kind):
    """Whether a module is of a class of torch's, or of a subclass that inherits its forward."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _is_free(module):
    if type(module) in (clip.QuickGELU, llama.RMSNorm):
        return True
    return any(_is(module, kind) for kind in FREE)


def _parts(module):
    """(name, module or weight) of what a module itself holds and could multiply with."""
    parts = [(name, child) for name, child in module.named_children() if not _is_free(child)]
    parts += [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() > 1]
    return parts


def _unknown(module, path, place):
    """-> (dotted name, class) of the first module or weight whose cost is not known, or None.

    path: the module's dotted name. place: what belongs there.
    """
    if place == WEIGHT:
        return None
    if _is(module, nn.ModuleList):
        children = [(name, child, place) for name, child in module.named_children()]
    elif place == CHAIN and _is(module, nn.Sequential):
        children = [(name, child, CHAIN) for name, child in _parts(module)]
    elif place in (LINEAR, CHAIN) and (_is(module, nn.Linear) or type(module) in (LoraLinear, MixedLinear)):
        children = []
    elif sharding.class_of(module) is place:
        children = []
        if place in PARTS:
            children = [(name, part, PARTS[place].get(name)) for name, part in _parts(module)]
    else:
        return path, type(module).__name__
    for name, child, its_place in children:
        found = _unknown(child, f"{path}.{name}", its_place)
        if found is not None:
            return found
    return None


def check(vlm):
    """Raises ValueError on the first module of a model whose cost is not known.

    Walks each tree of modules once, and again after modules or weights were put into it: a
    projector, tower or block that takes the place of another is looked at when its cost is first
    asked for.
    """
    by_pictures = "flops(pictures) and backward_flops(pictures)"
    by_tokens = "flops(tokens, pairs) and backward_flops(tokens, pairs, input_trains)"
    _check_tree(vlm.visual, "visual", clip.ImageTower, by_pictures)
    _check_tree(vlm.projector, "projector", CHAIN, by_pictures)
    for number, block in enumerate(vlm.llm.layers):
        _check_tree(block, f"llm.layers.{number}", llama.Block, by_tokens)
    _check_rest(vlm, "", ("visual", "projector", "llm", "image_position"))
    _check_rest(vlm.llm, "llm.", ("embed_tokens", "layers", "lm_head"))


def _anatomy(root):
    """Class and number of weights of every module in a tree: another one where some came or went."""
    return [(type(module), len(module._parameters)) for module in root.modules()]


def _check_tree(root, name, place, methods):
    if states_cost(root):
        return
    anatomy = _anatomy(root)
    if _checked.get(root) == anatomy:
        return
    unknown = _unknown(root, name, place)
    if unknown is not None:
        path, kind = unknown
        raise ValueError(f"{path} is a {kind}, whose FLOPs are not known here: give {name} a "
                         f"method {methods}")
    _checked[root] = anatomy


def _check_rest(module, prefix, known):
    """Whether a model, or its decoder, holds nothing that multiplies beside its parts of the names
    `known`."""
    for name, part in _parts(module):
        if name not in known:
            kind = type(part).__name__
            raise ValueError(f"{prefix}{name} is a {kind}, whose FLOPs are not known here: count "
                             "it in model/flops.py, and name it in `check`")


# ---------------------------------------------------------------- forward

def _weights(linear):
    """Numbers that multiply each token in a Linear and in its adapter, unless that is off."""
    count = linear.weight.numel()
    if isinstance(linear, LoraLinear) and linear.on:
        count += linear.lora_a.numel() + linear.lora_b.numel()
    return count


def linear_weights(module):
    """Numbers that multiply each token in the Linears of a module; one registered twice counts
    twice."""
    modules = [found for _, found in module.named_modules(remove_duplicate=False)]
    return sum(_weights(found) for found in modules if isinstance(found, nn.Linear))


def tower(vlm, pictures):
    """Forward of the image tower up to the feature layer."""
    visual = vlm.visual
    if states_cost(visual):
        return visual.flops(pictures)
    c = vlm.config.clip
    stem = visual.conv1.weight.numel() if c.stem == "conv" else linear_weights(visual.stem)
    tokens = tower_tokens(c)
    total = 2 * c.patches * stem
    for block in tower_blocks(vlm):
        weights = block.attn.in_proj_weight.numel() + linear_weights(block)
        total += 2 * tokens * weights + 4 * tokens ** 2 * c.width
    return pictures * total


def tower_blocks(vlm):
    """The blocks that the features of the feature layer need."""
    needed = vlm.config.clip.layers + 1 + vlm.config.feature_layer
    return vlm.visual.transformer.resblocks[:needed]


def tower_tokens(c):
    """Tokens of a picture inside the tower: its patches, and the class token where there is one."""
    return c.patches + (c.pool == "class")


def encode(vlm, pictures):
    """`VLM.encode`: the frozen forward of the image tower. It does nothing where the tower trains:
    features are then computed inside each forward of the model, and counted there."""
    check(vlm)
    if trains(vlm.visual):
        return 0
    return tower(vlm, pictures)


def _projector(vlm, pictures):
    if states_cost(vlm.projector):
        return vlm.projector.flops(pictures)
    return 2 * pictures * vlm.config.clip.patches * linear_weights(vlm.projector)


def block_forward(block, tokens, pairs):
    """One stream through a decoder block; pairs: of a query and a key, over all rows."""
    if states_cost(block):
        return block.flops(tokens, pairs)
    c = block.self_attn.c
    return 2 * tokens * linear_weights(block) + 4 * pairs * c.heads * c.head_width


def _blocks(llm, tokens, pairs):
    return sum(block_forward(block, tokens, pairs) for block in llm.layers)


def head(llm, rows):
    """Logits of `rows` hidden states."""
    return 2 * rows * llm.config.vocab * llm.config.width


def prompt(vlm, batch):
    """Forward of the prompt stream with its projector, and with the image tower where that trains;
    without head."""
    check(vlm)
    P, T = batch.ids.shape
    pictures = len(batch.pixels)
    total = _projector(vlm, pictures) + _blocks(vlm.llm, P * T, P * T * T)
    if trains(vlm.visual):
        total += tower(vlm, pictures)
    return total


def completions(vlm, P, G, C, T):
    """Forward of the completion stream, without head."""
    return _blocks(vlm.llm, P * G * C, P * G * C * (T + C))


def cached(llm, tokens, slots):
    """Sampler.extend: `tokens` new ones, each multiplied with `slots` of the cache, those hidden
    from it too."""
    return _blocks(llm, tokens, tokens * slots)


def _head_rows(batch, shape, rows):
    """How many hidden states the head reads: `rows` where they are told, else all."""
    if rows is not None:
        return rows
    if shape is None:
        return int(batch.target[:, 1:].sum())
    P, G, C = shape
    return P * G * C


def forward(vlm, batch, shape=None, rows=None):
    """`VLM.forward` after `VLM.encode`. shape: (P, G, C) of the completions, or None for the
    batch's own targets; rows: states that the head reads, None: all; 0 of `VLM.states`."""
    total = prompt(vlm, batch)
    if shape is not None:
        total += completions(vlm, *shape, batch.ids.shape[1])
    return total + head(vlm.llm, _head_rows(batch, shape, rows))


def reference(vlm, batch, shape=None, rows=None):
    """The same of `vlm.base()`, or of a frozen twin: without adapters, and without the image tower
    where the batch has features, which a frozen reference fills in once. Ask before it does."""
    with off(vlm.llm):
        total = forward(vlm, batch, shape, rows)
    if trains(vlm.visual) and len(batch.features):      # the policy's tower, which `forward` counts
        total -= tower(vlm, len(batch.pixels))
    return total


def teacher(vlm, batch, shape, rows=None):
    """The same of a frozen model of another's: with the image tower where the batch has no
    features."""
    total = forward(vlm, batch, shape, rows)
    if not len(batch.features):
        total += tower(vlm, len(batch.pixels))
    return total


def exact_kl(vlm, reference, rows, backward):
    """`VLM.kl` of so many states: the heads of both models; a backward computes both again, then
    the gradient of the states and, where it trains, of the policy's head."""
    policy_heads = 1
    reference_heads = 1
    if backward:
        policy_heads = 3 + vlm.llm.head.requires_grad
        reference_heads = 2
    return policy_heads * head(vlm.llm, rows) + reference_heads * head(reference.llm, rows)


# ---------------------------------------------------------------- backward: what needs a gradient

def trains(module):
    return any(p.requires_grad for p in module.parameters())


def flow(block, needs, seen=False):
    """How far a gradient must reach in a decoder block.

    needs: whether the input needs one. seen: of completions, whether the keys and values of their
    prompt need one.
    -> (linears: [(Linear, whether its input needs a gradient)] in the order they run, whether the
    attention needs one, whether the output does).
    """
    attn = block.self_attn
    mlp = block.mlp
    before = needs or trains(block.input_layernorm)
    attended = seen or before or trains(attn.q_proj) or trains(attn.k_proj) or trains(attn.v_proj)
    if attn.c.qk_norm:
        attended = attended or trains(attn.q_norm) or trains(attn.k_norm)
    middle = needs or attended or trains(attn.o_proj)
    after = middle or trains(block.post_attention_layernorm)
    product = after or trains(mlp.gate_proj) or trains(mlp.up_proj)
    linears = [(attn.q_proj, before), (attn.k_proj, before), (attn.v_proj, before),
               (attn.o_proj, attended),
               (mlp.gate_proj, after), (mlp.up_proj, after), (mlp.down_proj, product)]
    return linears, attended, middle or product or trains(mlp.down_proj)


def tower_flow(block, needs):
    """How far a gradient must reach in a block of the image tower whose input needs one, or not.

    -> (whether it must reach the input of in_proj, the attention, the input of the MLP, the output)
    """
    attn = block.attn
    before = needs or trains(block.ln_1)
    attended = before or attn.in_proj_weight.requires_grad or attn.in_proj_bias.requires_grad
    middle = needs or attended or trains(attn.out_proj)
    after = middle or trains(block.ln_2)
    return before, attended, after, after or trains(block.mlp)


def tower_input_trains(vlm):
    """Whether what enters the first block of the image tower needs a gradient."""
    visual = vlm.visual
    stem = visual.conv1 if vlm.config.clip.stem == "conv" else visual.stem
    embeddings = any(p.requires_grad for p in visual.parameters(recurse=False))
    return trains(stem) or embeddings or trains(visual.ln_pre)


def input_trains(vlm, pictures):
    """Whether the embedded prompts need a gradient; pictures: whether there are any."""
    if trains(vlm.llm.embed_tokens):
        return True
    if not pictures:
        return False
    positions = vlm.config.image_positions and vlm.image_position.requires_grad
    return positions or trains(vlm.projector) or trains(vlm.visual)


def _weight_backward(weight, needs):
    """Of one token: a product for the gradient of the input, where that needs one, and a product
    for the weight, where it trains."""
    return 2 * weight.numel() * (needs + weight.requires_grad)


def _linear_backward(linear, needs):
    """A Linear's backward, of one token."""
    work = _weight_backward(linear.weight, needs)
    if isinstance(linear, LoraLinear) and linear.on:
        a, b = linear.lora_a, linear.lora_b
        work += _weight_backward(a, needs) + _weight_backward(b, needs or a.requires_grad)
    return work


def _chain_backward(module, needs):
    """Backward of one token through a Linear, or through a Sequential, one module after another."""
    if isinstance(module, nn.Linear):
        return _linear_backward(module, needs)
    total = 0
    if isinstance(module, nn.Sequential):
        for child in module:
            total += _chain_backward(child, needs)
            needs = needs or trains(child)
    return total


def _tower_backward(vlm, pictures):
    visual = vlm.visual
    if not trains(visual):
        return 0
    if states_cost(visual):
        return visual.backward_flops(pictures)
    c = vlm.config.clip
    if c.stem == "conv":
        total = c.patches * _weight_backward(visual.conv1.weight, False)
    else:
        total = c.patches * _chain_backward(visual.stem, False)
    tokens = tower_tokens(c)
    needs = tower_input_trains(vlm)
    for block in tower_blocks(vlm):
        before, attended, after, out = tower_flow(block, needs)
        total += tokens * _weight_backward(block.attn.in_proj_weight, before)
        total += tokens * _linear_backward(block.attn.out_proj, attended)
        total += tokens * _chain_backward(block.mlp, after)
        total += attended * 10 * tokens ** 2 * c.width
        needs = out
    return pictures * total


def _projector_backward(vlm, pictures):
    projector = vlm.projector
    features_train = trains(vlm.visual)
    if not states_cost(projector):
        return pictures * vlm.config.clip.patches * _chain_backward(projector, features_train)
    if features_train:
        return projector.backward_flops(pictures, features_train=True)
    return projector.backward_flops(pictures)


def _stream_backward(linears, attended, tokens, pairs, c):
    """One stream's backward through a decoder block, by its `flow`."""
    total = sum(tokens * _linear_backward(linear, needs) for linear, needs in linears)
    if attended:
        total += 10 * pairs * c.heads * c.head_width
    return total


def _again(block, streams):
    """A block's forward for a second time, up to the last tensor that the backward asks for: its
    down_proj of the last stream, or the second factor of an adapter there, is not reached.

    streams: [(tokens, pairs)].
    """
    total = sum(block_forward(block, tokens, pairs) for tokens, pairs in streams)
    if states_cost(block):
        return total
    last = block.mlp.down_proj
    skipped = last.lora_b if isinstance(last, LoraLinear) and last.on else last.weight
    last_tokens, _ = streams[-1]
    return total - 2 * last_tokens * skipped.numel()


def _decoder_backward(vlm, batch, shape):
    """-> (FLOPs of all blocks, whether their output needs a gradient)."""
    llm = vlm.llm
    P, T = batch.ids.shape
    streams = [(P * T, P * T * T)]
    if shape is not None:
        _, G, C = shape
        streams.append((P * G * C, P * G * C * (T + C)))
    needs_x = input_trains(vlm, len(batch.pixels))      # whether the prompts need a gradient
    needs_y = trains(llm.embed_tokens)                  # whether the completions do
    total = 0
    for block in llm.layers:
        if states_cost(block):
            needs_y = needs_x or needs_y                # by way of the prompts' keys and values
            for (tokens, pairs), needs in zip(streams, (needs_x, needs_y)):
                total += block.backward_flops(tokens, pairs, needs)
            needs_x = needs_x or trains(block)
            needs_y = needs_y or trains(block)
        else:
            linears, attended, needs_x = flow(block, needs_x)
            total += _stream_backward(linears, attended, *streams[0], llm.config)
            if shape is not None:
                linears, attended, needs_y = flow(block, needs_y, attended)
                total += _stream_backward(linears, attended, *streams[1], llm.config)
        if llm.checkpointing and (needs_x or needs_y):
            total += _again(block, streams)
    return total, needs_x


def update(vlm, batch, shape=None, rows=None, upstream=False):
    """Forward and backward of `VLM.forward`, or of `VLM.states`, as far as something trains; those
    of the image tower only where it trains.

    A backward costs, for each product of the forward, one where the input needs a gradient and one
    where the weight trains; in fused attention five for two, since its scores are computed again,
    and in the head one more for its logits, unless its `upstream` gradients were told. With the
    decoder's `checkpointing` its blocks are computed again.
    """
    pictures = len(batch.pixels)
    total = forward(vlm, batch, shape, rows)
    total += _tower_backward(vlm, pictures) + _projector_backward(vlm, pictures)
    blocks, states = _decoder_backward(vlm, batch, shape)
    total += blocks
    states = states or trains(vlm.llm.norm)
    weight = vlm.llm.head.requires_grad
    if states or weight:
        again = not upstream
        total += head(vlm.llm, _head_rows(batch, shape, rows)) * (again + states + weight)
    return total


class Meter:
    """Adds up the matmul FLOPs of a stage: one call beside each piece of work, by the function of
    the same name above."""

    def __init__(self, total=0):
        self.total = total
        self.agreed = total             # of all ranks, when they last agreed

    def agree(self):
        """Adds what the other ranks have counted since they last agreed."""
        self.total = self.agreed + parallel.total(self.total - self.agreed)
        self.agreed = self.total

    def encode(self, vlm, pictures):
        self.total += encode(vlm, pictures)

    def prompt(self, vlm, batch):
        self.total += prompt(vlm, batch)

    def cached(self, llm, tokens, slots):
        self.total += cached(llm, tokens, slots)

    def head(self, llm, rows):
        self.total += head(llm, rows)

    def forward(self, vlm, batch, shape=None, rows=None):
        self.total += forward(vlm, batch, shape, rows)

    def reference(self, vlm, batch, shape=None, rows=None):
        self.total += reference(vlm, batch, shape, rows)

    def teacher(self, vlm, batch, shape, rows=None):
        self.total += teacher(vlm, batch, shape, rows)

    def exact_kl(self, vlm, reference, rows, backward):
        self.total += exact_kl(vlm, reference, rows, backward)

    def update(self, vlm, batch, shape=None, rows=None, upstream=False):
        self.total += update(vlm, batch, shape, rows, upstream)
