"""Every published recipe builds at full size, on the meta device, with the published names, shapes
and counts."""
import open_clip
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config
from transformers import LlavaConfig, LlavaForConditionalGeneration

import train
from model import lora, memory
from model.clip import Clip
from model.hub import names, pretrained
from model.runs.config import change
from model.runs.presets import RECIPES, RL_RECIPES
from model.vlm import VLM, VlmConfig
from rl import algorithms

# As the hub counts them: parameters and tensors of the decoder's own files, and of the whole image
# tower.
DECODERS = {"lmsys/vicuna-7b-v1.3": (6_738_415_616, 291),
            "lmsys/vicuna-7b-v1.5": (6_738_415_616, 291),
            "lmsys/vicuna-13b-v1.5": (13_015_864_320, 363),
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (1_100_048_384, 201),
            "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 272),
            "Qwen/Qwen2.5-0.5B-Instruct": (494_032_768, 290)}
TOWERS = {"ViT-L-14-quickgelu/openai": (303_966_208, 296),
          "ViT-L-14-336-quickgelu/openai": (304_293_888, 296),
          "ViT-B-16-quickgelu/openai": (86_192_640, 152)}


def config(name):
    return change(train.Config(), **train.PRESETS[name])


def built(name):
    cfg = config(name)
    with torch.device("meta"):
        return VLM(VlmConfig(cfg.clip.config(49408), cfg.llm.config(cfg.llm.vocab), **cfg.vlm.shape()))


def count(module):
    """(parameters, tensors) of a module."""
    tensors = list(module.parameters())
    return sum(p.numel() for p in tensors), len(tensors)


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_parts_have_the_published_counts(name):
    cfg = config(name)
    vlm = built(name)
    assert count(vlm.llm) == DECODERS[cfg.llm.llm]
    with torch.device("meta"):
        whole = Clip(cfg.clip.config(49408))
    assert count(whole.visual) == TOWERS[cfg.clip.clip]
    assert len(vlm.visual.transformer.resblocks) == cfg.clip.clip_layers - 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_tower_is_the_one_that_open_clip_builds_under_that_name(name):
    options = config(name).clip
    with torch.device("meta"):
        theirs = open_clip.create_model(options.clip.partition("/")[0], pretrained=None, device="meta")
        ours = Clip(pretrained._open_clip_shape(options.clip))
        planned = Clip(options.config(49408))
    wanted = shapes(theirs)
    wanted.pop("attn_mask", None)       # a buffer that some versions of open_clip save
    assert shapes(ours) == wanted
    assert shapes(planned) == wanted
    assert planned.config == ours.config and planned.config.act == "quick_gelu"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_names_and_shapes_are_transformers_own(name):
    cfg = config(name)
    vlm = built(name)
    llm = cfg.llm
    clip = cfg.clip
    text = dict(vocab_size=llm.vocab, hidden_size=llm.width, intermediate_size=llm.ff,
                num_hidden_layers=llm.layers, num_attention_heads=llm.heads,
                num_key_value_heads=llm.kv_heads, tie_word_embeddings=llm.tied)
    vision = CLIPVisionConfig(hidden_size=clip.clip_width, intermediate_size=4 * clip.clip_width,
                              num_hidden_layers=clip.clip_layers, num_attention_heads=clip.clip_heads,
                              image_size=clip.image_size, patch_size=clip.patch)
    family = Qwen2Config if llm.qkv_bias else LlamaConfig
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision,
                                                       text_config=family(**text)))
    theirs = {}
    for key, shape in shapes(hf).items():
        found = names.llava_name(key)
        if found is None or pretrained.unused(found[0], vlm.config):
            continue
        our_key, _ = found
        rows = theirs[our_key][0] if our_key in theirs else 0       # q, k and v are stacked here
        theirs[our_key] = (rows + shape[0], *shape[1:])
    if llm.tied:
        del theirs["llm.lm_head.weight"]
    ours = shapes(vlm)
    if cfg.vlm.projector == "linear":       # which transformers has not
        theirs = {key: shape for key, shape in theirs.items() if not key.startswith("projector.")}
        assert ours.pop("projector.weight") == (llm.width, clip.clip_width)
        assert ours.pop("projector.bias") == (llm.width,)
    assert ours == theirs


@pytest.mark.parametrize("name", [*RL_RECIPES, "llm-rl", "llava-rl", "llava-1.5-7b"])
def test_reinforcement_learning_of_pretrained_models_is_grpo_as_its_table_has_it(name):
    cfg = config(name)
    assert algorithms.label(cfg, "rl") == "grpo" and cfg.algorithm == algorithms.ALGORITHMS["grpo"]
    assert cfg.sampling.group == 8 and cfg.sampling.temperature == 1.0
    trains_all = name == "llava-1.5-7b"
    rank = {"smollm2-small": 16, "llava-1.5-7b": 0}.get(name, 64)
    assert cfg.lora.lora_rank == rank and (cfg.rl.rl_lr == 1e-6) == trains_all
    assert cfg.data.template != "brief"         # which asks in words that no pretrained model was taught


def test_a_7b_is_planned_without_a_byte_of_it():
    vlm = built("llava-1.5-7b").to(torch.bfloat16)
    vlm.visual.requires_grad_(False)
    vlm.llm.checkpointing = True
    full = memory.plan(vlm, 4 * 2048)
    decoder = 6_738_415_616
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    tensors = 3 + 9 * 32 + 4                        # each with a count of its steps
    assert full["gradients"] == 4 * (decoder + projector)
    assert full["optimizer"] == 12 * (decoder + projector) + 4 * tensors
    vlm.llm.requires_grad_(False)
    assert memory.plan(vlm, 4 * 2048)["optimizer"] == 12 * projector + 4 * 4
    lora.attach(vlm.llm, "q_proj,v_proj", 16, 16.0)
    adapters = 32 * 2 * 16 * (4096 + 4096)          # blocks, Linears of each, rank, in and out
    assert memory.plan(vlm, 4 * 2048)["optimizer"] == 12 * (projector + adapters) + 4 * (4 + 32 * 2 * 2)
