"""What tests/test_parallel.py runs on several ranks, and in one process to compare with.

    torchrun --nproc-per-node=2 tests/ranks.py OUT.pt --shard=none,some     # all; some with weights in shards
    torchrun --nproc-per-node=2 tests/ranks.py OUT.pt --mistake=NAME            # one of them, with a mistake planted
    torchrun --nproc-per-node=2 tests/ranks.py OUT.json --answers               # what models are asked outside training

A case is a step or two of training by the project's own functions; what it leaves is completions, weights and what is
logged of it.
"""
import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch                                        # noqa: E402

import eval as evaluation                           # noqa: E402
import train                                        # noqa: E402,F401
from data.prompting import METHODS                  # noqa: E402
from eval import Prompting                          # noqa: E402
from model import lora, parallel, sharding          # noqa: E402
from model.flops import Meter                       # noqa: E402
from model.generate import Sampler                  # noqa: E402
from model.optim import make_optimizer, stepper     # noqa: E402
from model.runs.config import change                # noqa: E402
from rl import advantages, interventions, measures, metrics, recorder       # noqa: E402
from rl import update as updates                    # noqa: E402
from rl.algorithms import ALGORITHMS                # noqa: E402
from rl.learner import Guard, make_learner          # noqa: E402
from rl.rewards import RewardOptions, Rewards       # noqa: E402
from rl.rollout import roll_out                     # noqa: E402
from rl.search import SEARCHES, Search              # noqa: E402
from rl.update import estimate_advantages, score, select_groups, update         # noqa: E402
from test_algorithms import config                  # noqa: E402
from test_recorder import Step, lines_of            # noqa: E402
from test_search import SAMPLES, TOY, model         # noqa: E402
from test_staged import SAMPLES as STAGED, TOY as STAGED_TOY, model as staged_model     # noqa: E402

# name -> (switches, options of `step`)
CASES = {name: (dict(algorithm=name), {}) for name in ALGORITHMS}
CASES |= {
    "several updates": (dict(algorithm="grpo", epochs=2, mini_batches=2, micro_batch=1), {}),
    "checkpointing": (dict(algorithm="grpo_token", micro_batch=1), dict(checkpointing=True)),
    "adapters": (dict(algorithm="grpo"), dict(rank=2)),
    "adapters, exact KL": (dict(kl="exact", kl_coef=0.1), dict(rank=2)),
    "exact KL": (dict(kl="exact", kl_coef=0.1, kl_in="reward", epochs=2), {}),
    "adaptive KL": (dict(algorithm="grpo", kl_target=0.01, ref_sync=1), dict(steps=2)),
    "critic, detached": (dict(algorithm="ppo", critic="detached", return_norm=True), {}),
    "critic, separate": (dict(algorithm="ppo", critic="separate", epochs=2), dict(steps=2)),
    "top entropy": (dict(top_entropy=0.3), {}),
    "batch": (dict(baseline="batch", std="batch"), {}),
    "each reward": (dict(combine="each", rewards="letters:1,vowels:0.5"), {}),
    "stopped": (dict(algorithm="grpo", epochs=4, kl_stop=1e-6, lr=1e-2), {}),
    # what differs between ranks
    "one prompt": ({}, dict(samples=SAMPLES[:1])),
    "three prompts": (dict(micro_batch=1), dict(samples=SAMPLES[:3])),
    "text beside pictures": (dict(micro_batch=1), dict(samples=[SAMPLES[1], SAMPLES[0], SAMPLES[1], SAMPLES[2]])),
    "text alone": ({}, dict(samples=[SAMPLES[1]] * 2)),
    "flat on one rank": (dict(rewards="of_b:1"), {}),
    "flat everywhere": (dict(rewards="nothing:1"), {}),
    "sampled in parts": (dict(rollout_rows=4), dict(often=0.5)),
    "ends early": (dict(max_new=24, group=3), dict(often=8.0, samples=[SAMPLES[3], SAMPLES[2]])),
    "not finite": (dict(rewards="sometimes_nan:1"), {}),
    "loss not finite": ({}, dict(breaks=True)),
    # all else in fp64
    "single precision": (dict(algorithm="grpo", micro_batch=1), dict(dtype=torch.float32)),
    "half precision": (dict(micro_batch=1), dict(dtype=torch.bfloat16)),
}
# Those that meet shards in other ways; all of them run so on 4 ranks.
SOME = ("grpo", "ppo", "several updates", "checkpointing", "adapters, exact KL", "exact KL", "adaptive KL",
        "critic, separate", "three prompts", "text beside pictures", "text alone", "loss not finite", "half precision")
REWARDS = {"letters": lambda sample, text: float(len(set(text)) % 7),
           "vowels": lambda sample, text: float(sum(map(text.count, "aeiou")) % 3),
           "of_b": lambda sample, text: float(len(text) % 5) if sample.id == "b" else 1.0,
           "nothing": lambda sample, text: 1.0,
           "sometimes_nan": lambda sample, text: float("nan") if sample.id == "d" else float(len(text) % 5)}


def step(switches, shard="none", samples=SAMPLES, steps=1, rank=0, often=0.0, checkpointing=False, breaks=False,
         folder=None, dtype=torch.float64):
    """Steps of reinforcement learning as train.py's `reinforce` takes them -> {name: tensor} of completions, weights
    and numbers. breaks: the log-prob of one token of the last prompt is not a number."""
    switches = dict(switches)
    lr = switches.pop("lr", 1e-3)
    cfg = config(switches.pop("algorithm", ""), **{**dict(max_new=6, group=4, rewards="letters:1", gated=False),
                                                   **switches})
    vlm = model(dtype, often)
    if rank:
        generator = torch.Generator().manual_seed(0)
        lora.attach(vlm.llm, "all", rank, 1.0, generator)
    vlm.llm.checkpointing = checkpointing
    learner = make_learner(vlm, vlm.config.llm.width, cfg.algorithm)
    learner.shard(parallel.ParallelOptions(shard=shard))
    meter = Meter()
    optimizer = make_optimizer(learner, 0.95, 0.1, learner.critic, cfg.algorithm.value_lr)
    gradients = {}
    if dtype != torch.float64:
        optimizer.register_step_pre_hook(lambda *_: gradients.update(gradients_of(learner)))
    take_step = stepper(optimizer, lr, 1.0, projector=vlm.projector, llm=vlm.llm)
    rewards = Rewards(cfg.reward, functions=REWARDS)
    guard = Guard(folder, "rl", 99, lambda path, state: None)
    found = {}
    for number in range(steps):
        generator = torch.Generator().manual_seed(seed_of(number))
        clock = metrics.Clock(torch.device("cpu"))
        batch, rollout = roll_out(Sampler(vlm, meter), TOY, samples, "direct", cfg, rewards, generator, clock)
        experience = select_groups(batch, rollout, cfg)
        line = metrics.of_rollout(rollout)
        if experience.active.any():
            experience = score(learner, experience, cfg, meter)
            experience, more = estimate_advantages(learner, experience, rewards, cfg)
            if breaks:
                experience.sampled_logp[-1, 0, 0] = float("nan")
                experience.old_logp = experience.sampled_logp
            line |= more
            more, line["passed"] = update(learner, experience, cfg, take_step, meter, guard)
            line |= more
        learner.after(number, line, cfg.algorithm)
        meter.agree()
        found[f"ids {number}"] = rollout.ids
        found |= {f"{name} {number}": torch.tensor(float(value)).double() for name, value in line.items()}
    if gradients:       # which Adam turns into steps of equal size, however small they are
        return gradients
    found["skipped"] = guard.count.clone()
    found["kl_coef"] = learner.kl_coef.clone()
    sharding.rest(learner)
    for name, value in learner.state_dict().items():
        found[f"weight {name}"] = sharding.whole_tensor(value).clone()
    return found


def gradients_of(module):
    """{"gradient NAME": tensor} of what has one, whole."""
    return {f"gradient {name}": sharding.whole_tensor(p.grad).clone() for name, p in module.named_parameters()
            if p.grad is not None}


# ---------------------------------------------------------------- what models are asked outside training

def in_stages(name, temperature):
    """Answers by a method of data.prompting, two samples of two rows at once: four ranks have some without any."""
    prompting = Prompting("direct", "brief", 24, METHODS[name])
    return plain(evaluation.complete(staged_model(often=1.0), STAGED_TOY, STAGED, prompting, rows=4, group=2,
                                     temperature=temperature, seed=5))


def searched(name, scorer):
    """Answers by a search, three samples at once and then one."""
    prompting = Prompting("think", "brief", 14, search=Search(name, 4, scorer))
    return plain(evaluation.complete(model(often=2.0), TOY, SAMPLES, prompting, rows=12, temperature=1.0, seed=5))


def plain(answers):
    """Answers as JSON holds them."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in answers._asdict().items()}


def intervened():
    """Answers without the picture and without the thought, one prompt a rank at once; and all that was said."""
    vlm = model(often=1.0)
    said = []

    def complete(samples, beginnings):
        with mock.patch.object(measures, "ROWS", 1):
            said.append(measures.begun(Sampler(vlm), TOY, samples, beginnings, "think", "brief", 36))
        return said[-1]

    thoughts = [f"<think> {sample.id}</think><answer> {sample.answer}</answer>" for sample in SAMPLES]
    looks = interventions.look(complete, [SAMPLES[0], SAMPLES[3], SAMPLES[0]], vlm.config.pixels, vlm.config.clip.patch)
    return [looks, interventions.think(complete, SAMPLES, thoughts), said]


def recorded(algorithm, **switches):
    """Lines of rollouts.jsonl after four steps that do not learn, of which the file has room for two, so that the third
    and the fourth are not the steps that the first would lead to expect."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(recorder, "DIGITS", 12):
        step = Step(Path(folder), algorithm=algorithm, micro_batch=1, **switches)
        step.take(0)
        step.recorder.limit = parallel.of_first(int(2.5 * step.recorder._size()))
        for number in range(1, 4):
            step.take(number)
        return parallel.of_first(lines_of(folder))


# name -> () -> what JSON can hold
ANSWERS = {f"{name}, temperature {temperature}": partial(in_stages, name, temperature)
           for name, temperature in (("think", 1.0), ("stages", 0.0), ("stages", 1.0), ("ccot", 1.0), ("ddcot", 1.0))}
ANSWERS |= {f"{name} by logp": partial(searched, name, "logp") for name in SEARCHES}
ANSWERS |= {f"stage_beam by {scorer}": partial(searched, "stage_beam", scorer) for scorer in ("self", "oracle")}
ANSWERS["interventions"] = intervened
ANSWERS["rollouts.jsonl, grpo"] = partial(recorded, "grpo", epochs=2, mini_batches=2)
ANSWERS["rollouts.jsonl, dapo"] = partial(recorded, "dapo", kl_coef=0.1, kl="exact", correct="truncate")


# ---------------------------------------------------------------- planted mistakes

def divides_by_the_world(total_gradients):
    """As data parallelism that averages gradients."""
    def broken(optimizer):
        total_gradients(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= parallel.world()
    return broken


def counts_its_own_tokens(make_mini_batches):
    """The denominator of a rank's own micro-batches."""
    def broken(experience, cfg):
        minis = make_mini_batches(experience, cfg)
        for mini in minis:
            mini.denominator = sum(micro.trained.sum() for micro, _ in mini.micros)
        return minis
    return broken


def whitens_its_own(whiten):
    """Mean and deviation of a rank's own rows."""
    def broken(x, mask, scale=True, eps=1e-6):
        own = torch.zeros_like(mask)
        own[parallel.own_rows(len(mask))] = True
        return whiten(x, mask & own, scale, eps) + whiten(x, mask & ~own, scale, eps)
    return broken


def skips_alone(stepper):
    """A rank whose own loss is not finite goes on without a word to the others."""
    def broken(optimizer, *args, **parts):
        take_step = stepper(optimizer, *args, **parts)

        def take_or_skip(drop=False):
            if not drop:
                return take_step()
            optimizer.zero_grad()
            return dict(grad_norm=float("nan"))
        return take_or_skip
    return broken


def plant(mistake):
    """Breaks this process's code."""
    global seed_of, stepper
    if mistake == "divided by the world":
        sharding.total_gradients = divides_by_the_world(sharding.total_gradients)
    elif mistake == "own denominator":
        updates.make_mini_batches = counts_its_own_tokens(updates.make_mini_batches)
    elif mistake == "own whitening":
        advantages.whiten = whitens_its_own(advantages.whiten)
    elif mistake == "seed by rank":
        seed_of = seed_by_rank
    elif mistake == "skips alone":
        metrics.of_all_ranks = dict
        stepper = skips_alone(stepper)
    elif mistake == "no dummy":
        parallel.fewer = lambda items: 0


def seed_of(number):
    """The seed of a step's sampling."""
    return number


def seed_by_rank(number):
    return number + parallel.rank()


# name -> the case that shows it
MISTAKES = {"divided by the world": "grpo_token", "own denominator": "grpo_token", "own whitening": "batch",
            "seed by rank": "grpo_token", "skips alone": "loss not finite", "no dummy": "three prompts"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--shard", default="none")
    parser.add_argument("--mistake", default="")
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--patience", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel.start(parallel.ParallelOptions(patience=options.patience), "cpu")       # where the cases' tensors lie
    if options.answers:
        answers = {name: ask() for name, ask in ANSWERS.items()}
        of_ranks = parallel.gather(answers)
        if parallel.is_first():
            Path(options.out).write_text(json.dumps(of_ranks))
        return parallel.stop()
    cases = CASES
    if options.mistake:
        plant(options.mistake)
        cases = {name: CASES[name] for name in [MISTAKES[options.mistake]]}
    found = {}
    for shard in options.shard.split(","):
        if shard == "some":
            shard = "full"
            cases = {name: CASES[name] for name in SOME}
        for name, (switches, how) in cases.items():
            parallel.watchdog.at(f"{name}, {shard}")
            found[f"{shard}: {name}"] = step(switches, shard, folder=Path(options.out).parent, **how)
    if parallel.is_first():
        torch.save(found, options.out)
    parallel.barrier()
    parallel.stop()


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:           # as train.py ends
        if parallel.lost(error):
            parallel.watchdog.end(parallel.lost(error))
        raise
