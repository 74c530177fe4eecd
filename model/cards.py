"""What a run will need, before it is paid for: memory of a rank by part, and seconds of a step, on so many cards.

    python train.py --preset=llava-1.5-7b --stage=rl --plan=h100x8

Memory follows model/memory.py's plan of one process and the rules by which model/sharding.py spreads it. Times are
modelled: FLOPs as model/flops.py counts them, bytes that a decode step reads and that ranks exchange, over the peaks of
CARDS times the shares of EFFICIENCY, which are assumptions and are printed beside. Every card samples and updates as
many prompts as in the run that was asked for, so that more cards take larger steps.
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from model import flops, memory
from model.memory import GIB
from model.optim import is_narrow

ROWS = (1, 8, 64, 1024)         # cards of the table, beside those that were asked for


@dataclass(frozen=True)
class Card:
    """Peaks: FLOP/s of dense matmuls in bf16; bytes of memory; bytes/s of it, of the wires to the cards of a node (one
    way), and to other nodes."""
    flops: float
    memory: float
    bandwidth: float
    inside: float
    outside: float
    of_a_node: int = 8


# NVIDIA's data sheets of the SXM cards with 80, 80 and 141 GB, NVLink one way; 200 and 400 Gb/s a card between nodes,
# as in their DGX machines.
CARDS = {"a100": Card(312e12, 80e9, 2.039e12, 300e9, 25e9),
         "h100": Card(989e12, 80e9, 3.35e12, 450e9, 50e9),
         "h200": Card(989e12, 141e9, 4.8e12, 450e9, 50e9)}

# Shares of the peaks that are assumed to be reached. hidden: of what ranks exchange in forward and backward, the part
# that goes on beside the computation, and costs nothing.
EFFICIENCY = dict(matmul=0.45, bandwidth=0.6, exchange=0.7, hidden=0.5)


def parse(text):
    """--plan -> (name of the card, how many). Raises ValueError for anything but NAMExN.

    >>> parse("h100x16")
    ('h100', 16)
    """
    name, _, count = text.rpartition("x")
    if name not in CARDS or not count.isdecimal() or not 1 <= int(count) <= 100000:
        raise ValueError(f"--plan={text} must be CARDxN, as in h100x8: one of {', '.join(CARDS)}, and their number")
    return name, int(count)


@dataclass(frozen=True)
class Work:
    """A step of a stage on one rank.

    prompts: sampled, or records; micro: of a micro-batch; tokens: of one; pictures: of one; group, new: completions of
    a prompt and tokens of each, 0 in supervised stages; passes: forwards with a backward of each prompt; scored:
    forwards without, of policy and reference before the update; exact: the update asks the reference, too, for the
    exact KL in its loss; critic: it has a decoder of its own, which is scored and trained beside the policy.
    """
    prompts: int
    micro: int
    tokens: int
    pictures: int = 1
    group: int = 0
    new: int = 0
    passes: int = 1
    scored: int = 0
    exact: bool = False
    critic: bool = False

    @property
    def of_a_pass(self):
        """Micro-batches of all prompts."""
        return math.ceil(self.prompts / self.micro)

    @property
    def micros(self):
        """Micro-batches of a step."""
        return self.of_a_pass * self.passes

    def batch(self, prompts):
        """As model/flops.py reads one."""
        ids = torch.empty(prompts, self.tokens, device="meta")
        target = torch.ones(prompts, self.tokens, dtype=torch.bool)
        pictures = torch.empty(prompts * self.pictures, 0, device="meta")
        return SimpleNamespace(ids=ids, target=target, pixels=pictures, features=pictures)

    def shape(self, prompts):
        """(P, G, C) of the completions, None in supervised stages."""
        return (prompts, self.group, self.new) if self.group else None


def work_of(cfg, stage, image_tokens, words, ranks):
    """train.py's config -> Work of a rank, of a step whose prompts are dealt out over so many ranks; words: tokens of a
    record or prompt beside its picture's."""
    samples = cfg.rl.rl_batch if stage == "rl" else cfg.supervised.batch
    if stage == "align" and cfg.supervised.align_batch:
        samples = cfg.supervised.align_batch
    prompts = math.ceil(samples / ranks)
    micro = min(cfg.optim.micro_batch or prompts, prompts)
    if stage != "rl":
        return Work(prompts, micro, image_tokens + words)
    switches = cfg.algorithm
    # What `score` in rl/update.py asks before the update.
    has_reference = switches.kl_coef > 0
    has_critic = switches.baseline == "critic"
    kl_in_reward = has_reference and switches.kl_in == "reward"
    several_updates = cfg.rl.epochs * cfg.rl.mini_batches > 1
    needs_policy = (several_updates or kl_in_reward or has_critic or switches.top_entropy < 1
                    or switches.correct != "none")
    needs_reference = has_reference and (kl_in_reward or switches.kl != "exact")
    return Work(prompts, micro, image_tokens + words, group=cfg.sampling.group, new=cfg.sampling.max_new,
                passes=cfg.rl.epochs, scored=needs_policy + needs_reference,
                exact=has_reference and not needs_reference, critic=has_critic and switches.critic == "separate")


# ---------------------------------------------------------------- memory

def _bytes(parameters, size=None):
    return sum(p.numel() * (size or p.element_size()) for p in parameters)


def parts_of(vlm):
    """-> (parameters of the decoder's blocks, one list a block; what lies around them; the image tower)."""
    blocks = [[*block.parameters()] for block in vlm.llm.layers]
    in_blocks = {id(p) for block in blocks for p in block}
    tower = [*vlm.visual.parameters()]
    in_tower = {id(p) for p in tower}
    around = [p for p in vlm.parameters() if id(p) not in in_blocks and id(p) not in in_tower]
    return blocks, around, tower


def memory_of(vlm, work, shard, ranks, of_a_node, optim, twin=False, device=torch.device("cuda")):
    """{part: bytes} of one rank, the most that is there at once. vlm: on the meta device; shard: as --shard; twin:
    whether a copy of the policy is its reference."""
    tokens = work.micro * (work.tokens + work.group * work.new)
    completion_tokens = work.micro * work.group * work.new
    cache_tokens = work.tokens + work.group * work.new
    rows = work.prompts if work.group else 0
    whole = memory.plan(vlm, tokens, rows, cache_tokens, optim.moments, optim.master, completion_tokens,
                        work.micro * work.pictures)
    moment = memory.moment(vlm, tokens, device, optim.moments, optim.master)
    copies = memory.twin(vlm) if twin else 0
    decoders = 1 + work.critic              # that train; one backward goes through both
    activations = whole["activations"] * decoders
    if shard == "none" or ranks == 1:
        parts = {name: whole[name] for name in ("weights", "gradients", "optimizer")}
        critic = memory.twin(vlm) + whole["gradients"] + whole["optimizer"]
        update = dict(activations=activations, moment=moment)
        rollout = dict(cache=whole["cache"])
        return parts | dict(reference=copies, critic=critic * work.critic) | _larger(update, rollout)
    holders = ranks if shard == "full" else min(ranks, of_a_node)
    blocks, around, tower = parts_of(vlm)
    held = [p for block in blocks for p in block] + around
    trained = [p for p in held if p.requires_grad]
    frozen = [p for p in held if not p.requires_grad]
    # What trains lies in fp32 or wider shards, with two moments of its dtype, and is gathered in its own.
    wide = 4 if any(is_narrow(p.dtype) for p in trained) else None
    largest = max(_bytes(block) for block in blocks)
    gathered = 2 * largest + _bytes(around)
    exchanged = max(_bytes((p for p in block if p.requires_grad), wide) for block in blocks)
    parts = dict(weights=_bytes(tower) + (_bytes(trained, wide) + _bytes(frozen)) // holders,
                 optimizer=2 * _bytes(trained, wide) // holders, reference=copies // holders)
    if work.critic:                         # a copy, whose own part trains as the policy's does, and its moments
        parts["critic"] = (memory.twin(vlm) - _bytes(trained) + 3 * _bytes(trained, wide)) // holders
    update = dict(gradients=decoders * _bytes(trained, wide) // holders + exchanged,
                  gathered=gathered * (decoders + bool(twin)), activations=activations, moment=moment)
    rollout = dict(gathered=_bytes(held), cache=whole["cache"])
    return parts | _larger(update, rollout if work.group else {})


def _larger(update, rollout):
    """Of the two phases of a step the one that takes more."""
    return max(update, rollout, key=lambda phase: sum(phase.values()))


# ---------------------------------------------------------------- seconds

def seconds_of(vlm, work, shard, ranks, card):
    """{part: modelled seconds} of a step: rollout, update, and what of the exchange does not hide behind it."""
    matmul = card.flops * EFFICIENCY["matmul"]
    found = {}
    blocks, around, tower = parts_of(vlm)
    held = _bytes([p for block in blocks for p in block]) + _bytes(around)
    if work.group:
        found["rollout"] = rollout_seconds(vlm, work, held, card)
    batch = work.batch(work.micro)
    shape = work.shape(work.micro)
    step = flops.update(vlm, batch, shape) * work.passes + flops.forward(vlm, batch, shape) * work.scored
    if work.exact:
        completion_tokens = work.micro * work.group * work.new
        states = flops.forward(vlm, batch, shape, rows=0)
        step += work.passes * (states + flops.exact_kl(vlm, vlm, completion_tokens, backward=True))
    if work.critic:
        step += flops.forward(vlm, batch, shape, rows=0) + work.passes * flops.update(vlm, batch, shape, rows=0)
    if not work.group:                      # in reinforcement learning the rollout has encoded them
        step += flops.encode(vlm, work.micro * work.pictures)
    found["update"] = work.of_a_pass * step / matmul
    found["exchange"] = exchange_seconds(vlm, work, shard, ranks, card)
    return found


def rollout_seconds(vlm, work, held, card):
    """Encoding, the prompts, and a decode step for every token: it reads all weights, and the slots of the cache that
    are filled by then, half of them on the mean."""
    matmul = card.flops * EFFICIENCY["matmul"]
    prompts = work.batch(work.prompts)
    first = flops.encode(vlm, work.prompts * work.pictures) + flops.prompt(vlm, prompts)
    slots = work.prompts * (work.tokens + work.group * work.new / 2)
    read = held + slots * memory.slot(vlm.llm)
    rows = work.prompts * work.group
    multiplied = flops.cached(vlm.llm, rows, work.tokens + work.new // 2) + flops.head(vlm.llm, rows)
    a_token = max(read / (card.bandwidth * EFFICIENCY["bandwidth"]), multiplied / matmul)
    return first / matmul + work.new * a_token


def exchange_seconds(vlm, work, shard, ranks, card):
    """What ranks send each other in a step, so far as it does not hide behind the computation."""
    if ranks == 1:
        return 0.0
    blocks, around, _ = parts_of(vlm)
    held = [p for block in blocks for p in block] + around
    trained = [p for p in held if p.requires_grad]
    wide = 4 if any(is_narrow(p.dtype) for p in trained) else None
    shown = 1 - EFFICIENCY["hidden"]
    inside = card.inside * EFFICIENCY["exchange"]
    outside = card.outside * EFFICIENCY["exchange"]
    among_all = inside if ranks <= card.of_a_node else outside
    decoders = 1 + work.critic
    if shard == "none":             # a sum of all gradients, once the last micro-batch is done
        return 2 * (ranks - 1) / ranks * decoders * _bytes(trained, wide) / among_all
    holders = ranks if shard == "full" else min(ranks, card.of_a_node)
    among_holders = inside if holders <= card.of_a_node else outside
    share = (holders - 1) / holders
    # A micro-batch gathers weights for its forward and its backward, and scatters gradients, a critic's alike; each
    # scoring, and a reference's forward in the update, gathers once. A rollout begins when all weights are there.
    scatters = work.micros * decoders
    gathers = 2 * scatters + work.of_a_pass * (work.scored + work.critic) + work.micros * work.exact
    total = share * (gathers * _bytes(held) + scatters * _bytes(trained, wide)) * shown / among_holders
    if work.group:
        total += share * _bytes(held) / among_holders
    if holders < ranks:             # hybrid: then the same shards of all nodes are summed
        total += 2 * scatters * _bytes(trained, wide) / holders * shown / outside
    return total


# ---------------------------------------------------------------- as text

def text(cfg, stage, vlm, words=60):
    """The table of --plan. vlm: the model of the stage on the meta device."""
    name, asked = parse(cfg.parallel.plan)
    card = CARDS[name]
    c = vlm.config
    work = work_of(cfg, stage, c.image_tokens, words, asked)
    switches = cfg.algorithm
    twin = stage == "rl" and switches.kl_coef and (switches.ref_sync or not c.lora)
    total = sum(p.numel() for p in vlm.parameters())
    kind = "prompt" if work.group else "record"
    asked_of_a_card = f"{_counted(work.prompts, kind)} of {work.tokens} tokens ({words} of them text, assumed)"
    if work.group:
        asked_of_a_card += f", {_counted(work.group, 'completion')} of {work.new} tokens each"
    lines = [f"{stage}, {total / 1e9:.2f} G parameters, a card: {asked_of_a_card}, micro-batches of {work.micro}",
             assumptions(name, card),
             f"{'cards':>7} {'--shard':>7} {'GiB':>7}  {'s a step':>8} {'tokens/s':>9}  by part"]
    for ranks in sorted({*ROWS, asked}):
        for shard in ("none", "full", "hybrid"):
            if ranks == 1 and shard != "none" or shard == "hybrid" and ranks <= card.of_a_node:
                continue
            lines.append(row(vlm, work, shard, ranks, card, cfg.optim, twin))
    return "\n".join(lines)


def _counted(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def assumptions(name, card):
    """What the modelled seconds rest on, as a line."""
    share = EFFICIENCY
    return (f"modelled from assumed peaks x shares of {name}: {card.flops / 1e12:.0f} TFLOP/s x {share['matmul']}; "
            f"{card.memory / 1e9:.0f} GB at {card.bandwidth / 1e12:.2f} TB/s x {share['bandwidth']}; wires of "
            f"{card.inside / 1e9:.0f} GB/s in a node of {card.of_a_node}, {card.outside / 1e9:.0f} GB/s beyond x "
            f"{share['exchange']}, {share['hidden']:.0%} of what goes beside the computation hidden")


def row(vlm, work, shard, ranks, card, optim, twin):
    """A line of the table."""
    planned = memory_of(vlm, work, shard, ranks, card.of_a_node, optim, twin)
    needed = sum(planned.values())
    seconds = seconds_of(vlm, work, shard, ranks, card)
    whole = sum(seconds.values())
    tokens = ranks * work.prompts * (work.group * work.new or work.tokens)
    fits = "" if needed <= card.memory else f"  does not fit {card.memory / GIB:.0f} GiB"
    parts = [f"{part} {count / GIB:.1f}" for part, count in planned.items() if count]
    times = [f"{part} {value:.2f} s" for part, value in seconds.items() if value]
    return (f"{ranks:>7} {shard:>7} {needed / GIB:>7.1f}  {whole:>8.2f} {tokens / whole:>9.0f}  "
            f"{', '.join(parts)}; {', '.join(times)}{fits}")
