"""The memory that training takes, planned before a weight is loaded: on the meta device a 7B costs
nothing to look at.

Weights, gradients and the optimizer's state are exact. Activations are what autograd keeps of one
micro-batch, derived below from the tensors that each operation of a block saves. On top come what a
library's kernels use for a moment, the head's chunk of logits (kernels/linear_logp.py), the encoded
pictures and what the projector keeps of them.
"""
import re

import torch
from torch import nn

from model.clip import QuickGELU
from model.flops import check, flow, input_trains, states_cost, tower_blocks, tower_flow
from model.flops import tower_input_trains, tower_tokens, trains
from model.lora import LoraLinear, adapters
from model.optim import is_narrow, trained_line, trained_lines

GIB = 2 ** 30
MIB = 2 ** 20


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------- optimizer

def _optimizer(parameters, moments, master):
    """State of make_optimizer's AdamW: m and v, of a narrow weight its fp32 copy, and in torch's
    AdamW, which takes over where no weight is narrow, a count of steps in fp32."""
    kept = getattr(torch, moments).itemsize
    narrow = sum(p.numel() for p in parameters if is_narrow(p.dtype))
    wide = [p for p in parameters if not is_narrow(p.dtype)]
    total = narrow * (2 * kept + 4 * master) + 2 * _bytes(wide)
    if not narrow:
        total += 4 * len(wide)
    return total


# ---------------------------------------------------------------- activations

def _keeps(linear):
    """Whether a Linear keeps its input, for the gradient of its weight or of its adapter's first
    factor."""
    if linear.weight.requires_grad:
        return True
    return isinstance(linear, LoraLinear) and linear.lora_a.requires_grad


def _between_factors(module):
    """Numbers that a token leaves between the two factors of the adapters inside a module."""
    return sum(layer.lora_b.shape[1] for layer in adapters(module) if layer.lora_b.requires_grad)


def _block(block, needs, size):
    """What a token leaves in a decoder block whose input needs a gradient or not.

    -> (bytes of a token, bytes of a prompt's token whose key and value are repeated for another
    completion, whether the output needs a gradient).

    A norm keeps its input or what it normalised, one tensor either way; the Linears behind it share
    one more. Attention keeps q, k, v (for grouped queries keys and values repeated), its output,
    which o_proj reads, and in fp32 the log of each head's sum. SwiGLU keeps the gate before and
    after silu, and `up`; down_proj the product.
    """
    if states_cost(block):
        return 0, 0, needs or trains(block)
    c = block.self_attn.c
    linears, attended, out = flow(block, needs)
    (q, before), (k, _), (v, _), (o, _), (gate, after), (up, _), (down, _) = linears
    heads_width = c.heads * c.head_width
    # The two norms, each with the input of the Linears behind it.
    count = c.width * (before + (_keeps(q) or _keeps(k) or _keeps(v)))
    count += c.width * (after + (_keeps(gate) or _keeps(up)))
    if attended:
        count += 4 * heads_width
        if c.qk_norm:
            count += (c.heads + c.kv_heads) * c.head_width
    elif _keeps(o):
        count += heads_width
    count += c.ff * (2 * (after or trains(gate)) + (after or trains(up)) + _keeps(down))
    count += _between_factors(block)
    return size * count + 4 * c.heads * attended, size * 2 * heads_width * attended, out


def _chain(sequential, needs):
    """Numbers that a token leaves in Linears and activations one after the other. An activation
    keeps its input; QuickGELU, x sigmoid(1.702 x), the sigmoid as well."""
    count = 0
    width = 0
    for module in sequential:
        if isinstance(module, nn.Linear):
            count += module.in_features * _keeps(module)
            width = module.out_features
        elif needs and isinstance(module, QuickGELU):
            count += 2 * width
        elif needs:
            count += width
        needs = needs or trains(module)
    return count


def _tower_block(block, needs, size, width):
    """-> (bytes that a token leaves in a block of the image tower, whether the output needs a
    gradient). As in the decoder, but for its LayerNorms: each keeps mean and deviation besides."""
    before, attended, after, out = tower_flow(block, needs)
    attn = block.attn
    norms = before + after
    count = width * (norms + attn.in_proj_weight.requires_grad)
    if attended:
        count += 4 * width
    elif _keeps(attn.out_proj):
        count += width
    count += _chain(block.mlp, after) + _between_factors(block)
    return size * count + 8 * norms + 4 * attn.heads * attended, out


def _tower(vlm):
    """Bytes that a picture leaves in the image tower, 0 where that does not train."""
    visual = vlm.visual
    if not trains(visual) or states_cost(visual):
        return 0
    c = vlm.config.clip
    size = visual.positional_embedding.element_size()
    if c.stem == "conv":
        pixels = 3 * c.image_size ** 2
        stem = size * pixels * visual.conv1.weight.requires_grad
    else:
        stem = size * c.patches * _chain(visual.stem, False)
    needs = tower_input_trains(vlm)
    token = (size * c.width + 8) * needs        # of the norm before the first block
    for block in tower_blocks(vlm):
        kept, needs = _tower_block(block, needs, size, c.width)
        token += kept
    return stem + tower_tokens(c) * token


def _decoder(vlm, tokens, prefix_tokens):
    llm = vlm.llm
    c = llm.config
    size = llm.embed_tokens.weight.element_size()
    needs = input_trains(vlm, pictures=True)
    blocks = []
    for block in llm.layers:
        kept, repeated, needs = _block(block, needs, size)
        blocks.append(tokens * kept + prefix_tokens * repeated)
    states = needs or trains(llm.norm)
    token = size * c.width * states             # of the last norm
    if states or llm.head.requires_grad:
        # The states as the head reads them, the predicted token and three statistics of each row.
        token += size * c.width + 8 + 12
    if llm.checkpointing:
        return tokens * (token + c.layers * size * c.width) + max(blocks)
    return tokens * token + sum(blocks)


def plan(vlm, tokens, rows=0, cache_tokens=0, moments="float32", master=True, prefix_tokens=0,
         pictures=None):
    """-> bytes by name: weights, gradients, optimizer, activations, cache.

    tokens: of a micro-batch, padding included; of reinforcement learning P T + P G C, and
    prefix_tokens P G T, those of the prompts whose keys and values are repeated for their groups.
    All tokens count as predicted, and as having a picture before them. With the decoder's
    `checkpointing`: the inputs of all blocks and the inside of one.
    pictures: of a micro-batch, for an image tower that trains; None: as many as `tokens` can hold.
    rows, cache_tokens: prompts sampled at once and slots of each in the cache, T + G times the new
    tokens.
    moments, master: as make_optimizer has them.

    Decoder blocks and towers of a class that states its own FLOPs count without their activations.
    Raises ValueError on a count below 0, and on a module that model/flops.py does not know.
    """
    if pictures is None:
        pictures = tokens // vlm.config.image_tokens
    counts = dict(tokens=tokens, rows=rows, cache_tokens=cache_tokens, prefix_tokens=prefix_tokens,
                  pictures=pictures)
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} {count} must be at least 0")
    check(vlm)
    c = vlm.llm.config
    trained = [p for p in vlm.parameters() if p.requires_grad]
    activations = 0
    if trained:
        activations = _decoder(vlm, tokens, prefix_tokens) + pictures * _tower(vlm)
    slot = 2 * c.layers * c.kv_heads * c.head_width * vlm.llm.embed_tokens.weight.element_size()
    return dict(weights=_bytes([*vlm.parameters(), *vlm.buffers()]), gradients=_bytes(trained),
                optimizer=_optimizer(trained, moments, master), activations=activations,
                cache=rows * cache_tokens * slot)


def table(stage, vlm, tokens, **options):
    """What trains, then the planned memory, as text; the options are those of `plan`."""
    lines = trained_lines(stage, vlm)
    for name, p in vlm.named_parameters(recurse=False):
        lines.append(trained_line(stage, name, [p]))
    found = adapters(vlm.llm)
    if found:
        pairs = [p for layer in found for p in (layer.lora_a, layer.lora_b)]
        lines.append(trained_line(stage, "  adapters", pairs) + ", part of llm")
    planned = plan(vlm, tokens, **options)
    total = sum(planned.values())
    size, unit = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    parts = []
    for name, count in planned.items():
        if count:
            part = f"{name} {count / size:.1f}"
            parts.append(f"{part} for {tokens} tokens" if name == "activations" else part)
    unknown = [block for block in vlm.llm.layers if states_cost(block)]
    if trains(vlm.visual) and states_cost(vlm.visual):
        unknown.append(vlm.visual)
    if unknown:
        parts.append(f"without the activations of {len(unknown)} modules of another class")
    start = f"  {stage:<15} {'memory':<16}{total / size:9.1f} {unit} planned: "
    lines.append(start + ", ".join(parts))
    return "\n".join(lines)


def announce(stage, vlm, cfg, *, samples):
    """Prints `table` for a stage of train.py's config: micro-batches of records of --max-length (else of a picture and
    64 tokens), or, in a stage that `samples`, of as long prompts with their groups of completions of --max-new."""
    optim = cfg.optim
    T = vlm.config.image_tokens + 64
    if samples:
        P = min(optim.micro_batch or cfg.rl.rl_batch, cfg.rl.rl_batch)
        completion_tokens = cfg.sampling.group * cfg.sampling.max_new
        tokens = P * (T + completion_tokens)
        sampling = dict(rows=cfg.rl.rl_batch, cache_tokens=T + completion_tokens,
                        prefix_tokens=P * cfg.sampling.group * T)
    else:
        batch = cfg.supervised.batch
        if stage == "align" and cfg.supervised.align_batch:
            batch = cfg.supervised.align_batch
        P = min(optim.micro_batch or batch, batch)
        tokens = P * (cfg.data.max_length or T)
        sampling = {}
    print(table(stage, vlm, tokens, pictures=P, moments=optim.moments, master=optim.master, **sampling), flush=True)


def shortage(error, advice):
    """The message for a person when `error` means that memory ran out, with `advice` at its end;
    raises any other `error`."""
    message = str(error)
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not is_memory and "can't allocate memory" not in message:
        raise error
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", message, flags=re.IGNORECASE)
    what = f" for {asked[1]} more" if asked else ""
    return f"memory ran out{what}; {advice}"
