"""What moves the weights: AdamW, in bf16 too, learning rates by module, warm-up and cosine, clipping."""
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


def module_rates(module, module_lr):
    """Learning rate of each parameter in units of the stage's: name -> number, 1 where `module_lr` is silent.

    module_lr: "projector:0.1,llm.embed_tokens:0", rates of the parameters whose dotted name begins so; the longest
    beginning wins. Raises ValueError on a part of another form, a rate that is not a number in [0, 1e6], a name
    given twice, and one that no parameter has.
    """
    names, rates = [name for name, _ in module.named_parameters()], {}
    for part in module_lr.split(",") if module_lr else ():
        prefix, colon, number = (text.strip() for text in part.partition(":"))
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        said = f"module_lr {module_lr!r}: {part.strip()!r}"
        if not prefix or not colon or not 0 <= rate <= 1e6:
            raise ValueError(f"{said} must be NAME:RATE, RATE a number in [0, 1000000], as in projector:0.1")
        if prefix in rates:
            raise ValueError(f"{said} gives {prefix} a second rate, expected one")
        if not any(f"{name}.".startswith(f"{prefix}.") for name in names):
            tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"{said} must begin the name of a parameter; the first parts of those are {tops}")
        rates[prefix] = rate
    found = {}
    for name in names:
        mine = [prefix for prefix in rates if f"{name}.".startswith(f"{prefix}.")]
        found[name] = rates[max(mine, key=len)] if mine else 1.0
    return found


def freeze(module, module_lr):
    """Freezes the parameters to which `module_lr` gives 0; what is frozen already stays so. Raises as module_rates."""
    rates = module_rates(module, module_lr)
    for name, p in module.named_parameters():
        if rates[name] == 0:
            p.requires_grad_(False)


def is_narrow(dtype):
    """Whether steps as small as training's are lost in weights of this dtype: bf16 and fp16."""
    return torch.promote_types(dtype, torch.float32) != dtype


def make_optimizer(module, beta2, weight_decay, other=None, other_lr=1.0, module_lr="", moments="float32", master=True):
    """AdamW over what trains, in two parts that are clipped apart: the parameters of `other`, a part of `module`, at
    `other_lr` times the stage's learning rate; the rest at the rates of `module_lr`, those of 0 frozen. Its names are
    the model's: without the `policy.` of a learner.

    Where a weight that trains is narrower than fp32 it is the AdamW of this file, with `moments` and `master`; else
    torch's, which has no use for them. Raises ValueError as module_rates and AdamW do.
    """
    policy = getattr(module, "policy", module)
    freeze(policy, module_lr)
    rates = module_rates(policy, module_lr)
    rate = {id(p): rates[name] for name, p in policy.named_parameters()}
    apart = {id(p) for p in other.parameters()} if other is not None else set()
    trained = [p for p in module.parameters() if p.requires_grad]
    mine = [(p, rate.get(id(p), 1.0)) for p in trained if id(p) not in apart]
    groups = [dict(params=[p for p, its in mine if its == scale], scale=scale, clip="policy")
              for scale in dict.fromkeys(its for _, its in mine) or (1.0,)]
    if other is not None:
        groups.append(dict(params=[p for p in trained if id(p) in apart], scale=other_lr, clip="critic"))
    if any(is_narrow(p.dtype) for p in trained):
        return AdamW(groups, (0.9, beta2), weight_decay, moments=moments, master=master)
    return torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) for weights narrower than fp32; as in torch's, the learning rate multiplies
    the decay, too. Computed in fp32, one parameter at a time, so that no second set of gradients exists.

    moments: float32 | bfloat16, half the memory, in which m and v are kept between steps.
    master: an fp32 copy of each narrow weight takes the steps, and the weight is that copy, rounded. Without it a step
    of less than half the weight's spacing is lost, again and again: in bf16 any below 1 / 512 of the weight.
    Wider weights need neither: they step as under torch's AdamW. Raises ValueError on other moments, and on bfloat16
    with a beta2 above 0.99: v would move in steps that its spacing swallows.
    """

    def __init__(self, params, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8, moments="float32", master=True):
        if moments not in ("float32", "bfloat16"):
            raise ValueError(f"moments {moments!r} must be float32 or bfloat16")
        if moments == "bfloat16" and betas[1] > 0.99:
            raise ValueError(f"beta2 {betas[1]} must be at most 0.99 with moments in bfloat16")
        self.moments, self.master = getattr(torch, moments), master
        super().__init__(params, dict(lr=0.0, betas=betas, weight_decay=weight_decay, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, self.state[p], group["lr"], *group["betas"], group["weight_decay"], group["eps"])

    def _step(self, p, state, lr, beta1, beta2, weight_decay, eps):
        wide, narrow = torch.promote_types(p.dtype, torch.float32), is_narrow(p.dtype)
        if not state:
            kept = self.moments if narrow else wide
            state.update(step=0, m=torch.zeros_like(p, dtype=kept), v=torch.zeros_like(p, dtype=kept))
            if narrow and self.master:
                state["master"] = p.to(wide)
        state["step"] += 1
        w, m, v, g = (t.to(wide) for t in (state.get("master", p), state["m"], state["v"], p.grad))
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # Both corrections of the start, of m and of v, in two numbers instead of two tensors.
        size = lr / (1 - beta1 ** state["step"])
        root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(eps)
        w.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-size)
        for old, new in ((state["m"], m), (state["v"], v), (p, w)):
            if old is not new:          # .to gives the tensor itself where it is wide already
                old.copy_(new)

    def load_state_dict(self, saved):
        """What was saved, in the dtype it had: torch's own would cast moments and master to that of the weight."""
        super().load_state_dict(saved | dict(state={}))
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(indices, params):
            if i in saved["state"]:
                self.state[p] = {name: value.to(p.device) if torch.is_tensor(value) else value
                                 for name, value in saved["state"][i].items()}


def optimizer_step(optimizer, lr, grad_clip, drop=False):
    """Clip to `grad_clip`, step, clear; -> the norms before clipping, one for all groups of a `clip`: policy, critic.

    Without a step, only cleared, to `drop` the gradient, or when a norm is not finite.
    """
    clips = {}
    for group in optimizer.param_groups:
        clips.setdefault(group["clip"], []).extend(group["params"])
    norms = [torch.nn.utils.clip_grad_norm_(params, grad_clip).item() for params in clips.values()]
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


def trained_line(stage, title, parameters):
    """One line of what trains: how many parameters go by this title and whether all, none or some of them train."""
    parameters = list(parameters)
    total, trained = (sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad]))
    word = "trains" if trained == total else "frozen" if not trained else "partly"
    return f"  {stage:<16}{title:<16}{total / 1e6:9.3f} M parameters   {word}"


def trained_lines(stage, vlm):
    """What of a vision-language model (or of CLIP) trains and what is frozen, a line for each child with parameters."""
    return [trained_line(stage, title, module.parameters()) for title, module in vlm.named_children()
            if any(p.numel() for p in module.parameters())]


def show_trained(stage, vlm):
    """Prints `trained_lines`."""
    print("\n".join(trained_lines(stage, vlm)), flush=True)
