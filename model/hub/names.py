"""Other people's names for the same models: configuration keys and tensor names of Hugging Face
and LLaVA folders.

Two halves. Configurations: a config.json becomes a LlamaConfig or a ClipConfig, or a sentence says
what in it is not built here. Tensor names: a name in a file becomes the name of a parameter here,
and back for an export.

Four layouts of a LLaVA checkpoint are one, once prefixes are gone:

       decoder                   projector                       image tower
    1  model.layers.*            model.mm_projector.*            model.vision_tower.vision_tower.
                                                                                  vision_model.*
    2  language_model.model.*    multi_modal_projector.*         vision_tower.vision_model.*
    3  model.language_model.*    model.multi_modal_projector.*   model.vision_tower.[vision_model.]*
    4  language_model.model.*    multi_modal_projector.*         vision_tower.*

1 is LLaVA's own, 2 the hub's llava-hf, 3 what transformers holds in memory since 4.52, 4 what it
saves since 5.
"""
import re

from model.clip import ClipConfig
from model.llama import LlamaConfig

# ---------------------------------------------------------------- configurations

# What transformers takes for keys that a config.json leaves out.
LLAMA_DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=2048,
    rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0)
MISTRAL_DEFAULTS = LLAMA_DEFAULTS | dict(
    intermediate_size=14336, num_key_value_heads=8, sliding_window=4096,
    max_position_embeddings=4096 * 32)
QWEN_DEFAULTS = LLAMA_DEFAULTS | dict(
    vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)
DECODERS = {
    "llama": LLAMA_DEFAULTS,
    "mistral": MISTRAL_DEFAULTS,
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | dict(head_dim=128),
}
LLAVAS_SHORT_NAMES = {"llava": "llama", "qwen": "qwen2"}

VISION_DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    image_size=224, patch_size=32, projection_dim=512,
    hidden_act="quick_gelu", layer_norm_eps=1e-5)
LLAVA_VISION_DEFAULTS = VISION_DEFAULTS | dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=336, patch_size=14, projection_dim=768)
TEXT_DEFAULTS = dict(
    hidden_size=512, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77,
    vocab_size=49408)

# Our field -> the key of a config.json that holds a whole number above 0.
LLAMA_SIZES = dict(
    vocab="vocab_size", width="hidden_size", layers="num_hidden_layers",
    heads="num_attention_heads", kv_heads="num_key_value_heads", ff="intermediate_size",
    context="max_position_embeddings")
VISION_SIZES = dict(
    image_size="image_size", patch="patch_size", width="hidden_size", layers="num_hidden_layers",
    heads="num_attention_heads", ff="intermediate_size", embed="projection_dim")
TEXT_SIZES = dict(
    text_width="hidden_size", text_layers="num_hidden_layers", text_heads="num_attention_heads",
    text_length="max_position_embeddings", vocab="vocab_size")

# The RoPE scalings that are built here, with the numbers that each needs.
ROPE_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def expect(ok, where, name, value, expected):
    """One sentence for every check of a configuration."""
    if not ok:
        raise ValueError(f"{where}: {name} is {value!r}, expected {expected}")


def refuse_quantized(config, where):
    expect(not config.get("quantization_config"), where, "quantization_config", "there",
           "weights that are not quantized")


def sizes(config, fields, where):
    """fields: our field -> their key; -> our field -> the value, which must be a whole number
    above 0."""
    found = {}
    for field, key in fields.items():
        value = config[key]
        whole = isinstance(value, int) and not isinstance(value, bool)
        expect(whole and value > 0, where, key, value, "a whole number above 0")
        found[field] = value
    return found


def stated(config):
    """A config without its nulls, which stand for the default."""
    return {key: value for key, value in config.items() if value is not None}


def llama_config(config, where):
    """A decoder's config.json (dict) -> LlamaConfig. Raises ValueError naming what this decoder
    does not do."""
    kind = config.get("model_type", "llama").removeprefix("llava_")
    kind = LLAVAS_SHORT_NAMES.get(kind, kind)
    refuse_quantized(config, where)
    expect(kind in DECODERS, where, "model_type", config.get("model_type"),
           f"one of {', '.join(DECODERS)}")
    c = DECODERS[kind] | stated(config)
    act = c.get("hidden_act", "silu")
    expect(act == "silu", where, "hidden_act", act, "'silu'")
    expect(not c.get("mlp_bias"), where, "mlp_bias", True, "False")
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    return LlamaConfig(
        eps=c["rms_norm_eps"],
        tied=bool(c["tie_word_embeddings"]),
        head_width=c.get("head_dim") or 0,
        qk_norm=kind == "qwen3",
        window=_window(kind, config, c),
        **_rope(c, where),
        **_biases(kind, c),
        **sizes(c, LLAMA_SIZES, where))


def _rope(c, where):
    # transformers 5 keeps theta and scaling together in rope_parameters, 4 keeps them apart.
    rope = {"rope_theta": c["rope_theta"]}
    rope |= c.get("rope_scaling") or {}
    rope |= c.get("rope_parameters") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    expect(scaling in ROPE_SCALINGS, where, "rope_type", scaling, "default, linear or llama3")
    for key in ROPE_SCALINGS[scaling]:
        value = rope.get(key)
        is_number = isinstance(value, (int, float))
        expect(is_number, where, f"{key} of the {scaling} rope scaling", value, "a number")
    fields = dict(theta=float(rope["rope_theta"]))
    if scaling == "default":
        return fields
    fields["rope_factor"] = float(rope["factor"])
    if scaling == "llama3":
        fields["rope_context"] = rope["original_max_position_embeddings"]
        fields["rope_low"] = float(rope["low_freq_factor"])
        fields["rope_high"] = float(rope["high_freq_factor"])
    return fields


def _biases(kind, c):
    """Biases of the attention: fixed in Qwen 2 and Mistral; Llama and Qwen 3 have one key for q,
    k, v and o."""
    if kind == "qwen2":
        return dict(qkv_bias=True, out_bias=False)
    if kind == "mistral":
        return dict(qkv_bias=False, out_bias=False)
    bias = bool(c.get("attention_bias"))
    return dict(qkv_bias=bias, out_bias=bias)


def _window(kind, config, c):
    """How many tokens attention looks back, 0 for all. config: as in the file; c: with the
    family's defaults."""
    if kind.startswith("qwen") and not c.get("use_sliding_window"):
        return 0
    if "sliding_window" in config:      # a null says that there is none, whatever the default
        return config["sliding_window"] or 0
    return c.get("sliding_window", 0)


def clip_config(vision, where, text=None, defaults=VISION_DEFAULTS):
    """A CLIP's vision_config and text_config (dicts) -> ClipConfig; without `text` there is no
    text tower."""
    kind = vision.get("model_type", "clip_vision_model")
    expect(kind in ("clip_vision_model", "clip"), where, "the image tower's model_type", kind,
           "'clip_vision_model' (SigLIP has no class token, another norm and other pooling, "
           "and is not built here)")
    v = defaults | stated(vision)
    act = v["hidden_act"]
    image_tower = sizes(v, VISION_SIZES, where)
    expect(act in ("quick_gelu", "gelu"), where, "the image tower's hidden_act", act,
           "'quick_gelu' or 'gelu'")
    text_tower = dict(text_layers=0)
    if text is not None:
        text_tower = _text_tower(text, act, where)
    return ClipConfig(act=act, eps=v["layer_norm_eps"], **image_tower, **text_tower)


def _text_tower(text, act, where):
    """act: the image tower's activation, which both towers share here."""
    t = TEXT_DEFAULTS | stated(text)
    ff = 4 * t["hidden_size"]
    expect(t.get("intermediate_size", ff) == ff, where, "the text tower's intermediate_size",
           t.get("intermediate_size"), f"{ff}")
    expect(t.get("hidden_act", act) == act, where, "the text tower's hidden_act",
           t.get("hidden_act"), repr(act))
    return sizes(t, TEXT_SIZES, where)


# ---------------------------------------------------------------- tensor names

# Hugging Face's name -> OpenAI's, which is ours. Before the blocks of the image tower, of the text
# tower:
TOWER = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}
TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}
# modules inside a block, and the norms around the blocks:
PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}
# three projections, which lie in this order in one tensor here:
STACKED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
# the joint space, a Linear there:
JOINT = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
TURNED = ("visual.proj", "text_projection")     # whose weight is the transpose of the matrix here
# the projector W:
PROJECTOR_PREFIXES = ("mm_projector.", "multi_modal_projector.")
PROJECTOR = {"linear_1.": "0.", "linear_2.": "2."}

# buffers that older versions saved, and nothing reads:
SKIPPED = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")


def block_name(name, first):
    """Hugging Face's name inside a CLIP tower -> (OpenAI's name, place of a tensor that is stacked
    there, else 0).

    first: the names before the blocks, TOWER or TEXT. Without the tower's own prefix.
    """
    if name in first:
        return first[name], 0
    front, inside = "", name
    if match := re.match(r"encoder\.layers\.(\d+)\.(.*)", name):
        front = f"transformer.resblocks.{match[1]}."
        inside = match[2]
    part, _, kind = inside.rpartition(".")      # kind: weight or bias
    if part in STACKED:
        return f"{front}attn.in_proj_{kind}", STACKED[part]
    return f"{front}{PARTS.get(part, part)}.{kind}", 0


def llava_name(name):
    """A tensor's name in any of the four layouts -> (name in model.vlm.VLM, place), or None for a
    saved buffer."""
    if SKIPPED.search(name):
        return None
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        inside = re.sub(r"^(vision_tower\.)+(vision_model\.)?", "", name)
        ours, place = block_name(inside, TOWER)
        return f"visual.{ours}", place
    for prefix in PROJECTOR_PREFIXES:
        if name.startswith(prefix):
            return f"projector.{renamed(name.removeprefix(prefix), PROJECTOR)}", 0
    inside = name.removeprefix("language_model.").removeprefix("model.")
    return f"llm.{inside}", 0


def renamed(name, table):
    """`name` with every key of `table` in it replaced by its value."""
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def decoder_name(name):
    """A tensor's name in a decoder's folder -> (name in model.llama.Llama, 0), or None for a saved
    buffer."""
    if SKIPPED.search(name):
        return None
    return name.removeprefix("model."), 0


def clip_name(name):
    """A tensor's name in a Hugging Face CLIP folder -> (name in model.clip.Clip, place), or None
    for a buffer."""
    if SKIPPED.search(name):
        return None
    if name == "logit_scale":
        return name, 0
    if name in JOINT:
        return JOINT[name], 0
    if name.startswith("text_model."):
        return block_name(name.removeprefix("text_model."), TEXT)
    ours, place = block_name(name.removeprefix("vision_model."), TOWER)
    return f"visual.{ours}", place


def hf_tower_names(state):
    """Our image tower's state dict -> the same under Hugging Face's names, q, k and v apart."""
    theirs_of = {ours: theirs for theirs, ours in TOWER.items()}
    for theirs, ours in PARTS.items():
        for kind in ("weight", "bias"):
            theirs_of[f"{ours}.{kind}"] = f"{theirs}.{kind}"
    found = {}
    for name, tensor in state.items():
        front, inside = "", name
        if match := re.match(r"transformer\.resblocks\.(\d+)\.(.*)", name):
            front = f"encoder.layers.{match[1]}."
            inside = match[2]
        if inside.startswith("attn.in_proj_"):
            kind = inside.removeprefix("attn.in_proj_")
            for part, chunk in zip(STACKED, tensor.chunk(3)):
                found[f"{front}{part}.{kind}"] = chunk
        else:
            found[front + theirs_of[inside]] = tensor
    return found
