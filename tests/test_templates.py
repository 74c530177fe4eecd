"""Tokenizers of real models and their conversation templates: ids as LLaVA and Qwen see them, masks by hand.

Two small tokenizers stand in for the real ones, trained with their options: sentencepiece as Vicuna's (a space added
in front, extra spaces kept, bytes for unknown characters, digits split) and byte-level BPE as Qwen's, with ChatML's
tokens.
"""
import io
import json
import sys

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from PIL import Image
from transformers import AutoProcessor

from data import chat
from data.jinja import TURNS, jinja
from data.sample import Sample
from data.tokenizer import BytePairTokenizer, Tokenizer, from_saved, load, train
from llava_folder import byte_level_json
from model.clip import ClipConfig
from model.hub.export import export_hf
from model.llama import LlamaConfig
from model.hub.pretrained import load_llava
from model.vlm import VLM, VlmConfig

tokenizers = pytest.importorskip("tokenizers")

PICTURE = np.zeros((8, 8, 3), np.uint8)
PATCHES = 2
TEXTS = ["A chat. USER: What is this ? ASSISTANT: It is a dog . USER: And this ? ASSISTANT: A cat .",
         "It  What   It"] * 4
LINES = [*TEXTS, *["system user assistant\n\n\nIt is a dog\n\n"] * 4]
HARD = ["", " ", "  two  cats ", "\n\n What\n", "</s><s> <unk>", "<|im_end|>\n<|im_start|>user", "é 漢 😀👩‍👩‍👧",
        "e\u0301", "\u2581a", "1234", "\x00a\r\n\t", "\u00a0\u3000x"]


def sentencepiece_model():
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=buffer, vocab_size=340, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, split_digits=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
        num_threads=1)
    return buffer.getvalue()


PROTO, JSON = sentencepiece_model(), byte_level_json(LINES)
VICUNA = Tokenizer(PROTO)
QWEN = BytePairTokenizer(JSON, bos=None, eos="<|endoftext|>", pad="<|endoftext|>")
OWN = train(["A sea gull, two cats; what is it?", " It is a dog."] * 3, chat.TAGS, 400)
FAST, OWN_FAST = (tokenizers.Tokenizer.from_str(tok.fast_json({"<image>": len(tok)})) for tok in (VICUNA, OWN))
BOTH = pytest.mark.parametrize("tok", [VICUNA, QWEN], ids=["sentencepiece", "byte-level"])
PAIRS = [(VICUNA, "vicuna_v1"), (VICUNA, "llama_2"), (VICUNA, "brief"), (QWEN, "chatml"), (QWEN, "vicuna_v1"),
         (QWEN, "llama_2")]


def by_hand(written):
    """"<s> ▁A #2 It* </s>*" -> (ids, mask): pieces of the sentencepiece model, #n for n image ids, * for a target."""
    ids, mask = [], []
    for word in written.split():
        piece, target = word.removesuffix("*"), word.endswith("*")
        found = [-200] * int(piece[1:]) if piece[0] == "#" else [VICUNA.model.piece_to_id(piece)]
        assert piece[0] == "#" or VICUNA.model.id_to_piece(found[0]) == piece, f"no piece {piece!r}"
        ids += found
        mask += [target] * len(found)
    return ids, mask


def encode(sample, tok, template, target=None, system=None, method="direct"):
    return chat.encode(sample, tok, PATCHES, method, template, target, system)[:2]


# ---------------------------------------------------------------- tokenizers

@BOTH
@pytest.mark.parametrize("text", HARD)
def test_any_text_comes_back_and_nothing_in_it_is_special(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text.replace("\u2581", " " if tok is VICUNA else "\u2581")
    assert not {tok.bos_id, tok.eos_id, tok.pad_id} & set(ids) and all(0 <= i < len(tok) for i in ids)


@BOTH
@pytest.mark.parametrize("text", HARD)
def test_offsets_cover_the_text_in_order(tok, text):
    ids, spans = tok.encode_with_offsets(text)
    assert ids == tok.encode(text) and len(spans) == len(ids)
    covered = [n for start, end in dict.fromkeys(spans) for n in range(start, end)]
    assert covered == list(range(len(text)))                # bytes of one character may share it


def test_offsets_count_characters_and_bytes_begin_where_their_character_begins():
    ids, spans = VICUNA.encode_with_offsets("é It")
    assert ids == by_hand("▁ <0xC3> <0xA9> ▁It")[0] and spans == [(0, 0), (0, 0), (0, 1), (1, 4)]
    ids, spans = QWEN.encode_with_offsets("é dog")
    assert spans[:2] == [(0, 1), (0, 1)] and spans[-1][1] == 5 and len(ids) == len(spans)


def test_white_space_that_a_model_drops_moves_no_offset():
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=buffer, vocab_size=50, model_type="bpe",
                                   normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2)
    text = " \u3000 a ½ dog "
    ids, spans = Tokenizer(buffer.getvalue()).encode_with_offsets(text)
    assert [text[start:end] for start, end in spans if end > start][0] == "a" and spans[-1][1] == len(text) - 1


@BOTH
def test_special_ids_and_ids_without_a_token_give_no_text(tok):
    around = [*([tok.bos_id] if tok.bos_id is not None else []), tok.pad_id, -200, len(tok), 10 ** 6, tok.eos_id]
    assert tok.decode([*around, *tok.encode("dog"), *around]) == "dog" and tok.decode([]) == ""


@BOTH
def test_a_name_without_a_token_is_said(tok):
    with pytest.raises(ValueError, match="no token '<nobody>'"):
        tok.special("<nobody>")


def test_never_sampled_are_padding_bos_and_rows_without_a_token():
    assert VICUNA.banned(len(VICUNA)) == (0, 1) and VICUNA.banned(342) == (0, 1, 340, 341)
    assert QWEN.banned(len(QWEN)) == (0,) and QWEN.banned(len(QWEN) + 2) == (0, len(QWEN), len(QWEN) + 1)
    ends = BytePairTokenizer(JSON, None, "<|endoftext|>", "<|im_end|>")
    assert ends.pad_id == ends.eos_id == 2 and ends.banned(len(ends)) == ()
    assert Tokenizer(PROTO, {"<pad>": 340}, dict(pad="<pad>")).banned(340) == (0, 1)    # the head has no row 340


def test_added_tokens_count_and_have_ids_and_no_text():
    tok = Tokenizer(PROTO, {"<pad>": 341, "</s>": 2}, dict(pad="<pad>"))
    assert len(tok) == 342 and tok.pad_id == tok.special("<pad>") == 341 and tok.special("</s>") == 2
    assert tok.encode("<pad>") == VICUNA.encode("<pad>") and tok.decode([341, *tok.encode("dog"), 340]) == "dog"
    dog, = by_hand("▁dog")[0]
    taken = Tokenizer(PROTO, {"<|im_start|>": dog})         # a spare piece that a folder gives another name
    assert taken.decode([dog]) == "" != VICUNA.decode([dog]) and QWEN.decode([QWEN.special("<|im_start|>")]) == ""


@pytest.mark.parametrize("tok", [
    VICUNA, QWEN, Tokenizer(PROTO, {"<pad>": 340}), Tokenizer(PROTO, names=dict(bos=None, pad="</s>")),
    BytePairTokenizer(JSON, "<|im_start|>", "<|endoftext|>", None)], ids=range(5))
def test_a_tokenizer_travels_as_plain_data(tok):
    again = from_saved(tok.saved)
    assert type(again) is type(tok) and len(again) == len(tok) and again.saved == tok.saved
    assert (again.bos_id, again.eos_id, again.pad_id) == (tok.bos_id, tok.eos_id, tok.pad_id)
    assert again.encode(" two 😀") == tok.encode(" two 😀") and again.banned(400) == tok.banned(400)


def test_a_model_without_additions_travels_as_its_bytes():
    assert VICUNA.saved == PROTO == Tokenizer(PROTO, {"<s>": 1}, dict(bos="<s>", eos="</s>", pad="<unk>")).saved
    for other in (None, {"json": JSON}, "text"):
        with pytest.raises(ValueError, match="a saved tokenizer must be"):
            from_saved(other)


# ---------------------------------------------------------------- a model's folder

def folder(path, **files):
    """Writes files, "tokenizer_model" as tokenizer.model and all others as .json; -> the folder."""
    for name, content in files.items():
        target = path / ("tokenizer.model" if name == "tokenizer_model" else f"{name}.json")
        target.write_bytes(content) if isinstance(content, bytes) else target.write_text(
            content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert load(tmp_path) is None and load(tmp_path / "nowhere") is None


def test_sentencepiece_comes_before_tokenizer_json(tmp_path):
    tok = load(folder(tmp_path, tokenizer_model=PROTO, tokenizer=JSON))
    assert isinstance(tok, Tokenizer) and tok.saved == PROTO and (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 0)


@pytest.mark.parametrize("files, ids, size", [
    (dict(tokenizer_config=dict(bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None)), (1, 2, 0), 340),
    (dict(tokenizer_config=dict(add_bos_token=False, bos_token="<s>")), (None, 2, 0), 340),
    (dict(tokenizer_config=dict(bos_token=None)), (None, 2, 0), 340),
    (dict(special_tokens_map=dict(pad_token={"content": "</s>"})), (1, 2, 2), 340),
    (dict(special_tokens_map=dict(pad_token="</s>"), tokenizer_config=dict(pad_token=None)), (1, 2, 0), 340),
    (dict(added_tokens={"<image>": 340, "<pad>": 341}, tokenizer_config=dict(pad_token="<pad>")), (1, 2, 341), 342),
    (dict(tokenizer_config=dict(unk_token="<unk>", pad_token="<pad>", added_tokens_decoder={
        "0": {"content": "<unk>"}, "343": {"content": "<pad>"}})), (1, 2, 343), 344),
    (dict(added_tokens={"<|im_end|>": 340}, special_tokens_map=dict(eos_token="<|im_end|>")), (1, 340, 0), 341)])
def test_a_sentencepiece_folder_names_its_tokens(tmp_path, files, ids, size):
    tok = load(folder(tmp_path, tokenizer_model=PROTO, **files))
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == ids and len(tok) == size
    assert from_saved(tok.saved).pad_id == tok.pad_id


def bpe(**fields):
    return json.dumps(json.loads(JSON) | fields)


FRAME = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                                                  {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}
NO_CHATML = JSON.replace("<|im_end|>", "<|end|>")


@pytest.mark.parametrize("source, config, ids", [
    (JSON, dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"), (None, 2, 0)),          # Qwen chat
    (JSON, dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>"), (None, 2, 0)),                       # Qwen base
    (JSON, dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"), (None, 2, 0)),  # SmolLM2
    (JSON, dict(bos_token="<|im_start|>", eos_token="<|im_end|>", add_bos_token=True), (1, 2, 2)),
    (bpe(post_processor=FRAME), dict(bos_token="<|im_start|>", eos_token="<|im_end|>"), (1, 2, 2)),         # Llama 3
    (bpe(post_processor=FRAME), dict(bos_token="<|im_start|>", add_bos_token=False), (None, 2, 2)),
    (NO_CHATML, dict(eos_token={"content": "<|endoftext|>"}), (None, 0, 0))])
def test_a_byte_level_folder_names_its_tokens(tmp_path, source, config, ids):
    tok = load(folder(tmp_path, tokenizer=source, tokenizer_config=config))
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == ids and len(tok) == len(QWEN)
    assert tok.encode("It is a dog") == QWEN.encode("It is a dog")


def test_a_file_that_cuts_pads_and_frames_texts_does_not_do_so_here(tmp_path):
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<|endoftext|>"}
    trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tok = BytePairTokenizer(bpe(truncation=cut, padding=pad, post_processor=trim), None, "<|im_end|>", None)
    assert tok.encode_with_offsets("It is a dog ") == QWEN.encode_with_offsets("It is a dog ")
    assert tok.encode("It is a dog ") == QWEN.encode("It is a dog ")


def test_a_models_own_text_tokens_are_text_again(tmp_path):
    fields = json.loads(JSON)
    fields["added_tokens"].append(fields["added_tokens"][0] | dict(id=300, content="<think>", special=False))
    tok = BytePairTokenizer(json.dumps(fields), None, "<|im_end|>", None)
    assert tok.decode(tok.encode("a<think>b")) == "a<think>b" and tok.special("<think>") in tok.encode("a<think>b")


LLAMA = json.dumps({
    "version": "1.0", "post_processor": None, "pre_tokenizer": None, "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
              "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)},
                        "▁": 259, "I": 260, "t": 261, "It": 262, "▁It": 263},
              "merges": ["I t", "▁ It"]}})


def test_a_llama_2_type_tokenizer_json_works(tmp_path):
    tok = load(folder(tmp_path, tokenizer=LLAMA, tokenizer_config=dict(bos_token="<s>", eos_token="</s>",
                                                                       unk_token="<unk>", add_bos_token=True)))
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 0) and len(tok) == 264
    ids, mask = encode(Sample(question="It"), tok, "vicuna_v1", "It é", "It")
    assert ids[:2] == [1, 263] and [i for i, m in zip(ids, mask) if m] == [263, 259, 3 + 0xC3, 3 + 0xA9, 2]
    assert tok.decode([1, 263, 2, 0]) == "It"               # its file marks none of them as special


@pytest.mark.parametrize("files, said", [
    (dict(tokenizer_model=b""), "no sentencepiece model"),
    (dict(tokenizer_model=PROTO[:1000]), "no sentencepiece model"),
    (dict(tokenizer_model=b"not a model"), "no sentencepiece model"),
    (dict(tokenizer="{"), "is no JSON"),
    (dict(tokenizer="[]"), "must hold a JSON object, not list"),
    (dict(tokenizer="{}", tokenizer_config=dict(eos_token="a")), "no tokenizer.json can be read"),
    (dict(tokenizer=bpe(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})), "must be 'BPE'"),
    (dict(tokenizer=NO_CHATML), "no eos_token is named"),
    (dict(tokenizer=NO_CHATML, tokenizer_config=dict(eos_token="</s>")), "no token '</s>'"),
    (dict(tokenizer=JSON, tokenizer_config="{,"), "tokenizer_config.json' is no JSON"),
    (dict(tokenizer=JSON, tokenizer_config=dict(eos_token=[2])), r"eos_token must be a string or .* not \[2\]"),
    (dict(tokenizer_model=PROTO, tokenizer_config=dict(pad_token="<pad>")), "no token '<pad>'"),
    (dict(tokenizer_model=PROTO, added_tokens={"<pad>": "340"}), "'<pad>' must have a number from 0 on for its id"),
    (dict(tokenizer_model=PROTO, tokenizer_config=dict(added_tokens_decoder={"x": {}})), "must map ids to objects")])
def test_a_damaged_folder_is_said_in_one_sentence(tmp_path, files, said):
    with pytest.raises(ValueError, match=said) as error:
        load(folder(tmp_path, **files))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_without_the_package_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[hf\]"'):
        BytePairTokenizer(JSON, None, "<|im_end|>", None)


# ---------------------------------------------------------------- vicuna_v1 and llama_2, piece by piece

def test_vicuna_two_turns_with_the_picture_in_the_first():
    sample = Sample(images=(PICTURE,), turns=(("<image>\nWhat is this?", "It is a dog."),), question="And this?")
    wanted = by_hand("<s> ▁A ▁chat . ▁USER : ▁ #2 ▁ <0x0A> What ▁is ▁this ? ▁ASSISTANT : ▁It* ▁is* ▁a* ▁dog* .* </s>* "
                     "▁USER : ▁And ▁this ? ▁ASSISTANT : ▁A* ▁cat* .* </s>*")
    assert encode(sample, VICUNA, "vicuna_v1", "A cat.", "A chat.") == wanted


def test_vicuna_with_the_picture_in_the_second_turn():
    sample = Sample(images=(PICTURE,), turns=(("What is this?", "It is a dog."),), question="<image>\nAnd this?")
    wanted = by_hand("<s> ▁A ▁chat . ▁USER : ▁What ▁is ▁this ? ▁ASSISTANT : ▁It* ▁is* ▁a* ▁dog* .* </s>* "
                     "▁USER : ▁ #2 ▁ <0x0A> A nd ▁this ? ▁ASSISTANT : ▁A* ▁cat* .* </s>*")
    assert encode(sample, VICUNA, "vicuna_v1", "A cat.", "A chat.") == wanted


def test_vicuna_with_bytes_of_an_emoji_double_spaces_and_no_system_text():
    # In front of USER stand the space that is always added and the one after the empty system text; of three spaces
    # the first two merge.
    sample = Sample(question="  What 😀")
    wanted = by_hand("<s> ▁▁ US ER : ▁▁ ▁What ▁ <0xF0> <0x9F> <0x98> <0x80> ▁ASSISTANT : "
                     "▁▁* ▁It* ▁* <0xF0>* <0x9F>* <0x98>* <0x80>* </s>*")
    assert encode(sample, VICUNA, "vicuna_v1", "  It 😀", "") == wanted


def test_vicuna_spells_special_tokens_out_and_two_pictures_stand_in_front_of_the_first_question():
    sample = Sample(images=(PICTURE, PICTURE), question="</s>")
    wanted = by_hand("<s> ▁▁ US ER : ▁ #2 ▁ <0x0A> #2 ▁ <0x0A> <0x3C> <0x2F> s <0x3E> ▁ASSISTANT : ▁* <0x3C>* s* "
                     "<0x3E>* </s>*")
    assert encode(sample, VICUNA, "vicuna_v1", "<s>", "") == wanted


def test_llama_2_opens_every_turn_with_bos_and_the_first_with_the_system_text():
    sample = Sample(images=(PICTURE,), turns=(("What?", "It"),), question="And ?")
    inst, end = "▁ <0x5B> I N ST <0x5D>", "▁ <0x5B> <0x2F> I N ST <0x5D>"
    asked = f"#2 ▁ <0x0A> What ? {end} ▁It* ▁* </s>* <s> {inst} ▁And ▁? {end} ▁A* ▁* </s>*"
    assert encode(sample, VICUNA, "llama_2", "A", "") == by_hand(f"<s> {inst} ▁ {asked}")
    system = ("▁ <0x3C> <0x3C> S <0x59> S <0x3E> <0x3E> <0x0A> A <0x0A> "
              "<0x3C> <0x3C> <0x2F> S <0x59> S <0x3E> <0x3E> <0x0A> <0x0A>")
    assert encode(sample, VICUNA, "llama_2", "A", "A") == by_hand(f"<s> {inst} {system} {asked}")


def test_the_system_texts_are_those_of_the_models():
    opening = {name: VICUNA.decode(encode(Sample(question="What"), VICUNA, name)[0])
               for name in ("vicuna_v1", "llama_2")}
    assert opening["vicuna_v1"] == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What ASSISTANT:")
    assert opening["llama_2"] == (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>"
        "\n\nWhat [/INST]")


# ---------------------------------------------------------------- chatml

def chatml(text):
    """The ids of a whole ChatML text by the tokenizers package, which knows the special tokens in it."""
    return tokenizers.Tokenizer.from_str(JSON).encode(text).ids


def test_chatml_is_the_text_with_its_special_tokens_and_teaches_answers_and_their_ends():
    sample = Sample(turns=(("What is this?", "It is a dog."),), question="And?")
    ids, mask = encode(sample, QWEN, "chatml", "A cat.")
    assert ids == chatml("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                         "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\nIt is a dog.<|im_end|>\n"
                         "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n")
    taught = [i for i, m in zip(ids, mask) if m]
    assert taught == chatml("It is a dog.<|im_end|>") + chatml("A cat.<|im_end|>")
    prompt, _ = encode(sample, QWEN, "chatml")
    assert prompt == ids[:len(prompt)] and not any(encode(sample, QWEN, "chatml")[1])
    assert prompt[-len(chatml("assistant\n")):] == chatml("assistant\n")


def test_chatml_without_a_system_text_begins_with_the_user_and_the_picture():
    ids, _ = encode(Sample(images=(PICTURE,), question="What"), QWEN, "chatml", system="")
    assert ids == [*chatml("<|im_start|>user\n"), -200, -200,
                   *chatml("\nWhat<|im_end|>\n<|im_start|>assistant\n")]


def test_a_token_over_the_border_of_prompt_and_answer_is_cut_there():
    line, lines = chatml("\n"), chatml("\n\n")
    assert len(lines) == 1 and lines != line * 2            # the tokenizer would join the prompt's end to the answer
    ids, mask = encode(Sample(question="a"), QWEN, "chatml", "\n\nIt", "")
    prompt, _ = encode(Sample(question="a"), QWEN, "chatml", system="")
    assert ids[:len(prompt)] == prompt and mask == [n >= len(prompt) for n in range(len(ids) - 1)] + [False]
    assert ids[len(prompt):] == [*chatml("\n\nIt"), QWEN.eos_id, *line]


def test_chatml_asks_for_its_tokens_by_name():
    with pytest.raises(ValueError, match="no token '<|im_start|>'".replace("|", r"\|")):
        encode(Sample(question="a"), VICUNA, "chatml")


def test_the_template_follows_from_the_tokenizer():
    assert (chat.template_for(QWEN), chat.template_for(VICUNA)) == ("chatml", "vicuna_v1")


# ---------------------------------------------------------------- plain, the suffix, the text, and what is refused

def test_plain_is_the_caption_and_a_new_line_without_eos():
    sample = Sample(images=(PICTURE,), question="What", caption="a dog")
    assert chat.encode_plain(sample, VICUNA, PATCHES, "vicuna_v1")[:2] == by_hand("<s> #2 ▁a* ▁dog* <0x0A>*")
    caption = chatml("a dog\n")
    assert chat.encode_plain(sample, QWEN, PATCHES, "chatml")[:2] == (
        [-200, -200, *caption], [False] * 2 + [True] * len(caption))
    assert chat.encode_plain(sample, VICUNA, PATCHES)[:2] == by_hand("<s> #2 ▁▁* a* ▁dog* </s>*")


def test_brief_puts_a_space_before_every_question_and_earlier_answer():
    sample = Sample(turns=(("What", "It"),), question="And")
    tok = train(TEXTS, chat.TAGS, 330)                      # adds no spaces by itself
    ids, mask = encode(sample, tok, "brief", "<answer> dog</answer>")
    assert ids == [tok.bos_id, *tok.encode(" What"), *tok.encode(" It"), tok.eos_id, *tok.encode(" And"),
                   *tok.encode("<answer> dog</answer>"), tok.eos_id]
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == " It<answer> dog</answer>"


def test_the_method_is_appended_to_the_last_question_only():
    sample = Sample(turns=(("What", "It"),), question="And")
    assert VICUNA.decode(encode(sample, VICUNA, "vicuna_v1", system="", method="think")[0]).endswith(
        "And think . ASSISTANT:")
    assert VICUNA.decode(encode(sample, VICUNA, "vicuna_v1", system="", method="think")[0]).count("think") == 1


def test_the_tags_are_asked_for_in_english_by_a_system_text_and_by_an_example():
    sample = Sample(images=(PICTURE,), question="And", turns=())
    english = " Output the thinking process in <think> </think> and only the final answer in <answer> </answer> tags."
    example, reply = chat.PROMPTS["asked_example"].example

    def prompt(method):
        ids, mask = encode(sample, QWEN, "chatml", method=method)
        assert not any(mask)
        return QWEN.decode([QWEN.encode("?")[0] if i == QWEN.image_id else i for i in ids]), ids

    plain, _ = prompt("asked")
    turn = f"user\n??\nAnd{english}\nassistant\n"
    assert plain == f"system\nYou are a helpful assistant.\n{turn}"
    opened, _ = prompt("asked_system")
    assert opened == f"system\n{chat.PROMPTS['asked_system'].system}\n{turn}"
    shown, ids = prompt("asked_example")
    assert shown == f"system\nYou are a helpful assistant.\nuser\n{example}\nassistant\n{reply}\n{turn}"
    assert example.endswith(english) and chat.parse(reply).well_formed
    taught, mask = encode(sample, QWEN, "chatml", "yes", method="asked_example")
    assert taught[:len(ids)] == ids                                     # asked as taught, and the example is not taught
    assert QWEN.decode([i for i, m in zip(taught, mask) if m]) == "yes"
    text = chat.prompt_text(sample, "asked_example", "chatml")
    assert text.index(reply) < text.index("<image>\nAnd Output") and text.startswith("<|im_start|>system\nYou are")


@pytest.mark.parametrize("template, first, later", [
    ("brief", "<image> What", " What"),
    ("vicuna_v1", chat.SYSTEM["vicuna_v1"] + " USER: <image>\nWhat ASSISTANT:", "USER: What ASSISTANT:"),
    ("llama_2", f"[INST] <<SYS>>\n{chat.SYSTEM['llama_2']}\n<</SYS>>\n\n<image>\nWhat [/INST]", "[INST] What [/INST]"),
    ("chatml", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat<|im_end|>\n"
               "<|im_start|>assistant\n", "<|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\n")])
def test_the_prompt_as_text_is_what_the_last_turn_says(template, first, later):
    sample = Sample(images=(PICTURE,), question="What")
    assert chat.prompt_text(sample, "direct", template) == first
    sample = Sample(images=(PICTURE,), turns=(("And", "It"),), question="What")
    assert chat.prompt_text(sample, "direct", template) == later


@pytest.mark.parametrize("sample, options, said", [
    (dict(question="a<image>b<image>"), {}, "hold 2 <image> and must hold none or 1"),
    (dict(question="a", turns=(("b", "<image>"),)), {}, "an answer must not hold <image>"),
    (dict(question="a"), dict(target="the <image>"), "an answer must not hold <image>"),
    (dict(question="a"), dict(system="<image>"), "system must not hold <image>"),
    (dict(question="a"), dict(template="plain"), "template='plain' must be one of brief, vicuna_v1, llama_2, chatml"),
    (dict(question="a"), dict(method="loud"), "method='loud' must be one of direct, think, asked")])
def test_what_cannot_be_told_is_said(sample, options, said):
    with pytest.raises(ValueError, match=said):
        encode(Sample(images=(PICTURE,), **sample), VICUNA, **dict(template="vicuna_v1") | options)


def test_a_caption_with_a_placeholder_is_refused():
    with pytest.raises(ValueError, match="a caption must not hold <image>"):
        chat.encode_plain(Sample(caption="an <image>"), VICUNA, PATCHES)


# ---------------------------------------------------------------- properties

SPEECH = st.lists(st.sampled_from(["What", "dog", " ", "  ", "\n", "\n\n", ".", "é", "😀", "</s>", "<|im_end|>", "\t",
                                   "1", "漢", "<s>", "ASSISTANT:", "\r\n", "'s"]), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PAIRS), st.lists(st.tuples(SPEECH, SPEECH), max_size=2), SPEECH, SPEECH,
       st.sampled_from([None, "", "A chat."]), st.integers(0, 2), st.data())
def test_any_conversation(pair, turns, question, target, system, images, data):
    """The prompt is where training begins, what is taught is the answers, every picture is there, text is text."""
    tok, template = pair
    if images and data.draw(st.booleans()):                 # the pictures' places are marked, in any turn
        at = data.draw(st.integers(0, len(turns)))
        marks = "<image>\n" * images
        question = marks + question if at == len(turns) else question
        turns = [(marks + q if n == at else q, a) for n, (q, a) in enumerate(turns)]
    sample = Sample(images=(PICTURE,) * images, turns=tuple(turns), question=question)
    ids, mask = encode(sample, tok, template, target, system)
    prompt, nothing = encode(sample, tok, template, None, system)
    assert ids[:len(prompt)] == prompt and not any(nothing) and len(ids) == len(mask)
    assert ids.count(tok.image_id) == PATCHES * images
    assert ids.count(tok.eos_id) - (template == "chatml") * (len(turns) + 1 + (system != "")) == len(turns) + 1
    assert ids.count(tok.bos_id) == (0 if tok is QWEN else len(turns) + 1 if template == "llama_2" else 1)

    taught, answer = [], []                                 # the runs of targets, each closed by its EOS
    for i, m in zip(ids, mask):
        if m and i == tok.eos_id:
            taught.append(tok.decode(answer))
            answer = []
        elif m:
            answer.append(i)
    # Sentencepiece decodes the space in front of a text away; in brief it is the one it added itself.
    around = {"llama_2": " {} ", "vicuna_v1": " {}", "chatml": "{}", "brief": " {}"}[template]
    answers = [around.format(text) for text in [*(a for _, a in turns), target]]
    if template == "brief":
        answers[-1] = target
        assert taught == answers and not answer
    else:
        assert taught == [text[1:] if tok is VICUNA else text for text in answers] and not answer


# ---------------------------------------------------------------- for servers

def spoken(parts, bos, eos):
    """What a template's parts say, special tokens spelt."""
    return "".join({"bos": bos, "eos": eos}.get(part.token, part.token) if isinstance(part, chat.Put)
                   else part.asked + part.taught for part in parts)


@pytest.mark.parametrize("system", [None, "", "Be short.\nAnd 'kind'."])
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_servers_get_the_same_conversation(name, answered, system):
    turns = [("<image>\nWhat is this?", "It's a \"dog\"."), (" Why? ", "So."),
             ("<image>\n<image>\nAnd {{ these }}?", None)]
    turns = turns[:2] if answered else turns
    parts = [chat.Put("bos")]
    for n, turn in enumerate(turns):
        parts += chat.TEMPLATES[name](None if n else chat.SYSTEM[name] if system is None else system, *turn)
    messages = [] if system is None else [dict(role="system", content=system)]
    for question, answer in turns:
        pictures, text = question.count("<image>"), question.replace("<image>\n", "")
        messages.append(dict(role="user", content=[*[dict(type="image")] * pictures, dict(type="text", text=text)]))
        if answer is not None:
            messages.append(dict(role="assistant", content=answer))
    eos = "<|im_end|>" if name == "chatml" else "</s>"
    text = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(jinja(name)).render(
        messages=messages, add_generation_prompt=not answered, bos_token="<s>", eos_token=eos)
    assert text == spoken(parts, "<s>", eos)


def exported(tok, rows, folder):
    """A tiny model with this tokenizer and an embedding of `rows` rows, written for transformers; -> its VLM."""
    vlm = VLM(VlmConfig(ClipConfig(image_size=15, patch=5, width=12, layers=2, heads=3, embed=7),
                        LlamaConfig(vocab=rows, width=24, layers=1, heads=2, kv_heads=2, ff=28)))
    export_hf(vlm, tok, folder, jinja(chat.template_for(tok)))
    return vlm


@pytest.mark.parametrize("spare", [False, True], ids=["every row a token", "rows to spare"])
@pytest.mark.parametrize("kind", ["vicuna", "qwen"])
def test_an_exported_processor_gives_the_ids_of_training(kind, spare, tmp_path):
    tok = VICUNA if kind == "vicuna" else QWEN
    vlm = exported(tok, -(-(len(tok) + 1) // 64) * 64 if spare else len(tok), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"] == len(tok)
    for question in ("What is this?", "  two  spaces 漢😀\n", " Why? "):
        messages = [dict(role="user", content=[dict(type="image", image=Image.fromarray(PICTURE)),
                                               dict(type="text", text=question)])]
        given = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids, _, _ = chat.encode(Sample(images=(PICTURE,), question=question), tok, 9, "direct", chat.template_for(tok))
        assert np.ravel(given["input_ids"]).tolist() == [len(tok) if i == tok.image_id else i for i in ids]
    back, tok_back = load_llava(tmp_path / "out")
    assert back.config.llm.vocab == vlm.config.llm.vocab
    export_hf(back, tok_back, tmp_path / "again", jinja(chat.template_for(tok)))
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["What", "dog", " ", "  ", "\n", ".", "é", "漢", "😀", "1", "23", "chat", "USER", ":"])))
def test_a_fast_tokenizer_written_from_sentencepiece_gives_its_ids(words):
    text = "".join(words)
    assert FAST.encode(text, add_special_tokens=False).ids == VICUNA.encode(text)
    assert OWN_FAST.encode(text, add_special_tokens=False).ids == OWN.encode(text)


def test_a_fast_tokenizer_keeps_the_pieces_that_were_given_whole():
    assert OWN_FAST.encode("a<think>b").ids == [1, *OWN.encode("a<think>b")]
    assert OWN.special("<think>") in OWN.encode("a<think>b") and FAST.encode("<image>").ids[-1] == len(VICUNA)


def test_no_server_knows_brief():
    assert jinja("brief") == ""
