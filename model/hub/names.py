"""Other people's names for the same models: configuration keys and tensor names of Hugging Face and LLaVA folders.

Four layouts of a LLaVA checkpoint are one, once prefixes are gone:

    1  model.layers.*             model.mm_projector.*             model.vision_tower.vision_tower.vision_model.*
    2  language_model.model.*     multi_modal_projector.*          vision_tower.vision_model.*
    3  model.language_model.*     model.multi_modal_projector.*    model.vision_tower.[vision_model.]*
    4  language_model.model.*     multi_modal_projector.*          vision_tower.*

1 is LLaVA's own, 2 the hub's llava-hf, 3 what transformers holds in memory since 4.52, 4 what it saves since 5.
"""
import re

from model.clip import ClipConfig
from model.llama import LlamaConfig

# What transformers takes for keys that a config.json leaves out.
LLAMA_DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=10000.0,
                      max_position_embeddings=2048)
QWEN_DEFAULTS = LLAMA_DEFAULTS | dict(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)
DECODERS = {
    "llama": LLAMA_DEFAULTS,
    "mistral": LLAMA_DEFAULTS | dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096,
                                     max_position_embeddings=4096 * 32),
    "qwen2": QWEN_DEFAULTS,
    "qwen3": QWEN_DEFAULTS | dict(head_dim=128),
}
VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=512)
LLAVA_VISION_DEFAULTS = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                             image_size=336, patch_size=14, projection_dim=768)
TEXT_DEFAULTS = dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77,
                     vocab_size=49408)


def need(ok, where, name, value, expected):
    if not ok:
        raise ValueError(f"{where}: {name} is {value!r}, expected {expected}")


def sizes(config, names, where):
    """The values of the keys `names`, each of which must be a whole number above 0."""
    for name in names.split():
        value = config[name]
        need(isinstance(value, int) and not isinstance(value, bool) and value > 0, where, name, value,
             "a whole number above 0")
    return [config[name] for name in names.split()]


def llama_config(config, where):
    """A decoder's config.json (dict) -> LlamaConfig. Raises ValueError naming what this decoder does not do."""
    kind = config.get("model_type", "llama").removeprefix("llava_")
    kind = {"llava": "llama", "qwen": "qwen2"}.get(kind, kind)      # LLaVA's own short names
    need(not config.get("quantization_config"), where, "quantization_config", "there", "weights that are not quantized")
    need(kind in DECODERS, where, "model_type", config.get("model_type"), f"one of {', '.join(DECODERS)}")
    c = DECODERS[kind] | {name: value for name, value in config.items() if value is not None}
    need(c.get("hidden_act", "silu") == "silu", where, "hidden_act", c.get("hidden_act"), "'silu'")
    need(not c.get("mlp_bias"), where, "mlp_bias", True, "False")
    # transformers 5 keeps theta and scaling together, 4 apart.
    rope = {"rope_theta": c["rope_theta"], **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    need(scaling in ("default", "linear", "llama3"), where, "rope_type", scaling, "default, linear or llama3")
    stretch = {}
    wanted = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                               "original_max_position_embeddings")}[scaling]
    for name in wanted:
        need(isinstance(rope.get(name), (int, float)), where, f"{name} of the {scaling} rope scaling", rope.get(name),
             "a number")
    if scaling != "default":
        stretch = dict(rope_factor=float(rope["factor"]))
    if scaling == "llama3":
        stretch |= dict(rope_context=rope["original_max_position_embeddings"], rope_low=float(rope["low_freq_factor"]),
                        rope_high=float(rope["high_freq_factor"]))
    # Llama and Qwen 3 have a key for it, which covers o, too; the others do as they do.
    bias = {"qwen2": "qkv", "mistral": False}.get(kind, c.get("attention_bias", False))
    window = config.get("sliding_window", c.get("sliding_window")) or 0     # null: none, whatever the family's default
    if kind.startswith("qwen") and not c.get("use_sliding_window"):
        window = 0
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    vocab, width, layers, heads, kv_heads, ff, context = sizes(
        c, "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
        "max_position_embeddings", where)
    return LlamaConfig(
        vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=kv_heads, ff=ff, context=context,
        theta=float(rope["rope_theta"]), eps=c["rms_norm_eps"], tied=bool(c["tie_word_embeddings"]),
        head_width=c.get("head_dim") or 0, qkv_bias=bool(bias), out_bias=bias is True, qk_norm=kind == "qwen3",
        window=window, **stretch)


def clip_config(vision, where, text=None, defaults=(), mean=None, std=None):
    """A CLIP's vision_config and text_config (dicts) -> ClipConfig; without `text` there is no text tower."""
    kind = vision.get("model_type", "clip_vision_model")
    need(kind in ("clip_vision_model", "clip"), where, "the image tower's model_type", kind,
         "'clip_vision_model' (SigLIP has no class token, another norm and other pooling, and is not built here)")
    v = VISION_DEFAULTS | dict(defaults) | {name: value for name, value in vision.items() if value is not None}
    act, _ = v["hidden_act"], sizes(v, "image_size patch_size hidden_size num_hidden_layers num_attention_heads "
                                    "intermediate_size projection_dim", where)
    need(act in ("quick_gelu", "gelu"), where, "the image tower's hidden_act", act, "'quick_gelu' or 'gelu'")
    towers = dict(text_layers=0)
    if text is not None:
        t = TEXT_DEFAULTS | {name: value for name, value in text.items() if value is not None}
        width = t["hidden_size"]
        need(t.get("intermediate_size", 4 * width) == 4 * width, where, "the text tower's intermediate_size",
             t.get("intermediate_size"), f"{4 * width}")
        need(t.get("hidden_act", act) == act, where, "the text tower's hidden_act", t.get("hidden_act"), repr(act))
        towers = dict(text_width=width, text_layers=t["num_hidden_layers"], text_heads=t["num_attention_heads"],
                      text_length=t["max_position_embeddings"], vocab=t["vocab_size"])
    colours = {name: tuple(value) for name, value in (("mean", mean), ("std", std)) if value}
    return ClipConfig(image_size=v["image_size"], patch=v["patch_size"], width=v["hidden_size"],
                      layers=v["num_hidden_layers"], heads=v["num_attention_heads"], ff=v["intermediate_size"],
                      embed=v["projection_dim"], act=act, eps=v["layer_norm_eps"], **towers, **colours)


TOWER = {"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
         "embeddings.position_embedding.weight": "positional_embedding"}
TEXT = {"embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding"}
PARTS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
         "self_attn.out_proj": "attn.out_proj", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post",
         "final_layer_norm": "ln_final"}
FUSED = {f"self_attn.{letter}_proj": n for n, letter in enumerate("qkv")}
SKIPPED = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")       # buffers that older versions saved
PROJECTOR = {"linear_1.": "0.", "linear_2.": "2."}


def block_name(name, first):
    """Hugging Face's name inside a CLIP tower -> (OpenAI's name, place of a part that is stacked there, else 0).

    first: the names before the blocks, TOWER or TEXT. Without the tower's own prefix.
    """
    if name in first:
        return first[name], 0
    front, inside = "", name
    if match := re.match(r"encoder\.layers\.(\d+)\.(.*)", name):
        front, inside = f"transformer.resblocks.{match[1]}.", match[2]
    part, _, kind = inside.rpartition(".")
    if part in FUSED:
        return f"{front}attn.in_proj_{kind}", FUSED[part]
    return f"{front}{PARTS.get(part, part)}.{kind}", 0


def llava_name(name):
    """A tensor's name in any of the four layouts -> (name in model.vlm.VLM, place), or None for a saved buffer."""
    if SKIPPED.search(name):
        return None
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        inside = re.sub(r"^(vision_tower\.)+(vision_model\.)?", "", name)
        ours, place = block_name(inside, TOWER)
        return f"visual.{ours}", place
    for prefix in ("mm_projector.", "multi_modal_projector."):
        if name.startswith(prefix):
            inside = name.removeprefix(prefix)
            for theirs, ours in PROJECTOR.items():
                inside = inside.replace(theirs, ours)
            return f"projector.{inside}", 0
    return f"llm.{name.removeprefix('language_model.').removeprefix('model.')}", 0


def clip_name(name):
    """A tensor's name in a Hugging Face CLIP folder -> (name in model.clip.Clip, place), or None for a buffer."""
    if SKIPPED.search(name):
        return None
    if name == "logit_scale":
        return name, 0
    if name in ("visual_projection.weight", "text_projection.weight"):
        return {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}[name], 0
    if name.startswith("text_model."):
        return block_name(name.removeprefix("text_model."), TEXT)
    ours, place = block_name(name.removeprefix("vision_model."), TOWER)
    return f"visual.{ours}", place


def hf_tower_names(state):
    """Our image tower's state dict -> the same under Hugging Face's names, q, k and v apart."""
    back = {ours: theirs for theirs, ours in TOWER.items()} | {
        f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in PARTS.items() for kind in ("weight", "bias")}
    found = {}
    for name, tensor in state.items():
        front, inside = "", name
        if match := re.match(r"transformer\.resblocks\.(\d+)\.(.*)", name):
            front, inside = f"encoder.layers.{match[1]}.", match[2]
        if inside.startswith("attn.in_proj_"):
            for part, chunk in zip(FUSED, tensor.chunk(3)):
                found[f"{front}{part}.{inside.removeprefix('attn.in_proj_')}"] = chunk
        else:
            found[front + back[inside]] = tensor
    return found
