"""Batched sampling of G completions for each of P prompts, the prompt computed and kept once per group.

The verbs: `prefill` a batch, `extend` every row by given tokens (staged prompting appends text), `decode` until EOS or
the budget, `select` the rows to go on with. Keys and values of the prompt are (P, Hk, T, K), read once for all G rows;
those of the completions (P, G, Hk, C, K). Rows that have ended may be extended again: `valid` marks the slots of the
cache that belong to a row, so a row's unused slots are holes that nothing attends to.
"""
from dataclasses import dataclass

import torch
from einops import rearrange

from kernels import fp32_logits
from model import flops


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

    def __init__(self, vlm):
        self.vlm, self.llm = vlm, vlm.llm
        self.flops = 0              # matmul FLOPs executed so far, encoder included

    @torch.no_grad()
    def prefill(self, batch, group, capacity):
        """Runs the prompts once; `capacity`: completion tokens a row may take in all."""
        P, T = batch.ids.shape
        c, device = self.llm.config, batch.ids.device
        if not len(batch.features):
            self.flops += flops.encode(self.vlm, len(batch.pixels))
        x = self.vlm.embed(batch)
        self.flops += flops.prompt(self.vlm, batch)
        rope = self.llm.rope(torch.arange(T, device=device), x.dtype)
        self.prefix = []
        for layer in self.llm.layers:
            attended, k, v = layer.self_attn.prompt(layer.input_layernorm(x), rope)
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            self.prefix.append((k, v))
        last = self.llm.norm(x)[torch.arange(P, device=device), batch.length - 1]
        self.state = last[:, None].expand(-1, group, -1)
        self.position = batch.length[:, None].repeat(1, group)
        sees = torch.arange(T, device=device) < batch.length[:, None]
        self.prompt_mask = torch.zeros(P, 1, 1, T, dtype=x.dtype, device=device)
        self.prompt_mask.masked_fill_(~sees[:, None, None], float("-inf"))
        shape = (P, group, c.kv_heads, capacity, c.head_width)
        self.own = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in self.llm.layers]
        self.valid = torch.zeros(P, group, capacity, dtype=torch.bool, device=device)
        self.used = 0
        return self

    @torch.no_grad()
    def extend(self, ids, alive=None):
        """Appends tokens ids (P, G, n) to every row; rows with alive (P, G) False get a hole instead."""
        n = ids.shape[-1]
        if self.used + n > self.valid.shape[-1]:
            raise ValueError(f"{n} tokens do not fit: {self.used} of {self.valid.shape[-1]} slots are taken")
        new = slice(self.used, self.used + n)
        alive = torch.ones_like(ids[..., 0], dtype=torch.bool) if alive is None else alive
        self.valid[..., new] = alive[..., None]
        self.used += n
        steps = torch.arange(n, device=ids.device)
        y = self.llm.embed_tokens(ids)
        rope = self.llm.rope(self.position[..., None] + steps, y.dtype)
        sees = self.valid[:, :, None, :self.used].expand(-1, -1, n, -1)
        if n > 1:
            order = torch.arange(self.used, device=ids.device)
            sees = sees & (order <= (self.used - n + steps)[:, None])
        own_mask = torch.zeros(sees.shape, dtype=y.dtype, device=y.device).masked_fill_(~sees, float("-inf"))
        # A hole's own query must see something, or its softmax is NaN; the prompt is always visible, so it does.
        for layer, (kx, vx), (ky, vy) in zip(self.llm.layers, self.prefix, self.own):
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(y), rope)
            ky[..., new, :], vy[..., new, :] = k, v
            attended = attend_in_two_parts(q, kx, vx, ky[..., :self.used, :], vy[..., :self.used, :],
                                           self.prompt_mask, own_mask)
            y = y + layer.self_attn.out(attended)
            y = y + layer.mlp(layer.post_attention_layernorm(y))
        self.state = torch.where(alive[..., None], self.llm.norm(y)[..., -1, :], self.state)
        self.position = self.position + n * alive
        self.flops += flops.cached(self.llm, ids.numel(), n, self.prompt_mask.shape[-1], self.used)
        return self

    def select(self, prompts, rows):
        """Keeps rows (P', G') of the prompts (P',); an index may repeat. Both are int64 tensors."""
        at = (prompts[:, None], rows)
        self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
        self.own = [(k[at], v[at]) for k, v in self.own]
        self.prompt_mask, self.valid = self.prompt_mask[prompts], self.valid[at]
        self.position, self.state = self.position[at], self.state[at]
        return self

    @torch.no_grad()
    def decode(self, max_new, eos_id, temperature=1.0, banned=(), generator=None, min_new=0, pad_id=0):
        """Samples until EOS or `max_new` tokens. temperature 0 is greedy; no EOS before `min_new` tokens.

        Rows that have ended are dropped from the batch from time to time; afterwards the sampler holds only the rows
        that were still alive at the last drop, so what follows a decode must start from `select` or a new prefill.
        """
        P, G = self.position.shape
        device = self.position.device
        ids = torch.full((P * G, max_new), pad_id, dtype=torch.long, device=device)
        mask = torch.zeros(P * G, max_new, dtype=torch.bool, device=device)
        logp = torch.zeros(P * G, max_new, dtype=torch.promote_types(self.state.dtype, torch.float32), device=device)
        slot = torch.arange(P * G, device=device).view(P, G)      # where each live row's output goes
        alive = torch.ones(P, G, dtype=torch.bool, device=device)
        for t in range(max_new):
            forbidden = [*banned, eos_id] if t < min_new else list(banned)
            token, chosen = sample(fp32_logits(self.state, self.llm.head), temperature, forbidden, generator)
            self.flops += flops.head(self.llm, alive.numel())
            token = torch.where(alive, token, pad_id)
            at = slot[alive]
            ids[at, t], mask[at, t], logp[at, t] = token[alive], True, chosen[alive]
            alive = alive & (token != eos_id)
            if t + 1 == max_new or not alive.any():
                break
            if t % 4 == 3:
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


def attend_in_two_parts(q, kx, vx, ky, vy, prompt_mask, own_mask):
    """Softmax attention over prompt and own tokens, the prompt's keys read once for the whole group.

    q (P, G, H, n, K); kx, vx (P, Hk, T, K); ky, vy (P, G, Hk, L, K); prompt_mask (P, 1, 1, T), own_mask (P, G, n, L),
    additive. Returns (P, G, H, n, K).
    """
    P, G, H, n, K = q.shape
    Hk, T = kx.shape[1:3]
    q = q * K ** -0.5
    shared = rearrange(q, "p g (h r) n k -> p h (g r n) k", h=Hk)
    single = rearrange(q, "p g (h r) n k -> p g h (r n) k", h=Hk)
    on_prompt = rearrange(shared @ kx.mT + prompt_mask, "p h (g x) t -> p g h x t", g=G)
    on_own = single @ ky.mT
    on_own = (on_own.view(P, G, Hk, H // Hk, n, -1) + own_mask[:, :, None, None]).flatten(3, 4)
    weight = torch.cat([on_prompt, on_own], dim=-1).softmax(-1)
    from_prompt = rearrange(weight[..., :T], "p g h x t -> p h (g x) t") @ vx
    out = rearrange(from_prompt, "p h (g x) k -> p g h x k", g=G) + weight[..., T:] @ vy
    return out.reshape(P, G, H, n, K)


def sample(logits, temperature, banned=(), generator=None):
    """logits (..., V) -> token (...) and its log-prob (...) under the full softmax(logits / temperature).

    Gumbel-max: argmax of logp + g with g ~ Gumbel is distributed as p, without a host sync. temperature 0: argmax.
    """
    logp = (logits / temperature if temperature else logits).log_softmax(-1)
    score = logp.clone()
    score[..., list(banned)] = float("-inf")
    if temperature:
        # From uniforms, because on a CPU torch draws these ten times faster than exponentials.
        uniform = torch.empty_like(logp).uniform_(generator=generator).clamp_min_(1e-10)
        score -= uniform.log_().neg_().log_()
    token = score.argmax(-1)
    return token, logp.gather(-1, token[..., None])[..., 0]


def generate(vlm, batch, group, max_new, eos_id, **options):
    """prefill + decode. Returns (Completions, FLOPs executed)."""
    sampler = Sampler(vlm).prefill(batch, group, max_new)
    return sampler.decode(max_new, eos_id, **options), sampler.flops
