"""Where the decoder looks: attention of a completion's tokens to the tokens of the pictures, for study.

Attention tells where a head reads from, not what the answer depends on (arXiv 1902.10186): it is an overlay to look at,
no evidence by itself.
"""
import torch
from einops import repeat


@torch.no_grad()
def looked_at(vlm, batch, ids):
    """A batch of one prompt, and the token ids (C,) of a completion of it -> (C, N): how much of its attention the
    state that predicts each token spends on each of the prompt's N image tokens, mean over blocks and heads.

    The formula, with all weights at hand, one completion at a time: kernels keep none.
    """
    llm = vlm.llm
    T = int(batch.length[0])
    C = len(ids)
    repeats = llm.config.heads // llm.config.kv_heads
    is_image = (batch.ids[0, :T] == vlm.config.image_id).nonzero()[:, 0]             # (N,)
    x = torch.cat([vlm.embed(batch)[:, :T], llm.embed_tokens(ids[None])], dim=1)     # (1, L, D)
    L = T + C
    rope = llm.rope(torch.arange(L, device=x.device), x.dtype)
    later = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
    total = 0.0
    for layer in llm.layers:
        q, k, v = layer.before(x, rope)                                             # (1, H, L, K), (1, Hk, L, K)
        k = repeat(k, "b h s k -> b (h r) s k", r=repeats)
        v = repeat(v, "b h s k -> b (h r) s k", r=repeats)
        scores = (q @ k.transpose(-1, -2)).float() * llm.config.head_width ** -0.5
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)              # (1, H, L, L)
        total = total + weights[0, :, T - 1:L - 1].mean(0)[:, is_image]
        x = layer.after(x, weights.to(v.dtype) @ v)
    return total / len(llm.layers)
