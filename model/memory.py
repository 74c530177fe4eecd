"""The memory that training takes, planned before a weight is loaded: on the meta device a 7B costs nothing to look at.

Weights, gradients and the optimizer's state are exact. Activations are what autograd keeps of one micro-batch, derived
below from the tensors that each operation of a block saves. On top come what a library's kernels use for a moment, the
head's chunk of logits (kernels/linear_logp.py), the encoded pictures and what the projector keeps of them.
"""
import re

import torch

from model.flops import flow, input_trains, trains
from model.lora import LoraLinear, adapters
from model.optim import is_narrow, trained_line, trained_lines

GIB = 2 ** 30


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer(parameters, moments, master):
    """State of make_optimizer's AdamW: m and v, for a narrow weight its fp32 copy; torch's counts its steps in fp32."""
    own, kept = any(is_narrow(p.dtype) for p in parameters), getattr(torch, moments).itemsize
    narrow = sum(p.numel() for p in parameters if is_narrow(p.dtype))
    wide = [p for p in parameters if not is_narrow(p.dtype)]
    return narrow * (2 * kept + 4 * master) + 2 * _bytes(wide) + (0 if own else 4 * len(wide))


def _keeps(linear):
    """Whether a Linear keeps its input for the gradient of its weight or of its adapter's first factor."""
    return linear.weight.requires_grad or isinstance(linear, LoraLinear) and linear.lora_a.requires_grad


def _block(block, needs, size):
    """-> (bytes that one token leaves in a block whose input needs a gradient or not, those that a prefix token does
    whose key and value are repeated for another completion, whether the output needs a gradient).

    A norm keeps its input or what it normalised, one tensor either way; the Linears behind it share one more. Attention
    keeps q, k, v (for grouped queries keys and values repeated), its output, which o_proj reads, and in fp32 the log of
    each head's sum. SwiGLU keeps the gate before and after silu, and `up`; down_proj the product.
    """
    c, (linears, attended, out) = block.self_attn.c, flow(block, needs)
    (q, normed), (k, _), (v, _), (o, _), (gate, post), (up, _), (down, _) = linears
    D, HK = c.width, c.heads * c.head_width
    count = D * (normed + (_keeps(q) or _keeps(k) or _keeps(v)) + post + (_keeps(gate) or _keeps(up)))
    count += HK * (4 if attended else _keeps(o))
    count += (c.heads + c.kv_heads) * c.head_width * (attended and c.qk_norm)
    count += c.ff * (2 * (post or trains(gate)) + (post or trains(up)) + _keeps(down))
    count += sum(layer.lora_b.shape[1] for layer in adapters(block) if layer.lora_b.requires_grad)
    return size * count + 4 * c.heads * attended, size * 2 * HK * attended, out


def _activations(vlm, tokens, prefix_tokens):
    llm, c, size = vlm.llm, vlm.llm.config, vlm.llm.embed_tokens.weight.element_size()
    needs, blocks = input_trains(vlm, pictures=True), []
    for block in llm.layers:
        kept, repeated, needs = _block(block, needs, size)
        blocks.append(tokens * kept + prefix_tokens * repeated)
    head = needs or trains(llm.norm) or llm.head.requires_grad
    # The last norm, then the states as the head reads them, the token and three statistics of each row.
    end = tokens * (size * c.width * (needs or trains(llm.norm)) + (size * c.width + 8 + 12) * head)
    if llm.checkpointing:
        return end + c.layers * size * c.width * tokens + max(blocks)
    return end + sum(blocks)


def plan(vlm, tokens, rows=0, cache_tokens=0, moments="float32", master=True, prefix_tokens=0):
    """-> bytes by name: weights, gradients, optimizer, activations, cache.

    tokens: of a micro-batch, padding included; of reinforcement learning P T + P G C, and prefix_tokens P G T, those of
    the prompts whose keys and values are repeated for their groups. All tokens count as predicted, and as having a
    picture before them. With the decoder's `checkpointing`: the inputs of all blocks and the inside of one.
    rows, cache_tokens: prompts sampled at once and slots of each in the cache, T + G times the new tokens.
    moments, master: as make_optimizer has them. Raises ValueError on a count below 0.
    """
    counts = dict(tokens=tokens, rows=rows, cache_tokens=cache_tokens, prefix_tokens=prefix_tokens)
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} {count} must be at least 0")
    c, trained = vlm.llm.config, [p for p in vlm.parameters() if p.requires_grad]
    slot = 2 * c.layers * c.kv_heads * c.head_width * vlm.llm.embed_tokens.weight.element_size()
    return dict(weights=_bytes([*vlm.parameters(), *vlm.buffers()]), gradients=_bytes(trained),
                optimizer=_optimizer(trained, moments, master),
                activations=_activations(vlm, tokens, prefix_tokens) if trained else 0,
                cache=rows * cache_tokens * slot)


def table(stage, vlm, tokens, **options):
    """What trains, then the planned memory, as text; the options are those of `plan`."""
    lines = trained_lines(stage, vlm)
    lines += [trained_line(stage, name, [p]) for name, p in vlm.named_parameters(recurse=False)]
    if found := adapters(vlm.llm):
        pairs = [p for layer in found for p in (layer.lora_a, layer.lora_b)]
        lines.append(trained_line(stage, "  adapters", pairs) + ", part of llm")
    found = plan(vlm, tokens, **options)
    total = sum(found.values())
    size, unit = (GIB, "GiB") if total >= GIB else (2 ** 20, "MiB")
    said = ", ".join(f"{name} {count / size:.1f}" + f" for {tokens} tokens" * (name == "activations")
                     for name, count in found.items() if count)
    return "\n".join([*lines, f"  {stage:<16}{'memory':<16}{total / size:9.1f} {unit} planned: {said}"])


def announce(stage, vlm, cfg, samples):
    """Prints `table` for a stage of train.py's config: micro-batches of records of --max-length (else of a picture and
    64 tokens), or, in a stage that `samples`, of as long prompts with their groups of completions of --max-new."""
    words, group = vlm.config.image_tokens + 64, cfg.group * samples
    batch = cfg.rl_batch if samples else cfg.align_batch or cfg.batch if stage == "align" else cfg.batch
    P, T = min(cfg.micro_batch or batch, batch), words if samples else cfg.max_length or words
    sampling = dict(rows=cfg.rl_batch, cache_tokens=T + group * cfg.max_new, prefix_tokens=P * group * T)
    print(table(stage, vlm, P * (T + group * cfg.max_new), moments=cfg.moments, master=cfg.master,
                **(sampling if samples else {})), flush=True)


def shortage(error, advice):
    """What a person reads when `error` says that memory ran out, with `advice` at its end; raises `error` when it says
    anything else."""
    message = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in message:
        raise error
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", message, flags=re.IGNORECASE)
    what = f" for {asked[1]} more" if asked else ""
    return f"memory ran out{what}; {advice}"
