"""Teach a vision-language model to see, to answer, and to reason. Every stage is a function here; its loops train.

    python train.py                                    # everything from nothing, then the comparison
    python train.py --compare=all                      # more arms: rejection sampling, direct answers, flawless chains
    python train.py --seeds=5                          # mean and spread over seeds 0-4
    python train.py --data=monitors                    # drawn patient monitors in place of scenes
    python train.py --data=images:DIR                  # your own folder of class sub-folders of pictures
    python train.py --data=jsonl:FILE                  # your own questions and answers
    python train.py --preset=llava-1.5-7b --data=llava:FILE --image-root=DIR       # a published recipe
    python train.py --stage=rl --init=out/NAME/cot.pt  # one stage, from a checkpoint
    python train.py --preset=routes                    # staged prompting, LLaVA-o1, RL: three routes to reasoning
    python train.py --preset=generalisation            # post-training on some kinds of question, tested on the others
    python train.py --stage=teach --teacher=http://HOST/v1 --teacher-model=NAME --records=FILE --data=jsonl:FILE
                                                       # a teacher's chains of thought, checked, into --records
    python train.py --grid="norm=token,sequence;kl_coef=0,0.04" --seeds=3      # an ablation: every combination
    python train.py --resume                           # go on with the last interrupted run
    python train.py --preset=bench                     # where the time of an RL step goes; bench-7b: larger

What the default reinforcement learning, `grpo_token`, leaves out of GRPO (arXiv 2402.03300): the KL penalty and its
reference; more than one optimizer step a rollout, so every importance ratio is 1 and the clip never acts; the mean over
each completion: the loss is averaged over all tokens (DAPO's, arXiv 2503.14476, eq. 8); groups whose rewards are all
equal. What remains is REINFORCE with (reward - mean of the group) / (deviation of the group) as advantage.
`--algorithm=grpo` and the others put back what their papers have.

A stage is a function (run, name, cfg, origin) -> None. Read fit and reinforce, the two loops, first.
"""
import hashlib
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
from data import augment, chat, llava, monitors, preview, scenes, teachers, teaching, tokenizer, transfer
from data.digit_probe import digit_probe
from data.prompting import METHODS
from data.records import RecordFile, export_llava
from data.sample import Sample, batch_indices, collate
from data.shape_probe import shape_probe
from data.supply import STREAMS, DataOptions, Supply, source_of
from data.teachers import TeacherOptions
from data.teaching import RecordOptions, kind_of
from data.worlds import DRAWN
from eval import Contender, JudgeOptions
from kernels.bench import ceilings
from model import cards, machine, memory, parallel, prepare, sharding, watchdog
from model.clip import Clip, ClipConfig, ClipOptions, contrastive_loss
from model.flops import Meter
from model.generate import Sampler
from model.hub import pretrained
from model.hub.export import export_folder
from model.llama import LlmOptions
from model.lora import LoraOptions
from model.mixed import in_dtype
from model.optim import (OptimOptions, diverged, learning_rate, make_optimizer, optimizer_step, seed_of, show_trained,
                         stepper)
from model.parallel import ParallelOptions
from model.runs import checkpoint
from model.runs.config import (adopt, change, check_fields, choice, describe, first_line, flat, from_command_line, need,
                               number)
from model.runs.device import MachineOptions, pick_device, pick_dtype
from model.runs.environment import add, environment
from model.runs.folder import RunFolder, choose, resumed, write_json
from model.runs.grid import group_of, name_of, planned, read_cells
from model.runs.presets import PRESETS
from model.runs.seeds import run_all, run_seeds
from model.vlm import VLM, VlmConfig, VlmOptions
from rl import algorithms, bench, curriculum, forecast, metrics, peers
from rl.algorithms import Algorithm, RlOptions
from rl.explain import explanation, formless_advice, preflight_text
from rl.learner import Guard, make_learner
from rl.live import Live
from rl.recorder import FOLLOWED, InspectOptions, Recorder
from rl.report import generalisation, growth, ladder
from rl.report import grid as grid_report
from rl.report import page
from rl.report import seeds as seeds_report
from rl.report import statistics
from rl.report.log import read_log, read_rows
from rl.report.matched import frontier, matched_text
from rl.rewards import RewardOptions, Rewards, correctness
from rl.rewards import format as format_reward
from rl.rollout import SamplingOptions, prompts, roll_out
from rl.search import Search
from rl.staged import answer_in_stages
from rl.types import Experience, Rollout
from rl.update import estimate_advantages, score, select_groups, update

# What --compare adds to clip, align, sft and, but for the routes, cot.
COMPARISONS = {
    "none": ["rl"],
    "basic": ["rl", "cot_continued", "filtered"],
    "all": ["rl", "cot_continued", "filtered", "rejection_first", "rejection", "sft_direct", "perfect", "rl_zero"],
    "algorithms": ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo"],
    "rewards": [*algorithms.REWARD_STAGES],
    "routes": ["rl_from_base", "llava_o1", "llava_o1_blind", "rl_from_o1"],
    # all after cot at RL's FLOPs: they differ in where samples come from, their sign, KL, a teacher model
    "evidence": ["rl", "grpo_token_kl", "reinforce", "negative", "rejection_first", "rejection", "rejection_iterated",
                 "cot_continued", "filtered", "sft_direct", "perfect", "distilled"],
    # each on only the walks and on only the looks; then tested on all: world transfer
    "generalisation": [f"{arm}_{part}" for part in transfer.PARTS for arm in
                       ("rl", "rl_kl", "filtered", "replay", "rejection", "continued", "gold")],
    # --world=long_walks: does thinking grow? RL, and what may make it grow more
    "long_walks": ["rl", "rl_slow", "rl_curriculum", "rl_pass_at_k", "filtered", "cot_continued"],
}


TUNING_SEEDS = 100          # the first of the seeds that --tune may use


def rates_of(text):
    """--rates -> {stage: learning rate}. Raises ValueError for anything but NAME:RATE,NAME:RATE."""
    rates = {}
    for entry in filter(None, text.split(",")):
        name, _, rate = entry.partition(":")
        need(name not in rates, "rates", text, f"hold one rate for {name}")
        try:
            rates[name] = float(rate)
        except ValueError:
            raise ValueError(f"--rates={text}: {entry!r} must be NAME:RATE, as in llava_o1:5e-4") from None
        need(0 < rates[name] <= 10000, "rates", text, "hold rates in (0, 10000]")
    return rates


@dataclass(frozen=True)
class RunOptions:
    """what to run"""
    preset: str = ""                                # model/runs/presets.py has them; empty: by what else is given
    stage: str = "all"                              # all, or some of them in order, as in clip,align,sft | teach
    init: str = ""                                  # checkpoint the first stage starts from
    compare: str = choice("basic", *COMPARISONS)    # which methods are compared: COMPARISONS has them
    export: str = ""                                # hf:DIR: the last stage's model | of teach llava_cot:OUT.json
    out: str = ""                                   # run folder; empty: a new one under out/
    resume: bool = False                            # go on with the interrupted run in --out (empty: the newest)
    tensorboard: bool = False                       # log.jsonl's numbers also into the run folder's tensorboard/
    save_every: int = number(100, "[1, 1000000000]")  # steps between checkpoints inside a stage
    seed: int = number(0, "[0, 2147483647]")        # decides everything random
    rates: str = ""                                 # learning rates of stages, NAME:RATE,..; empty: each stage's own
    tune: str = ""                                  # choose these stages' rates from a ladder, NAME,..; then stop
    curve: int = number(0, "[0, 1000]")             # n: evaluate every arm at n points of its training, drawn scenes
    seeds: int = number(0, "[0, 10000]")            # n: run n seeds from --seed on, report mean and spread
    grid: str = ""                                  # an ablation, NAME=VALUE,VALUE;NAME=..: every combination
    jobs: int = number(1, "[1, 1024]")              # runs side by side, of seeds and grids; they share the threads
    explain: int = number(0, "[0, 10000]")          # n: print n prompts' completions, rewards, advantages; stop
    bench: str = choice("", "step", "decode", "prefix")  # time an RL step | a rollout | what sharing prompts saves
    flags: str = ""                                 # names of the flags that were given; filled in by itself

    def __post_init__(self):
        check_fields(self)
        need(not self.seeds or not (self.explain or self.bench), "seeds", self.seeds,
             "be left out beside --explain and --bench, which train nothing")
        need(not (self.resume and self.explain), "explain", self.explain,
             "be left out beside --resume; --stage=rl --init=FILE starts from a checkpoint of the run")
        rates_of(self.rates)
        need(not self.tune or not (self.seeds or self.explain or self.bench), "tune", self.tune,
             "be left out beside --seeds, --explain and --bench")
        need(not self.tune or self.seed >= TUNING_SEEDS, "seed", self.seed,
             f"be at least {TUNING_SEEDS} with --tune: the seeds below are for what is reported")
        need(not self.grid or not (self.tune or self.explain or self.bench), "grid", self.grid,
             "be left out beside --tune, --explain and --bench")
        need(self.seed + self.seeds <= 2 ** 31, "seed", self.seed,
             f"leave room for --seeds={self.seeds} below 2147483648")


@dataclass(frozen=True)
class SupervisedOptions:
    """supervised stages"""
    clip_steps: int = number(700, "[0, 1000000000]")  # optimizer steps
    clip_batch: int = number(96, "[2, 1000000]")    # pairs
    clip_lr: float = number(1e-3, "(0, 10000]")     # peak learning rate
    align_steps: int = number(480, "[0, 1000000000]")  # optimizer steps
    align_lr: float = number(2e-3, "(0, 10000]")    # peak; from nothing the decoder learns language here as well
    align_batch: int = number(0, "[0, 1000000]")    # records a step; 0: --batch
    align_epochs: float = number(0.0, "[0, 100000]")  # passes over align's records, in place of steps; 0: steps
    sft_steps: int = number(200, "[0, 1000000000]")  # optimizer steps; 0 skips the stage
    sft_epochs: float = number(0.0, "[0, 100000]")  # passes over sft's records, in place of steps; 0: steps
    sft_lr: float = number(2e-3, "(0, 10000]")      # peak learning rate
    cot_steps: int = number(700, "[0, 1000000000]")  # optimizer steps; 0 skips the stage
    cot_lr: float = number(2e-3, "(0, 10000]")      # peak learning rate
    batch: int = number(32, "[1, 1000000]")         # samples a step

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Config:
    """All options of a run, in groups that stand beside the code that reads them."""
    run: RunOptions = RunOptions()
    machine: MachineOptions = MachineOptions()
    parallel: ParallelOptions = ParallelOptions()
    data: DataOptions = DataOptions()
    teacher: TeacherOptions = TeacherOptions()
    records: RecordOptions = RecordOptions()
    clip: ClipOptions = ClipOptions()
    vlm: VlmOptions = VlmOptions()
    llm: LlmOptions = LlmOptions()
    lora: LoraOptions = LoraOptions()
    supervised: SupervisedOptions = SupervisedOptions()
    optim: OptimOptions = OptimOptions()
    rl: RlOptions = RlOptions()
    sampling: SamplingOptions = SamplingOptions()
    algorithm: Algorithm = Algorithm()
    reward: RewardOptions = RewardOptions()
    inspect: InspectOptions = InspectOptions()
    judge: JudgeOptions = JudgeOptions()

    @property
    def pretrained(self):
        """Whether --clip, --llm or --llava names a model of others."""
        return bool(self.clip.clip or self.llm.llm or self.vlm.llava)

    def stages(self):
        """Names of the stages of this run, in order."""
        if self.run.stage != "all":
            return self.run.stage.split(",")
        stages = []
        if not (self.vlm.llava or self.clip.clip):
            stages.append("clip")
        if not self.vlm.llava:
            stages.append("align")
        if self.supervised.sft_steps or self.supervised.sft_epochs:
            stages.append("sft")
        if self.data.data.startswith("llava:"):
            return stages
        if self.supervised.cot_steps and self.run.compare != "routes":
            stages.append("cot")
        return [*stages, *COMPARISONS[self.run.compare]]

    def check_teach(self):
        """As `check`, of --stage=teach."""
        kind, _, out = self.run.export.partition(":")
        need(self.records.records, "records", self.records.records, "name the file that the teacher's records go to")
        need(not self.run.export or kind == "llava_cot" and out, "export", self.run.export,
             "be llava_cot:OUT.json with --stage=teach")
        need(not out or Path(out).parent.is_dir(), "export", self.run.export, "lie in a folder that exists")
        need(not self.run.seeds and not self.run.tune, "stage", "teach", "come without --seeds and --tune")
        need(self.data.world == "grid", "world", self.data.world, "be grid with --stage=teach")
        need(self.data.data != "monitors", "data", "monitors",
             "be scenes, images:DIR, jsonl:FILE or a source of your own with --stage=teach")
        return []

    def check_rates(self, stages):
        """As `check`, of --rates and --tune."""
        for name in rates_of(self.run.rates):
            need(name in STAGES, "rates", self.run.rates, f"name stages of train.py's STAGES; {name!r} is none")
        for name in filter(None, self.run.tune.split(",")):
            need(name in stages, "tune", self.run.tune, f"name stages of this run, among {', '.join(stages)}; {name!r} "
                 "is none")
            need(name not in ("clip", "align"), "tune", self.run.tune,
                 f"name stages that answer questions; {name!r} is none")
            _, part, _ = generalisation.trained_on(name, transfer.PARTS)
            need(part or self.data.world != "transfer", "tune", self.run.tune,
                 f"name stages that learn from a part of the questions with --world=transfer; {name!r} does not, and "
                 "no split there is like its training")
        need(not self.run.tune or self.data.eval_set == "val", "eval_set", self.data.eval_set,
             "be val with --tune: nothing is tuned on test prompts")

    def check_curve(self, parts, source):
        """As `check`, of --curve. parts: those of the questions that stages learn from."""
        if not self.run.curve:
            return
        need(source in DRAWN, "curve", self.run.curve,
             "be 0 with data of your own, which has no validation prompts beside those that are reported")
        need(not parts, "curve", self.run.curve,
             "be 0 with stages of a part of the questions: its points are chosen by prompts of the first split, which "
             "not every one of them learns from")
        need(self.run.tune or self.data.eval_set == "test", "curve", self.run.curve,
             "be 0 with --eval-set=val: its best points are chosen by those prompts, and would be reported on them")

    def check_world(self, parts, source):
        """As `check`, of --world and of the comparisons that are made for one. parts, source: as for `check_curve`."""
        compare = self.run.compare
        world = self.data.world if source == "scenes" else ""
        need(compare != "routes" or world == "grid", "compare", "routes",
             "come with drawn scenes of --world=grid, whose small skills the base learns")
        need(compare != "long_walks" or world == "long_walks", "compare", compare,
             "come with drawn scenes and --world=long_walks")
        need(world != "long_walks" or self.teacher.cot_format == "think", "cot_format", self.teacher.cot_format,
             "be think with --world=long_walks, whose looks and hops are read from thoughts")
        need(source in DRAWN or not self.data.replay, "replay", self.data.replay,
             "be 0 with data of your own, which has no captions and looking questions apart")
        if compare == "generalisation":
            need(world == "transfer", "compare", compare,
                 "come with drawn scenes and --world=transfer, from whose parts its arms learn")
            need(self.teacher.cot_format == "think", "cot_format", self.teacher.cot_format,
                 "be think with --compare=generalisation, which begins thoughts in its tags")
            need(self.rl.algorithm == RlOptions.algorithm, "algorithm", self.rl.algorithm,
                 f"be {RlOptions.algorithm} with --compare=generalisation, whose tables compare every arm with that")
        need(not parts or world == "transfer", "stage", self.run.stage,
             f"come with drawn scenes and --world=transfer, whose parts {', '.join(sorted(parts))} it learns from")

    def check(self):
        """Raises ValueError in one sentence about the first options that do not go together; returns notes on idle
        ones. What a group can tell by itself, it has checked."""
        stages = self.stages()
        if stages == ["teach"]:
            return self.check_teach()
        teacher = self.teacher.teacher
        need(kind_of(teacher) in ("own", "function"), "teacher", teacher,
             "be FILE.py:NAME(sample, rng), or come with --stage=teach --records=FILE")
        need(-self.clip.clip_layers <= self.vlm.feature_layer, "feature_layer", self.vlm.feature_layer,
             f"lie in [-{self.clip.clip_layers}, -1]")
        prepare.check(self, stages)
        if not (self.pretrained or self.run.init):          # else the shapes are those of what is loaded
            shape = VlmConfig(self.clip.config(vocab=1), self.llm.config(vocab=1), **self.vlm.shape())
            need(shape.image_tokens >= 1, "projector", self.vlm.projector, "make at least one token of a picture")
        source, _ = source_of(self.data.data)
        need(source != "llava" or not self.teacher.teacher, "teacher", self.teacher.teacher,
             "be left out with --data=llava:FILE, whose stages take no chains")
        need(source != "scenes" or self.clip.image_size == scenes.SIZE or self.run.bench, "image_size",
             self.clip.image_size, f"be {scenes.SIZE} for drawn scenes")
        need(source != "monitors" or self.clip.image_size == monitors.SIZE or self.run.bench, "image_size",
             self.clip.image_size, f"be {monitors.SIZE}, with --patch={monitors.CELL}, for drawn monitors")
        need(source != "monitors" or self.teacher.cot_format == "think", "cot_format", self.teacher.cot_format,
             "be think with --data=monitors, whose teacher writes no four sections")
        need(self.data.template != "brief" or self.rl.method == "asked", "method", self.rl.method,
             "be asked with --template=brief, whose models know no English")
        need(source != "monitors" or not self.data.skills, "skills", self.data.skills,
             "be false with --data=monitors: they are those of drawn scenes")
        for name in stages:
            need(name in STAGES, "stage", f"{self.run.stage}: {name!r}",
                 "be one of clip, align, sft, cot, rl and the others that train.py's STAGES names, or teach alone")
        need(not self.run.explain or self.run.stage in algorithms.STAGES, "explain", self.run.explain,
             "come with one stage of reinforcement learning, as in --stage=rl --init=FILE")
        need(self.rl.algorithm == RlOptions.algorithm or not {*stages} & {*algorithms.ALGORITHMS}, "algorithm",
             self.rl.algorithm, f"be {RlOptions.algorithm} where stages are named after algorithms")
        algorithms.labels(self, stages)
        parts = {part for part in transfer.PARTS for name in stages if name.endswith(f"_{part}")}
        self.check_rates(stages)
        self.check_curve(parts, source)
        self.check_world(parts, source)
        notes = []
        for stage in stages:
            variant = config_of(self, stage)
            group_can_teach = self.sampling.group >= 2 or variant.algorithm.compares_groups
            need(group_can_teach or stage not in algorithms.STAGES, "group", self.sampling.group,
                 "be at least 2: a group of one has no baseline but itself (--baseline=batch and critic need none)")
            if stage == "distilled":
                algorithms.check_distilled(variant)
            algorithms.check_pass_at_k(variant)
            need(source == "scenes" or not variant.rl.curriculum, "curriculum", variant.rl.curriculum,
                 f"be false with --data={self.data.data}: only drawn scenes have a difficulty, the hops of their walks")
            notes += algorithms.idle_notes(variant)
        return list(dict.fromkeys([*notes, *self.idle_notes(stages, source)]))

    def idle_notes(self, stages, source):
        """Notes on options that have no effect, or one that is easily overlooked."""
        notes = []
        if self.run.compare == "routes" and not (self.data.skills and self.teacher.cot_format == "llava_cot"):
            notes.append("--compare=routes is made for --skills=true --cot-format=llava_cot, as --preset=routes has "
                         "them: without them the base does not know what it is asked, or llava_o1 has other tags")
        if self.run.compare == "generalisation" and "cot" not in stages:
            notes.append("--compare=generalisation without the stage cot has nothing to hold gain and forgetting "
                         "against")
        rated = rates_of(self.run.rates)
        arms = [stage for stage in stages if is_arm(stage) and "rl_lr" not in algorithms.ARMS.get(stage, {})]
        unrated = [stage for stage in arms if stage not in rated]
        if unrated and len(unrated) < len(arms):
            notes.append(f"--rates has none for {', '.join(unrated)}: --rl-lr or --cot-lr holds, which beside rates "
                         "from a ladder is no fair comparison")
        rewards = Rewards(self.reward)
        if self.reward.gated and "correctness" in rewards.weights and "format" not in rewards.weights:
            notes.append("correctness is gated on the format although the format itself earns nothing")
        moved = {name for name, value in vars(self.teacher).items() if value != getattr(TeacherOptions, name)}
        if self.teacher.teacher and len(moved) > 1:
            notes.append("a --teacher of one's own makes its own mistakes: the rates of ours have no effect")
        elif source not in DRAWN and moved & {"slip", "confuse", "drop_hop"}:
            notes.append("--slip, --confuse and --drop-hop have no effect: they belong to the teachers of drawn "
                         "pictures")
        if self.data.augment and "clip" not in stages:
            notes.append("--augment has no effect without the stage clip, which trains a CLIP from nothing")
        if source != "scenes" and self.data.world != "grid":
            notes.append(f"--world has no effect with --data={self.data.data}: it is about drawn scenes")
        if self.rl.method != RlOptions.method and "cot" in stages:
            notes.append("--method has no effect on what learns after stage cot, which is asked as its chains were; "
                         "only the row before is asked so")
        if self.rl.distill_from != RlOptions.distill_from and "distilled" not in stages:
            notes.append("--distill-from has no effect without the stage distilled")
        replays = [stage for stage in stages if stage == "cot" or stage.startswith("replay_")]
        if self.data.replay and not replays:
            notes.append("--replay has no effect without the stage cot")
        if self.run.curve and self.run.tune:
            notes.append("--curve has no effect with --tune, which follows no arm")
        if self.vlm.queries and self.vlm.projector != "resampler":
            notes.append("--queries has no effect without --projector=resampler")
        if self.sampling.top_k or self.sampling.top_p < 1 or self.sampling.min_new and not self.run.bench:
            notes.append("--top-k, --top-p and --min-new sample from another distribution than the one whose log-probs "
                         "the update reads: its gradient is biased")
        return notes


# Options that what is loaded decides: those of CLIP, and of what lies behind it.
CLIP_SHAPE = ("image_size", "patch", "clip_width", "clip_layers", "clip_heads", "clip_stem", "clip_pool", "clip_act",
              "text_width", "text_layers", "text_heads", "text_length", "embed")
VLM_SHAPE = ("feature_layer", "projector", "queries", "image_positions", "width", "layers", "heads", "kv_heads", "ff",
             "theta", "eps", "tied", "qkv_bias", "vocab")


@dataclass
class Origin:
    """What a stage starts from.

    vlm: the model, ready to train in this stage; None where the stage makes its own. method: how the stage before it
    prompted, "" if it did not. towers: weights and config ("clip", "clip_config") of a CLIP with both towers, which
    checkpoints carry along for zero-shot answers; {} if there is none.
    """
    vlm: VLM = None
    method: str = ""
    towers: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains: steps, records or prompts a step, peak learning rate.

    budget: FLOPs after which it ends, instead of `steps`; 0 for none. The learning rate then follows their share.
    """
    steps: int
    batch: int
    peak: float
    budget: int = 0

    def share(self, step, spent):
        """Of the stage that `step` steps, which took `spent` FLOPs, are; 1 or more at its end."""
        if self.budget:
            return spent / self.budget
        return step / self.steps if self.steps else 1.0

    def rate(self, step, spent, warmup, final):
        """The learning rate of the next step."""
        if self.budget:
            return learning_rate(int(1000 * self.share(step, spent)), 1000, self.peak, warmup, final)
        return learning_rate(step, self.steps, self.peak, warmup, final)


class Run(RunFolder):
    """A run folder and what all of its stages share: config, device, data, tokenizer, rewards."""

    def __init__(self, cfg, folder, plan=None, bare=None):
        super().__init__(folder, pick_device(cfg.machine.device))
        self.cfg = cfg
        self.plan = plan                # VlmConfig of a pretrained model, told at the start
        self.memory = memory.Announcer(self.device, bare)
        self.dtype = pick_dtype(cfg.machine.dtype)
        self.supply = Supply(cfg.data, cfg.teacher, cfg.run.seed)
        self.samples = self.supply.samples
        self.real = self.supply.real
        self.records = self.supply.records
        self._rewards = {}
        self.bar = None                 # of the stage under way
        if self.supply.found:
            print(self.supply.found)

    def release(self):
        for rewards in self._rewards.values():
            rewards.close()
        super().release()

    def rewards(self, cfg):
        """The Rewards of a stage's config. Stages of equal options share them, and the processes behind them."""
        key = (cfg.reward, cfg.algorithm.overlong_share, cfg.sampling.max_new)
        if key not in self._rewards:
            self._rewards[key] = Rewards(*key)
        return self._rewards[key]

    def seed_of(self, stage, *purpose):
        """The seed of one purpose of a stage; the same at every rate of --tune."""
        return seed_of(self.cfg.run.seed, stage_of(stage), *purpose)

    def prepare_tokenizer(self):
        """From --init, --llava or --llm, or from the folder, else trained on what the training data says."""
        cfg = self.cfg
        saved = self.folder / "tokenizer.model"
        if cfg.run.init:
            state = checkpoint.load(cfg.run.init, self.device)
            self.tokenizer = tokenizer.from_saved(state["tokenizer"], f"the tokenizer in checkpoint {cfg.run.init!r}")
            if self.plan:               # a CLIP by itself, whose text tower reads the words of the decoder
                needed = pretrained.load_tokenizer(cfg.llm.llm)
                need(self.tokenizer.saved == needed.saved, "init", cfg.run.init,
                     f"have the tokenizer of --llm={cfg.llm.llm}, as a stage clip beside that flag has")
        elif cfg.vlm.llava or cfg.llm.llm:
            self.tokenizer = pretrained.load_tokenizer(cfg.vlm.llava or cfg.llm.llm)
        elif saved.exists():
            self.tokenizer = tokenizer.from_saved(saved.read_bytes(), f"the tokenizer {str(saved)!r}")
        else:
            self.tokenizer = tokenizer.train(*self.supply.corpus(), cfg.llm.vocab)
        if cfg.data.template == "auto":
            self.cfg = change(cfg, template=chat.template_for(self.tokenizer))

    def start(self, stage):
        """Seeds a stage and loads what it starts from, --init, --llava or the stage before -> Origin."""
        cfg = self.cfg
        machine.give_holes_back()       # that the stage before left
        torch.manual_seed(self.seed_of(stage))
        self.supply.begin(stage, read_log(self.log_path))
        if self.begins_with_llava(stage):
            vlm, _ = pretrained.load_llava(cfg.vlm.llava, self.dtype, self.device, cfg.clip.clip)
            return Origin(self.ready(vlm, stage))
        loads_clip = stage == "align" and cfg.clip.clip and not cfg.run.init
        if loads_clip or not STAGES[stage].starts_from:
            return Origin()
        state = checkpoint.load(self.path_before(stage), self.device)
        towers = {name: state[name] for name in ("clip", "clip_config") if name in state}
        if "vlm" not in state:
            return Origin(towers=towers)
        # Popped, so that what `ready` merges adapters into does not lie beside what was read.
        vlm = VLM.from_config(state["vlm_config"], state.pop("vlm"))
        return Origin(self.ready(vlm, stage), state.get("method", ""), towers)

    def begins_with_llava(self, stage):
        """Whether a stage starts from a whole pretrained model, --llava."""
        cfg = self.cfg
        return stage == cfg.stages()[0] and bool(cfg.vlm.llava)

    def path_before(self, stage):
        """The checkpoint that a stage starts from: --init for the first, and where that of the stage before is missing;
        else that. Raises ValueError where there is neither."""
        cfg = self.cfg
        paths = [self.path(name) for name in STAGES[stage].starts_from if self.path(name).exists()]
        is_first = stage == cfg.stages()[0]
        if cfg.run.init and (is_first or not paths):
            return Path(cfg.run.init)
        before = " or ".join(STAGES[stage].starts_from)
        need(paths, "stage", stage, f"have what it starts from, {before}, in {self.folder}, or --init=FILE")
        return paths[0]

    def ready(self, vlm, stage):
        """The model where and as the config wants it in this stage, with what does not train frozen."""
        return prepare.prepare(vlm, self.cfg, stage == "align").to(self.device, self.dtype)

    def optimizer(self, module, module_lr, critic=None, critic_lr=1.0):
        """AdamW as the options have it, over what trains in `module`."""
        optim = self.cfg.optim
        return make_optimizer(module, optim.beta2, optim.weight_decay, critic, critic_lr, module_lr, optim.moments,
                              optim.master)

    def usable(self, stage, records, indices, use):
        """What use(i, records[i]) makes of this rank's part of the indices, a list; records that cannot be used, of any
        rank, are logged once and left out."""
        faults = []

        def note(**line):
            faults.append(line)

        own = indices[parallel.own_rows(len(indices))]
        found = list(self.supply.usable(records, own, use, note))
        noted = {line["number"]: line for of_rank in parallel.gather(faults) for line in of_rank}
        for line in noted.values():
            self.supply.bad.note(line)
            self.log(stage=stage, **line)
        return found

    def surplus(self, vlm, micros):
        """How many micro-batches others have more than this rank: where weights lie in shards all gather them together,
        and a rank that has no more goes on with nothing."""
        if not sharding.is_sharded(vlm):
            return 0
        return max(parallel.gather(len(micros))) - len(micros)

    def preview(self, image_tokens):
        """A look at one's own records, for pictures of so many tokens."""
        return preview.Preview(self.supply, self.tokenizer, image_tokens, self.cfg.data, self.cfg.teacher)

    def announce(self, stage, vlm, cfg, longest, others=0, *, samples):
        """Prints what a stage will take of memory; longest: tokens of a record or prompt."""
        kept = self.supply.kept_pictures(vlm.config.clip.image_size)
        self.memory.stage(stage, vlm, cfg, longest, kept, others, samples=samples)

    def steps(self, stage, schedule, module, optimizer, meter, generator=None, snapshot=None):
        """Yields (step, learning rate) from where an interrupted stage stopped; draws the bar, saves on the way.

        snapshot(point): keeps the model at each point of --curve, 1 to the last but one, whose checkpoint the stage
        writes itself.
        """
        cfg = self.cfg
        points = 0 if cfg.run.tune else cfg.run.curve       # --tune follows no arm
        checks = cfg.parallel.check_ranks
        self.began = time.perf_counter()
        step = self.take_progress(stage, module, optimizer, meter, generator)
        share = schedule.share(step, meter.total)
        total = None if schedule.budget else schedule.steps
        self.bar = tqdm(desc=stage, initial=step, total=total, disable=None if self.is_writer else True, leave=False)
        while share < 1:
            sharding.begin_step(f"{stage}, step {step}", checks and step % checks == 0)
            yield step, schedule.rate(step, meter.total, cfg.optim.warmup, cfg.optim.final_lr)
            sharding.check_weights(module)
            step += 1
            self.bar.update()
            before = points_behind(points, share)
            share = schedule.share(step, meter.total)
            point = points_behind(points, share)
            if share < 1 and snapshot and is_arm(stage) and point > before:
                snapshot(point)
            if share < 1 and step % cfg.run.save_every == 0:
                self.save_progress(stage, step, module, optimizer, meter, generator)
        self.bar.close()

    def seconds(self):
        """Since the steps of the stage began, or went on."""
        return round(time.perf_counter() - self.began, 3)

    def snapshot(self, stage, cfg, method, meter, vlm, point):
        """A point of a stage's curve, for `compare_methods`; nothing is resumed from it."""
        path = self.point(stage, point)
        if self.is_writer:
            path.parent.mkdir(exist_ok=True)
        state = sharding.full_state(vlm, self.dtype)
        checkpoint.save(path, dict(stage=stage, vlm=state, vlm_config=vlm.config_dict(), method=method,
                                   config=flat(cfg), flops=meter.total, tokenizer=self.tokenizer.saved))

    def allowed(self, stage):
        """The FLOPs of a stage of reinforcement learning that is given those of others; 0, no limit, of one that is
        not, or where the run has not got them."""
        others = STAGES[stage_of(stage)].costs_like
        return self.spent(others) if all(self.path(other).exists() for other in others) else 0

    def point(self, stage, point):
        """The checkpoint of a point of --curve; the last one is that of the stage."""
        if point == self.cfg.run.curve:
            return self.path(stage)
        return self.folder / "curve" / f"{stage}-{point}.pt"

    def finish_stage(self, stage, cfg, method, meter, towers, vlm=None):
        """The stage's checkpoint, with the towers it started from carried along."""
        weights = {}
        if vlm is not None:
            weights = dict(vlm=sharding.full_state(vlm, self.dtype), vlm_config=vlm.config_dict())
        self.finish(stage, **towers, **weights, method=method, config=flat(cfg), flops=meter.total,
                    tokenizer=self.tokenizer.saved, label=algorithms.label(self.cfg, stage))


# ---------------------------------------------------------------- the two loops

class Record(NamedTuple):
    """What supervised training learns from. target: the text to say, None for the sample's caption; method: how the
    question is asked, of data.chat's PROMPTS; "" as the whole stage asks."""
    sample: Sample
    target: str | None
    method: str = ""

    def encoded(self, tok, image_tokens, method, template):
        """-> (ids, target mask, images), as `collate` takes them; method: of the stage."""
        if self.target is None:
            return chat.encode_plain(self.sample, tok, image_tokens, template)
        return chat.encode(self.sample, tok, image_tokens, self.method or method, template, self.target)


def longest_of(run, cfg, records, method, image_tokens):
    """Tokens of the longest record of a supervised stage."""
    def encode(_, record):
        return Record(*record).encoded(run.tokenizer, image_tokens, method, cfg.data.template)

    return run.preview(image_tokens).cut(preview.longest(preview.encoded(records, encode)))


def fit(run, name, cfg, origin, records, method, schedule, meter):
    """Supervised training of a stage on records, or (sample, target text), as Record; CLIP frozen. Without records the
    model stays as it is."""
    vlm = origin.vlm
    tok = run.tokenizer
    image_tokens = vlm.config.image_tokens
    if run.supply.source in DRAWN:      # what data of one's own will take was told at the start
        run.announce(name, vlm, cfg, longest_of(run, cfg, records, method, image_tokens), samples=False)
    sharding.shard(vlm, cfg.parallel)
    optimizer = run.optimizer(vlm, cfg.optim.module_lr)
    lengths = None
    if cfg.data.group_lengths and run.records and name == "sft":
        lengths = run.records.lengths(image_tokens)

    def encode(number, record):
        record = Record(*record)
        record = record._replace(sample=run.supply.decoded(record.sample, vlm.config.pixels))
        row = record.encoded(tok, image_tokens, method, cfg.data.template)
        if not cfg.data.max_length:
            return row
        return llava.shortened(row, cfg.data.max_length, image_tokens, tok.image_id, number, record.sample.id)

    snapshot = partial(run.snapshot, name, cfg, method, meter, vlm)
    for step, lr in run.steps(name, schedule, vlm, optimizer, meter, snapshot=snapshot):
        # 1. This rank's records -> a batch, sorted by length, so that micro-batches hold little padding.
        indices = batch_indices(len(records), schedule.batch, step, run.seed_of(name, "order"), lengths)
        rows = run.usable(name, records, indices, encode)
        rows = sorted(rows, key=lambda row: len(row[0]))
        micros = []
        denominator = torch.zeros((), dtype=torch.long, device=run.device)
        if rows:
            batch = collate(rows, tok.pad_id, **vlm.config.pixels).to(run.device)
            denominator = batch.target[:, 1:].sum()
            micros = batch.micro_batches(cfg.optim.micro_batch)
        denominator = parallel.total(denominator)

        # 2. Forward and backward, a micro-batch at a time, each over the denominator of the whole step.
        losses = []
        for micro in micros:
            meter.encode(vlm, len(micro.pixels))
            meter.update(vlm, micro, upstream=True)
            # The gradient of the loss by each log-prob is known: told, it spares the head a product.
            sent = -1 / denominator.double()
            loss = -vlm(micro, upstream=(sent, None)).logp.sum() / denominator
            if loss.requires_grad:      # text has nothing to say where only the projector trains
                loss.backward()
            losses.append(loss.item())
        for _ in range(run.surplus(vlm, micros)):
            nothing = collate([([tok.eos_id] * 2, [0, 1], ())], tok.pad_id, **vlm.config.pixels).to(run.device)
            (0.0 * vlm(nothing).logp.sum()).backward()

        # 3. The optimizer step, on the gradient of all ranks.
        sharding.total_gradients(optimizer)
        norm = optimizer_step(optimizer, lr, cfg.optim.grad_clip)[0]
        if not math.isfinite(norm):
            raise ValueError(diverged(norm, lr))
        loss = parallel.total(sum(losses)) if denominator else None      # of a step without usable records
        meter.agree()
        run.log(stage=name, step=step, loss=loss, lr=lr, grad_norm=norm, flops=meter.total, seconds=run.seconds())
        run.bar.set_postfix(loss=loss, refresh=False)

    run.supply.check(records)
    run.finish_stage(name, cfg, method, meter, origin.towers, vlm)


def reinforce(run, name, cfg, vlm, samples, method, rewards, schedule, meter, teacher=None):
    """Reinforcement learning: sample, score, estimate advantages, update; a line of log.jsonl a rollout. With a teacher
    in the place of the reference and no reward, on-policy distillation."""
    switches = cfg.algorithm
    label = algorithms.label(run.cfg, name)
    learner = make_learner(vlm, vlm.config.llm.width, switches, teacher)
    learner.shard(cfg.parallel)
    optimizer = run.optimizer(learner, cfg.optim.module_lr, learner.critic, switches.value_lr)
    generator = torch.Generator(run.device).manual_seed(run.seed_of(name, "sampling"))
    guard = Guard(run.folder, name, cfg.rl.bad_steps, checkpoint.save, learner.bad_steps)
    sampler = Sampler(vlm, meter)
    attempts = 1 + switches.refill
    snapshot = partial(run.snapshot, name, cfg, method, meter, vlm)
    follow = partial(followed, run, name, cfg, vlm, samples[:FOLLOWED], method, rewards)
    recorder = Recorder(run.folder, name, label, cfg, run.tokenizer, rewards, follow, checkpoint.write_atomically)
    live = Live(name, rewards, quiet=bool(cfg.run.bench))
    if cfg.rl.curriculum:
        samples = curriculum.by_difficulty(samples, scenes.difficulty)

    for step, lr in run.steps(name, schedule, learner, optimizer, meter, generator, snapshot):
        recorder.begin(step)
        clock = metrics.Clock(run.device)
        failed_before = rewards.failures
        open_to_it = len(samples)
        if cfg.rl.curriculum:
            open_to_it = curriculum.open_prompts(schedule.share(step, meter.total), len(samples))

        # 1. Sample. Groups of equal rewards teach nothing; with --refill others take their place.
        rollouts = []
        experiences = []
        for attempt in range(attempts):
            indices = batch_indices(open_to_it, schedule.batch, step * attempts + attempt, run.seed_of(name, "order"))
            asked = [samples[i] for i in indices]
            batch, rollout = roll_out(sampler, run.tokenizer, asked, method, cfg, rewards, generator, clock)
            rollouts.append(rollout)
            experiences.append(select_groups(batch, rollout, cfg))
            if sum(len(experience.ids) for experience in experiences) >= schedule.batch:
                break
        rollout = Rollout.join(rollouts)
        experience = Experience.join(experiences).first(schedule.batch)
        learner.samples += rollout.reward.numel()
        line = metrics.of_rollout(rollout)
        line["groups"] = int(experience.active.sum())
        line["rollouts"] = len(rollouts)
        line["reward_failures"] = parallel.total(rewards.failures - failed_before)
        passed = 0

        if line["groups"]:
            # 2. Score by the policy as it is, its reference, its critic: whatever the algorithm reads.
            experience = score(learner, experience, cfg, meter)

            # 3. Rewards -> an advantage for every token.
            experience, found = estimate_advantages(learner, experience, rewards, cfg)
            line |= found

            # 4. epochs x mini_batches optimizer steps; backward() is in here.
            take_step = stepper(optimizer, lr, cfg.optim.grad_clip, projector=vlm.projector, llm=vlm.llm)
            found, passed = update(learner, experience, cfg, take_step, meter, guard, recorder.see)
            line |= found
        learner.after(step, line, switches)
        meter.agree()
        clock.lap("update")

        # 5. What people look at: log.jsonl, rollouts.jsonl, the terminal.
        costs = metrics.costs(clock.laps, rollout, passed)
        run.log(stage=name, method=label, step=step, lr=lr, **learner.rates(lr, switches), flops=meter.total,
                samples=int(learner.samples), seconds=run.seconds(), **costs, **line)
        recorder.write(rollout)
        live.show(run.bar, step, schedule.share(step + 1, meter.total), costs | line)
        if recorder.recording:
            live.say(run.bar, rollout.samples[0], rollout.texts[0][0])

    live.close()
    lines = [line for line in read_log(run.log_path) if line["stage"] == name]
    if not any(line.get("updates") for line in lines):
        print(f"  note: no group of {name} could move the model: in each all rewards were equal, or all completions "
              "were left out")


def followed(run, name, cfg, vlm, samples, method, rewards):
    """The Rollout of the prompts that rollouts.jsonl follows: the same noise at every step, and no part of what the
    stage costs."""
    generator = torch.Generator(run.device).manual_seed(run.seed_of(name, "followed"))
    _, rollout = roll_out(Sampler(vlm), run.tokenizer, samples, method, cfg, rewards, generator,
                          metrics.Clock(run.device))
    return rollout


def preflight(run, name, cfg, vlm, samples, method, rewards, teacher=None):
    """An ordinary step of `reinforce`, without refills, whose result is thrown away, in a few printed lines; with
    --explain as many prompts in full instead, and no update."""
    count = cfg.run.explain or cfg.rl.rl_batch
    meter = Meter()
    clock = metrics.Clock(run.device)
    learner = make_learner(vlm, vlm.config.llm.width, cfg.algorithm, teacher)
    guard = Guard(run.folder, f"{name}-preflight", math.inf, checkpoint.save)
    generator = torch.Generator(run.device).manual_seed(run.seed_of(name, "preflight"))
    asked = [samples[i] for i in batch_indices(len(samples), count, 0, run.seed_of(name, "order"))]
    rollout, experience = forecast.sampled(learner, Sampler(vlm, meter), run.tokenizer, asked, method, cfg, rewards,
                                           generator, clock, keep_all=bool(cfg.run.explain))
    active = int(experience.active.sum())
    if cfg.run.explain:
        asked_as = [chat.prompt_text(sample, method, cfg.data.template) for sample in asked]
        print(explanation(asked, asked_as, rollout, experience.advantage, rewards))
        return
    passed = forecast.updated(learner, experience, cfg, guard, meter) if active else 0
    clock.lap("update")
    costs = metrics.costs(clock.laps, rollout, passed)
    steps = None if run.allowed(name) else cfg.rl.rl_steps
    advice = formless_advice(method, cfg.data.template) if rewards.options.gated else ""
    print(preflight_text(rollout, active / count, costs, steps, cfg.algorithm.refill, advice))


# ---------------------------------------------------------------- the stages

def clip(run, name, cfg, origin):
    """Contrastive pre-training of both towers on pictures and captions; frozen from here on."""
    tok = run.tokenizer
    config = cfg.clip.config(len(tok))
    model = Clip(config).to(run.device, run.dtype)
    show_trained(name, model)
    samples = run.samples("clip", cfg.data.pictures, "clip")
    if run.supply.source in DRAWN:
        captions = preview.encoded(samples, run.preview(0).caption)
        run.memory.clip(name, model, cfg, run.supply.kept_pictures(config.image_size), preview.longest(captions))
    pixels = dict(image_size=config.image_size, fit="crop", mean=config.mean)
    changes = augment.names_in(cfg.data.augment)
    schedule = Schedule(cfg.supervised.clip_steps, cfg.supervised.clip_batch, cfg.supervised.clip_lr)
    optimizer = run.optimizer(model, module_lr="")
    meter = Meter()                 # stays at 0: this stage is no arm of a comparison at equal FLOPs

    def decoded(number, sample):
        return run.supply.pictured(number, sample, pixels)

    for step, lr in run.steps(name, schedule, model, optimizer, meter):
        # 1. This rank's pairs of pictures and captions.
        indices = batch_indices(len(samples), schedule.batch, step, run.seed_of(name, "order"))
        pairs = run.usable(name, samples, indices, decoded)
        if changes:
            pairs = augment.augmented(pairs, config.image_size, changes, run.seed_of(name, "augment", step),
                                      parallel.before(len(pairs)))

        # 2. The contrastive loss over those of all ranks at once, and its gradient.
        loss = contrast(model, tok, pairs, run.device, run.dtype)
        if loss is not None:
            if loss.requires_grad:          # a rank without pairs has nothing that trains in it
                loss.backward()
            loss = loss.item()

        # 3. The optimizer step, on the gradient of all ranks.
        sharding.total_gradients(optimizer)
        norm = optimizer_step(optimizer, lr, cfg.optim.grad_clip)[0]
        if not math.isfinite(norm):
            raise ValueError(diverged(norm, lr))
        run.log(stage=name, step=step, loss=loss, lr=lr, grad_norm=norm, flops=meter.total, seconds=run.seconds())
        run.bar.set_postfix(loss=loss, refresh=False)

    if cfg.data.data == "scenes" and config.image_size // config.patch == scenes.CELLS:
        found = shape_probe(model.visual, cfg.vlm.feature_layer)
        write_json(run.folder / "probe.json", found)
        print(f"  shape probe on the features that W reads: {found['id']:.3f}, held-out pairs {found['pairs']:.3f}")
    if cfg.data.data == "monitors" and config.patch == monitors.CELL:
        found = digit_probe(model.visual, cfg.vlm.feature_layer)
        write_json(run.folder / "probe.json", found)
        shares = ", ".join(f"{split} {share:.3f}" for split, share in found.items())
        print(f"  digit probe on the features that W reads: {shares}")
    towers = dict(clip=model.state_dict(), clip_config=asdict(config))
    run.finish_stage(name, cfg, "", meter, towers)


def contrast(model, tok, pairs, device, dtype):
    """The contrastive loss of samples with one picture and a caption each, beside those of the other ranks. Equal
    captions are no negatives of each other. None where there are fewer than two pairs, and nothing to contrast."""
    captions = parallel.gather([sample.caption for sample in pairs])
    captions = [caption for of_rank in captions for caption in of_rank]
    if len(captions) < 2:
        return None
    numbers = {}
    caption = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])
    same = (caption[:, None] == caption).to(device)
    image, text = parallel.joined(*embedded(model, tok, pairs, device, dtype))
    return contrastive_loss(image, text, parallel.once(model.logit_scale), same)


def embedded(model, tok, pairs, device, dtype):
    """Pictures and captions of n pairs -> (n, E) each."""
    config = model.config
    if not pairs:           # of a rank
        nothing = torch.zeros(0, config.embed, device=device, dtype=dtype)
        return nothing, nothing
    rows = []
    for sample in pairs:
        ids = tok.encode(" " + sample.caption)[:config.text_length - 1] + [tok.eos_id]
        rows.append((ids, [0] * len(ids), sample.images))
    batch = collate(rows, tok.pad_id, config.image_size).to(device)
    image = model.encode_image(batch.pixels.to(dtype))
    return image, model.encode_text(batch.ids, batch.length)


def align(run, name, cfg, origin):
    """Projector and, from nothing, decoder on captions. The first stage with a vision-language model."""
    if origin.vlm is None:
        origin = replace(origin, vlm=run.ready(first_vlm(run, cfg, origin), name))
    options = cfg.supervised
    if run.records:
        records = run.records.pairs(captions=True)
    else:
        records = [(sample, None) for sample in run.samples("align", cfg.data.pictures, "align")]
    schedule = Schedule(*steps_and_batch(options, "align", len(records)), options.align_lr)
    fit(run, name, cfg, origin, records, "direct", schedule, Meter())


def first_vlm(run, cfg, origin):
    """The image tower of stage clip, or of --clip, with a new projector and a new decoder, or that of --llm."""
    vocab = len(run.tokenizer)
    if cfg.clip.clip or cfg.llm.llm:
        return pretrained.assemble(cfg, run.plan, origin.towers, vocab, run.dtype, run.device)
    vlm = VLM(VlmConfig(ClipConfig(**origin.towers["clip_config"]), cfg.llm.config(vocab), **cfg.vlm.shape()))
    weights = origin.towers["clip"]
    vlm.visual.load_state_dict({name: weights[f"visual.{name}"] for name in vlm.visual.state_dict()})
    return vlm


def steps_and_batch(options, name, records):
    """(optimizer steps, records a step) of stage align, sft or cot that has so many records: the steps of so many
    epochs where these are given; none without records. options: SupervisedOptions."""
    steps, epochs, batch = {
        "align": (options.align_steps, options.align_epochs, options.align_batch or options.batch),
        "sft": (options.sft_steps, options.sft_epochs, options.batch),
        "cot": (options.cot_steps, 0, options.batch),
    }[name]
    if epochs:
        return math.ceil(epochs * records / batch), batch
    return steps if records else 0, batch


def sft(run, name, cfg, origin):
    """Question to answer, without a chain: only looking, for drawn scenes; LLaVA's conversations as they are."""
    options = cfg.supervised
    if run.records:
        records = run.records.pairs()
    else:
        records = run.supply.first_answers()
    schedule = Schedule(*steps_and_batch(options, "sft", len(records)), options.sft_lr)
    fit(run, name, cfg, origin, records, "direct", schedule, Meter())


def cot(run, name, cfg, origin):
    """Fine-tuning on the teacher's chains of thought, and on what --replay keeps of the stages before."""
    options = cfg.supervised
    records = with_replay(run, cfg, chains(run, cfg, origin, "cot"), "replay")
    schedule = Schedule(*steps_and_batch(options, "cot", len(records)), options.cot_lr)
    fit(run, name, cfg, origin, records, cfg.teacher.cot_format, schedule, Meter())


def rl(run, name, cfg, origin, part="train", teacher=None):
    """RL on correctness and format, with the switches of the stage's name, for --rl-steps or for the FLOPs that
    another stage of the run took. Without chains to imitate, as in `rl_zero` or from a pretrained model, only the
    prompt asks for the tags, as --method has it. part: of the world, that the prompts are of."""
    method = asked_by(cfg, name, origin.method)
    samples = run.samples(part, cfg.data.rl_prompts, "rl")
    if run.supply.source in DRAWN:
        ask = partial(run.preview(origin.vlm.config.image_tokens).prompt, method)
        others = sum(p.nbytes for p in teacher.parameters()) if teacher else 0
        run.announce(name, origin.vlm, cfg, preview.longest(preview.encoded(samples, ask)), others, samples=True)
    rewards = run.rewards(cfg)
    if not run.progress and cfg.parallel.shard == "none":       # else it would hold gradients of whole weights
        preflight(run, name, cfg, origin.vlm, samples, method, rewards, teacher)
    if cfg.run.explain:
        return
    schedule = Schedule(cfg.rl.rl_steps, cfg.rl.rl_batch, cfg.rl.rl_lr, run.allowed(name))
    meter = Meter()
    reinforce(run, name, cfg, origin.vlm, samples, method, rewards, schedule, meter, teacher)
    run.finish_stage(name, cfg, method, meter, origin.towers, origin.vlm)


def asked_by(cfg, name, taught):
    """How a stage of reinforcement learning asks a model whose last stage was asked by the method `taught`, "" for
    none."""
    if STAGES[stage_of(name)].method:
        return STAGES[stage_of(name)].method
    return taught if taught in chat.FORMS else cfg.rl.method


def distilled(run, name, cfg, origin):
    """On-policy distillation: reverse KL to a teacher, --distill-from, on the student's own samples; no reward."""
    rl(run, name, cfg, origin, teacher=distillation_teacher(run, cfg, origin.vlm))


def distillation_teacher(run, cfg, student):
    """The model of --distill-from, frozen. Raises ValueError unless it reads the student's prompts and tokens."""
    source = cfg.rl.distill_from
    path = run.path(source) if source in STAGES else source
    teacher, tok, _ = evaluation.load_vlm(path, run.device)
    theirs = teacher.config
    ours = student.config
    check_teacher(run, tok, theirs, ours)
    need(theirs.pixels == ours.pixels, "distill_from", source, "prepare pictures as the student does")
    need(theirs.llm.vocab == ours.llm.vocab, "distill_from", source, f"have the student's {ours.llm.vocab} tokens")
    return in_dtype(teacher, run.cfg.machine.dtype)


def check_teacher(run, tok, theirs, ours):
    """Raises ValueError unless the teacher of stage distilled reads the student's tokens and pictures. tok: the
    teacher's tokenizer; theirs, ours: VlmConfig of teacher and student."""
    source = run.cfg.rl.distill_from
    need(tok.saved == run.tokenizer.saved, "distill_from", source, "have the tokenizer of the student")
    sees_alike = (theirs.clip.image_size, theirs.image_tokens) == (ours.clip.image_size, ours.image_tokens)
    need(sees_alike, "distill_from", source,
         f"make {ours.image_tokens} tokens of a picture of {ours.clip.image_size} pixels, as the student does")


# ---------------------------------------------------------------- training records

def chains(run, cfg, origin, stream, flawless=False, sees_answer=False, part="train"):
    """Training records with a teacher's chain as target: ours, biased; one's own; or flawless ones.

    part: of the world, that the questions are of. sees_answer: the teacher was shown the gold answer, as LLaVA-CoT's
    was. It concludes with it, wherever its chain leads."""
    forget_close = cfg.teacher.forget_close
    if flawless or cfg.data.data.startswith("records:"):        # a record's four sections are closed
        forget_close = 0.0
    if run.supply.teach and not flawless:
        forget_close = 0.0          # its mistakes are its own
        samples = run.supply.taught(run.samples(part, cfg.data.traces, stream), stream)
    elif run.real:
        samples = real_chains(run, origin.towers, run.real["train"], run.supply.stream(stream), flawless)
    else:
        teacher = run.supply.flawless if flawless else run.supply.teacher
        samples = run.samples(part, cfg.data.traces, stream, teacher)
    if sees_answer:
        samples = [replace(sample, conclusion=sample.answer) for sample in samples]
    records, message = teachers.records(samples, run.tokenizer, forget_close, (cfg.run.seed, STREAMS[stream]),
                                        cfg.sampling.max_new, cfg.teacher.cot_format)
    print(message)
    return records


def real_chains(run, towers, samples, seed, flawless=False):
    """Samples of one's own pictures, each with its own reasoning or a teacher's chain over the answers that CLIP finds
    nearest. towers: as in Origin."""
    cfg = run.cfg
    answers = sorted({sample.answer for sample in run.real["train"]})
    nearest = [()] * len(samples)
    without = [place for place, sample in enumerate(samples) if not sample.reasoning]
    if without:
        clip = evaluation.zero_shot(cfg, towers, run.tokenizer)
        found = clip.nearest([samples[place] for place in without], answers, cfg.teacher.candidates)
        for place, candidates in zip(without, found):
            nearest[place] = candidates
    error = 0.0 if flawless else cfg.teacher.teacher_error
    return teachers.candidate_chains(samples, nearest, error, seed, answers)


def checked_chains(run, cfg, origin, stream, part="train"):
    """Chains of the teacher, only those that the checker finds right and well-formed."""
    records = [record for record in chains(run, cfg, origin, stream, part=part) if is_right_and_formed(*record)]
    print(f"  filtered: {len(records)} chains are right and well-formed")
    return records


def is_right_and_formed(sample, text):
    return bool(correctness(sample, text) and format_reward(sample, text))


def gold_answers(run, cfg, origin, stream="cot", part="train"):
    """Question to gold answer, without a chain."""
    samples = run.samples(part, cfg.data.traces, stream)
    return [(sample, chat.target_text(sample.answer)) for sample in samples]


def with_replay(run, cfg, records, stream):
    """The records, and as many captions and looking questions, half each, that these are --replay of all."""
    share = cfg.data.replay
    count = round(len(records) * share / (1 - share))
    if count < 2:
        return records
    captions = [Record(sample, None) for sample in run.samples("align", count // 2, stream)]
    looks = []
    for sample in run.samples("sft", count - count // 2, stream):
        looks.append(Record(sample, chat.target_text(sample.answer), "direct"))
    return [*records, *captions, *looks]


REPLAYED = 0.2              # share of the arm `replay` that is of the start's mix


def checked_with_replay(run, cfg, origin, part):
    """Checked chains of a part of the world; REPLAYED of the records are of what the start learned from, all kinds of
    question with --replay, their chains checked as well."""
    records = checked_again(run, cfg, origin, part=part)
    mix = with_replay(run, cfg, checked_again(run, cfg, origin), "replay_again")
    if not mix:
        return records
    count = round(len(records) * REPLAYED / (1 - REPLAYED))
    rng = np.random.default_rng([cfg.run.seed, STREAMS["replay_again"]])
    return [*records, *(mix[i] for i in rng.integers(len(mix), size=count))]


# ---------------------------------------------------------------- what reinforcement learning is compared with

def matched(run, name, cfg, origin, records_of, method=""):
    """Supervised training on `records_of(run, cfg, origin)` for the FLOPs that other stages took. method: "" for that
    of chains."""
    method = method or cfg.teacher.cot_format
    records = records_of(run, cfg, origin)
    meter = Meter()
    budget = run.spent(STAGES[stage_of(name)].costs_like)
    fit(run, name, cfg, origin, records, method, schedule_within(budget, run, cfg, origin.vlm, records, method, meter),
        meter)


def schedule_within(budget, run, cfg, vlm, records, method, meter):
    """The Schedule that brings a stage, at meter.total FLOPs so far, to `budget`, by the cost of eight random
    batches."""
    batch_size = cfg.supervised.batch
    if not records:
        return Schedule(0, batch_size, cfg.supervised.cot_lr)
    rng = np.random.default_rng([cfg.run.seed, STREAMS["budget"]])
    costs = []
    for _ in range(8):
        rows = []
        for i in rng.integers(len(records), size=batch_size):
            record = Record(*records[i])
            rows.append(record.encoded(run.tokenizer, vlm.config.image_tokens, method, cfg.data.template))
        rows.sort(key=lambda row: len(row[0]))
        batch = collate(rows, run.tokenizer.pad_id, **vlm.config.pixels)
        cost = Meter()
        for micro in batch.micro_batches(cfg.optim.micro_batch):
            cost.encode(vlm, len(micro.pixels))
            cost.update(vlm, micro)
        costs.append(cost.total)
    steps = max(1, round((budget - meter.total) / np.mean(costs)))
    return Schedule(steps, batch_size, cfg.supervised.cot_lr)


def rejection(run, name, cfg, origin, stream, part="train", rounds=2):
    """One of `rounds` rounds of learning from the model's own correct samples, which share RL's FLOPs, sampling
    counted."""
    method = cfg.teacher.cot_format
    samples = run.samples(part, cfg.data.rl_prompts, stream)
    budget = run.spent(STAGES[stage_of(name)].costs_like) / rounds
    meter = Meter()
    sampler = Sampler(origin.vlm, meter)
    clock = metrics.Clock(run.device)
    rewards = Rewards(RewardOptions(rewards="correctness:1"))
    generator = torch.Generator(run.device).manual_seed(run.seed_of(name, "sampling"))
    records = []
    rollouts = 0
    while meter.total < budget / 2:
        indices = batch_indices(len(samples), cfg.rl.rl_batch, rollouts, run.seed_of(name, "asked"))
        asked = [samples[i] for i in indices]
        _, rollout = roll_out(sampler, run.tokenizer, asked, method, cfg, rewards, generator, clock)
        rollouts += 1
        for sample, texts in zip(asked, rollout.texts):
            records += [(sample, text) for text in dict.fromkeys(texts) if is_right_and_formed(sample, text)]
    drawn = rollouts * cfg.rl.rl_batch * cfg.sampling.group
    print(f"  {name}: {len(records)} of {drawn} samples are new, right and well-formed")
    fit(run, name, cfg, origin, records, method,
        schedule_within(budget, run, cfg, origin.vlm, records, method, meter), meter)


@dataclass(frozen=True)
class Stage:
    """train(run, name, cfg, origin); the stages it may start from, first choice first; the stages whose FLOPs together
    it is given; those whose models it reads besides. method: how reinforcement learning asks, "" for as the stage
    before did."""
    train: Callable
    starts_from: tuple = ()
    costs_like: tuple = ()
    reads: tuple = ()
    method: str = ""


continued_chains = partial(chains, stream="continued")
checked_again = partial(checked_chains, stream="continued")
seen_chains = partial(chains, stream="cot", sees_answer=True)
blind_chains = partial(checked_chains, stream="cot")
flawless_chains = partial(chains, stream="cot", flawless=True)


def arms_of(part):
    """{name: Stage} of --compare=generalisation: every one learns from a part of the world's questions, at the FLOPs
    that RL on it took."""
    rl_of_part = f"rl_{part}"

    def arm(train, **options):
        return Stage(partial(train, **options), ("cot",), (rl_of_part,))

    return {
        rl_of_part: Stage(partial(rl, part=part), ("cot",)),
        f"rl_kl_{part}": arm(rl, part=part),
        # the teacher's chains that are right; the same with a little of the start's mix; own samples that are right
        f"filtered_{part}": arm(matched, records_of=partial(checked_again, part=part)),
        f"replay_{part}": arm(matched, records_of=partial(checked_with_replay, part=part)),
        f"rejection_{part}": arm(rejection, stream="rejection", part=part, rounds=1),
        # the teacher's chains as they are; the gold answers without a chain
        f"continued_{part}": arm(matched, records_of=partial(continued_chains, part=part)),
        f"gold_{part}": arm(matched, records_of=partial(gold_answers, stream="continued", part=part), method="direct"),
    }


STAGES = {
    "clip": Stage(clip),
    "align": Stage(align, ("clip",)),
    "sft": Stage(sft, ("align",)),
    "cot": Stage(cot, ("sft", "align")),
    "rl": Stage(rl, ("cot", "sft", "align")),
    # more of the teacher's chains, on fresh prompts; the same chains filtered; the model's own right answers, twice
    "cot_continued": Stage(partial(matched, records_of=continued_chains), ("cot",), ("rl",)),
    "filtered": Stage(partial(matched, records_of=checked_again), ("cot",), ("rl",)),
    "rejection_first": Stage(partial(rejection, stream="rl"), ("cot",), ("rl",)),
    "rejection": Stage(partial(rejection, stream="rejection"), ("rejection_first",), ("rl",)),
    # instead of chains and RL together: gold answers without a chain; flawless chains, the upper bound
    "sft_direct": Stage(partial(matched, records_of=gold_answers, method="direct"), ("sft", "align"), ("cot", "rl")),
    "perfect": Stage(partial(matched, records_of=flawless_chains), ("sft", "align"), ("cot", "rl")),
    # the tags only asked for, nothing to imitate
    "rl_zero": Stage(rl, ("sft", "align")),
    # the three routes: RL from a base that knows small skills and no teacher; LLaVA-o1, whose teacher saw the answers
    # or did not; RL from the latter
    "rl_from_base": Stage(rl, ("sft",), method="think"),
    "llava_o1": Stage(partial(matched, records_of=seen_chains), ("sft",), ("rl_from_base",)),
    "llava_o1_blind": Stage(partial(matched, records_of=blind_chains), ("sft",), ("rl_from_base",)),
    "rl_from_o1": Stage(rl, ("llava_o1_blind",)),
    # RL with some options changed, at its FLOPs; a teacher model instead of a reward
    **{name: Stage(rl, ("cot",), ("rl",)) for name in algorithms.ARMS},
    "distilled": Stage(distilled, ("cot",), ("rl",), ("perfect",)),
    # on a part of the questions
    **{name: stage for part in transfer.PARTS for name, stage in arms_of(part).items()},
    # RL by another paper's switches, or for another reward
    **{name: Stage(rl, ("cot",)) for name in (*algorithms.ALGORITHMS, *algorithms.REWARD_STAGES)},
}


def stage_of(name):
    """The stage that a checkpoint's name belongs to; --tune appends the rate: "llava_o1@0.0005"."""
    return name.partition("@")[0]


def config_of(cfg, stage):
    """The config of a stage: with the switches of the algorithm that it is named after, and the rate that --rates has
    for it. A preset's rates give way to --cot-lr, --rl-lr and the like on the command line; that of `rl`, chosen for
    the default algorithm, to another --algorithm, which as a stage of its own name has --rl-lr, too."""
    cfg = algorithms.of_stage(cfg, stage)
    rates = rates_of(cfg.run.rates)
    given = cfg.run.flags.split()
    gives_way = rate_option(stage) in given or (stage == "rl" and cfg.rl.algorithm != RlOptions.algorithm)
    if stage in rates and ("rates" in given or not gives_way):
        cfg = at_rate(cfg, stage, rates[stage])
    return cfg


def at_rate(cfg, stage, rate):
    """The config with this peak learning rate for a stage."""
    return change(cfg, **{rate_option(stage): rate})


def rate_option(stage):
    """The option that a stage reads its peak learning rate from."""
    if stage in ("clip", "align", "sft"):
        return f"{stage}_lr"
    return "rl_lr" if stage in algorithms.STAGES else "cot_lr"


# ---------------------------------------------------------------- a teacher's records

def teach(cfg):
    """--stage=teach: asks a teacher for chains of thought, and writes --records. Leaves no run folder. All ranks walk
    the same questions: a model answers its part of them on each (rl/staged.py), and the first rank writes."""
    options = cfg.records
    watchdog.at("the teacher's answers")
    watchdog.advise("the same command goes on")
    supply = Supply(cfg.data, replace(cfg.teacher, teacher="", cot_format="llava_cot"), cfg.run.seed)
    if supply.found:
        print(supply.found)
    teacher = teaching.teacher_named(cfg.teacher.teacher, supply, options, cfg.run.seed, partial(staged_answers, cfg))
    scene_teacher = None if cfg.teacher.teacher else supply.teacher
    questions, total, held_out = teaching.questions_of(supply, cfg.data.traces, scene_teacher)
    try:
        tally = teaching.make_records(options.records, questions, held_out, total, teacher, records_of_rank)
    except KeyboardInterrupt:
        raise ValueError(f"interrupted; the same command goes on with {options.records}") from None
    print(f"{options.records}: {tally.text()}")
    if cfg.run.export and parallel.is_first():
        out = cfg.run.export.partition(":")[2]
        print(f"wrote {out}, {export_llava(options.records, out)} records in LLaVA-CoT's form")


def records_of_rank(path):
    """The RecordFile of this rank, opened by all together: none adds to it before all have read it."""
    if parallel.is_first():
        file = RecordFile(path)
    parallel.barrier()          # until the first has made it, and cut off what is torn
    if not parallel.is_first():
        file = RecordFile(path, writes=False)
    parallel.barrier()
    return file


def digest_of(path):
    """Digits that change with a checkpoint; of a folder, with the names, sizes and times of its files, since hashing
    its weights would take minutes."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    seen = hashlib.sha256()
    for file in sorted(path.iterdir()):
        status = file.stat()
        seen.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return seen.hexdigest()[:12]


def staged_answers(cfg, name):
    """A checkpoint or a LLaVA folder -> (answer(samples, seed) -> [Staged], what tells the model apart)."""
    options = evaluation.EvalOptions(llava=name, clip=cfg.clip.clip, device=cfg.machine.device,
                                     dtype=cfg.machine.dtype)
    model = name                        # what tells replies of other weights apart
    if name.endswith(".pt"):
        options = replace(options, llava="", checkpoint=name, dtype="")
    try:
        vlm, tok, state = evaluation.load_any(options)
    except ValueError as error:
        raise ValueError(f"--teacher={name}: {error}") from None
    if Path(name).exists():             # else a name on the hub
        model = f"{name}@{digest_of(Path(name))}"
    stages = METHODS[cfg.records.teacher_prompting]
    max_new = cfg.records.teacher_max_new or state["config"]["max_new"]
    sampler = Sampler(vlm)
    device = vlm.llm.head.device

    @torch.no_grad()
    def answer(samples, seed):
        if device.type == "cuda":
            torch.cuda.set_device(device)       # of this thread, which begins at the first GPU
        generator = torch.Generator(device).manual_seed(seed)
        found = answer_in_stages(sampler, tok, samples, stages, state["config"]["template"], max_new,
                                 temperature=cfg.records.teacher_temperature, generator=generator)
        return [group[0] for group in found]

    return answer, parallel.of_first(model)         # a folder's files have other times in other nodes


# ---------------------------------------------------------------- a run

def main(argv):
    bare = machine.resident()
    cfg = from_command_line(Config, PRESETS, argv, __doc__, resumed,
                            lambda given: algorithms.of_flags(given) | prepare.implied(given))
    if cfg.parallel.plan:
        return show_needs(cfg)
    parallel.start(cfg.parallel, cfg.machine.device)
    cfg, plan, notes = loaded_shape(cfg)
    machine.give_holes_back()
    notes += cfg.check()
    check_ranks(cfg)
    if cfg.stages() == ["teach"]:
        torch.set_num_threads(cfg.machine.threads or torch.get_num_threads())
        teach(cfg)
        parallel.barrier()
        return parallel.stop()
    if cfg.run.grid:
        return grid(cfg)
    if cfg.run.seeds:
        return many_seeds(cfg)
    torch.set_num_threads(cfg.machine.threads or torch.get_num_threads())
    if cfg.parallel.shard != "none":        # else what is gathered and let go of would leave holes of its size
        machine.give_blocks_back(cfg.llm.width)
    if cfg.run.bench:
        return run_bench(cfg)
    if cfg.run.explain:
        return explain(cfg, plan, notes)
    if plan:
        for name in cfg.stages():
            prepare.on_meta(plan, config_of(cfg, name), name)       # raises where options do not fit the model
        pretrained.check_weights(cfg)
    folder = ""
    if parallel.is_first():
        folder = str(choose(cfg.run.out, cfg.run.preset, cfg.run.resume))
    with Run(cfg, parallel.of_first(folder), plan, bare) as run:
        notes += open_run(run)
        crowded = set()
        if run.supply.source not in DRAWN:
            crowded = show_plan(run)
        if cfg.run.tune:
            return tune(run, notes)
        if run.supply.source not in DRAWN and not cfg.run.resume and parallel.world() == 1:
            forecast.show(stages_ahead(run), shape_of(run), run.tokenizer, run.device, crowded)
        train_and_compare(run, notes)
    parallel.barrier()
    parallel.stop()


def show_needs(cfg):
    """--plan: prints what the stages need on so many cards, by the shapes that the options give; loads nothing."""
    cards.parse(cfg.parallel.plan)          # where only clip is asked for, nothing below would
    need(not parallel.is_under_torchrun(), "plan", cfg.parallel.plan,
         "come without torchrun, whose ranks would all plan")
    for name, value in dict(one_process(cfg), offload=cfg.parallel.offload).items():
        need(not value, name, value, "be left out beside --plan, which runs nothing and plans without it")
    for name in cfg.stages():
        need(name in STAGES, "stage", f"{cfg.run.stage}: {name!r}",
             "be one of clip, align, sft, cot, rl and the others that train.py's STAGES names, with --plan")
    shape = VlmConfig(cfg.clip.config(cfg.llm.vocab), cfg.llm.config(cfg.llm.vocab), **cfg.vlm.shape(),
                      speaks=bool(cfg.llm.llm or cfg.vlm.llava))
    for name in cfg.stages():
        if name == "clip":
            print("clip: no table, since every rank holds all of it, whatever --shard says")
            continue
        variant = config_of(cfg, name)
        kind = "rl" if name in algorithms.STAGES else name
        print(cards.text(variant, kind, prepare.on_meta(shape, variant, name)))


def one_process(cfg):
    """{option: value} of what one process does, without other ranks; a value is empty where it is not asked for."""
    return dict(seeds=cfg.run.seeds, grid=cfg.run.grid, tune=cfg.run.tune, bench=cfg.run.bench,
                explain=cfg.run.explain)


def check_ranks(cfg):
    """Raises ValueError where several ranks are asked for what one process does."""
    if parallel.world() == 1:
        return
    need(cfg.machine.dtype != "mixed" or cfg.parallel.shard == "none", "dtype", "mixed",
         f"be bfloat16 with --shard={cfg.parallel.shard}, whose shards are in float32 anyway")
    for name, value in one_process(cfg).items():
        need(not value, name, value, "come without torchrun: it runs as one process")
    if cfg.stages() == ["teach"]:
        need(kind_of(cfg.teacher.teacher) == "model", "teacher", cfg.teacher.teacher,
             "be a checkpoint or a LLaVA folder with --stage=teach under torchrun; run other teachers without torchrun")
        need(cfg.parallel.shard == "none", "shard", cfg.parallel.shard,
             "be none with --stage=teach, where every rank holds the whole teacher")
    if cfg.parallel.shard == "hybrid":      # before stage clip, which would train for hours first
        sharding.ranks_of_a_node()


def loaded_shape(cfg):
    """-> (the config with the model's shape as what is loaded has it, VlmConfig of a pretrained model or None, notes on
    flags that this overrides)."""
    shape = [*CLIP_SHAPE, *VLM_SHAPE]
    given = cfg.run.flags.split()
    notes = []
    if cfg.run.init:
        state = checkpoint.load(cfg.run.init)
        decided = CLIP_SHAPE                # of a CLIP: projector and decoder are still to be made
        if "vlm" in state:
            decided = shape if "template" in given else [*shape, "template"]
        need("vlm" in state or not cfg.clip.clip, "clip", cfg.clip.clip, f"be left out beside --init={cfg.run.init}, "
             "which is a CLIP itself")
        cfg, notes = adopt(cfg, state.get("config", {}), decided, "--init")
        if "vlm" in state or not cfg.llm.llm:
            return cfg, None, notes
    plan = pretrained.planned(cfg)
    if plan is None:
        return cfg, None, []
    saved = pretrained.fields(plan)
    cfg, more = adopt(cfg, saved, shape, "what is loaded")
    if {*given} & {*saved}:
        notes += more
    return cfg, plan, notes


def open_run(run):
    """Gives a run its tokenizer and its folder, a new one or the interrupted one -> notes on its data. Raises
    ValueError about whatever cannot work before the folder is made."""
    cfg = run.cfg
    stages = cfg.stages()
    own = run.supply.own()
    if cfg.run.resume:
        rungs = sorted(run.folder.glob("*@*.pt"), key=lambda path: path.stat().st_mtime)
        names = [*stages, *(path.stem for path in rungs)]
        run.reopen(flat(cfg), flat(Config()), ("resume", "out", "jobs", *vars(cfg.parallel)), names, own)
    rewards = run.rewards(cfg)
    rewards.start()
    if "iou" in rewards.weights and not any(sample.boxes for sample in own):
        raise ValueError(f"--rewards={cfg.reward.rewards}: iou needs samples with boxes, and --data={cfg.data.data} "
                         "has none")
    if cfg.run.tune and run.real and len(run.supply.tests(count_of_tests(cfg))) == 1:
        raise ValueError(f"--tune={cfg.run.tune}: --data={cfg.data.data} has no split but val to report on, and "
                         "nothing is tuned on what is reported; a test split of your own would be one")
    if run.supply.teach:        # it may fail on a prompt of the tests: better now than after training
        run.supply.tests(count_of_tests(cfg))
    starts_from = {name: stage.starts_from for name, stage in STAGES.items()}
    if cfg.vlm.llava:
        starts_from[stages[0]] = ()
    elif cfg.clip.clip and not cfg.run.init:
        starts_from["align"] = ()
    costs_like = {}
    for name, stage in STAGES.items():
        costs_like[name] = () if name in algorithms.STAGES else stage.costs_like    # RL has --rl-steps without
    run.check_origins(stages, starts_from, costs_like, cfg.run.init)
    check_chains(run, stages)
    run.prepare_tokenizer()
    check_template(run)
    if "distilled" in stages:
        check_distillation(run, stages)
    notes = []
    if not cfg.run.resume:
        notes = chat.not_given_back(run.supply.some_texts(), run.tokenizer)
    if run.real:
        read = cfg.clip.text_length if "clip" in stages else math.inf       # captions that no CLIP reads are not cut
        notes += chat.too_long(own, run.tokenizer, cfg.sampling.max_new, read)
    if not cfg.run.resume:
        run.create(flat(run.cfg), own)
    if cfg.run.tensorboard and run.is_writer:
        run.open_board()
    if isinstance(run.tokenizer.saved, bytes):
        checkpoint.write_bytes(run.folder / "tokenizer.model", run.tokenizer.saved)
    return notes


def check_template(run):
    """Raises ValueError unless the run's tokenizer has every token that its template puts between turns."""
    template = run.cfg.data.template
    try:
        chat.encode(Sample(question="one"), run.tokenizer, 1, "direct", template, "two")
    except ValueError as error:
        raise ValueError(f"--template={template} must be a template whose tokens the tokenizer has, as brief is: "
                         f"{error}") from None


def check_chains(run, stages):
    """Raises ValueError unless stages that learn from chains find some for one's own pictures: in the data, from
    --teacher, or from a CLIP that names the answers nearest to a picture."""
    cfg = run.cfg
    learn_from_chains = ("cot", "cot_continued", "filtered", "perfect")
    if run.supply.teach:
        learn_from_chains = ("perfect",)    # whose flawless chains are never those of --teacher
    learners = [stage for stage in stages if stage in learn_from_chains]
    has_chains = not run.real or all(sample.reasoning for sample in run.real["train"])
    if not learners or has_chains or "clip" in stages:
        return
    fault = why_nothing_is_named(cfg)
    if fault:
        raise ValueError(f"--stage={cfg.run.stage}: {learners[0]} needs a reasoning in every line of "
                         f"--data={cfg.data.data}, --teacher=FILE.py:NAME, or --clip=NAME of a CLIP with both towers, "
                         f"which names the nearest answers: {fault}")


def why_nothing_is_named(cfg):
    """Why a run without stage clip has no CLIP that can name answers, as the end of a sentence; "" if it has one."""
    if cfg.run.init and "clip" in checkpoint.load(cfg.run.init):
        return ""
    if cfg.clip.clip:
        fault = pretrained.text_fault(cfg.clip.clip)
        return f"--clip={cfg.clip.clip} {fault}" if fault else ""
    if cfg.run.init:
        return f"--init={cfg.run.init} carries none"
    return f"--llava={cfg.vlm.llava} holds the image tower alone"


def shape_of(run):
    """VlmConfig of the model of a run, of one from nothing as the options have it."""
    cfg = run.cfg
    vocab = len(run.tokenizer)
    return run.plan or VlmConfig(cfg.clip.config(vocab), cfg.llm.config(vocab), **cfg.vlm.shape())


def show_plan(run):
    """Prints for each stage of a run on data of one's own what will train and the memory it will take, before a weight
    is loaded -> names of the stages that the machine has no room for. Stages whose records the run has yet to make are
    taken to have those of cot."""
    cfg = run.cfg
    shape = shape_of(run)
    look = run.preview(shape.image_tokens)
    kept = run.supply.kept_pictures(shape.clip.image_size)
    crowded = set()
    for name in cfg.stages():
        variant = config_of(cfg, name)
        if name == "clip":
            model = forecast.clip_on_meta(cfg, len(run.tokenizer))
            warned = run.memory.clip(name, model, variant, kept, look.longest(name))
        else:
            samples = name in algorithms.STAGES
            kind = name if samples or name in ("align", "sft") else "cot"
            model = prepare.on_meta(shape, variant, name)
            longest = look.longest(kind, method_of(cfg, name))
            warned = run.memory.stage(name, model, variant, longest, kept, samples=samples)
        if warned:
            crowded.add(name)
    return crowded


def stages_ahead(run):
    """The stages of a run on data of one's own, as rl/forecast.py measures them."""
    look = run.preview(shape_of(run).image_tokens)
    return [stage_ahead(run, look, name) for name in run.cfg.stages()]


def stage_ahead(run, look, name):
    """A stage -> forecast.Ahead."""
    cfg = config_of(run.cfg, name)
    options = cfg.supervised
    like = STAGES[name].costs_like
    if like and all(other in cfg.stages() for other in like):
        return forecast.Ahead(name, "", cfg, like=like)
    if name in algorithms.STAGES:
        samples = run.samples("train", cfg.data.rl_prompts, "rl")
        some = [samples[i] for i in preview.spread(len(samples))]
        return forecast.Ahead(name, "rl", cfg, cfg.rl.rl_steps, cfg.rl.rl_batch, samples=some,
                              method=method_of(cfg, name))
    rows = look.rows(name)
    if name == "clip":
        return forecast.Ahead(name, "clip", cfg, options.clip_steps, options.clip_batch, rows)
    kind = name if name in ("align", "sft") else "cot"
    return forecast.Ahead(name, "supervised", cfg, *steps_and_batch(options, kind, look.count()), rows)


def method_of(cfg, name):
    """How a stage of reinforcement learning will prompt, told before there is what it starts from."""
    stages = cfg.stages()
    before = begins_at(stage_of(name), stages)
    if before == ["cot"]:
        return asked_by(cfg, name, cfg.teacher.cot_format)
    if cfg.run.init and not before:
        return asked_by(cfg, name, checkpoint.load(cfg.run.init).get("method", ""))
    return asked_by(cfg, name, "")


def check_distillation(run, stages):
    """Raises ValueError unless the teacher of stage distilled is there and can teach, or will be there."""
    cfg = run.cfg
    source = cfg.rl.distill_from
    if source in STAGES:
        is_there = source in stages[:stages.index("distilled")] or run.path(source).exists()
    else:
        is_there = Path(source).is_file()
    need(is_there, "distill_from", source, "be a stage that comes before distilled, or a checkpoint")
    start = "cot" if "cot" in stages else cfg.run.init
    need(source != start, "distill_from", source, "be another model than the one that distilled starts from")
    if source in STAGES:
        return
    teacher, tok, _ = evaluation.load_vlm(source)
    check_teacher(run, tok, teacher.config, shape_of(run))


def show_notes(notes):
    for note in notes:
        print(f"note: {note}")


def train_and_compare(run, notes):
    """Every stage of the run that is not done, then the comparison; prints `notes` and what comes out."""
    began = time.perf_counter()
    cfg = run.cfg
    print(describe(cfg))
    show_notes(notes)
    add(run.folder, environment(cfg, run.device, notes))
    print(f"run folder {run.folder}, device {run.device}, {torch.get_num_threads()} CPU threads")
    try:
        for name in cfg.stages():
            train_stage(run, name, name, config_of(cfg, name))
        compare_methods(run)
    except (ValueError, RuntimeError) as error:         # as of training that diverged, which one wants to look at
        show_page(run, first_line(error))
        raise
    exports = cfg.run.export and run.is_writer
    if exports and not (cfg.run.resume and export_folder(cfg.run.export).exists()):
        vlm, tok, _ = evaluation.load_vlm(run.path(cfg.stages()[-1]))
        evaluation.export(vlm, tok, cfg.run.export, cfg.data.template)
    names = ("report.html", "results.json", "curves.png", "log.jsonl")
    files = ", ".join(name for name in names if (run.folder / name).exists())
    print(f"\n{run.folder}: {files} and checkpoints; {time.perf_counter() - began:.0f} s in all")


def show_page(run, stopped=""):
    """report.html of a run that is not evaluated: what its log tells. stopped: what ended it, "" if nothing did.
    A page that cannot be made is noted."""
    if not run.is_writer:
        return
    try:
        html = page.run_page(run.folder.name, page.gather(run.folder, stopped=stopped))
        checkpoint.write_bytes(run.folder / "report.html", html)
    except Exception as error:      # any: a damaged file must neither end a run nor hide what ended it
        print(f"no report.html: {type(error).__name__}: {first_line(error)}")


def train_stage(run, stage, name, cfg):
    """Trains a stage unless its checkpoint, of that name, is there; prints what it took."""
    if run.path(name).exists():
        print(f"{name}: done before")
        return
    began = time.perf_counter()
    STAGES[stage].train(run, name, cfg, run.start(stage))
    seconds = time.perf_counter() - began
    flops = run.spent([name])
    cost = f", {flops / 1e12:8.2f} TFLOP" if flops else ""
    print(f"{name:<15} {seconds:7.1f} s{cost}")
    show_page(run)


def tune(run, notes):
    """--tune: trains each of these stages, and first what it needs, at every rate of the ladder, and prints which is
    best on the validation prompts that are like its training. The best one stands for its stage in what comes after it.
    Writes ladder.json; evaluates nothing else, but for --compare=generalisation, which compares all rungs. Prints
    `notes` first."""
    cfg = run.cfg
    home, samples = next(iter(run.supply.tests(count_of_tests(cfg)).items()))
    rungs_of_all = {}                   # "NAME@RATE" -> Contender
    show_notes(notes)
    found = []
    for arm in filter(None, cfg.run.tune.split(",")):
        for name in needed_for(arm, cfg.stages()):
            train_stage(run, name, name, config_of(cfg, name))
        asked = {home: samples}
        _, part, _ = generalisation.trained_on(arm, transfer.PARTS)
        if part:                        # judged by what it is trained on
            asked = {part: run.supply.of_parts(count_of_tests(cfg))[part]}

        def measure(rate):
            name = f"{arm}@{rate:g}"
            rungs_of_all[name] = Contender(run.path(name))
            train_stage(run, arm, name, at_rate(algorithms.of_stage(cfg, arm), arm, rate))
            raw = evaluation.scores_of(Contender(run.path(name)), cfg, asked)
            [(split, raw)] = raw.items()
            rows = statistics.rows(arm, split, {cfg.judge.decoding: raw[cfg.judge.decoding]}, cfg.run.seed)
            return dict(rows[0], rate=rate)         # the first is accuracy

        best, rungs = ladder.climb(measure)
        found += rungs.values()
        write_json(run.folder / "ladder.json", found)
        print("\n" + ladder.ladder_text(arm, best, rungs) + "\n", flush=True)
        if not run.path(arm).exists():
            data = run.path(f"{arm}@{best:g}").read_bytes()
            checkpoint.write_bytes(run.path(arm), data)
    if cfg.run.compare == "generalisation":
        judge_methods(run, {"cot": Contender(run.path("cot")), **rungs_of_all})
        return
    write_json(run.folder / "results.json", [])         # none: but the run is finished


def begins_at(stage, stages):
    """[the stage of a run that a stage starts from], [] where it starts from none of them."""
    return [name for name in STAGES[stage].starts_from if name in stages][:1]


def needed_for(stage, stages):
    """Those of a run's stages that a stage needs, in their order: what it starts from, the stages whose FLOPs it is
    given, and what those need."""
    needed = set()
    for other in [*begins_at(stage, stages), *STAGES[stage].costs_like, *STAGES[stage].reads]:
        needed |= {other, *needed_for(other, stages)}
    return [name for name in stages if name in needed]


def count_of_tests(cfg):
    """Drawn prompts of each split."""
    return max(cfg.judge.eval_greedy, cfg.judge.eval_sampled)


def compare_methods(run):
    """Evaluates what the stages made that answer questions, and writes results.json."""
    cfg = run.cfg
    stages = cfg.stages()
    labels = algorithms.labels(cfg, stages)
    contenders = {}
    if cfg.run.compare == "routes" and "sft" in stages:
        contenders = untrained(run.path("sft"))
    for name in stages:
        if name not in ("clip", "align", "sft", "rejection_first"):
            contenders[labels[name]] = Contender(run.path(name))
    if cfg.run.compare == "routes" and "llava_o1" in stages:
        contenders |= searched("llava_o1", run.path("llava_o1"))
    if not contenders:
        write_json(run.folder / "results.json", [])     # none: but the run is finished
        return
    contenders = before_learning(run, stages, contenders) | contenders
    learned = [labels[name] for name in stages if name in algorithms.STAGES]
    to = learned[0] if learned else ""
    tests = run.supply.tests(count_of_tests(cfg))
    if cfg.run.curve:
        points = follow_curves(run, [name for name in stages if labels[name] in contenders], labels, tests)
        contenders |= best_along(run, points)
    trained = None
    if cfg.run.compare == "routes":
        flops = {labels[name]: run.spent(path_of(name, stages)) for name in stages}
        trained = {name: flops.get(name.partition("+")[0], 0) for name in contenders}       # nothing: the base
    judge_methods(run, contenders, to, trained)
    if cfg.run.curve:
        show_curves(run, points)


def before_learning(run, stages, contenders):
    """{"before": Contender} of what the first stage of reinforcement learning, or of chains for a pretrained model,
    starts from, asked as reinforcement learning asks. A later stage that starts elsewhere, or asks otherwise, has a row
    of its own, "before_NAME". {} where these are rows already."""
    rows = {contender.path for contender in contenders.values()}
    learners = [name for name in stages if name == "cot" or name in algorithms.STAGES]
    found = {}
    for name in learners:
        start, is_pretrained = start_of(run, name)
        teaches = name in algorithms.STAGES or is_pretrained
        if teaches and start.path not in rows and start not in found.values():
            found["before" if name == learners[0] else f"before_{name}"] = start
    return found


def start_of(run, stage):
    """-> (what a stage starts from as a Contender, asked as reinforcement learning asks it; whether its decoder is a
    pretrained one)."""
    cfg = run.cfg
    if run.begins_with_llava(stage):
        return Contender(cfg.vlm.llava, asked_by(cfg, stage, ""), is_folder=True), True
    path = run.path_before(stage)
    state = checkpoint.load(path)
    is_pretrained = state["vlm_config"]["speaks"]
    return Contender(path, asked_by(cfg, stage, state.get("method", ""))), is_pretrained


def judge_methods(run, contenders, to="", trained=None):
    """As evaluation.compare, on the tests of the run."""
    cfg = run.cfg
    tests, has_teacher = taught_tests(run)
    probes = None
    if cfg.run.compare == "generalisation" and "cot" in contenders:
        probes = evaluation.probes_of(run.supply, cfg.judge, "cot")
    shown = run.real["train"] if run.supply.has_classes else ()
    evaluation.compare(run.folder, cfg, contenders, tests, run.rewards(cfg), has_teacher, to, trained, probes, shown)


def taught_tests(run):
    """-> (the tests of the run, each with the chain of the teacher that stage cot learns from; whether they have one).
    Of one's own pictures that is --teacher, or the candidates of the CLIP at hand with choices that are the same for
    every seed; chains that the data bring all end in the gold answer."""
    cfg = run.cfg
    tests = run.supply.tests(count_of_tests(cfg))
    if run.supply.teach or not run.real:
        return tests, True
    asked = [sample for samples in tests.values() for sample in samples]
    own_chains = all(sample.reasoning for sample in run.real["train"])
    if own_chains or not run.path("cot").exists():
        return tests, False
    chains_of = iter(real_chains(run, checkpoint.load(run.path("cot")), asked, scenes.TEST_SEED[cfg.data.eval_set]))
    return {split: [next(chains_of) for _ in samples] for split, samples in tests.items()}, True


# ---------------------------------------------------------------- along the curves

def is_arm(stage):
    """Whether a stage is one of those that are compared, not one that they start from."""
    return stage_of(stage) not in ("clip", "align", "sft", "cot", "rejection_first")


def points_behind(points, share):
    """How many points of a curve lie at or before this share of its stage. They stand at (1/points)^2, (2/points)^2, ..
    1 of it: most is learned early.

    >>> [points_behind(4, share) for share in (0.06, 0.0625, 0.25, 0.9, 1.0)]
    [0, 1, 2, 3, 4]
    """
    return int(points * math.sqrt(share) + 1e-9)


# What a point of a curve is asked: there are many. The best one is chosen by the validation prompts.
POINT = dict(tests=100, validation=200, samples=2)


def follow_curves(run, stages, labels, tests):
    """Evaluates every arm at each point of its curve, and what it starts from as point 0, on the tests and, as split
    "validation", on prompts that nothing is reported on -> the rows of curve.json."""
    cfg = run.cfg
    path = run.folder / "curve.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    validation = run.supply.tests(POINT["validation"], "val")
    home = statistics.main_split(list(validation))
    asked = {"validation": validation[home]}
    asked |= {split: samples[:POINT["tests"]] for split, samples in tests.items()}
    done = {(row["stage"], row["point"]) for row in rows}
    for stage in filter(is_arm, stages):
        before = path_of(stage, cfg.stages())[:-1]
        spent = run.spent(before)
        start = run.path((before or ["sft"])[-1])
        if cfg.run.init and not start.exists():
            start = Path(cfg.run.init)
        ways = {0: start}
        ways |= {point: run.point(stage, point) for point in range(1, cfg.run.curve + 1)}
        for point, model in ways.items():
            if (stage, point) in done or not model.exists():    # a stage of few steps has fewer points
                continue
            flops = spent + (checkpoint.load(model)["flops"] if point else 0)
            contender = Contender(model, most=POINT["validation"], samples=POINT["samples"])
            found = evaluation.scores_of(contender, cfg, asked)
            place = dict(method=labels[stage], stage=stage, point=point, flops=flops, seed=cfg.run.seed)
            rows += statistics.curve_rows(place, found)
        write_json(path, rows)
        print(f"followed {labels[stage]}", flush=True)
    return rows


def show_curves(run, points):
    """Arms at equal accuracy in distribution, as text and as frontier.png; nothing without an arm."""
    if not points:
        return
    decoding = run.cfg.judge.decoding
    print("\n" + matched_text(points, decoding))
    evaluation.write_picture(run.folder / "frontier.png", frontier(points, decoding))


def best_along(run, points):
    """{"NAME@best": Contender} of the supervised arms: the point of the curve that is best on validation prompts, the
    first of equals."""
    decoding = run.cfg.judge.decoding
    best = {}                           # stage -> its best row
    for row in points:
        counts = row["split"] == "validation" and row["decoding"] == decoding and row["point"]
        if not counts or row["stage"] in algorithms.STAGES:
            continue
        if row["stage"] not in best or row["value"] > best[row["stage"]]["value"]:
            best[row["stage"]] = row
    contenders = {}
    for stage, row in best.items():
        print(f"{stage}@best: point {row['point']} of {run.cfg.run.curve}, {row['value']:.3f} on validation prompts")
        contenders[f"{stage}@best"] = Contender(run.point(stage, row["point"]))
    return contenders


# What prompting and search are asked: they cost many tokens an answer.
FEW = dict(splits=("id", "crowded"), most=100)
# Four candidates each, whole answers or ways to go on with a stage: about as many tokens sampled for an answer.
SEARCHED = (Search("majority", 4), Search("best_of_n", 4, "logp"), Search("best_of_n", 4, "self"),
            Search("best_of_n", 4, "oracle"), Search("stage_beam", 4, "logp"), Search("stage_beam", 4, "self"))


def untrained(path):
    """The base of the routes: prompted by every method, and, asked for a thought, by 64 samples a prompt, whose pass@64
    tells whether RL has anything to find there."""
    contenders = {"base": Contender(path)}
    for name in METHODS:
        if name != "direct":
            contenders[f"base+{name}"] = Contender(path, prompting=name, **FEW)
    contenders["base+think[64]"] = Contender(path, method="think", splits=("id",), most=50, samples=64)
    return contenders


def searched(label, path):
    """A model of chains in stages with search: stage beams, and choices among whole answers."""
    contenders = {}
    for search in SEARCHED:
        contenders[f"{label}+{search.label}"] = Contender(path, search=search, **FEW)
    return contenders


def path_of(stage, stages):
    """The stages behind the base, `sft`, that made a stage: what it starts from, and itself."""
    path = [stage]
    for name in begins_at(stage, stages):
        path = [*path_of(name, stages), stage]
    return [name for name in path if name not in ("clip", "align", "sft")]


def explain(cfg, plan, notes):
    """--explain: prints what the model as it is does on a few prompts; leaves nothing behind."""
    show_notes(notes)
    with tempfile.TemporaryDirectory() as folder, Run(change(cfg, out=folder), folder, plan) as run:
        open_run(run)
        name = cfg.run.stage
        STAGES[name].train(run, name, config_of(run.cfg, name), run.start(name))


def many_seeds(cfg):
    """--seeds: a run for each, in processes of their own, then mean, spread and 95 % t-intervals over them. Raises
    ValueError about what no seed could start with before the folder is made."""
    with RunFolder(choose(cfg.run.out, cfg.run.preset, cfg.run.resume)) as run:
        open_many(cfg, run)
        seeds = range(cfg.run.seed, cfg.run.seed + cfg.run.seeds)
        run_seeds(__file__, cfg, seeds, run.folder)
        print(seeds_report.report_seeds(run.folder, seeds, checkpoint.write_bytes))
        show_joint(run.folder)


def open_many(cfg, run):
    """Makes the folder of several runs, or reopens it. Raises ValueError about what none of them could start with
    before it is made."""
    samples = Supply(cfg.data, cfg.teacher, cfg.run.seed).own()
    if cfg.run.init:
        checkpoint.load(cfg.run.init)
    if cfg.run.resume:
        # Without --threads the number of jobs decides the threads of each, and with them the rounding.
        free = ("resume", "out", "jobs") if cfg.machine.threads else ("resume", "out")
        run.reopen(flat(cfg), flat(Config()), free, (), samples)
    else:
        run.create(flat(cfg), samples)
    add(run.folder, environment(cfg, cfg.machine.device))


def grid(cfg):
    """--grid: a run for every cell and seed, in processes of their own, then cells compared seed by seed. Without
    --compare and --stage a cell has no other arm than the one that is ablated."""
    cells = read_cells(cfg, cfg.run.grid)
    with RunFolder(choose(cfg.run.out, cfg.run.preset, cfg.run.resume)) as run:
        alone = cfg if {"compare", "stage"} & {*cfg.run.flags.split()} else change(cfg, compare="none")
        seeds = range(cfg.run.seed, cfg.run.seed + max(1, cfg.run.seeds))
        stages = alone.stages()
        plan = planned(alone, cells, seeds, stages, partial(first_touched, stages), algorithms.of_flags, run.folder)
        runs = {}                       # sub-folder -> (name of its cell, seed, label of the row that counts)
        for name, variant in plan.cells.items():
            variant.check()
            number, seed = plan.at[name]
            runs[name] = (name_of(cells[number]), seed, counted(variant))
        open_many(cfg, run)
        for configs in (plan.shared, plan.cells):
            run_all(__file__, unfinished(configs, run.folder), cfg.run.jobs, run.folder)
        names = [name_of(cell) for cell in cells]
        rows = grid_report.collect(run.folder, runs)
        entries = read_rows(run.folder / "environment.json")
        html = grid_report.grid_page(run.folder.name, run.folder, rows, cells, names, entries)
        checkpoint.write_bytes(run.folder / "report.html", html)
        write_json(run.folder / "results.json", rows)
        print("\n" + grid_report.grid_text(rows, cells, names))
        print(f"\n{run.folder}: report.html, results.json and a folder for every cell and seed")


def unfinished(configs, folder):
    """Those of {sub-folder: config} that have no results yet."""
    return {name: cfg for name, cfg in configs.items() if not (folder / name / "results.json").exists()}


# Options that nothing before reinforcement learning reads, beside those of the groups rl, algorithm and reward.
OF_RL_ALONE = ("group", "temperature", "top_k", "top_p", "min_new", "rollout_rows", "rl_prompts")


def first_touched(stages, option):
    """The first of these stages that reads an option; the first of all where that is not known to be a later one."""
    learners = [stage for stage in stages if stage in algorithms.STAGES]
    if group_of(Config, option) in ("rl", "algorithm", "reward") or option in OF_RL_ALONE:
        need(learners, "grid", option, "come with a stage of reinforcement learning, which alone reads it")
        return learners[0]
    stage = option.removesuffix("_lr").removesuffix("_steps")
    return stage if stage in stages else stages[0]


def counted(cfg):
    """The label of the row that a cell is judged by: its first reinforcement learning, else its last stage."""
    stages = cfg.stages()
    learners = [stage for stage in stages if stage in algorithms.STAGES]
    return algorithms.label(cfg, (learners or stages[-1:])[0])


def show_joint(folder):
    """The tables and pictures that special comparisons have, over their seeds; nothing of other runs."""
    if (folder / "generalisation.json").exists():
        found = json.loads((folder / "generalisation.json").read_text())
        results = json.loads((folder / "results.json").read_text())
        print("\n" + generalisation.generalisation_text([*results, *found], transfer.PARTS))
        evaluation.write_picture(folder / "generalisation.png", generalisation.picture(found, transfer.PARTS))
    if (folder / "growth.json").exists():
        found = json.loads((folder / "growth.json").read_text())
        print("\n" + growth.growth_text(found))
        evaluation.draw_growth(folder, found)


BENCH_ROOM = 0.8            # share of the free memory that a step of the bench is planned to take at most


def run_bench(cfg):
    """--bench: what BENCHES has, --rl-steps turns of it, on random weights and pictures and prompts of 12 words."""
    cfg = change(cfg, rewards="bench:1", gated=False, min_new=cfg.sampling.max_new, inspect_every=0)
    with tempfile.TemporaryDirectory() as folder, Run(cfg, folder) as run:
        pieces = [*chat.TAGS, *(f"▁{word}" for word in bench.WORDS)]
        run.tokenizer = tokenizer.train([" ".join(bench.WORDS)] * 2, pieces, cfg.llm.vocab)
        config = bench_shape(run, cfg)
        vlm = run.ready(VLM(config), "bench")
        show_trained("bench", vlm)
        precision = cfg.machine.dtype
        if precision == "mixed":
            precision = "mixed (floors of float32)"
        layers = f"{config.llm.layers} layers"
        if config.llm.layers < cfg.llm.layers:
            layers += f" of {cfg.llm.layers}, which this machine has no room for"
        setting = (f"{cfg.rl.rl_batch} prompts x {cfg.sampling.group}, {cfg.sampling.max_new} new tokens, "
                   f"{config.image_tokens} image tokens, {layers}, {run.device}, {precision}, "
                   f"{torch.get_num_threads()} threads")
        BENCHES[cfg.run.bench](run, cfg, vlm, setting)


def bench_shape(run, cfg):
    """VlmConfig of the bench, of as many layers as the machine has room for."""
    vocab = cfg.llm.vocab
    config = VlmConfig(cfg.clip.config(vocab), cfg.llm.config(vocab), **cfg.vlm.shape())
    room = machine.room(run.device)
    optim = cfg.optim
    P, tokens, sampling = memory.shape_of("bench", cfg, config.image_tokens + 40, samples=True)
    while room is not None and config.llm.layers > 1:
        vlm = prepare.on_meta(config, cfg, "bench")
        planned = memory.plan(vlm, tokens, pictures=P, moments=optim.moments, master=optim.master, **sampling)
        needed = sum(planned.values()) + memory.moment(vlm, tokens, run.device, optim.moments, optim.master)
        if needed <= BENCH_ROOM * room:
            break
        config = replace(config, llm=replace(config.llm, layers=config.llm.layers - 1))
    return config


def bench_step(run, cfg, vlm, setting):
    """An RL step and its parts, no early stop; in turns with TRL's where the `peers` extra is installed. The first turn
    is left out."""
    P, G, C = cfg.rl.rl_batch, cfg.sampling.group, cfg.sampling.max_new
    turns = cfg.rl.rl_steps
    rewards = Rewards(cfg.reward, functions={"bench": bench.varied})
    samples = bench.samples(P * (turns + 1), cfg.clip.image_size)
    lines = []

    def turn():
        asked = samples[P * len(lines):P * (len(lines) + 1)]
        reinforce(run, f"bench{len(lines)}", cfg, vlm, asked, "direct", rewards, Schedule(1, P, cfg.rl.rl_lr), Meter())
        lines.append(read_log(run.log_path)[-1])

    trl = peers.version("trl")
    theirs = []
    if trl:
        theirs = peers.trl_step(vlm.config, P, G, C, turns, turn, run.device, run.dtype)
    else:
        for _ in range(turns + 1):
            turn()
    lines = lines[1:]
    clock, batch, rollout = bench_rollout(run, cfg, vlm, samples[:P], rewards)
    work = clock.work | {"update": lines[-1]["flops"] - sum(clock.work.values())}
    print(bench.step_text(setting, lines, bench_floors(run, vlm, work, batch, rollout)))
    if theirs:
        print(bench.versus_text(f"TRL {trl}", theirs, bench.whole(lines)))


def bench_decode(run, cfg, vlm, setting):
    """A rollout and its parts, in turns with Hugging Face's generate where transformers is installed. The first turn is
    left out."""
    P, G, C = cfg.rl.rl_batch, cfg.sampling.group, cfg.sampling.max_new
    rewards = Rewards(cfg.reward, functions={"bench": bench.varied})
    samples = bench.samples(P, cfg.clip.image_size)
    others = peers.version("transformers")
    generate = None
    if others:
        generate = peers.generation(vlm.config, P, G, C, run.device, run.dtype)
    laps = {"encode": [], "prefill": [], "decode": []}
    theirs = []
    for _ in range(cfg.rl.rl_steps + 1):
        clock, batch, rollout = bench_rollout(run, cfg, vlm, samples, rewards)
        for part, seconds in laps.items():
            seconds.append(clock.laps[part])
        if generate:
            other = metrics.Clock(run.device)
            generate()
            other.lap("generate")
            theirs.append(other.laps["generate"])
    laps = {part: seconds[1:] for part, seconds in laps.items()}
    print(bench.decode_text(setting, laps, P * G * C, bench_floors(run, vlm, clock.work, batch, rollout)))
    if generate:
        ours = [sum(parts) for parts in zip(*laps.values())]
        print(bench.versus_text(f"transformers {others}, generate", theirs[1:], ours))


def bench_prefix(run, cfg, vlm, setting):
    """The update with shared prompts against one with repeated ones."""
    P, G, C = cfg.rl.rl_batch, cfg.sampling.group, cfg.sampling.max_new
    samples = bench.samples(P, cfg.clip.image_size)
    batch = prompts(vlm, run.tokenizer, samples, "direct", cfg.data.template)
    completions = torch.randint(3, cfg.llm.vocab, (P, G, C), device=run.device)
    print(bench.prefix_text(setting, bench.shared_prefix(vlm, batch, completions)))


BENCHES = {"step": bench_step, "decode": bench_decode, "prefix": bench_prefix}


def bench_rollout(run, cfg, vlm, samples, rewards):
    """-> (WorkClock, batch, Rollout) of one rollout."""
    meter = Meter()
    clock = bench.WorkClock(run.device, meter)
    generator = torch.Generator(run.device).manual_seed(0)
    batch, rollout = roll_out(Sampler(vlm, meter), run.tokenizer, samples, "direct", cfg, rewards, generator, clock)
    return clock, batch, rollout


def bench_floors(run, vlm, work, batch, rollout):
    """What parts with so much work take by this machine's large matmuls and copies -> {part: seconds}."""
    P, T = batch.ids.shape
    _, G, C = rollout.ids.shape
    blocks = sum(p.nbytes for p in vlm.llm.layers.parameters())
    weights = (C - 1) * blocks + C * vlm.llm.head.nbytes
    cache = bench.cache_read(P, T, G, C, memory.slot(vlm.llm))
    return bench.floors(work, ceilings(run.device, run.dtype), weights, cache)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):     # a class or an answer that the terminal cannot show ends no run
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {parallel.name()}{error}")
    except (MemoryError, RuntimeError) as error:
        if parallel.lost(error):
            watchdog.end(parallel.lost(error))
        found = memory.shortage(error, "a smaller model, --micro-batch, --max-new or batch of the stage needs less, in "
                                       "a new run; --init= starts that from this one's last stage")
        sys.exit(f"train.py: {parallel.name()}{found}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; --resume goes on from the last checkpoint")
