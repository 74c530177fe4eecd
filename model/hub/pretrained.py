"""Models from disk or the hub: CLIP (open_clip, Hugging Face), Llama-type decoders, LLaVA in four layouts.

    clip = load_clip("ViT-L-14-336-quickgelu/openai")       # open_clip's name/tag, or name:FILE, or a folder
    llm, tokenizer = load_llm("path/to/vicuna-7b-v1.5")     # a folder, or a name on the hub
    vlm, tokenizer = load_llava("path/to/llava-1.5-7b", dtype=torch.bfloat16, device="cuda")

Modules are built without memory, every tensor is checked by name and shape before the first is read, and each goes
straight to its dtype and device. Whatever is missing, unexpected or of another shape is named, and nothing is loaded.
"""
import re
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from data import tokenizer as tokenizers
from model.clip import Clip, ClipConfig
from model.llama import Llama
from model.hub.names import LLAVA_VISION_DEFAULTS, SKIPPED, clip_config, clip_name, llama_config, llava_name, need
from model.hub.tensors import TensorFolder, read_json, some
from model.vlm import VLM, VlmConfig


def unused(name, config):
    """Whether a tensor of the image tower, by our name, is one that a VLM of this config never computes."""
    block = re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name)
    return (int(block[1]) > config.clip.layers + config.feature_layer if block
            else name.startswith(("visual.ln_post.", "visual.proj")))


def resolve(name, flag):
    """A folder, or a hub name (from huggingface_hub's cache, or downloaded) -> Path of a folder with a config.json."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{flag}={name} must be a folder with a config.json and weights, it is a file")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            raise ValueError(f"{flag}={name} does not exist; expected a folder with a config.json and weights, or a "
                             "name on the hub, OWNER/NAME")
        folder = _from_hub(name, flag)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag}={name} has no config.json; expected a model's folder as the hub has it")
    return folder


def _from_hub(name, flag):
    from huggingface_hub import snapshot_download
    texts = ["*.json", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*texts, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*texts, "pytorch_model*.bin", "mm_projector.bin"]))
        return folder
    except Exception as error:      # offline, unknown or gated: the hub's client has an exception for each
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{flag}={name} is no folder here and cannot be had from the hub: {said}") from None


def _fill(module, folder, names, where, dtype, device, idle=lambda name: False, given=()):
    """Puts the tensors of `folder` into `module`, which lies on the meta device.

    names: our parameter -> {place: the folder's tensor}, several where ours is made of some; idle: whether a name of
    ours may be in the folder and is not wanted; given: our parameter -> tensor of what comes from elsewhere.
    Raises ValueError before anything is read.
    """
    given = {name: tensor for name, tensor in dict(given).items() if name in module.state_dict()}
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters() if name not in given}
    unexpected = [theirs for ours, parts in names.items() if ours not in wanted for theirs in parts.values()
                  if not idle(ours)]
    missing = [name for name in wanted if name not in names]
    sources, wrong = {}, []
    for name in wanted.keys() & names.keys():
        if absent := {0, 1, 2} - {*names[name]} if ".in_proj_" in name else ():
            missing += [f"{name}'s {', '.join('qkv'[place] for place in sorted(absent))}"]
            continue
        parts = [names[name][place] for place in sorted(names[name])]
        shapes = [folder.shapes[part] for part in parts]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(parts) > 1 else shapes[0]
        turned = name in ("visual.proj", "text_projection")         # a matrix here, a Linear's weight there
        if (shape[::-1] if turned else shape) != wanted[name]:
            wrong.append(f"{parts[0]} {shape}, expected {wanted[name][::-1] if turned else wanted[name]}")
        sources[name] = parts, turned
    complain(where, missing, unexpected, wrong)
    state = given
    for name, (parts, turned) in sorted(sources.items(), key=lambda item: folder.by_file(item[1][0][0])):
        tensors = [folder.get(part) for part in parts]
        tensor = torch.cat(tensors) if len(parts) > 1 else tensors[0]
        state[name] = _own(tensor.T if turned else tensor, device, dtype)
    module.load_state_dict(state, assign=True)
    return module


def _own(tensor, device, dtype):
    """A contiguous copy in memory that torch allocates. The pages of a memory-mapped file would change with the file;
    and a file's tensors lie at any offset, where a matmul may round otherwise than on the same numbers at torch's own
    multiples of 64 bytes, as a resumed run has them."""
    return torch.empty(tensor.shape, device=device, dtype=dtype).copy_(tensor)


def _collect(shapes, rename, where=""):
    """The folder's names -> {our name: {place: folder's name}}. Raises ValueError when two of them are one."""
    names = defaultdict(dict)
    for theirs in shapes:
        if found := rename(theirs):
            other = names[found[0]].setdefault(found[1], theirs)
            if other != theirs:
                raise ValueError(f"{where}: tensors {other} and {theirs} are two names of one; which is meant?")
    return names


def _settle_head(names, folder, config, prefix, where):
    """A tied head is not stored twice; a file that does hold it must hold the embedding's very numbers."""
    head = names.get(f"{prefix}lm_head.weight")
    if config.tied and head:
        same = torch.equal(folder.get(head[0]), folder.get(names[f"{prefix}embed_tokens.weight"][0]))
        need(same, where, "tie_word_embeddings", True, "False, since its lm_head.weight differs from the embedding")
        del names[f"{prefix}lm_head.weight"]


# ---------------------------------------------------------------- CLIP

def load_clip(name_or_path, dtype=torch.float32, device="cpu"):
    """-> Clip with both towers (with the image tower alone, if the folder has no more).

    name_or_path: a Hugging Face CLIP folder; open_clip's "NAME/TAG", which is downloaded when it is not in the cache;
    or "NAME:FILE" with open_clip's own file. Raises ValueError when the tower is of a kind that is not built here.
    """
    name = str(name_or_path)
    if _is_open_clip(name):
        return _load_open_clip(name, dtype, device)
    return _load_hf_clip(resolve(name, "--clip"), dtype, device)


def _is_open_clip(name):
    """Whether a name is open_clip's. Raises ValueError for a file by itself."""
    import open_clip
    if Path(name).is_file():
        raise ValueError(f"--clip={name} is a file, which does not say what model it is the weights of; name that in "
                         f"front of it, as in ViT-L-14-quickgelu:{name}")
    return not Path(name).exists() and (
        re.match(r"[\w-]+:.", name) is not None or name.partition("/")[0] in open_clip.list_models())


def _load_hf_clip(folder, dtype, device):
    where, tensors = f"CLIP folder {str(folder)!r}", TensorFolder(folder)
    config = folder_clip_config(folder, any(name.startswith("text_model.") for name in tensors.shapes))
    names = _collect(tensors.shapes, clip_name, where)
    with torch.device("meta"):
        model = Clip(config)
    if "visual.proj" not in names:      # a tower saved by itself has no joint space
        del model.visual.proj
    return _fill(model, tensors, names, where, dtype, device)


def folder_clip_config(folder, text=False):
    """config.json (and preprocessor_config.json) of a Hugging Face CLIP folder -> ClipConfig."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "clip")
    need(kind in ("clip", "clip_vision_model"), f"CLIP folder {str(folder)!r}", "model_type", kind, "'clip'")
    sizes = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
    return clip_config(config.get("vision_config", config) | sizes, f"CLIP folder {str(folder)!r}",
                       (config.get("text_config") or {}) if text else None, **_colours(folder))


def _colours(folder):
    """Channel statistics of the pixels, from a folder's preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.exists() else {}
    return dict(mean=found.get("image_mean"), std=found.get("image_std"))


def open_clip_config(config, where):
    """open_clip's model config (dict) -> ClipConfig. Raises ValueError naming what the towers here do not do."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    need("timm_model_name" not in vision and not isinstance(vision["layers"], list), where, "the image tower",
         vision.get("timm_model_name", "a ResNet"), "open_clip's own ViT")
    known = "image_size layers width patch_size head_width mlp_ratio patch_dropout".split()
    known_text = "context_length vocab_size width heads layers".split()
    for part, of, plain in (("vision_cfg", vision, known), ("text_cfg", text, known_text)):
        odd = sorted(name for name, value in of.items() if name not in plain and value)
        need(not odd, where, part, {name: of[name] for name in odd}, "none of these: not built here")
    return ClipConfig(
        image_size=vision["image_size"], patch=vision["patch_size"], width=vision["width"], layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", 64), ff=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        embed=config["embed_dim"], text_width=text["width"], text_layers=text["layers"], text_heads=text["heads"],
        text_length=text["context_length"], vocab=text["vocab_size"],
        act="quick_gelu" if config.get("quick_gelu") else "gelu")


def _load_open_clip(name, dtype, device):
    import open_clip
    where, config, model_name = f"--clip={name}", _open_clip_shape(name), re.split("[:/]", name)[0]
    act, weights = config.act, name[len(model_name) + 1:]
    tags, file = open_clip.list_pretrained_tags_by_model(model_name), Path(weights).expanduser()
    made_for = {} if file.is_file() else open_clip.get_pretrained_cfg(model_name, weights)
    if not file.is_file() and not made_for:
        raise ValueError(f"{where}: {weights!r} is neither a file nor one of open_clip's weights for {model_name}, "
                         f"{', '.join(tags) or 'of which there are none'}")
    # open_clip only warns of this, and the features are wrong ever after.
    trained = "quick_gelu" if made_for.get("quick_gelu", act == "quick_gelu") else "gelu"
    other = model_name.removesuffix("-quickgelu") + ("-quickgelu" if trained == "quick_gelu" else "")
    need(act == trained, where, "the activation", act, f"{trained}, which these weights were trained with: {other}")
    way = made_for.get("resize_mode", "shortest"), made_for.get("interpolation", "bicubic")
    need(way == ("shortest", "bicubic"), where, "the resizing of its pictures", way, "('shortest', 'bicubic')")
    if file.is_file() and act == "gelu":
        warnings.warn(f"{where}: the file is read with exact GELU; OpenAI's weights want a name with -quickgelu",
                      stacklevel=3)
    colours = {kind: tuple(made_for[kind]) for kind in ("mean", "std") if made_for.get(kind)}
    try:
        # A file by itself: create_model would stretch position embeddings of another size into the model's.
        state = (open_clip.factory.load_state_dict(str(file)) if file.is_file()
                 else open_clip.create_model(model_name, pretrained=weights).state_dict())
    except Exception as error:      # no network, a damaged file, a TorchScript archive
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where} cannot be loaded by open_clip: {said}") from None
    with torch.device("meta"):
        ours = Clip(replace(config, **colours))
    state = {key: value.detach() for key, value in state.items() if key not in OPENAI_EXTRAS}
    check_tensors({key: tuple(value.shape) for key, value in ours.state_dict().items()},
                  {key: tuple(value.shape) for key, value in state.items()}, where)
    ours.load_state_dict({key: _own(value, device, dtype) for key, value in state.items()}, assign=True)
    return ours


OPENAI_EXTRAS = ("attn_mask", "input_resolution", "context_length", "vocab_size")      # no weights


def check_tensors(wanted, found, where):
    """Both name -> shape; raises ValueError naming what is missing, unexpected or of another shape."""
    wrong = [f"{name} {found[name]}, expected {wanted[name]}" for name in wanted.keys() & found.keys()
             if found[name] != wanted[name]]
    complain(where, wanted.keys() - found.keys(), found.keys() - wanted.keys(), wrong)


def complain(where, missing, unexpected, wrong):
    faults = [f"{len(names)} {what} ({some(names)})" for what, names in
              (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)) if names]
    if faults:
        raise ValueError(f"{where}: tensors {'; '.join(faults)}")


def _open_clip_shape(name):
    import open_clip
    model_name = re.split("[:/]", name)[0]
    if model_name not in open_clip.list_models():
        raise ValueError(f"--clip={name}: {model_name!r} is not a model that open_clip knows")
    return open_clip_config(open_clip.get_model_config(model_name), f"--clip={name}")


# ---------------------------------------------------------------- decoders

def load_llm(path, dtype=torch.float32, device="cpu"):
    """A Hugging Face folder of a Llama-type decoder, or its name on the hub -> (Llama, tokenizer or None)."""
    folder = resolve(path, "--llm")
    where = f"decoder folder {str(folder)!r}"
    config = read_json(folder / "config.json")
    need("text_config" not in config, where, "its config", "that of a model with more than a decoder", "a decoder's; a "
         "LLaVA goes by --llava")
    config = llama_config(config, where)
    tensors = TensorFolder(folder)
    names = _collect(tensors.shapes, lambda name: None if SKIPPED.search(name) else (name.removeprefix("model."), 0),
                     where)
    _settle_head(names, tensors, config, "", where)
    tokenizer = _tokenizer(folder, config.vocab)
    with torch.device("meta"):
        llm = Llama(config)
    return _fill(llm, tensors, names, where, dtype, device), tokenizer


def _tokenizer(folder, rows):
    """The folder's tokenizer, or None; ValueError when it does not go with an embedding of `rows` rows."""
    tokenizer = tokenizers.load(folder, rows)
    if tokenizer is None:
        return None
    # Rows beyond the tokenizer's ids are padding: to the next multiple that suits matmuls, or a little further.
    count = len(tokenizer)
    padded = rows in {-(-count // n) * n for n in (64, 128)} or rows % 32 == 0 and count < rows <= 1.03 * count
    if rows != count and not padded:
        raise ValueError(f"folder {str(folder)!r}: its tokenizer has {count} entries, its embedding {rows} "
                         "rows; they do not belong together")
    return tokenizer


# ---------------------------------------------------------------- LLaVA

def load_llava(path, dtype=torch.float32, device="cpu", clip=""):
    """A LLaVA folder in any of the four layouts, or its name on the hub -> (VLM, tokenizer or None).

    clip: where the image tower is, as for `load_clip`, when the folder holds none (LLaVA's own layout names one in its
    config). Raises ValueError in one sentence when anything does not fit; nothing is half loaded.
    """
    folder = resolve(path, "--llava")
    where, config = f"LLaVA folder {str(folder)!r}", read_json(folder / "config.json")
    kind = config.get("model_type", "llava")
    need(kind == "llava" or "text_config" not in config, where, "model_type", kind, "'llava'")
    tensors = TensorFolder(folder)
    names = _collect(tensors.shapes, llava_name, where)
    inside = any(name.startswith("visual.") for name in names) and not clip
    loaded = None if inside else load_clip(clip or _named_tower(config, folder, where), dtype, device)
    if "text_config" in config:
        made = _hf_llava_config(config, where, folder)
    else:
        made = _own_llava_config(config, where, folder, tensors, names if inside else (),
                                 loaded and loaded.config)
    tower = {}
    if loaded:
        made = replace(made, clip=loaded.config)
        tower = {f"visual.{name}": tensor for name, tensor in loaded.visual.state_dict().items()}
        names = {name: parts for name, parts in names.items() if not name.startswith("visual.")}
    rows = made.llm.vocab
    if padded := config.get("seethink"):
        made = replace(made, llm=replace(made.llm, vocab=padded["vocab"]))
        for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
            if name in names:
                tensors.shorten(names[name][0], padded["vocab"])
    _settle_head(names, tensors, made.llm, "llm.", where)
    if made.projector == "linear" and "projector.2.weight" in names:
        _drop_identity(tensors, names, where)
    tokenizer = _tokenizer(folder, rows)
    with torch.device("meta"):
        vlm = VLM(made)
    return _fill(vlm, tensors, names, where, dtype, device, lambda name: unused(name, made), tower), tokenizer


def _hf_llava_config(config, where, folder):
    """config.json of layouts 2 to 4 -> VlmConfig."""
    text = config["text_config"] or {}
    text = text | dict(tie_word_embeddings=text.get("tie_word_embeddings") or config.get("tie_word_embeddings", False))
    need(config.get("multimodal_projector_bias", True), where, "multimodal_projector_bias", False, "True")
    need(not config.get("quantization_config"), where, "quantization_config", "there", "weights that are not quantized")
    vision = clip_config(config.get("vision_config") or {}, where, defaults=LLAVA_VISION_DEFAULTS, **_colours(folder))
    layer = config.get("vision_feature_layer", -2)
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    need(isinstance(layer, int), where, "vision_feature_layer", layer, "one number")
    kept = config.get("vision_feature_select_strategy", "default")
    need(kept == "default", where, "vision_feature_select_strategy", kept, "'default', without the class token")
    act = config.get("projector_hidden_act", "gelu")
    need(act in ("gelu", "linear"), where, "projector_hidden_act", act, "'gelu', or 'linear' for W alone")
    processor = folder / "preprocessor_config.json"
    padded = processor.exists() and read_json(processor).get("do_pad")
    return VlmConfig(
        vision, llama_config(text, where), "mlp2x_gelu" if act == "gelu" else "linear",
        layer, image_fit="pad" if padded else "crop", speaks=True,
        folder_image_id=config.get("image_token_index", config.get("image_token_id", 32000)))


def _own_llava_config(config, where, folder, tensors, names, tower=None):
    """config.json of LLaVA's own layout -> VlmConfig; of the image tower when `names` hold it, else `tower`."""
    need(not config.get("mm_use_im_start_end"), where, "mm_use_im_start_end", True, "False: no tokens around an image")
    kept = config.get("mm_vision_select_feature", "patch")
    need(kept == "patch", where, "mm_vision_select_feature", kept, "'patch', without the class token")
    projector = config.get("mm_projector_type", "linear")
    need(projector in ("linear", "mlp2x_gelu"), where, "mm_projector_type", projector, "linear or mlp2x_gelu")
    ratio = config.get("image_aspect_ratio")
    need(ratio in (None, "square", "pad"), where, "image_aspect_ratio", ratio, "square or pad: no tiles are built here")
    vision = _inside_tower(config, where, folder, tensors, names) if names else tower
    return VlmConfig(vision, llama_config(config, where), projector, config.get("mm_vision_select_layer", -2),
                     image_fit="pad" if ratio == "pad" else "crop", speaks=True)


def _named_tower(config, folder, where):
    """The image tower that a checkpoint without one names in its config."""
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not name:
        raise ValueError(f"{where} holds no image tower and its config names none; name one with --clip=")
    for place in (folder / name, Path(name)):
        if place.is_dir():
            return str(place)
    try:
        return str(_from_hub(name, "mm_vision_tower"))
    except ValueError as error:
        raise ValueError(f"{where} holds no image tower: {error}; name one with --clip=") from None


def _inside_tower(config, where, folder, tensors, names):
    """Sizes of a tower that lies in a LLaVA folder of the own layout, whose config has none: from its config if it has
    them all the same, from the folder its tower is named after, or, for OpenAI's, from the shapes."""
    if "vision_config" in config:
        return clip_config(config["vision_config"], where, **_colours(folder))
    name = str(config.get("mm_vision_tower", ""))
    for place in (folder / name, Path(name)):
        if name and (place / "config.json").is_file():
            return folder_clip_config(place)
    need("clip-vit" in name, where, "mm_vision_tower", name, "a folder with a config.json, or one of OpenAI's towers: "
         "the tower's sizes stand nowhere else")
    shapes = {ours: tensors.shapes[next(iter(parts.values()))] for ours, parts in names.items()}
    width, _, patch, _ = shapes["visual.conv1.weight"]
    side = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    layers = len({ours.split(".")[3] for ours in names if ours.startswith("visual.transformer.resblocks.")})
    return ClipConfig(image_size=side * patch, patch=patch, width=width, layers=layers, heads=width // 64,
                      ff=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0], text_layers=0)


def _drop_identity(tensors, names, where):
    """`export_hf` writes W as two layers, the second an identity: the first alone is W again."""
    weight, bias = (tensors.get(names.pop(f"projector.2.{kind}")[0]) for kind in ("weight", "bias"))
    same = torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) and not bias.any()
    need(same, where, "projector_hidden_act", "linear", "'gelu': only W followed by an identity is read without it")
    for kind in ("weight", "bias"):
        names[f"projector.{kind}"] = names.pop(f"projector.0.{kind}")


# ---------------------------------------------------------------- for a run

def load_tokenizer(path):
    """The tokenizer of a model's folder or hub name. Raises ValueError when it has none."""
    folder = resolve(path, "--llm or --llava")
    config = read_json(folder / "config.json")
    found = _tokenizer(folder, llama_config(config.get("text_config", config), f"folder {str(folder)!r}").vocab)
    if found is None:
        raise ValueError(f"{str(folder)!r} holds no tokenizer; expected a tokenizer.model or a tokenizer.json")
    return found


def planned(cfg):
    """VlmConfig of what --clip, --llm and --llava name, from their configs alone; what they leave open is the config's
    own. None where they name nothing."""
    if not cfg.pretrained:
        return None
    tower = _tower_config(cfg.clip) if cfg.clip else cfg.clip_config(1)
    if cfg.llava:
        folder = resolve(cfg.llava, "--llava")
        config, where = read_json(folder / "config.json"), f"LLaVA folder {str(folder)!r}"
        if "text_config" in config:
            made = _hf_llava_config(config, where, folder)
            return replace(made, clip=tower) if cfg.clip else made
        tensors = TensorFolder(folder)
        names = _collect(tensors.shapes, llava_name, where)
        inside = any(name.startswith("visual.") for name in names) and not cfg.clip
        if not inside and not cfg.clip:
            tower = _tower_config(_named_tower(config, folder, where))
        return _own_llava_config(config, where, folder, tensors, names if inside else (), tower)
    llm = cfg.llm_config(cfg.vocab)
    if cfg.llm:
        folder = resolve(cfg.llm, "--llm")
        llm = llama_config(read_json(folder / "config.json"), f"decoder folder {str(folder)!r}")
    return VlmConfig(tower, llm, cfg.projector, cfg.feature_layer, cfg.image_positions, speaks=bool(cfg.llm))


def check_weights(cfg):
    """Raises ValueError when the decoder of --llm cannot be loaded, by the names and shapes of its tensors: stage clip
    may train for hours before that decoder is asked for."""
    if cfg.llm:
        load_llm(cfg.llm, getattr(torch, cfg.dtype), "meta")


def _tower_config(name):
    return _open_clip_shape(name) if _is_open_clip(name) else folder_clip_config(resolve(name, "--clip"))


def fields(made):
    """VlmConfig -> the fields of train.py's config that say the same."""
    vision, llm = made.clip, made.llm
    names = "vocab width layers heads kv_heads ff theta eps tied qkv_bias"
    return {name: getattr(llm, name) for name in names.split()} | dict(
        image_size=vision.image_size, patch=vision.patch, clip_width=vision.width, embed=vision.embed,
        clip_layers=vision.layers, clip_heads=vision.heads, clip_act=vision.act, clip_stem=vision.stem,
        clip_pool=vision.pool, projector=made.projector, feature_layer=made.feature_layer,
        image_positions=made.image_positions)


def assemble(cfg, made, state, vocab, dtype, device):
    """A VLM as `planned` has it, `made`: of --clip (without it, of the CLIP in a checkpoint's `state`) and --llm
    (without it, of a new decoder of `vocab` rows), with a new projector."""
    tower = (load_clip(cfg.clip, dtype, device) if cfg.clip else
             Clip.from_config(state["clip_config"], state["clip"]))
    llm = load_llm(cfg.llm, dtype, device)[0] if cfg.llm else Llama(cfg.llm_config(vocab))
    return VLM.from_parts(replace(made, clip=tower.config, llm=llm.config), tower.visual, llm)
