"""LLaVA's files as a source: finding the records, reading them, fitting their pictures, batching like with like."""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import sample as sample_module
from data import spans as spans_module
from data.llava import Bad, BadRecord, Records, images_first
from data.sample import CLIP_MEAN, Sample, batch_indices, collate, read_image, to_array, to_pixels
from data.spans import spans

SHAPES = [(1, 1), (1, 500), (500, 1), (37, 53), (53, 36), (36, 53), (24, 24), (301, 299), (7, 5)]      # width, height


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def talk(*texts):
    """Turns from human and gpt in alternation."""
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def record(name="a", image=None, texts=("Why?", "So."), **more):
    return {"id": name, **({"image": image} if image is not None else {}), "conversations": talk(*texts), **more}


def records(folder, *objects):
    (folder / "data.json").write_text(json.dumps(objects))
    return Records(folder / "data.json", folder)


def fault(found, i=0):
    with pytest.raises(BadRecord) as caught:
        found[i]
    return caught.value


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png"):
        noise((7, 5)).save(tmp_path / name)
    return tmp_path


# Where records begin and end

def cut(text):
    """The records of a file with these bytes, parsed."""
    return [json.loads(text[a:b]) for a, b in zip(*spans(io.BytesIO(text)))]


STRINGS = st.text(alphabet='\\"{}[],:a é\n', max_size=8)
VALUES = st.recursive(STRINGS | st.integers() | st.none(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
                      max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(objects=st.lists(st.dictionaries(STRINGS, VALUES, max_size=3), min_size=1, max_size=4),
       indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40), as_list=st.booleans(), escape=st.booleans(),
       mark=st.booleans())
def test_records_are_found_whatever_they_hold_and_wherever_chunks_end(objects, indent, chunk, as_list, escape, mark):
    options = dict(indent=indent, ensure_ascii=escape)
    lines = "\n".join(json.dumps(one, **options) for one in objects) + "\n"
    text = json.dumps(objects, **options) if as_list else lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "CHUNK", chunk)
        assert cut(b"\xef\xbb\xbf" * mark + b" \r\n" + text.encode()) == objects


def test_spans_are_the_bytes_of_the_objects():
    assert [part.tolist() for part in spans(io.BytesIO(b'[{"a":1}, {}]'))] == [[1, 10], [8, 12]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 2 ** 24])
@pytest.mark.parametrize("text, said", [
    (b"", "is empty"), (b" \n\t", "is empty"), (b"[]", "holds no records"), (b" [ \n ] ", "holds no records"),
    (b"[", "cut short: its list never closes after 0 records"),
    (b'[{"a": 1}', "cut short: its list never closes after 1 records"),
    (b'[{"a": 1}, ', "cut short: its list never closes after 1 records"),
    (b'[{"a": 1}, {"b": "}]', "cut short: record 1 never closes"),
    (b'{"a": 1}\n{"b"', "cut short: record 1 never closes"), (b'[{}, {"a": [1}]', "do not match in record 1"),
    (b'{"a": [{}}]', "do not match in record 0"),
    (b'[{"a": "\\"}]', "cut short: record 0 never closes"), (b"[{}] {}", "expected a JSON list of objects"),
    (b"[1, 2]", "expected a JSON list of objects"), (b"[{}, 2]", "expected a JSON list of objects"),
    (b'["a"]', "expected a JSON list of objects"), (b"[{} {}]", "b'' before record 1 where b',' belongs"),
    (b"[{},, {}]", "b',,' before record 1 where b',' belongs"), (b"[{},]", "expected a JSON list of objects"),
    (b"{}, {}", "b',' before record 1 where b'' belongs"), (b"{}}", "ends with b'}'"), (b"{} x", "ends with b'x'"),
    (b"[[], {}]", "has a list as record 0"), (b'[{"a": 1}, []]', "has a list as record 1"),
    (b"<html>", "begins with b'<"), (b"PK\x03\x04", "begins with b'P"), ("[{}]".encode("utf-16"), "begins with")])
def test_a_file_that_is_no_list_of_objects_says_what_is_wrong_with_it(text, said, chunk, monkeypatch):
    monkeypatch.setattr(spans_module, "CHUNK", chunk)
    with pytest.raises(ValueError) as caught:
        spans(io.BytesIO(text))
    assert said in str(caught.value)


def test_every_cut_of_a_list_is_noticed():
    whole = json.dumps([record("a", "x.png"), record("b", texts=('say "[{"', "\\"))]).encode()
    assert len(cut(whole)) == 2
    for end in range(len(whole)):
        with pytest.raises(ValueError, match="cut short" if end else "is empty"):
            spans(io.BytesIO(whole[:end]))


# The file

def test_a_file_that_is_not_there_or_cannot_be_used_is_named(tmp_path):
    (tmp_path / "empty.json").touch()
    for name, said in (("none.json", "does not exist"), (".", "is a folder"), ("empty.json", "is empty")):
        with pytest.raises(ValueError, match=rf"llava file '.*{name}' {said}"):
            Records(tmp_path / name, tmp_path)


def test_an_image_folder_that_is_not_there_is_named(tmp_path):
    records(tmp_path, record())
    with pytest.raises(ValueError, match="image folder '.*pics' does not exist"):
        Records(tmp_path / "data.json", tmp_path / "pics")


def test_records_are_counted_from_both_ends_and_no_further(tmp_path):
    found = records(tmp_path, *(record(name) for name in "abc"))
    assert len(found) == 3 and [one.id for one in found] == ["a", "b", "c"]
    assert found[-1].id == found[np.int64(2)].id == "c" and found[-1].number == 2
    for i in (3, -4):
        with pytest.raises(IndexError):
            found[i]


def test_lengths_are_a_quarter_of_the_bytes_and_the_patches_of_each_picture(tmp_path):
    objects = [record("a"), record("b", ["a.png", "b.png"], ("<image><image>é", "So."))] * 1025        # two parts
    found = records(tmp_path, *objects)
    sizes = [len(json.dumps(one)) for one in objects[:2]]
    assert found.lengths(9).tolist() == [sizes[0] // 4, sizes[1] // 4 + 18] * 1025


# One record

def test_a_conversation_becomes_turns_and_a_last_question(pictures):
    found = records(pictures, record("7", "a.png", ("<image>\nWhat?", "A cat.", " Why? ", "Fur. ", "Sure?", "Yes.")))
    assert found[0] == Sample(
        id="7", images=(str(pictures / "a.png"),), turns=(("<image>\nWhat?", "A cat."), (" Why? ", "Fur. ")),
        question="Sure?", answer="Yes.", caption="A cat.", split="train", source="llava")


@pytest.mark.parametrize("text, becomes", [
    ("What? \n<image>", "<image>\nWhat?"), ("<image> What?", "<image>\nWhat?"), ("<image>", "<image>"),
    ("a <image> b <image>", "<image>\n<image>\na  b"), (" no picture ", " no picture ")])
def test_placeholders_go_to_the_front_of_their_turn_as_in_llava(text, becomes):
    assert images_first(text) == becomes


def test_pictures_may_come_in_later_turns(pictures):
    one = records(pictures, record("m", ["a.png", "b.png"], ("Hi", "Hello.", "And <image> or <image>?", "Both.")))[0]
    assert one.turns == (("Hi", "Hello."),) and one.question == "<image>\n<image>\nAnd  or ?"
    assert one.images == (str(pictures / "a.png"), str(pictures / "b.png"))


@pytest.mark.parametrize("image, front", [("a.png", "<image>\n"), (["a.png", "b.png"], "<image>\n<image>\n")])
def test_pictures_without_a_placeholder_go_before_everything(pictures, image, front):
    one = records(pictures, record("m", image, ("What?", "A cat.", "Why?", "Fur.")))[0]
    assert one.turns == ((front + "What?", "A cat."),) and one.question == "Why?"


def test_a_record_without_a_picture_has_none(tmp_path):
    found = records(tmp_path, record(), record(image=[]), {**record(), "image": None})
    assert [one.images for one in found] == [()] * 3


def test_a_record_without_an_id_is_called_by_its_number_and_a_number_is_an_id(tmp_path):
    assert [one.id for one in records(tmp_path, record(None), record(""), record(33471))] == ["0", "1", "33471"]


def test_what_gpt_says_before_the_first_question_is_dropped(tmp_path):
    turns = [{"from": "gpt", "value": "Hello <image>"}, *talk("Why?", "So.")]
    one = records(tmp_path, {"id": "a", "conversations": turns})[0]
    assert (one.turns, one.question, one.answer, one.caption) == ((), "Why?", "So.", "So.")


def test_a_last_question_without_an_answer_is_dropped(tmp_path):
    one = records(tmp_path, record(texts=("Why?", "So.", "And?")))[0]
    assert (one.turns, one.question, one.answer) == ((), "Why?", "So.")


@pytest.mark.parametrize("one, kind, reason", [
    ({"id": "z"}, "no conversation", "must be a list"), (record(conversations=[]), "no conversation", "no turn"),
    (record(conversations={}), "no conversation", "must be a list"),
    (record(conversations=["x"]), "no conversation", "must be a list"),
    (record(conversations=[{"from": "human"}]), "no conversation", "must be a list"),
    (record(conversations=[{"from": "system", "value": "x"}]), "no conversation", "'human' or 'gpt'"),
    (record(conversations=[{"from": ["human"], "value": "x"}]), "no conversation", "'human' or 'gpt'"),
    (record(conversations=[{"from": "gpt", "value": "x"}]), "no conversation", "no turn from 'human'"),
    (record(conversations=talk("a", "b")[:1] * 2), "no conversation", "in alternation"),
    (record(texts=("Why?",)), "no answer", "no question has an answer"),
    (record(texts=("Why?", "So.", "And?", " \n")), "no answer", "an answer is empty"),
    (record(image="a.png", texts=("Why?", "<image>")), "image token in an answer", "human's turns only"),
    (record(image="no.png"), "missing image", "no.png' does not exist"), (record(image=""), "missing image", "not ''"),
    (record(image=["a.png", "no.png"], texts=("<image><image>", "x")), "missing image", "no.png' does not exist"),
    (record(image=3), "missing image", "not 3"), (record(image="a\0.png"), "missing image", "does not exist"),
    (record(texts=("<image>", "x")), "images and <image> tokens differ", "0 images, 1 times <image>"),
    (record(image=["a.png", "b.png"], texts=("<image>", "x")), "images and <image> tokens differ", "2 images, 1 times"),
    (record(image="a.png", texts=("<image>", "x", "<image>", "y")), "images and <image> tokens differ", "1 images, 2 "),
    (record(image="a.png", texts=("Why?", "x", "<image>")), "images and <image> tokens differ", "1 images, 0 times"),
    (record(image="a.png", texts=("<ima<image>ge>", "x")), "images and <image> tokens differ", "1 images, 2 times")])
def test_a_bad_record_names_itself_its_kind_and_the_reason(pictures, one, kind, reason):
    error = fault(records(pictures, record("first"), one), 1)
    assert (error.kind, error.number, error.name) == (kind, 1, one["id"])
    assert str(error).startswith(f"record 1 (id {one['id']!r}): {kind}: ") and reason in str(error)


@pytest.mark.parametrize("text", [b'{"id": 1,}', b'{"id": "\\ud800"}', b"{'id': 1}", b'{"id": "\xff"}', b'{"id": "\n"}',
                                  b'{"id": 1, "image": "a.png", "image": "b.png"}',
                                  b'{"a":' + b"[" * 10 ** 5 + b"]" * 10 ** 5 + b"}"])
def test_a_record_that_is_no_json_is_named_by_its_number_and_costs_only_itself(tmp_path, text):
    (tmp_path / "data.json").write_bytes(b"[" + json.dumps(record()).encode() + b"," + text + b"]")
    found = Records(tmp_path / "data.json", tmp_path)
    assert found[0].answer == "So."
    error = fault(found, 1)
    assert (error.kind, error.number, error.name) == ("not valid JSON", 1, "1")


# Pictures from files

def upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                # stored on its side: turn it clockwise to see it
    stored = Image.new("RGB", (16, 16), "black")
    stored.paste("red", (0, 0, 16, 8))              # the upper half as stored is the right half as seen
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)


def test_a_turned_photograph_is_upright(tmp_path):
    upright(tmp_path)
    found = records(tmp_path, record(image="turned.jpg"))
    [array] = found.arrays(found[0], 16)
    assert (array[:, 9:, 0] > 240).all() and (array[:, :7] < 15).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("name, mode, size", [
    ("odd.jpg", "RGB", (37, 53)), ("odd.png", "RGB", (53, 37)), ("grey.jpg", "L", (9, 20)),
    ("alpha.png", "RGBA", (5, 9)), ("palette.png", "P", (9, 5)), ("dot.png", "RGB", (1, 1)),
    ("print.jpg", "CMYK", (20, 9)), ("deep.png", "I;16", (9, 9))])
def test_every_kind_of_picture_is_read(tmp_path, name, mode, size, fit):
    picture = Image.new("I;16", size, 1000) if mode == "I;16" else noise(size).convert(mode)
    picture.save(tmp_path / name, **({"transparency": 0} if mode == "P" else {}))
    found = records(tmp_path, record(image=name))
    [array] = found.arrays(found[0], 24, fit)
    assert array.shape == (24, 24, 3) and array.dtype == np.uint8


def test_a_picture_that_cannot_be_decoded_is_a_bad_record(tmp_path):
    noise((64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.jpg").write_text("404 not found")
    (tmp_path / "folder.jpg").mkdir()
    names = ("cut.jpg", "text.jpg", "folder.jpg")
    found = records(tmp_path, *(record(name, name) for name in names))
    for number, name in enumerate(names):
        with pytest.raises(BadRecord, match=f"record {number} .*unreadable image: image '.*{name}'") as caught:
            found.arrays(found[number], 8)
        assert (caught.value.kind, caught.value.number, caught.value.name) == ("unreadable image", number, name)
    with pytest.raises(ValueError, match="truncated"):
        read_image(tmp_path / "cut.jpg")


def test_a_wrong_fit_is_no_fault_of_the_record(pictures):
    found = records(pictures, record(image="a.png"))
    with pytest.raises(ValueError, match="fit 'stretch' must be one of 'crop', 'pad'") as caught:
        found.arrays(found[0], 8, fit="stretch")
    assert not isinstance(caught.value, BadRecord)


# The tally

def test_a_bad_record_is_counted_once_and_the_first_five_of_a_kind_are_named():
    bad = Bad("skip")
    assert bad.report() == ""
    for number in (*range(7), *range(7)):
        bad.see(BadRecord("missing image", number, f"id{number}", "gone"))
    assert bad.report() == "7 bad records skipped: 7 missing image (id0, id1, id2, id3, id4, ...)"
    bad.see(BadRecord("no answer", 9, "id0", "silence"))         # another record of the same id
    assert bad.report().endswith("id4, ...), 1 no answer (id0)") and bad.report().startswith("8 bad")


def test_the_commonest_kind_comes_first():
    bad = Bad("skip")
    for number, kind in enumerate(("no answer", "missing image", "missing image")):
        bad.see(BadRecord(kind, number, f"id{number}", "why"))
    assert bad.report() == "3 bad records skipped: 2 missing image (id1, id2), 1 no answer (id0)"


def test_one_bad_record_is_one():
    bad = Bad("skip")
    bad.see(BadRecord("no answer", 3, "id3", "silence"))
    assert bad.report() == "1 bad record skipped: 1 no answer (id3)"


def test_stop_raises_the_first_bad_record_as_a_value_error():
    with pytest.raises(ValueError, match=r"record 3 \(id 'id3'\): no answer: silence"):
        Bad("stop").see(BadRecord("no answer", 3, "id3", "silence"))


def test_a_policy_is_skip_or_stop():
    with pytest.raises(ValueError, match="policy 'ignore' must be 'skip' or 'stop'"):
        Bad("ignore")


# Fitting a picture into a square

@pytest.mark.parametrize("shape", SHAPES)
def test_crop_equals_transformers_clip_processor(shape):
    from transformers import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    theirs = processor(noise(shape), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert torch.allclose(to_pixels([np.asarray(noise(shape))], 24), theirs, rtol=0, atol=2e-7)


def on_square(picture):
    """LLaVA's expand2square, written with arrays."""
    array = np.asarray(picture)
    side = max(array.shape[:2])
    square = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)
    top, left = (side - array.shape[0]) // 2, (side - array.shape[1]) // 2
    square[top:top + array.shape[0], left:left + array.shape[1]] = array
    return Image.fromarray(square)


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_equals_transformers_clip_processor_on_the_padded_square(shape):
    from transformers import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 26, "width": 26})
    square = on_square(noise(shape))
    theirs = processor(square, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert torch.allclose(to_pixels([np.asarray(noise(shape))], 26, fit="pad"), theirs, rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [(1, 1), (500, 1), (37, 53), (24, 24), (301, 299)])
def test_crop_equals_open_clips_transform_where_its_rounded_offset_is_the_same(shape):
    from open_clip.transform import image_transform
    theirs = image_transform(24, is_train=False)(noise(shape))
    assert torch.allclose(to_pixels([np.asarray(noise(shape))], 24)[0], theirs, rtol=0, atol=2e-7)


def test_the_long_edge_is_cut_off_not_rounded():
    wide = np.asarray(noise((53, 10)))              # 8 * 53 / 10 = 42.4 and 8 * 56 / 10 = 44.8
    wider = np.asarray(noise((56, 10)))
    for picture, width in ((wide, 42), (wider, 44)):
        resized = np.asarray(Image.fromarray(picture).resize((width, 8), Image.BICUBIC))
        left = (width - 8) // 2
        assert (to_array(picture, 8) == resized[:, left:left + 8]).all()


def test_padding_has_the_colour_of_the_mean_cut_to_whole_numbers():
    stripe = np.zeros((2, 6, 3), dtype=np.uint8)    # two rows of padding above, two below
    assert to_array(stripe, 6, "pad")[[0, 1, 4, 5]].reshape(-1, 3).tolist() == [[122, 116, 104]] * 24
    assert to_array(stripe, 6, "pad", mean=(0.5, 0.25, 1))[0, 0].tolist() == [127, 63, 255]
    assert (to_array(stripe, 6, "pad")[2:4] == 0).all()
    assert to_array(stripe[:1, :4], 4, "pad")[:, 0, 0].tolist() == [122, 0, 122, 122]       # the odd row goes below


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_an_array_of_the_asked_size_is_returned_as_it_is(fit):
    picture = np.asarray(noise((24, 24)))
    assert to_array(picture, 24, fit) is picture


def test_an_unknown_fit_is_an_error_for_any_picture():
    for picture in (np.zeros((8, 8, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="fit 'squash' must be one of 'crop', 'pad'"):
            to_array(picture, 8, "squash")


def test_a_file_is_kept_once_for_each_fit_and_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_module, "CACHE", {})
    noise((9, 5)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    asked = [("crop", CLIP_MEAN), ("pad", CLIP_MEAN), ("pad", (0.5, 0.5, 0.5))]
    arrays = [to_array(path, 9, *one) for one in asked]
    assert len({array.tobytes() for array in arrays}) == 3
    assert all(to_array(path, 9, *one) is array for one, array in zip(asked, arrays))
    assert to_array(path, 9, "pad", list(CLIP_MEAN)) is arrays[1]           # a mean read from a file is a list


def test_pixels_are_normalised_with_the_tower_s_own_statistics():
    white = np.full((2, 4, 3), 255, dtype=np.uint8)
    half = (0.5, 0.5, 0.5)
    assert torch.equal(to_pixels([white], 2, mean=half, std=half), torch.ones(1, 3, 2, 2))
    batch = collate([([1], [0], (white,))], 0, 4, "pad", half, (0.25, 0.25, 0.25))
    assert torch.allclose(batch.pixels[0, 0, :, 0], torch.tensor([-1 / 127.5, 2, 2, -1 / 127.5]))      # 127 of 255


def test_a_picture_too_long_and_narrow_is_an_error_before_it_takes_the_memory(tmp_path):
    Image.new("1", (20000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line.png' of 20000 x 1 pixels is too long and narrow to pad"):
        to_array(str(tmp_path / "line.png"), 8, "pad")
    with pytest.raises(ValueError, match="too long and narrow to crop"):
        to_array(str(tmp_path / "line.png"), 336)
    assert to_array(str(tmp_path / "line.png"), 8).shape == (8, 8, 3)


# Batches of like length

LENGTHS = np.random.default_rng(0).integers(0, 1000, 120)


def epoch(count, size, seed=0, first=0, lengths=None):
    return [batch_indices(count, size, step, seed, lengths) for step in range(first, first + count // size)]


@pytest.mark.parametrize("size", [1, 2, 4, 60, 120])               # 120, 60, 30, 2 and 1 steps: whole groups and a rest
@pytest.mark.parametrize("number", [0, 1, 7])
def test_an_epoch_of_like_lengths_has_each_record_once(size, number):
    steps = epoch(120, size, first=number * (120 // size), lengths=LENGTHS)
    assert all(len(step) == size for step in steps) and sorted(sum(steps, [])) == list(range(120))


def test_grouping_moves_records_within_fifty_steps_only():
    grouped, plain = epoch(120, 2, lengths=LENGTHS), epoch(120, 2)
    assert sorted(sum(grouped[:50], [])) == sorted(sum(plain[:50], []))
    assert sorted(sum(grouped[50:], [])) == sorted(sum(plain[50:], []))


def test_the_steps_of_a_group_are_its_records_sorted_by_length_and_cut():
    steps = epoch(120, 4, lengths=LENGTHS)                          # 30 steps, one group
    spread = sorted((LENGTHS[step].min(), LENGTHS[step].max()) for step in steps)
    assert sum(spread, ()) == tuple(np.sort(LENGTHS).reshape(30, 4)[:, [0, -1]].ravel())
    lowest = [LENGTHS[step].min() for step in steps]
    assert lowest != sorted(lowest) and lowest != sorted(lowest)[::-1]      # the steps themselves come in random order


def test_grouped_batches_are_a_function_of_their_arguments():
    orders = range(70), range(69, -1, -1)
    once, twice = ([batch_indices(120, 4, step, 3, LENGTHS) for step in order] for order in orders)
    assert once == twice[::-1]
    assert once != [batch_indices(120, 4, step, 4, LENGTHS) for step in range(70)]
    shortest = [[LENGTHS[step].min() for step in part] for part in (once[:30], once[30:60])]
    assert not np.array_equal(*np.argsort(shortest))                # each epoch has places of its own


@pytest.mark.parametrize("count, size", [(7, 3), (3, 7), (1, 4), (101, 2)])
def test_grouping_loses_no_record_when_the_steps_do_not_divide_the_epoch(count, size):
    steps = max(count // size, 1) * 3
    grouped, plain = ([batch_indices(count, size, step, 0, lengths) for step in range(steps)]
                      for lengths in (LENGTHS[:count], None))
    assert sorted(sum(grouped, [])) == sorted(sum(plain, []))


def test_without_lengths_the_order_is_the_seeded_one_of_every_epoch():
    taken = sum((batch_indices(5, 2, step, seed=9) for step in range(5)), [])
    assert taken == [*np.random.default_rng([9, 0]).permutation(5), *np.random.default_rng([9, 1]).permutation(5)]


def test_there_is_one_length_a_record():
    with pytest.raises(ValueError, match=r"lengths of shape \(3,\) must be \(4,\)"):
        batch_indices(4, 2, 0, 0, [1, 2, 3])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_gigabyte_of_records_opens_in_seconds_and_little_memory(tmp_path):
    count, path = 665_000, tmp_path / "records.json"
    turn = dict(value='What is "this" {here}? \\ [no] ' * 22)
    with open(path, "w") as file:
        for n in range(count):
            record = dict(id=str(n), conversations=[turn | {"from": "human"}, turn | {"from": "gpt"}])
            file.write(("," if n else "[") + json.dumps(record))
        file.write("]")
    program = f"""
import re, sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from data.llava import Records
# Not getrusage's ru_maxrss, which begins at the peak of the process that this one was forked from.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, began = peak(), time.perf_counter()
records = Records({str(path)!r}, "")
assert len(records) == {count} and records[-1].id == str({count - 1})
print(time.perf_counter() - began, peak() - before)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, megabytes = map(float, said.split())
    print(f"{path.stat().st_size / 1e9:.2f} GB: {seconds:.1f} s, {megabytes:.0f} MB")
    assert path.stat().st_size > 1e9 and seconds < 60 and 10 < megabytes < 500
