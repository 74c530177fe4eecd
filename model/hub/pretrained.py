"""Models from disk or the hub: CLIP (open_clip, Hugging Face), Llama-type decoders, LLaVA in four
layouts.

    clip = load_clip("ViT-L-14-336-quickgelu/openai")       # open_clip's NAME/TAG, or NAME:FILE
    clip = load_clip("path/to/clip-vit-large-patch14")      # a Hugging Face folder
    llm, tokenizer = load_llm("path/to/vicuna-7b-v1.5")     # a folder, or a name on the hub
    vlm, tokenizer = load_llava("path/to/llava-1.5-7b", dtype=torch.bfloat16, device="cuda")

Every loader goes the same way: find the folder, read its config into ours, match its tensors'
names with our parameters, check all shapes, build the module without memory, then copy tensor by
tensor to its dtype and device. Whatever is missing, unexpected or of another shape is named before
the first tensor is read, and nothing is loaded.

    names      our parameter -> {place: the folder's tensor}; places 0, 1, 2 where q, k, v are
               stacked here, else place 0 alone
    where      the folder in a few words, the beginning of every message
"""
import re
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

from data import tokenizer as tokenizers
from model.clip import Clip, ClipConfig
from model.hub.names import LLAVA_VISION_DEFAULTS, TURNED
from model.hub.names import clip_config, expect, llama_config, refuse_quantized
from model.hub.names import clip_name, decoder_name, llava_name
from model.hub.tensors import TensorFolder, first_few, read_json
from model.llama import Llama
from model.runs.config import first_line
from model.vlm import VLM, VlmConfig


# ---------------------------------------------------------------- folders

def resolve(name, flag):
    """A folder, or a hub name (from huggingface_hub's cache, or downloaded) -> Path of a folder
    with a config.json."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{flag}={name} must be a folder with a config.json and weights, it is a "
                         "file")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            raise ValueError(f"{flag}={name} does not exist; expected a folder with a config.json "
                             "and weights, or a name on the hub, OWNER/NAME")
        folder = _from_hub(name, flag)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag}={name} has no config.json; expected a model's folder as the hub "
                         "has it")
    return folder


def _from_hub(name, flag):
    from huggingface_hub import snapshot_download
    texts = ["*.json", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*texts, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            pickles = ["pytorch_model*.bin", "mm_projector.bin"]
            folder = Path(snapshot_download(name, allow_patterns=[*texts, *pickles]))
        return folder
    except Exception as error:      # offline, unknown or gated: the client has a class for each
        raise ValueError(f"{flag}={name} is no folder here and cannot be had from the hub: "
                         f"{first_line(error)}") from None


# ---------------------------------------------------------------- tensors

def _collect(shapes, rename, where=""):
    """The folder's tensors -> `names`. Raises ValueError when two of them are one of ours."""
    names = defaultdict(dict)
    for theirs in shapes:
        found = rename(theirs)
        if found is None:           # a buffer, which is no weight
            continue
        ours, place = found
        other = names[ours].setdefault(place, theirs)
        if other != theirs:
            raise ValueError(f"{where}: tensors {other} and {theirs} are two names of one; which "
                             "is meant?")
    return dict(names)


def _match(wanted, names, shapes, where):
    """wanted: our parameter -> shape; shapes: the folder's tensor -> shape.

    -> our parameter -> the folder's tensors whose rows it holds, one or q, k and v. Raises
    ValueError that names everything that is missing, unexpected or of another shape.
    """
    unexpected = [theirs for ours in names if ours not in wanted for theirs in names[ours].values()]
    missing = [ours for ours in wanted if ours not in names]
    wrong = []
    sources = {}
    for ours in wanted.keys() & names.keys():
        places = sorted(names[ours])
        if ".in_proj_" in ours and places != [0, 1, 2]:
            absent = ["qkv"[place] for place in range(3) if place not in places]
            missing.append(f"{ours}'s {', '.join(absent)}")
            continue
        theirs = [names[ours][place] for place in places]
        first, *rest = (shapes[name] for name in theirs)
        found = first
        if rest:
            found = (first[0] + sum(shape[0] for shape in rest), *first[1:])
        expected = wanted[ours]
        if ours in TURNED:
            expected = expected[::-1]
        if found != expected:
            wrong.append(f"{theirs[0]} {found}, expected {expected}")
        sources[ours] = theirs
    complain(where, missing, unexpected, wrong)
    return sources


def complain(where, missing, unexpected, wrong):
    """Raises ValueError in one sentence when any of the three lists holds a name."""
    faults = []
    for what, names in (("missing", missing), ("unexpected", unexpected),
                        ("of another shape", wrong)):
        if names:
            faults.append(f"{len(names)} {what} ({first_few(names)})")
    if faults:
        raise ValueError(f"{where}: tensors {'; '.join(faults)}")


def _fill(module, folder, names, where, dtype, device, given=None):
    """Puts the tensors of `folder` into `module`, which lies on the meta device; -> `module`.

    given: our parameter -> tensor of what comes from elsewhere. Raises ValueError before anything
    is read.
    """
    state = dict(given or {})
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters() if name not in state}
    sources = _match(wanted, names, folder.shapes, where)
    for ours in sorted(sources, key=lambda name: folder.by_file(sources[name][0])):
        tensors = [folder.get(theirs) for theirs in sources[ours]]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if ours in TURNED:
            tensor = tensor.T
        state[ours] = _own(tensor, device, dtype)
    module.load_state_dict(state, assign=True)
    return module


def _own(tensor, device, dtype):
    """A contiguous copy in memory that torch allocates. The pages of a memory-mapped file would
    change with the file; and a file's tensors lie at any offset, where a matmul may round
    otherwise than on the same numbers at torch's own multiples of 64 bytes, as a resumed run has
    them."""
    return torch.empty(tensor.shape, device=device, dtype=dtype).copy_(tensor)


def _drop_tied_head(names, folder, config, prefix, where):
    """A tied head is not stored twice; a file that does hold it must hold the embedding's very
    numbers."""
    head = names.get(f"{prefix}lm_head.weight")
    embedding = names.get(f"{prefix}embed_tokens.weight")
    if config.tied and head and embedding:
        same = torch.equal(folder.get(head[0]), folder.get(embedding[0]))
        expect(same, where, "tie_word_embeddings", True,
               "False, since its lm_head.weight differs from the embedding")
        del names[f"{prefix}lm_head.weight"]


# ---------------------------------------------------------------- CLIP

def load_clip(name_or_path, dtype=torch.float32, device="cpu"):
    """-> Clip with both towers (with the image tower alone, if the folder has no more).

    name_or_path: a Hugging Face CLIP folder; open_clip's "NAME/TAG", which is downloaded when it
    is not in the cache; or "NAME:FILE" with open_clip's own file. Raises ValueError when the tower
    is of a kind that is not built here.
    """
    name = str(name_or_path)
    if _is_open_clip(name):
        return _load_open_clip(name, dtype, device)
    return _load_hf_clip(resolve(name, "--clip"), dtype, device)


def _tower_config(name):
    """ClipConfig of what `load_clip` would load, from its config alone."""
    if _is_open_clip(name):
        return _open_clip_shape(name)
    return folder_clip_config(resolve(name, "--clip"))


def _load_hf_clip(folder, dtype, device):
    where = f"CLIP folder {str(folder)!r}"
    tensors = TensorFolder(folder)
    has_text = any(name.startswith("text_model.") for name in tensors.shapes)
    config = folder_clip_config(folder, has_text)
    names = _collect(tensors.shapes, clip_name, where)
    with torch.device("meta"):
        model = Clip(config)
    if "visual.proj" not in names:      # a tower saved by itself has no joint space
        del model.visual.proj
    return _fill(model, tensors, names, where, dtype, device)


def folder_clip_config(folder, text=False):
    """config.json (and preprocessor_config.json) of a Hugging Face CLIP folder -> ClipConfig;
    text: with its text tower."""
    where = f"CLIP folder {str(folder)!r}"
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "clip")
    expect(kind in ("clip", "clip_vision_model"), where, "model_type", kind, "'clip'")
    vision = config.get("vision_config", config)
    if "projection_dim" in config:
        vision = vision | {"projection_dim": config["projection_dim"]}
    text_config = (config.get("text_config") or {}) if text else None
    return replace(clip_config(vision, where, text_config), **_colours(folder))


def _colours(folder):
    """Channel statistics of the pixels, as ClipConfig has them, those that a
    preprocessor_config.json states."""
    path = folder / "preprocessor_config.json"
    processor = read_json(path) if path.exists() else {}
    colours = {}
    for field in ("mean", "std"):
        if processor.get(f"image_{field}"):
            colours[field] = tuple(processor[f"image_{field}"])
    return colours


# ---------------------------------------------------------------- open_clip

# What its model configs may say of the towers that are built here.
OPEN_CLIP_VISION = "image_size layers width patch_size head_width mlp_ratio patch_dropout".split()
OPEN_CLIP_TEXT = "context_length vocab_size width heads layers".split()
# In its files, but no weights.
OPENAI_EXTRAS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def _is_open_clip(name):
    """Whether a name is open_clip's. Raises ValueError for a file by itself."""
    import open_clip
    if Path(name).is_file():
        raise ValueError(f"--clip={name} is a file, which does not say what model it is the "
                         f"weights of; name that in front of it, as in ViT-L-14-quickgelu:{name}")
    if Path(name).exists():
        return False
    if re.match(r"[\w-]+:.", name):
        return True
    return name.partition("/")[0] in open_clip.list_models()


def _split_open_clip(name):
    """"NAME/TAG" or "NAME:FILE" -> (NAME, TAG or FILE)."""
    model_name = re.split("[:/]", name)[0]
    return model_name, name[len(model_name) + 1:]


def _open_clip_shape(name):
    """ClipConfig of the model that "NAME/TAG" or "NAME:FILE" names."""
    import open_clip
    model_name, _ = _split_open_clip(name)
    if model_name not in open_clip.list_models():
        raise ValueError(f"--clip={name}: {model_name!r} is not a model that open_clip knows")
    return open_clip_config(open_clip.get_model_config(model_name), f"--clip={name}")


def open_clip_config(config, where):
    """open_clip's model config (dict) -> ClipConfig. Raises ValueError naming what the towers here
    do not do."""
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    own_vit = "timm_model_name" not in vision and not isinstance(vision["layers"], list)
    expect(own_vit, where, "the image tower", vision.get("timm_model_name", "a ResNet"),
           "open_clip's own ViT")
    for name, tower, known in (("vision_cfg", vision, OPEN_CLIP_VISION),
                               ("text_cfg", text, OPEN_CLIP_TEXT)):
        odd = {key: tower[key] for key in sorted(tower) if key not in known and tower[key]}
        expect(not odd, where, name, odd, "none of these: not built here")
    width = vision["width"]
    return ClipConfig(
        image_size=vision["image_size"], patch=vision["patch_size"],
        width=width, layers=vision["layers"], heads=width // vision.get("head_width", 64),
        ff=int(width * vision.get("mlp_ratio", 4.0)), embed=config["embed_dim"],
        text_width=text["width"], text_layers=text["layers"], text_heads=text["heads"],
        text_length=text["context_length"], vocab=text["vocab_size"],
        act="quick_gelu" if config.get("quick_gelu") else "gelu")


def _load_open_clip(name, dtype, device):
    import open_clip
    where = f"--clip={name}"
    config = _open_clip_shape(name)
    model_name, weights = _split_open_clip(name)
    file = Path(weights).expanduser()
    if not file.is_file():
        config = _as_trained(model_name, weights, config, where)
    elif config.act == "gelu":
        warnings.warn(f"{where}: the file is read with exact GELU; OpenAI's weights want a name "
                      "with -quickgelu", stacklevel=3)
    try:
        if file.is_file():
            # Not create_model, which would stretch position embeddings of another size.
            state = open_clip.factory.load_state_dict(str(file))
        else:
            state = open_clip.create_model(model_name, pretrained=weights).state_dict()
    except Exception as error:      # no network, a damaged file, a TorchScript archive
        raise ValueError(f"{where} cannot be loaded by open_clip: {first_line(error)}") from None
    state = {key: value.detach() for key, value in state.items() if key not in OPENAI_EXTRAS}
    with torch.device("meta"):
        model = Clip(config)
    _check_same_tensors(model.state_dict(), state, where)
    model.load_state_dict({key: _own(value, device, dtype) for key, value in state.items()},
                          assign=True)
    return model


def _as_trained(model_name, tag, config, where):
    """`config` with the channel statistics of the weights `tag`. Raises ValueError when open_clip
    has no such weights, or when they were trained with another activation or resizing than they
    would be used with here."""
    import open_clip
    trained = open_clip.get_pretrained_cfg(model_name, tag)
    if not trained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name))
        if not tags:
            tags = "of which there are none"
        raise ValueError(f"{where}: {tag!r} is neither a file nor one of open_clip's weights for "
                         f"{model_name}, {tags}")
    # open_clip only warns of another activation, and the features are wrong ever after.
    quick = trained.get("quick_gelu", config.act == "quick_gelu")
    act = "quick_gelu" if quick else "gelu"
    right_name = model_name.removesuffix("-quickgelu")
    if quick:
        right_name += "-quickgelu"
    expect(config.act == act, where, "the activation", config.act,
           f"{act}, which these weights were trained with: {right_name}")
    resizing = (trained.get("resize_mode", "shortest"), trained.get("interpolation", "bicubic"))
    expect(resizing == ("shortest", "bicubic"), where, "the resizing of its pictures", resizing,
           "('shortest', 'bicubic')")
    colours = {field: tuple(trained[field]) for field in ("mean", "std") if trained.get(field)}
    return replace(config, **colours)


def _check_same_tensors(wanted, found, where):
    """Both name -> tensor; raises ValueError naming what is missing, unexpected or of another
    shape."""
    wrong = []
    for name in wanted.keys() & found.keys():
        shape = tuple(found[name].shape)
        expected = tuple(wanted[name].shape)
        if shape != expected:
            wrong.append(f"{name} {shape}, expected {expected}")
    complain(where, wanted.keys() - found.keys(), found.keys() - wanted.keys(), wrong)


# ---------------------------------------------------------------- CLIP's words

# The prompt of a class by itself (arXiv 2103.00020, section 3.1.4).
PHOTO = "a photo of a {}."
OPENAI_VOCAB = 49408        # byte pairs of OpenAI's CLIP, which LAION's and most others share


def text_fault(name):
    """Why the CLIP that `load_clip` would load cannot read words here, as the end of a sentence
    about it; "" when it can. Tells by configs and the names of tensors: reads no weight."""
    if _is_open_clip(name):
        return _vocabulary_fault(_open_clip_shape(name).vocab)      # a config with other words is refused
    folder = resolve(name, "--clip")
    names = _collect(TensorFolder(folder).shapes, clip_name, f"CLIP folder {str(folder)!r}")
    if not {"text_projection", "visual.proj"} <= names.keys():
        return "holds no text tower"
    fault = _vocabulary_fault(folder_clip_config(folder, text=True).vocab)
    if not fault and not _has_openais_pieces(folder):
        fault = "has another vocabulary than OpenAI's"
    return fault


def _vocabulary_fault(size):
    if size == OPENAI_VOCAB:
        return ""
    return f"has a vocabulary of {size} pieces, not OpenAI's {OPENAI_VOCAB}"


def _has_openais_pieces(folder):
    """Whether the vocabulary that lies in a CLIP folder is OpenAI's, as it is taken to be where
    none does."""
    from open_clip.tokenizer import SimpleTokenizer
    pieces = {}
    if (folder / "vocab.json").is_file():
        pieces = read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        pieces = read_json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    if not pieces:
        return True
    expected = SimpleTokenizer().encoder
    ends = ("<start_of_text>", "<end_of_text>")         # which Hugging Face spells otherwise
    return all(pieces.get(piece) == place for piece, place in expected.items() if piece not in ends)


def photo_reader(text_length):
    """-> read(answer), the ids of "a photo of a ANSWER." in OpenAI's vocabulary, cut to
    `text_length` with the end token kept, as open_clip cuts."""
    from open_clip.tokenizer import SimpleTokenizer
    words = SimpleTokenizer()

    def read(answer):
        ids = [words.sot_token_id, *words.encode(PHOTO.format(answer))]
        return [*ids[:text_length - 1], words.eot_token_id]
    return read


# ---------------------------------------------------------------- decoders

def load_llm(path, dtype=torch.float32, device="cpu"):
    """A Hugging Face folder of a Llama-type decoder, or its name on the hub -> (Llama, tokenizer
    or None)."""
    folder = resolve(path, "--llm")
    where = f"decoder folder {str(folder)!r}"
    config = read_json(folder / "config.json")
    expect("text_config" not in config, where, "its config",
           "that of a model with more than a decoder", "a decoder's; a LLaVA goes by --llava")
    config = llama_config(config, where)
    tensors = TensorFolder(folder)
    names = _collect(tensors.shapes, decoder_name, where)
    _drop_tied_head(names, tensors, config, "", where)
    tokenizer = _tokenizer(folder, config.vocab)
    with torch.device("meta"):
        llm = Llama(config)
    return _fill(llm, tensors, names, where, dtype, device), tokenizer


def _tokenizer(folder, rows):
    """The folder's tokenizer, or None; ValueError when it does not go with an embedding of `rows`
    rows."""
    tokenizer = tokenizers.load(folder, rows)
    if tokenizer is None:
        return None
    count = len(tokenizer)
    if rows != count and not _is_padded(rows, count):
        raise ValueError(f"folder {str(folder)!r}: its tokenizer has {count} entries, its "
                         f"embedding {rows} rows; they do not belong together")
    return tokenizer


def _is_padded(rows, count):
    """Whether `rows` may be those of `count` entries and padding: up to the next multiple that
    suits matmuls, or, as in Qwen, a little further."""
    if rows in (-(-count // 64) * 64, -(-count // 128) * 128):
        return True
    return rows % 32 == 0 and count < rows <= 1.03 * count


# ---------------------------------------------------------------- LLaVA

TWO_LAYERS = {"projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"}


def load_llava(path, dtype=torch.float32, device="cpu", clip=""):
    """A LLaVA folder in any of the four layouts, or its name on the hub -> (VLM, tokenizer or
    None).

    clip: where the image tower is, as for `load_clip`, when the folder holds none (LLaVA's own
    layout names one in its config). Raises ValueError in one sentence when anything does not fit;
    nothing is half loaded.
    """
    folder = resolve(path, "--llava")
    where = f"LLaVA folder {str(folder)!r}"
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type", "llava")
    expect(kind == "llava" or "text_config" not in raw, where, "model_type", kind, "'llava'")
    tensors = TensorFolder(folder)
    names = _collect(tensors.shapes, llava_name, where)

    # 1. The image tower: the folder's own, or one from elsewhere in its place.
    loaded = None
    if clip or not _holds_tower(names):
        loaded = load_clip(clip or _named_tower(raw, folder, where), dtype, device)
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("visual.")}

    # 2. The config.
    if "text_config" in raw:
        config = _hf_llava_config(raw, where, folder)
    else:
        tower = loaded.config if loaded else _inside_tower(raw, where, folder, tensors, names)
        config = _own_llava_config(raw, where, tower)
    if loaded:
        config = replace(config, clip=loaded.config)

    # 3. Out with what only the format wants: rows for <image>, a tied head's copy, the second layer
    #    of a linear projector, blocks that nothing reads.
    rows = config.llm.vocab
    if raw.get("seethink"):
        config = _drop_rows(config, raw["seethink"]["vocab"], tensors, names)
    _drop_tied_head(names, tensors, config.llm, "llm.", where)
    if config.projector == "linear" and TWO_LAYERS <= names.keys():
        _drop_identity(tensors, names, where)
    names = {ours: theirs for ours, theirs in names.items() if not unused(ours, config)}

    # 4. Tokenizer and weights.
    tokenizer = _tokenizer(folder, rows)
    with torch.device("meta"):
        vlm = VLM(config)
    given = {}
    if loaded:
        state = loaded.visual.state_dict()
        given = {f"visual.{name}": state[name] for name in vlm.visual.state_dict()}
    return _fill(vlm, tensors, names, where, dtype, device, given), tokenizer


def _holds_tower(names):
    return any(ours.startswith("visual.") for ours in names)


def unused(name, config):
    """Whether a tensor of the image tower, by our name, is one that a VLM of this config never
    computes."""
    block = re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name)
    if block:
        return int(block[1]) > config.clip.layers + config.feature_layer
    return name.startswith(("visual.ln_post.", "visual.proj"))


def _hf_llava_config(raw, where, folder):
    """config.json of layouts 2 to 4 -> VlmConfig."""
    expect(raw.get("multimodal_projector_bias", True), where, "multimodal_projector_bias", False,
           "True")
    refuse_quantized(raw, where)
    vision = clip_config(raw.get("vision_config") or {}, where, defaults=LLAVA_VISION_DEFAULTS)
    layer = raw.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    expect(isinstance(layer, int), where, "vision_feature_layer", layer, "one number")
    kept = raw.get("vision_feature_select_strategy", "default")
    expect(kept == "default", where, "vision_feature_select_strategy", kept,
           "'default', without the class token")
    act = raw.get("projector_hidden_act", "gelu")
    expect(act in ("gelu", "linear"), where, "projector_hidden_act", act,
           "'gelu', or 'linear' for W alone")
    text = dict(raw["text_config"] or {})
    if not text.get("tie_word_embeddings"):         # either place may tie the head
        text["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    processor = folder / "preprocessor_config.json"
    pads = processor.exists() and read_json(processor).get("do_pad")
    return VlmConfig(
        clip=replace(vision, **_colours(folder)),
        llm=llama_config(text, where),
        projector="mlp2x_gelu" if act == "gelu" else "linear",
        feature_layer=layer,
        image_fit="pad" if pads else "crop",
        speaks=True,
        folder_image_id=raw.get("image_token_index", raw.get("image_token_id", 32000)))


def _own_llava_config(raw, where, tower):
    """config.json of LLaVA's own layout, and the ClipConfig of its image tower -> VlmConfig."""
    expect(not raw.get("mm_use_im_start_end"), where, "mm_use_im_start_end", True,
           "False: no tokens around an image")
    kept = raw.get("mm_vision_select_feature", "patch")
    expect(kept == "patch", where, "mm_vision_select_feature", kept,
           "'patch', without the class token")
    projector = raw.get("mm_projector_type", "linear")
    expect(projector in ("linear", "mlp2x_gelu"), where, "mm_projector_type", projector,
           "linear or mlp2x_gelu")
    ratio = raw.get("image_aspect_ratio")
    expect(ratio in (None, "square", "pad"), where, "image_aspect_ratio", ratio,
           "square or pad: no tiles are built here")
    return VlmConfig(
        clip=tower,
        llm=llama_config(raw, where),
        projector=projector,
        feature_layer=raw.get("mm_vision_select_layer", -2),
        image_fit="pad" if ratio == "pad" else "crop",
        speaks=True)


def _named_tower(raw, folder, where):
    """The image tower that a checkpoint without one names in its config."""
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not name:
        raise ValueError(f"{where} holds no image tower and its config names none; name one with "
                         "--clip=")
    for place in (folder / name, Path(name)):
        if place.is_dir():
            return str(place)
    try:
        return str(_from_hub(name, "mm_vision_tower"))
    except ValueError as error:
        raise ValueError(f"{where} holds no image tower: {error}; name one with --clip=") from None


def _inside_tower(raw, where, folder, tensors, names):
    """ClipConfig of a tower that lies in a LLaVA folder of the own layout, whose config has no
    sizes of it: from the config if it has them all the same, from the folder its tower is named
    after, or, for OpenAI's, from the shapes."""
    if "vision_config" in raw:
        return replace(clip_config(raw["vision_config"], where), **_colours(folder))
    name = str(raw.get("mm_vision_tower", ""))
    for place in (folder / name, Path(name)):
        if name and (place / "config.json").is_file():
            return folder_clip_config(place)
    expect("clip-vit" in name, where, "mm_vision_tower", name,
           "a folder with a config.json, or one of OpenAI's towers: the tower's sizes stand "
           "nowhere else")

    def shape(ours):
        if f"visual.{ours}" not in names:
            complain(where, [f"visual.{ours}"], [], [])
        theirs = names[f"visual.{ours}"]
        return tensors.shapes[theirs[min(theirs)]]

    width, _, patch, _ = shape("conv1.weight")
    positions, _ = shape("positional_embedding")
    ff, _ = shape("transformer.resblocks.0.mlp.c_fc.weight")
    side = round((positions - 1) ** 0.5)        # one position is the class token's
    blocks = {ours.split(".")[3] for ours in names
              if ours.startswith("visual.transformer.resblocks.")}
    return ClipConfig(image_size=side * patch, patch=patch, width=width, layers=len(blocks),
                      heads=width // 64, ff=ff, text_layers=0)


def _drop_rows(config, vocab, tensors, names):
    """`export_hf` pads the vocabulary for <image>: -> the config with the `vocab` rows that the
    model had."""
    for name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        if name in names:
            tensors.shorten(names[name][0], vocab)
    return replace(config, llm=replace(config.llm, vocab=vocab))


def _drop_identity(tensors, names, where):
    """`export_hf` writes W as two layers, the second an identity: the first alone is W again."""
    weight = tensors.get(names.pop("projector.2.weight")[0])
    bias = tensors.get(names.pop("projector.2.bias")[0])
    same = torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) and not bias.any()
    expect(same, where, "projector_hidden_act", "linear",
           "'gelu': only W followed by an identity is read without it")
    for kind in ("weight", "bias"):
        names[f"projector.{kind}"] = names.pop(f"projector.0.{kind}")


# ---------------------------------------------------------------- for a run

def load_tokenizer(path):
    """The tokenizer of a model's folder or hub name. Raises ValueError when it has none."""
    folder = resolve(path, "--llm or --llava")
    raw = read_json(folder / "config.json")
    config = llama_config(raw.get("text_config", raw), f"folder {str(folder)!r}")
    tokenizer = _tokenizer(folder, config.vocab)
    if tokenizer is None:
        raise ValueError(f"{str(folder)!r} holds no tokenizer; expected a tokenizer.model or a "
                         "tokenizer.json")
    return tokenizer


def planned(cfg):
    """VlmConfig of what --clip, --llm and --llava name, from their configs alone; what they leave
    open is the config's own. Returns None where they name nothing."""
    if not cfg.pretrained:
        return None
    if cfg.vlm.llava:
        return _planned_llava(cfg.vlm.llava, cfg.clip.clip)
    tower = _tower_config(cfg.clip.clip) if cfg.clip.clip else cfg.clip.config(1)
    llm = cfg.llm.config(cfg.llm.vocab)
    if cfg.llm.llm:
        folder = resolve(cfg.llm.llm, "--llm")
        llm = llama_config(read_json(folder / "config.json"), f"decoder folder {str(folder)!r}")
    return VlmConfig(tower, llm, **cfg.vlm.shape(), speaks=bool(cfg.llm.llm))


def _planned_llava(path, clip):
    """VlmConfig of what `load_llava` would load, from the configs and, in LLaVA's own layout, the
    tensors' shapes."""
    folder = resolve(path, "--llava")
    where = f"LLaVA folder {str(folder)!r}"
    raw = read_json(folder / "config.json")
    tower = _tower_config(clip) if clip else None
    if "text_config" in raw:
        config = _hf_llava_config(raw, where, folder)
        return replace(config, clip=tower) if clip else config
    if not clip:
        tensors = TensorFolder(folder)
        names = _collect(tensors.shapes, llava_name, where)
        if _holds_tower(names):
            tower = _inside_tower(raw, where, folder, tensors, names)
        else:
            tower = _tower_config(_named_tower(raw, folder, where))
    return _own_llava_config(raw, where, tower)


def check_weights(cfg):
    """Raises ValueError when the decoder of --llm cannot be loaded, by the names and shapes of its
    tensors: stage clip may train for hours before that decoder is asked for."""
    if cfg.llm.llm:
        load_llm(cfg.llm.llm, getattr(torch, cfg.machine.dtype), "meta")


def fields(made):
    """VlmConfig -> the fields of train.py's config that say the same."""
    vision, llm = made.clip, made.llm
    names = "vocab width layers heads kv_heads ff theta eps tied qkv_bias"
    return {name: getattr(llm, name) for name in names.split()} | dict(
        image_size=vision.image_size, patch=vision.patch, clip_width=vision.width,
        embed=vision.embed, clip_layers=vision.layers, clip_heads=vision.heads,
        clip_act=vision.act, clip_stem=vision.stem, clip_pool=vision.pool,
        projector=made.projector, feature_layer=made.feature_layer,
        image_positions=made.image_positions)


def assemble(cfg, made, state, vocab, dtype, device):
    """A VLM as `planned` has it, `made`, with a new projector.

    Its tower is that of --clip, else of the CLIP in a checkpoint's `state`; its decoder that of
    --llm, else a new one of `vocab` rows.
    """
    if cfg.clip.clip:
        clip = load_clip(cfg.clip.clip, dtype, device)
    else:
        clip = Clip.from_config(state["clip_config"], state["clip"])
    if cfg.llm.llm:
        llm, _ = load_llm(cfg.llm.llm, dtype, device)
    else:
        llm = Llama(cfg.llm.config(vocab))
    config = replace(made, clip=clip.config, llm=llm.config)
    return VLM.from_parts(config, clip.visual, llm)
