"""What a run will need, before it is paid for: memory of a rank by part, and seconds of a step, on so many cards.

    python train.py --preset=llava-1.5-7b --stage=rl --plan=h100x8
    python train.py --plan=cpux2                    # two ranks on the CPU of this machine

Memory follows model/memory.py's plan of one process and the rules by which model/sharding.py spreads it. Times are
modelled: FLOPs as model/flops.py counts them, bytes that a decode step reads and that ranks exchange, over peaks times
shares of them that are assumed (model/peaks.py), both printed beside. Every card samples and updates as many prompts as
in the run that was asked for, so that more cards take larger steps.
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from model import flops, memory, sharding
from model.memory import GIB, MIB
from model.optim import is_narrow
from model.peaks import CARDS, card_of, threads_of
from model.runs.config import need

ROWS = (1, 8, 64, 1024)         # cards of the table, beside those that were asked for
MOST_CARDS = 100000             # that may be asked for
MOST_OF_A_CPU = 256             # ranks of it

# Operations of torch on one stream through a decoder block: forward; forward and backward; a token that is sampled.
FORWARD_OPERATIONS = 60
UPDATE_OPERATIONS = 175
SAMPLE_OPERATIONS = 85
# Bytes that move for a number that trains: 28 in a fused AdamW, 12 to take the gradient's norm and to clip it.
OPTIMIZER_BYTES = 40


def parse(text):
    """--plan -> (name of the card, how many). Raises ValueError for anything but NAMExN.

    >>> parse("h100x16")
    ('h100', 16)
    """
    name, _, count = text.rpartition("x")
    most = MOST_OF_A_CPU if name == "cpu" else MOST_CARDS
    if name not in (*CARDS, "cpu") or not count.isdecimal() or not 1 <= int(count) <= most:
        raise ValueError(f"--plan={text} must be CARDxN, as in h100x8: one of {', '.join(CARDS)}, and their number up "
                         f"to {MOST_CARDS}; or cpuxN, ranks on this machine's CPU, up to {MOST_OF_A_CPU}")
    return name, int(count)


@dataclass(frozen=True)
class Work:
    """A step of a stage on one rank.

    prompts: sampled, or records; micro: of a micro-batch; tokens: of one; pictures: of one; group, new: completions of
    a prompt and tokens of each, 0 in supervised stages; passes: forwards with a backward of each prompt; scored:
    forwards without, of policy and reference before the update; exact: the update asks the reference, too, for the
    exact KL in its loss; critic: it has a decoder of its own, which is scored and trained beside the policy; predicted:
    tokens of a record that a supervised loss predicts, 0 for all.
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
    predicted: int = 0

    @property
    def completion_tokens(self):
        """Sampled tokens of a micro-batch."""
        return self.micro * self.group * self.new

    @property
    def tokens_of_a_micro_batch(self):
        """All of them, of prompts or records and of completions."""
        return self.micro * self.tokens + self.completion_tokens

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
        target = torch.zeros(prompts, self.tokens, dtype=torch.bool)
        target[:, -(self.predicted or self.tokens):] = True
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
                exact=has_reference and not needs_reference, critic=memory.critic_has_decoder(switches))


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


def in_shards(vlm):
    """-> (parameters that may lie in shards; those of them that train; bytes of a number in their shards and gradients,
    4 where their own dtype is narrower than fp32, else None: as it is)."""
    blocks, around, _ = parts_of(vlm)
    held = [p for block in blocks for p in block] + around
    trained = [p for p in held if p.requires_grad]
    wide = 4 if any(is_narrow(p.dtype) for p in trained) else None
    return held, trained, wide


def holders_of(shard, ranks, of_a_node):
    """How many ranks the shards of a weight are spread over."""
    if shard == "none":
        return 1
    return ranks if shard == "full" else min(ranks, of_a_node)


def memory_of(vlm, work, shard, ranks, of_a_node, optim, twin=False, device=torch.device("cuda"), gives_back=True):
    """{part: bytes} of one rank in the phase of a stage that takes the most. vlm: on the meta device; shard: as
    --shard; twin: whether a copy of the policy is its reference; gives_back: as model/memory.py's `holes`."""
    tokens = work.tokens_of_a_micro_batch
    cache_tokens = work.tokens + work.group * work.new
    rows = work.prompts if work.group else 0
    whole = memory.plan(vlm, tokens, rows, cache_tokens, optim.moments, optim.master, work.completion_tokens,
                        work.micro * work.pictures)
    decoders = 1 + work.critic              # that train; one backward goes through both
    activations = whole["activations"] * decoders
    backward = dict(activations=activations, moment=memory.moment(vlm, tokens, device, optim.moments, optim.master))
    if device.type != "cuda":
        c = vlm.llm.config
        size = vlm.llm.embed_tokens.weight.element_size()
        backward["holes"] = memory.holes(tokens, c.width, size, activations, gives_back)
    if shard == "none" or ranks == 1:
        phases = _phases_of_whole(vlm, work, ranks, whole, backward, twin, device)
    else:
        holders = holders_of(shard, ranks, of_a_node)
        phases = _phases_of_shards(vlm, work, holders, whole["cache"], backward, twin, device)
    return max(phases, key=lambda phase: sum(phase.values()))


def _phases_of_whole(vlm, work, ranks, whole, backward, twin, device):
    """[{part: bytes}] where a rank holds all weights: in the rollout, in the update, in the sum of all gradients."""
    parts = {name: whole[name] for name in ("weights", "gradients", "optimizer")}
    parts["reference"] = memory.twin(vlm) if twin else 0
    parts["critic"] = (memory.twin(vlm) + whole["gradients"] + whole["optimizer"]) * work.critic
    phases = [parts | backward]
    if work.group:
        phases.append(parts | dict(cache=whole["cache"]))
    if ranks > 1:
        bucket = min(4 * sharding.BUCKET, whole["gradients"])
        phases.append(parts | dict(exchanged=bucket * (2 if device.type == "cpu" else 1)))      # gloo takes a copy
    return phases


def _phases_of_shards(vlm, work, holders, cache, backward, twin, device):
    """[{part: bytes}] where weights lie in shards over so many `holders`: while they are loaded, in the rollout, in a
    micro-batch, in the sum of the last gradients, while a checkpoint is written."""
    blocks, around, tower = parts_of(vlm)
    # What trains lies in shards with two moments of their dtype, and is gathered in its own.
    held, trained, wide = in_shards(vlm)
    frozen = [p for p in held if not p.requires_grad]
    decoders = 1 + work.critic
    copies = memory.twin(vlm)
    rest = dict(weights=_bytes(tower) + (_bytes(trained, wide) + _bytes(frozen)) // holders,
                reference=copies // holders if twin else 0)
    if work.critic:                         # a copy, whose own part trains as the policy's does
        rest["critic"] = (copies - _bytes(trained) + _bytes(trained, wide)) // holders
    largest = max(_bytes(block) for block in blocks)
    exchanged = max(_bytes((p for p in block if p.requires_grad), wide) for block in blocks)
    # All copies are whole before the first is in shards, which is put there block by block.
    loaded = _bytes(held) + copies * (bool(twin) + work.critic)
    phases = [dict(weights=_bytes(tower), loaded=loaded + max(largest, exchanged))]

    rest["optimizer"] = 2 * _bytes(trained, wide) // holders
    if work.critic:
        rest["critic"] += rest["optimizer"]
    gradients = decoders * _bytes(trained, wide) // holders
    # A block at work and the next one, what lies around them, and its gradients, which are whole until the end, where
    # those of the embedding come.
    of_around = [p for p in around if p.requires_grad]
    embedding = vlm.llm.embed_tokens.weight
    early = [p for p in of_around if p is not embedding or vlm.llm.config.tied]
    gathered = (2 * largest + _bytes(around)) * (decoders + bool(twin))
    phases.append(rest | dict(gradients=gradients + exchanged + decoders * _bytes(early), gathered=gathered) | backward)
    # The gradients of what lies around the blocks, as they are and as they are sent, of which gloo takes a copy.
    sent = _bytes(of_around, wide)
    beside = sent if device.type == "cpu" else _bytes(of_around)
    phases.append(rest | dict(gradients=gradients, exchanged=sent + beside))
    if work.group:
        phases.append(rest | dict(gathered=_bytes(held), cache=cache))
    if device.type == "cpu":                # the first rank's; a GPU's go to the memory of the CPU one by one
        one = max(p.numel() * p.element_size() for p in held)
        phases.append(rest | dict(saved=_bytes(held) + one))
    return phases


# ---------------------------------------------------------------- seconds

def seconds_of(vlm, work, shard, ranks, card):
    """{part: modelled seconds} of a step: rollout, update, the optimizer, and what of the exchange does not hide behind
    them."""
    found = {}
    held, trained, _ = in_shards(vlm)
    if work.group:
        weights = _bytes(held)                  # a rollout begins when all of them are there
        found["rollout"] = gather_seconds(weights, shard, ranks, card) + rollout_seconds(vlm, work, weights, card)
    found["update"] = update_seconds(vlm, work, card)
    holders = holders_of(shard, ranks, card.of_a_node)
    numbers = (1 + work.critic) * sum(p.numel() for p in trained)
    found["optimizer"] = OPTIMIZER_BYTES * numbers / holders / (card.bandwidth * card.shares["bandwidth"])
    found["exchange"] = exchange_seconds(vlm, work, shard, ranks, card)
    return found


def update_seconds(vlm, work, card):
    """Scoring, forwards and backwards of all micro-batches."""
    batch = work.batch(work.micro)
    shape = work.shape(work.micro)
    step = flops.update(vlm, batch, shape) * work.passes + flops.forward(vlm, batch, shape) * work.scored
    if work.exact:
        states = flops.forward(vlm, batch, shape, rows=0)
        step += work.passes * (states + flops.exact_kl(vlm, vlm, work.completion_tokens, backward=True))
    if work.critic:
        step += flops.forward(vlm, batch, shape, rows=0) + work.passes * flops.update(vlm, batch, shape, rows=0)
    if not work.group:                      # in reinforcement learning the rollout has encoded them
        step += flops.encode(vlm, work.micro * work.pictures)
    seconds = step / (card.flops * card.shares["matmul"])
    passes = (1 + work.critic) * work.passes
    if card.shares["traffic"]:
        moved = card.shares["traffic"] * passes * activations_of(vlm, work)
        seconds += moved / (card.bandwidth * card.shares["bandwidth"])
    streams = 1 + bool(work.group)
    operations = UPDATE_OPERATIONS * passes + FORWARD_OPERATIONS * (work.scored + work.critic + work.exact)
    seconds += vlm.llm.config.layers * streams * operations * seconds_of_a_call(card)
    return work.of_a_pass * seconds


def activations_of(vlm, work):
    """Bytes that autograd keeps of a micro-batch of one decoder."""
    return memory.plan(vlm, work.tokens_of_a_micro_batch, completion_tokens=work.completion_tokens,
                       pictures=work.micro * work.pictures)["activations"]


def rollout_seconds(vlm, work, held, card):
    """Encoding, the prompts, and a decode step for every token: it reads all weights, and the slots of the cache that
    are filled by then, half of them on the mean. held: bytes of the weights."""
    matmul = card.flops * card.shares["matmul"]
    layers = vlm.llm.config.layers
    prompts = work.batch(work.prompts)
    first = flops.encode(vlm, work.prompts * work.pictures) + flops.prompt(vlm, prompts)
    slots = work.prompts * (work.tokens + work.group * work.new / 2)
    reading = (held + slots * memory.slot(vlm.llm)) / (card.bandwidth * card.shares["bandwidth"])
    rows = work.prompts * work.group
    multiplying = flops.cached(vlm.llm, rows, work.tokens + work.new // 2) + flops.head(vlm.llm, rows)
    multiplying /= card.flops * card.shares["few"]
    a_token = max(reading, multiplying) + (1 - card.shares["overlap"]) * min(reading, multiplying)
    a_token += layers * SAMPLE_OPERATIONS * seconds_of_a_call(card)
    return first / matmul + layers * FORWARD_OPERATIONS * seconds_of_a_call(card) + work.new * a_token


def seconds_of_a_call(card):
    """Of an operation of the model, beside what it does."""
    return card.operation * card.shares["calls"]


def gather_seconds(size, shard, ranks, card):
    """Of gathering what lies in shards, so many bytes in all, or of scattering as many bytes of gradients."""
    holders = holders_of(shard, ranks, card.of_a_node)
    wires = card.inside if holders <= card.of_a_node else card.outside
    return (holders - 1) / holders * size / (wires * card.shares["exchange"])


def exchange_seconds(vlm, work, shard, ranks, card):
    """What ranks send each other in an update, so far as it does not hide behind the computation."""
    if ranks == 1:
        return 0.0
    held, trained, wide = in_shards(vlm)
    shown = 1 - card.shares["hidden"]
    decoders = 1 + work.critic
    if shard == "none":             # a sum of all gradients, once the last micro-batch is done
        among_all = card.inside if ranks <= card.of_a_node else card.outside
        rate = (card.sums or among_all) * card.shares["exchange"]
        return 2 * (ranks - 1) / ranks * decoders * _bytes(trained, wide) / rate
    # A micro-batch gathers weights for its forward and its backward, and scatters gradients, a critic's alike; each
    # scoring, and a reference's forward in the update, gathers once.
    scatters = work.micros * decoders
    gathers = 2 * scatters + work.of_a_pass * (work.scored + work.critic) + work.micros * work.exact
    total = gather_seconds(gathers * _bytes(held) + scatters * _bytes(trained, wide), shard, ranks, card)
    holders = holders_of(shard, ranks, card.of_a_node)
    if holders < ranks:             # hybrid: then the same shards of all nodes are summed
        total += 2 * scatters * _bytes(trained, wide) / holders / (card.outside * card.shares["exchange"])
    return total * shown


# ---------------------------------------------------------------- as text

def text(cfg, stage, vlm, words=60):
    """The table of --plan. vlm: the model of the stage on the meta device. Raises ValueError for a dtype other than
    float32 on a CPU, whose peaks are measured in that."""
    name, asked = parse(cfg.parallel.plan)
    need(name != "cpu" or cfg.machine.dtype == "float32", "dtype", cfg.machine.dtype,
         f"be float32 with --plan={cfg.parallel.plan}, whose peaks are measured in that")
    one = "rank" if name == "cpu" else "card"
    c = vlm.config
    work = work_of(cfg, stage, c.image_tokens, words, asked)
    switches = cfg.algorithm
    twin = stage == "rl" and switches.kl_coef and (switches.ref_sync or not c.lora)
    total = sum(p.numel() for p in vlm.parameters())
    kind = "prompt" if work.group else "record"
    asked_of_a_card = f"{_counted(work.prompts, kind)} of {work.tokens} tokens ({words} of them text, assumed)"
    if work.group:
        asked_of_a_card += f", {_counted(work.group, 'completion')} of {work.new} tokens each"
    cards = {ranks: card_of(name, ranks) for ranks in rows_of(name, asked)}
    size = f"{total / 1e9:.2f} G" if total >= 1e9 else f"{total / 1e6:.1f} M"
    lines = [f"{stage}, {size} parameters, a {one}: {asked_of_a_card}, micro-batches of {work.micro}"]
    if name == "cpu":
        lines += [assumptions_of_cpu(ranks, card) for ranks, card in cards.items()]
    else:
        lines.append(assumptions(name, cards[asked]))
    unit = "MiB" if name == "cpu" else "GiB"
    lines.append(f"{one + 's':>7} {'--shard':>7} {unit:>7}  {'s a step':>8} {'tokens/s':>9}  by part")
    for ranks, card in cards.items():
        for shard in ("none", "full", "hybrid"):
            if ranks == 1 and shard != "none" or shard == "hybrid" and ranks <= card.of_a_node:
                continue
            if shard != "none" and cfg.machine.dtype == "mixed":        # which is for whole weights
                continue
            device = torch.device("cpu" if name == "cpu" else "cuda")
            lines.append(row(vlm, work, shard, ranks, card, cfg.optim, twin, device))
    return "\n".join(lines)


def rows_of(name, asked):
    """Numbers of cards in the table."""
    return sorted({1, asked} if name == "cpu" else {*ROWS, asked})


def _counted(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def assumptions(name, card):
    """What the modelled seconds on GPUs rest on, as a line."""
    share = card.shares
    return (f"modelled from assumed peaks x shares of {name}: {card.flops / 1e12:.0f} TFLOP/s x {share['matmul']}; "
            f"{card.memory / 1e9:.0f} GB at {card.bandwidth / 1e12:.2f} TB/s x {share['bandwidth']}; wires of "
            f"{card.inside / 1e9:.0f} GB/s in a node of {card.of_a_node}, {card.outside / 1e9:.0f} GB/s beyond x "
            f"{share['exchange']}, {share['hidden']:.0%} of what goes beside the computation hidden")


def assumptions_of_cpu(ranks, card):
    """The same of ranks on this machine's CPU."""
    share = card.shares
    exchange = ""
    if ranks > 1:
        exchange = (f"; gloo gathers {card.inside / 1e9:.2f} GB/s and sums {card.sums / 1e9:.2f} GB/s, nothing of it "
                    "hidden")
    return (f"modelled from measured peaks x assumed shares of a CPU, {_counted(ranks, 'rank')}, "
            f"{_counted(threads_of(ranks), 'thread')} each: {card.flops / 1e9:.0f} GFLOP/s in float32 x "
            f"{share['matmul']}, of few rows {share['few']}; {card.memory / 1e9:.1f} GB at "
            f"{card.bandwidth / 1e9:.1f} GB/s x {share['bandwidth']}, over which what autograd keeps goes "
            f"{share['traffic']:.0f} times; {1e6 * card.operation:.1f} us an "
            f"operation x {share['calls']:.0f}{exchange}")


def row(vlm, work, shard, ranks, card, optim, twin, device):
    """A line of the table."""
    planned = memory_of(vlm, work, shard, ranks, card.of_a_node, optim, twin, device)
    if shard == "none" and sum(planned.values()) <= memory.ROOMY * card.memory:    # with room, a heap keeps its holes
        planned = memory_of(vlm, work, shard, ranks, card.of_a_node, optim, twin, device, gives_back=False)
    needed = sum(planned.values())
    seconds = seconds_of(vlm, work, shard, ranks, card)
    whole = sum(seconds.values())
    tokens = ranks * work.prompts * (work.group * work.new or work.tokens)
    fits = "" if needed <= card.memory else f"  does not fit {card.memory / GIB:.0f} GiB"
    unit = MIB if device.type == "cpu" else GIB
    digits = 3 if device.type == "cpu" else 2
    parts = [f"{part} {count / unit:.1f}" for part, count in planned.items() if count]
    times = [f"{part} {value:.{digits}f} s" for part, value in seconds.items() if round(value, digits)]
    return (f"{ranks:>7} {shard:>7} {needed / unit:>7.1f}  {whole:>8.{digits}f} {tokens / whole:>9.0f}  "
            f"{', '.join(parts)}; {', '.join(times)}{fits}")
