"""A vision-language model as a folder that transformers' LlavaForConditionalGeneration, and so vLLM, loads as it is.

Names are the hub's llava-hf layout, which every version of both reads. What that format wants beyond the model here:

    a row for <image>                the embedding grows to a multiple of 64; new rows are the mean of the others, so
                                     that no new logit is ever the largest
    blocks after the feature layer   written as identities (zeros in both residual branches); nothing computes them
    a linear projector               two layers without activation, the second an identity

`load_llava` undoes all three, so that a model goes out and comes back bit by bit.
"""
import json
from pathlib import Path

import torch

from model import lora
from model.clip import ImageTower
from model.hub.names import hf_tower_names
from model.hub.tensors import write_folder

IMAGE = "<image>"


def export_folder(where):
    """--export's "hf:DIR" -> Path of DIR. Raises ValueError for anything else."""
    kind, _, folder = where.partition(":")
    if kind != "hf" or not folder:
        raise ValueError(f"--export={where} must be hf:DIR")
    return Path(folder).expanduser()


def export_hf(vlm, tokenizer, folder, template="", shard_bytes=5 * 2 ** 30):
    """Writes `vlm`, adapters merged, with its tokenizer (or None) and preprocessing to the new folder `folder`.

    template: a Jinja chat template, for servers. Raises ValueError when the model has parts that LLaVA has not, or
    when `folder` holds anything; OSError when it cannot be written.
    """
    c = vlm.config
    if c.image_positions or c.clip.stem != "conv" or c.clip.pool != "class":
        raise ValueError("--export=hf: LLaVA knows no image_positions, and no other image tower than --clip-stem=conv "
                         "--clip-pool=class; this model cannot be written as one")
    vocab = c.llm.vocab
    try:
        image = tokenizer.special(IMAGE)
    except (AttributeError, ValueError):        # no tokenizer, or none with that token
        # The next free id, whatever rows the embedding has to spare: fast tokenizers number what is added themselves.
        image = vocab if tokenizer is None else len(tokenizer)
    rows = -(-max(vocab, image + 1) // 64) * 64
    texts = {"config.json": json.dumps(_config(vlm, rows, image), indent=2),
             "generation_config.json": json.dumps(_special_ids(tokenizer)),
             **_processor(c), **_tokenizer_files(tokenizer, image)}
    if template:
        texts["chat_template.jinja"] = template
    write_folder(folder, _tensors(vlm, rows), texts, shard_bytes)


def _config(vlm, rows, image):
    c, v, t = vlm.config, vlm.config.clip, vlm.config.llm
    dtype = str(vlm.llm.embed_tokens.weight.dtype).removeprefix("torch.")
    kind = "qwen3" if t.qk_norm else "qwen2" if t.qkv_bias and not t.out_bias else "mistral" if t.window else "llama"
    text = dict(
        model_type=kind, vocab_size=rows, hidden_size=t.width, intermediate_size=t.ff, num_hidden_layers=t.layers,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, head_dim=t.head_width, rms_norm_eps=t.eps,
        rope_theta=t.theta, tie_word_embeddings=t.tied, hidden_act="silu", max_position_embeddings=t.context)
    if kind in ("llama", "qwen3"):
        text["attention_bias"] = t.out_bias
    if t.window:
        text["sliding_window"] = t.window
    if t.rope_context:
        text["rope_scaling"] = dict(
            rope_type="llama3", factor=t.rope_factor, low_freq_factor=t.rope_low, high_freq_factor=t.rope_high,
            original_max_position_embeddings=t.rope_context)
    elif t.rope_factor != 1:
        text["rope_scaling"] = dict(rope_type="linear", factor=t.rope_factor)
    vision = dict(
        model_type="clip_vision_model", hidden_size=v.width, intermediate_size=v.ff, num_hidden_layers=v.layers,
        num_attention_heads=v.heads, image_size=v.image_size, patch_size=v.patch, hidden_act=v.act,
        layer_norm_eps=v.eps, projection_dim=v.embed)
    return dict(
        architectures=["LlavaForConditionalGeneration"], model_type="llava", torch_dtype=dtype, image_token_index=image,
        image_seq_length=v.patches, vision_feature_layer=c.feature_layer,
        vision_feature_select_strategy="default", tie_word_embeddings=t.tied,
        projector_hidden_act="gelu" if c.projector == "mlp2x_gelu" else "linear", text_config=text,
        vision_config=vision, seethink=dict(vocab=t.vocab))


def _special_ids(tokenizer):
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}
    return {name: value for name, value in ids.items() if value is not None}


def _processor(c):
    """Preprocessing as in data.sample, in transformers' words; LlavaImageProcessor is the one that pads."""
    side = c.clip.image_size
    image = dict(
        image_processor_type="LlavaImageProcessor" if c.image_fit == "pad" else "CLIPImageProcessor",
        do_pad=c.image_fit == "pad", do_resize=True, size=dict(shortest_edge=side), resample=3, do_center_crop=True,
        crop_size=dict(height=side, width=side), do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=c.clip.mean, image_std=c.clip.std, do_convert_rgb=True)
    whole = dict(processor_class="LlavaProcessor", image_token=IMAGE, patch_size=c.clip.patch,
                 vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return {"preprocessor_config.json": json.dumps(image | dict(processor_class="LlavaProcessor"), indent=2),
            "processor_config.json": json.dumps(whole, indent=2)}


def _tokenizer_files(tokenizer, image):
    if tokenizer is None:
        return {}
    added = getattr(tokenizer, "added", {}) | {IMAGE: image}
    listed = {str(i): dict(content=name, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
              for name, i in added.items()}
    config = dict(added_tokens_decoder=listed, extra_special_tokens=dict(image_token=IMAGE),
                  clean_up_tokenization_spaces=False, add_bos_token=tokenizer.bos_id is not None, add_eos_token=False)
    if not hasattr(tokenizer, "proto"):         # byte-level BPE
        model = json.loads(tokenizer.source)
        known = {token["content"] for token in model.setdefault("added_tokens", [])}
        new = [dict(token, id=int(i)) for i, token in listed.items() if token["content"] not in known]
        model["added_tokens"] += new
        names = {f"{role}_token": name for role, name in tokenizer.names.items() if name}
        config |= names | dict(tokenizer_class="PreTrainedTokenizerFast")
        return {"tokenizer.json": json.dumps(model), "tokenizer_config.json": json.dumps(config, indent=2)}
    spelt = {i: name for name, i in tokenizer.added.items()}
    names = {f"{role}_token": spelt[i] if i in spelt else tokenizer.model.id_to_piece(i) for role, i in
             (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id),
              ("unk", tokenizer.model.unk_id())) if i is not None}
    config |= names | dict(tokenizer_class="LlamaTokenizer", legacy=True, sp_model_kwargs={})
    return {"tokenizer.model": tokenizer.proto, "tokenizer_config.json": json.dumps(config, indent=2),
            "tokenizer.json": tokenizer.fast_json(added)}


@torch.no_grad()
def _tensors(vlm, rows):
    c, out = vlm.config, {}
    for name, tensor in lora.merged(vlm.llm).items():
        if name in ("embed_tokens.weight", "lm_head.weight") and rows > len(tensor):
            mean = tensor.mean(0, keepdim=True, dtype=torch.promote_types(tensor.dtype, torch.float32))
            tensor = torch.cat([tensor, mean.to(tensor.dtype).expand(rows - len(tensor), -1)])
        out[f"language_model.{'' if name.startswith('lm_head') else 'model.'}{name}"] = tensor
    projector = vlm.projector.state_dict()
    if c.projector == "linear":
        like = projector["bias"]
        projector = {"0.weight": projector["weight"], "0.bias": like, "2.weight": torch.eye(len(like)).to(like),
                     "2.bias": torch.zeros_like(like)}
    for name, tensor in projector.items():
        out["multi_modal_projector." + name.replace("0.", "linear_1.").replace("2.", "linear_2.")] = tensor
    tower = hf_tower_names(_whole_tower(vlm))
    return out | {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}


def _whole_tower(vlm):
    """The image tower's state with what was cut from it: blocks that add nothing, a norm that nothing reads."""
    with torch.device("meta"):
        whole = ImageTower(vlm.config.clip)
    del whole.proj
    have, like = vlm.visual.state_dict(), vlm.visual.positional_embedding
    return {name: have[name] if name in have else
            (torch.ones if ".ln_" in f".{name}" and name.endswith("weight") else torch.zeros)(
                value.shape, dtype=like.dtype, device=like.device) for name, value in whole.state_dict().items()}
