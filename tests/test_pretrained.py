"""Checkpoints of others: the same numbers as their own code gives, from every layout, or one
sentence why not."""
import copy
import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import open_clip
import pytest
import sentencepiece as spm
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers import CLIPConfig as HFClipConfig
from transformers import LlamaConfig as HFLlama
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from data.sample import collate
from data.tokenizer import IMAGE_ID
from model import lora
from model.hub import names, pretrained, tensors
from model.runs import checkpoint
from model.hub.export import export_hf
from model.generate import generate
from model.llama import Llama
from model.vlm import VLM, VlmConfig
from tiny import difference, gradients, make_vlm, shake

SIDE, PATCH, PATCHES, VOCAB, IMAGE = 15, 5, 9, 67, 66
VISION = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
              image_size=SIDE, patch_size=PATCH, projection_dim=7, layer_norm_eps=1e-3)
TEXT = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=35, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-3,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)


def rope(theta, **more):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=theta) | more)


FAMILIES = {
    "llama": HFLlama(**TEXT, **rope(5000.0)),
    "llama3": HFLlama(**TEXT, rope_parameters=LLAMA3),
    "longchat": HFLlama(**TEXT, **rope(5000.0, rope_type="linear", factor=4.0)),
    "biased": HFLlama(**TEXT | dict(attention_bias=True), **rope(5000.0)),
    "tinyllama": HFLlama(**TEXT | dict(num_key_value_heads=3), **rope(10000.0)),
    "smollm2": HFLlama(**TEXT | dict(tie_word_embeddings=True), **rope(100000.0)),
    "mistral": MistralConfig(**TEXT | dict(sliding_window=None), **rope(1000000.0)),
    "qwen2": Qwen2Config(**TEXT, **rope(1000000.0)),
    "qwen2.5-tied": Qwen2Config(**TEXT | dict(tie_word_embeddings=True), **rope(1000000.0)),
    "qwen3": Qwen3Config(**TEXT, head_dim=10, **rope(1000000.0)),
}


def llava(family="llama", act="quick_gelu", **changes):
    text = FAMILIES[family]
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION, hidden_act=act), text_config=text,
                         image_token_index=IMAGE, image_seq_length=PATCHES,
                         attn_implementation="eager", **changes,
                         tie_word_embeddings=text.tie_word_embeddings)
    return shake(LlavaForConditionalGeneration(config)).eval()


def inputs(seed=1):
    """Pixels of two pictures and ids (2, 17): words, a picture's 9 places, words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (2, 17), generator=generator)
    ids[:, 0] = 1
    ids[0, 2:11] = IMAGE
    ids[1, 1:10] = IMAGE
    return torch.randn(2, 3, SIDE, SIDE, generator=generator), ids


def cross_entropy(logits, ids):
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == IMAGE, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


# What stands in front of the names of decoder, head, projector and tower in a layout.
PREFIXES = {
    1: ("model.", "", "model.mm_projector.", "model.vision_tower.vision_tower.vision_model."),
    2: ("language_model.model.", "language_model.", "multi_modal_projector.",
        "vision_tower.vision_model."),
    3: ("model.language_model.", "", "model.multi_modal_projector.", "model.vision_tower."),
}


def in_layout(layout, name):
    """A name of transformers' state dict, as the layout has it."""
    decoder, head, projector, tower = PREFIXES[layout]
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return decoder + name.removeprefix("language_model.")
    if name.startswith("lm_head"):
        return head + name
    if name.startswith("multi_modal_projector."):
        inside = name.removeprefix("multi_modal_projector.")
        if layout == 1:
            inside = inside.replace("linear_1", "0").replace("linear_2", "2")
        return projector + inside
    return tower + name.removeprefix("vision_tower.").removeprefix("vision_model.")


def written(hf, folder, layout=4):
    """The model's folder in one of the four layouts."""
    hf.save_pretrained(folder)
    if layout == 4:
        return folder
    (folder / "model.safetensors").unlink()
    tied = hf.config.text_config.tie_word_embeddings
    state = {in_layout(layout, name): value.contiguous() for name, value in hf.state_dict().items()
             if not (tied and name == "lm_head.weight")}
    if layout == 1:
        write_llavas_own(hf, folder, state)
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def write_llavas_own(hf, folder, state):
    """Layout 1 has a config of its own, a tower that it names, and a buffer among its weights."""
    state[f"{PREFIXES[1][3]}embeddings.position_ids"] = torch.arange(10)[None]
    torch.save(state, folder / "pytorch_model.bin")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    config = text | dict(
        model_type=f"llava_{text['model_type']}", mm_projector_type="mlp2x_gelu",
        mm_vision_tower="tower", mm_vision_select_layer=-2, mm_hidden_size=12)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(hf.config.vision_config.to_dict()))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers' model, ours) of a family, ours loaded from the folder that transformers
    wrote."""
    hf = llava(request.param)
    return hf, pretrained.load_llava(written(hf, tmp_path_factory.mktemp(request.param)))[0]


def test_logits_and_loss_equal_transformers(pair):
    hf, vlm = pair
    pixels, ids = inputs()
    with torch.no_grad():
        wanted = hf(input_ids=ids, pixel_values=pixels).logits
        given = vlm.logits(pixels, ids)
    assert wanted.abs().max() > 0.1
    assert difference(given, wanted) < 1e-5
    assert difference(cross_entropy(given, ids), cross_entropy(wanted, ids)) < 1e-5


def test_every_gradient_equals_transformers(pair):
    hf, vlm = pair
    pixels, ids = inputs()
    hf.model.vision_tower.requires_grad_(False)
    labels = ids.masked_fill(ids == IMAGE, -100)
    loss = hf(input_ids=ids, pixel_values=pixels, labels=labels).loss
    wanted = {}
    for name, gradient in gradients(hf, loss).items():
        ours, _ = names.llava_name(name)
        if not (vlm.llm.config.tied and ours == "llm.lm_head.weight"):
            wanted[ours] = gradient
    given = gradients(vlm, cross_entropy(vlm.logits(pixels, ids), ids))
    assert {name.split(".")[0] for name in given} == {"llm", "projector"}
    assert difference(given, wanted) < 1e-5


def test_greedy_generation_of_32_tokens_equals_transformers(pair):
    hf, vlm = pair
    pixels, ids = inputs()
    for row in range(2):
        wanted = hf.generate(input_ids=ids[row:row + 1], pixel_values=pixels[row:row + 1],
                             max_new_tokens=32, min_new_tokens=32, do_sample=False,
                             pad_token_id=0)[0, 17:]
        prompt = ids[row].masked_fill(ids[row] == IMAGE, IMAGE_ID).tolist()
        batch = collate([(prompt, [], ())], 0, SIDE)
        batch.pixels = pixels[row:row + 1]
        done, _ = generate(vlm, batch, 1, 32, eos_id=2, temperature=0.0, min_new=32)
        assert done.ids[0, 0].tolist() == wanted.tolist()


@pytest.mark.parametrize("layout", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "smollm2", "qwen2"])
def test_every_layout_loads_to_the_same_bits(family, layout, tmp_path):
    hf = llava(family)
    wanted = pretrained.load_llava(written(hf, tmp_path / "transformers"))[0]
    given = pretrained.load_llava(written(hf, tmp_path / "layout", layout))[0]
    assert same_weights(given, wanted)
    same = dict(folder_image_id=-200, clip=wanted.config.clip) if layout == 1 else {}
    assert given.config == replace(wanted.config, **same)


def test_shards_load_as_one_file_does(tmp_path):
    hf = llava()
    whole = pretrained.load_llava(written(hf, tmp_path / "whole"))[0]
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    parts = pretrained.load_llava(tmp_path / "shards")[0]
    assert same_weights(parts, whole)


def test_loading_takes_the_wanted_dtype(tmp_path):
    vlm = pretrained.load_llava(written(llava(), tmp_path), torch.bfloat16)[0]
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    pixels, ids = inputs()
    with torch.no_grad():
        wanted = pretrained.load_llava(tmp_path)[0].logits(pixels, ids)
        assert difference(vlm.logits(pixels, ids), wanted) < 0.1


@pytest.mark.parametrize("planted, least", [
    (dict(feature_layer=-1), 0.1),
    (dict(llm=dict(theta=10000.0)), 1e-2), (dict(llm=dict(eps=1e-5)), 1e-4),
    (dict(clip=dict(act="gelu")), 1e-3), (dict(clip=dict(eps=1e-5)), 1e-4)], ids=str)
def test_a_wrong_setting_is_caught(planted, least, tmp_path):
    hf = llava()
    vlm = pretrained.load_llava(written(hf, tmp_path))[0]
    pixels, ids = inputs()
    changed = {}
    for field, value in planted.items():
        part = getattr(vlm.config, field)
        changed[field] = replace(part, **value) if isinstance(value, dict) else value
    with torch.device("meta"):
        wrong = VLM(replace(vlm.config, **changed))
    state = vlm.state_dict() | last_block(hf)
    wrong.load_state_dict({name: state[name] for name in wrong.state_dict()}, assign=True)
    with torch.no_grad():
        wanted = hf(input_ids=ids, pixel_values=pixels).logits
        right = difference(vlm.logits(pixels, ids), wanted)
        off = difference(wrong.logits(pixels, ids), wanted)
    assert right < 1e-5 < least < off


def last_block(hf):
    """What the right model leaves out, under our names: a later feature layer needs it."""
    tower = hf.model.vision_tower.state_dict()
    found = pretrained._collect(
        tower, lambda name: names.block_name(name.removeprefix("vision_model."), names.TOWER))
    state = {}
    for ours, parts in found.items():
        if ours.startswith("transformer.resblocks.2."):
            state[f"visual.{ours}"] = torch.cat([tower[parts[place]] for place in sorted(parts)])
    return state


def test_a_tanh_gelu_in_the_projector_is_caught(tmp_path):
    hf = llava()
    vlm = pretrained.load_llava(written(hf, tmp_path))[0]
    pixels, ids = inputs()
    vlm.projector[1] = torch.nn.GELU(approximate="tanh")
    with torch.no_grad():
        assert difference(vlm.logits(pixels, ids),
                          hf(input_ids=ids, pixel_values=pixels).logits) > 3e-5


# ---------------------------------------------------------------- CLIP

TEXT_TOWER = dict(hidden_size=10, intermediate_size=40, num_hidden_layers=2, num_attention_heads=5,
                  max_position_embeddings=11, vocab_size=31, layer_norm_eps=1e-3, eos_token_id=30,
                  bos_token_id=29)


def texts():
    ids = torch.randint(1, 29, (3, 11), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(3), torch.tensor([10, 4, 6])] = 30
    return ids, torch.tensor([11, 5, 7])


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_clip_folder_gives_transformers_numbers(act, tmp_path):
    torch.manual_seed(0)
    hf = shake(CLIPModel(HFClipConfig(vision_config=VISION | dict(hidden_act=act), projection_dim=7,
                                      text_config=TEXT_TOWER | dict(hidden_act=act)))).eval()
    hf.save_pretrained(tmp_path)
    colours = dict(image_mean=[.5] * 3, image_std=[.25] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    ours = pretrained.load_clip(str(tmp_path))
    assert ours.config.mean == (.5,) * 3 and ours.config.std == (.25,) * 3
    pixels, (ids, length) = inputs()[0], texts()
    with torch.no_grad():
        out = hf(input_ids=ids, pixel_values=pixels)
        assert difference(ours.encode_image(pixels), out.image_embeds) < 1e-5
        assert difference(ours.encode_text(ids, length), out.text_embeds) < 1e-5
        wanted = hf.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert difference(ours.visual.features(pixels, -2), wanted) < 1e-5
    assert torch.equal(ours.logit_scale, hf.logit_scale)
    hf.vision_model.save_pretrained(tmp_path / "tower")      # a tower by itself
    alone = pretrained.load_clip(str(tmp_path / "tower"))
    with torch.no_grad():
        assert difference(alone.visual.features(pixels, -2), wanted) < 1e-5
    with pytest.raises(ValueError, match="without a text tower"):
        alone.encode_text(ids, length)


@pytest.fixture(scope="module", ids=["openai", "laion"],
                params=[(True, {}), (False, dict(head_width=3, mlp_ratio=3.37))])
def open_clip_model(request, tmp_path_factory):
    """(name of a tiny model that open_clip knows, its random weights in a file, itself)."""
    quick, more = request.param
    folder = tmp_path_factory.mktemp("open_clip")
    name = f"seethink-tiny-{'quickgelu' if quick else 'wide'}"
    (folder / f"{name}.json").write_text(json.dumps(dict(
        embed_dim=7, quick_gelu=quick,
        vision_cfg=dict(image_size=SIDE, patch_size=PATCH, width=12, layers=3, head_width=4) | more,
        text_cfg=dict(context_length=11, vocab_size=31, width=10, heads=5, layers=2))))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = shake(open_clip.create_model(name, pretrained=None)).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    return name, folder / "weights.pt", model


def test_open_clips_weights_give_open_clips_numbers(open_clip_model):
    name, file, theirs = open_clip_model
    # A file does not say which GELU it was trained with, and the common mistake is to read OpenAI's
    # with the exact one.
    warns = pytest.warns(UserWarning, match="read with exact GELU")
    with nullcontext() if "quickgelu" in name else warns:
        ours = pretrained.load_clip(f"{name}:{file}")
    pixels, (ids, length) = inputs()[0], texts()
    with torch.no_grad():
        assert difference(ours.visual(pixels), theirs.visual(pixels)) < 2e-6
        assert difference(ours.encode_text(ids, length),
                          theirs.encode_text(ids, normalize=True)) < 2e-6
        for layer in (-1, -2, -3):
            wanted = theirs.visual.forward_intermediates(
                pixels, indices=[3 + layer], normalize_intermediates=False,
                intermediates_only=True, output_fmt="NLC")
            assert difference(ours.visual.features(pixels, layer),
                              wanted["image_intermediates"][0]) < 5e-6


@pytest.mark.parametrize("name, message", [
    ("ViT-B-32/openai", "activation is 'gelu', expected quick_gelu.*ViT-B-32-quickgelu"),
    ("ViT-B-32-quickgelu/laion2b_s34b_b79k",
     "neither a file nor one of open_clip's weights for ViT-B-32-quickgelu"),
    ("ViT-B-32", "'' is neither a file nor one of open_clip's weights"),
    ("ViT-B-32/nonsense",
     "'nonsense' is neither a file nor one of open_clip's weights.*laion2b_s34b_b79k"),
    ("RN50:{file}", "expected open_clip's own ViT"),
    ("ViT-B-16-SigLIP:{file}", "expected open_clip's own ViT"),
    ("coca_ViT-B-32:{file}", "not built here"), ("ViT-L-14-CLIPA:{file}", "not built here"),
    ("roberta-ViT-B-32:{file}", "not built here"),
    ("ViT-B-32:{file}", "cannot be loaded by open_clip"),
    ("{file}", "is a file, which does not say what model"),
    ("ViT-Q-99:{file}", "not a model that open_clip knows"),
    ("nowhere/at-all/x", "does not exist")])
@pytest.mark.filterwarnings("ignore:.*is read with exact GELU")
def test_a_clip_that_cannot_be_had_is_refused_in_one_sentence(name, message, tmp_path):
    (tmp_path / "file.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load_clip(name.format(file=tmp_path / "file.pt"))
    assert "\n" not in str(error.value)


def test_blocks_after_the_feature_layer_are_not_built(tmp_path):
    vlm = pretrained.load_llava(written(llava(), tmp_path))[0]
    assert len(vlm.visual.transformer.resblocks) == VISION["num_hidden_layers"] - 1
    assert not any("ln_post" in name or name.endswith("visual.proj") for name in vlm.state_dict())
    message = "feature layer -1 needs 3 blocks, this tower was cut to 2"
    with pytest.raises(ValueError, match=message):
        vlm.visual.features(inputs()[0], -1)


@pytest.mark.parametrize("kind, theirs", [
    ("llama", HFLlama), ("mistral", MistralConfig), ("qwen2", Qwen2Config),
    ("qwen3", Qwen3Config)])
def test_keys_that_a_config_leaves_out_mean_what_transformers_takes_them_for(kind, theirs):
    left_out = dict(model_type=kind)
    written_out = theirs().to_dict()
    assert names.llama_config(left_out, "") == names.llama_config(written_out, "")


def test_vision_keys_that_a_config_leaves_out_mean_what_transformers_takes_them_for():
    vision = CLIPVisionConfig().to_dict()
    text = CLIPTextConfig().to_dict()
    assert names.clip_config({}, "", text={}) == names.clip_config(vision, "", text=text)
    left_out = names.clip_config({}, "", defaults=names.LLAVA_VISION_DEFAULTS)
    assert left_out == names.clip_config(LlavaConfig().vision_config.to_dict(), "")


@pytest.mark.parametrize("window, tokens, fits",
                         [(None, 99, True), (12, 12, True), (12, 13, False)])
def test_a_sequence_beyond_the_sliding_window_is_refused(window, tokens, fits):
    config = names.llama_config(TEXT | dict(model_type="mistral", sliding_window=window), "")
    llm = Llama(config)
    x = torch.zeros(1, tokens, 24)
    if fits:
        llm(x, torch.tensor([tokens]))
    else:
        with pytest.raises(ValueError, match="13 tokens is longer than the sliding window of 12"):
            llm(x, torch.tensor([tokens]))


def test_qwens_window_counts_only_when_it_is_in_use():
    for used, window in ((False, 0), (True, 12)):
        c = TEXT | dict(model_type="qwen2", sliding_window=12, use_sliding_window=used)
        assert names.llama_config(c, "").window == window


@pytest.mark.parametrize("layer, wanted", [(-2, -2), (2, -2), (3, -1), (1, -3)])
def test_a_feature_layer_counted_from_the_front_is_the_same_one(layer, wanted, tmp_path):
    hf = llava(vision_feature_layer=layer)
    vlm = pretrained.load_llava(written(hf, tmp_path))[0]
    pixels, ids = inputs()
    with torch.no_grad():
        assert difference(vlm.logits(pixels, ids),
                          hf(input_ids=ids, pixel_values=pixels).logits) < 1e-5
    assert vlm.config.feature_layer == wanted


def test_a_model_keeps_its_weights_when_its_file_changes(tmp_path):
    vlm = pretrained.load_llava(written(llava(), tmp_path))[0]
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as opened:       # in place: the same pages that a memory map reads
        opened.seek(size // 4)
        opened.write(bytes(size - size // 4))
    assert all(torch.equal(value, before[name]) for name, value in vlm.state_dict().items())


def misplaced(tensors):
    return [name for name, value in tensors.items() if value.data_ptr() % 64]


@pytest.mark.filterwarnings("ignore:.*is read with exact GELU")
def test_weights_from_any_file_lie_where_a_resumed_run_has_them(open_clip_model, tmp_path):
    # A matmul may round by where its weights lie: at a file's offsets otherwise than at torch's
    # multiples of 64 bytes.
    name, file, _ = open_clip_model
    mapped = tmp_path / "clip.safetensors"
    state = torch.load(file, weights_only=True)
    save_file({key: value.contiguous() for key, value in state.items()}, mapped)
    assert misplaced(load_file(mapped))
    vlm = pretrained.load_llava(written(llava(), tmp_path / "llava"))[0]
    assert misplaced(load_file(tmp_path / "llava" / "model.safetensors"))
    pickled = pretrained.load_llava(written(llava(), tmp_path / "pickled", 1))[0]
    for model in (pretrained.load_clip(f"{name}:{mapped}"), vlm, pickled):
        assert not misplaced(model.state_dict())
    checkpoint.save(tmp_path / "align.pt", dict(stage="align", vlm=vlm.state_dict()))
    assert not misplaced(checkpoint.load(tmp_path / "align.pt")["vlm"])


@pytest.mark.parametrize("ratio, fit", [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_llavas_own_config_says_how_pictures_become_square(ratio, fit, tmp_path):
    edited(written(llava(), tmp_path, 1), image_aspect_ratio=ratio)
    assert pretrained.load_llava(tmp_path)[0].config.image_fit == fit


# ---------------------------------------------------------------- out again

def same_model(given, wanted):
    assert given.config == wanted.config
    return same_weights(given, wanted)


def same_weights(given, wanted):
    given = given.state_dict()
    wanted = wanted.state_dict()
    assert given.keys() == wanted.keys()
    return all(torch.equal(value, wanted[name]) for name, value in given.items())


def test_an_exported_model_gives_the_same_logits_in_transformers_and_comes_back_identical(
        pair, tmp_path):
    _, vlm = pair
    export_hf(vlm, None, tmp_path / "out")
    pixels, ids = inputs()
    hf, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out",
                                                             output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        wanted = vlm.logits(pixels, ids)
        theirs = ids.masked_fill(ids == IMAGE, hf.config.image_token_index)
        given = hf.eval()(input_ids=theirs, pixel_values=pixels).logits
    assert difference(given[..., :VOCAB], wanted) < 1e-5
    best = given[..., :VOCAB].amax(-1, keepdim=True)
    assert (given[..., VOCAB:] < best).all()        # no new token is ever the likeliest
    back = pretrained.load_llava(tmp_path / "out")[0]
    assert same_model(back, with_config(vlm, folder_image_id=back.config.folder_image_id,
                                        clip=replace(vlm.config.clip, text_layers=0)))


def with_config(vlm, **changes):
    vlm = copy.copy(vlm)
    vlm.config = replace(vlm.config, **changes)
    return vlm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_projector_goes_out_and_comes_back(dtype, tmp_path):
    vlm = make_vlm(dtype, projector="linear", image_positions=False)
    export_hf(vlm, None, tmp_path / "out")
    back = pretrained.load_llava(tmp_path / "out", dtype)[0]
    expected = with_config(vlm, speaks=True, folder_image_id=back.config.folder_image_id,
                           clip=replace(vlm.config.clip, text_layers=0))
    assert same_model(back, expected)
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.tensor([[1, *[IMAGE_ID] * 9, 5, 6, 7]])
    theirs = ids.masked_fill(ids == IMAGE_ID, hf.config.image_token_index)
    with torch.no_grad():
        wanted = vlm.logits(pixels, ids)
        given = hf(input_ids=theirs, pixel_values=pixels).logits
    assert difference(given[..., :37], wanted) < (1e-5 if dtype == torch.float32 else 0.05)


def test_adapters_are_merged_on_the_way_out(tmp_path):
    vlm = make_vlm(torch.float32, image_positions=False)
    lora.attach(vlm.llm, "q_proj,down_proj", 2, 4.0)
    shake(vlm)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    ids = torch.tensor([[1, *[IMAGE_ID] * 9, 5, 6, 7]])
    export_hf(vlm, None, tmp_path / "out")
    with torch.no_grad():
        back = pretrained.load_llava(tmp_path / "out")[0]
        assert difference(back.logits(pixels, ids), vlm.logits(pixels, ids)) < 1e-5


def test_an_export_states_the_towers_activation_and_can_be_read_by_others(tmp_path):
    hf = llava(act="gelu")
    vlm = pretrained.load_llava(written(hf, tmp_path / "in"))[0]
    export_hf(vlm, None, tmp_path / "out")
    assert pretrained.load_llava(tmp_path / "out")[0].config.clip.act == "gelu"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_an_export_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        export_hf(make_vlm(image_positions=False), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_projector_that_llava_has_not_is_not_exported(tmp_path):
    vlm = make_vlm(image_positions=False)
    odd = with_config(vlm)
    object.__setattr__(odd.config, "projector", "resampler")
    message = "linear and mlp2x_gelu; this model has 'resampler'"
    with pytest.raises(ValueError, match=message) as error:
        export_hf(odd, None, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_picture_of_other_tokens_than_its_patches_is_not_exported(tmp_path):
    class FourTokens(VlmConfig):
        image_tokens = 4

    vlm = make_vlm(image_positions=False)
    odd = with_config(vlm)
    odd.config = FourTokens(**vars(vlm.config))
    with pytest.raises(ValueError, match="each of the 9 patches; this model has 4") as error:
        export_hf(odd, None, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_export_is_whole_or_not_at_all(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_hf(make_vlm(image_positions=False), None, tmp_path / "full")
    with pytest.raises(ValueError, match="LLaVA knows no image_positions"):
        export_hf(make_vlm(), None, tmp_path / "new")
    with pytest.raises(OSError, match="cannot write"):
        export_hf(make_vlm(image_positions=False), None, tmp_path / "full" / "notes.txt" / "under")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# ---------------------------------------------------------------- what does not fit

def without(folder, name):
    (folder / name).unlink()


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder, name, share):
    path = folder / name
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def reshaped(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def drop_tower(folder):
    def change(state):
        for name in list(state):
            if "vision_tower" in name:
                del state[name]
    reshaped(folder, change)


def other_tokenizer(folder):
    proto = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 3), model_writer=proto, vocab_size=270,
        byte_fallback=True, hard_vocab_limit=False, model_type="bpe", minloglevel=2)
    (folder / "tokenizer.model").write_bytes(proto.getvalue())


def tie_without_an_embedding(folder):
    reshaped(folder, lambda state: state.pop("language_model.model.embed_tokens.weight"))
    edited(folder, text_config=dict(TEXT, model_type="llama", tie_word_embeddings=True))


def linear_with_a_missing_bias(folder):
    reshaped(folder, lambda state: state.pop("multi_modal_projector.linear_2.bias"))
    edited(folder, projector_hidden_act="linear")


HEAD = "language_model.lm_head.weight"
NORM = "language_model.model.norm.weight"
BLOCK = "vision_tower.encoder.layers.0"


@pytest.mark.parametrize("spoil, message", [
    (lambda f: without(f, "config.json"), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json' cannot be read as JSON"),
    (lambda f: without(f, "model.safetensors"), "holds no weights"),
    (lambda f: cut(f, "model.safetensors", 0.7), "is truncated or not a safetensors file"),
    (lambda f: cut(f, "model.safetensors", 0.0), "is truncated or not a safetensors file"),
    (lambda f: reshaped(f, lambda s: s.pop(NORM)), r"tensors 1 missing \(llm.norm.weight\)"),
    (lambda f: reshaped(f, lambda s: s.update(odd=s[NORM] * 1)), r"1 unexpected \(odd\)"),
    (lambda f: reshaped(f, lambda s: s.update({f"{BLOCK}.odd.bias": s[NORM] * 1})),
     r"1 unexpected \(vision_tower.encoder.layers.0.odd.bias\)"),
    (lambda f: reshaped(f, lambda s: s.update({HEAD: s[HEAD][:60].clone()})),
     r"of another shape \(language_model.lm_head.weight \(60, 24\), expected \(67, 24\)\)"),
    (drop_tower, "missing.*visual.class_embedding|holds no image tower.*--clip="),
    (other_tokenizer, "its tokenizer has 2.. entries, its embedding 67 rows"),
    (lambda f: edited(f, vision_feature_select_strategy="full"),
     "vision_feature_select_strategy is 'full'"),
    (lambda f: edited(f, vision_feature_layer=[-2, -1]), "vision_feature_layer is "),
    (lambda f: edited(f, vision_feature_layer=-9), "feature layer -9 must lie in"),
    (lambda f: reshaped(f, lambda s: s.pop(f"{BLOCK}.self_attn.q_proj.weight")),
     r"1 missing \(visual.transformer.resblocks.0.attn.in_proj_weight's q\)"),
    (lambda f: reshaped(f, lambda s: s.update({NORM: (9 * s[NORM]).to(torch.int8)})),
     "norm.weight holds torch.int8"),
    (lambda f: reshaped(f, lambda s: s.update({"model." + NORM: s[NORM] * 1})),
     "are two names of one"),
    (lambda f: edited(f, model_type="llava_next"), "model_type is 'llava_next', expected 'llava'"),
    (lambda f: edited(f, quantization_config=dict(bits=4)), "quantization_config"),
    (lambda f: edited(f, multimodal_projector_bias=False), "multimodal_projector_bias is False"),
    (lambda f: edited(f, text_config=dict(TEXT, rope_scaling=dict(rope_type="linear"))),
     "factor of the linear rope"),
    (lambda f: edited(f, text_config=dict(TEXT, num_attention_heads=0)),
     "num_attention_heads is 0, expected a whole"),
    (lambda f: edited(f, vision_config=dict(VISION, patch_size="5")),
     "patch_size is '5', expected a whole number"),
    (lambda f: edited(f, projector_hidden_act="gelu_new"), "projector_hidden_act is 'gelu_new'"),
    (lambda f: edited(f, projector_hidden_act="linear"), "only W followed by an identity"),
    (lambda f: edited(f, vision_config=dict(VISION, model_type="siglip_vision_model")), "SigLIP"),
    (lambda f: edited(f, text_config=dict(TEXT, model_type="gemma")),
     "model_type is 'gemma', expected one of llama"),
    (lambda f: edited(f, text_config=dict(TEXT, rope_scaling=dict(rope_type="yarn"))), "'yarn'"),
    (lambda f: edited(f, text_config=dict(TEXT, model_type="llama", mlp_bias=True)), "mlp_bias"),
    (lambda f: edited(f, text_config=dict(TEXT, model_type="llama", tie_word_embeddings=True)),
     "tie_word_embeddings is True, expected False"),
    (tie_without_an_embedding, r"1 missing \(llm.embed_tokens.weight\)"),
    (linear_with_a_missing_bias, r"missing \(projector.bias, projector.weight\)"),
])
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(spoil, message, tmp_path):
    folder = written(llava(), tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load_llava(folder)
    assert "\n" not in str(error.value)


def test_an_index_beside_a_whole_file_is_passed_over(tmp_path):
    written(llava(), tmp_path)
    index = dict(weight_map={"x": "model-1-of-2.safetensors"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    pretrained.load_llava(tmp_path)


@pytest.mark.parametrize("top, text, tied", [
    (True, False, True), (True, None, True), (False, True, True), (None, True, True),
    (False, False, False)])
def test_either_place_may_tie_the_head(top, text, tied, tmp_path):
    folder = written(llava("smollm2" if tied else "llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = text
    edited(folder, tie_word_embeddings=top, text_config=config["text_config"])
    assert pretrained.load_llava(folder)[0].llm.config.tied == tied


@pytest.mark.parametrize("load, folder, message", [
    (pretrained.load_llm, "llava", "a LLaVA goes by --llava"),
    (pretrained.load_llava, "clip", "expected 'llava'"),
    (pretrained.load_clip, "llava", "model_type is 'llava', expected 'clip'")])
def test_a_folder_of_another_kind_is_named(load, folder, message, tmp_path):
    if folder == "llava":
        written(llava(), tmp_path)
    else:
        CLIPModel(HFClipConfig(vision_config=VISION,
                               text_config=TEXT_TOWER)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_tiles_of_llavas_next_version_are_refused(tmp_path):
    edited(written(llava(), tmp_path, 1), image_aspect_ratio="anyres", mm_patch_merge_type="flat")
    with pytest.raises(ValueError, match="image_aspect_ratio is 'anyres'"):
        pretrained.load_llava(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is read with exact GELU")
def test_an_open_clip_file_of_another_size_is_refused_by_name(open_clip_model, tmp_path):
    name, file, _ = open_clip_model
    state = torch.load(file, weights_only=True)
    torch.save(state | {"visual.positional_embedding": torch.zeros(17, 12)}, tmp_path / "larger.pt")
    message = r"1 of another shape \(visual.positional_embedding \(17, 12\), expected"
    with pytest.raises(ValueError, match=message):
        pretrained.load_clip(f"{name}:{tmp_path / 'larger.pt'}")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}},
               tmp_path / "training.pt")
    again = pretrained.load_clip(f"{name}:{tmp_path / 'training.pt'}").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.items())


def test_a_missing_shard_is_named(tmp_path):
    llava().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.name}, 1 of the"):
        pretrained.load_llava(tmp_path)


@pytest.mark.parametrize("name, message", [
    ("/nowhere", "--llava=/nowhere does not exist"), (__file__, "must be a folder.*it is a file")])
def test_a_path_that_is_no_folder_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        pretrained.load_llava(name)


def test_a_pickle_of_anything_but_tensors_is_not_opened(tmp_path):
    written(llava(), tmp_path, 1)
    torch.save({"model.norm.weight": shutil.rmtree}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a PyTorch file of tensors"):
        pretrained.load_llava(tmp_path)


def test_a_tower_inside_llavas_own_layout_is_openais_when_its_name_says_so(tmp_path):
    vision = CLIPVisionConfig(**VISION | dict(hidden_size=128, num_attention_heads=2,
                                              intermediate_size=40, layer_norm_eps=1e-5))
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=FAMILIES["llama"],
                         image_token_index=IMAGE, image_seq_length=PATCHES,
                         attn_implementation="eager")
    hf = shake(LlavaForConditionalGeneration(config)).eval()
    edited(written(hf, tmp_path, 1), mm_vision_tower="openai/clip-vit-large-patch14-336")
    pixels, ids = inputs()
    with torch.no_grad():
        vlm = pretrained.load_llava(tmp_path)[0]
        given = vlm.logits(pixels, ids.masked_fill(ids == IMAGE, IMAGE_ID))
        assert difference(given, hf(input_ids=ids, pixel_values=pixels).logits) < 1e-5
    edited(tmp_path, mm_vision_tower="google/siglip-so400m")
    with pytest.raises(ValueError, match="mm_vision_tower is 'google/siglip-so400m'"):
        pretrained.load_llava(tmp_path)


def test_llavas_own_layout_without_a_tower_takes_the_one_it_names(tmp_path):
    hf = llava()
    wanted = pretrained.load_llava(written(hf, tmp_path / "whole", 1))[0]
    for folder in ("model", "tower"):
        (tmp_path / folder).mkdir()
    state = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    state = {name: value for name, value in state.items() if "vision_tower" not in name}
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    hf.model.vision_tower.save_pretrained(tmp_path / "tower")
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "model")
    edited(tmp_path / "model", mm_vision_tower=str(tmp_path / "tower"))
    assert same_model(pretrained.load_llava(tmp_path / "model")[0], wanted)
    shutil.copytree(tmp_path / "tower", tmp_path / "model" / "beside")
    edited(tmp_path / "model", mm_vision_tower="beside")
    assert same_model(pretrained.load_llava(tmp_path / "model")[0], wanted)
    edited(tmp_path / "model", mm_vision_tower="nowhere/at-all")
    message = "holds no image tower.*nowhere/at-all.*name one with --clip="
    with pytest.raises(ValueError, match=message):
        pretrained.load_llava(tmp_path / "model")
    named = pretrained.load_llava(tmp_path / "model", clip=str(tmp_path / "tower"))[0]
    assert same_model(named, wanted)
