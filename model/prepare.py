"""What a stage does to a vision-language model before it trains, and what of it can be said before there is one."""
import os
from dataclasses import replace

import torch

from model import memory
from model.hub.export import export_folder
from model.optim import freeze
from model.vlm import VLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def implied(given):
    """What the flags `given` imply of others: a whole LLaVA takes the place of a recipe's parts, steps of epochs."""
    if given.get("llava") and given.get("llm"):
        raise ValueError(f"--llava={given['llava']} must be left out beside --llm, or --llm beside it")
    return ({"llm": "", "clip": ""} if given.get("llava") else {}) | {
        f"{stage}_epochs": 0.0 for stage in ("align", "sft") if f"{stage}_steps" in given}


def check(cfg, need, stages):
    """What of --clip, --llm, --llava, --export, adapters and rates cannot work. Raises ValueError by need(ok, ..)."""
    need(not cfg.pretrained or cfg.data != "scenes", "data",
         "be images:DIR, jsonl:FILE or llava:FILE where --clip, --llm or --llava names a model")
    need(not (cfg.llava and cfg.init), "llava", "be left out beside --init")
    need(not (cfg.clip and "clip" in stages), "clip", "be left out where stage clip trains one")
    for name in stages:
        need(not cfg.data.startswith("llava:") or name in ("clip", "align", "sft"), "stage",
             "be clip, align or sft: conversations of --data=llava:FILE have no single answer to check")
    if cfg.export:
        folder = export_folder(cfg.export)
        need(cfg.resume or not folder.exists() or folder.is_dir() and not any(folder.iterdir()), "export",
             "name a folder that does not exist yet")
        need(not cfg.seeds, "export", "be left out beside --seeds: one folder for several models")
        # A loaded model or an --init has decided these fields already.
        llavas_own = not cfg.image_positions and cfg.clip_stem == "conv" and cfg.clip_pool == "class"
        need(llavas_own, "export", "come with --image-positions=False --clip-stem=conv --clip-pool=class: LLaVA knows "
             "nothing else")
        need(stages[-1] != "clip", "export", "be left out where stage clip is the last: a CLIP by itself is no LLaVA")
        above = next(parent for parent in folder.resolve().parents if parent.exists())
        need(above.is_dir() and os.access(above, os.W_OK), "export", f"lie in a folder that can be written, unlike "
             f"{above}")
    for name in cfg.lora_targets.split(","):
        need(cfg.lora_targets == "all" or name.strip() in LINEARS, "lora_targets", f"be all or some of "
             f"{', '.join(LINEARS)}")
    need(cfg.moments == "float32" or cfg.dtype != "bfloat16" or cfg.beta2 <= 0.99, "moments",
         f"be float32 with --beta2={cfg.beta2}: so slow a mean stands still in bfloat16")
    need(not any(part.strip().startswith("visual") for part in cfg.module_lr.split(",")), "module_lr",
         "give visual no rate: the image tower is frozen in every stage")


def prepare(vlm, cfg, aligns):
    """vlm with adapters, checkpointing and compiled blocks as `cfg` wants them, and what does not train frozen: the
    image tower, a pretrained decoder in the stage that `aligns`, one under adapters, what --module-lr sets to 0.

    Adapters of an earlier stage become part of the decoder, so that the model without adapters, a reference in
    reinforcement learning, is the one that this stage starts from.
    """
    vlm.adapt(cfg.lora_targets, 0 if aligns else cfg.lora_rank, cfg.lora_alpha)
    fit = "crop" if aligns else cfg.image_fit or vlm.config.image_fit       # LLaVA-1.5 pads from its second stage on
    vlm.config = replace(vlm.config, image_fit=fit)
    vlm.llm.checkpointing = cfg.checkpointing
    if cfg.compile:
        vlm.llm.compile_blocks()
    vlm.visual.requires_grad_(False)
    if aligns and vlm.config.speaks:        # from nothing, the decoder learns its language in this stage
        vlm.llm.requires_grad_(False)
    freeze(vlm, cfg.module_lr)
    return vlm


def plan(config, cfg, stages):
    """Prints for each stage what will train and the memory it will take, before a weight of the model is loaded."""
    for stage in stages:
        with torch.device("meta"):
            vlm = VLM(config)
        vlm = prepare(vlm, replace(cfg, compile=False), stage == "align").to(getattr(torch, cfg.dtype))
        memory.announce(stage, vlm, cfg, stage not in ("align", "sft", "cot"))
