"""rollouts.jsonl: what some groups of a run said, token by token, with the numbers that the losses used.

    recorder = Recorder(run.folder, "rl", "grpo_token", cfg, tokenizer, rewards, follow, write_atomically)
    recorder.begin(step)                                        # is this a step that is recorded?
    update(.., watch=recorder.see)                              # the loss of each micro-batch shows its tensors
    recorder.write(rollout)

A line is a group, as JSON; of a step that is recorded there is one for each of these roles:

    best, worst     of the groups in the update the one with the highest mean reward, and with the lowest
    flat            another one whose rewards are all equal; of the lowest rather than of the highest reward
    followed        always the same prompts, answered by the policy before the step from the same noise each time: what
                    differs between steps is the model; they teach nothing

Nothing is computed for the record that the step has not computed, but for the completions of the followed prompts: no
value of a token that the loss did not use. What is absent in a line was not computed.

The file grows as the run goes. When it would exceed --inspect-mb, every second recorded step is dropped, and from there
on only every second one is recorded. A kill leaves at most a torn last line; a resumed run cuts that, and the steps
that it will take again. Of several ranks each makes the lines of the groups that its losses used, and the first writes
all of them. Shapes: P prompts, G completions, C tokens.
"""
import base64
import hashlib
import io
import json
import math
from dataclasses import dataclass

import torch

from data.chat import parse
from data.sample import read_image
from kernels import is_flat
from model import parallel
from model.runs.config import check_fields, number
from rl.advantages import sampled_kl
from rl.rewards import consistency

FILE = "rollouts.jsonl"
FOLLOWED = 2                # prompts that are followed through the run: each costs the sampling of a group
THUMBNAIL = 256             # pixels of the longer edge of a picture
DIGITS = 5                  # behind the point, of values of tokens


@dataclass(frozen=True)
class InspectOptions:
    """what of the rollouts is kept to look into"""
    inspect_every: int = number(10, "[0, 1000000000]")  # steps between recorded ones, rollouts.jsonl; 0: none
    inspect_mb: int = number(50, "[1, 1000000]")    # most MB of that file; beyond it every second step is dropped

    def __post_init__(self):
        check_fields(self)


class Recorder:
    """Writes rollouts.jsonl of one stage.

    follow() -> Rollout of the followed prompts, by the policy as it is; write_atomically(path, write): as
    model/runs/checkpoint.py has it. cfg: train.py's, of the stage.
    """

    def __init__(self, folder, stage, label, cfg, tokenizer, rewards, follow, write_atomically):
        self.path = folder / FILE
        self.stage = stage
        self.label = label
        self.every = cfg.inspect.inspect_every
        self.limit = cfg.inspect.inspect_mb * 10 ** 6
        self.switches = cfg.algorithm
        self.tokenizer = tokenizer
        self.rewards = rewards
        self.follow = follow
        self.write_atomically = write_atomically
        self.step = None            # the step under way
        self.recording = False      # whether it is recorded
        self.watched = []           # [(micro-batch, {name: (P, G, C)})] of its losses, in the order of their passes
        self.followed = None        # Rollout
        self.told = False           # that a step is larger than the file may be

    def begin(self, step):
        """Before a step's rollout. At the first one it takes up the file that is there."""
        if not self.every:
            return
        if self.step is None and parallel.is_first():
            self._take_up(step)
        if self.step is None or self.recording:
            self.every = parallel.of_first(self.every)      # which it reads from the file, or changes as it writes
        self.step = step
        self.watched = []
        self.recording = step % self.every == 0
        if self.recording:
            self.followed = self.follow()

    def see(self, micro, **values):
        """The loss of a micro-batch, an Experience, shows what it computed for its tokens, (P, G, C) each."""
        if self.recording:
            self.watched.append((micro, {name: value.detach() for name, value in values.items()}))

    def write(self, rollout):
        """The lines of the step, if it is recorded. rollout: all of its groups."""
        if not self.recording:
            return
        used = self._used(rollout)
        used_by_any = parallel.chained([*used])
        mine = []
        for number, (place, role) in enumerate(chosen(rollout, used_by_any).items()):
            if place in used or parallel.is_first() and place not in used_by_any:
                mine.append([number, self._line(role, rollout, place, used.get(place, {}))])
        numbered = sorted(parallel.chained(mine), key=lambda entry: entry[0])
        if parallel.is_first():
            lines = [line for _, line in numbered]
            for place in range(len(self.followed.samples)):
                lines.append(self._line("followed", self.followed, place, {}))
            self._append(lines)
        self.watched = []
        self.followed = None

    # ------------------------------------------------------------ what the losses used

    def _used(self, rollout):
        """{place in the rollout: {name: (G, C)}} of its groups that went through the update, as their last pass had
        it."""
        places = {}
        for place in range(len(rollout.ids)):
            places.setdefault(mark(rollout.ids[place], rollout.mask[place], rollout.logp[place]), place)
        used = {}
        for micro, values in self.watched:
            values = of_tokens(micro, values, self.switches)
            for row in range(len(micro.ids)):
                place = places[mark(micro.ids[row], micro.mask[row], micro.sampled_logp[row])]
                used[place] = {name: value[row].cpu() for name, value in values.items()}
        return used

    # ------------------------------------------------------------ lines

    def _line(self, role, rollout, place, values):
        """A group as it is written. values: {name: (G, C)} of its tokens."""
        sample = rollout.samples[place]
        pictures = [thumbnail(image) for image in sample.images]
        paths = [path_of(image) for image in sample.images]
        completions = []
        for g in range(len(rollout.texts[place])):
            completions.append(self._completion(rollout, place, g, values))
        return dict(
            stage=self.stage, method=self.label, step=self.step, role=role,
            prompt=prompt_key(sample, pictures), id=sample.id, question=sample.question, gold=sample.answer,
            turns=list(sample.turns), source=sample.source, pictures=pictures, paths=paths,
            flat=bool(is_flat(rollout.reward[place:place + 1])), updated=bool(values), completions=completions)

    def _completion(self, rollout, place, g, values):
        sample = rollout.samples[place]
        text = rollout.texts[place][g]
        kept = rollout.mask[place, g].cpu()
        ids = rollout.ids[place, g].cpu()[kept].tolist()
        completion = dict(
            text=text, ended=bool(rollout.ended[place, g]), reward=round(rollout.reward[place, g].item(), 6),
            right=bool(rollout.parts["correctness"][place, g] > 0), parts=self._parts(rollout, place, g),
            fault=parse(text).fault, agrees=agrees(sample, text), ids=ids,
            tokens=pieces(ids, self.tokenizer.decode))
        completion["sampled"] = compact(rollout.logp[place, g].cpu()[kept])
        for name, value in values.items():
            completion[name] = compact(value[g][kept[:value.shape[-1]]])
        return completion

    def _parts(self, rollout, place, g):
        """[name, value, weight, what counts of it after the gate, why] of every reward of a completion."""
        sample = rollout.samples[place]
        text = rollout.texts[place][g]
        parts = []
        for name, values in rollout.parts.items():
            value = values[place, g].item()
            weight = self.rewards.weights.get(name, 0.0)
            counts = 0.0
            if name in self.rewards.weights:
                counts = rollout.rewards[place, g, list(self.rewards.weights).index(name)].item()
            parts.append([name, round(value, 6), weight, round(counts, 6), self.rewards.reason(name, sample, text)])
        return parts

    # ------------------------------------------------------------ the file

    def _take_up(self, step):
        """Cuts what a killed run left half written, and what the stage will write again from `step` on. A file that was
        thinned out before goes on as thin."""
        if not self.path.exists():
            return
        kept = 0
        with open(self.path, "rb") as file:
            for text in file:
                line = whole_line(text)
                if line is None or line["stage"] == self.stage and line["step"] >= step:
                    break
                self.every = max(self.every, line["every"])
                kept += len(text)
        with open(self.path, "ab") as file:
            file.truncate(kept)

    def _append(self, lines):
        """Writes a step's lines, having made room for them."""
        text = as_text(lines, self.every)
        while self._size() + len(text) > self.limit:
            if not self._thin():
                self._tell_once()
                return
            text = as_text(lines, self.every)
        if self.step % self.every:      # the file was thinned out just now, and this step with it
            return
        try:
            with open(self.path, "ab") as file:
                file.write(text)
        except OSError as error:
            raise OSError(f"cannot write {str(self.path)!r}: {error.strerror}; what was saved before is intact; "
                          "--resume goes on from there") from None

    def _tell_once(self):
        if not self.told:
            print(f"  {self.stage}: a step of {FILE} takes more than --inspect-mb has room for; it is left out",
                  flush=True)
        self.told = True

    def _size(self):
        return self.path.stat().st_size if self.path.exists() else 0

    def _thin(self):
        """Drops every second recorded step of each stage -> whether there was one to drop."""
        if not self.path.exists():
            return False
        lines = [json.loads(text) for text in self.path.read_bytes().splitlines()]
        kept = [line for line in lines if line["step"] % (2 * self.every) == 0]
        if len(kept) == len(lines):
            return False
        self.every *= 2
        self.write_atomically(self.path, lambda file: file.write(as_text(kept, self.every)))
        return True


def as_text(lines, every):
    """Groups -> lines of the file, bytes. every: steps from a recorded one to the next."""
    return b"".join(json.dumps(dict(line, every=every)).encode() + b"\n" for line in lines)


def whole_line(text):
    """A line of the file as bytes -> the object that it holds, None for one that was cut off."""
    if not text.endswith(b"\n"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


# ---------------------------------------------------------------- which groups

def chosen(rollout, used):
    """{place: role} of the groups of a rollout that are recorded; used: places of those in the update. Of equal means
    the first; without an update all groups are compared."""
    means = rollout.reward.double().mean(1).tolist()
    flat = is_flat(rollout.reward).tolist()
    compared = sorted(used) or list(range(len(means)))
    best = max(compared, key=lambda place: means[place])
    worst = min(compared, key=lambda place: means[place])
    roles = {best: "best"}
    roles.setdefault(worst, "worst")
    equal = [place for place in range(len(means)) if flat[place] and place not in roles]
    if equal:
        roles[min(equal, key=lambda place: means[place])] = "flat"
    return roles


def mark(ids, mask, logp):
    """What tells a group apart from others: its tokens and their log-probs at sampling, bitwise. All (G, C)."""
    return tuple(values.cpu().numpy().tobytes() for values in (mask.sum(-1), ids[mask], logp[mask]))


# ---------------------------------------------------------------- values of tokens

def of_tokens(micro, values, switches):
    """What the loss of a micro-batch used, {name: (P, G, C)}; what it did not compute is absent.

    values: what the loss showed; switches: an Algorithm. clipped: -1 where the ratio is under the lower clip with a
    negative advantage, 1 where it is over the upper one with a positive advantage, else 0.
    """
    found = {name: value for name, value in values.items() if len(value)}
    found["advantage"] = micro.advantage
    found["trained"] = micro.trained.int()
    if len(micro.old_logp):
        found["old_logp"] = micro.old_logp
    if len(micro.ref_logp):
        found["ref_logp"] = micro.ref_logp
        if "kl" not in found:
            found["kl"] = sampled_kl(found["logp"], micro.ref_logp, switches.kl)
    held_at_one = switches.loss == "cispo" and switches.clip_low == switches.clip_high == 0
    if switches.loss != "sapo" and not held_at_one:
        found["clipped"] = clip_sign(found["ratio"], micro.advantage, switches.clip_low, switches.clip_high)
    return found


def clip_sign(ratio, advantage, clip_low, clip_high):
    """-1, 0 or 1 of each token; see `of_tokens`. As kernels/policy_loss.py counts them."""
    too_low = (ratio < 1 - clip_low) & (advantage < 0)
    too_high = (ratio > 1 + clip_high) & (advantage > 0)
    return too_high.int() - too_low.int()


def compact(values):
    """Tensor (n,) -> a list of numbers; one number where all are equal. What is not finite is null.

    >>> compact(torch.tensor([0.5, -1.0])), compact(torch.tensor([0.5, 0.5])), compact(torch.tensor([math.inf, 1.0]))
    ([0.5, -1.0], 0.5, [None, 1.0])
    """
    numbers = []
    for value in values.tolist():
        numbers.append(round(value, DIGITS) if math.isfinite(value) else None)
    if len(numbers) > 1 and len(set(numbers)) == 1:
        return numbers[0]
    return numbers


def expanded(value, count):
    """What `compact` wrote -> a list of `count` numbers."""
    return value if isinstance(value, list) else [value] * count


LONGEST_CHARACTER = 8       # tokens that a character is waited for


def pieces(ids, decode):
    """Token ids -> the text of each, which together are decode(ids).

    A token alone does not tell its text: decoders drop a leading space, and the bytes of one character may be several
    tokens, the last of which then has it. So each is decoded behind the ones before it.
    """
    texts = []
    start = 0                   # from here on tokens are decoded
    done = 0                    # up to here their text is given
    for at in range(len(ids)):
        before = decode(ids[start:done])
        with_it = decode(ids[start:at + 1])
        is_last = at + 1 == len(ids)
        waits = with_it.endswith("\ufffd") and at - done < LONGEST_CHARACTER and not is_last
        if waits:
            texts.append("")
            continue
        texts.append(with_it[len(before):])
        start = done
        done = at + 1
    return texts


# ---------------------------------------------------------------- prompts

def agrees(sample, text):
    """Whether the thought of a completion ends in its answer; None without one of them."""
    parsed = parse(text)
    if not (parsed.answer and parsed.think):
        return None
    return bool(consistency(sample, text))


def thumbnail(source, most=THUMBNAIL):
    """A picture -> a data URL, small ones without loss."""
    picture = read_image(source)
    kind = "PNG" if max(picture.size) <= most else "JPEG"
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def path_of(image):
    """Where a picture lies, "" for one that is no file."""
    return image if isinstance(image, str) else ""


def prompt_key(sample, pictures):
    """Digits that are the same for one question about one picture in every run. pictures: thumbnails."""
    text = "\n".join([sample.question, sample.answer, *pictures])
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
