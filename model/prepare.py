"""What a stage does to a vision-language model before it trains."""
from dataclasses import replace

from model.optim import freeze


def prepare(vlm, cfg, aligns):
    """vlm with adapters, checkpointing and compiled blocks as `cfg` wants them, and what does not train frozen: the
    image tower, a pretrained decoder in the stage that `aligns`, one under adapters, what --module-lr sets to 0.

    Adapters of an earlier stage become part of the decoder, so that the model without adapters, a reference in
    reinforcement learning, is the one that this stage starts from.
    """
    if any(part.strip().startswith("visual") for part in cfg.module_lr.split(",")):
        raise ValueError(f"--module-lr={cfg.module_lr}: visual can have no rate, the image tower is frozen in every "
                         "stage")
    vlm.adapt(cfg.lora_targets, 0 if aligns else cfg.lora_rank, cfg.lora_alpha)
    fit = "crop" if aligns else cfg.image_fit or vlm.config.image_fit       # LLaVA-1.5 pads from its second stage on
    vlm.config = replace(vlm.config, image_fit=fit)
    vlm.llm.checkpointing = cfg.checkpointing
    if cfg.compile:
        vlm.llm.compile_blocks()
    vlm.visual.requires_grad_(False)
    if aligns and (cfg.llm or cfg.llava):       # it knows its language; from nothing, it learns it in this stage
        vlm.llm.requires_grad_(False)
    freeze(vlm, cfg.module_lr)
    return vlm
