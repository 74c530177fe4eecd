"""Teachers: where chains of thought come from, and how wrong they are.

A scene teacher is a function (scene, rng) -> (reasoning, conclusion). The biased teacher always follows one procedure,
step by step, and is wrong in ways that do not average out: imitation learns its misconceptions along with its method.
"""
import random
from dataclasses import dataclass, replace

import numpy as np

from data import scenes
from data.chat import normalise, target_text


@dataclass(frozen=True)
class SceneTeacher:
    """The error model. All rates are probabilities; with all zero the chains are flawless.

    slip: each step (find the start, one hop, read a cell, spot one object when counting) goes wrong at random.
    confuse: purple is read as blue, cyan as green.
    drop_hop: the last hop of a walk of two or more is forgotten.
    """
    slip: float = 0.06
    confuse: float = 0.65
    drop_hop: float = 0.60

    def __call__(self, scene, rng):
        q = scene.question
        if q.kind == "at":
            read = self._read(scene, q.cell, rng)
            return f"{scenes.name(q.cell)} {read}", read
        if q.kind == "count":
            seen = [thing for thing in scene.things if q.word in (self._color(thing, rng), thing.shape)]
            if rng.random() < self.slip * 2:
                # Overlooks one, or counts a stranger.
                others = [thing for thing in scene.things if thing not in seen]
                if seen and (not others or rng.random() < 0.5):
                    seen.remove(rng.choice(seen))
                elif others:
                    seen.append(rng.choice(others))
            total = scenes.NUMBERS[min(len(seen), len(scenes.NUMBERS) - 1)]
            return " ".join([scenes.name(thing.cell) for thing in seen] + [total]), total
        cell = q.start.cell
        if rng.random() < self.slip:
            cell = self._other_cell(cell, rng)
        steps = [q.start.words, scenes.name(cell)]
        hops = q.hops
        if len(hops) > 1 and rng.random() < self.drop_hop:
            hops = hops[:-1]
        for hop in hops:
            goes = hop if rng.random() >= self.slip else rng.choice(list(scenes.HOPS))
            cell = scenes.step(cell, goes) or cell      # a slip may run into the edge, where it stays
            steps += [hop, scenes.name(cell)]
        read = self._read(scene, cell, rng)
        return " ".join([*steps, read]), read

    def _color(self, thing, rng):
        wrong = {"purple": "blue", "cyan": "green"}.get(thing.color)
        return wrong if wrong and rng.random() < self.confuse else thing.color

    def _read(self, scene, cell, rng):
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


PERFECT = SceneTeacher(slip=0.0, confuse=0.0, drop_hop=0.0)


def is_conclusion_right(sample):
    """Whether the teacher's answer is the gold one; also what the checker filters chains by."""
    return normalise(sample.conclusion) == normalise(sample.answer)


def candidate_chains(samples, nearest, error, seed, answers):
    """Chains for real pictures: name the candidates, then choose one. Samples that bring their reasoning keep it.

    nearest: for each sample the answers its picture looks most like, best first (the encoder's, zero-shot). The teacher
    is wrong with probability `error`, and then says another of its candidates; the gold answer takes the last place
    among the candidates when the encoder did not think of it. Returns the samples with reasoning and conclusion.
    """
    rng = random.Random(f"teacher {seed}")
    out = []
    for sample, candidates in zip(samples, nearest):
        if sample.reasoning:
            out.append(sample)
            continue
        candidates = list(candidates)
        if sample.answer not in candidates:
            candidates[-1:] = [sample.answer]
        wrong = [c for c in candidates if c != sample.answer] or [a for a in answers if a != sample.answer]
        choice = rng.choice(wrong) if wrong and rng.random() < error else sample.answer
        listed = " or ".join(candidates)
        out.append(replace(sample, reasoning=f"it looks like {listed} . it is {choice}", conclusion=choice))
    return out


def records(samples, tokenizer, forget_close, seed, max_new):
    """Samples with a teacher's chain -> [(sample, target text)], </think> left out of a share `forget_close` of them,
    and what to say of them; max_new: tokens after which a model that learns from them is cut off."""
    forgets = np.random.default_rng(seed).random(len(samples)) < forget_close
    wrong = np.mean([not is_conclusion_right(sample) for sample in samples])
    said = f"  teacher: {len(samples)} chains, {100 * wrong:.1f} % wrong, {100 * forgets.mean():.0f} % without </think>"
    texts = [target_text(sample.conclusion, sample.reasoning, close_think=not forget)
             for sample, forget in zip(samples, forgets)]
    if long := sum(len(tokenizer.encode(text)) >= max_new for text in texts):
        said += (f"\nnote: {long} of {len(texts)} chains are longer than --max-new={max_new} tokens: what is learned "
                 "from them is cut off before the answer")
    return list(zip(samples, texts)), said
