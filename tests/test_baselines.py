"""Baselines of pictures in classes."""
import numpy as np
import torch

from data import baselines
from data.sample import Sample
from rl.report import inference
from rl.report.baselines import baseline_rows, baselines_text
from test_augment import samples_of         # pytest puts tests/ on the path


def test_the_nearest_pixels_are_those_of_brute_force_whatever_the_chunks(monkeypatch):
    shown = samples_of([f"class {n}" for n in range(11)])
    asked = samples_of("?" * 8, start=100)
    # Of two shown pictures that are equal, as of equally near ones, the first.
    shown.append(Sample(images=shown[2].images, answer="copy"))
    asked.append(Sample(images=shown[2].images))
    wanted = []
    for one in asked:
        distances = [((one.images[0].astype(float) - other.images[0]) ** 2).sum() for other in shown]
        wanted.append(shown[int(np.argmin(distances))].answer)
    assert wanted[-1] == "class 2" and len({*wanted}) > 3
    for chunk in (3, 5, 256):
        monkeypatch.setattr(baselines, "CHUNK", chunk)
        assert baselines.nearest_pixels(shown, asked, 12) == wanted


def test_the_majority_is_that_of_what_is_shown():
    assert baselines.majority(samples_of(["cat", "dog", "dog"]), samples_of(["cat"] * 4)) == ["dog"] * 4


def test_a_linear_probe_reads_what_is_linear_in_the_features_and_nothing_from_noise():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(3, size=300))
    middle = torch.eye(3, 8)[labels] * 3 + 100              # far from 0: the probe centres
    x = middle + torch.from_numpy(rng.normal(size=(300, 8))).float()
    read = baselines.linear_probe(x[:200], labels[:200], x[200:])
    assert (read == labels[200:]).float().mean() > 0.9
    blind = baselines.linear_probe(x[:200], labels[:200], x[torch.from_numpy(rng.permutation(100)) + 200])
    assert abs((blind == labels[200:]).float().mean() - 1 / 3) < 0.17


def test_a_linear_probe_learns_from_one_picture_a_class_and_from_a_feature_that_never_varies():
    x = torch.cat([torch.eye(3), torch.full((3, 1), 7.0)], dim=1)
    assert baselines.linear_probe(x, torch.arange(3), x[[2, 0, 1]] * 1.1).tolist() == [2, 0, 1]


def test_the_probe_reads_the_mean_of_a_pictures_tokens_made_as_the_tower_has_them():
    sizes = []

    def features(pixels):                                   # (B, 3, S, S) -> (B, 2, 3): the two halves' mean colours
        sizes.append(tuple(pixels.shape[1:]))
        return torch.stack([pixels[..., :4].mean((2, 3)), pixels[..., 4:].mean((2, 3))], dim=1)
    plain = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    shown = []
    for name, colour in plain.items():
        shown.append(Sample(images=(np.full((8, 8, 3), colour, dtype=np.uint8),), answer=name))
    pixels = dict(image_size=8, fit="crop", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert baselines.probed(shown * 2, shown, features, pixels) == [*plain]
    assert {*sizes} == {(3, 8, 8)}


def test_baselines_have_wilsons_interval_and_a_line_each():
    rows = baseline_rows({"majority class": {"val": [1, 0, 0, 0], "test": [0, 0]}, "linear probe": {"val": [1] * 4}}, 7)
    assert [(row["method"], row["split"], row["value"], row["n"], row["seed"]) for row in rows] == [
        ("majority class", "val", 0.25, 4, 7), ("majority class", "test", 0.0, 2, 7),
        ("linear probe", "val", 1.0, 4, 7)]
    assert (rows[0]["low"], rows[0]["high"]) == inference.wilson(0.25, 4)
    lines = baselines_text(rows).splitlines()
    assert len(lines) == 4 and lines[1].split() == ["val", "test"]
    assert lines[2].startswith("majority class") and "0.250 [0.05, 0.70]" in lines[2]
