"""What the papers' algorithms set, and which switches make no sense together.

An algorithm is a value of `Algorithm`, whose defaults are those of `grpo_token`. None sets the policy's learning rate,
epochs or mini-batches. What a stage of reinforcement learning made is called by its algorithm everywhere, and no two
settings share a name: `label`.
"""
import math
from dataclasses import dataclass, fields

from data import chat
from model.runs.config import change, check_fields, choice, flag, get, need, number
from rl.advantages import BASELINES, CONSTANTS
from rl.learner import CRITICS
from rl.losses import LOSSES, NORMS
from rl.rewards import RewardOptions, Rewards


@dataclass(frozen=True)
class Algorithm:
    """what an algorithm sets (rl/algorithms.py has the papers)"""
    loss: str = choice("clip", *LOSSES)             # PPO's and GRPO's clip | CISPO | SAPO
    ratio: str = choice("token", "sequence")        # importance ratio of each token | of the sequence (GSPO)
    clip_low: float = number(0.2, "[0, 1]")         # ratio clip below; acts from a rollout's second update on
    clip_high: float = number(0.2, "[0, 1000000]")  # ratio clip above
    bound: float = number(0.0, "[0, 1000000]")      # largest ratio before a negative advantage (dual clip); 0: none
    norm: str = choice("token", *NORMS)             # what counts alike: rl/losses.py has the table
    baseline: str = choice("mean", *BASELINES)      # group's mean | others' (RLOO) | REINFORCE++ | PPO | 0 | 1 | pass@k
    pass_k: int = number(4, "[1, 10000]")           # k of --baseline=pass_at_k, which raises the expected pass@k
    flat: str = choice("drop", "count")             # groups of equal rewards: left out | denominators only
    std: str = choice("group", "batch", "none")     # advantages over its deviation | the batch's | undivided
    combine: str = choice("sum", "each")            # rewards summed, then normalised | each first (GDPO)
    kl: str = choice("k3", "k1", "k2", "exact")     # to the starting policy: estimator | over the vocabulary
    kl_coef: float = number(0.0, "[0, 1000000]")    # its coefficient
    kl_in: str = choice("loss", "reward")           # where the penalty on KL goes
    kl_target: float = number(0.0, "[0, 1000000]")  # nats a token that the coefficient adapts to; 0: it is fixed
    ref_sync: int = number(0, "[0, 1000000000]")    # rollouts until the reference becomes the policy; 0: never
    entropy_coef: float = number(0.0, "[0, 1000000]")  # bonus for entropy
    top_entropy: float = number(1.0, "(0, 1]")      # share of the tokens that train, those of highest entropy
    correct: str = choice("none", "truncate", "mask")  # weights against drift between sampling and update
    correct_cap: float = number(2.0, "[1, 1000000]")  # largest such weight
    correct_level: str = choice("token", "sequence")  # a weight for each token | for the whole sequence
    refill: int = number(0, "[0, 1024]")            # dynamic sampling: most further rollouts for flat groups
    drop_truncated: bool = False                    # completions that hit the budget do not train
    overlong_share: float = number(0.0, "[0, 1]")   # last share of the budget where the length penalty grows to -1
    kl_stop: float = number(0.0, "[0, 1000000]")    # nats a token from the old policy that end updates; 0: never
    critic: str = choice("shared", *CRITICS)        # head on the policy's decoder | detached | its own decoder
    gamma: float = number(1.0, "[0, 1]")            # discount
    lam: float = number(0.95, "[0, 1]")             # of GAE
    value_lr: float = number(1.0, "(0, 10000]")     # critic's learning rate, in units of the policy's
    value_coef: float = number(0.5, "[0, 1000000]")  # of its loss
    value_clip: float = number(0.2, "[0, 1000000]")  # of its change in a rollout; 0: none
    return_norm: bool = False                       # critic in units of the returns seen so far
    bootstrap: bool = False                         # completions that hit the budget keep the critic's value

    def __post_init__(self):
        check_fields(self)
        need(not self.bound or self.bound >= 1 + self.clip_high, "bound", self.bound,
             f"be 0 or at least 1 + --clip-high={self.clip_high}")
        need(self.std == "none" or self.baseline not in CONSTANTS, "baseline", self.baseline, "come with --std=none")
        need(self.std != "group" or not self.compares_groups, "baseline", self.baseline,
             "come with --std=batch or --std=none")
        if self.baseline == "pass_at_k":        # divides by a deviation of its own, and only knows right and wrong
            need(self.std == "group", "std", self.std, "be group with --baseline=pass_at_k")
            need(not self.overlong_share, "overlong_share", self.overlong_share, "be 0 with --baseline=pass_at_k")
            need(not self.kl_coef or self.kl_in == "loss", "kl_in", self.kl_in, "be loss with --baseline=pass_at_k")
        need(self.combine == "sum" or self.baseline == "mean", "baseline", self.baseline,
             "be mean with --combine=each")
        need(not self.refill or not (self.compares_groups or self.combine == "each"), "refill", self.refill,
             "be 0 where groups of equal rewards teach something too")
        need(not self.refill or self.flat == "drop", "flat", self.flat,
             "be drop with --refill, which replaces flat groups")

    @property
    def compares_groups(self):
        """Whether rewards are compared with those of other groups, or with a constant, so that a group of one can
        teach."""
        return self.baseline in ("batch", "critic", *CONSTANTS)

    @property
    def without_advantage(self):
        """The reward of completions that teach nothing; nan where it takes a comparison to tell."""
        return CONSTANTS.get(self.baseline, math.nan)


ALGORITHMS = {
    # The main stage's: GRPO with each token counting alike (arXiv 2503.14476, eq. 8), without KL, over the groups that
    # are not flat
    "grpo_token": Algorithm(),
    # arXiv 2402.03300, eq. 3, 4; beta as there
    "grpo": Algorithm(norm="sequence", flat="count", kl_coef=0.04),
    # arXiv 2503.20783: neither length nor deviation divides
    "dr_grpo": Algorithm(norm="constant", std="none", flat="count"),
    # arXiv 2503.14476: clip-higher, tokens of the step, soft penalty (there on a fifth of the budget), dynamic
    # sampling; here a group is left out when its whole reward is flat, there when its correctness is
    "dapo": Algorithm(clip_high=0.28, refill=3, overlong_share=0.2),
    # arXiv 2507.18071, eq. 5, 7; clips of section 5.1
    "gspo": Algorithm(ratio="sequence", norm="sequence", clip_low=3e-4, clip_high=4e-4, flat="count"),
    # arXiv 2506.13585, eq. 4, 5: no lower clip; the upper one is tuned there and not told; PPO's
    "cispo": Algorithm(loss="cispo", clip_low=1.0, flat="count"),
    # arXiv 2511.20347, eq. 5
    "sapo": Algorithm(loss="sapo", norm="sequence", flat="count"),
    # arXiv 2602.05261: GSPO whose sequences count by their length
    "luspo": Algorithm(ratio="sequence", norm="sum", clip_low=3e-4, clip_high=4e-4, flat="count"),
    # arXiv 2402.14740, eq. 1, 9: KL in the reward; the clip matters from the second update of a rollout on
    "rloo": Algorithm(baseline="leave_one_out", std="none", norm="sum", kl="k1", kl_in="reward", kl_coef=0.03,
                      flat="count"),
    # arXiv 2501.03262, eq. 5-7
    "reinforce++": Algorithm(baseline="batch", std="batch", kl="k1", kl_in="reward", kl_coef=0.01),
    # arXiv 1707.06347, with KL in the reward (arXiv 2203.02155, section 3.5) and whitened advantages, as RLHF's code
    "ppo": Algorithm(baseline="critic", std="batch", kl="k1", kl_in="reward", kl_coef=0.01, value_lr=10.0),
}

# Two rewards, each without the gate and with it: what the format reward does, and what the gate does.
REWARD_STAGES = {
    "right": RewardOptions(rewards="correctness:1", gated=False),
    "right_gated": RewardOptions(rewards="correctness:1", gated=True),
    "format": RewardOptions(rewards="correctness:1,format:0.1", gated=False),
    "format_gated": RewardOptions(rewards="correctness:1,format:0.1", gated=True),
}

# Arms that are `grpo_token` with some options changed, and are given its FLOPs: name -> these options.
ONE_OR_ZERO = dict(rewards="correctness:1", gated=True, std="none")     # right and well-formed, or not
ARMS = {
    "grpo_token_kl": dict(kl_coef=0.04),
    # REINFORCE: from the right completions, or (arXiv 2506.01347) from the wrong ones
    "reinforce": ONE_OR_ZERO | dict(baseline="zero"),
    "negative": ONE_OR_ZERO | dict(baseline="one"),
    # many short rounds of fine-tuning on the model's own right completions: with its ratio held at 1, CISPO's loss is
    # their log-likelihood
    "rejection_iterated": ONE_OR_ZERO | dict(baseline="zero", loss="cispo", clip_low=0.0, clip_high=0.0,
                                             mini_batches=2, epochs=2),
    # on-policy distillation (arXiv 2306.13649, reverse KL on the student's own samples): no reward, and as reference a
    # teacher, --distill-from
    "distilled": dict(rewards="correctness:0", std="none", kl="exact", kl_coef=1.0),
    # a quarter of the default rate
    "rl_slow": dict(rl_lr=1.25e-4),
    # short walks first
    "rl_curriculum": dict(curriculum=True),
    # pass@k in place of pass@1 (arXiv 2508.10751)
    "rl_pass_at_k": dict(baseline="pass_at_k"),
}

# Stages that learn from a part of the questions: name -> (part, options).
OF_PARTS = {
    "rl_walks": ("walks", {}), "rl_kl_walks": ("walks", ARMS["grpo_token_kl"]),
    "rl_looks": ("looks", {}), "rl_kl_looks": ("looks", ARMS["grpo_token_kl"]),
}

# Stages of one algorithm that start elsewhere, and what that adds to its name.
STARTS = {"rl_zero": "_zero", "rl_from_base": "_from_base", "rl_from_o1": "_from_o1"}
# All stages of train.py that are reinforcement learning.
STAGES = ("rl", *STARTS, *ALGORITHMS, *REWARD_STAGES, *ARMS, *OF_PARTS)


@dataclass(frozen=True)
class RlOptions:
    """the loop of reinforcement learning"""
    algorithm: str = choice("grpo_token", *ALGORITHMS)  # sets the switches below; flags override it
    rl_steps: int = number(150, "[0, 1000000000]")  # rollouts
    rl_batch: int = number(32, "[1, 1000000]")      # prompts a rollout
    rl_lr: float = number(5e-4, "(0, 10000]")       # peak learning rate
    epochs: int = number(1, "[1, 10000]")           # passes over a rollout
    mini_batches: int = number(1, "[1, 10000]")     # optimizer steps a pass, at most
    bad_steps: int = number(3, "[1, 1000000]")      # losses or gradients in a row, not finite, that end the run
    method: str = choice(*chat.ASKED)               # how a model that learned no chains is asked: chat.py's PROMPTS
    curriculum: bool = False                        # drawn scenes: prompts of few hops first, all from half time on
    distill_from: str = "perfect"                   # of stage distilled the teacher: a stage of the run, or FILE.pt

    def __post_init__(self):
        check_fields(self)
        need(self.rl_batch % self.mini_batches == 0, "rl_batch", self.rl_batch,
             f"be a multiple of --mini-batches={self.mini_batches}")


# ---------------------------------------------------------------- the setting of a stage, and its name

def of_flags(given):
    """{option: value} that the algorithm among the flags given sets; other flags override it."""
    algorithm = ALGORITHMS.get(given.get("algorithm"))
    return vars(algorithm) if algorithm else {}


def switches_of(stage):
    """{option: value} that the name of a stage stands for; {} for none."""
    if stage in ALGORITHMS:
        return vars(ALGORITHMS[stage])
    if stage in REWARD_STAGES:
        return dict(rewards=REWARD_STAGES[stage].rewards, gated=REWARD_STAGES[stage].gated)
    if stage in OF_PARTS:
        return OF_PARTS[stage][1]
    return ARMS.get(stage, {})


def of_stage(cfg, stage):
    """The config of a stage: one named after an algorithm, rewards or an arm has their switches, but for flags that
    were given."""
    switches = switches_of(stage)
    given = cfg.run.flags.split()
    return change(cfg, **{name: value for name, value in switches.items() if name not in given})


def label(cfg, stage):
    """What the results of a stage are called in tables, plots and files: one name for one setting.

    A supervised stage has its own name. One of reinforcement learning is called by its algorithm, and by the switches
    in which it differs from that, "grpo[kl_coef=0.0]"; one that only asks for the tags "grpo_token_zero"; one named
    after rewards, or an arm, by that name, behind its algorithm's unless that is the default. What all stages of a run
    share is in its config.json: rates, epochs, sampling and, unless stages are named after them, rewards.
    """
    if stage not in STAGES:
        return stage
    algorithm = stage if stage in ALGORITHMS else cfg.rl.algorithm
    default = type(cfg.rl).algorithm
    if stage in (*REWARD_STAGES, *ARMS, *OF_PARTS):
        name = stage if algorithm == default else f"{algorithm}_{stage}"
    elif stage in STARTS:
        name = algorithm + STARTS[stage]
    else:
        name = algorithm
    wanted = vars(ALGORITHMS[algorithm]) | switches_of(stage)
    used = of_stage(cfg, stage)
    differing = [f"{switch}={get(used, switch)}" for switch in wanted if get(used, switch) != wanted[switch]]
    return f"{name}[{','.join(differing)}]" if differing else name


def labels(cfg, stages):
    """{stage: its label}. Raises ValueError when two of them are one setting."""
    settings = {}
    for stage in stages:
        setting = stage
        if stage in STAGES:
            # What starts elsewhere, or learns from other questions, is another setting; the name of the algorithm that
            # set the switches is none.
            used = of_stage(cfg, stage)
            part, _ = OF_PARTS.get(stage, ("", {}))
            setting = (STARTS.get(stage, ""), part, stage == "distilled", used.algorithm, used.reward, used.rl)
        if setting in settings:
            asked = f"--compare={cfg.run.compare}" if cfg.run.stage == "all" else f"--stage={','.join(stages)}"
            raise ValueError(f"{asked}: {settings[setting]} and {stage} are one setting with these flags, "
                             f"{label(cfg, stage)}; name it once, or leave out the flag that makes them one")
        settings[setting] = stage
    return {stage: label(cfg, stage) for stage in stages}


YES_OR_NO = ("correctness", "format", "format_think", "format_llava_cot", "consistency")    # rewards of 0 or 1


def check_pass_at_k(cfg):
    """Raises ValueError, one sentence, where --baseline=pass_at_k can teach nothing."""
    switches = cfg.algorithm
    if switches.baseline != "pass_at_k":
        return
    need(switches.pass_k < cfg.sampling.group, "pass_k", switches.pass_k,
         f"lie below --group={cfg.sampling.group} with --baseline=pass_at_k, which compares sets of k completions of "
         "a group")
    for name, weight in Rewards(cfg.reward).weights.items():
        binary = name in YES_OR_NO and weight > 0
        need(binary or weight == 0, "rewards", cfg.reward.rewards,
             f"hold with --baseline=pass_at_k only {', '.join(YES_OR_NO)}, or others of weight 0: right is what earns "
             "all of them in full")


def check_distilled(cfg):
    """Raises ValueError, one sentence, where the switches of stage distilled leave no distillation."""
    switches = cfg.algorithm
    is_exact = (switches.kl, switches.kl_in) == ("exact", "loss")
    need(is_exact, "kl", switches.kl, "be exact, and --kl-in loss, with the stage distilled")
    need(switches.kl_coef > 0, "kl_coef", switches.kl_coef,
         "be above 0 with the stage distilled, which learns from nothing else")
    need(not switches.ref_sync, "ref_sync", switches.ref_sync,
         "be 0 with the stage distilled, whose reference is the teacher: it would become the student")
    need(cfg.rl.distill_from not in ("clip", "distilled"), "distill_from", cfg.rl.distill_from,
         "be a stage with a language model that comes before distilled, or a checkpoint")


# ---------------------------------------------------------------- switches that have no effect together

def idle_notes(cfg):
    """Notes, one sentence each, on switches of a config that were moved although they have no effect there."""
    switches = cfg.algorithm
    notes = []

    def note(names, why):
        defaults = {option.name: option.default for option in fields(Algorithm) + fields(RewardOptions)}
        moved = [flag(name) for name in names if get(cfg, name) != defaults[name]]
        if moved:
            verb = "have" if len(moved) > 1 else "has"
            notes.append(f"{' and '.join(moved)} {verb} no effect {why}")

    if cfg.rl.epochs * cfg.rl.mini_batches == 1:
        note(("clip_low", "clip_high", "bound", "kl_stop", "ratio"), "with one update a rollout: every ratio is 1")
    elif switches.loss == "cispo":
        note(("bound",), "with --loss=cispo")
    elif switches.loss == "sapo":
        note(("clip_low", "clip_high", "bound"), "with --loss=sapo, which fades out instead of clipping")
    if not switches.kl_coef:
        note(("kl", "kl_in", "kl_target", "ref_sync"), "without --kl-coef")
    elif switches.kl == "k1" and switches.kl_in == "loss":
        notes.append("--kl=k1 in the loss has a gradient that is zero in expectation; --kl-in=reward is where it works")
    if switches.baseline != "critic":
        note(("critic", "gamma", "lam", "value_lr", "value_coef", "value_clip", "return_norm", "bootstrap"),
             "without --baseline=critic")
    if switches.baseline != "pass_at_k":
        note(("pass_k",), "without --baseline=pass_at_k")
    if switches.combine == "each":
        note(("std",), "with --combine=each, which divides each reward by its group's deviation")
    if switches.correct == "none":
        note(("correct_cap", "correct_level"), "without --correct")
    if ".py:" not in cfg.reward.rewards:
        note(("reward_timeout", "reward_errors"), "without a reward of one's own")
    return notes
