"""What moves the weights: AdamW, in bf16 too, learning rates by module, warm-up and cosine,
clipping."""
import hashlib
import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from model import sharding
from model.runs.config import check_fields, choice, number


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its schedule, in every stage"""
    micro_batch: int = number(48, "[0, 1000000]")   # samples, or prompts with their group, at a time; 0: all
    warmup: float = number(0.05, "[0, 1]")          # share of the steps
    final_lr: float = number(0.05, "[0, 1]")        # cosine ends at this share of the peak
    weight_decay: float = number(0.0, "[0, 100]")   # AdamW
    beta2: float = number(0.95, "[0, 1)")           # AdamW
    grad_clip: float = number(1.0, "(0, 1000000]")  # global norm
    module_lr: str = ""                             # rates in units of the stage's: projector:0.1,llm.norm:0; 0 freezes
    master: bool = True                             # bfloat16 weights: fp32 copies and gradients of what trains
    moments: str = choice("float32", "bfloat16")    # bfloat16 weights: AdamW's moments, float32 | bfloat16

    def __post_init__(self):
        check_fields(self)


# ---------------------------------------------------------------- seeds and learning rates

def seed_of(seed, *names):
    """One seed for each purpose of a run, the same on every machine."""
    purpose = " ".join(map(str, (seed, *names)))
    digest = hashlib.sha256(purpose.encode()).digest()
    return int.from_bytes(digest[:6], "little")


def learning_rate(step, steps, peak, warmup, final):
    """Linear warm-up over the share `warmup` of the steps, then cosine from `peak` to `final` of
    it."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def parse_module_lr(module_lr, names):
    """"projector:0.1,llm.embed_tokens:0" -> prefix: rate. Raises ValueError as module_rates."""
    rates = {}
    if not module_lr:
        return rates
    for entry in module_lr.split(","):
        prefix, colon, number = (text.strip() for text in entry.partition(":"))
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        where = f"module_lr {module_lr!r}: {entry.strip()!r}"
        if not prefix or not colon or not 0 <= rate <= 1e6:
            raise ValueError(f"{where} must be NAME:RATE, RATE a number in [0, 1000000], as in "
                             "projector:0.1")
        if prefix in rates:
            raise ValueError(f"{where} gives {prefix} a second rate, expected one")
        if not any(_begins(name, prefix) for name in names):
            tops = dict.fromkeys(name.partition(".")[0] for name in names)
            raise ValueError(f"{where} must begin the name of a parameter; the first parts of "
                             f"those are {', '.join(tops)}")
        rates[prefix] = rate
    return rates


def _begins(name, prefix):
    """Whether a dotted name begins with the whole names of `prefix`."""
    return f"{name}.".startswith(f"{prefix}.")


def module_rates(module, module_lr):
    """Learning rate of each parameter in units of the stage's: name -> number, 1 where `module_lr`
    does not mention it.

    module_lr: "projector:0.1,llm.embed_tokens:0", rates of the parameters whose dotted name begins
    so; the longest beginning wins. Raises ValueError on an entry of another form, a rate that is
    not a number in [0, 1e6], a name given twice, and one that no parameter has.
    """
    names = [name for name, _ in module.named_parameters()]
    rates = parse_module_lr(module_lr, names)
    found = {}
    for name in names:
        prefixes = [prefix for prefix in rates if _begins(name, prefix)]
        found[name] = rates[max(prefixes, key=len)] if prefixes else 1.0
    return found


def freeze(module, module_lr):
    """Freezes the parameters to which `module_lr` gives 0; what is frozen already stays frozen.
    Raises as module_rates."""
    rates = module_rates(module, module_lr)
    for name, p in module.named_parameters():
        if rates[name] == 0:
            p.requires_grad_(False)


# ---------------------------------------------------------------- the optimizer

def is_narrow(dtype):
    """Whether steps as small as training's are lost in weights of this dtype: bf16 and fp16."""
    return torch.promote_types(dtype, torch.float32) != dtype


def make_optimizer(module, beta2, weight_decay, other=None, other_lr=1.0, module_lr="",
                   moments="float32", master=True):
    """AdamW over what trains, in two parts whose gradients are clipped apart: the parameters of
    `other`, a part of `module`, at `other_lr` times the stage's learning rate; the rest at the
    rates of `module_lr`, those of 0 frozen. Its names are the model's: without the `policy.` of a
    learner.

    Where a weight that trains is narrower than fp32 it is the AdamW of this file, with `moments`
    and `master`; else torch's, which has no use for them. With `master` its gradients are fp32:
    those of several micro-batches would be rounded at each sum. Raises ValueError as module_rates
    and AdamW do.
    """
    policy = getattr(module, "policy", module)
    freeze(policy, module_lr)
    groups = parameter_groups(module, module_rates(policy, module_lr), other, other_lr)
    if not any(is_narrow(p.dtype) for p in module.parameters() if p.requires_grad):
        return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    optimizer = AdamW(groups, (0.9, beta2), weight_decay, moments=moments, master=master)
    for group in groups:
        for p in group["params"]:
            if is_narrow(p.dtype):
                set_grad_dtype(p, torch.float32 if master else p.dtype)
    return optimizer


def set_grad_dtype(p, dtype):
    """The dtype in which autograd sums the gradient of a parameter, and keeps it; one that is there
    already is converted."""
    grad = p.grad
    p.grad = None
    p.grad_dtype = dtype
    if grad is not None:
        p.grad = grad.to(dtype)


def parameter_groups(module, rates, other, other_lr):
    """Groups of the parameters that train, one for those of equal settings: scale, which multiplies
    the learning rate, and clip, the name of those whose gradients share a norm."""
    apart = set() if other is None else {id(p) for p in other.parameters()}
    groups = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in apart:
            settings = dict(scale=other_lr, clip="critic")
        else:
            settings = dict(scale=rates.get(name.removeprefix("policy."), 1.0), clip="policy")
        group = groups.setdefault(tuple(settings.values()), dict(params=[], **settings))
        group["params"].append(p)
    groups = _whole_and_sharded(groups.values())
    if not any(group["clip"] == "policy" for group in groups):
        groups.insert(0, dict(params=[], scale=1.0, clip="policy"))
    return groups


def _whole_and_sharded(groups):
    """Groups of parameters, those that hold whole weights and weights in shards as two, in the order
    in which they hold them: torch's fused kernel takes no list of both."""
    found = []
    for group in groups:
        kinds = {}
        for p in group["params"]:
            kinds.setdefault(isinstance(p, DTensor), []).append(p)
        found += [group | dict(params=some) for some in kinds.values()]
    return found


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) for weights narrower than fp32; as in torch's, the
    learning rate multiplies the decay, too. Computed in fp32: by torch's fused kernel on the copies,
    or, where there are none or moments are kept in bf16, one parameter at a time, so that no second
    set of gradients or moments exists.

    moments: float32 | bfloat16, half the memory, in which m and v are kept between steps.
    master: an fp32 copy of each narrow weight takes the steps, and the weight is that copy,
    rounded. Without it a step of less than half the weight's spacing is lost, again and again: in
    bf16 any below 1 / 512 of the weight.
    Wider weights need neither: they step as under torch's AdamW. Raises ValueError on other
    moments, and on bfloat16 with a beta2 above 0.99: v would move in steps that its spacing
    swallows.
    """

    def __init__(self, params, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8, moments="float32",
                 master=True):
        if moments not in ("float32", "bfloat16"):
            raise ValueError(f"moments {moments!r} must be float32 or bfloat16")
        if moments == "bfloat16" and betas[1] > 0.99:
            raise ValueError(f"beta2 {betas[1]} must be at most 0.99 with moments in bfloat16")
        self.moments = getattr(torch, moments)
        self.master = master
        self.is_fused = master and moments == "float32"
        defaults = dict(lr=0.0, betas=betas, weight_decay=weight_decay, eps=eps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            fused = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._start(p, state)
                if self.is_fused and is_narrow(p.dtype):
                    fused.append(p)
                else:
                    self._step(p, state, group)
            if fused:
                self._step_fused(fused, group)

    def _step_fused(self, params, group):
        """Of weights with fp32 copies and moments: reads 16 bytes a parameter and writes 12, then
        writes the weight from its copy."""
        states = [self.state[p] for p in params]
        copies, m, v, counts = ([state[name] for state in states] for name in ("master", "m", "v", "step"))
        beta1, beta2 = group["betas"]
        adamw(copies, [p.grad.float() for p in params], m, v, [], counts, fused=True, amsgrad=False, beta1=beta1,
              beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        torch._foreach_copy_(params, copies)

    def _step(self, p, state, group):
        wide = torch.promote_types(p.dtype, torch.float32)
        state["step"] += 1
        weight = state.get("master", p).to(wide)
        m = state["m"].to(wide)
        v = state["v"].to(wide)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        adam(weight, p.grad.to(wide), m, v, state["step"], group)
        for old, new in ((state["m"], m), (state["v"], v), (p, weight)):
            if old is not new:          # .to gives the tensor itself where it is wide already
                old.copy_(new)

    def _start(self, p, state):
        """The state of a parameter before its first step."""
        narrow = is_narrow(p.dtype)
        kept = self.moments if narrow else p.dtype
        state.update(step=0, m=torch.zeros_like(p, dtype=kept), v=torch.zeros_like(p, dtype=kept))
        if self.master and narrow:
            state["master"] = p.float()
        if self.is_fused and narrow:
            # As torch's kernel counts.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)

    def load_state_dict(self, saved):
        """What was saved, in the dtype it had: torch's own would cast moments and master to that of
        the weight."""
        super().load_state_dict(saved | dict(state={}))
        indices = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(indices, params):
            for name, value in saved["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device) if torch.is_tensor(value) else value
            if self.state[p] and self.is_fused and is_narrow(p.dtype):
                self._as_fused(p, self.state[p])

    def _as_fused(self, p, state):
        """State that was saved under other options, or with steps counted in an int, as the fused
        kernel takes it."""
        state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=p.device)
        state["m"] = state["m"].float()
        state["v"] = state["v"].float()
        state.setdefault("master", p.detach().float())


def adam(weight, grad, m, v, step, group):
    """One step of Adam (arXiv 1412.6980, algorithm 1), in place; weight, grad, m, v in one dtype.
    `step` counts from 1."""
    beta1, beta2 = group["betas"]
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # Both corrections of the start, of m and of v, in two numbers instead of two tensors.
    size = group["lr"] / (1 - beta1 ** step)
    root = (v / (1 - beta2 ** step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(m, root, value=-size)


# ---------------------------------------------------------------- a step

def optimizer_step(optimizer, lr, grad_clip, drop=False):
    """Clip to `grad_clip`, step, clear; -> the norms before clipping, one for all groups of a
    `clip`: policy, critic.

    Takes no step, but clears the gradient, when told to `drop` it or when a norm is not finite.
    """
    clips = {}
    for group in optimizer.param_groups:
        clips.setdefault(group["clip"], []).extend(group["params"])
    norms = [clip_gradients(params, grad_clip) for params in clips.values()]
    if not drop and all(map(math.isfinite, norms)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def clip_gradients(params, most):
    """Scales the gradients of some parameters so that their norm is at most `most` -> their norm
    before."""
    norm = total_norm([p.grad for p in params if p.grad is not None])
    whole = [p for p in params if not isinstance(p, DTensor)]
    torch.nn.utils.clip_grads_with_norm_(whole, most, norm)
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)         # as torch's
    for p in params:
        if isinstance(p, DTensor) and p.grad is not None:
            p.grad.to_local().mul_(factor.to(p.grad.device))
    return norm.item()


def total_norm(gradients):
    """L2 norm () of tensors, some of which may lie in shards over ranks."""
    norms = []
    for kind in (False, True):
        some = [gradient for gradient in gradients if isinstance(gradient, DTensor) == kind]
        if some:
            norms.append(sharding.whole_tensor(torch.nn.utils.get_total_norm(some)))
    if not norms:
        return torch.tensor(0.0)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def stepper(optimizer, lr, grad_clip, **parts):
    """-> take_step(drop=False): optimizer_step, on gradients summed over ranks. It returns the L2
    norms of the gradient before clipping: "grad_norm"; of a critic with a group of its own
    "grad_norm_critic"; and "grad_norm_NAME" of each module in `parts`."""
    def take_step(drop=False):
        sharding.total_gradients(optimizer)
        norms = {f"grad_norm_{name}": gradient_norm(module) for name, module in parts.items()}
        clipped = optimizer_step(optimizer, lr, grad_clip, drop)
        return dict(zip(("grad_norm", "grad_norm_critic"), clipped)) | norms

    return take_step


def gradient_norm(module):
    """L2 norm of all its gradients, 0 without one."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return 0.0
    return total_norm(gradients).item()


def diverged(norm, lr):
    """The message about a gradient that is not finite."""
    return (f"the gradient's norm is {norm} at learning rate {lr:.3g}: training diverged. The last "
            "checkpoint is intact; start again from one with a lower rate")


# ---------------------------------------------------------------- what trains, as text

def trained_line(stage, title, parameters):
    """One line: how many parameters a title has, and whether all, none or some of them train."""
    total = 0
    trained = 0
    for p in parameters:
        total += p.numel()
        trained += p.numel() * p.requires_grad
    if trained == total:
        word = "trains"
    elif trained:
        word = "partly"
    else:
        word = "frozen"
    return f"  {stage:<15} {title:<16}{total / 1e6:9.3f} M parameters   {word}"


def trained_lines(stage, vlm):
    """What of a vision-language model (or of CLIP) trains and what is frozen, a line for each child
    with parameters."""
    lines = []
    for title, module in vlm.named_children():
        if any(p.numel() for p in module.parameters()):
            lines.append(trained_line(stage, title, module.parameters()))
    return lines


def show_trained(stage, vlm):
    """Prints `trained_lines`."""
    print("\n".join(trained_lines(stage, vlm)), flush=True)
