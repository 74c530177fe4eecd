"""Teachers: where chains of thought come from, and how wrong they are.

    SceneTeacher        of drawn scenes: (scene, rng) -> (reasoning, conclusion)
    candidate_chains    of real pictures: names what the encoder thinks of, then chooses
    own_teacher         a function of one's own, for both: (sample, rng) -> (reasoning, conclusion)

The scene teacher always follows one procedure, step by step, and is wrong in ways that do not
average out: imitation learns its misconceptions along with its method.
"""
import hashlib
import importlib.util
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import scenes
from data.answers import is_right
from data.chat import ALL_TAGS, IMAGE, staged_text, target_text
from model.runs.config import check_fields, choice, first_line, number


@dataclass(frozen=True)
class TeacherOptions:
    """who writes the chains of thought, and how wrong they are"""
    teacher: str = ""                              # FILE.py:NAME(sample, rng); teach: a URL or model too; empty: ours
    cot_format: str = choice("think", "llava_cot")  # tags of the chains
    slip: float = number(0.06, "[0, 1]")           # drawn pictures: each step goes wrong at random
    confuse: float = number(0.65, "[0, 1]")        # purple is read as blue, cyan as green; monitors: 3 as 8, 8 as 3
    drop_hop: float = number(0.60, "[0, 1]")       # a walk's last hop is forgotten; monitors: the trace
    forget_close: float = number(0.60, "[0, 1]")   # </think>, or </REASONING>, is left out
    teacher_error: float = number(0.30, "[0, 1]")  # real pictures: names a wrong candidate
    candidates: int = number(3, "[2, 1000]")       # answers a chain on a real picture weighs

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class SceneTeacher:
    """The error model. All rates are probabilities; with all zero the chains are flawless.

    slip: each step (find the start, one hop, read a cell, spot one object when counting) goes wrong
    at random. confuse: purple is read as blue, cyan as green. drop_hop: the last hop of a walk of
    two or more is forgotten.
    """
    slip: float = 0.06
    confuse: float = 0.65
    drop_hop: float = 0.60

    def __call__(self, scene, rng):
        """-> (reasoning, conclusion)"""
        _, reasoning, conclusion = self._chain(scene, rng)
        return reasoning, conclusion

    def sections(self, scene, rng):
        """-> (summary, caption, reasoning, conclusion), LLaVA-CoT's four sections: the plan, what
        it takes to stand in the cells that it looks at, and what __call__ gives."""
        noticed, reasoning, conclusion = self._chain(scene, rng)
        return plan(scene.question.kind), " , ".join(noticed), reasoning, conclusion

    def _chain(self, scene, rng):
        """-> (entries of a caption, reasoning, conclusion)"""
        question = scene.question
        if question.kind == "at":
            read = question.meant(self._read(scene, question.cell, rng))
            noticed = f"{scenes.name(question.cell)} {read}"
            return [noticed], noticed, read
        if question.kind == "count":
            return self._count(scene, rng)
        return self._walk(scene, rng)

    def _count(self, scene, rng):
        """Names the cell of each object that it counts, then their number."""
        word = scene.question.word
        colors = {thing.cell: self._color(thing, rng) for thing in scene.things}
        seen = [thing for thing in scene.things if word in (colors[thing.cell], thing.shape)]
        if rng.random() < self.slip * 2:
            # Overlooks one, or counts a stranger.
            others = [thing for thing in scene.things if thing not in seen]
            if seen and (not others or rng.random() < 0.5):
                seen.remove(rng.choice(seen))
            elif others:
                seen.append(rng.choice(others))
        total = scenes.NUMBERS[min(len(seen), len(scenes.NUMBERS) - 1)]
        noticed = []
        for thing in seen:
            noticed.append(f"{scenes.name(thing.cell)} {colors[thing.cell]} {thing.shape}")
        cells = [scenes.name(thing.cell) for thing in seen]
        return noticed or [scenes.NOTHING], " ".join([*cells, total]), total

    def _walk(self, scene, rng):
        """Names the start and its cell, each hop and the cell it leads to, and what stands at the
        end."""
        question = scene.question
        cell = question.start.cell
        if rng.random() < self.slip:
            cell = self._other_cell(cell, rng)
        steps = [question.start.words, scenes.name(cell)]
        noticed = [f"{scenes.name(cell)} {question.start.words}"]
        hops = question.hops
        if len(hops) > 1 and rng.random() < self.drop_hop:
            hops = hops[:-1]
        for hop in hops:
            hop = question.meant(hop)
            goes = hop if rng.random() >= self.slip else rng.choice(list(scenes.HOPS))
            cell = scenes.step(cell, goes) or cell  # a slip may run into the edge, where it stays
            steps += [hop, scenes.name(cell)]
        read = self._read(scene, cell, rng)
        noticed.append(f"{scenes.name(cell)} {read}")
        return noticed, " ".join([*steps, read]), read

    def _color(self, thing, rng):
        """The colour that it takes an object for."""
        wrong = {"purple": "blue", "cyan": "green"}.get(thing.color)
        if wrong and rng.random() < self.confuse:
            return wrong
        return thing.color

    def _read(self, scene, cell, rng):
        """Words of what it takes to stand in a cell."""
        if rng.random() < self.slip:
            return rng.choice(scene.things).words
        if cell not in scene.by_cell:
            return scenes.NOTHING
        thing = scene.by_cell[cell]
        return f"{self._color(thing, rng)} {thing.shape}"

    @staticmethod
    def _other_cell(cell, rng):
        near = [scenes.step(cell, hop) for hop in scenes.HOPS]
        return rng.choice([other for other in near if other])


def plan(kind):
    """The summary of a chain: how a question of this kind is answered."""
    if kind == "count":
        return LIST_PLAN
    return WALK_PLAN


LIST_PLAN = "list things then answer"
WALK_PLAN = "go there then answer"

PERFECT = SceneTeacher(slip=0.0, confuse=0.0, drop_hop=0.0)


def is_conclusion_right(sample):
    """Whether the teacher's answer is the gold one, as rewards and evaluation judge it."""
    return is_right(sample, sample.conclusion)


# ---------------------------------------------------------------- real pictures

def candidate_chains(samples, nearest, error, seed, answers):
    """Chains for real pictures: name the candidates, then choose one. Samples that bring their
    reasoning keep it.

    nearest: for each sample the answers its picture looks most like, best first, as
    `zero_shot.ZeroShot` gives them; empty for one that brings its reasoning. The teacher is wrong
    with probability `error`, and then names another of its candidates; the gold answer takes the
    last place among the candidates when the encoder did not think of it. Returns the samples with
    reasoning and conclusion.
    """
    rng = random.Random(f"teacher {seed}")
    chains = []
    for sample, candidates in zip(samples, nearest):
        if sample.reasoning:
            chains.append(sample)
            continue
        candidates = list(candidates)
        if sample.answer not in candidates:
            candidates[-1:] = [sample.answer]
        wrong = [answer for answer in candidates if answer != sample.answer]
        if not wrong:
            wrong = [answer for answer in answers if answer != sample.answer]
        choice = sample.answer
        if wrong and rng.random() < error:
            choice = rng.choice(wrong)
        reasoning = f"it looks like {' or '.join(candidates)} . it is {choice}"
        chains.append(replace(sample, reasoning=reasoning, conclusion=choice))
    return chains


# ---------------------------------------------------------------- a teacher of one's own

def own_teacher(spec):
    """"FILE.py:NAME" -> the function NAME of that file, (sample, rng) -> (reasoning, conclusion).

    The file is executed in this process, as an import would. Raises ValueError, one sentence, when
    the file is missing or fails to load, or has no such function.
    """
    file_name, _, name = spec.rpartition(":")
    if not file_name.endswith(".py") or not name.isidentifier():
        raise ValueError(f"teacher {spec!r} must be FILE.py:NAME, the name of a function in a file")
    path = Path(file_name).expanduser()
    if not path.is_file():
        raise ValueError(f"teacher {spec!r}: the file {file_name!r} does not exist")
    # A name of its own for every file: pickle and dataclasses look modules up by it.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    module_spec = importlib.util.spec_from_file_location(f"seethink_teacher_{digest}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_spec.name]
        reason = first_line(error, "no message")
        raise ValueError(f"teacher {spec!r}: the file {file_name!r} cannot be loaded: "
                         f"{type(error).__name__}: {reason}") from None
    teach = getattr(module, name, None)
    if not callable(teach):
        raise ValueError(f"teacher {spec!r}: the file {file_name!r} has no function {name!r}")
    return teach


def taught(samples, teach, seed):
    """The samples with the reasoning and the conclusion that `teach(sample, rng)` gives.

    rng: a random.Random of each sample's own, made from `seed` and the sample's place, so that a
    chain does not depend on how many numbers were drawn for the samples before it. Raises
    ValueError naming the sample when `teach` raises, or gives anything but two texts that a model
    can be taught: not empty, without the tags that the template sets itself.
    """
    chains = []
    for place, sample in enumerate(samples):
        rng = random.Random(f"teacher {seed} {place}")
        where = f"teacher, sample {sample.id!r}"
        try:
            chain = teach(sample, rng)
        except Exception as error:          # the function is anyone's
            reason = first_line(error, "no message")
            raise ValueError(f"{where}: {type(error).__name__}: {reason}") from error
        if not isinstance(chain, (tuple, list)) or len(chain) != 2:
            raise ValueError(f"{where}: expected (reasoning, conclusion), not {chain!r}")
        for field, text in zip(("reasoning", "conclusion"), chain):
            problem = _problem(text)
            if problem:
                raise ValueError(f"{where}: the {field} {problem}")
        reasoning, conclusion = chain
        chains.append(replace(sample, reasoning=reasoning, conclusion=conclusion))
    return chains


def _problem(text):
    """Why a text cannot be taught, as the end of a sentence; "" when it can."""
    if not isinstance(text, str):
        return f"must be a string, not {type(text).__name__}"
    if not text.strip():
        return "is empty"
    for tag in (*ALL_TAGS, IMAGE):
        if tag in text:
            return f"holds the tag {tag}, which the prompt template sets itself"
    return ""


# ---------------------------------------------------------------- what a stage trains on

def records(samples, tokenizer, forget_close, seed, max_new, form="think"):
    """Samples with a teacher's chain -> ([(sample, target text)], a report of one or two lines).

    forget_close: the share of the chains that </think>, or </REASONING>, is left out of. max_new:
    tokens after which a model that learns from them is cut off. form: of data.chat.FORMS. Raises
    ValueError naming a sample that lacks what llava_cot needs, a summary or a caption.
    """
    forgets = np.random.default_rng(seed).random(len(samples)) < forget_close
    wrong = np.mean([not is_conclusion_right(sample) for sample in samples])
    texts = []
    for sample, forget in zip(samples, forgets):
        if form == "llava_cot":
            texts.append(four_sections(sample, close_reasoning=not forget))
        else:
            texts.append(target_text(sample.conclusion, sample.reasoning, close_think=not forget))
    left_out = "</REASONING>" if form == "llava_cot" else "</think>"
    report = (f"  teacher: {len(samples)} chains, {100 * wrong:.1f} % wrong, "
              f"{100 * forgets.mean():.0f} % without {left_out}")
    long = sum(len(tokenizer.encode(text)) >= max_new for text in texts)
    if long:
        report += (f"\nnote: {long} of {len(texts)} chains are longer than --max-new={max_new} "
                   "tokens: what is learned from them is cut off before the answer")
    return list(zip(samples, texts)), report


def four_sections(sample, close_reasoning=True):
    """A sample's chain in LLaVA-CoT's form. Raises ValueError naming the sample without a summary
    or a caption."""
    for field in ("summary", "caption"):
        problem = _problem(getattr(sample, field))
        if problem:
            raise ValueError(f"--cot-format=llava_cot: the {field} of sample {sample.id!r} {problem}")
    return staged_text(sample.summary, sample.caption, sample.reasoning, sample.conclusion, close_reasoning)
