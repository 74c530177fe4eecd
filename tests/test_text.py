"""Tokenizer and prompts: text comes back as it went in, and the target mask holds exactly the target."""
import io
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
import train as train_script
from data import chat, images, scenes, supply, teachers
from data.sample import Sample
from data.tokenizer import from_saved, train
from model.runs import checkpoint
from model.runs.config import change

PICTURE = np.zeros((8, 8, 3), np.uint8)
PATCHES = 5


def scene_tokenizer():
    texts = [f" {s.question} {s.reasoning} {s.caption}" for s in scenes.load("train", 100, 0, teachers.SceneTeacher())]
    return train(texts, [*chat.TAGS, *scenes.pieces()], 512)


TOKENIZERS = {"scenes": scene_tokenizer(),
              "prose": train(["A sea gull, two cats; what is shown in the picture?", " It is a dog."] * 3, chat.TAGS,
                             400)}


@pytest.fixture(params=TOKENIZERS)
def tok(request):
    return TOKENIZERS[request.param]


# ---------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("text", [
    "", " ", "  ", " two", "two ", "  two  cats  ", "a\nb", "\n", "\r\n\t", "</s>", "<s>", "<unk>", "<0x41>", "<image>",
    "<pad>", "é", "e\u0301", "漢字 かな", "😀 👩‍👩‍👧", "ﬁ Å ½", "\u00a0\u3000\u200b\ufeff", "\x00a\x00", "a<think>b</think >",
    "<think></think><answer> two</answer>", "</s></s> two </s>", "<<think>>", "1234567890", "ａｂ", "ß ẞ İ ı"])
def test_any_text_comes_back(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text and not {tok.bos_id, tok.eos_id, tok.image_id} & set(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40))
def test_random_unicode_comes_back(text):
    for tok in TOKENIZERS.values():
        assert tok.decode(tok.encode(text)) == text


def test_tags_are_single_pieces_wherever_they_stand(tok):
    assert len({tuple(tok.encode(tag)) for tag in chat.TAGS}) == 4
    for tag in chat.TAGS:
        piece, = tok.encode(tag)
        for around in ("x{}y", " {} ", "{}{}", "<{}>", "\n{}"):
            text = around.replace("{}", tag)
            assert tok.encode(text).count(piece) == text.count(tag)


def test_every_word_of_the_scenes_is_one_piece():
    tok = TOKENIZERS["scenes"]
    words = [piece.replace("▁", " ") for piece in scenes.pieces()]
    assert len(words) > 50 and all(len(tok.encode(word)) == 1 for word in words)
    sample = scenes.load("walk4", 1, 0)[0]
    assert len(tok.encode(" " + sample.question)) == len(sample.question.split())


def test_special_ids_give_no_text(tok):
    ids = tok.encode("two")
    assert tok.decode([tok.bos_id, *ids, tok.eos_id, tok.pad_id, tok.pad_id]) == "two"
    assert tok.decode([]) == "" and tok.decode([tok.eos_id]) == ""
    assert tok.banned(len(tok)) == (tok.pad_id, tok.bos_id) == (0, 1) and tok.eos_id == 2
    assert not 0 <= tok.image_id < len(tok)


def test_the_model_travels_as_bytes(tok):
    assert tok.saved == tok.proto
    again = from_saved(tok.saved)
    assert len(again) == len(tok) <= 512 and again.encode(" two cats </s>") == tok.encode(" two cats </s>")


DAMAGED = [b"", b"no model", bytes(100), TOKENIZERS["prose"].proto[:-1], dict(proto=b"no model", added={}, names={}),
           dict(proto=TOKENIZERS["prose"].proto, added=["<x>"], names={}),
           dict(proto=TOKENIZERS["prose"].proto, added={"<x>": "y"}, names={}), dict(proto=5, added={}, names={}),
           dict(json="{", bos=None, eos="</s>", pad=None)]


@pytest.mark.parametrize("saved", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_tokenizer_is_one_sentence_that_names_where_it_lies(saved):
    with pytest.raises(ValueError, match="^the tokenizer 'out/tokenizer.model' cannot be used: [^\n]+$"):
        from_saved(saved, "the tokenizer 'out/tokenizer.model'")


def test_bytes_that_are_no_model_are_called_so_and_not_by_lines_of_another_source():
    with pytest.raises(ValueError, match=r"no sentencepiece model can be read from its 8 bytes; expected the tokenizer"
                                         r"\.model that sentencepiece wrote, whole$"):
        from_saved(b"no model")


def test_a_run_and_an_evaluation_name_the_file_whose_tokenizer_is_damaged(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    run = SimpleNamespace(cfg=train_script.Config(), folder=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"^the tokenizer '.*tokenizer\.model' cannot be used: "):
        train_script.Run.prepare_tokenizer(run)
    monkeypatch.setattr(checkpoint, "load", lambda *_: dict(tokenizer=b"no model", vlm={}, vlm_config={}))
    run.cfg = change(run.cfg, init="a.pt")
    with pytest.raises(ValueError, match=r"^the tokenizer in checkpoint 'a\.pt' cannot be used: "):
        train_script.Run.prepare_tokenizer(run)
    monkeypatch.setattr(evaluation.VLM, "from_config", lambda *_: torch.nn.Identity())
    with pytest.raises(ValueError, match=r"^the tokenizer in checkpoint 'a\.pt' cannot be used: "):
        evaluation.load_vlm("a.pt")


def test_training_is_reproducible_and_a_vocabulary_too_small_is_said():
    texts = [" two cats", " a dog"]
    assert train(texts, chat.TAGS, 300).proto == train(texts, chat.TAGS, 300).proto
    with pytest.raises(ValueError, match="--vocab=100 is too small"):
        train(texts, chat.TAGS, 100)


def test_a_tokenizer_that_turns_a_word_into_another_is_noted_with_the_shortest_text():
    tok = TOKENIZERS["prose"]

    def square(text):
        return tok.encode(text.replace("cats", "dog"))

    broken = SimpleNamespace(encode=square, decode=tok.decode)
    texts = [" two cats and a dog", " a dog", " two  cats"]
    assert chat.not_given_back(texts, tok) == []
    assert chat.not_given_back(texts, broken) == [
        "2 of 3 texts do not come back from the tokenizer as they are: 'two  cats' comes back as 'two  dog'; most "
        "often 'cats' as 'dog', 2 times"]
    dropping = SimpleNamespace(encode=lambda text: tok.encode(text.replace(" two", "")), decode=tok.decode)
    assert chat.not_given_back(texts, dropping)[0].endswith("'two  cats' comes back as 'cats'")


def test_a_vocabulary_larger_than_the_text_can_fill_is_cut():
    tok = train([" two"], chat.TAGS, 100_000)
    assert len(tok) < 300 and tok.decode(tok.encode(" two cats")) == " two cats"


# ---------------------------------------------------------------- prompts and targets

def written(tok, ids):
    """Text with the special ids written out, a picture's as #."""
    special = {tok.bos_id: "[BOS]", tok.eos_id: "[EOS]", tok.image_id: "#"}
    runs = itertools.groupby(ids, key=special.get)
    return "".join(sign * len(list(run)) if sign else tok.decode(list(run)) for sign, run in runs)


def target_of(tok, ids, mask):
    return written(tok, [i for i, m in zip(ids, mask) if m])


def prompt_of(tok, ids, mask):
    return written(tok, [i for i, m in zip(ids, mask) if not m])


QUESTION = "what is at b2 ?"
TARGET = chat.target_text("red circle", "b2 red circle")


@pytest.mark.parametrize("template, taught", [("brief", TARGET), ("vicuna_v1", f" {TARGET}"),
                                              ("llama_2", f" {TARGET} ")])
@pytest.mark.parametrize("method", chat.PROMPTS)
def test_the_mask_holds_the_target_and_its_eos_and_nothing_else(tok, template, taught, method):
    sample = Sample(images=(PICTURE,), question=QUESTION)
    ids, mask, images = chat.encode(sample, tok, PATCHES, method, template, TARGET)
    assert target_of(tok, ids, mask) == taught + "[EOS]" and mask == sorted(mask) and len(ids) == len(mask)
    turns = 1 + bool(chat.PROMPTS[method].example)
    assert ids[0] == tok.bos_id and ids.count(tok.eos_id) == turns and images == sample.images
    prompt, nothing, _ = chat.encode(sample, tok, PATCHES, method, template)
    assert ids[:mask.index(True)] == prompt and not any(nothing)        # asked exactly as taught


@pytest.mark.parametrize("images", [0, 1, 3])
def test_every_picture_becomes_its_patches_in_front_of_the_question(tok, images):
    sample, think = Sample(images=(PICTURE,) * images, question=QUESTION), chat.PROMPTS["think"].brief
    picture = "#" * PATCHES
    for template, wanted in (("brief", f"[BOS]{picture * images} {QUESTION}{think}"),
                             ("vicuna_v1", f"[BOS]{chat.SYSTEM['vicuna_v1']} USER: {f'{picture}{chr(10)}' * images}"
                                           f"{QUESTION}{think} ASSISTANT:")):
        ids, mask, _ = chat.encode(sample, tok, PATCHES, "think", template)
        assert prompt_of(tok, ids, mask) == wanted
        assert ids.count(tok.image_id) == PATCHES * images


def test_earlier_turns_are_targets_as_well_and_pictures_stand_once(tok):
    sample = Sample(images=(PICTURE,), turns=(("what is at a1 ?", "nothing"), ("and b1 ?", "blue cross")),
                    question=QUESTION)
    ids, mask, _ = chat.encode(sample, tok, PATCHES, "direct", "brief", " red circle")
    assert target_of(tok, ids, mask) == " nothing[EOS] blue cross[EOS] red circle[EOS]"
    assert prompt_of(tok, ids, mask) == f"[BOS]##### what is at a1 ? and b1 ? {QUESTION}"
    ids, mask, _ = chat.encode(sample, tok, PATCHES, "direct", "brief")
    assert not any(mask) and ids.count(tok.eos_id) == 2 and ids[-1] != tok.eos_id


@pytest.mark.parametrize("question", ["</s>", "{image}", "{question}", "<image>", "a</s> <s>b", "{", "\\1"])
def test_a_question_cannot_bring_special_ids_or_places_of_the_template(tok, question):
    ids, mask, _ = chat.encode(Sample(images=(PICTURE,), question=question), tok, PATCHES, "direct", "vicuna_v1", "x")
    assert ids.count(tok.image_id) == PATCHES and ids.count(tok.eos_id) == ids.count(tok.bos_id) == 1
    asked = "#" * PATCHES if question == chat.IMAGE else "#" * PATCHES + f"\n{question}"       # its one picture's place
    assert prompt_of(tok, ids, mask).endswith(f" USER: {asked} ASSISTANT:")
    assert target_of(tok, ids, mask) == " x[EOS]"


def test_alignment_is_the_caption_after_the_picture(tok):
    sample = Sample(images=(PICTURE,) * 2, question=QUESTION, caption="b2 red circle")
    ids, mask, _ = chat.encode_plain(sample, tok, PATCHES)
    assert prompt_of(tok, ids, mask) == "[BOS]##########" and target_of(tok, ids, mask) == " b2 red circle[EOS]"


def test_what_is_taught_is_what_the_parser_reads():
    tok = TOKENIZERS["scenes"]
    for sample in scenes.load("train", 30, 1, teachers.PERFECT):
        text = chat.target_text(sample.conclusion, sample.reasoning)
        ids, mask, _ = chat.encode(sample, tok, PATCHES, target=text)
        parsed = chat.parse(tok.decode([i for i, m in zip(ids, mask) if m]))
        assert parsed == chat.Parsed(sample.answer, sample.reasoning, "")


# ---------------------------------------------------------------- the code in data/README.md

def example(begins):
    """The Python of data/README.md whose first line begins so, run: the names after it."""
    readme = Path(chat.__file__).with_name("README.md").read_text()
    [code] = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if code.startswith(begins)]
    names = {**vars(supply), **vars(chat), "TEMPLATES": dict(chat.TEMPLATES), "SYSTEM": dict(chat.SYSTEM)}
    exec(code, names)
    return SimpleNamespace(**names)


def test_the_source_in_the_readme_reads_pictures_from_bytes(monkeypatch):
    rows = []
    for seed in range(30):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append(dict(image=dict(bytes=file.getvalue()), question="What?", answer=f"{seed}"))
    parquet = SimpleNamespace(read_table=lambda where: SimpleNamespace(to_pylist=lambda: rows))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    load = example("# data/supply.py").SOURCES["parquet"]
    splits, report = load("any", 50)
    assert {sample.answer for samples in splits.values() for sample in samples} == {f"{n}" for n in range(30)}
    assert report == f"30 rows about 30 pictures; {len(splits['train'])} train, {len(splits['val'])} val"
    rows[3]["answer"] = "<answer>"
    with pytest.raises(ValueError, match="'any', row 4: field 'answer' holds the tag <answer>"):
        load("any", 50)


def test_the_digits_of_the_readme_are_a_folder_of_classes_with_a_split_for_tests(tmp_path, monkeypatch):
    scans = np.random.default_rng(0).integers(0, 17, (100, 8, 8)).astype(float)
    digits = SimpleNamespace(images=scans, target=np.arange(100) // 10)     # each digit in each part
    datasets = SimpleNamespace(load_digits=lambda: digits)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    monkeypatch.chdir(tmp_path)
    example("# digits.py")
    splits, _ = images.load("digits")
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 60, "val": 20, "test": 20}
    assert {sample.answer for sample in splits["test"]} == {f"{digit}" for digit in range(10)}


def test_the_emoji_of_the_readme_are_drawn_by_one_vendor_to_train_on_and_by_two_to_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = []
    for number in range(40):
        label = ("animal-bird", "food-fruit")[number % 2]
        name = f"{number}.png"
        listed.append(dict(sort_order=number, category="Objects", subcategory=label, image=name, has_img_google=True,
                           has_img_twitter=True))
        for vendor, level in (("google", 0), ("twitter", 128)):
            folder = Path(f"emoji-datasource-{vendor}/img/{vendor}/64")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (level, number, 0)).save(folder / name)
    listed.append(dict(listed[0], category="Symbols", image="left-out.png"))
    Path("emoji-datasource-google/emoji.json").write_text(json.dumps(listed))
    example("# emoji.py")
    splits, _ = images.load("emoji")
    counts = {split: len(samples) for split, samples in splits.items()}
    assert counts == {"train": 24, "val": 8, "test": 8, "twitter": 8, "twitter_seen": 24}
    names = {split: {Path(sample.images[0]).name for sample in samples} for split, samples in splits.items()}
    assert names["test"] == names["twitter"] and names["train"] == names["twitter_seen"]


def test_the_template_in_the_readme_is_one(tok, monkeypatch):
    names = example("# chat.py")
    monkeypatch.setitem(chat.TEMPLATES, "plainest", names.TEMPLATES["plainest"])
    monkeypatch.setitem(chat.SYSTEM, "plainest", names.SYSTEM["plainest"])
    ids, mask, _ = chat.encode(Sample(question="why ?"), tok, PATCHES, "direct", "plainest", "two")
    assert tok.decode(ids) == "Q: why ? A: two" and [i for i, taught in zip(ids, mask) if taught][-1] == tok.eos_id
    assert tok.decode([i for i, taught in zip(ids, mask) if taught]).strip() == "two"


def test_the_teacher_in_the_readme_teaches():
    teach = example("# mine.py").teach
    [chain] = teachers.taught([Sample(caption="a cat", answer="cat")], teach, 0)
    assert (chain.reasoning, chain.conclusion) == ("i see a cat . so", "cat")
