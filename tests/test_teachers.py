"""Teachers of one's own, and what the shape probe tells of an encoder."""
from types import SimpleNamespace

import pytest
import torch

from data import scenes, teachers
from data.answers import commonest_answer
from data.sample import Sample
from data.shape_probe import shape_probe

GOOD = """
import dataclasses

@dataclasses.dataclass
class Chain:
    start: str

def teach(sample, rng):
    chain = Chain("I see " + sample.caption)
    if rng.random() < 0.5:
        return chain.start + " . so it is " + sample.answer, sample.answer
    return chain.start, "no idea"

not_a_function = 3
"""


@pytest.fixture
def own(tmp_path):
    """own(text) -> FILE.py:teach of a file that holds this text."""
    def write(text, name="teach"):
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path / 'mine.py'}:{name}"
    return write


def test_a_teacher_of_ones_own_teaches_drawn_scenes_and_real_pictures(own):
    teach = teachers.own_teacher(own(GOOD))
    real = [Sample(id=str(n), images=(b"any",), answer="cat", caption="a cat") for n in range(40)]
    for samples in (scenes.load("train", 40, 0), real):
        chains = teachers.taught(samples, teach, seed=3)
        for sample, chain in zip(samples, chains):
            assert chain.reasoning.startswith(f"I see {sample.caption}")
            assert chain.conclusion in (sample.answer, "no idea") and chain.images is sample.images
            assert (chain.id, chain.question, chain.answer) == (sample.id, sample.question, sample.answer)
        assert 5 < sum(teachers.is_conclusion_right(chain) for chain in chains) < 35


def test_a_teachers_chains_depend_on_the_seed_and_not_on_the_samples_before(own):
    teach = teachers.own_teacher(own(GOOD))
    samples = scenes.load("train", 60, 0)
    chains = teachers.taught(samples, teach, 3)
    assert chains == teachers.taught(samples, teach, 3)
    assert [c.conclusion for c in chains] != [c.conclusion for c in teachers.taught(samples, teach, 4)]

    def greedy(sample, rng):                        # draws more numbers for some samples than for others
        for _ in range(len(sample.question)):
            rng.random()
        return "so", str(rng.random())
    one, other = (teachers.taught([Sample(question=text), Sample()], greedy, 0)[1] for text in ("", "long"))
    assert one.conclusion == other.conclusion


@pytest.mark.parametrize("spec, complaint", [
    ("mine.py", "must be FILE.py:NAME"), ("mine.txt:teach", "must be FILE.py:NAME"),
    ("mine.py:", "must be FILE.py:NAME"),
    ("mine.py:a b", "must be FILE.py:NAME"), ("/nowhere/mine.py:teach", "the file '/nowhere/mine.py' does not exist")])
def test_a_teacher_that_names_no_file_is_an_error(spec, complaint):
    with pytest.raises(ValueError, match=f"^teacher '{spec}'.* {complaint}"):
        teachers.own_teacher(spec)


@pytest.mark.parametrize("text, name, complaint", [
    ("def teach(:", "teach", "cannot be loaded: SyntaxError: "),
    ("import nowhere_at_all", "teach", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere_at_all'$"),
    ("raise SystemExit(3)", "teach", "cannot be loaded: SystemExit: 3$"),
    ("raise RuntimeError", "teach", "cannot be loaded: RuntimeError: no message$"),
    (GOOD, "teacher", "has no function 'teacher'$"), (GOOD, "not_a_function", "has no function 'not_a_function'$")])
def test_a_file_that_holds_no_teacher_is_an_error_of_one_sentence(own, text, name, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        teachers.own_teacher(own(text, name))
    assert "\n" not in str(caught.value) and "mine.py" in str(caught.value)


@pytest.mark.parametrize("chain, complaint", [
    ("so", r"expected \(reasoning, conclusion\), not 'so'"), (("so",), "expected"), (None, "expected"),
    ((3, "two"), "the reasoning must be a string, not int"),
    (("so", None), "the conclusion must be a string, not None"),
    ((" \n", "two"), "the reasoning is empty"), (("so", ""), "the conclusion is empty"),
    (("so</think>", "two"), "the reasoning holds the tag </think>"),
    (("so", "<answer>two"), "the conclusion holds the tag <answer>"),
    (("<image> so", "two"), "the reasoning holds the tag <image>")])
def test_what_no_model_can_be_taught_is_an_error_that_names_the_sample(chain, complaint):
    samples = [Sample(id="first"), Sample(id="second")]
    with pytest.raises(ValueError, match=f"^teacher, sample 'second': {complaint}"):
        teachers.taught(samples, lambda sample, rng: chain if sample.id == "second" else ("so", "two"), 0)


def test_a_teacher_that_raises_is_an_error_that_names_the_sample():
    def teach(sample, rng):
        return {}["missing"]
    with pytest.raises(ValueError, match="^teacher, sample 'a7': KeyError: 'missing'$"):
        teachers.taught([Sample(id="a7")], teach, 0)


class Tower:
    """Stands in for an image tower: its tokens are the pixels of the cells, so that shapes can be read off."""
    config = SimpleNamespace(patches=16, image_size=48)
    proj = torch.zeros(1)

    def features(self, pixels, layer):
        assert layer == -2
        cells = pixels.unfold(2, 12, 12).unfold(3, 12, 12)              # (B, 3, 4, 4, 12, 12)
        grey = (cells.permute(0, 2, 3, 1, 4, 5).flatten(4) - cells.amax((4, 5)).permute(0, 2, 3, 1)[..., None]).mean(3)
        return grey.flatten(1, 2)                                       # (B, 16, 144)


def test_the_shape_probe_reads_shapes_where_they_are_and_only_chance_where_they_are_not():
    seen = shape_probe(Tower(), -2, scenes_each=300)
    assert seen["id"] > 0.55
    blind = Tower()
    blind.features = lambda pixels, layer: torch.randn(len(pixels), 16, 8, generator=torch.Generator().manual_seed(0))
    assert abs(shape_probe(blind, -2, scenes_each=300)["id"] - 0.25) < 0.06
    blind.config = SimpleNamespace(patches=9, image_size=48)
    with pytest.raises(ValueError, match="the shape probe needs one patch for each cell"):
        shape_probe(blind, -2)


def test_the_commonest_answer_is_found_and_counted_by_the_checker():
    samples = [Sample(answer=answer) for answer in ("cat", "1", "1.0", "dog", "Cat.", "01")]
    assert commonest_answer(samples) == ("1", 0.5)
    near = [Sample(answer="3", tolerance=1.0), Sample(answer="3"), Sample(answer="4", tolerance=1.0)]
    assert commonest_answer(near) == ("3", 1.0)
