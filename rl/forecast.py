"""How long the stages of a run will take, from one step of each, before the first begins.

A step is measured on real records, by a model of the run's shapes with random weights, a micro-batch of it; the result
is thrown away. A model that is random never ends an answer, so that reinforcement learning samples --max-new tokens for
every completion. Evaluation, rewards, the preflight and further rollouts (--refill) are not counted.
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.sample import collate
from model import machine, prepare
from model.clip import Clip, contrastive_loss
from model.flops import Meter
from model.generate import Sampler
from model.optim import make_optimizer, optimizer_step
from model.runs.config import change, first_line
from model.runs.device import pick_dtype
from rl import bench, metrics
from rl.learner import Guard, make_learner
from rl.rewards import Rewards
from rl.rollout import roll_out
from rl.update import estimate_advantages, score, select_groups, update


@dataclass(frozen=True)
class Ahead:
    """A stage that is to come. kind: clip, supervised, or rl; "" for one that is given the FLOPs of others, `like`.
    rows: a look at its records, as data.preview encodes them; batch: records or prompts of a step; samples, method: of
    reinforcement learning, what is asked and how."""
    name: str
    kind: str
    cfg: object
    steps: int = 0
    batch: int = 0
    rows: tuple = ()
    samples: tuple = ()
    method: str = ""
    like: tuple = ()


# ---------------------------------------------------------------- a step that is thrown away

def sampled(learner, sampler, tok, asked, method, cfg, rewards, generator, clock, keep_all=False):
    """The first half of a step of reinforcement learning -> (Rollout, Experience with advantages)."""
    batch, rollout = roll_out(sampler, tok, asked, method, cfg, rewards, generator, clock)
    experience = select_groups(batch, rollout, cfg, keep_all=keep_all)
    if experience.active.any():
        experience = score(learner, experience, cfg, sampler.meter)
        experience, _ = estimate_advantages(learner, experience, rewards, cfg)
    return rollout, experience


def updated(learner, experience, cfg, guard, meter):
    """The second half, whose gradient is dropped -> completion tokens that passed."""
    optim = cfg.optim
    optimizer = make_optimizer(learner, optim.beta2, 0.0, moments=optim.moments, master=optim.master)   # never steps

    def dropped_step(drop=True):
        return {"grad_norm": optimizer_step(optimizer, 0.0, 1.0, drop=True)[0]}

    _, passed = update(learner, experience, cfg, dropped_step, meter, guard)
    return passed


def rl_step(vlm, ahead, tok, device):
    """A step of reinforcement learning on the prompts of one micro-batch, every completion as long as it may be."""
    cfg = change(ahead.cfg, rewards="bench:1", gated=False, min_new=ahead.cfg.sampling.max_new, epochs=1,
                 mini_batches=1)
    learner = make_learner(vlm, vlm.config.llm.width, cfg.algorithm)
    rewards = Rewards(cfg.reward, functions={"bench": bench.varied})
    generator = torch.Generator(device).manual_seed(0)
    guard = Guard(Path(ahead.name), ahead.name, math.inf, lambda path, state: None)     # keeps nothing
    clock = metrics.Clock(device)
    meter = Meter()
    _, experience = sampled(learner, Sampler(vlm, meter), tok, ahead.samples, ahead.method, cfg, rewards, generator,
                            clock, keep_all=True)
    before = time.perf_counter()
    updated(learner, experience, cfg, guard, meter)
    return (time.perf_counter() - before) * (ahead.cfg.rl.epochs - 1)       # of the other epochs


def supervised_step(vlm, rows, tok, device):
    """Forward and backward of one micro-batch."""
    batch = collate(sorted(rows, key=lambda row: len(row[0])), tok.pad_id, **vlm.config.pixels).to(device)
    loss = -vlm(batch, upstream=(torch.tensor(-1.0, device=device), None)).logp.sum()
    if loss.requires_grad:
        loss.backward()
    loss.item()


def clip_step(model, rows, tok, device):
    """Forward and backward of contrastive training on one batch."""
    c = model.config
    rows = [(ids[:c.text_length], mask[:c.text_length], images[:1]) for ids, mask, images in rows]
    batch = collate(rows, tok.pad_id, c.image_size).to(device)
    image = model.encode_image(batch.pixels.to(model.logit_scale.dtype))
    contrastive_loss(image, model.encode_text(batch.ids, batch.length), model.logit_scale).backward()


# ---------------------------------------------------------------- seconds

def weighted(model, device):
    """A model of the meta device on a device, its weights random."""
    model = model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.02)
            else:
                p.fill_(float(name.endswith("weight")))
        for buffer in model.buffers():
            buffer.zero_()
    return model


def seconds_of(step, device):
    """Seconds that step() takes, with what it says must be added; on a GPU, whose first step builds its kernels, those
    of a second one."""
    for _ in range(1 + (device.type == "cuda")):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        more = step() or 0.0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began + more
    return seconds


def measure(ahead, config, tok, device):
    """Seconds of a step of a stage, all its micro-batches and the optimizer's step. config: VlmConfig of the run's
    model."""
    if ahead.kind == "clip":
        model = clip_on_meta(ahead.cfg, len(tok))
        step = clip_step
        micro = ahead.batch
    else:
        model = prepare.on_meta(config, ahead.cfg, ahead.name)
        step = rl_step if ahead.kind == "rl" else supervised_step
        micro = min(ahead.cfg.optim.micro_batch or ahead.batch, ahead.batch)
    model = weighted(model, device)
    some = few(ahead.samples or ahead.rows, micro)
    what = replace(ahead, samples=some) if ahead.kind == "rl" else some
    seconds = seconds_of(lambda: step(model, what, tok, device), device) * ahead.batch / len(some)
    optim = ahead.cfg.optim
    optimizer = make_optimizer(model, optim.beta2, 0.0, module_lr="" if ahead.kind == "clip" else optim.module_lr,
                               moments=optim.moments, master=optim.master)
    return seconds + seconds_of(lambda: optimizer_step(optimizer, 0.0, 1.0) and None, device)


def clip_on_meta(cfg, vocab):
    """The CLIP that stage clip trains, without memory."""
    with torch.device("meta"):
        return Clip(cfg.clip.config(vocab)).to(pick_dtype(cfg.machine.dtype))


def few(records, count):
    """`count` of the records, spread evenly over them, or all."""
    step = max(1, len(records) // count)
    return records[::step][:count]


# ---------------------------------------------------------------- as text

def duration(seconds):
    """Seconds in the unit that a person would say.

    >>> duration(1.25), duration(600), duration(9000)
    ('1.2 s', '10.0 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def table(found):
    """[(Ahead, seconds of a step, or why there are none)] -> text, one line a stage and their sum."""
    lines = ["  time, by one step of each stage with random weights; evaluation, rewards, --refill left out:"]
    whole = {}                          # stage -> its seconds
    for ahead, seconds in found:
        if not ahead.kind:
            whole[ahead.name] = sum(whole.get(name, 0.0) for name in ahead.like)
            lines.append(f"  {ahead.name:<15} as many FLOPs as {' and '.join(ahead.like)}, so about as long")
        elif isinstance(seconds, str):
            lines.append(f"  {ahead.name:<15} {seconds}")
        else:
            whole[ahead.name] = seconds * ahead.steps
            note = ", every completion at full length" if ahead.kind == "rl" else ""
            lines.append(f"  {ahead.name:<15} {ahead.steps:6d} steps {seconds:10.4f} s a step "
                         f"{duration(whole[ahead.name]):>10}{note}")
    missing = [ahead.name for ahead, seconds in found if str(seconds).startswith("not measured")]
    without = f", without {', '.join(missing)}" if missing else ""
    return "\n".join([*lines, f"  {'in all':<15} about {duration(sum(whole.values()))}{without}"])


def show(stages, config, tok, device, crowded=()):
    """Prints `table` for a list of Ahead. Nothing of it stays: no random number, no file, no memory. crowded: names of
    stages that the machine has no room for, whose step is left out."""
    print("  measuring a step of each stage", flush=True)
    found = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        for ahead in stages:
            found.append((ahead, seconds_or_why(ahead, config, tok, device, crowded)))
            machine.give_holes_back()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(table(found), flush=True)


def seconds_or_why(ahead, config, tok, device, crowded):
    """Seconds of a step, or a few words on why there are none."""
    if not ahead.kind:
        return ""
    if ahead.name in crowded:
        return "not measured: its plan exceeds the machine"
    if not ahead.steps or not (ahead.rows or ahead.samples):
        return "no steps"
    try:
        return measure(ahead, config, tok, device)
    except (ValueError, RuntimeError, MemoryError) as error:        # an estimate must not end a run that may work
        return f"not measured: {first_line(error)}"
