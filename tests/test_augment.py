"""Random changes to the pictures of contrastive training, --augment."""
import numpy as np
import pytest
import torch

import train
from data.augment import augmented, names_in
from data.sample import Sample
from data.supply import DataOptions
from model.runs.config import change


def noise(seed, size=12):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def samples_of(answers, start=0):
    return [Sample(id=str(n), images=(noise(start + n),), answer=answer, caption=answer)
            for n, answer in enumerate(answers)]


def test_a_flip_mirrors_some_pictures_and_leaves_the_others_as_they_are():
    samples = samples_of("a" * 40)
    changed = augmented(samples, 12, ("flip",), seed=3)
    mirrored = 0
    for before, after in zip(samples, changed):
        same = np.array_equal(before.images[0], after.images[0])
        flipped = np.array_equal(before.images[0][:, ::-1], after.images[0])
        assert same != flipped
        mirrored += flipped
    assert 5 < mirrored < 35


def test_a_crop_of_one_colour_keeps_it_and_a_change_of_colour_keeps_a_plain_picture_plain():
    halves = np.zeros((12, 12, 3), dtype=np.uint8)
    halves[:, 6:] = 200
    sample = Sample(images=(halves,))
    cropped = [one.images[0] for one in augmented([sample] * 20, 12, ("crop",), seed=0)]
    assert len({array.tobytes() for array in cropped}) > 5
    assert all(array.shape == (12, 12, 3) and array[:, 0].max() < 40 and array[:, -1].min() > 160 for array in cropped)
    plain = Sample(images=(np.full((12, 12, 3), (180, 60, 60), dtype=np.uint8),))
    for one in augmented([plain] * 20, 12, ("colour",), seed=0):
        assert len(np.unique(one.images[0].reshape(-1, 3), axis=0)) == 1 and one.images[0][0, 0].argmax() == 0


def test_changes_follow_the_seed_alone_and_leave_the_streams_of_the_run_alone():
    samples = samples_of("abcdefgh")
    torch.manual_seed(5)
    first = augmented(samples, 12, ("crop", "colour", "flip"), seed=1)
    after = torch.rand(1)
    second = augmented(samples, 12, ("flip", "crop", "colour"), seed=1)
    other = augmented(samples, 12, ("flip", "crop", "colour"), seed=2)
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, second))
    assert not all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, other))
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert [(one.id, one.caption) for one in first] == [(one.id, one.caption) for one in samples]


@pytest.mark.parametrize("text", ["flip,", "rotate", "flip,flip", "flip, crop", "Flip"])
def test_a_change_that_is_not_known_is_one_sentence(text):
    with pytest.raises(ValueError, match=f"^--augment={text} must be some of flip, crop, colour, each once"):
        DataOptions(data="images:x", augment=text)


def test_drawn_scenes_are_not_changed_and_a_run_without_clip_is_told():
    said = "^--augment=flip must be left out with drawn pictures, whose captions say what"
    with pytest.raises(ValueError, match=said):
        DataOptions(augment="flip")
    assert names_in("") == () and names_in("crop,flip") == ("crop", "flip")
    cfg = change(train.Config(), data="images:x", augment="flip", stage="align,sft", init="x")
    assert any(note.startswith("--augment has no effect without") for note in cfg.idle_notes(cfg.stages(), "images"))
