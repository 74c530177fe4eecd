"""Pictures and questions from outside: what `data.images`, `data.jsonl` and `read_image` promise about them."""
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import answers, chat, images, jsonl, sample, scenes
from data.sample import Sample, read_image, to_array, to_pixels
from data.splits import Division, pixel_hash, sides, split_of
from data.supply import real_data
from draw_folder import CLASSES, draw_folder        # pytest puts tests/ on the path


def noise(seed, size=(7, 5)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def encoded(picture, form="PNG", **options):
    """PIL image -> the bytes of a file, as a row of a parquet data set holds them."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise_in(split, start=0):
    """A picture that the hash puts into `split` at val_percent=50."""
    for seed in range(start, start + 100):
        if split_of(pixel_hash(np.asarray(noise(seed))), 50) == split:
            return noise(seed)


def two_classes(root, count=12):
    """cat: pictures 0, 2, 4, ...; sea_gull: pictures 1, 3, 5, ..."""
    for seed in range(2 * count):
        save(noise(seed), root / ("cat", "sea_gull")[seed % 2] / f"{seed:02}.png")
    return root


def two_splits(root):
    for seed, place in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        save(noise(seed), root / place / "a.png")
    return root


def load50(root):
    return images.load(root, val_percent=50)


def both(splits):
    return splits["train"] + splits["val"]


def ids(samples):
    return [sample.id for sample in samples]


# read_image, to_array

def test_transparency_becomes_white(tmp_path):
    half = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    half.putpixel((1, 0), (9, 9, 9, 0))
    picture = read_image(save(half, tmp_path / "a.png"))
    assert picture.mode == "RGB" and [picture.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    picture = read_image(save(palette, tmp_path / "a.png", transparency=1))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_a_picture_with_an_exif_rotation_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                # stored on its side: turn it clockwise to see it
    stored = Image.new("RGB", (3, 2), "black")
    stored.putpixel((0, 0), (255, 0, 0))            # top left as stored is top right as seen
    picture = read_image(save(stored, tmp_path / "a.png", exif=exif))
    assert picture.size == (2, 3) and picture.getpixel((1, 0)) == (255, 0, 0)
    assert np.asarray(picture).sum() == 255


def test_16_bit_grey_keeps_its_steps(tmp_path):
    grey = Image.fromarray(np.array([[1000, 2000, 3000]], dtype=np.uint16))
    picture = read_image(save(grey, tmp_path / "a.png"))
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (127,) * 3, (255,) * 3]


def test_16_bit_grey_with_a_transparent_level_is_not_washed_out(tmp_path):
    grey = Image.fromarray(np.array([[1000, 3000]], dtype=np.uint16))
    picture = read_image(save(grey, tmp_path / "a.png", transparency=7))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(0,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "gif"), ("RGBA", "webp"),
                                          ("CMYK", "jpg"), ("F", "tif"), ("I", "tif"), ("YCbCr", "jpg")])
def test_every_mode_is_read_as_rgb_of_the_same_size(tmp_path, mode, suffix):
    picture = read_image(save(noise(0).convert(mode), tmp_path / f"a.{suffix}"))
    assert picture.mode == "RGB" and picture.size == (7, 5)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"P6\n1x 1\n255\nabc"])
def test_what_is_no_picture_is_a_value_error_that_names_the_file(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png.*cannot be read as a picture"):
        read_image(tmp_path / "bad.png")


def test_a_truncated_picture_is_a_value_error_that_names_the_file(tmp_path):
    whole = save(noise(0, (64, 64)), tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg.*truncated"):
        read_image(tmp_path / "cut.jpg")


def test_the_bands_in_which_a_picture_is_converted_leave_no_trace(tmp_path, monkeypatch):
    grey = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    paths = [save(Image.fromarray(grey), tmp_path / "deep.png"), save(noise(1).quantize(9), tmp_path / "palette.png"),
             save(noise(2).convert("RGBA").rotate(9), tmp_path / "alpha.png")]
    whole = [(read_image(path).tobytes(), pixel_hash(path)) for path in paths]
    stretched = (grey.astype(np.float64) - grey.min()) / float(grey.max() - grey.min()) * 255
    assert whole[0][0] == np.repeat(stretched.astype(np.uint8)[..., None], 3, axis=2).tobytes()
    for pixels in (1, 14):                          # a row at a time, two rows at a time
        monkeypatch.setattr(sample, "BAND", pixels)
        assert [(read_image(path).tobytes(), pixel_hash(path)) for path in paths] == whole


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_large_16_bit_picture_takes_ten_bytes_a_pixel_at_most(tmp_path):
    side = 6000
    save(Image.fromarray(np.tile(np.arange(side, dtype=np.uint16), (side, 1))), tmp_path / "deep.png", compress_level=1)
    program = """
import sys
from data.sample import read_image
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
read_image(sys.argv[1])
print((peak() - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "deep.png"], capture_output=True, text=True,
                          cwd=Path(sample.__file__).parents[1], check=True)
    assert int(done.stdout) < 10 * side * side


def test_too_many_pixels_are_an_error_from_the_header_alone(tmp_path):
    (tmp_path / "huge.ppm").write_bytes(b"P6 20000 20000 255\n")           # 1.2 GB of pixels would follow
    with pytest.raises(ValueError, match=r"huge\.ppm' has too many pixels: expected at most 178956970$"):
        read_image(tmp_path / "huge.ppm")


def test_a_picture_that_pil_warns_of_is_read_without_a_word(tmp_path):
    save(Image.new("1", (10_000, 9_000)), tmp_path / "large.png")
    program = "import sys; from PIL import Image; import data.sample; print(Image.open(sys.argv[1]).size)"
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "large.png"], capture_output=True, text=True,
                          cwd=Path(sample.__file__).parents[1])
    assert (done.stdout, done.stderr) == ("(10000, 9000)\n", "")


def test_a_grey_picture_with_a_nan_is_an_error(tmp_path):
    grey = save(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif' cannot be read as a picture: it has pixels that are no finite num"):
        read_image(grey)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
@pytest.mark.parametrize("read", [read_image, lambda path: to_array(str(path), 8)])
def test_what_is_no_file_is_an_error_and_is_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")                # opening it would wait for a writer, for ever
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, complaint in (("pipe.png", "it is no regular file"), (".", "it is a folder"),
                            ("loop.png", ".*symbolic links.*")):
        with pytest.raises(ValueError, match=f"cannot be read as a picture: {complaint}$") as caught:
            read(tmp_path / name)
        assert repr(str(tmp_path / name)) in str(caught.value)


# Encoded pictures, as bytes

@pytest.mark.parametrize("form, options", [("PNG", {}), ("JPEG", {"quality": 80}), ("WEBP", {"quality": 80})])
def test_bytes_of_a_picture_are_read_as_the_file_they_came_from(tmp_path, form, options):
    turned = Image.Exif()
    turned[0x0112] = 6
    if form != "WEBP":
        options = {**options, "exif": turned}
    path = save(noise(0, (30, 20)), tmp_path / f"a.{form.lower()}", **options)
    content = path.read_bytes()
    assert read_image(content).tobytes() == read_image(path).tobytes()
    assert pixel_hash(content) == pixel_hash(path)
    for fit in ("crop", "pad"):
        assert np.array_equal(to_array(content, 8, fit), to_array(str(path), 8, fit))
    pixels = [to_pixels([picture], 8) for picture in (content, str(path), np.asarray(read_image(path)))]
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


def test_equal_bytes_are_decoded_once_and_other_bytes_are_another_picture(monkeypatch):
    monkeypatch.setattr(sample, "CACHE", {})
    one, same, other = encoded(noise(0)), bytes(bytearray(encoded(noise(0)))), encoded(noise(1))
    assert to_array(one, 8) is to_array(same, 8)
    assert not np.array_equal(to_array(one, 8), to_array(other, 8))
    assert not any(isinstance(part, bytes) and part == one for key in sample.CACHE for part in key)


@pytest.mark.parametrize("content, complaint", [
    (b"", "it has no format that Pillow knows"), (b"no picture", "it has no format that Pillow knows"),
    (encoded(noise(0, (64, 64)), "JPEG")[:1000], "image file is truncated")])
@pytest.mark.parametrize("read", [read_image, pixel_hash, lambda content: to_array(content, 8)])
def test_bytes_that_are_no_picture_are_an_error_that_says_how_many(read, content, complaint):
    with pytest.raises(ValueError, match=f"^image of {len(content)} bytes cannot be read as a picture: {complaint}"):
        read(content)


def test_bytes_of_a_picture_too_narrow_to_resize_are_an_error():
    with pytest.raises(ValueError, match=r"^image of \d+ bytes of 60000 x 1 pixels is too long and narrow to crop"):
        to_array(encoded(Image.new("RGB", (60_000, 1))), 1000)


def test_to_array_takes_the_middle_square():
    stripes = np.zeros((4, 12, 3), dtype=np.uint8)
    stripes[:, 4:8] = 255                           # the middle third is white
    assert (to_array(stripes, 4) == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (300, 2), (8, 8)])
def test_to_array_gives_the_asked_size_for_any_shape(size):
    assert to_array(np.asarray(noise(0, size)), 8).shape == (8, 8, 3)


# The split

def test_the_hash_is_sha256_of_size_and_pixels():
    red = np.array([[[255, 0, 0]]], dtype=np.uint8)
    assert pixel_hash(red) == hashlib.sha256(b"1x1 \xff\0\0").hexdigest()


def test_pictures_of_the_same_bytes_but_another_shape_differ():
    flat = np.zeros((1, 6, 3), dtype=np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.reshape(2, 3, 3))


def test_a_fifth_of_the_hashes_is_val():
    assert [split_of(f"{n:x}", 20) for n in range(300)].count("val") == 60


def test_a_larger_val_percent_only_adds_to_val():
    keys = [hashlib.sha256(bytes([n])).hexdigest() for n in range(100)]
    small, large = ({key for key in keys if split_of(key, percent) == "val"} for percent in (10, 30))
    assert small < large


@pytest.mark.parametrize("percent", [0, 100, -5])
def test_a_val_percent_that_leaves_a_split_empty_is_an_error(tmp_path, percent):
    with pytest.raises(ValueError, match=f"val_percent {percent} must be between 1 and 99"):
        images.load(two_classes(tmp_path), val_percent=percent)


# A folder of class folders

def test_every_picture_becomes_one_question(tmp_path):
    splits, report = load50(two_classes(tmp_path))
    assert sorted(ids(both(splits)))[-1] == "sea_gull/23.png" and len(both(splits)) == 24
    sample = next(sample for sample in both(splits) if sample.id == "sea_gull/23.png")
    assert sample.images == (str(tmp_path / "sea_gull/23.png"),)
    assert sample.question == "What is shown in the picture?"
    assert sample.answer == sample.caption == "sea gull" and sample.choices == ("cat", "sea gull")
    assert sample.source == "images/sea gull" and sample in splits[sample.split]
    train, val = len(splits["train"]), len(splits["val"])
    assert report == f"images: 24 pictures, 2 classes; {train} train, {val} val"


def test_loading_twice_gives_the_same_samples_in_sorted_order(tmp_path):
    first, _ = load50(two_classes(tmp_path))
    second, _ = load50(tmp_path)
    assert first == second and all(ids(samples) == sorted(ids(samples)) for samples in first.values())


def test_a_new_picture_moves_no_earlier_one(tmp_path):
    before, _ = load50(two_classes(tmp_path))
    save(noise(99), tmp_path / "cat/000.png")
    after, _ = load50(tmp_path)
    assert set(ids(before["val"])) <= set(ids(after["val"])) and set(ids(before["train"])) <= set(ids(after["train"]))


def test_duplicate_pictures_fall_in_one_split(tmp_path):
    two_classes(tmp_path)
    for seed in range(0, 24, 2):
        for copy in ("copy.png", "copy.bmp", "copy.webp"):
            save(noise(seed), tmp_path / f"cat/{seed:02}{copy}", **({"lossless": True} if "webp" in copy else {}))
    splits, report = load50(tmp_path)
    place = {sample.id: split for split, samples in splits.items() for sample in samples}
    assert len(place) == 60 and "36 duplicates kept together" in report
    assert all(place[name] == place[name[:6] + ".png"] for name in place if "copy" in name)


def test_a_picture_under_two_classes_is_left_out_of_both(tmp_path):
    save(noise(0), two_classes(tmp_path) / "sea_gull/again.bmp")           # the pixels of cat/00.png
    splits, report = load50(tmp_path)
    assert not {"cat/00.png", "sea_gull/again.bmp"} & set(ids(both(splits))) and len(both(splits)) == 23
    assert "2 left out, the same picture under two classes" in report


def test_unreadable_pictures_are_skipped_counted_and_the_first_five_named(tmp_path):
    two_classes(tmp_path)
    for number in range(7):
        (tmp_path / f"cat/bad{number}.jpg").write_bytes(b"no picture")
    (tmp_path / "cat/bad0.jpg").unlink()
    (tmp_path / "cat/bad0.jpg").symlink_to("nowhere.jpg")
    splits, report = load50(tmp_path)
    names = ", ".join(f"cat/bad{number}.jpg" for number in range(5))
    assert len(both(splits)) == 24 and report.endswith(f"7 unreadable skipped ({names}, ...)")


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    two_classes(tmp_path)
    for name in ("cat/.hidden.png", "cat/._00.png", "cat/Thumbs.db", "cat/notes.txt", "README.md"):
        (tmp_path / name).write_bytes(b"no picture")
    for name in (".git", "__MACOSX", "cat/more"):
        (tmp_path / name).mkdir()
    splits, report = load50(tmp_path)
    assert len(both(splits)) == 24 and "unreadable" not in report


def test_pictures_of_every_odd_kind_are_loaded(tmp_path):
    two_classes(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(noise(50).convert("L"), tmp_path / "cat/grey.JPG")
    save(noise(51).quantize(4), tmp_path / "cat/palette.png")
    save(noise(52).convert("RGBA"), tmp_path / "cat/alpha.png")
    save(noise(53), tmp_path / "cat/turned.jpg", exif=exif)
    save(noise(54).convert("CMYK"), tmp_path / "cat/print.jpeg")
    save(Image.fromarray(np.array([[1, 60000]], dtype=np.uint16)), tmp_path / "cat/deep.png")
    save(noise(55, (1, 1)), tmp_path / "cat/dot.png")
    splits, report = load50(tmp_path)
    assert len(both(splits)) == 31 and "unreadable" not in report


def test_a_rotated_copy_by_exif_is_a_duplicate_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(noise(0).rotate(90, expand=True), two_classes(tmp_path) / "cat/turned.png", exif=exif)
    _, report = load50(tmp_path)
    assert "1 duplicates kept together" in report


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse file names that are not UTF-8")
def test_odd_file_names_give_printable_ids_and_classes(tmp_path):
    two_classes(tmp_path)
    latin = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(latin)
    names = [b"\xff\xfe.png", b"new\nline.png", "日本.png".encode(), b"it's [1] %s {x}.png", b"-rf.PNG"]
    for seed, name in enumerate(names + [b"%d.png" % n for n in range(8)]):
        with open(latin + b"/" + name, "wb") as file:
            noise(30 + seed).save(file, "PNG")
    with open(latin + b"/bad\xff.jpg", "wb"):
        pass
    splits, report = load50(tmp_path)
    mine = [sample for sample in both(splits) if sample.answer == "café"]
    assert len(mine) == 13 and "café/badÿ.jpg" in report
    for sample in mine:
        sample.id.encode("utf-8")
        read_image(sample.images[0])


def test_folders_that_name_the_same_class_are_one_class(tmp_path):
    two_classes(tmp_path)
    save(noise(40), tmp_path / "sea-gull/40.png")
    splits, _ = load50(tmp_path)
    assert both(splits)[0].choices == ("cat", "sea gull") and "sea-gull/40.png" in ids(both(splits))


@pytest.mark.parametrize("names, complaint", [
    (("Cat", "cat"), "classes 'Cat' and 'cat' count as the same answer; rename"),
    (("etc", "etc."), "classes 'etc' and 'etc.' count as the same answer"),
    (("1", "1.0", "01", "two", "Two"), "classes '01' and '1' and '1.0' count as the same answer; classes 'Two' and"),
    (("1,000", "1e3"), "classes '1,000' and '1e3' count as the same answer"),
    (("a", "_..."), "class '...' is nothing but full stops and spaces, which do not count; rename"),
    (("a", "\u200b\ufeff"), r"class '\\u200b\\ufeff' holds no visible character; rename"),
    (("a", "<ANSWER>", "<image> b"), "class '<ANSWER>' holds the tag <ANSWER>, .*; class '<image> b' holds"),
    (("_", "cat", "Cat"), "names no class; classes 'Cat' and 'cat' count as the same answer; rename"),
    (("a",) + tuple(f"<image> {n:02}" for n in range(13)), "class '<image> 09' .*sets itself; and 3 more; rename"),
])
def test_classes_that_no_answer_could_tell_apart_are_an_error_that_lists_them(tmp_path, names, complaint):
    for name in names:
        (tmp_path / name).mkdir()                   # said before a picture is decoded
    with pytest.raises(ValueError, match=f"^folder '{tmp_path}': .*{complaint}"):
        images.load(tmp_path)


TEXTS = st.text(st.sampled_from("aAé 1230.,-+e\n\u200b<think>(B)"), max_size=8)


@settings(max_examples=1000, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["", "e", "1"]))
def test_answers_are_called_alike_when_the_checker_takes_one_for_the_other_and_never_else(one, other, unit):
    if answers.normalise(one) and answers.normalise(other):
        alike = bool(answers.alike([one, other], unit))
        assert answers.is_right(Sample(answer=one, unit=unit), other) == alike
        assert answers.is_right(Sample(answer=other, unit=unit), one) == alike


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from([*"a. \n\u200b<>/", "<think>", "</answer>", "<Answer>"]), max_size=4).map("".join))
def test_an_answer_without_a_fault_is_judged_right_when_it_is_given(answer):
    given_back = chat.parse(chat.target_text(answer, "so")).answer
    assert answers.fault(answer) or answers.is_right(Sample(answer=answer), given_back)


# train/ and val/ folders

def test_train_and_val_folders_are_kept_as_given(tmp_path):
    splits, report = images.load(two_splits(tmp_path))
    assert ids(splits["train"]) == ["train/cat/a.png", "train/dog/a.png"]
    assert ids(splits["val"]) == ["val/cat/a.png", "val/dog/a.png"]
    assert report == "images: 4 pictures, 2 classes; 2 train, 2 val" and splits["val"][0].choices == ("cat", "dog")


def test_a_train_picture_that_is_also_in_val_is_dropped_from_train(tmp_path):
    save(noise(2), two_splits(tmp_path) / "train/cat/b.bmp")               # the pixels of val/cat/a.png
    splits, report = images.load(tmp_path)
    assert ids(splits["train"]) == ["train/cat/a.png", "train/dog/a.png"] and len(splits["val"]) == 2
    assert "1 dropped from train, also in val" in report


def test_a_val_picture_under_another_class_in_train_is_left_out_of_both(tmp_path):
    save(noise(9), two_splits(tmp_path) / "train/cat/b.png")
    save(noise(9), tmp_path / "val/dog/b.png")
    splits, report = images.load(tmp_path)
    assert len(both(splits)) == 4 and "2 left out, the same picture under two classes" in report


def test_a_class_missing_from_val_is_an_error(tmp_path):
    save(noise(9), two_splits(tmp_path) / "train/owl/a.png")
    with pytest.raises(ValueError, match=r"val has no picture of class 'owl' \(1 in train\); .* to val/"):
        images.load(tmp_path)


def draw(root, *places):
    """A picture of its own in each of these class folders."""
    for seed, place in enumerate(places):
        save(noise(seed), root / place / "a.png")
    return root


CLASSES_OF = {name: (f"{name}/cat", f"{name}/dog") for name in (
    "train", "Train", "TRAIN", "val", "Val", "valid", "Validation", "test", "TEST", "extra")}


@pytest.mark.parametrize("train, val, others, said", [
    ("train", "test", (), "; val is the folder 'test'"),
    ("train", "valid", (), "; val is the folder 'valid'"),
    ("Train", "Val", (), ""),
    ("TRAIN", "Validation", ("TEST",), ", 2 TEST; val is the folder 'Validation'"),
    ("train", "val", ("test", "extra"), ", 2 extra, 2 test"),
    ("train", "val", ("Train", "Val"), "; left out: 'Train', 'Val'"),
])
def test_train_and_another_split_are_found_by_their_usual_names(tmp_path, train, val, others, said):
    draw(tmp_path, *[place for name in (train, val, *others) for place in CLASSES_OF[name]])
    splits, report = images.load(tmp_path)
    assert ids(splits["train"]) == [f"{place}/a.png" for place in CLASSES_OF[train]]
    assert ids(splits["val"]) == [f"{place}/a.png" for place in CLASSES_OF[val]]
    count = 4 + 2 * said.count(", 2 ")
    assert report == f"images: {count} pictures, 2 classes; 2 train, 2 val{said}"


def test_a_folder_beside_train_and_val_is_a_split_of_its_own_name(tmp_path):
    draw(tmp_path, *CLASSES_OF["train"], *CLASSES_OF["val"], "hospital_b/cat")
    splits, report = images.load(tmp_path)
    assert list(splits) == ["train", "val", "hospital_b"]
    assert ids(splits["hospital_b"]) == ["hospital_b/cat/a.png"]
    assert splits["hospital_b"][0].split == "hospital_b" and splits["hospital_b"][0].choices == ("cat", "dog")
    assert report == "images: 5 pictures, 2 classes; 2 train, 2 val, 1 hospital_b"


def test_a_picture_of_a_split_of_ones_own_is_dropped_from_train_and_from_val(tmp_path):
    draw(tmp_path, *CLASSES_OF["train"], *CLASSES_OF["val"], "far/cat", "far/dog", "near/cat")
    save(noise(4), tmp_path / "train/cat/b.bmp")        # the pixels of far/cat/a.png
    save(noise(5), tmp_path / "val/dog/b.bmp")          # the pixels of far/dog/a.png
    save(noise(5), tmp_path / "train/dog/b.bmp")
    save(noise(4), tmp_path / "near/cat/b.bmp")         # neither of the two trains: both keep it
    splits, report = images.load(tmp_path)
    assert ids(splits["train"]) == ["train/cat/a.png", "train/dog/a.png"]
    assert ids(splits["val"]) == ["val/cat/a.png", "val/dog/a.png"]
    assert ids(splits["near"]) == ["near/cat/a.png", "near/cat/b.bmp"] and len(splits["far"]) == 2
    assert report.endswith("; 1 dropped from train, also in far, 1 dropped from train, also in val, "
                           "1 dropped from val, also in far")


def test_what_is_no_split_beside_train_and_val_is_left_out_with_the_reason(tmp_path):
    draw(tmp_path, *CLASSES_OF["train"], *CLASSES_OF["val"], "more/cat", "more/owl", "hospital b/cat", "notes")
    splits, report = images.load(tmp_path)
    assert list(splits) == ["train", "val"]
    assert report.endswith("left out: 'hospital b' (a split's name must be 1 to 40 letters, digits, _ or -, not "
                           "'hospital b'), 'more' ('owl' in it is no class of train or val), 'notes'")


def test_a_folder_named_like_a_split_of_drawn_scenes_is_left_out_since_results_would_take_it_for_that(tmp_path):
    draw(tmp_path, *CLASSES_OF["train"], *CLASSES_OF["val"], *(f"{name}/cat" for name in scenes.SPLITS), "ID2/cat")
    splits, report = images.load(tmp_path)
    assert list(splits) == ["train", "val", "ID2"]
    for name in ("id", "crowded", "pairs", "walk3", "walk4"):
        assert f"{name!r} (the split {name!r} must have another name" in report


def test_a_test_folder_without_classes_is_left_out_where_another_has_them(tmp_path):
    draw(tmp_path, *CLASSES_OF["train"], *CLASSES_OF["test"], "val")
    _, report = images.load(tmp_path)
    assert report.endswith("; val is the folder 'test'; left out: 'val'")


@pytest.mark.parametrize("places", [("train/cat", "train/dog", "test"), ("train", "val"), ("train", "test/cat")])
def test_split_folders_without_class_folders_are_an_error(tmp_path, places):
    with pytest.raises(ValueError, match=r"its folder '\w+' holds no class folders; expected .*DIR/val/<class>"):
        images.load(draw(tmp_path, *places))


def test_a_folder_that_only_wraps_another_is_read_as_that_one(tmp_path):
    two_splits(tmp_path / "zip/pets")
    (tmp_path / "README.md").write_text("pets")
    (tmp_path / "__MACOSX").mkdir()
    splits, report = images.load(tmp_path)
    assert ids(splits["val"]) == ["zip/pets/val/cat/a.png", "zip/pets/val/dog/a.png"]
    assert report == "images: 4 pictures, 2 classes; 2 train, 2 val; read from its folder 'zip/pets'"
    assert [s.answer for s in splits["val"]] == [s.answer for s in images.load(tmp_path / "zip/pets")[0]["val"]]


def test_a_wrapping_folder_without_an_end_is_an_error(tmp_path):
    (tmp_path / "again").symlink_to(".")
    with pytest.raises(ValueError, match="it holds a single folder, which holds a single folder, 8 deep; expected"):
        images.load(tmp_path)


def test_classes_inside_of_classes_are_an_error_that_names_what_was_seen(tmp_path):
    draw(tmp_path, "pets/cat", "pets/dog", "wild/fox", "wild/owl")
    with pytest.raises(ValueError, match="hold folders, not pictures, as in 'pets/cat'; expected DIR/<class>.*move"):
        images.load(tmp_path)
    save(noise(9), tmp_path / "plants/a.png")           # one class is as it should be: the others are named
    with pytest.raises(ValueError, match=r"'pets' is left with no usable picture \(2 sub-folders\); class 'wild' is"):
        images.load(tmp_path)


# Small classes

def test_every_class_of_two_pictures_or_more_falls_on_both_sides(tmp_path):
    seeds = iter(range(200))
    for name in range(60):
        for _ in range(2 + name % 2):
            seed = next(seeds)
            save(noise(seed), tmp_path / f"c{name:02}/{seed}.png")
            save(noise(seed), tmp_path / f"c{name:02}/{seed} copy.bmp")
    splits, report = images.load(tmp_path)
    for samples in splits.values():
        assert len({sample.answer for sample in samples}) == 60
    train, val = ({pixel_hash(sample.images[0]) for sample in splits[side]} for side in ("train", "val"))
    assert not train & val and len(train | val) == 150
    again = sum(split_of(key, 20) == "val" for key in train) + sum(split_of(key, 20) == "train" for key in val)
    assert again and f"{again} moved to the other split, so that each has every class" in report
    assert splits == images.load(tmp_path)[0]


def test_only_a_class_that_lacks_a_side_is_split_otherwise():
    keys = [f"{n:064x}" for n in (5, 150, 160, 170, 199)]       # at 20 percent: val, and train for the others
    assert sides(keys, 20) == {key: split_of(key, 20) for key in keys}
    assert [sides(keys[1:], 20)[key] for key in keys[1:]] == ["val", "train", "train", "train"]
    assert [sides(keys[:4], 99)[key] for key in keys[:4]] == ["val", "val", "val", "train"]
    assert sides(keys[1:2], 20) == {keys[1]: "train"} and sides([], 20) == {}


def test_a_larger_val_percent_only_adds_to_the_val_of_a_small_class():
    keys = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]
    found = [{key for key, side in sides(keys, percent).items() if side == "val"} for percent in range(1, 100)]
    assert all(0 < len(val) < 4 for val in found) and all(a <= b for a, b in zip(found, found[1:]))


def test_data_that_names_no_source_is_an_error():
    for data in ("nonsense:x", "nonsense", "", "images", "images:", "jsonl:", "llava:", "scenes:x", ":"):
        expected = "scenes, monitors, images:DIR, torchvision:NAME@DIR, jsonl:FILE, records:FILE or llava:FILE"
        with pytest.raises(ValueError, match=f"^--data={data} must be {expected}$"):
            real_data(data, 20)


def test_training_answers_that_all_count_as_the_same_are_an_error(tmp_path):
    path = write(tmp_path, {**GOOD, "answer": 1}, {**GOOD, "answer": "1.0"}, {**GOOD, "image": "b.png"})
    with pytest.raises(ValueError, match="all training answers are '1.0'; there is nothing to tell apart"):
        real_data(f"jsonl:{path}", 50)


# What a folder can be wrong in

def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    for folder in (str(tmp_path / "nowhere"), ""):
        with pytest.raises(ValueError, match=f"folder '{folder}' does not exist; expected DIR/<class>"):
            images.load(folder)


def test_a_file_instead_of_a_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png' is a file; expected a folder"):
        images.load(save(noise(0), tmp_path / "a.png"))


def test_a_folder_without_class_folders_is_an_error(tmp_path):
    save(noise(0), tmp_path / "loose.png")
    with pytest.raises(ValueError, match="has no class sub-folders"):
        images.load(tmp_path)


def test_one_class_is_an_error(tmp_path):
    save(noise(0), tmp_path / "cat/a.png")
    with pytest.raises(ValueError, match="one class only, 'cat': nothing to tell apart"):
        images.load(tmp_path)


def test_a_class_left_without_a_usable_picture_is_an_error_that_counts_what_was_there(tmp_path):
    two_classes(tmp_path)
    (tmp_path / "owl").mkdir()
    with pytest.raises(ValueError, match=r"class 'owl' is left with no usable picture \(empty\)"):
        load50(tmp_path)
    for name in ("a.jpg", "b.txt", "c.svg"):
        (tmp_path / "owl" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"class 'owl' .* \(2 not pictures, 1 unreadable\)"):
        load50(tmp_path)


def test_all_classes_that_lack_pictures_are_listed_at_once(tmp_path):
    two_classes(tmp_path)
    for name in range(8):
        (tmp_path / f"empty{name}").mkdir()
        save(noise(100 + name), tmp_path / f"single{name}/a.png")
    with pytest.raises(ValueError, match=r"class 'empty0' is left .*'empty7' is left .* class 'single1' \(1 in \w+\); "
                                         "and 6 more; expected .*; add such pictures") as caught:
        load50(tmp_path)
    assert "single2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("split, other", [("train", "val"), ("val", "train")])
def test_a_class_that_the_hash_leaves_out_of_a_split_is_an_error_that_says_what_to_do(tmp_path, split, other):
    save(noise_in(other, start=100), two_classes(tmp_path) / "owl/a.png")
    with pytest.raises(ValueError, match=rf"{split} has no picture of class 'owl' \(1 in {other}\); add such "
                                         "pictures, or make train/ and val/"):
        load50(tmp_path)


def test_a_class_folder_without_a_name_is_an_error(tmp_path):
    save(noise(0), two_classes(tmp_path) / "_/a.png")
    with pytest.raises(ValueError, match="names no class"):
        load50(tmp_path)


def test_the_drawn_folder_loads_with_all_its_classes_and_is_the_same_for_a_seed(tmp_path):
    one, two = (draw_folder(tmp_path / name, per_class=4, seed=3) for name in ("one", "two"))
    names = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert len(names) == 24 and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        for name in names:
            if int(name.stem) in numbers:
                (tmp_path / "given" / split / name).parent.mkdir(parents=True, exist_ok=True)
                (one / name).rename(tmp_path / "given" / split / name)
    splits, _ = images.load(tmp_path / "given")
    assert len(splits["train"]) == 18 and splits["val"][0].choices == tuple(sorted(CLASSES))


# A jsonl file

GOOD = {"image": "a.png", "question": "What colour?", "answer": "red"}


def write(folder, *lines):
    """a.png falls in train and b.png in val at val_percent=50; lines are dicts, str or bytes."""
    save(noise_in("train"), folder / "a.png")
    save(noise_in("val"), folder / "b.png")
    raw = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
           for line in lines]
    (folder / "mine.jsonl").write_bytes(b"\n".join(raw))
    return folder / "mine.jsonl"


def test_a_line_becomes_a_sample(tmp_path):
    path = write(tmp_path, {**GOOD, "reasoning": " It is red. ", "aliases": ["crimson"], "choices": ["red", "blue"],
                            "id": 7, "caption": "a red thing"}, {**GOOD, "image": "b.png", "answer": 3})
    splits, report = jsonl.load(path, val_percent=50)
    (first,), (second,) = splits["train"], splits["val"]
    assert first.images == (str(tmp_path / "a.png"),) and first.question == "What colour?" and first.source == "jsonl"
    assert first.reasoning == "It is red." and first.answer == first.conclusion == "red" and first.id == "7"
    assert first.aliases == ("crimson",) and first.choices == ("red", "blue") and first.caption == "a red thing"
    assert second.answer == second.caption == "3" and second.reasoning == second.conclusion == ""
    assert second.id == "mine.jsonl:2" and (first.split, second.split) == ("train", "val")
    assert report == "jsonl: 2 lines about 2 pictures; 1 train, 1 val; 1 with reasoning"


def test_the_answer_zero_is_an_answer(tmp_path):
    measured = {"answer": 0.5, "tolerance": 0.1, "unit": "cm", "boxes": [[0, 1, 2.5, 3]]}
    samples = both(jsonl.load(write(tmp_path, GOOD, {**GOOD, "image": "b.png", **measured}), 50)[0])
    assert {(s.tolerance, s.unit, s.boxes) for s in samples} == {(0.0, "", ()), (0.1, "cm", ((0.0, 1.0, 2.5, 3.0),))}
    letters = {"answer": "B", "choices": ["blue", "red"], "question": "Which? (A) blue (B) red"}
    sample = both(jsonl.load(write(tmp_path, {**GOOD, **letters}, {**GOOD, "image": "b.png"}), 50)[0])[0]
    assert sample.answer in ("B", "red")
    splits, _ = jsonl.load(write(tmp_path, {**GOOD, "answer": 0}, {**GOOD, "image": "b.png", "answer": 0.5}), 50)
    assert [sample.answer for sample in both(splits)] == ["0", "0.5"]


@pytest.mark.parametrize("line", [
    {"question": "a" * 20_000},
    {"answer": "blue", "aliases": ["red", "crimson"], "choices": ["red", "crimson", "green"]},
    {"answer": "A", "choices": [".", ","], "question": "Which? (A) . (B) ,"},
    {"answer": 1, "choices": [1, 2.5, 4], "tolerance": 1},
    {"answer": "1 cm", "choices": ["1 cm", "2 cm"], "unit": "cm"},
])
def test_lines_at_the_edge_of_what_can_be_judged_are_accepted(tmp_path, line):
    assert len(both(jsonl.load(write(tmp_path, {**GOOD, **line}, {**GOOD, "image": "b.png"}), 50)[0])) == 2


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = write(tmp_path, "", json.dumps(GOOD) + "\r", "  \r", {**GOOD, "image": "b.png", "caption": None}, "")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [sample.id for sample in both(jsonl.load(path, 50)[0])] == ["mine.jsonl:2", "mine.jsonl:4"]


def test_lines_about_one_picture_fall_in_one_split(tmp_path):
    save(noise_in("val"), tmp_path / "copy.bmp")                           # the pixels of b.png
    names = ("a.png", "b.png", "copy.bmp", "b.png")
    splits, report = jsonl.load(write(tmp_path, *[{**GOOD, "image": name} for name in names]), 50)
    assert len(splits["train"]) == 1 and len(splits["val"]) == 3 and "4 lines about 2 pictures" in report


def test_a_given_split_overrides_the_hash(tmp_path):
    path = write(tmp_path, {**GOOD, "split": "val"}, {**GOOD, "image": "b.png", "split": "train"})
    splits, _ = jsonl.load(path, 50)
    assert splits["val"][0].images[0].endswith("a.png") and splits["train"][0].images[0].endswith("b.png")


def test_one_picture_in_both_splits_is_an_error_that_names_both_lines(tmp_path):
    save(noise_in("train"), tmp_path / "copy.bmp")                         # the pixels of a.png
    path = write(tmp_path, GOOD, {**GOOD, "image": "b.png"}, {**GOOD, "image": "copy.bmp", "split": "val"})
    with pytest.raises(ValueError, match="line 3: it shows the same picture as line 1 but falls in val, not in train"):
        jsonl.load(path, 50)


def test_any_other_split_keeps_its_name_and_its_pictures_stand_nowhere_else(tmp_path):
    save(noise(7), tmp_path / "c.png")
    lines = [GOOD, {**GOOD, "image": "b.png"}, {**GOOD, "image": "c.png", "split": "hospital_b"}]
    splits, report = jsonl.load(write(tmp_path, *lines), 50)
    assert list(splits) == ["train", "val", "hospital_b"] and [len(samples) for samples in splits.values()] == [1, 1, 1]
    assert splits["hospital_b"][0].split == "hospital_b" and splits["hospital_b"][0].id == "mine.jsonl:3"
    assert report == "jsonl: 3 lines about 3 pictures; 1 train, 1 val, 1 hospital_b"
    with pytest.raises(ValueError, match="line 4: it shows the same picture as line 3 but falls in (train|val), not"):
        jsonl.load(write(tmp_path, *lines, {**GOOD, "image": "c.png"}), 50)


def test_a_split_of_ones_own_does_not_stand_in_for_val(tmp_path):
    path = write(tmp_path, GOOD, {**GOOD, "image": "b.png", "split": "test"})
    with pytest.raises(ValueError, match="no line falls in val .of 2 lines about 2 pictures"):
        jsonl.load(path, 50)


def test_samples_of_a_source_of_ones_own_are_divided_by_all_their_pictures():
    pictures = [encoded(noise(seed)) for seed in range(8)]
    division = Division(50)
    for number, picture in enumerate(pictures):
        division.put(Sample(id=str(number), images=(picture,), question="?", answer="a"), f"row {number}")
    division.check("row")
    for split, samples in division.splits.items():
        assert {split_of(pixel_hash(sample.images[0]), 50) for sample in samples} == {split}
    assert division.count == 8 and sum(map(len, division.splits.values())) == 8
    with pytest.raises(ValueError, match="it shows the same picture as row 3 but falls in far, not in"):
        division.put(Sample(images=(encoded(noise(9)), pictures[3]), split="far"), "row 8")
    with pytest.raises(ValueError, match="it shows the same picture as row 8"):         # not by its name
        division.put(Sample(images=(np.asarray(noise(9)),), split="near"), "row 9")


def test_unknown_fields_are_named_in_the_report(tmp_path):
    _, report = jsonl.load(write(tmp_path, {**GOOD, "reasonning": "x"}, {**GOOD, "image": "b.png"}), 50)
    assert report.endswith("unknown fields ignored: reasonning")


@pytest.mark.parametrize("line, complaint", [
    ("{", "not valid JSON"),
    ('{"image": "a.png", "question": "W", "answer": "red", "answer": "blue"}', "the key 'answer' stands more than on"),
    ('{"image": "a.png", "question": "W", "answer": "red", "answer": null}', "the key 'answer' stands more than once"),
    ({**GOOD, "question": "what " * 200_000}, "field 'question' has 1000000 characters and must have at most 20000"),
    ({**GOOD, "reasoning": "a" * 20_001}, "field 'reasoning' has 20001 characters and must have at most 20000"),
    ({**GOOD, "answer": "a" * 20_001}, "field 'answer' has 20001 characters"),
    ({**GOOD, "caption": "a" * 20_001}, "field 'caption' has 20001 characters"),
    ({**GOOD, "aliases": ["red", "a" * 20_001]}, r"field 'aliases\[1\]' has 20001 characters"),
    ({**GOOD, "answer": "..."}, "the answer '...' can never be right: it is nothing but full stops and spaces"),
    ({**GOOD, "answer": "\u200b"}, r"the answer '\\u200b' can never be right: it holds no visible character"),
    ({**GOOD, "aliases": ["crimson", ". ."]}, "the answer '. .' can never be right"),
    ({**GOOD, "choices": ["red", "blue", "Blue."]}, "the choices 'blue' and 'Blue.' count as the same answer"),
    ({**GOOD, "choices": ["red", "red"]}, "the choices 'red' and 'red' count as the same answer"),
    ({**GOOD, "answer": 1, "choices": [1, "01", 2]}, "the choices '1' and '01' count as the same answer"),
    ({**GOOD, "answer": "1", "choices": ["1", "1 cm"], "unit": "cm"}, "the choices '1' and '1 cm' count as the same"),
    ({**GOOD, "answer": 1, "choices": [1, 2, 3], "tolerance": 1},
     "the choice '2' counts as right beside the answer '1': it is within 1 of 1"),
    ({**GOOD, "question": "(A) (b (B) red", "choices": ["(b", "red"]},
     r"the choice '\(b' counts as right beside the answer 'red': it is choice b"),
    ('{"answer": NaN}', "not valid JSON .*NaN"),
    ("[" * 100_000, "not valid JSON"),
    ("[1]", "expected a JSON object with image, question, answer, not list"),
    (b'{"image": "\xff"}', "not UTF-8 text"),
    (json.dumps({**GOOD, "question": "\ud800"}), "not UTF-8 text"),
    ({"image": "a.png", "question": "What?"}, "field 'answer' is missing"),
    ({**GOOD, "question": None}, "field 'question' is missing"),
    ({**GOOD, "question": 3}, "field 'question' must be a string, not int"),
    ({**GOOD, "answer": ["red"]}, "field 'answer' must be a string or a number, not list"),
    ({**GOOD, "answer": True}, "field 'answer' must be a string or a number, not bool"),
    ({**GOOD, "answer": " "}, "field 'answer' is empty"),
    ({**GOOD, "aliases": "red"}, "field 'aliases' must be a list of strings, not str"),
    ({**GOOD, "choices": ["red", None]}, r"field 'choices\[1\]' must be a string or a number, not NoneType"),
    ({**GOOD, "choices": ["blue", "green"]}, "the answer 'red' is not among the choices"),
    ({**GOOD, "answer": "c", "choices": ["blue", "green"]}, "the answer 'c' is not among the choices"),
    ({**GOOD, "tolerance": "1"}, "field 'tolerance' must be a finite number, not '1'"),
    ({**GOOD, "tolerance": -1}, "field 'tolerance' must not be negative"),
    ({**GOOD, "unit": 3}, "field 'unit' must be"),
    ({**GOOD, "boxes": [1, 2, 3, 4]}, "field 'boxes' must be a list of"),
    ({**GOOD, "boxes": [[0, 0, 1]]}, "field 'boxes' must be a list of"),
    ({**GOOD, "boxes": [[2, 0, 1, 1]]}, "with x1 < x2 and y1 < y2"),
    ({**GOOD, "boxes": [[0, 0, 1, True]]}, "field 'boxes' must be a finite number, not True"),
    ({**GOOD, "split": "test"}, "it shows the same picture as line 1 but falls in test, not in train; give both"),
    ({**GOOD, "split": "b c"}, "a split's name must be 1 to 40 letters, digits, _ or -, not 'b c'"),
    ({**GOOD, "split": "a" * 41}, "a split's name must be 1 to 40 letters"),
    ({**GOOD, "split": "Train"}, "the split 'Train' must be written 'train'"),
    ({**GOOD, "split": "pairs"}, r"the split 'pairs' must have another name, which no split of drawn scenes has \(id,"),
    ({**GOOD, "image": "nowhere.png"}, r"nowhere\.png' does not exist"),
    ({**GOOD, "image": "."}, "cannot be read as a picture"),
    ({**GOOD, "image": "mine.jsonl"}, r"mine\.jsonl' cannot be read as a picture"),
    ({**GOOD, "image": "a\0.png"}, "cannot be read as a picture"),
    ({**GOOD, "question": "<image> What?"}, "field 'question' holds the tag <image>"),
    ({**GOOD, "answer": "red</answer>"}, "field 'answer' holds the tag </answer>"),
    ({**GOOD, "reasoning": "<think>Red.</think>"}, "field 'reasoning' holds the tag <think>"),
])
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=rf"mine\.jsonl', line 4: .*{complaint}") as caught:
        jsonl.load(write(tmp_path, GOOD, "", {**GOOD, "image": "b.png"}, line), 50)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_a_jsonl_file_that_does_not_exist_is_a_folder_or_is_empty_is_an_error(tmp_path):
    for path, complaint in ((tmp_path / "nowhere.jsonl", "does not exist"), (tmp_path, "is a folder"),
                            (write(tmp_path, " ", ""), "is empty")):
        with pytest.raises(ValueError, match=f"jsonl file .*{complaint}; expected"):
            jsonl.load(path)


def test_a_split_without_lines_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no line falls in val .of 2 lines about 1 pictures.; add pictures, or give"):
        jsonl.load(write(tmp_path, GOOD, GOOD), 50)
