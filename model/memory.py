"""The memory that training takes, planned before a weight is loaded: on the meta device a 7B costs
nothing to look at.

Weights, gradients and the optimizer's state are exact. Activations are what autograd keeps of one
micro-batch, derived below from the tensors that each operation of a block saves. The moment is the
largest of what is there for a moment only: the head's chunk of logits, the gradients inside one
block, or the optimizer's copies of one weight. On a CPU what the run holds beside the model
(tokenizer, records, drawn pictures, the libraries) is measured, not planned, and decoded pictures,
which are kept for the next epoch, are counted. Left out: the encoded pictures and what the
projector keeps of them.
"""
import re

import torch
from torch import nn

from kernels.linear_logp import chunk_rows, padded_vocab
from model import machine
from model.clip import QuickGELU
from model.flops import check, flow, input_trains, states_cost, tower_blocks, tower_flow
from model.flops import tower_input_trains, tower_tokens, trains
from model.lora import LoraLinear, adapters
from model.mixed import MixedLinear
from model.optim import is_narrow, trained_line, trained_lines

GIB = 2 ** 30
MIB = 2 ** 20


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------- optimizer

def _optimizer(parameters, moments, master):
    """State of make_optimizer's AdamW: m and v, of a narrow weight its fp32 copy, and in torch's
    fused kernel, which steps those with fp32 copies and moments and, where no weight is narrow, all
    others, a count of steps in fp32."""
    kept = getattr(torch, moments).itemsize
    narrow = [p for p in parameters if is_narrow(p.dtype)]
    wide = [p for p in parameters if not is_narrow(p.dtype)]
    total = sum(p.numel() for p in narrow) * (2 * kept + 4 * master) + 2 * _bytes(wide)
    if not narrow:
        total += 4 * len(wide)
    elif _is_fused(moments, master):
        total += 4 * len(narrow)
    return total


def _is_fused(moments, master):
    return master and moments == "float32"


def _gradients(parameters, master):
    """With fp32 copies of narrow weights their gradients are fp32, too."""
    total = 0
    for p in parameters:
        is_wide = master and is_narrow(p.dtype)
        total += p.numel() * (4 if is_wide else p.element_size())
    return total


# ---------------------------------------------------------------- activations

def _keeps(linear):
    """Whether a Linear keeps its input, for the gradient of its weight or of its adapter's first
    factor."""
    if linear.weight.requires_grad:
        return True
    return isinstance(linear, LoraLinear) and linear.lora_a.requires_grad


def _inputs(linears, width, size):
    """Bytes that a token leaves in front of Linears with one input: that, or in mixed precision a bf16 copy for each of
    them."""
    keeping = [linear for linear in linears if _keeps(linear)]
    if keeping and isinstance(keeping[0], MixedLinear):
        return 2 * width * len(keeping)
    return size * width * bool(keeping)


def _narrow_copies(module):
    """Bytes of the bf16 copies of weights that mixed precision multiplies with."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, MixedLinear))


def _between_factors(module):
    """Numbers that a token leaves between the two factors of the adapters inside a module."""
    return sum(layer.lora_b.shape[1] for layer in adapters(module) if layer.lora_b.requires_grad)


def _block(block, needs, size):
    """What a token leaves in a decoder block whose input needs a gradient or not.

    -> (bytes of a token of a prompt, of one that completions look at, of a completion's token,
    whether the output needs a gradient).

    A norm keeps its input or what it normalised, one tensor either way; the Linears behind it share
    one more. Attention keeps q, k, v (of prompts with grouped queries keys and values repeated,
    which completions look at unrepeated), its output, which o_proj reads, and in fp32 the log of
    each head's sum. SwiGLU keeps the gate before and after silu, and `up`; down_proj the product.
    """
    if states_cost(block):
        return 0, 0, 0, needs or trains(block)
    c = block.self_attn.c
    linears, attended, out = flow(block, needs)
    (q, before), (k, _), (v, _), (o, _), (gate, after), (up, _), (down, _) = linears
    heads_width = c.heads * c.head_width
    # The two norms, each with the input of the Linears behind it.
    token = _inputs([q, k, v], c.width, size) + _inputs([gate, up], c.width, size) + _inputs([down], c.ff, size)
    count = c.width * (before + after)
    if attended:
        count += 4 * heads_width
        if c.qk_norm:
            count += (c.heads + c.kv_heads) * c.head_width
    if not attended or isinstance(o, MixedLinear):      # else what o reads is attention's own
        token += _inputs([o], heads_width, size)
    count += c.ff * (2 * (after or trains(gate)) + (after or trains(up)))
    count += _between_factors(block)
    token += size * count + 4 * c.heads * attended
    if not attended or c.heads == c.kv_heads:
        return token, token, token, out
    once = size * 2 * c.kv_heads * c.head_width                 # key and value, not repeated
    repeated = size * 2 * heads_width
    return token, token + once, token - repeated + once, out


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


def _decoder(vlm, tokens, completion_tokens):
    llm = vlm.llm
    c = llm.config
    size = llm.embed_tokens.weight.element_size()
    needs = input_trains(vlm, pictures=True)
    blocks = []
    for block in llm.layers:
        alone, seen, completion, needs = _block(block, needs, size)
        prompt = seen if completion_tokens else alone
        blocks.append((tokens - completion_tokens) * prompt + completion_tokens * completion)
    states = needs or trains(llm.norm)
    token = size * c.width * states             # of the last norm
    if states or llm.head.requires_grad:
        # The states as the head reads them, the predicted token and three statistics of each row.
        token += size * c.width + 8 + 12
    if llm.checkpointing:
        return tokens * (token + c.layers * size * c.width) + max(blocks)
    return tokens * token + sum(blocks)


def slot(llm):
    """Bytes of a token's keys and values in all layers."""
    c = llm.config
    return 2 * c.layers * c.kv_heads * c.head_width * llm.embed_tokens.weight.element_size()


def plan(vlm, tokens, rows=0, cache_tokens=0, moments="float32", master=True, completion_tokens=0,
         pictures=None):
    """-> bytes by name: weights, gradients, optimizer, activations, cache.

    tokens: of a micro-batch, padding included; of reinforcement learning P T + P G C, and
    completion_tokens P G C of them.
    All tokens count as predicted, and as having a picture before them. With the decoder's
    `checkpointing`: the inputs of all blocks and the inside of one.
    pictures: of a micro-batch, for an image tower that trains; None: as many as `tokens` can hold.
    Attention is taken to hold no mask and no repeated keys of completions, as kernels/
    prefix_attention.py does but for fp32 on CUDA.
    rows, cache_tokens: prompts sampled at once and slots of each in the cache, T + G times the new
    tokens.
    moments, master: as make_optimizer has them.

    Decoder blocks and towers of a class that states its own FLOPs count without their activations.
    Raises ValueError on a count below 0, and on a module that model/flops.py does not know.
    """
    if pictures is None:
        pictures = tokens // vlm.config.image_tokens
    counts = dict(tokens=tokens, rows=rows, cache_tokens=cache_tokens,
                  completion_tokens=completion_tokens, pictures=pictures)
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} {count} must be at least 0")
    check(vlm)
    trained = [p for p in vlm.parameters() if p.requires_grad]
    activations = 0
    if trained:
        activations = _decoder(vlm, tokens, completion_tokens) + pictures * _tower(vlm)
    weights = _bytes([*vlm.parameters(), *vlm.buffers()]) + _narrow_copies(vlm.llm)
    return dict(weights=weights, gradients=_gradients(trained, master),
                optimizer=_optimizer(trained, moments, master), activations=activations,
                cache=rows * cache_tokens * slot(vlm.llm))


# ---------------------------------------------------------------- a moment

def _head_moment(vlm, tokens, device):
    """The head's chunk of fp32 logits; on a CPU, which has no matmul of bf16 with an fp32 result, the head in fp32; on
    CUDA, where its vocabulary is padded, the copy that is; the gradient of the head in fp32, beside the one that it is
    added to."""
    c = vlm.llm.config
    wide = torch.promote_types(vlm.llm.head.dtype, torch.float32).itemsize
    rows = chunk_rows(device, c.vocab, need_dw=vlm.llm.head.requires_grad)
    total = wide * c.vocab * min(tokens, rows)
    if device.type != "cuda" and is_narrow(vlm.llm.head.dtype):
        total += wide * c.vocab * c.width
    if device.type == "cuda" and padded_vocab(c.vocab) != c.vocab:
        total += vlm.llm.head.element_size() * padded_vocab(c.vocab) * c.width
    if vlm.llm.head.requires_grad:
        total += wide * c.vocab * c.width
    return total


def _block_moment(vlm, tokens):
    """Gradients inside one block: of gate, up and their product, and of its input and output."""
    c = vlm.llm.config
    return tokens * (3 * c.ff + 2 * c.width) * vlm.llm.embed_tokens.weight.element_size()


def _optimizer_moment(vlm, moments, master):
    """What the AdamW of model/optim.py computes with, for one narrow weight at a time: the root in fp32, and whatever
    is not kept so. torch's fused kernel has nothing beside its state."""
    if _is_fused(moments, master):
        return 0
    largest = max((p.numel() for p in vlm.parameters() if p.requires_grad and is_narrow(p.dtype)), default=0)
    copies = 1 + 2 * (moments != "float32") + 2 * (not master)      # m and v; weight and gradient
    return 4 * copies * largest


def moment(vlm, tokens, device, moments="float32", master=True):
    """Bytes of the largest thing that is there for a moment only; arguments as `plan` has them, device: a
    torch.device."""
    return max(_head_moment(vlm, tokens, device), _block_moment(vlm, tokens),
               _optimizer_moment(vlm, moments, master))


# A stage that may take more than this share of the free memory gets blocks on pages of their own, which are slower.
ROOMY = 0.5


def holes(tokens, width, size, activations, gives_back):
    """Bytes that a CPU's heap loses between blocks: a hole that a forward's temporary leaves does not take the next
    aligned block of its size, and a forward frees about as many bytes as it keeps. Where it `gives_back` blocks
    (model/machine.py), those from `own_pages` on leave none.

    tokens, width, size: of the states of a micro-batch, the last in bytes a number.
    """
    if gives_back and tokens * width * size >= machine.own_pages(width):
        return 0
    return activations


# ---------------------------------------------------------------- reinforcement learning's other models

def twin(vlm):
    """Bytes of `VLM.twin`: it shares the frozen tower, and beside adapters the frozen weights."""
    shares = bool(adapters(vlm.llm))
    copied = []
    for name, p in vlm.named_parameters():
        is_shared = not p.requires_grad and (shares or name.startswith("visual."))
        if not is_shared:
            copied.append(p)
    return _bytes(copied) + _narrow_copies(vlm.llm)


def critic_has_decoder(switches):
    """Whether a critic trains a decoder of its own: another model, whose activations lie beside the policy's."""
    return switches.baseline == "critic" and switches.critic == "separate"


def reference(vlm, switches, moments="float32", master=True):
    """Bytes of the reference and of a critic with a decoder of its own, which trains: the switches of an
    Algorithm."""
    total = 0
    if switches.kl_coef and (switches.ref_sync or not adapters(vlm.llm)):
        total += twin(vlm)
    if critic_has_decoder(switches):
        trained = [p for p in vlm.parameters() if p.requires_grad]
        total += twin(vlm) + _gradients(trained, master) + _optimizer(trained, moments, master)
    return total


# ---------------------------------------------------------------- CLIP

def _text_tower(model, texts, tokens):
    """Bytes that captions leave in CLIP's text tower, all of which trains."""
    size = model.token_embedding.weight.element_size()
    c = model.config
    token = size * c.text_width + 8 + size * c.text_width       # the last norm's and the embeddings' sum
    for block in model.transformer.resblocks:
        kept, _ = _tower_block(block, True, size, c.text_width)
        token += kept
    return texts * tokens * token


def _image_tower(model, pictures):
    """Bytes that pictures leave in CLIP's image tower, all of which trains."""
    c = model.config
    size = model.visual.positional_embedding.element_size()
    stem = size * 3 * c.image_size ** 2 if c.stem == "conv" else size * c.patches * _chain(model.visual.stem, False)
    token = 2 * (size * c.width + 8)                            # the norms before and behind the blocks
    for block in model.visual.transformer.resblocks:
        kept, _ = _tower_block(block, True, size, c.width)
        token += kept
    return pictures * (stem + tower_tokens(c) * token)


def plan_clip(model, pairs, tokens, moments="float32", master=True):
    """As `plan`, of contrastive training on `pairs` of a picture and a caption of `tokens` tokens, all at once."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return dict(weights=_bytes([*model.parameters(), *model.buffers()]), gradients=_gradients(trained, master),
                optimizer=_optimizer(trained, moments, master),
                activations=_image_tower(model, pairs) + _text_tower(model, pairs, tokens))


# ---------------------------------------------------------------- as text

def trained_table(stage, vlm):
    """What trains, a line for each part of a model."""
    lines = trained_lines(stage, vlm)
    for name, p in vlm.named_parameters(recurse=False):
        lines.append(trained_line(stage, name, [p]))
    found = adapters(vlm.llm)
    if found:
        pairs = [p for layer in found for p in (layer.lora_a, layer.lora_b)]
        lines.append(trained_line(stage, "  adapters", pairs) + ", part of llm")
    return lines


def planned_line(stage, planned, tokens, unknown=0):
    """{name: bytes} as one line; tokens: of a micro-batch; unknown: modules without their activations."""
    total = sum(planned.values())
    size, unit = (GIB, "GiB") if total >= 10 * GIB else (MIB, "MiB")      # parts that tell something in either
    parts = []
    for name, count in planned.items():
        if count:
            part = f"{name} {count / size:.1f}"
            parts.append(f"{part} for {tokens} tokens" if name == "activations" else part)
    if unknown:
        parts.append(f"without the activations of {unknown} modules of another class")
    return f"  {stage:<15} {'memory':<16}{total / size:9.1f} {unit} planned: " + ", ".join(parts)


def table(stage, vlm, tokens, beside=None, **options):
    """What trains, then the planned memory, as text; the options are those of `plan`. beside: {name: bytes} of what
    else takes memory."""
    planned = plan(vlm, tokens, **options) | (beside or {})
    unknown = [block for block in vlm.llm.layers if states_cost(block)]
    if trains(vlm.visual) and states_cost(vlm.visual):
        unknown.append(vlm.visual)
    return "\n".join([*trained_table(stage, vlm), planned_line(stage, planned, tokens, len(unknown))])


def warning(stage, needed, room):
    """A sentence where a stage needs more bytes than there are; "" where it does not, or where nobody knows."""
    if room is None or needed <= room:
        return ""
    if stage == "clip":
        less = "a smaller --clip-batch or --image-size"
    else:
        less = ("a smaller --micro-batch, --rollout-rows, --rl-batch, --group or --max-new, --checkpointing, "
                "--lora-rank=16, --dtype=bfloat16 or a smaller model")
    return (f"warning: stage {stage} is planned to take {needed / GIB:.1f} GiB more, and {room / GIB:.1f} GiB of the "
            f"machine are free: {less} needs less")


class Announcer:
    """Prints the plan of a stage, with what the run holds beside its model. device: a torch.device; bare: bytes that
    the process held before the run began, None: those that it holds now."""

    def __init__(self, device, bare=None):
        self.device = device
        self.usage = machine.Usage(machine.resident() if bare is None else bare)
        self.gives_back = False         # whether blocks have pages of their own

    def beside(self, model, pictures):
        """{name: bytes} of what is not the model's, on a CPU: what the run holds already, and decoded pictures that it
        will keep."""
        if self.device.type == "cuda":
            return {}
        held = self.usage.held()
        if not any(p.is_meta for p in model.parameters()):
            held -= _bytes([*model.parameters(), *model.buffers()])
        return dict(held=max(0, held), pictures=pictures)

    def needed(self, model, planned):
        """Bytes of a plan beyond what the process holds."""
        needed = sum(planned.values()) - planned.get("held", 0)
        if not any(p.is_meta for p in model.parameters()):
            needed -= planned["weights"]
        return needed

    def holes(self, model, tokens, width, size, planned):
        """As the function `holes`, for a plan without them, after blocks have got pages of their own where memory is
        short; 0 on a GPU."""
        if self.device.type == "cuda":
            return 0
        activations = planned["activations"]
        room = machine.room(self.device)
        if room is not None and self.needed(model, planned) + activations > ROOMY * room:
            machine.give_blocks_back(width)
            self.gives_back = True
        return holes(tokens, width, size, activations, self.gives_back)

    def warn(self, stage, model, planned):
        """Prints a warning where the stage will need more than there is. What is there already asks for nothing."""
        found = warning(stage, self.needed(model, planned), machine.room(self.device))
        if found:
            print(found, flush=True)
        return bool(found)

    def clip(self, stage, model, cfg, pictures, longest):
        """As `stage`, of CLIP's pre-training on captions of at most `longest` tokens."""
        c = model.config
        pairs = cfg.supervised.clip_batch
        tokens = min(longest, c.text_length)
        optim = cfg.optim
        planned = plan_clip(model, pairs, tokens, optim.moments, optim.master)
        size = model.token_embedding.weight.element_size()
        planned |= self.beside(model, pictures)
        planned["holes"] = self.holes(model, pairs * tower_tokens(c), c.width, size, planned)
        print(planned_line(stage, planned, pairs * (tokens + tower_tokens(c))), flush=True)
        return self.warn(stage, model, planned)

    def stage(self, stage, vlm, cfg, longest, pictures=0, others=0, *, samples):
        """Prints `table` for a stage of train.py's config: micro-batches of records as long as the `longest`, or, in a
        stage that `samples`, of as long prompts with their groups of completions of --max-new. -> whether it warned.

        longest: tokens, padding included; pictures: bytes of decoded pictures that the run keeps; others: bytes of
        models beside the policy, its own copies aside.
        """
        optim = cfg.optim
        P, tokens, sampling = shape_of(stage, cfg, longest, samples)
        options = dict(pictures=P, moments=optim.moments, master=optim.master, **sampling)
        planned = plan(vlm, tokens, **options)
        c = vlm.llm.config
        size = vlm.llm.embed_tokens.weight.element_size()
        beside = {}
        if samples:
            beside["reference"] = others + reference(vlm, cfg.algorithm, optim.moments, optim.master)
            beside["activations"] = planned["activations"] * (1 + critic_has_decoder(cfg.algorithm))
        beside["moment"] = moment(vlm, tokens, self.device, optim.moments, optim.master)
        beside |= self.beside(vlm, pictures)
        beside["holes"] = self.holes(vlm, tokens, c.width, size, planned | beside)
        print(table(stage, vlm, tokens, beside, **options), flush=True)
        return self.warn(stage, vlm, planned | beside)


def shape_of(stage, cfg, longest, samples):
    """-> (records or prompts of a micro-batch, its tokens, what `plan` is told of sampling)."""
    optim = cfg.optim
    if not samples:
        batch = cfg.supervised.batch
        if stage == "align" and cfg.supervised.align_batch:
            batch = cfg.supervised.align_batch
        P = min(optim.micro_batch or batch, batch)
        return P, P * longest, {}
    P = min(optim.micro_batch or cfg.rl.rl_batch, cfg.rl.rl_batch)
    completion_tokens = cfg.sampling.group * cfg.sampling.max_new
    rows = cfg.rl.rl_batch
    if cfg.sampling.rollout_rows:
        rows = min(rows, max(1, cfg.sampling.rollout_rows // cfg.sampling.group))
    sampling = dict(rows=rows, cache_tokens=longest + completion_tokens,
                    completion_tokens=P * completion_tokens)
    return P, P * (longest + completion_tokens), sampling


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
