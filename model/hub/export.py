"""A vision-language model as a folder that transformers' LlavaForConditionalGeneration, and so
vLLM, loads as it is.

Names are the hub's llava-hf layout, which every version of both reads. What that format wants
beyond the model here:

    a row for <image>                the embedding grows to a multiple of 64; new rows are the mean
                                     of the others, so that no new logit is ever the largest
    blocks after the feature layer   written as identities (zeros in both residual branches), which
                                     nothing computes
    a linear projector               two layers without activation, the second an identity

`load_llava` undoes all three, so that a model goes out and comes back bitwise identical.
`refuse_unless_llava` lists what such a folder cannot hold.
"""
import json
from pathlib import Path

import torch

from model import lora
from model.clip import ImageTower
from model.hub.names import hf_tower_names, renamed
from model.hub.tensors import write_folder

IMAGE = "<image>"
PROJECTOR_ACT = {"linear": "linear",
                 "mlp2x_gelu": "gelu"}          # our projector -> their projector_hidden_act
LINEARS = {"0.": "linear_1.",
           "2.": "linear_2."}                    # our layers of mlp2x_gelu -> theirs


def export_folder(where):
    """--export's "hf:DIR" -> Path of DIR. Raises ValueError for anything else."""
    kind, _, folder = where.partition(":")
    if kind != "hf" or not folder:
        raise ValueError(f"--export={where} must be hf:DIR")
    return Path(folder).expanduser()


def export_hf(vlm, tokenizer, folder, template="", shard_bytes=5 * 2 ** 30):
    """Writes `vlm`, adapters merged, with its tokenizer (or None) and preprocessing to the new
    folder `folder`.

    template: a Jinja chat template, for servers. Raises ValueError when the model has parts that
    LLaVA has not, or when `folder` holds anything; OSError when it cannot be written.
    """
    config = vlm.config
    refuse_unless_llava(config)
    image_id = _image_id(tokenizer, config.llm.vocab)
    rows = max(config.llm.vocab, image_id + 1)
    rows = -(-rows // 64) * 64
    dtype = vlm.llm.embed_tokens.weight.dtype
    texts = {"config.json": json.dumps(_model_config(config, dtype, rows, image_id), indent=2),
             "generation_config.json": json.dumps(_special_ids(tokenizer)),
             **_processor(config), **_tokenizer_files(tokenizer, image_id)}
    if template:
        texts["chat_template.jinja"] = template
    write_folder(folder, _tensors(vlm, rows), texts, shard_bytes)


def refuse_unless_llava(config):
    """Raises ValueError naming the first part of a VlmConfig that a LLaVA folder cannot hold."""
    tower = config.clip
    if config.image_positions or tower.stem != "conv" or tower.pool != "class":
        raise ValueError("--export=hf: LLaVA knows no image_positions, and no other image tower "
                         "than --clip-stem=conv --clip-pool=class; "
                         "this model cannot be written as one")
    if config.projector not in PROJECTOR_ACT:
        raise ValueError(f"--export=hf: LLaVA knows the projectors {' and '.join(PROJECTOR_ACT)}; "
                         f"this model has {config.projector!r} and cannot be written as one")
    if config.image_tokens != tower.patches:
        raise ValueError(f"--export=hf: LLaVA has an image token for each of the {tower.patches} "
                         f"patches; this model has {config.image_tokens} and cannot be written as "
                         "one")


def _image_id(tokenizer, vocab):
    """The id of <image>: the tokenizer's own, or the next free one."""
    if tokenizer is None:
        return vocab
    try:
        return tokenizer.special(IMAGE)
    except ValueError:
        # Even where the embedding has rows to spare: fast tokenizers number their own additions.
        return len(tokenizer)


# ---------------------------------------------------------------- configs

def _model_config(config, dtype, rows, image_id):
    """rows: of the embedding as it is written; `seethink` keeps the number that the model has."""
    return dict(
        architectures=["LlavaForConditionalGeneration"], model_type="llava",
        torch_dtype=str(dtype).removeprefix("torch."), image_token_index=image_id,
        image_seq_length=config.clip.patches, vision_feature_layer=config.feature_layer,
        vision_feature_select_strategy="default", tie_word_embeddings=config.llm.tied,
        projector_hidden_act=PROJECTOR_ACT[config.projector],
        text_config=_text_config(config.llm, rows),
        vision_config=_vision_config(config.clip), seethink=dict(vocab=config.llm.vocab))


def _family(llm):
    """The model_type whose attention has the biases and norms of this decoder."""
    if llm.qk_norm:
        return "qwen3"
    if llm.qkv_bias and not llm.out_bias:
        return "qwen2"
    if llm.window:
        return "mistral"
    return "llama"


def _text_config(llm, rows):
    kind = _family(llm)
    text = dict(
        model_type=kind, vocab_size=rows, hidden_size=llm.width, intermediate_size=llm.ff,
        num_hidden_layers=llm.layers, num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads, head_dim=llm.head_width, rms_norm_eps=llm.eps,
        rope_theta=llm.theta, tie_word_embeddings=llm.tied, hidden_act="silu",
        max_position_embeddings=llm.context)
    if kind in ("llama", "qwen3"):
        text["attention_bias"] = llm.out_bias
    if llm.window:
        text["sliding_window"] = llm.window
    if llm.rope_context:
        text["rope_scaling"] = dict(
            rope_type="llama3", factor=llm.rope_factor, low_freq_factor=llm.rope_low,
            high_freq_factor=llm.rope_high, original_max_position_embeddings=llm.rope_context)
    elif llm.rope_factor != 1:
        text["rope_scaling"] = dict(rope_type="linear", factor=llm.rope_factor)
    return text


def _vision_config(clip):
    return dict(
        model_type="clip_vision_model", hidden_size=clip.width, intermediate_size=clip.ff,
        num_hidden_layers=clip.layers, num_attention_heads=clip.heads, image_size=clip.image_size,
        patch_size=clip.patch, hidden_act=clip.act, layer_norm_eps=clip.eps,
        projection_dim=clip.embed)


def _special_ids(tokenizer):
    """generation_config.json: begin, end and padding, those that there are."""
    ids = {}
    for role in ("bos", "eos", "pad"):
        found = getattr(tokenizer, f"{role}_id", None)
        if found is not None:
            ids[f"{role}_token_id"] = found
    return ids


def _processor(config):
    """Preprocessing as in data.sample, in transformers' words; LlavaImageProcessor is the one that
    pads."""
    side = config.clip.image_size
    pads = config.image_fit == "pad"
    image = dict(
        image_processor_type="LlavaImageProcessor" if pads else "CLIPImageProcessor", do_pad=pads,
        do_resize=True, size=dict(shortest_edge=side), resample=3,
        do_center_crop=True, crop_size=dict(height=side, width=side),
        do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=config.clip.mean, image_std=config.clip.std,
        do_convert_rgb=True, processor_class="LlavaProcessor")
    whole = dict(
        processor_class="LlavaProcessor", image_token=IMAGE, patch_size=config.clip.patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return {"preprocessor_config.json": json.dumps(image, indent=2),
            "processor_config.json": json.dumps(whole, indent=2)}


# ---------------------------------------------------------------- the tokenizer

def _tokenizer_files(tokenizer, image_id):
    """name -> text or bytes of the files of a tokenizer that knows <image>."""
    if tokenizer is None:
        return {}
    added = getattr(tokenizer, "added", {}) | {IMAGE: image_id}
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    listed = {str(i): dict(content=name, **flags) for name, i in added.items()}
    config = dict(added_tokens_decoder=listed, extra_special_tokens=dict(image_token=IMAGE),
                  clean_up_tokenization_spaces=False, add_bos_token=tokenizer.bos_id is not None,
                  add_eos_token=False)
    if hasattr(tokenizer, "proto"):
        return _sentencepiece_files(tokenizer, config, added)
    return _byte_pair_files(tokenizer, config)


def _byte_pair_files(tokenizer, config):
    model = json.loads(tokenizer.source)
    tokens = model.setdefault("added_tokens", [])
    known = {token["content"] for token in tokens}
    for i, token in config["added_tokens_decoder"].items():
        if token["content"] not in known:
            tokens.append(dict(token, id=int(i)))
    for role, name in tokenizer.names.items():
        if name:
            config[f"{role}_token"] = name
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"tokenizer.json": json.dumps(model),
            "tokenizer_config.json": json.dumps(config, indent=2)}


def _sentencepiece_files(tokenizer, config, added):
    spelling = {i: name for name, i in tokenizer.added.items()}
    roles = dict(bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id,
                 unk=tokenizer.model.unk_id())
    for role, i in roles.items():
        if i in spelling:
            config[f"{role}_token"] = spelling[i]
        elif i is not None:
            config[f"{role}_token"] = tokenizer.model.id_to_piece(i)
    config |= dict(tokenizer_class="LlamaTokenizer", legacy=True, sp_model_kwargs={})
    return {"tokenizer.model": tokenizer.proto,
            "tokenizer_config.json": json.dumps(config, indent=2),
            "tokenizer.json": tokenizer.fast_json(added)}


# ---------------------------------------------------------------- tensors

@torch.no_grad()
def _tensors(vlm, rows):
    """The whole model under the names of the llava-hf layout, the embedding with `rows` rows."""
    found = {}
    for name, tensor in lora.merged(vlm.llm).items():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            tensor = _with_rows(tensor, rows)
        prefix = "language_model." if name.startswith("lm_head") else "language_model.model."
        found[prefix + name] = tensor
    for name, tensor in _two_layers(vlm).items():
        found["multi_modal_projector." + renamed(name, LINEARS)] = tensor
    for name, tensor in hf_tower_names(_whole_tower(vlm)).items():
        found["vision_tower.vision_model." + name] = tensor
    return found


def _with_rows(tensor, rows):
    """tensor (V, D) -> (rows, D); what is new is the mean of what is there, summed in fp32 or
    wider."""
    new = rows - len(tensor)
    if not new:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    mean = tensor.mean(0, keepdim=True, dtype=wide).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(new, -1)])


def _two_layers(vlm):
    """The projector's state dict as that of two layers: a linear W is followed by an identity."""
    state = vlm.projector.state_dict()
    if vlm.config.projector != "linear":
        return state
    bias = state["bias"]
    return {"0.weight": state["weight"], "0.bias": bias,
            "2.weight": torch.eye(len(bias)).to(bias), "2.bias": torch.zeros_like(bias)}


def _whole_tower(vlm):
    """The image tower's state with what was cut from it: blocks that add nothing, a norm that
    nothing reads."""
    with torch.device("meta"):
        whole = ImageTower(vlm.config.clip)
    del whole.proj
    state = vlm.visual.state_dict()
    like = vlm.visual.positional_embedding
    found = {}
    for name, value in whole.state_dict().items():
        if name in state:
            found[name] = state[name]
        elif name.endswith("weight") and (".ln_" in name or name.startswith("ln_")):
            found[name] = like.new_ones(value.shape)
        else:
            found[name] = like.new_zeros(value.shape)
    return found
