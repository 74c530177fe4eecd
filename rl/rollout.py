"""Sample completions, read them, reward them."""
from rl.rewards import score
from rl.types import Rollout


def read(completions, tokenizer):
    """Completions with ids, mask (P, G, C) -> P lists of G texts."""
    return [[tokenizer.decode(row[keep].tolist()) for row, keep in zip(ids, mask)]
            for ids, mask in zip(completions.ids.cpu(), completions.mask.cpu())]


def collect(completions, samples, tokenizer, weights, gated):
    """Sampled completions of P samples -> Rollout with texts and rewards, on the completions' device."""
    texts = read(completions, tokenizer)
    reward, parts = score(samples, texts, weights, gated)
    device = completions.ids.device
    return Rollout(completions.ids, completions.mask, completions.logp, texts,
                   {name: part.to(device) for name, part in parts.items()}, reward.to(device))
