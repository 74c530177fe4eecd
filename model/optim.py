"""What moves the weights: AdamW, warm-up and cosine, clipping."""
import hashlib
import math

import torch


def seed_of(seed, *names):
    """One seed for each purpose of a run, the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:6], "little")


def learning_rate(step, steps, peak, warmup, final):
    """Linear warm-up over the share `warmup` of the steps, then cosine from `peak` to `final` of it."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(module, beta2, weight_decay):
    """AdamW over what trains."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)


def optimizer_step(module, optimizer, lr, grad_clip):
    """Clip to the global norm, step, clear; -> the norm before clipping. Raises ValueError when that is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip).item()
    if not math.isfinite(norm):
        raise ValueError(f"the gradient's norm is {norm} at learning rate {lr:.3g}: training diverged. The last "
                         "checkpoint is intact; start again from one with a lower rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def show_trained(stage, vlm):
    """Prints what of a vision-language model (or of CLIP) trains and what is frozen."""
    for title, module in vlm.named_children():
        if total := sum(p.numel() for p in module.parameters()):
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            word = "trains" if trained == total else "frozen" if not trained else "partly"
            print(f"  {stage:<16}{title:<16}{total / 1e6:9.3f} M parameters   {word}", flush=True)
