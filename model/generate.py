"""Batched sampling of G completions for each of P prompts, the prompt computed and kept once per
group.

The verbs: `prefill` a batch, `extend` every row by given tokens (staged prompting appends text),
`decode` until EOS or the budget, `select` the rows to go on with.

Keys and values lie in one sequence for each prompt, (P, Hk, T + capacity G, K): the prompt's T
slots, then for every step G slots, one a row. The G rows are G queries on that sequence, and a mask
hides from each what the others wrote. So a step reads every key once, the prompt's too, in one
plain attention call; that each query also meets keys it may not look at costs less than handling
the two parts apart. On a GPU a step of one token takes kernels.decode_attention instead, without a
mask, where no query meets another row's keys. A row that sits out a step leaves a hole, a slot that
nothing attends to.

Shapes: those of model/llama.py; S slots in use, n tokens appended at once.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange

from kernels import decode_attention, fp32_logits, sample
from kernels.backend import use_triton
from model import machine, memory
from model.flops import Meter


# Tokens between two questions whether all rows have ended, 1 on other devices: a GPU would have to wait
# at every token for the answer, longer than the tokens take that it samples in vain, fewer than these.
PATIENCE = {"cuda": 32}

# Queries and keys of a key head up to which plain products attend faster on a CPU than torch's flash attention, which
# is made for many queries: 8 queries 1.6 times at 130 keys, 24 queries 1.1 times; both level at 1,000.
FEW_QUERIES = 32
FEW_KEYS = 1000


@dataclass
class Completions:
    """What was sampled. ids, mask, logp (P, G, C); mask True up to and including EOS.

    logp: of the chosen token under the full softmax(logits / temperature), as the update computes
    it. The distribution sampled from differs from it by banned tokens, top-k and top-p only. Greedy
    rows report temperature 1.
    """
    ids: torch.Tensor
    mask: torch.Tensor
    logp: torch.Tensor

    @staticmethod
    def join(parts, pad_id):
        """Those of some prompts after those of others, as one."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.ids.shape[-1] for part in parts)
        joined = []
        for name, filling in (("ids", pad_id), ("mask", False), ("logp", 0.0)):
            tensors = [getattr(part, name) for part in parts]
            joined.append(torch.cat([F.pad(t, (0, longest - t.shape[-1]), value=filling) for t in tensors]))
        return Completions(*joined)


def draw_noise(rows, max_new, generator, device):
    """The numbers (*rows, max_new) that choose the tokens of a rollout, all at once: what a row
    samples depends on no other row."""
    return torch.rand(*rows, max_new, dtype=torch.float64, device=device, generator=generator)


def prompts_at_a_time(llm, batch, group, max_new, rows=0):
    """How many prompts of a batch are sampled at once: for so many `rows`, completions; for 0 all,
    or those whose keys and values fit into half of the memory that is free."""
    if rows:
        return max(1, rows // group)
    P, T = batch.ids.shape
    room = machine.room(batch.ids.device)
    if room is None:
        return P
    prompt = (T + group * max_new) * memory.slot(llm)
    return max(1, min(P, room // 2 // prompt))


class Sampler:
    """State of a sampling run: caches, positions and the last hidden state (P, G, D) of every row.

    meter: counts the matmul FLOPs, those of the image tower included.
    """

    def __init__(self, vlm, meter=None):
        self.vlm = vlm
        self.llm = vlm.llm
        self.meter = Meter() if meter is None else meter

    def noise(self, rows, max_new, generator):
        """`draw_noise` on the model's device."""
        return draw_noise(rows, max_new, generator, self.llm.head.device)

    @torch.no_grad()
    def prefill(self, batch, group, capacity):
        """Runs the prompts once; `capacity`: how many completion tokens a row may take in all."""
        P, T = batch.ids.shape
        c = self.llm.config
        device = batch.ids.device
        self.llm.check_length(T + capacity)
        self.prompt_slots = T
        self.capacity = capacity
        self.used = 0                   # steps of the capacity that are taken, G slots each
        # 1. The prompts, through every block; their keys and values open the cache.
        if not len(batch.features):
            self.meter.encode(self.vlm, len(batch.pixels))
        x = self.vlm.embed(batch)                                               # (P, T, D)
        self.meter.prompt(self.vlm, batch)
        self.rope = self.llm.rope(torch.arange(T + capacity, device=device), x.dtype)
        rope = [table[:T] for table in self.rope]                               # (T, 1, K)
        room = x.new_zeros(P, c.kv_heads, capacity * group, c.head_width)
        self.cache = []
        for layer in self.llm.layers:
            x, k, v = layer.prompt(x, rope)
            self.cache.append((torch.cat([k, room], dim=2), torch.cat([v, room], dim=2)))
        # 2. Every row of a group starts from its prompt's last token.
        last = self.llm.norm(x)[torch.arange(P, device=device), batch.length - 1]
        self.state = last[:, None].expand(-1, group, -1)                        # (P, G, D)
        self.position = batch.length[:, None].repeat(1, group)                  # (P, G), of the next
        # 3. Which slots hold a token.
        self.taken = torch.zeros(P, T + capacity * group, dtype=torch.bool, device=device)
        self.taken[:, :T] = torch.arange(T, device=device) < batch.length[:, None]
        return self

    def _mask(self, n):
        """Additive (P, 1, n G, S): what the queries of the last n steps see of the S slots used so
        far."""
        P, G = self.position.shape
        device = self.taken.device
        slot = torch.arange(self.prompt_slots + self.used * G, device=device) - self.prompt_slots
        row = torch.arange(G, device=device)[:, None]
        step = torch.arange(self.used - n, self.used, device=device)[:, None, None]
        is_prompt = slot < 0                                                    # (S,)
        is_own = slot % G == row                                                # (G, S)
        taken = self.taken[:, None, None, :len(slot)]                           # (P, 1, 1, S)
        sees = taken & (is_prompt | is_own)                                     # (P, 1, G, S)
        if n > 1:                       # a single step is the last one: all slots are its past
            sees = sees & (slot // G <= step)                                   # (P, n, G, S)
        mask = torch.zeros(sees.shape, dtype=self.state.dtype, device=device)
        mask.masked_fill_(~sees, float("-inf"))
        return rearrange(mask, "p n g s -> p 1 (n g) s")

    @torch.no_grad()
    def extend(self, ids, alive=None):
        """Appends tokens ids (P, G, n) to every row; where alive is False a row gets a hole instead.

        alive: (P, G) of whole rows, or (P, G, n) of tokens, so that rows may take texts of other
        lengths at once; the tokens of a row follow each other whatever holes lie between them.
        """
        P, G, n = ids.shape
        if self.used + n > self.capacity:
            raise ValueError(f"{n} tokens do not fit: {self.used} of {self.capacity} slots are "
                             "taken")
        if alive is None:
            alive = torch.ones_like(ids, dtype=torch.bool)
        if alive.ndim == 2:
            alive = alive[..., None].expand(-1, -1, n)
        start = self.prompt_slots + self.used * G
        end = start + n * G
        self.used += n
        self.taken[:, start:end] = rearrange(alive, "p g n -> p (n g)")
        # Tokens in the order of their slots: step by step, the rows side by side.
        y = self.llm.embed_tokens(rearrange(ids, "p g n -> p (n g)"))           # (P, n G, D)
        before = alive.cumsum(-1) - alive.long()                                # of this call's tokens
        position = rearrange(self.position[..., None] + before, "p g n -> p (n g)")
        rope = [table[position] for table in self.rope]                         # (P, n G, 1, K)
        # A hole's own query must see something, or its softmax is NaN: it sees the prompt.
        split = n == 1 and use_triton(y)
        heads_per_key = self.llm.config.heads // self.llm.config.kv_heads
        mask = None
        if not split:
            mask = self._mask(n)                                                # (P, 1, n G, S)
            if heads_per_key > 1:
                mask = mask.repeat(1, 1, heads_per_key, 1)                      # (P, 1, r n G, S)
        for layer, (keys, values) in zip(self.llm.layers, self.cache):
            q, k, v = layer.before(y, rope)
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            if split:
                attended = decode_attention(q, keys[:, :, :end], values[:, :, :end], self.taken[:, :end],
                                            self.prompt_slots)
            else:
                # Query heads that share a key head become more queries of it, so that grouped keys
                # are not repeated.
                q = rearrange(q, "p (h r) l k -> p h (r l) k", r=heads_per_key)
                attended = _attend(q, keys[:, :, :end], values[:, :, :end], mask)
                attended = rearrange(attended, "p h (r l) k -> p (h r) l k", r=heads_per_key)
            y = layer.after(y, attended)
        # The state after each row's last token; of a row of holes the one that it had.
        count = alive.sum(-1)                                                   # (P, G)
        place = torch.arange(1, n + 1, device=ids.device) * alive               # (P, G, n)
        last = (place.amax(-1) - 1).clamp(min=0)
        y = rearrange(y, "p (n g) d -> p g n d", g=G)
        last = last[..., None, None].expand(-1, -1, 1, y.shape[-1])
        state = self.llm.norm(y.gather(2, last)[:, :, 0])                       # (P, G, D)
        self.state = torch.where(count[..., None] > 0, state, self.state)
        self.position = self.position + count
        # Each query was multiplied with the slots of its group, or with its prompt's and its own.
        self.meter.cached(self.llm, ids.numel(), self.prompt_slots + self.used if split else end)
        return self

    def select(self, prompts, rows):
        """Keeps rows (P', G') of the prompts (P',); an index may repeat. Both are int64 tensors."""
        for number, layer in enumerate(self.cache):         # layer by layer: never are all held twice
            self.cache[number] = tuple(self._select_slots(slots.transpose(1, 2), prompts, rows).transpose(1, 2)
                                       for slots in layer)
        self.taken = self._select_slots(self.taken, prompts, rows)
        kept = (prompts[:, None], rows)
        self.position = self.position[kept]
        self.state = self.state[kept]
        return self

    def compact(self):
        """Moves the tokens of every row to the front of its slots, in their order: the holes of
        rows that sat out are free again, and only the longest row's tokens count as used."""
        T = self.prompt_slots
        P, G = self.position.shape
        written = self.taken[:, T:].unflatten(1, (self.capacity, G))        # (P, capacity, G)
        order = (~written).to(torch.uint8).argsort(dim=1, stable=True)
        for entries in self.cache:
            for slots in entries:
                slots = slots[:, :, T:].unflatten(2, (self.capacity, G))    # a view of the cache
                slots.copy_(slots.take_along_dim(order[:, None, ..., None], dim=2))
        self.taken[:, T:] = written.gather(1, order).flatten(1, 2)
        self.used = int(written.sum(1).max())
        return self

    def _select_slots(self, slots, prompts, rows):
        """(P, T + capacity G, ..) -> (P', T + capacity G', ..): the prompts' slots, then the
        rows'."""
        T = self.prompt_slots
        G = self.position.shape[1]
        written = slots[prompts, T:].unflatten(1, (self.capacity, G))       # (P', capacity, G, ..)
        index = rows.view(len(rows), 1, -1, *[1] * (slots.ndim - 2))
        written = written.take_along_dim(index, dim=2).flatten(1, 2)
        return torch.cat([slots[prompts, :T], written], dim=1)

    def complete(self, batch, group, max_new, eos_id, generator=None, rows=0, lap=lambda name: None,
                 place=None, **options):
        """prefill + decode, with decode's options -> Completions. Some prompts at a time where that
        asks for less memory: apart from rounding the tokens are the same.

        rows: completions at a time; 0: all, or as many as the memory that is free has room for.
        lap(name) is called after each "prefill" and "decode". place: (first, count) where these are
        the prompts from `first` on of so many, the others being sampled elsewhere: they draw what
        they would draw beside them.
        """
        P = len(batch.ids)
        first, count = place or (0, P)
        device = batch.ids.device
        noise = None
        if options.get("temperature", 1.0):
            noise = self.noise((count, group), max_new, generator)[first:first + P]
        at_a_time = prompts_at_a_time(self.llm, batch, group, max_new, rows)
        parts = []
        for index in torch.arange(P, device=device).split(at_a_time):
            self.prefill(batch if len(index) == P else batch.rows(index), group, max_new)
            lap("prefill")
            mine = None if noise is None else noise[index]
            parts.append(self.decode(max_new, eos_id, noise=mine, **options))
            lap("decode")
        self.cache = []                 # the memory is the update's, and free when the next rollout asks
        return Completions.join(parts, options.get("pad_id", 0))

    @torch.no_grad()
    def decode(self, max_new, eos_id, temperature=1.0, banned=(), generator=None, min_new=0,
               pad_id=0, drop=True, top_k=0, top_p=1.0, stop=None, alive=None, limit=None, noise=None):
        """Samples until EOS or `max_new` tokens -> Completions. temperature 0 is greedy; no EOS
        before `min_new` tokens; top_k, top_p as in kernels.sample.

        stop: (ids (R, t) of R rows so far) -> (R,) bool, rows that end here without an EOS; alive
        (P, G): rows that are to go on, all of them by default; the others get no token. limit
        (P, G): how many tokens each row may take at most, max_new by default. noise: what
        `draw_noise` gave for these rows; None: drawn here.

        drop: rows that have ended leave the batch from time to time, so that the rest go faster; to
        `extend` all rows afterwards, keep them. A row's cache then holds all of its tokens but the
        last.
        """
        P, G = self.position.shape
        device = self.position.device
        wide = torch.promote_types(self.state.dtype, torch.float32)
        ids = torch.full((P * G, max_new), pad_id, dtype=torch.long, device=device)
        mask = torch.zeros(P * G, max_new, dtype=torch.bool, device=device)
        logp = torch.zeros(P * G, max_new, dtype=wide, device=device)
        # The grid of rows may narrow; output_row says where in ids, mask and logp each of them goes
        # on.
        output_row = torch.arange(P * G, device=device).view(P, G)
        if alive is None:
            alive = torch.ones(P, G, dtype=torch.bool, device=device)
        never = torch.zeros(self.llm.config.vocab, dtype=torch.bool, device=device)
        never[list(banned)] = True
        if noise is None and temperature:
            noise = self.noise((P, G), max_new, generator)
        if noise is not None:
            noise = noise.flatten(0, 1)                                         # (P G, max_new)
        # A `stop` looks at every token anyway.
        patience = PATIENCE.get(device.type, 1) if stop is None else 1
        not_yet = never.clone()         # for the first min_new tokens
        not_yet[eos_id] = True
        for t in range(max_new):
            # 1. One token for every row, from its last state.
            logits = fp32_logits(self.state, self.llm.head)                     # (P, G, V)
            u = noise[output_row, t] if temperature else None
            token, chosen, _ = sample(logits, None, temperature, top_k, top_p,
                                      banned=not_yet if t < min_new else never, u=u)
            self.meter.head(self.llm, alive.numel())
            token = torch.where(alive, token, pad_id)
            # 2. Into the output, for rows that have not ended.
            ids[output_row, t] = token
            mask[output_row, t] = alive
            logp[output_row, t] = torch.where(alive, chosen, 0.0)
            alive = alive & (token != eos_id)
            if limit is not None:
                alive = alive & (t + 1 < limit.flatten()[output_row])
            if stop is not None and alive.any():
                going = alive
                alive = alive.clone()
                alive[going] = ~stop(ids[output_row[going], :t + 1]).to(device)
            asks = t % patience == patience - 1
            if t + 1 == max_new or (asks and not alive.any()):
                break
            # 3. From time to time, drop ended rows if that saves enough.
            if drop and asks and t % 4 == 3:
                keep = _worth_dropping(alive)
                if keep is not None:
                    prompts, rows = keep
                    self.select(prompts, rows)
                    kept = (prompts[:, None], rows)
                    output_row = output_row[kept]
                    alive = alive[kept]
                    token = token[kept]
            # 4. The token goes into the cache, and gives the next state.
            self.extend(token[..., None], alive)
        C = max(1, int(mask.any(0).sum()))      # less than t + 1 where the end was asked for late
        ids, mask, logp = (out[:, :C].view(P, G, C) for out in (ids, mask, logp))
        return Completions(ids, mask, logp)


def _attend(q, keys, values, mask):
    """q (P, Hk, L, K) on keys and values (P, Hk, S, K), mask (P, 1, L, S) added to the scores -> as q. Every query must
    see a key."""
    few = q.shape[2] <= FEW_QUERIES and keys.shape[2] <= FEW_KEYS
    if not few or q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    scores = torch.add(mask, q @ keys.transpose(-1, -2), alpha=q.shape[3] ** -0.5)
    return scores.softmax(-1) @ values


def _worth_dropping(alive):
    """alive (P, G) -> (prompts, rows) that keep every live row in a full grid, as `select` takes
    them; None while that saves less than a quarter.

    Live rows move to the front of their prompt; the grid narrows to as many as the fullest prompt
    has, and prompts without a live row go. Ended rows fill the gaps.
    """
    count = alive.sum(1)                                    # (P,)
    width = int(count.max())
    height = int((count > 0).sum())
    if width * height > 0.75 * alive.numel():
        return None
    prompts = (count > 0).nonzero()[:, 0]                   # (height,)
    live_first = (~alive).to(torch.uint8).argsort(dim=1, stable=True)
    rows = live_first[prompts, :width]                      # (height, width)
    return prompts, rows


def generate(vlm, batch, group, max_new, eos_id, **options):
    """prefill + decode, with decode's options. Returns (Completions, FLOPs executed)."""
    sampler = Sampler(vlm).prefill(batch, group, max_new)
    done = sampler.decode(max_new, eos_id, **options)
    return done, sampler.meter.total
