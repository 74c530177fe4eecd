"""What reinforcement learning keeps beside the policy: a reference, a critic, the coefficient of the KL penalty.

One module, so that a checkpoint of a stage under way holds all of it.
"""
import math

import torch
from torch import nn

CRITICS = ("shared", "detached", "separate")


class Critic(nn.Module):
    """V of the states of a decoder: a linear head on its hidden states, zero at first.

    shared: the head's gradient reaches the policy's decoder; detached: it does not; separate: a decoder of its own.
    With `normalise` the head speaks in units of the returns seen so far, and is rescaled whenever those units change,
    so that its values stay what they were (PopArt, arXiv 1602.07714, section 2.2).
    """

    def __init__(self, policy, kind, width, normalise=False, momentum=0.9):
        super().__init__()
        if kind not in CRITICS:
            raise ValueError(f"critic {kind!r} must be one of {', '.join(CRITICS)}")
        self.kind, self.normalise, self.momentum = kind, normalise, momentum
        self.trunk = policy.twin() if kind == "separate" else None
        like = next(policy.parameters())
        exact = dict(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.head = nn.Linear(width, 1, **exact)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros((), **exact))
        self.register_buffer("scale", torch.ones((), **exact))
        self.register_buffer("square", torch.ones((), **exact))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, batch, completions, hidden):
        """hidden (P, G, C + 1, D) of the policy -> values (P, G, C + 1), in reward units, at least fp32."""
        if self.kind == "separate":
            hidden = self.trunk.states(batch, completions)
        elif self.kind == "detached":
            hidden = hidden.detach()
        return self.head(hidden.to(self.head.weight.dtype))[..., 0] * self.scale + self.mean

    @torch.no_grad()
    def see(self, returns):
        """Takes returns (M,) into the running mean and deviation."""
        if not self.normalise or len(returns) < 2:
            return
        keep = self.momentum if self.seen else 0.0
        mean = keep * self.mean + (1 - keep) * returns.mean()
        self.square.copy_(keep * self.square + (1 - keep) * returns.square().mean())
        scale = (self.square - mean.square()).clamp(min=1e-8).sqrt()
        self.head.bias.copy_((self.scale * self.head.bias + self.mean - mean) / scale)
        self.head.weight.mul_(self.scale / scale)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.seen += 1


class Learner(nn.Module):
    """policy; reference, a frozen copy of it, or None; critic, or None; kl_coef (), of the penalty, adapted or not;
    samples (), completions drawn so far. moves: the reference will be synced with the policy."""

    def __init__(self, policy, kl_coef=0.0, critic=None, moves=False):
        super().__init__()
        self.policy, self.critic = policy, critic
        # A policy with adapters is its own reference without them, unless that has to follow it.
        own = policy.base() if kl_coef and not moves else None
        self.reference = own or policy.twin().requires_grad_(False) if kl_coef else None
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef), dtype=torch.float64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def after(self, step, line, cfg):
        """What changes between rollouts; line: the metrics of this one.

        kl_coef follows the KL that was measured towards --kl-target (arXiv 1909.08593, section 2.2), in nats a token;
        the reference becomes the policy every --ref-sync rollouts (TR-DPO, arXiv 2404.09656).
        """
        if cfg.kl_target and math.isfinite(line.get("kl_ref", math.nan)):
            self.kl_coef.mul_(1 + 0.1 * max(-0.2, min(0.2, line["kl_ref"] / cfg.kl_target - 1)))
        if cfg.ref_sync and self.reference is not None and (step + 1) % cfg.ref_sync == 0:
            self.reference.load_state_dict(self.policy.state_dict())

    def rates(self, lr, cfg):
        """What changes in a run and is logged."""
        return ({} if self.critic is None else {"lr_critic": lr * cfg.value_lr}) | (
            {} if self.reference is None else {"kl_coef": self.kl_coef.item()})


def make_learner(policy, width, cfg):
    """policy, of decoder width `width`, with the reference and the critic that the switches ask for."""
    critic = Critic(policy, cfg.critic, width, cfg.return_norm) if cfg.baseline == "critic" else None
    return Learner(policy, cfg.kl_coef, critic, bool(cfg.ref_sync))


class Guard:
    """Losses and gradients that are not finite: the step is skipped, its data saved, and after `limit` in a row the run
    stops. save(path, dict): writes a checkpoint file."""

    def __init__(self, folder, stage, limit, save):
        self.folder, self.stage, self.limit, self.save, self.count, self.files = folder, stage, limit, save, 0, 0

    def good(self):
        self.count = 0

    def bad(self, experience, loss, norms):
        """Raises ValueError at the limit."""
        self.count += 1
        self.files += 1
        path = self.folder / f"bad-{self.stage}-{self.files}.pt"
        tensors = {name: value for name, value in vars(experience).items() if name != "batch"}
        self.save(path, dict(stage=self.stage, loss=loss, norms=norms, batch=vars(experience.batch), **tensors))
        what = f"loss {loss:g}, gradient norm {norms['grad_norm']:g}" if norms else "advantages that are not finite"
        said = f"{what}: the step is skipped, its batch is in {path}"
        if self.count >= self.limit:
            raise ValueError(f"{said}; {self.count} in a row, training diverged. The last checkpoint is intact; start "
                             "again from one with a lower rate")
        print(f"  {self.stage}: {said}", flush=True)
