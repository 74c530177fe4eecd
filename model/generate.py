"""Batched sampling of G completions for each of P prompts, the prompt computed and kept once per group.

The verbs: `prefill` a batch, `extend` every row by given tokens (staged prompting appends text), `decode` until EOS or
the budget, `select` the rows to go on with.

Keys and values lie in one sequence for each prompt, (P, Hk, T + capacity G, K): the prompt's T slots, then G slots, one
a row, for every step. The G rows are G queries on that sequence, and a mask hides from each what the others wrote. So a
step reads every key once, the prompt's too, in one plain attention call; that each query also meets keys it may not
look at costs less than handling the two parts apart. A row that sits out leaves a hole, which nothing attends to.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange

from kernels import fp32_logits, sample
from model.flops import Meter


@dataclass
class Completions:
    """What was sampled. ids, mask, logp (P, G, C); mask True up to and including EOS.

    logp: of the chosen token under the full softmax(logits / temperature), as the update computes it; banned tokens
    and nothing else separate it from the distribution sampled from. Greedy rows report temperature 1.
    """
    ids: torch.Tensor
    mask: torch.Tensor
    logp: torch.Tensor


class Sampler:
    """State of a sampling run: caches, positions and the last hidden state (P, G, D) of every row."""

    def __init__(self, vlm, meter=None):
        self.vlm, self.llm = vlm, vlm.llm
        self.meter = Meter() if meter is None else meter        # of matmul FLOPs, encoder included

    @torch.no_grad()
    def prefill(self, batch, group, capacity):
        """Runs the prompts once; `capacity`: completion tokens a row may take in all."""
        P, T = batch.ids.shape
        c, device = self.llm.config, batch.ids.device
        self.llm.check_length(T + capacity)
        if not len(batch.features):
            self.meter.encode(self.vlm, len(batch.pixels))
        x = self.vlm.embed(batch)
        self.meter.prompt(self.vlm, batch)
        self.rope = self.llm.rope(torch.arange(T + capacity, device=device), x.dtype)      # (1, T + capacity, K) each
        rope = [table[:, :T] for table in self.rope]
        room = x.new_zeros(P, c.kv_heads, capacity * group, c.head_width)
        self.cache = []
        for layer in self.llm.layers:
            x, k, v = layer.prompt(x, rope)
            self.cache.append((torch.cat([k, room], dim=2), torch.cat([v, room], dim=2)))
        last = self.llm.norm(x)[torch.arange(P, device=device), batch.length - 1]
        self.state = last[:, None].expand(-1, group, -1)
        self.position = batch.length[:, None].repeat(1, group)
        self.taken = torch.zeros(P, T + capacity * group, dtype=torch.bool, device=device)     # slots that hold a token
        self.taken[:, :T] = torch.arange(T, device=device) < batch.length[:, None]
        self.prompt_slots, self.capacity, self.used = T, capacity, 0
        return self

    def _mask(self, n):
        """Additive (P, 1, n G, S): what the queries of the last n steps see of the S slots used so far."""
        P, G = self.position.shape
        slot = torch.arange(self.prompt_slots + self.used * G, device=self.taken.device) - self.prompt_slots
        step = torch.arange(self.used - n, self.used, device=slot.device)
        prompt, mine = slot < 0, slot % G == torch.arange(G, device=slot.device)[:, None]
        past = slot // G <= step[:, None, None]
        sees = self.taken[:, None, None, :len(slot)] & (prompt | mine) & past                  # (P, n, G, S)
        mask = torch.zeros(sees.shape, dtype=self.state.dtype, device=slot.device).masked_fill_(~sees, float("-inf"))
        return rearrange(mask, "p n g s -> p 1 (n g) s")

    @torch.no_grad()
    def extend(self, ids, alive=None):
        """Appends tokens ids (P, G, n) to every row; rows with alive (P, G) False get a hole instead."""
        P, G, n = ids.shape
        if self.used + n > self.capacity:
            raise ValueError(f"{n} tokens do not fit: {self.used} of {self.capacity} slots are taken")
        alive = torch.ones_like(ids[..., 0], dtype=torch.bool) if alive is None else alive
        start = self.prompt_slots + self.used * G
        self.used += n
        end = start + n * G
        self.taken[:, start:end] = alive.repeat(1, n)
        # Tokens in the order of their slots: step by step, the rows side by side.
        y = self.llm.embed_tokens(rearrange(ids, "p g n -> p (n g)"))
        position = self.position[:, None] + torch.arange(n, device=ids.device)[:, None]
        rope = [table[:, position.flatten(1)].transpose(0, 1) for table in self.rope]          # (P, 1, n G, K)
        # A hole's own query must see something, or its softmax is NaN; the prompt is always visible, so it does.
        heads_per_key = self.llm.config.heads // self.llm.config.kv_heads
        mask = self._mask(n).repeat(1, 1, heads_per_key, 1)
        for layer, (keys, values) in zip(self.llm.layers, self.cache):
            q, k, v = layer.before(y, rope)
            keys[:, :, start:end], values[:, :, start:end] = k, v
            # Query heads that share a key head become more queries of it, so that grouped keys are not repeated.
            q = rearrange(q, "p (h r) l k -> p h (r l) k", r=heads_per_key)
            attended = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            y = layer.after(y, rearrange(attended, "p h (r l) k -> p (h r) l k", r=heads_per_key))
        self.state = torch.where(alive[..., None], self.llm.norm(y[:, -G:]), self.state)
        self.position = self.position + n * alive
        self.meter.cached(self.llm, ids.numel(), end)
        return self

    def select(self, prompts, rows):
        """Keeps rows (P', G') of the prompts (P',); an index may repeat. Both are int64 tensors."""
        T, G = self.prompt_slots, self.position.shape[1]

        def chosen(slots):
            """(P, slots, ..) -> (P', slots', ..)"""
            own = slots[prompts, T:].unflatten(1, (self.capacity, G))
            index = rows[:, None].view(len(rows), 1, -1, *[1] * (slots.ndim - 2))
            return torch.cat([slots[prompts, :T], own.take_along_dim(index, dim=2).flatten(1, 2)], dim=1)

        self.cache = [tuple(chosen(kv.transpose(1, 2)).transpose(1, 2) for kv in layer) for layer in self.cache]
        self.taken = chosen(self.taken)
        at = (prompts[:, None], rows)
        self.position, self.state = self.position[at], self.state[at]
        return self

    @torch.no_grad()
    def decode(self, max_new, eos_id, temperature=1.0, banned=(), generator=None, min_new=0, pad_id=0,
               drop=True):
        """Samples until EOS or `max_new` tokens. temperature 0 is greedy; no EOS before `min_new` tokens.

        drop: rows that have ended leave the batch from time to time, so that the rest go faster; to `extend` all rows
        afterwards, keep them. A row's cache then holds all of its tokens but the last.
        """
        P, G = self.position.shape
        device = self.position.device
        ids = torch.full((P * G, max_new), pad_id, dtype=torch.long, device=device)
        mask = torch.zeros(P * G, max_new, dtype=torch.bool, device=device)
        logp = torch.zeros(P * G, max_new, dtype=torch.promote_types(self.state.dtype, torch.float32), device=device)
        slot = torch.arange(P * G, device=device).view(P, G)      # where each live row's output goes
        alive = torch.ones(P, G, dtype=torch.bool, device=device)
        never = torch.zeros(self.llm.config.vocab, dtype=torch.bool, device=device)
        never[list(banned)] = True
        not_yet = never.index_fill(0, torch.tensor([eos_id], device=device), True)
        for t in range(max_new):
            logits = fp32_logits(self.state, self.llm.head)
            token, chosen, _ = sample(logits, generator, temperature, banned=not_yet if t < min_new else never)
            self.meter.head(self.llm, alive.numel())
            token = torch.where(alive, token, pad_id)
            at = slot[alive]
            ids[at, t], mask[at, t], logp[at, t] = token[alive], True, chosen[alive]
            alive = alive & (token != eos_id)
            if t + 1 == max_new or not alive.any():
                break
            if drop and t % 4 == 3:
                keep = _worth_dropping(alive)
                if keep is not None:
                    self.select(*keep)
                    at = (keep[0][:, None], keep[1])
                    slot, alive, token = slot[at], alive[at], token[at]
            self.extend(token[..., None], alive)
        C = t + 1
        return Completions(*(out[:, :C].view(P, G, C) for out in (ids, mask, logp)))


def _worth_dropping(alive):
    """(prompts, rows) that keep every live row in a full grid, or None while that saves less than a quarter.

    alive (P, G). Live rows move to the front of their prompt; the grid narrows to the longest of them, and prompts
    without a live row go. Filler rows are ended ones.
    """
    count = alive.sum(1)
    width, height = int(count.max()), int((count > 0).sum())
    if width * height > 0.75 * alive.numel():
        return None
    prompts = (count > 0).nonzero()[:, 0]
    rows = (~alive).to(torch.uint8).argsort(dim=1, stable=True)[prompts, :width]
    return prompts, rows


def generate(vlm, batch, group, max_new, eos_id, **options):
    """prefill + decode. Returns (Completions, FLOPs executed)."""
    sampler = Sampler(vlm).prefill(batch, group, max_new)
    return sampler.decode(max_new, eos_id, **options), sampler.meter.total
