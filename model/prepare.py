"""What a stage does to a vision-language model before it trains, and what of it can be told before there is one."""
import os
from dataclasses import replace

import torch

from model import mixed
from model.hub.export import PROJECTOR_ACT, export_folder
from model.optim import freeze
from model.runs.config import change, need
from model.runs.device import pick_dtype
from model.vlm import VLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def implied(given):
    """{option: value} that the flags `given` imply: a whole LLaVA takes the place of a recipe's parts, steps of
    epochs."""
    if given.get("llava") and given.get("llm"):
        raise ValueError(f"--llava={given['llava']} must be left out beside --llm, or --llm beside it")
    values = {"llm": "", "clip": ""} if given.get("llava") else {}
    for stage in ("align", "sft"):
        if f"{stage}_steps" in given:
            values[f"{stage}_epochs"] = 0.0
    return values


def check(cfg, stages):
    """Raises ValueError in one sentence about what of --clip, --llm, --llava, --export, adapters and rates cannot
    work."""
    clip = cfg.clip.clip
    llava = cfg.vlm.llava
    data = cfg.data.data
    need(not cfg.pretrained or data != "scenes", "data", data,
         "be images:DIR, jsonl:FILE or llava:FILE where --clip, --llm or --llava names a model")
    need(not (llava and cfg.run.init), "llava", llava, "be left out beside --init")
    need(not (clip and "clip" in stages), "clip", clip, "be left out where stage clip trains one")
    for name in stages:
        need(not data.startswith("llava:") or name in ("clip", "align", "sft"), "stage", cfg.run.stage,
             "be clip, align or sft: conversations of --data=llava:FILE have no single answer to check")
    if cfg.run.export:
        check_export(cfg, stages)
    targets = cfg.lora.lora_targets
    for name in targets.split(","):
        need(targets == "all" or name.strip() in LINEARS, "lora_targets", targets,
             f"be all or some of {', '.join(LINEARS)}")
    need(cfg.machine.dtype != "mixed" or not cfg.lora.lora_rank, "dtype", "mixed",
         "be bfloat16 beside --lora-rank: frozen weights need no fp32")
    need(cfg.machine.dtype != "mixed" or not cfg.machine.compile, "compile", True,
         "be left out beside --dtype=mixed, whose casts torch.compile would compile anew at every step")
    slow_in_bf16 = cfg.machine.dtype == "bfloat16" and cfg.optim.beta2 > 0.99
    need(cfg.optim.moments == "float32" or not slow_in_bf16, "moments", cfg.optim.moments,
         f"be float32 with --beta2={cfg.optim.beta2}: so slow a mean stands still in bfloat16")
    for rate in cfg.optim.module_lr.split(","):
        need(not rate.strip().startswith("visual"), "module_lr", cfg.optim.module_lr,
             "give visual no rate: the image tower is frozen in every stage")


def check_export(cfg, stages):
    """Raises ValueError in one sentence when --export can only fail, before anything trains."""
    export = cfg.run.export
    folder = export_folder(export)
    is_free = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    need(cfg.run.resume or is_free, "export", export, "name a folder that does not exist yet")
    need(not cfg.run.seeds, "export", export, "be left out beside --seeds: one folder for several models")
    # A loaded model or an --init has decided these fields already.
    is_llavas = not cfg.vlm.image_positions and cfg.clip.clip_stem == "conv" and cfg.clip.clip_pool == "class"
    need(is_llavas, "export", export,
         "come with --image-positions=False --clip-stem=conv --clip-pool=class: LLaVA knows nothing else")
    need(cfg.vlm.projector in PROJECTOR_ACT, "projector", cfg.vlm.projector,
         f"be one of {', '.join(PROJECTOR_ACT)} with --export: a LLaVA folder has no others")
    need(stages[-1] != "clip", "export", export,
         "be left out where stage clip is the last: a CLIP by itself is no LLaVA")
    above = next(parent for parent in folder.resolve().parents if parent.exists())
    need(above.is_dir() and os.access(above, os.W_OK), "export", export,
         f"lie in a folder that can be written, unlike {above}")


def prepare(vlm, cfg, aligns):
    """vlm with adapters, checkpointing and compiled blocks as `cfg` wants them, and what does not train frozen: the
    image tower, a pretrained decoder in the stage that `aligns`, one under adapters, what --module-lr sets to 0.

    Adapters of an earlier stage become part of the decoder, so that the model without adapters, a reference in
    reinforcement learning, is the one that this stage starts from.
    """
    rank = 0 if aligns else cfg.lora.lora_rank
    vlm.adapt(cfg.lora.lora_targets, rank, cfg.lora.lora_alpha)
    fit = cfg.data.image_fit or vlm.config.image_fit
    if aligns:              # LLaVA-1.5 pads from its second stage on
        fit = "crop"
    vlm.config = replace(vlm.config, image_fit=fit)
    if cfg.machine.dtype == "mixed":
        mixed.mix(vlm.llm)
    vlm.llm.checkpointing = cfg.machine.checkpointing
    if cfg.machine.compile:
        vlm.llm.compile_blocks()
    vlm.visual.requires_grad_(False)
    if aligns and vlm.config.speaks:        # from nothing, the decoder learns its language in this stage
        vlm.llm.requires_grad_(False)
    freeze(vlm, cfg.optim.module_lr)
    return vlm


def on_meta(config, cfg, stage):
    """The model of a stage by its VlmConfig, prepared as `cfg` wants it, without memory."""
    cfg = change(cfg, compile=False)
    with torch.device("meta"):
        vlm = VLM(config)
    return prepare(vlm, cfg, stage == "align").to(pick_dtype(cfg.machine.dtype))
