"""Making records: questions to a teacher, its replies checked, kept or asked for once more.

    teacher = EndpointTeacher("http://127.0.0.1:8000/v1", options)      # or one of the others here
    tally = make_records("mine.jsonl", questions, held_out, total, teacher, tries=2)
    print(tally.text())

A teacher has what every record says of it (name, model, prompt, parameters, sees_answer), how it is
asked (jobs: groups at once; batch: questions of a group; tries: at most), and

    ask(samples, attempt) -> a Reply to each
    stop()                  no further request: the run ends

Killed at any moment, the same command goes on: only what was under way is asked again, and what an
endpoint failed to answer.
"""
import hashlib
import json
import queue
import random
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data import records, scenes, teachers
from data.chat import SECTIONS
from data.endpoint import Endpoint, OutOfRequests, message
from data.prompting import METHODS, opening
from data.records import HELD_OUT, Record, RecordFile, first_reason, judge, key_of
from model.runs.config import check_fields, choice, first_line, number


@dataclass(frozen=True)
class RecordOptions:
    """a teacher's records (--stage=teach --teacher=..)"""
    records: str = ""                               # file they go to; its own are not asked again
    teacher_model: str = ""                         # the model's name at --teacher=http://HOST/v1
    teacher_prompting: str = choice("stages_one_call", "stages")  # one request | one a section
    teacher_sees_answer: bool = False               # the gold answer goes into the prompt
    teacher_tries: int = number(2, "[1, 100]")      # replies to a question, until one is kept
    teacher_jobs: int = number(8, "[1, 1024]")      # questions under way at once
    teacher_temperature: float = number(1.0, "[0, 100]")  # of sampling; at 1 an endpoint's own
    teacher_max_new: int = number(0, "[0, 131072]")  # tokens of a request; 0: the model's own limit
    teacher_requests: int = number(0, "[0, 1000000000]")  # after which the run ends; 0: any number
    teacher_failures: int = number(20, "[1, 1000000]")  # requests lost in a row that end the run
    teacher_timeout: float = number(120.0, "(0, 86400]")  # seconds of a request

    def __post_init__(self):
        check_fields(self)


# What a teacher is told that sees the answer.
TOLD = ("The right answer is: {answer}. Reach it from what the picture shows, and conclude with "
        "exactly this answer. Write as if you had not been told it, and never mention that you "
        "were.")


@dataclass(frozen=True)
class Reply:
    """reply: a text with tags, or {section: reply}; finish_reason, usage, served and error as in
    data.endpoint.Answer."""
    reply: object
    finish_reason: str = "stop"
    usage: dict = field(default_factory=dict)
    served: str = ""
    error: str = ""


def kind_of(teacher):
    """What --teacher names: "own" (nothing), "endpoint", "function" or "model"."""
    if not teacher:
        return "own"
    if teacher.startswith(("http://", "https://")):
        return "endpoint"
    return "function" if ".py:" in teacher else "model"


def told(sample, sees_answer):
    """The sample as its question is put to a teacher."""
    if not sees_answer:
        return sample
    return replace(sample, question=f"{sample.question}\n{TOLD.format(answer=sample.answer)}")


# ---------------------------------------------------------------- teachers

class OwnChains:
    """The chains that the samples bring: of the drawn world's teacher, or of a file. A teacher that
    sees the answer concludes with it, wherever its chain leads."""
    jobs = 1
    batch = 64
    tries = 1                   # the same chain once more would be no other
    prompt = ""

    def __init__(self, model, parameters, sees_answer):
        self.name = "own"
        self.model = model
        self.parameters = parameters
        self.sees_answer = sees_answer

    def ask(self, samples, attempt):
        replies = []
        for sample in samples:
            sections = {name: getattr(sample, name) for name in SECTIONS}
            if self.sees_answer:
                sections["conclusion"] = sample.answer
            replies.append(Reply(sections))
        return replies

    def stop(self):
        pass


class FunctionTeacher:
    """FILE.py:NAME(sample, rng) -> (summary, caption, reasoning, conclusion), or (reasoning,
    conclusion) where the sample has the other two. The function gets the whole sample, gold answer
    included."""
    jobs = 1
    batch = 1
    sees_answer = True
    prompt = ""

    def __init__(self, spec, options, seed):
        self.teach = teachers.own_teacher(spec)
        self.name = spec
        file_name = spec.rpartition(":")[0]
        source = Path(file_name).expanduser().read_bytes()
        self.model = f"{spec}@{hashlib.sha256(source).hexdigest()[:12]}"
        self.parameters = {"seed": seed}
        self.tries = options.teacher_tries

    def ask(self, samples, attempt):
        return [self._reply(sample, attempt) for sample in samples]

    def _reply(self, sample, attempt):
        rng = random.Random(f"teacher {self.parameters['seed']} {sample.id} {attempt}")
        where = f"teacher, sample {sample.id!r}"
        try:
            chain = self.teach(sample, rng)
        except Exception as error:          # the function is anyone's
            reason = first_line(error, "no message")
            raise ValueError(f"{where}: {type(error).__name__}: {reason}") from error
        if not isinstance(chain, (tuple, list)) or len(chain) not in (2, 4):
            raise ValueError(f"{where}: expected (summary, caption, reasoning, conclusion) or "
                             f"(reasoning, conclusion), not {chain!r}")
        if not all(isinstance(text, str) for text in chain):
            raise ValueError(f"{where}: expected texts, not {chain!r}")
        sections = [sample.summary, sample.caption, *chain][-4:]
        return Reply(dict(zip(SECTIONS, sections)))

    def stop(self):
        pass


class Prompted:
    """A teacher that is asked by one of data.prompting's methods."""

    def __init__(self, name, model, options):
        self.name = name
        self.model = model
        self.stages = METHODS[options.teacher_prompting]
        self.sees_answer = options.teacher_sees_answer
        self.tries = options.teacher_tries
        texts = [*(stage.instruction for stage in self.stages), TOLD if self.sees_answer else ""]
        self.prompt = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        self.parameters = {"prompting": options.teacher_prompting,
                           "temperature": options.teacher_temperature}
        if options.teacher_max_new:
            self.parameters["max_new"] = options.teacher_max_new


class ModelTeacher(Prompted):
    """A model of this project. answer(samples, seed) -> for each sample what rl/staged.py makes:
    .text, .stages, .tokens, .appended and .cut. Its tokens in are those put in after the first
    prompt."""
    jobs = 1

    def __init__(self, answer, name, model, options, seed):
        super().__init__(name, model, options)
        self.answer = answer
        self.batch = options.teacher_jobs
        self.parameters["seed"] = seed

    def ask(self, samples, attempt):
        seed = random.Random(f"{self.parameters['seed']} {samples[0].id} {attempt}").getrandbits(31)
        replies = []
        for staged in self.answer([told(sample, self.sees_answer) for sample in samples], seed):
            reply = staged.stages if len(self.stages) > 1 else staged.text
            usage = {"prompt_tokens": staged.appended, "completion_tokens": staged.tokens}
            finish_reason = "length" if staged.cut else "stop"
            replies.append(Reply(reply, finish_reason, usage))
        return replies

    def stop(self):
        pass


class EndpointTeacher(Prompted):
    """A model behind an OpenAI-compatible endpoint; stage by stage each request holds what was said
    before."""
    batch = 1

    def __init__(self, url, options, wait=0.5):
        self.endpoint = Endpoint(url, options.teacher_model, options.teacher_timeout,
                                 options.teacher_requests, options.teacher_failures, wait)
        super().__init__(self.endpoint.url, options.teacher_model, options)
        self.jobs = options.teacher_jobs
        self.sent_along = {}
        if options.teacher_temperature != 1:
            self.sent_along["temperature"] = options.teacher_temperature
        if options.teacher_max_new:
            self.sent_along["max_tokens"] = options.teacher_max_new

    def ask(self, samples, attempt):
        return [self._reply(sample) for sample in samples]

    def _reply(self, sample):
        first, *later = self.stages
        asked = opening(told(sample, self.sees_answer), first, "")
        messages = [message("user", asked.question, sample.images)]
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        said = {}
        left = len(self.stages)
        self.endpoint.reserve(left)
        try:
            for stage in self.stages:
                if stage != first:
                    messages.append(message("user", stage.instruction))
                left -= 1
                answer = self.endpoint.chat(messages, self.sent_along)
                said[stage.name] = answer.text
                for name, count in answer.usage.items():
                    usage[name] += count
                if answer.finish_reason in ("failed", "refusal", *records.CUT):
                    break
                messages.append(message("assistant", answer.text))
        finally:
            self.endpoint.release(left)
        reply = said if later else answer.text
        return Reply(reply, answer.finish_reason, usage, answer.served, answer.error)

    def stop(self):
        self.endpoint.stop()


# ---------------------------------------------------------------- the questions

BLOCK = 512                 # scenes drawn at once
FAR = 10 ** 13              # between the seeds of two blocks: more than any run's seed


def drawn(split, count, seed, teacher=None):
    """Yields `count` scenes of a split, drawn when they are needed; with a teacher's four sections,
    without one the plan alone."""
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for sample in scenes.load(split, size, seed + FAR * (first // BLOCK), teacher, staged=True):
            if teacher is None:
                kind = sample.source.partition("/")[2]
                sample = replace(sample, summary=teachers.plan(kind))
            yield sample


def questions_of(supply, count, teacher=None):
    """-> (samples to ask, their number, samples to hold out). `count` drawn scenes, and as many
    more as --val-percent says; of one's own data all of train, and the other splits.

    teacher: of drawn scenes, whose chains the samples bring. Raises ValueError for a LLaVA file.
    """
    if supply.records:
        raise ValueError(f"--data={supply.options.data} has no gold answers; a teacher needs "
                         "scenes, images:DIR, jsonl:FILE or a source of your own")
    if supply.real:
        held_out = []
        for split, samples in supply.real.items():
            if split != "train":
                held_out += samples
        return supply.real["train"], len(supply.real["train"]), held_out
    seed = supply.stream("records")
    beside = max(1, count * supply.options.val_percent // 100)
    return drawn("train", count, seed, teacher), count, drawn("val", beside, seed)


# ---------------------------------------------------------------- the loop

def make_records(path, questions, held_out, total, teacher, open_file=RecordFile):
    """Asks the teacher about all `total` samples of `questions`, unless the file has its replies
    already -> Tally of the whole file.

    held_out: samples that are written down unasked. open_file(path) -> the RecordFile. Raises
    ValueError when the teacher cannot be asked any further, and about a sample that cannot be
    asked; what was answered before is in the file.
    """
    with open_file(path) as file:
        tally = file.tally
        for sample in held_out:
            hold_out(file, sample)
        asking = Asking(file, teacher)
        waiting = groups(questions, teacher.batch, asking)
        hidden = None if file.writes else True          # None: shown on a terminal only
        with tqdm(total=total, desc="teach", unit="q", disable=hidden, leave=False) as bar:
            for done in in_parallel(asking, waiting, teacher.jobs, teacher.stop):
                bar.update(done)
                bar.set_postfix({"kept": tally.kept, "dropped": tally.dropped,
                                 "in": tally.tokens_in, "out": tally.tokens_out}, refresh=False)
    if asking.is_out:
        print("note: the requests of --teacher-requests are used up; the same command goes on")
    return tally


def groups(samples, size, asking):
    """Lists of `size` samples, until the teacher may not be asked any more."""
    samples = iter(samples)
    while not asking.is_out:
        group = list(islice(samples, size))
        if not group:
            return
        yield group


class Asking:
    """Asks about a group of samples until each has a reply to keep, or no more tries -> the size of
    the group. Called by many threads at once.

    is_out: whether the teacher may be sent no more requests.
    """

    def __init__(self, file, teacher):
        self.file = file
        self.teacher = teacher
        self.is_out = False
        self._taken = set()             # questions of this run: the same one twice is asked once
        self._turn = threading.Lock()

    def __call__(self, group):
        waiting = []
        for sample in group:
            if sample.turns:
                raise ValueError(f"sample {sample.id!r} has earlier turns; a record holds one "
                                 "question")
            pictures = [records.digest(picture) for picture in sample.images]
            if self._take(self._key(sample, pictures, 1)):
                waiting.append((sample, pictures))
        try:
            for attempt in range(1, self.teacher.tries + 1):
                waiting = self._round(waiting, attempt)
        except OutOfRequests:
            self.is_out = True
        return len(group)

    def _take(self, key):
        key = bytes.fromhex(key)[:16]
        with self._turn:
            is_new = key not in self._taken
            self._taken.add(key)
        return is_new

    def _key(self, sample, pictures, attempt):
        teacher = self.teacher
        parameters = {**teacher.parameters, "sees_answer": teacher.sees_answer}
        return key_of(teacher.model, teacher.prompt, sample, pictures, parameters, attempt)

    def _round(self, waiting, attempt):
        """One attempt at each of [(sample, its pictures' digests)] -> those to ask once more."""
        asked = []
        again = []
        for sample, pictures in waiting:
            key = self._key(sample, pictures, attempt)
            reason = self.file.reason(key)
            if reason is None or reason == "failed":        # a failure was no reply
                asked.append((sample, pictures, key))
            elif reason:
                again.append((sample, pictures))
        if not asked:
            return again
        replies = self.teacher.ask([sample for sample, _, _ in asked], attempt)
        for (sample, pictures, key), reply in zip(asked, replies):
            record = self._record(sample, pictures, key, reply, attempt)
            self.file.put(record)
            if record.reason not in ("", "failed"):
                again.append((sample, pictures))
        return again

    def _record(self, sample, pictures, key, reply, attempt):
        teacher = self.teacher
        sections, verdicts = judge(reply.reply, sample, reply.finish_reason, teacher.sees_answer)
        reason = first_reason(verdicts)
        return Record(
            key=key, reason=reason, **question_fields(self.file, sample, pictures), **sections,
            text=reply.reply if reason else "", verdicts=verdicts, error=reply.error,
            teacher=teacher.name, model=teacher.model, served=reply.served, prompt=teacher.prompt,
            parameters=teacher.parameters, sees_answer=teacher.sees_answer,
            finish_reason=reply.finish_reason, usage=reply.usage, attempt=attempt)


def question_fields(file, sample, pictures):
    """What a record says of its question."""
    images = [file.picture(picture, name) for picture, name in zip(sample.images, pictures)]
    image = images[0] if len(images) == 1 else images
    return dict(image=image, question=sample.question, ground_truth=sample.answer, id=sample.id,
                split=sample.split, source=sample.source, aliases=sample.aliases,
                choices=sample.choices, tolerance=sample.tolerance, unit=sample.unit,
                boxes=sample.boxes)


def hold_out(file, sample):
    """Writes a question down that nobody is asked, unless the file has it."""
    pictures = [records.digest(picture) for picture in sample.images]
    key = key_of(HELD_OUT, sample.split, sample, pictures, {}, 0)
    if file.reason(key) is None:
        file.put(Record(key=key, reason=HELD_OUT, **question_fields(file, sample, pictures)))


def in_parallel(work, items, jobs, stop=lambda: None):
    """Yields work(item) of all items, by `jobs` threads, in the order in which they end; at most
    twice as many items as threads are taken and not done. When work raises, or the caller leaves,
    stop() is called and what waits is dropped; the threads die with the process."""
    todo = queue.Queue()
    done = queue.Queue()
    threads = []

    def run():
        while True:
            item = todo.get()
            if item is None:
                return
            try:
                done.put((work(item), None))
            except BaseException as error:      # the caller's thread raises it
                done.put((None, error))

    def result():
        value, error = done.get()
        if error is not None:
            raise error
        return value

    for _ in range(jobs):
        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
    under_way = 0
    try:
        for item in items:
            todo.put(item)
            under_way += 1
            if under_way >= 2 * jobs:
                yield result()
                under_way -= 1
        for _ in range(under_way):
            yield result()
    except BaseException:
        stop()
        with suppress(queue.Empty):
            while True:
                todo.get_nowait()
        raise
    finally:
        for _ in threads:
            todo.put(None)
    for thread in threads:      # a thread of torch's that is still ending when the interpreter does aborts the process
        thread.join()


def teacher_named(spec, supply, options, seed, answer_of):
    """--teacher -> a teacher; answer_of(spec) -> (answer, model) of ModelTeacher. Raises ValueError
    for one that cannot be asked."""
    kind = kind_of(spec)
    if kind == "endpoint":
        if not options.teacher_model:
            raise ValueError(f"--teacher={spec} needs --teacher-model, the name of a model there")
        return EndpointTeacher(spec, options)
    if kind == "function":
        return FunctionTeacher(spec, options, seed)
    if kind == "model":
        answer, model = answer_of(spec)
        return ModelTeacher(answer, spec, model, options, seed)
    if not supply.real:
        return OwnChains("scenes", asdict(supply.teacher), options.teacher_sees_answer)
    if not any(sample.reasoning for sample in supply.real["train"]):
        raise ValueError(f"--stage=teach needs a --teacher: --data={supply.options.data} brings no "
                         "chains")
    return OwnChains(supply.options.data, {}, options.teacher_sees_answer)
