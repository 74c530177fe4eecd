"""What reinforcement learning keeps beside the policy: a reference, a critic, the coefficient of the KL penalty.

One module, so that a checkpoint of a stage under way holds all of it.
"""
import math

import torch
from torch import nn

from model import sharding

CRITICS = ("shared", "detached", "separate")


class Critic(nn.Module):
    """V of the states of a decoder: a linear head on its hidden states, zero at first.

    shared: the head's gradient reaches the policy's decoder; detached: it does not; separate: a decoder of its own.
    With `normalise` the head speaks in units of the returns seen so far, and is rescaled whenever those units change,
    so that its values stay what they were (PopArt, arXiv 1602.07714, section 2.1).
    """

    def __init__(self, policy, kind, width, normalise=False, momentum=0.9):
        super().__init__()
        if kind not in CRITICS:
            raise ValueError(f"critic {kind!r} must be one of {', '.join(CRITICS)}")
        self.kind = kind
        self.normalise = normalise
        self.momentum = momentum
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
    """What a stage under way consists of, and its checkpoint holds.

    policy; reference, a frozen copy of it, a teacher in its place, or None; critic, or None; kl_coef (), of the
    penalty, adapted or not; samples (), completions drawn so far; bad_steps (), steps in a row that a Guard skipped.
    moves: the reference will be synced with the policy.
    """

    def __init__(self, policy, kl_coef=0.0, critic=None, moves=False, teacher=None):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.reference = None
        self.has_teacher = teacher is not None
        if self.has_teacher:
            self.reference = teacher.requires_grad_(False)
        elif kl_coef:
            self.reference = make_reference(policy, moves)
        self.shares_tower = not self.has_teacher or has_same_tower(policy, teacher)
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef), dtype=torch.float64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.long))
        self.register_buffer("bad_steps", torch.zeros((), dtype=torch.long))

    def shard(self, options):
        """Spreads policy, reference and a critic's decoder over the ranks, as model/parallel.py's options have it. A
        policy that is its own reference, or critic, is spread once."""
        sharding.shard(self.policy, options)
        if self.reference is not None and not hasattr(self.reference, "policy"):
            sharding.shard(self.reference, options, by_states=True)
        if self.critic is not None and self.critic.trunk is not None:
            sharding.shard(self.critic.trunk, options, by_states=True)

    def _load_from_state_dict(self, state, prefix, *rest):
        state.setdefault(f"{prefix}bad_steps", self.bad_steps)      # older checkpoints have none
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def after(self, step, line, switches):
        """What changes between rollouts; line: the metrics of this one.

        kl_coef follows the KL that was measured towards --kl-target (arXiv 1909.08593, section 2.2), in nats a token;
        the reference becomes the policy every --ref-sync rollouts (TR-DPO, arXiv 2404.09656).
        """
        sharding.rest(self)
        if switches.kl_target and math.isfinite(line.get("kl_ref", math.nan)):
            error = line["kl_ref"] / switches.kl_target - 1
            self.kl_coef.mul_(1 + 0.1 * max(-0.2, min(0.2, error)))
        if switches.ref_sync and self.reference is not None and (step + 1) % switches.ref_sync == 0:
            self.reference.load_state_dict(self.policy.state_dict())

    def rates(self, lr, switches):
        """What changes in a run and is logged."""
        rates = {}
        if self.critic is not None:
            rates["lr_critic"] = lr * switches.value_lr
        if self.reference is not None:
            rates["kl_coef"] = self.kl_coef.item()
        return rates


def make_reference(policy, moves):
    """A frozen copy of the policy. One with adapters is its own reference without them, unless that has to follow
    it."""
    base = None if moves else policy.base()
    return policy.twin().requires_grad_(False) if base is None else base


def has_same_tower(policy, teacher):
    """Whether a teacher sees what the policy sees, now and after its steps: one encoding of a picture then does."""
    ours = policy.visual.state_dict()
    theirs = teacher.visual.state_dict()
    if any(p.requires_grad for p in policy.visual.parameters()) or ours.keys() != theirs.keys():
        return False
    if policy.config.clip != teacher.config.clip or policy.config.feature_layer != teacher.config.feature_layer:
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def make_learner(policy, width, switches, teacher=None):
    """policy, of decoder width `width`, with the reference and the critic that an Algorithm's switches ask for.
    teacher: a model that takes the place of the reference."""
    critic = None
    if switches.baseline == "critic":
        critic = Critic(policy, switches.critic, width, switches.return_norm)
    return Learner(policy, switches.kl_coef, critic, bool(switches.ref_sync), teacher)


class Guard:
    """Losses and gradients that are not finite: the step is skipped, its data saved, and after `limit` in a row the run
    stops. save(path, dict): writes a checkpoint file; count (): how many in a row so far, a learner's `bad_steps`, so
    that a resumed run goes on counting."""

    def __init__(self, folder, stage, limit, save, count=None):
        self.folder = folder
        self.stage = stage
        self.limit = limit
        self.save = save
        self.count = torch.zeros((), dtype=torch.long) if count is None else count
        self.files = 0

    def good(self):
        self.count.zero_()

    def bad(self, experience, loss, norms):
        """Raises ValueError at the limit."""
        self.count += 1
        in_a_row = int(self.count)
        self.files += 1
        while (self.folder / f"bad-{self.stage}-{self.files}.pt").exists():     # of before a resume
            self.files += 1
        path = self.folder / f"bad-{self.stage}-{self.files}.pt"
        tensors = {name: value for name, value in vars(experience).items() if name != "batch"}
        self.save(path, dict(stage=self.stage, loss=loss, norms=norms, batch=vars(experience.batch), **tensors))
        cause = "advantages that are not finite"
        if norms:
            cause = f"loss {loss:g}, gradient norm {norms['grad_norm']:g}"
        message = f"{cause}: the step is skipped, its batch is in {path}"
        if in_a_row >= self.limit:
            raise ValueError(f"{message}; {in_a_row} in a row, training diverged. The last checkpoint is intact; "
                             "start again from one with a lower rate")
        print(f"  {self.stage}: {message}", flush=True)
