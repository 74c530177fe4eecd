"""What the papers' algorithms set, and which switches make no sense together.

An algorithm is a line: the switches of train.py's Config that it sets otherwise than the defaults, which are those of
`grpo_token`. None sets the policy's learning rate, epochs or mini-batches. What a stage of reinforcement learning made
is called by its algorithm everywhere, and no two settings share a name: `label`.
"""
from dataclasses import replace

from rl.advantages import BASELINES
from rl.learner import CRITICS
from rl.losses import LOSSES, NORMS

ALGORITHMS = {
    # The main job's and the defaults of Config, which a test holds equal: GRPO with each token counting alike (arXiv
    # 2503.14476, eq. 8), without KL, over the groups that are not flat
    "grpo_token": dict(norm="token", flat="drop", kl_coef=0.0),
    # arXiv 2402.03300, eq. 3, 4; beta as there
    "grpo": dict(norm="sequence", flat="count", kl_coef=0.04),
    # arXiv 2503.20783: neither length nor deviation divides
    "dr_grpo": dict(norm="constant", std="none", flat="count"),
    # arXiv 2503.14476: clip-higher, tokens of the step, soft penalty (there on a fifth of the budget), dynamic
    # sampling; here a group is left out when its whole reward is flat, there when its correctness is
    "dapo": dict(clip_high=0.28, refill=3, overlong_share=0.2),
    # arXiv 2507.18071, eq. 5, 7; clips of section 5.1
    "gspo": dict(ratio="sequence", norm="sequence", clip_low=3e-4, clip_high=4e-4, flat="count"),
    # arXiv 2506.13585, eq. 4, 5: no lower clip; the upper one is tuned there and not told; PPO's
    "cispo": dict(loss="cispo", clip_low=1.0, flat="count"),
    # arXiv 2511.20347, eq. 5
    "sapo": dict(loss="sapo", norm="sequence", flat="count"),
    # arXiv 2602.05261: GSPO whose sequences count by their length
    "luspo": dict(ratio="sequence", norm="sum", clip_low=3e-4, clip_high=4e-4, flat="count"),
    # arXiv 2402.14740, eq. 1, 9: KL in the reward; the clip matters from the second update of a rollout on
    "rloo": dict(baseline="leave_one_out", std="none", norm="sum", kl="k1", kl_in="reward", kl_coef=0.03, flat="count"),
    # arXiv 2501.03262, eq. 5-7
    "reinforce++": dict(baseline="batch", std="batch", kl="k1", kl_in="reward", kl_coef=0.01),
    # arXiv 1707.06347 as RLHF uses it (arXiv 2203.02155, section 3.5): KL in the reward, whitened advantages
    "ppo": dict(baseline="critic", std="batch", kl="k1", kl_in="reward", kl_coef=0.01, value_lr=10.0),
}

# The same reward twice, once with each switch: what the format reward does, and what the gate does.
REWARDS = {
    "right": dict(rewards="correctness:1", gated=False),
    "right_gated": dict(rewards="correctness:1", gated=True),
    "format": dict(rewards="correctness:1,format:0.1", gated=False),
    "format_gated": dict(rewards="correctness:1,format:0.1", gated=True),
}


# The switches that make an algorithm what it is: another value is another setting, and shows in its name.
SWITCHES = (
    "loss", "ratio", "clip_low", "clip_high", "bound", "norm", "baseline", "flat", "std", "combine", "kl", "kl_coef",
    "kl_in", "kl_target", "ref_sync", "entropy_coef", "top_entropy", "correct", "correct_cap", "correct_level",
    "refill", "drop_truncated", "overlong_share", "kl_stop", "critic", "gamma", "lam", "value_lr", "value_coef",
    "value_clip", "return_norm", "bootstrap")

# field -> values it may have
ALLOWED = dict(algorithm=tuple(ALGORITHMS), loss=tuple(LOSSES), ratio=("token", "sequence"), norm=NORMS,
               baseline=BASELINES, std=("group", "batch", "none"), flat=("drop", "count"), combine=("sum", "each"),
               kl=("k1", "k2", "k3", "exact"), kl_in=("loss", "reward"), correct=("none", "truncate", "mask"),
               correct_level=("token", "sequence"), critic=CRITICS, reward_errors=("zero", "stop"))

VARIANTS = {**ALGORITHMS, **REWARDS}        # stages of train.py by these names
STAGES = ("rl", "rl_zero", *VARIANTS)       # all of its stages that are reinforcement learning


def of_flags(given):
    """What the algorithm among the flags given sets; other flags override it."""
    return ALGORITHMS.get(given.get("algorithm"), {})


def of_stage(cfg, stage):
    """The config of an RL stage: one named after a variant has its switches, but for flags that were given."""
    changes = VARIANTS.get(stage, {})
    return replace(cfg, **{name: value for name, value in changes.items() if name not in cfg.flags.split()})


def label(cfg, stage):
    """What the results of a stage are called in tables, plots and files: one name for one setting.

    A supervised stage has its own name. One of reinforcement learning is called by its algorithm, and by the switches
    in which it differs from that, "grpo[kl_coef=0.0]"; one that only asks for the tags "grpo_token_zero"; one named
    after rewards by that name, behind its algorithm's unless that is the default. What all stages of a run share is in
    its config.json: rates, epochs, sampling and, unless stages are named after them, rewards.
    """
    if stage not in STAGES:
        return stage
    if stage in ALGORITHMS:
        name = algorithm = stage
    else:
        algorithm = cfg.algorithm
        front = "" if algorithm == type(cfg).algorithm else f"{algorithm}_"
        name = {"rl": algorithm, "rl_zero": f"{algorithm}_zero"}.get(stage, f"{front}{stage}")
    wanted = {switch: getattr(type(cfg), switch) for switch in SWITCHES}
    wanted |= ALGORITHMS[algorithm] | REWARDS.get(stage, {})
    used = of_stage(cfg, stage)
    other = [f"{switch}={getattr(used, switch)}" for switch in wanted if getattr(used, switch) != wanted[switch]]
    return f"{name}[{','.join(other)}]" if other else name


def labels(cfg, stages):
    """{stage: its label}. Raises ValueError when two of them are one setting."""
    settings = {}
    for stage in stages:
        # What asks for tags alone is another setting; the name of the algorithm that set the switches is none.
        used = (stage == "rl_zero", replace(of_stage(cfg, stage), algorithm="")) if stage in STAGES else stage
        if used in settings:
            raise ValueError(f"--stage={','.join(stages)}: {settings[used]} and {stage} are one setting, "
                             f"{label(cfg, stage)}; name it once")
        settings[used] = stage
    return {stage: label(cfg, stage) for stage in stages}


def check(cfg, need):
    """need(ok, name, expected) raises; returns notes on switches that have no effect."""
    need(not cfg.bound or cfg.bound >= 1 + cfg.clip_high, "bound", f"be 0 or at least 1 + --clip-high={cfg.clip_high}")
    whole = cfg.baseline in ("batch", "critic")         # rewards are compared with those of other groups
    need(cfg.group >= 2 or whole, "group",
         "be at least 2: a group of one has no baseline but itself (--baseline=batch and critic need none)")
    need(cfg.std != "group" or not whole, "baseline", "come with --std=batch or --std=none")
    need(cfg.combine == "sum" or cfg.baseline == "mean", "baseline", "be mean with --combine=each")
    need(not cfg.refill or not (whole or cfg.combine == "each"), "refill",
         "be 0 where groups of equal rewards teach something too")
    need(not cfg.refill or cfg.flat == "drop", "flat", "be drop with --refill, which replaces flat groups")
    notes = []

    def idle(names, why):
        moved = [name for name in names if getattr(cfg, name) != getattr(type(cfg), name)]
        if moved:
            said = " and ".join(f"--{name.replace('_', '-')}" for name in moved)
            notes.append(f"{said} {'have' if len(moved) > 1 else 'has'} no effect {why}")

    if cfg.epochs * cfg.mini_batches == 1:
        idle(("clip_low", "clip_high", "bound", "kl_stop", "ratio"), "with one update a rollout: every ratio is 1")
    elif cfg.loss == "cispo":
        idle(("bound",), "with --loss=cispo")
    elif cfg.loss == "sapo":
        idle(("clip_low", "clip_high", "bound"), "with --loss=sapo, which fades out instead of clipping")
    if not cfg.kl_coef:
        idle(("kl", "kl_in", "kl_target", "ref_sync"), "without --kl-coef")
    elif cfg.kl == "k1" and cfg.kl_in == "loss":
        notes.append("--kl=k1 in the loss has a gradient that is zero in expectation; --kl-in=reward is where it works")
    if cfg.baseline != "critic":
        idle(("critic", "gamma", "lam", "value_lr", "value_coef", "value_clip", "return_norm", "bootstrap"),
             "without --baseline=critic")
    if cfg.combine == "each":
        idle(("std",), "with --combine=each, which divides each reward by its group's deviation")
    if cfg.correct == "none":
        idle(("correct_cap", "correct_level"), "without --correct")
    if ".py:" not in cfg.rewards:
        idle(("reward_timeout", "reward_errors"), "without a reward of one's own")
    return notes
