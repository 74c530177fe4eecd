"""Teach a vision-language model to see, to answer, and to reason. Every stage is a function here; two loops train.

    python train.py                                    # everything from nothing, then the comparison
    python train.py --compare=all                      # with every baseline
    python train.py --seeds=5                          # mean and spread over seeds 0-4
    python train.py --data=images:DIR                  # your own folder of class sub-folders of pictures
    python train.py --data=jsonl:FILE                  # your own questions and answers
    python train.py --preset=llava-1.5-7b --data=llava:FILE --image-root=DIR       # a published recipe
    python train.py --stage=rl --init=out/NAME/cot.pt  # one stage, from a checkpoint
    python train.py --resume                           # go on with the last interrupted run
    python train.py --preset=bench                     # where the time of an RL step goes
"""
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
from data import chat, llava, scenes, teachers, tokenizer
from data.sample import batch_indices, collate
from data.supply import TEST_SEED, Supply, source_of
from model import flops, memory, prepare
from model.hub import pretrained
from model.runs import checkpoint
from model.clip import Clip, ClipConfig, contrastive_loss
from model.runs.config import adopt, check_ranges, describe, from_command_line, needs
from model.runs.device import pick_device, pick_dtype
from model.hub.export import export_folder
from model.llama import LlamaConfig
from model.optim import diverged, learning_rate, make_optimizer, optimizer_step, seed_of, show_trained, stepper
from model.runs.presets import PRESETS
from model.runs.folder import RunFolder, choose, resumed, write_json
from model.vlm import VLM, VlmConfig
from rl import algorithms, metrics, rewards
from rl.report.log import read_log
from rl.learner import Guard, make_learner
from rl.types import Experience, Rollout
from rl.update import estimated, informative, scored, update


@dataclass(frozen=True)
class Config:
    # what to run
    preset: str = ""                # model/runs/presets.py has them; empty: by --data, --bench, --clip, --llm, --llava
    data: str = "scenes"            # scenes | images:DIR | jsonl:FILE | llava:FILE, a JSON of LLaVA's conversations
    stage: str = "all"              # all, or some of clip,align,sft,cot,rl and the comparison's methods, in order
    init: str = ""                  # checkpoint the first stage starts from
    clip: str = ""                  # CLIP: open_clip's NAME/TAG or NAME:FILE, or a folder; empty: from nothing
    llm: str = ""                   # decoder: a Hugging Face folder or name; empty: from nothing
    llava: str = ""                 # a whole LLaVA to go on with, a folder or name
    export: str = ""                # hf:DIR: the last stage's model, as a folder for transformers and vLLM
    compare: str = "basic"          # none | basic: cot_continued, filtered | all: every method | algorithms | rewards
    out: str = ""                   # run folder; empty: a new one under out/
    resume: bool = False            # go on with the interrupted run in --out (empty: the newest)
    tensorboard: bool = False       # log.jsonl's numbers also into the run folder's tensorboard/
    seed: int = 0                   # decides everything random
    seeds: int = 0                  # n: run seeds 0 .. n-1 (counted from --seed), report mean and spread
    jobs: int = 1                   # seeds that run side by side, the threads shared among them
    explain: int = 0                # n: print n prompts' completions, rewards and advantages, train nothing, stop
    bench: str = ""                 # step: time the parts of an RL step | prefix: what sharing prompts saves; and stop
    flags: str = ""                 # names of the flags that were given, which no stage overrides; filled in by itself
    # the machine
    device: str = "auto"            # auto: CUDA when present | cpu | cuda:N
    dtype: str = "float32"          # of weights and activations: float32 | bfloat16 | float64
    compile: bool = False           # torch.compile the decoder's blocks: a minute of compiling, then faster steps
    checkpointing: bool = False     # activations of a block are computed again in the backward, not kept
    master: bool = True             # bfloat16 weights: AdamW keeps an fp32 copy of what trains
    moments: str = "float32"        # bfloat16 weights: AdamW's moments, float32 | bfloat16
    threads: int = 0                # CPU threads; 0: torch's choice. Another number rounds differently
    save_every: int = 100           # steps between checkpoints inside a stage
    # CLIP (OpenAI's architecture but for the options stem and pool)
    image_size: int = 48            # pixels
    patch: int = 12                 # pixels of a patch's side
    clip_width: int = 128           # image tower
    clip_layers: int = 2            # image tower
    clip_heads: int = 4             # image tower
    clip_stem: str = "mlp"          # conv: OpenAI's | mlp: makes shapes readable from nothing
    clip_pool: str = "mean"         # class: OpenAI's | mean: average of patch tokens
    clip_act: str = "quick_gelu"    # quick_gelu | gelu
    text_width: int = 64            # text tower
    text_layers: int = 1            # text tower
    text_heads: int = 2             # text tower
    text_length: int = 40           # tokens of a caption
    embed: int = 128                # joint embedding of pictures and texts
    # projector and decoder
    feature_layer: int = -2         # block whose patch tokens W reads; LLaVA: second to last
    projector: str = "linear"       # linear: LLaVA's W | mlp2x_gelu: LLaVA-1.5
    image_positions: bool = True    # add a learned vector to each image token
    width: int = 128                # decoder
    layers: int = 4                 # decoder
    heads: int = 4                  # query heads
    kv_heads: int = 4               # key/value heads (grouped-query attention)
    ff: int = 256                   # SwiGLU width
    theta: float = 10000.0          # RoPE base
    eps: float = 1e-5               # RMSNorm
    tied: bool = True               # the head is the embedding
    qkv_bias: bool = False          # on q, k, v (Qwen 2)
    vocab: int = 512                # at most this many pieces
    template: str = "brief"         # brief | vicuna_v1 | llama_2 | chatml | auto: by the tokenizer's special tokens
    lora_rank: int = 0              # adapters in the decoder's blocks, which then stand still; 0: none
    lora_alpha: float = 16.0        # their output counts alpha / rank
    lora_targets: str = "q_proj,v_proj"     # Linears that get one, or all
    # data
    pictures: int = 16000           # drawn for clip and for align
    questions: int = 12000          # drawn for sft
    traces: int = 10000             # teacher's chains for cot, and as many fresh ones for its continuations
    rl_prompts: int = 4800          # drawn for rl
    image_root: str = ""            # folder that the image paths of --data=llava:FILE start from
    bad_records: str = "skip"       # of --data=llava:FILE, without image, answer, ..: skip, and say which | stop
    image_fit: str = ""             # crop | pad, how pictures become square; align crops; empty: as the model has it
    max_length: int = 0             # tokens of a record in supervised stages, cut beyond; 0: any number
    val_percent: int = 20           # of a folder or file without its own split
    slip: float = 0.06              # teacher: each step goes wrong at random
    confuse: float = 0.65           # teacher: purple is read as blue, cyan as green
    drop_hop: float = 0.60          # teacher: the last hop of a walk is forgotten
    forget_close: float = 0.60      # teacher: </think> is left out
    teacher_error: float = 0.30     # teacher of real pictures: names a wrong candidate
    candidates: int = 3             # answers a chain on a real picture weighs
    # supervised training
    clip_steps: int = 700           # optimizer steps
    clip_batch: int = 96            # pairs
    clip_lr: float = 1e-3           # peak learning rate
    align_steps: int = 480          # optimizer steps
    align_lr: float = 2e-3          # peak; from nothing the decoder learns language here as well
    align_batch: int = 0            # records a step; 0: --batch
    align_epochs: float = 0.0       # passes over the records of align, in the place of its steps; 0: those
    sft_steps: int = 200            # optimizer steps; 0 skips the stage
    sft_epochs: float = 0.0         # passes over the records of sft, in the place of its steps; 0: those
    sft_lr: float = 2e-3            # peak learning rate
    cot_steps: int = 700            # optimizer steps
    cot_lr: float = 2e-3            # peak learning rate
    module_lr: str = ""             # rates in units of the stage's, as in projector:0.1,llm.embed_tokens:0; 0 freezes
    group_lengths: bool = False     # of --data=llava:FILE: batches of records of like length
    batch: int = 32                 # samples a step
    micro_batch: int = 48           # samples, or prompts with their group, at a time; 0: all. No gradient depends on it
    warmup: float = 0.05            # share of the steps
    final_lr: float = 0.05          # cosine ends at this share of the peak
    weight_decay: float = 0.0       # AdamW
    beta2: float = 0.95             # AdamW
    grad_clip: float = 1.0          # global norm
    # reinforcement learning
    rl_steps: int = 150             # rollouts
    rl_batch: int = 32              # prompts a rollout
    group: int = 8                  # completions of each
    rl_lr: float = 5e-4             # peak learning rate
    temperature: float = 1.0        # of sampling and of the log-probs
    max_new: int = 32               # token budget, the same in training and evaluation
    min_new: int = 0                # no EOS before this many tokens
    epochs: int = 1                 # passes over a rollout
    mini_batches: int = 1           # optimizer steps a pass
    # what an algorithm sets (rl/algorithms.py has the papers)
    algorithm: str = "grpo_token"   # or grpo | dr_grpo | dapo | gspo | cispo | sapo | luspo | rloo | reinforce++ | ppo
    loss: str = "clip"              # clip | cispo | sapo
    ratio: str = "token"            # importance ratio of each token | of the whole sequence (GSPO)
    clip_low: float = 0.2           # ratio clip below; acts from the second update of a rollout on
    clip_high: float = 0.2          # ratio clip above
    bound: float = 0.0              # largest ratio in front of a negative advantage (dual clip); 0: none
    norm: str = "token"             # sequence: each completion alike | token: each token | constant: budget | sum
    baseline: str = "mean"          # mean | leave_one_out (RLOO) | batch (REINFORCE++) | critic (PPO)
    flat: str = "drop"              # groups of equal rewards: drop | count in denominators, at no cost
    std: str = "group"              # advantages over the deviation of the group | batch | none
    combine: str = "sum"            # rewards are summed, then normalised | each normalised, then summed (GDPO)
    kl: str = "k3"                  # KL to the starting policy: estimators k1 | k2 | k3, or exact over the vocabulary
    kl_coef: float = 0.0            # its coefficient
    kl_in: str = "loss"             # loss | reward
    kl_target: float = 0.0          # nats a token that the coefficient adapts to; 0: it is fixed
    ref_sync: int = 0               # rollouts after which the reference becomes the policy; 0: never
    entropy_coef: float = 0.0       # bonus for entropy
    top_entropy: float = 1.0        # share of the tokens that train, those of highest entropy
    correct: str = "none"           # weights against drift between sampling and update: none | truncate | mask
    correct_cap: float = 2.0        # largest such weight
    correct_level: str = "token"    # token | sequence
    refill: int = 0                 # dynamic sampling: at most so many more rollouts in the place of flat groups
    drop_truncated: bool = False    # completions that hit the budget do not train
    overlong_share: float = 0.0     # last share of the budget in which the soft penalty on length grows to -1
    kl_stop: float = 0.0            # nats a token from the old policy that end a rollout's updates; 0: never
    critic: str = "shared"          # value head on the policy's decoder | detached from it | separate decoder
    gamma: float = 1.0              # discount
    lam: float = 0.95               # of GAE
    value_lr: float = 1.0           # critic's learning rate, in units of the policy's
    value_coef: float = 0.5         # of its loss
    value_clip: float = 0.2         # of its change in a rollout; 0: none
    return_norm: bool = False       # critic in units of the returns seen so far
    bootstrap: bool = False         # completions that hit the budget go on being worth what the critic says
    bad_steps: int = 3              # losses or gradients in a row that are not finite before the run stops
    # rewards
    rewards: str = "correctness:1,format:0.1"   # weighted: rl/rewards.py's, or FILE.py:NAME:WEIGHT
    gated: bool = True              # a right answer counts only in a well-formed completion
    reward_timeout: float = 5.0     # seconds that a reward of one's own may take for a completion
    reward_errors: str = "zero"     # one that raises or hangs: counts zero | stop the run
    # evaluation
    eval_set: str = "test"          # test | val: other prompts, for tuning
    eval_greedy: int = 300          # prompts a split, greedy
    eval_sampled: int = 200         # prompts a split, T = 1
    eval_samples: int = 8           # completions of each at T = 1, for pass@ and maj@
    eval_batch: int = 512           # rows sampled at once

    def check(self):
        """Raises ValueError in one sentence about the first value that cannot work; returns notes on idle ones."""
        need = needs(self)
        check_ranges(self, RANGES, algorithms.ALLOWED | dict(
            compare=tuple(COMPARISONS), eval_set=tuple(TEST_SEED), bench=("", "step", "prefix"),
            template=("auto", *chat.TEMPLATES), projector=("linear", "mlp2x_gelu"),
            bad_records=("skip", "stop"), image_fit=("", "crop", "pad"), moments=("float32", "bfloat16")))
        need(self.seed + self.seeds <= 2 ** 31, "seed", f"leave room for --seeds={self.seeds} below 2147483648")
        need(self.rl_batch % self.mini_batches == 0, "rl_batch", f"be a multiple of --mini-batches={self.mini_batches}")
        need(self.min_new <= self.max_new, "min_new", f"not exceed --max-new={self.max_new}")
        need(-self.clip_layers <= self.feature_layer < 0, "feature_layer", f"lie in [-{self.clip_layers}, -1]")
        pick_dtype(self.dtype)
        source, _ = source_of(self.data)
        prepare.check(self, need, self.stages())
        need(source != "scenes" or self.image_size == scenes.SIZE or self.bench, "image_size",
             f"be {scenes.SIZE} for drawn scenes")
        self.clip_config(1), self.llm_config(1)
        for name in self.stages():
            if name not in STAGES:
                raise ValueError(f"--stage={self.stage}: {name!r} must be one of {', '.join(STAGES)}")
        need(not self.explain or self.stage in algorithms.STAGES,
             "explain", "come with one stage of reinforcement learning, as in --stage=rl --init=FILE")
        need(self.algorithm == Config.algorithm or not {*self.stages()} & {*algorithms.ALGORITHMS}, "algorithm",
             "be left out where stages are named after algorithms")
        algorithms.labels(self, self.stages())
        notes = list(dict.fromkeys(note for stage in self.stages() for variant in [algorithms.of_stage(self, stage)]
                                   for note in algorithms.check(variant, needs(variant))))
        weights = rewards.parse_weights(self.rewards)
        if self.gated and "correctness" in weights and "format" not in weights:
            notes.append("correctness is gated on the format although the format itself earns nothing")
        if source != "scenes" and (self.slip, self.confuse, self.drop_hop) != (0.06, 0.65, 0.60):
            notes.append("--slip, --confuse and --drop-hop have no effect: they belong to the teacher of drawn scenes")
        return notes

    def clip_config(self, vocab):
        return ClipConfig(self.image_size, self.patch, self.clip_width, self.clip_layers, self.clip_heads, self.embed,
                          self.text_width, self.text_layers, self.text_heads, self.text_length, vocab,
                          self.clip_stem, self.clip_pool, self.clip_act)

    def llm_config(self, vocab):
        return LlamaConfig(vocab, self.width, self.layers, self.heads, self.kv_heads, self.ff, self.theta, self.eps,
                           self.tied, qkv_bias=self.qkv_bias)

    @property
    def pretrained(self):
        return self.clip or self.llm or self.llava

    def stages(self):
        if self.stage != "all":
            return self.stage.split(",")
        first = [] if self.llava else ["align"] if self.clip else ["clip", "align"]
        first += ["sft"] if self.sft_steps or self.sft_epochs else []
        if self.data.startswith("llava:"):
            return first
        return [*first, "rl"] if self.pretrained else [*first, "cot", *COMPARISONS[self.compare]]


# The range of every number above; a test holds that none is left out. The upper ends are far beyond any use: what lies
# outside is a slip, and would end in a crash, a hang or numbers that are not finite.
RANGES = {
    "[0, 2147483647]": "seed",
    "[0, 1000000000]": "clip_steps align_steps sft_steps cot_steps rl_steps ref_sync",
    "[1, 1000000000]": "save_every",
    "[1, 100000000]": "pictures questions traces rl_prompts",
    "[1, 1000000]": "batch rl_batch eval_greedy eval_sampled eval_batch bad_steps correct_cap",
    "[2, 1000000]": "clip_batch vocab",
    "[2, 131072]": "width text_length",
    "[1, 131072]": "max_new clip_width text_width embed",
    "[0, 131072]": "min_new",
    "[1, 1e12]": "theta",
    "[1, 1048576]": "ff",
    "[1, 8192]": "image_size patch",
    "[0, 10000]": "seeds explain lora_rank",
    "[1, 10000]": "group eval_samples epochs mini_batches",
    "[0, 1024]": "threads refill",
    "[1, 1024]": "jobs layers heads kv_heads clip_layers clip_heads text_layers text_heads",
    "[2, 1000]": "candidates",
    "[-1024, -1]": "feature_layer",
    "[1, 99]": "val_percent",
    "[0, 100000]": "align_epochs sft_epochs",
    "[0, 1]": "slip confuse drop_hop forget_close teacher_error warmup final_lr gamma lam clip_low overlong_share",
    "(0, 1]": "top_entropy",
    "[0, 1)": "beta2",
    "[0, 0.1]": "eps",
    "(0, 10000]": "clip_lr align_lr sft_lr cot_lr rl_lr value_lr",
    "[0, 100]": "weight_decay",
    # Colder than this is greedy, which evaluation has; the logits are divided by it.
    "[0.01, 100]": "temperature",
    "(0, 1000000]": "grad_clip lora_alpha",
    "[0, 1000000]": "micro_batch align_batch max_length "
                    "clip_high bound kl_coef kl_target entropy_coef kl_stop value_coef value_clip",
    "(0, 86400]": "reward_timeout",
}

# what --compare adds to clip, align, sft and cot
COMPARISONS = {
    "none": ["rl"], "basic": ["rl", "cot_continued", "filtered"],
    "all": ["rl", "cot_continued", "filtered", "rejection_first", "rejection", "sft_direct", "perfect", "rl_zero"],
    "algorithms": ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo"], "rewards": [*algorithms.REWARDS],
}


class Run(RunFolder):
    """A run folder and what all stages share: config, device, data, tokenizer, counted FLOPs."""

    def __init__(self, cfg, folder, plan=None):
        super().__init__(folder, pick_device(cfg.device))
        self.plan = plan                # VlmConfig of a pretrained model, said at the start
        self.cfg, self.dtype = cfg, pick_dtype(cfg.dtype)
        self.flops, self.state = 0, {}
        self.supply = Supply(cfg)
        self.samples, self.real, self.records = self.supply.samples, self.supply.real, self.supply.records
        print(self.supply.found, end="\n" if self.supply.found else "")

    def prepare_tokenizer(self):
        """From --init, --llava or --llm, or from the folder, else trained on what the training data says."""
        cfg, saved = self.cfg, self.folder / "tokenizer.model"
        if cfg.init:
            self.tokenizer = tokenizer.from_saved(checkpoint.load(cfg.init, self.device)["tokenizer"],
                                                  f"the tokenizer in checkpoint {cfg.init!r}")
        elif cfg.llava or cfg.llm:
            self.tokenizer = pretrained.load_tokenizer(cfg.llava or cfg.llm)
        elif saved.exists():
            self.tokenizer = tokenizer.from_saved(saved.read_bytes(), f"the tokenizer {str(saved)!r}")
        else:
            self.tokenizer = tokenizer.train(*self.supply.corpus(), cfg.vocab)
        if cfg.template == "auto":
            self.cfg = replace(cfg, template=chat.template_for(self.tokenizer))

    def start(self, stage):
        """Loads what `stage` starts from, --init, --llava or the stage before; -> its VLM, None if it has none yet."""
        torch.manual_seed(seed_of(self.cfg.seed, stage))
        self.flops, self.state = 0, {}
        self.supply.begin(stage, read_log(self.log_path))
        if stage == self.cfg.stages()[0] and self.cfg.llava:
            return self.ready(pretrained.load_llava(self.cfg.llava, self.dtype, self.device, self.cfg.clip)[0], stage)
        if not STAGES[stage][1] or stage == "align" and self.cfg.clip and not self.cfg.init:
            return None
        origin = next((path for before in STAGES[stage][1] if (path := self.path(before)).exists()), self.cfg.init)
        if stage == self.cfg.stages()[0] and self.cfg.init:
            origin = self.cfg.init
        self.state = checkpoint.load(origin, self.device)
        if "vlm" not in self.state:
            return None
        return self.ready(VLM.from_config(self.state["vlm_config"], self.state.pop("vlm")), stage)

    def ready(self, vlm, stage):
        """The model where and as the config wants it in this stage, with what does not train frozen."""
        return prepare.prepare(vlm, self.cfg, stage == "align").to(self.device, self.dtype)

    def spend(self, vlm, what, *args):
        """Counts the FLOPs of that name in model/flops.py."""
        self.flops += getattr(flops, what)(vlm, *args)

    def finish_stage(self, stage, method, vlm=None, clip=None, cfg=None):
        """The stage's checkpoint, with the towers it started from carried along."""
        new = {}
        if vlm is not None:
            new |= dict(vlm=vlm.state_dict(), vlm_config=vlm.config_dict())
        if clip is not None:
            new |= dict(clip=clip.state_dict(), clip_config=asdict(clip.config))
        carried = {name: self.state[name] for name in ("clip", "clip_config") if name in self.state}
        self.finish(stage, **{**carried, **new}, method=method, config=asdict(cfg or self.cfg), flops=self.flops,
                    tokenizer=self.tokenizer.saved, label=algorithms.label(self.cfg, stage))


# ---------------------------------------------------------------- the two loops

def fit(run, stage, module, count, losses_of, steps, batch, peak, lengths=None):
    """Supervised training. `losses_of(indices)` yields the step's loss in micro-batches, already over the step's
    denominator; `count`: records to draw indices from, a new seeded order each epoch, of like `lengths` if given."""
    cfg = run.cfg
    rates = "" if stage == "clip" else cfg.module_lr
    optimizer = make_optimizer(module, cfg.beta2, cfg.weight_decay, None, 1.0, rates, cfg.moments, cfg.master)
    start, run.flops = run.take_progress(stage, module, optimizer, None) or (0, run.flops)
    began = time.perf_counter()
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, disable=None, leave=False)
    for step in bar:
        lr, total = learning_rate(step, steps, peak, cfg.warmup, cfg.final_lr), None      # of a step without records
        for loss in losses_of(batch_indices(count, batch, step, seed_of(cfg.seed, stage, "order"), lengths)):
            if loss.requires_grad:      # text alone has nothing to say to a projector that trains alone
                loss.backward()
            total = (total or 0.0) + loss.item()
        norm = optimizer_step(optimizer, lr, cfg.grad_clip)[0]
        if not math.isfinite(norm):
            raise ValueError(diverged(norm, lr))
        run.log(stage=stage, step=step, loss=total, lr=lr, grad_norm=norm, flops=run.flops,
                seconds=round(time.perf_counter() - began, 3))
        bar.set_postfix(loss=total, refresh=False)
        if (step + 1) % cfg.save_every == 0 and step + 1 < steps:
            run.save_progress(stage, step + 1, module, optimizer, None, run.flops)
    return time.perf_counter() - began


def reinforce(run, stage, vlm, samples, method, steps, cfg):
    """Reinforcement learning: roll out, reward, estimate advantages, update. One line of log.jsonl a rollout."""
    weights = rewards.weights_of(cfg)
    label = algorithms.label(run.cfg, stage)
    learner = make_learner(vlm, vlm.config.llm.width, cfg)
    optimizer = make_optimizer(learner, cfg.beta2, cfg.weight_decay, learner.critic, cfg.value_lr, cfg.module_lr,
                               cfg.moments, cfg.master)
    generator = torch.Generator(run.device).manual_seed(seed_of(cfg.seed, stage, "sampling"))
    start, run.flops = run.take_progress(stage, learner, optimizer, generator) or (0, run.flops)
    guard, spend, updates = Guard(run.folder, stage, cfg.bad_steps, checkpoint.save), partial(run.spend, vlm), 0
    began, order, tries = time.perf_counter(), seed_of(cfg.seed, stage, "order"), 1 + cfg.refill
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, disable=None, leave=False)
    for step in bar:
        clock = metrics.Clock(run.device)
        lr = learning_rate(step, steps, cfg.rl_lr, cfg.warmup, cfg.final_lr)
        rollouts, kept = [], []
        while not rollouts or len(rollouts) < tries and sum(len(part.ids) for part in kept) < cfg.rl_batch:
            asked = batch_indices(len(samples), cfg.rl_batch, step * tries + len(rollouts), order)
            batch, rollout = evaluation.roll_out(run, vlm, [samples[i] for i in asked], method, cfg, weights, generator,
                                                 clock)
            rollouts.append(rollout)
            kept.append(informative(batch, rollout, cfg))
        rollout, experience = Rollout.join(rollouts), Experience.join(kept).first(cfg.rl_batch)
        learner.samples += rollout.reward.numel()
        line = metrics.of_rollout(rollout) | dict(groups=int(experience.active.sum()), rollouts=len(rollouts),
                                                  reward_failures=rewards.failures())
        if line["groups"]:
            experience = scored(learner, experience, cfg, spend)
            experience, found = estimated(learner, experience, weights, cfg)
            take_step = stepper(optimizer, lr, cfg.grad_clip, projector=vlm.projector, llm=vlm.llm)
            line |= found | update(learner, experience, cfg, take_step, spend, guard)
            updates += line["updates"]
        learner.after(step, line, cfg)
        clock.lap("update")
        run.log(stage=stage, method=label, step=step, lr=lr, **learner.rates(lr, cfg), flops=run.flops,
                samples=int(learner.samples), seconds=round(time.perf_counter() - began, 3),
                **metrics.costs(clock.laps, rollout, line.pop("passed", 0)), **line)
        shown = ["reward", *(f"reward/{name}" for name in weights), "flat", "length"]
        bar.set_postfix({name: f"{line[name]:.2f}" for name in shown}, refresh=False)
        if (step + 1) % cfg.save_every == 0 and step + 1 < steps:
            run.save_progress(stage, step + 1, learner, optimizer, generator, run.flops)
    if not updates:
        print(f"  note: no group of {stage} could move the model: in each all rewards were equal, or all completions "
              "were left out")
    return time.perf_counter() - began


# ---------------------------------------------------------------- the stages

def clip(run, stage, like):
    """Contrastive pre-training of both towers on pictures and captions; frozen from here on."""
    cfg, tok = run.cfg, run.tokenizer
    run.start(stage)
    config = cfg.clip_config(len(tok))
    model = Clip(config).to(run.device, run.dtype)
    show_trained(stage, model)
    samples = run.samples("clip", cfg.pictures, part=1)
    pixels, log = dict(image_size=cfg.image_size, fit="crop", mean=config.mean), partial(run.log, stage=stage)

    def losses_of(indices):
        chosen = list(run.supply.usable(samples, indices, lambda i, s: run.supply.pictured(i, s, pixels), log))
        if len(chosen) < 2:             # nothing to contrast
            return
        texts = [tok.encode(" " + sample.caption)[:config.text_length - 1] + [tok.eos_id] for sample in chosen]
        batch = collate([(ids, [0] * len(ids), s.images) for ids, s in zip(texts, chosen)], tok.pad_id, cfg.image_size)
        batch = batch.to(run.device)
        known = {}
        caption = torch.tensor([known.setdefault(sample.caption, len(known)) for sample in chosen])
        same = (caption[:, None] == caption).to(run.device)
        image = model.encode_image(batch.pixels.to(run.dtype))
        yield contrastive_loss(image, model.encode_text(batch.ids, batch.length), model.logit_scale, same)

    seconds = fit(run, stage, model, len(samples), losses_of, cfg.clip_steps, cfg.clip_batch, cfg.clip_lr)
    if cfg.data == "scenes" and cfg.image_size // cfg.patch == scenes.CELLS:
        found = evaluation.shape_probe(model.visual, cfg.feature_layer)
        write_json(run.folder / "probe.json", found)
        print(f"  shape probe on the features that W reads: {found['id']:.3f}, held-out pairs {found['pairs']:.3f}")
    run.finish_stage(stage, "", clip=model)
    return seconds


def supervise(run, stage, vlm, records, steps, peak, method, batch=0, epochs=0.0):
    """fit() on records (sample, target text), or on captions where the text is None; CLIP frozen. Without records the
    model stays as it is."""
    cfg, tok, patches, batch = run.cfg, run.tokenizer, vlm.config.image_tokens, batch or run.cfg.batch
    steps = math.ceil(epochs * len(records) / batch) if epochs else steps if records else 0
    if not run.plan:
        memory.announce(stage, vlm, cfg, False)
    log = partial(run.log, stage=stage)

    def encode(i, record):
        sample, target = run.supply.decoded(record[0], vlm.config.pixels), record[1]
        row = (chat.encode_plain(sample, tok, patches, cfg.template) if target is None
               else chat.encode(sample, tok, patches, method, cfg.template, target))
        return llava.shortened(row, cfg.max_length, patches, tok.image_id, i, sample.id) if cfg.max_length else row

    def losses_of(indices):
        # Sorted by length, so that micro-batches hold little padding.
        rows = sorted(run.supply.usable(records, indices, encode, log), key=lambda row: len(row[0]))
        if not rows:
            return
        batch = collate(rows, tok.pad_id, **vlm.config.pixels).to(run.device)
        denominator = batch.target[:, 1:].sum()
        for micro in batch.micro_batches(cfg.micro_batch):
            run.flops += flops.encode(vlm, len(micro.pixels)) + flops.update(vlm, micro)
            yield -vlm(micro).logp.sum() / denominator

    lengths = run.records.lengths(patches) if cfg.group_lengths and run.records and stage == "sft" else None
    seconds = fit(run, stage, vlm, len(records), losses_of, steps, batch, peak, lengths)
    run.supply.check(records)
    run.finish_stage(stage, method, vlm)
    return seconds


def align(run, stage, like):
    """Projector and, from nothing, decoder on captions. The first stage with a vision-language model."""
    cfg, vlm = run.cfg, run.start(stage)
    if vlm is None and (cfg.clip or cfg.llm):
        vlm = run.ready(pretrained.assemble(cfg, run.plan, run.state, len(run.tokenizer), run.dtype, run.device), stage)
    elif vlm is None:
        vlm = VLM(VlmConfig(ClipConfig(**run.state["clip_config"]), cfg.llm_config(len(run.tokenizer)), cfg.projector,
                            cfg.feature_layer, cfg.image_positions))
        vlm.visual.load_state_dict({name: run.state["clip"][f"visual.{name}"] for name in vlm.visual.state_dict()})
        vlm = run.ready(vlm, stage)
    records = (run.records.pairs(captions=True) if run.records else
               [(sample, None) for sample in run.samples("align", cfg.pictures, part=2)])
    return supervise(run, stage, vlm, records, cfg.align_steps, cfg.align_lr, "direct", cfg.align_batch,
                     cfg.align_epochs)


def sft(run, stage, like):
    """Question to answer, without a chain: looking alone, for drawn scenes; LLaVA's conversations as they are."""
    cfg, vlm = run.cfg, run.start(stage)
    records = (run.records.pairs() if run.records else
               [(s, chat.target_text(s.answer)) for s in run.samples("sft", cfg.questions, part=3)])
    return supervise(run, stage, vlm, records, cfg.sft_steps, cfg.sft_lr, "direct", epochs=cfg.sft_epochs)


def chains(run, part, flawless=False):
    """Training records with a teacher's chain as target: the biased teacher's, or flawless ones."""
    cfg = run.cfg
    if run.real:
        error = 0.0 if flawless else cfg.teacher_error
        answers = sorted({sample.answer for sample in run.real["train"]})
        near = [()] * len(run.real["train"])
        if not all(sample.reasoning for sample in run.real["train"]):
            near = evaluation.nearest_answers(run.state, run.real["train"], answers, run.tokenizer, cfg.candidates,
                                              run.device, run.dtype)
        samples = teachers.candidate_chains(run.real["train"], near, error, 1000 * cfg.seed + part, answers)
    else:
        samples = run.samples("train", cfg.traces, part, teachers.PERFECT if flawless else run.supply.teacher)
    records, said = teachers.records(samples, run.tokenizer, 0.0 if flawless else cfg.forget_close, (cfg.seed, part),
                                cfg.max_new)
    print(said)
    return records


def cot_stage(run, stage, like):
    """Fine-tuning on the teacher's chains of thought."""
    return supervise(run, stage, run.start(stage), chains(run, part=4), run.cfg.cot_steps, run.cfg.cot_lr, "think")


def rl(run, stage, like, method=""):
    """RL on correctness and format, with the switches of the stage's name if it is an algorithm's. Without chains to
    imitate, as in `rl_zero` or from a pretrained model, the prompt alone asks for the tags."""
    vlm, cfg = run.start(stage), algorithms.of_stage(run.cfg, stage)
    method = method or ("think" if run.state.get("method") == "think" else "asked")
    if not run.plan:
        memory.announce(stage, vlm, cfg, True)
    samples = run.samples("train", cfg.rl_prompts, part=6)
    if not run.progress:
        evaluation.look_ahead(run, stage, vlm, samples, method, cfg)
    if cfg.explain:
        return 0.0
    seconds = reinforce(run, stage, vlm, samples, method, cfg.rl_steps, cfg)
    run.finish_stage(stage, method, vlm, cfg=cfg)
    return seconds


# ---------------------------------------------------------------- what reinforcement learning is compared with

def steps_for(run, vlm, records, method, budget):
    """Supervised steps that bring the stage's FLOPs to `budget`, by the cost of eight random batches."""
    if not records:
        return 0
    cfg, cost = run.cfg, []
    rng = np.random.default_rng([cfg.seed, 11])
    for _ in range(8):
        some = [records[i] for i in rng.integers(len(records), size=cfg.batch)]
        rows = [chat.encode(sample, run.tokenizer, vlm.config.image_tokens, method, cfg.template, target)
                for sample, target in some]
        batch = collate(sorted(rows, key=lambda row: len(row[0])), run.tokenizer.pad_id, **vlm.config.pixels)
        cost.append(sum(flops.encode(vlm, len(micro.pixels)) + flops.update(vlm, micro)
                        for micro in batch.micro_batches(cfg.micro_batch)))
    return max(1, round((budget - run.flops) / np.mean(cost)))


def matched(run, stage, records_of, method, like):
    """Supervised training on `records_of(run)` for the FLOPs that the stages `like` took."""
    vlm, records = run.start(stage), records_of(run)
    steps = steps_for(run, vlm, records, method, run.spent(like))
    return supervise(run, stage, vlm, records, steps, run.cfg.cot_lr, method)


def checked_chains(run):
    """Fresh chains of the teacher, only those that the checker finds right and well-formed."""
    records = [(s, text) for s, text in chains(run, part=5) if rewards.correctness(s, text) and rewards.format(s, text)]
    print(f"  filtered: {len(records)} chains are right and well-formed")
    return records


def gold_answers(run):
    """Question to gold answer, without a chain."""
    return [(s, chat.target_text(s.answer)) for s in run.samples("train", run.cfg.traces, part=4)]


def rejection(run, stage, like, part):
    """One of two rounds of learning from the model's own correct samples, half of RL's FLOPs each, sampling counted."""
    cfg, vlm = run.cfg, run.start(stage)
    samples, budget, records = run.samples("train", cfg.rl_prompts, part), run.spent(like) / 2, []
    generator = torch.Generator(run.device).manual_seed(seed_of(cfg.seed, stage, "sampling"))
    at = 0
    while run.flops < budget / 2:
        asked = [samples[i] for i in batch_indices(len(samples), cfg.rl_batch, at, seed_of(cfg.seed, stage, "asked"))]
        _, done = evaluation.roll_out(run, vlm, asked, "think", cfg, {"correctness": 1.0}, generator)
        at += 1
        records += [(sample, text) for sample, group in zip(asked, done.texts) for text in dict.fromkeys(group)
                    if rewards.correctness(sample, text) and rewards.format(sample, text)]
    print(f"  {stage}: {len(records)} of {at * cfg.rl_batch * cfg.group} samples are new, right and well-formed")
    return supervise(run, stage, vlm, records, steps_for(run, vlm, records, "think", budget), cfg.cot_lr, "think")


# name -> (function, stages it may start from, first choice first; stages whose FLOPs it is given)
STAGES = {
    "clip": (clip, (), ()),
    "align": (align, ("clip",), ()),
    "sft": (sft, ("align",), ()),
    "cot": (cot_stage, ("sft", "align"), ()),
    "rl": (rl, ("cot", "sft"), ()),
    # more of the teacher's chains, on fresh prompts; the same chains filtered; the model's own right answers, twice
    "cot_continued": (partial(matched, records_of=partial(chains, part=5), method="think"), ("cot",), ("rl",)),
    "filtered": (partial(matched, records_of=checked_chains, method="think"), ("cot",), ("rl",)),
    "rejection_first": (partial(rejection, part=6), ("cot",), ("rl",)),
    "rejection": (partial(rejection, part=7), ("rejection_first",), ("rl",)),
    # instead of chains and RL together: gold answers without a chain; flawless chains, the upper bound
    "sft_direct": (partial(matched, records_of=gold_answers, method="direct"), ("sft", "align"), ("cot", "rl")),
    "perfect": (partial(matched, records_of=partial(chains, part=4, flawless=True), method="think"), ("sft", "align"),
                ("cot", "rl")),
    # the tags only asked for, nothing to imitate
    "rl_zero": (partial(rl, method="asked"), ("sft", "align"), ()),
    # RL by another paper's switches, or for another reward
    **{name: (rl, ("cot",), ()) for name in algorithms.VARIANTS},
}


def open_run(run):
    """Gives a run its tokenizer and its folder, a new one or the interrupted one. Whatever cannot work is said before
    the folder is made."""
    cfg, real = run.cfg, run.supply.own()
    if cfg.resume:
        run.reopen(asdict(cfg), ("resume", "out", "jobs"), cfg.stages(), real)
    if "iou" in rewards.start(cfg) and not any(sample.boxes for sample in real):
        raise ValueError(f"--rewards={cfg.rewards}: iou needs samples with boxes, and --data={cfg.data} has none")
    if run.plan and "cot" in cfg.stages() and not all(sample.reasoning for sample in real):
        raise ValueError(f"--stage={cfg.stage}: cot needs a reasoning in every line of --data={cfg.data}: a pretrained "
                         "model has no teacher")
    given = {cfg.stages()[0]} if cfg.llava else {"align"} if cfg.clip and not cfg.init else {}
    run.check_origins(cfg.stages(), {name: () if name in given else of[1] for name, of in STAGES.items()},
                      {name: of[2] for name, of in STAGES.items()}, cfg.init)
    run.prepare_tokenizer()
    run.notes = chat.too_long(real, run.tokenizer, cfg.max_new, cfg.text_length) if run.real else []
    if not cfg.resume:
        run.create(asdict(run.cfg), real)
    if cfg.tensorboard:
        run.open_board()
    if isinstance(run.tokenizer.saved, bytes):
        checkpoint.write_atomically(run.folder / "tokenizer.model", lambda file: file.write(run.tokenizer.saved))


def main(argv):
    cfg, notes = from_command_line(Config, PRESETS, argv, __doc__, resumed,
                                  lambda given: algorithms.of_flags(given) | prepare.implied(given)), []
    plan = None if cfg.init else pretrained.planned(cfg)
    if cfg.init or plan:
        names, own = list(Config.__dataclass_fields__), cfg.flags.split()
        shape = names[names.index("image_size"):names.index("template") + ("template" not in own)]
        saved = checkpoint.load(cfg.init).get("config", {}) if cfg.init else pretrained.fields(plan)
        cfg, said = adopt(cfg, saved, shape, "--init" if cfg.init else "what is loaded")
        notes += said if cfg.init or {*own} & {*saved} else []
    notes += cfg.check()
    if cfg.seeds:
        return evaluation.many_seeds(__file__, cfg)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    if cfg.bench:
        return evaluation.run_bench(cfg, Run, reinforce)
    if cfg.explain:
        print("".join(f"note: {note}\n" for note in notes), end="")
        with tempfile.TemporaryDirectory() as folder, Run(replace(cfg, out=folder), folder, plan) as run:
            open_run(run)
            STAGES[cfg.stage][0](run, stage=cfg.stage, like=())
        return
    if plan:
        prepare.plan(plan, cfg, [stage for stage in cfg.stages() if stage != "clip"])
        pretrained.check_weights(cfg)
    with Run(cfg, choose(cfg.out, cfg.preset, cfg.resume), plan) as run:
        open_run(run)
        train_and_compare(run, notes)


def train_and_compare(run, notes):
    """Every stage of the run that is not done, then the comparison; prints `notes` and what comes out."""
    began, cfg = time.perf_counter(), run.cfg
    print(describe(cfg))
    for note in notes + run.notes:
        print(f"note: {note}")
    print(f"run folder {run.folder}, device {run.device}, {torch.get_num_threads()} CPU threads")
    for stage in cfg.stages():
        if run.path(stage).exists():
            print(f"{stage}: done before")
            continue
        seconds = STAGES[stage][0](run, stage=stage, like=STAGES[stage][2])
        print(f"{stage:<16}{seconds:7.1f} s training" + (f", {run.flops / 1e12:8.2f} TFLOP" if run.flops else ""))
    labels = algorithms.labels(cfg, cfg.stages())
    methods = {labels[stage]: run.path(stage) for stage in cfg.stages()
               if stage not in ("clip", "align", "sft", "rejection_first")}
    if methods:
        tests = {split: run.samples(split, max(cfg.eval_greedy, cfg.eval_sampled), teacher=run.supply.teacher)
                 for split in (("val",) if run.real else scenes.SPLITS)}
        learned = [labels[stage] for stage in cfg.stages() if stage in algorithms.STAGES]
        evaluation.compare(run.folder, cfg, methods, tests, teacher=not run.real, to=learned[0] if learned else "")
    else:
        write_json(run.folder / "results.json", [])     # none: but the run is finished
    if cfg.export and not (cfg.resume and export_folder(cfg.export).exists()):
        evaluation.export(*evaluation.load_vlm(run.path(cfg.stages()[-1]))[:2], cfg.export, cfg.template)
    files = [f for f in ("results.json", "samples.html", "curves.png", "log.jsonl") if (run.folder / f).exists()]
    print(f"\n{run.folder}: {', '.join(files)} and checkpoints; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):     # a class or an answer that the terminal cannot show ends no run
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except (MemoryError, RuntimeError) as error:
        sys.exit("train.py: " + memory.shortage(error, "a smaller model, --micro-batch, --max-new or batch of the "
                                                "stage needs less, in a new run; --init= starts that from this one's "
                                                "last stage"))
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; --resume goes on from the last checkpoint")
