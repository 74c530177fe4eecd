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


def make_optimizer(module, beta2, weight_decay, other=None, other_lr=1.0):
    """AdamW over what trains; the parameters of `other`, a part of it, at `other_lr` times the learning rate."""
    apart = {id(p) for p in other.parameters()} if other is not None else set()
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if id(p) not in apart], scale=1.0)]
    if other is not None:
        groups.append(dict(params=[p for p in trained if id(p) in apart], scale=other_lr))
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)


def optimizer_step(optimizer, lr, grad_clip, drop=False):
    """Clip each group to `grad_clip`, step, clear; -> the groups' norms before clipping.

    Without a step, only cleared, to `drop` the gradient, or when a norm is not finite.
    """
    norms = [torch.nn.utils.clip_grad_norm_(group["params"], grad_clip).item() for group in optimizer.param_groups]
    if not drop and all(map(math.isfinite, norms)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def stepper(optimizer, lr, grad_clip, **parts):
    """-> take_step(drop=False): optimizer_step; returns the gradient's L2 norms before it, "grad_norm" and, of a critic
    with a group of its own, "grad_norm_critic", and "grad_norm_NAME" of the modules `parts`."""
    def take_step(drop=False):
        norms = {}
        for name, module in parts.items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norms[f"grad_norm_{name}"] = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
        whole = optimizer_step(optimizer, lr, grad_clip, drop)
        return dict(zip(("grad_norm", "grad_norm_critic"), whole)) | norms

    return take_step


def diverged(norm, lr):
    """What is said of a gradient that is not finite."""
    return (f"the gradient's norm is {norm} at learning rate {lr:.3g}: training diverged. The last checkpoint is "
            "intact; start again from one with a lower rate")


def show_trained(stage, vlm):
    """Prints what of a vision-language model (or of CLIP) trains and what is frozen."""
    for title, module in vlm.named_children():
        if total := sum(p.numel() for p in module.parameters()):
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            word = "trains" if trained == total else "frozen" if not trained else "partly"
            print(f"  {stage:<16}{title:<16}{total / 1e6:9.3f} M parameters   {word}", flush=True)
