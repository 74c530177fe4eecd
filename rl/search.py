"""Search at inference: several candidates for an answer, one of which is chosen, on one cache.

    search = Search("stage_beam", 4, "logp")
    with open_scorer(search.scorer) as pick:
        found = find(Sampler(vlm), tokenizer, samples, search, "llava_cot", "brief", max_new=256, pick=pick)
    found[0].text, found[0].cost.spent

A method is a row of steps (`SEARCHES`). In a step every chain, the tokens of an answer so far, gets n candidates to go
on with; a scorer (`SCORERS`) picks one, and the next step starts from it. The prompts are computed once, the winners
are copied by `Sampler.select`. The sampler is handed in, as in rl/rollout.py, and its meter counts the FLOPs.

Equal tokens: `max_new` bounds one chain, as it bounds an answer that is sampled plainly; so whatever the method, the
answer itself has the same budget. n candidates cost about n times that: tables show `Cost.spent` beside the accuracy,
and `equal_tokens` says how many plain answers a majority may have for it.

How this differs from LLaVA-CoT's search (arXiv 2411.10440): the judge sees both orders of a pair and compares
log-probs; a candidate without its end tag loses; prompts and candidates are one batch.

Shapes: P samples, P' of them still going, n candidates each, C tokens of a step.
"""
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, repeat
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import chat
from data.chat import FORMS, as_words, key, normalise, parse
from data.sample import Sample
from model import parallel
from model.runs.config import check_fields, choice, need, number
from rl.rewards import check_file
from rl.rollout import prompts
from rl.staged import stop_at
from rl.worker import Worker


# ---------------------------------------------------------------- methods

class Step(NamedTuple):
    """Candidates up to some point, one of which is chosen.

    stop: the text at which a candidate stops; "" for nothing but the end of the answer.
    complete: (its own text, the text of its chain, whether it ended in EOS) -> whether it has what the step asks for. A
        candidate without it has lost, unless all have.
    """
    stop: str
    complete: Callable


class Method(NamedTuple):
    """steps: (a Search, the chat method) -> its Steps, which may go on for ever; votes: whether the commonest answer
    wins, and no scorer is asked."""
    steps: Callable
    votes: bool = False


def whole_answer(search, method):
    """One step: n whole answers. Those without an answer to judge have lost."""
    return [Step("", lambda own, text, ended: bool(normalise(parse(text).answer)))]


def sentences(search, method):
    """Steps up to the end of a sentence each, or of the answer. What the budget cut off has lost."""
    end = search.sentence_end
    return repeat(Step(end, lambda own, text, ended: ended or end in own))


def stages(search, method):
    """A step for each stage of the form in use, up to its end tag; the last goes on to the end of the answer."""
    *before, last = end_tags(method)
    steps = [Step(tag, lambda own, text, ended, tag=tag: tag in own) for tag in before]
    return [*steps, Step("", lambda own, text, ended: last in own)]


SEARCHES = {
    "majority": Method(whole_answer, votes=True),       # self-consistency (arXiv 2203.11171)
    "best_of_n": Method(whole_answer),
    "sentence_beam": Method(sentences),
    "stage_beam": Method(stages),                       # LLaVA-CoT's (arXiv 2411.10440)
}


def end_tags(method):
    """The end tags of a chat method's form, in order; without a thought the answer's alone.

    >>> end_tags("think"), end_tags("direct")
    (('</think>', '</answer>'), ('</answer>',))
    """
    form = "llava_cot" if method == "llava_cot" else "think"
    names = FORMS[form]
    if method == "direct":
        names = names[-1:]
    return tuple(f"</{name}>" for name in names)


class Search(NamedTuple):
    """How an answer is searched for: a name of SEARCHES, its number of candidates, a name of SCORERS or FILE.py:NAME,
    and what ends a sentence."""
    method: str
    n: int = 4
    scorer: str = "logp"
    sentence_end: str = " ."

    @property
    def label(self):
        """What rows are called by, behind the name of the model.

        >>> Search("best_of_n", 4, "mine.py:brevity").label, Search("majority", 8).label
        ('best_of_n[4,brevity]', 'majority[8]')
        """
        if SEARCHES[self.method].votes:
            return f"{self.method}[{self.n}]"
        return f"{self.method}[{self.n},{self.scorer.rpartition(':')[2]}]"


@dataclass(frozen=True)
class SearchOptions:
    """search at inference"""
    search: str = choice("", *SEARCHES)             # choose each answer among several; empty: none
    search_n: int = number(4, "[1, 10000]")         # candidates: whole answers, or ways to go on
    scorer: str = "logp"                            # who chooses: self | logp | oracle | FILE.py:NAME
    sentence_end: str = " ."                        # what ends a sentence in sentence_beam

    def __post_init__(self):
        check_fields(self)
        need(self.sentence_end != "", "sentence_end", self.sentence_end, "hold the text that ends a sentence")
        if self.scorer not in SCORERS:
            path, _, name = self.scorer.rpartition(":")
            need(path.endswith(".py"), "scorer", self.scorer, f"be one of {', '.join(SCORERS)}, or FILE.py:NAME")
            check_file(f"--scorer={self.scorer}", path, name)
        idle = not self.search or SEARCHES[self.search].votes
        if idle and self.scorer != "logp":
            raise ValueError(f"--scorer={self.scorer} has no effect with --search={self.search}; expected a --search "
                             "that chooses by a scorer")

        if not self.search and self.search_n != SearchOptions.search_n:
            raise ValueError(f"--search-n={self.search_n} has no effect without --search=")
        if self.search != "sentence_beam" and self.sentence_end != SearchOptions.sentence_end:
            raise ValueError(f"--sentence-end={self.sentence_end} has no effect without --search=sentence_beam")

    @property
    def chosen(self):
        """The Search, None for none."""
        if not self.search:
            return None
        return Search(self.search, self.search_n, self.scorer, self.sentence_end)


# ---------------------------------------------------------------- scorers

@dataclass
class Candidate:
    """A way to go on with the chain of sample number `prompt`.

    ids: its own tokens; text: that of the chain with them; logp: the mean log-prob of its own tokens, at the
    temperature of the sampling; complete: whether it has what its step asks for.
    """
    prompt: int
    ids: list
    text: str
    logp: float
    complete: bool


def best_by(value):
    """(sample, Candidate) -> number: a scorer that picks the highest, the first of several."""
    def pick(run, groups):
        chosen = []
        for group in groups:
            values = [value(run.samples[candidate.prompt], candidate) for candidate in group]
            chosen.append(values.index(max(values)))
        return chosen
    return pick


def knockout(run, groups):
    """The model itself judges: the winner of each pair meets that of the next, until one is left. A tie keeps the
    earlier one."""
    left = [list(range(len(group))) for group in groups]
    while max(map(len, left)) > 1:
        # 1. The pairs of this round, of all groups.
        pairs = []
        for group, places in zip(groups, left):
            pairs += [(group[first], group[second]) for first, second in zip(places[::2], places[1::2])]
        # 2. How much better the model finds the first of each, then who goes on.
        margins = iter(prefers(run, pairs))
        for number_of_group, places in enumerate(left):
            kept = []
            for first, second in zip(places[::2], places[1::2]):
                kept.append(first if next(margins) >= 0 else second)
            if len(places) % 2:
                kept.append(places[-1])
            left[number_of_group] = kept
    return [place for [place] in left]


# A scorer: (run, P' lists of Candidates) -> the place of the winner in each list. Only complete candidates come here,
# unless a sample has none.
SCORERS = {
    "self": knockout,
    "logp": best_by(lambda sample, candidate: candidate.logp),
    # The checker, which knows the gold answer: what a perfect scorer could reach, pass@n of whole answers.
    "oracle": best_by(lambda sample, candidate: chat.is_right(sample, parse(candidate.text).answer)),
}


@contextmanager
def open_scorer(name):
    """Gives the scorer of this name; of FILE.py:NAME, a reward of one's own, whose process ends with the block.

    It sees the sample and the chain so far. Raises ValueError when the file cannot be loaded.
    """
    if name in SCORERS:
        yield SCORERS[name]
        return
    path, _, function = name.rpartition(":")
    worker = Worker(path, function)
    try:
        worker.start()
        yield best_by(lambda sample, candidate: worker(sample, candidate.text))
    finally:
        worker.close()


def most_common(run, groups):
    """The vote: the first candidate with the commonest answer, by data/answers.py's key; ties go to the answer seen
    first."""
    chosen = []
    for group in groups:
        unit = run.samples[group[0].prompt].unit
        keys = [key(parse(candidate.text).answer, unit) for candidate in group]
        chosen.append(keys.index(max(keys, key=keys.count)))
    return chosen


# ---------------------------------------------------------------- the model as its own judge

CHOICES = ("first", "second")
# Behind the question.
JUDGE = """

Two replies to this question follow. They may be unfinished.

The first reply:
{}

The second reply:
{}

Which reply fits the picture and the question better? Reply with one word, first or second."""
JUDGE_BRIEF = " {} or {} first or second ?"         # in the words of the drawn world's models


def prefers(run, pairs):
    """Pairs of Candidates -> how much better the model finds the first of each, in nats; 0 for equal texts.

    log p("first") - log p("second") given the question, the picture and both, plus the same margin with the two in the
    other order: a habit of saying one of the words adds to the one what it takes from the other.
    """
    asked = []
    for one, other in pairs:
        asked.append(judge_question(run, one, other))
        asked.append(judge_question(run, other, one))
    margins = []
    size = len(run.samples)         # no more prompts at once than the search itself has
    owners = [one.prompt for one, _ in pairs for _ in range(2)]
    for start in range(0, len(asked), size):
        margins += judge(run, asked[start:start + size], owners[start:start + size])
    preferred = []
    for (one, other), there, back in zip(pairs, margins[::2], margins[1::2]):
        is_tie = one.text == other.text             # which two places of a batch would round apart
        preferred.append(0.0 if is_tie else there - back)
    return preferred


def judge_question(run, first, second):
    """The Sample that asks which of two candidates for one sample is better; its pictures stay where they were."""
    sample = run.samples[first.prompt]
    texts = [as_words(candidate.text).strip() for candidate in (first, second)]
    instruction = JUDGE_BRIEF if run.template == "brief" else JUDGE
    return replace(sample, question=sample.question + instruction.format(*texts))


@torch.no_grad()
def judge(run, asked, owners):
    """Q judging Samples, and which sample each is about -> Q margins, log p("first") - log p("second")."""
    vlm = run.sampler.vlm
    batch = prompts(vlm, run.tokenizer, asked, "direct", run.template)
    device = batch.ids.device
    # The pictures are those of the search's own prompts: encoded before.
    batch.features = run.batch.rows(torch.tensor(owners, device=device)).features
    words = [torch.tensor(choice_ids(run.tokenizer, run.template, word), device=device) for word in CHOICES]
    ids = pad_sequence(words, batch_first=True)                                 # (2, C)
    mask = pad_sequence([torch.ones_like(word) for word in words], batch_first=True)
    logp = vlm(batch, ids.expand(len(asked), -1, -1)).logp                      # (Q, 2, C)
    run.sampler.meter.forward(vlm, batch, tuple(logp.shape))
    for owner, length in zip(owners, batch.length.tolist()):
        own = int(run.batch.length[owner])
        run.costs[owner].prefilled += own
        run.costs[owner].judged += length - own + int(mask.sum())
    logp = (logp * mask).sum(-1)
    return (logp[:, 0] - logp[:, 1]).tolist()


def choice_ids(tokenizer, template, word):
    """The tokens of a one-word answer, without the end of the turn."""
    asked = Sample(question="?")
    answer = f" {word}" if template == "brief" else word
    ids, taught, _ = chat.encode(asked, tokenizer, 0, "direct", template, answer)
    return [token for token, is_answer in zip(ids, taught) if is_answer and token != tokenizer.eos_id]


# ---------------------------------------------------------------- what it costs

@dataclass
class Cost:
    """Tokens of one answer, or of many.

    sampled: of all candidates, each EOS included. judged: what the model read as its own judge beyond the question,
    that is, instruction and candidates, and the two words that it scored. prefilled: the prompt of the question,
    pictures included, each time that it was computed. flops: of the whole run, from the sampler's meter; 0 for one
    answer, since answers are computed together.
    """
    sampled: int = 0
    judged: int = 0
    prefilled: int = 0
    flops: int = 0

    @property
    def spent(self):
        return self.sampled + self.judged


def total(found, meter):
    """P Found, and the meter of their sampler -> what they cost together."""
    cost = Cost(flops=meter.total)
    for one in found:
        cost.sampled += one.cost.sampled
        cost.judged += one.cost.judged
        cost.prefilled += one.cost.prefilled
    return cost


def equal_tokens(spent, lengths):
    """How many plain answers, of these lengths, a majority may have to spend no more than a search did.

    >>> equal_tokens(spent=[90, 110], lengths=[[20, 30], [30, 20]])
    4
    """
    return max(1, int(np.mean(spent) / np.mean(lengths)))


# ---------------------------------------------------------------- the search

@dataclass
class Found:
    """The answer that was found: its text, its tokens with EOS, whether the budget ended it, and what it cost."""
    text: str = ""
    tokens: int = 0
    cut: bool = False
    cost: Cost = field(default_factory=Cost)


@dataclass
class Run:
    """What the steps of a search share. batch: the prompts with their pictures' features; chains, costs: one of each
    sample."""
    sampler: object
    tokenizer: object
    samples: list
    batch: object
    template: str
    chains: list
    costs: list


def find(sampler, tokenizer, samples, search, method, template, max_new, pick, temperature=1.0, top_k=0, top_p=1.0,
         generator=None):
    """Searches an answer for each of P samples -> P Found.

    method, template: data.chat's. max_new: tokens that one chain may have. pick: the scorer, from `open_scorer`. One
    candidate is plain sampling. ValueError for several candidates at temperature 0, which would all be the same. Of
    several ranks each searches a part, by the same draws as one process, and all return all that was found.
    """
    if search.n > 1 and not temperature:
        raise ValueError(f"temperature={temperature} makes all {search.n} candidates of a search the same; expected "
                         "more than 0")
    way = SEARCHES[search.method]
    steps = way.steps(search, method)
    if search.n == 1:               # nothing to choose from, so nothing to stop for
        steps = whole_answer(search, method)
    if way.votes:
        pick = most_common
    # 1. The prompts, once. Behind them the cache has room for a chain; where steps follow each other it needs two,
    # since a long chain and one that has all of its budget left take their next tokens side by side.
    steps = iter(steps)
    first = next(steps)
    samples = samples[parallel.own_rows(len(samples))]
    batch = None
    costs = []
    if samples:                 # else there are fewer than ranks
        batch = prompts(sampler.vlm, tokenizer, samples, method, template)
        sampler.vlm.encode(batch)
        if len(batch.features):
            sampler.meter.encode(sampler.vlm, len(batch.pixels))
        sampler.prefill(batch, search.n, 2 * max_new if first.stop else max_new)
        costs = [Cost(prefilled=length) for length in batch.length.tolist()]
    run = Run(sampler, tokenizer, samples, batch, template, [[] for _ in samples], costs)
    # 2. Step by step, for those whose chain goes on.
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, pad_id=tokenizer.pad_id,
                    banned=tokenizer.banned(sampler.llm.config.vocab))
    going = list(range(len(samples)))
    for step in chain([first], steps):
        left = [max_new - len(run.chains[p]) for p in going]
        of_ranks = parallel.gather(left)
        if not any(of_ranks):
            break
        noise = None
        if temperature:
            noise = drawn(sampler, of_ranks, search.n, generator)
        if not going:           # but chains of other ranks do
            continue
        winners = take_step(run, step, going, left, search.n, pick, noise, sampling)
        kept = [place for place, p in enumerate(going) if not is_over(run, p, max_new)]
        going = [going[place] for place in kept]
        if going:
            go_on(run, going, kept, [winners[place] for place in kept], search.n)
    found = [found_by(run, p) for p in range(len(samples))]
    if parallel.world() == 1:
        return found
    of_all = []
    for values in parallel.chained([asdict(one) for one in found]):
        of_all.append(Found(**values | {"cost": Cost(**values["cost"])}))
    return of_all


def drawn(sampler, of_ranks, n, generator):
    """What this rank's chains draw in a step, (P', n, C): what they would draw in one process, which has all chains
    that go on side by side. of_ranks: of every rank the tokens that each of its P' chains has left."""
    before = sum(map(len, of_ranks[:parallel.rank()]))
    left = list(chain(*of_ranks))
    noise = sampler.noise((len(left), n), max(left), generator)
    return noise[before:before + len(of_ranks[parallel.rank()])]


def take_step(run, step, going, left, n, pick, noise, sampling):
    """n candidates for each chain that goes on, of which the chosen one joins it -> the place of each winner. left: the
    tokens that each may still have; noise (P', n, C)."""
    sampler = run.sampler
    tokenizer = run.tokenizer
    # 1. Sample. Rows may be dropped only where nothing follows.
    limit = torch.tensor(left, device=run.batch.ids.device)[:, None].expand(-1, n)
    stop = stop_at(tokenizer, step.stop) if step.stop else None
    completions = sampler.decode(max(left), tokenizer.eos_id, drop=not step.stop, stop=stop, limit=limit, noise=noise,
                                 **sampling)
    # 2. Read.
    groups = []
    of_chains = zip(going, completions.ids.cpu(), completions.mask.cpu(), completions.logp.cpu())
    for p, ids_of_one, mask_of_one, logp_of_one in of_chains:
        groups.append([])
        for ids, mask, logp in zip(ids_of_one, mask_of_one, logp_of_one):
            groups[-1].append(read(run, step, p, ids[mask].tolist(), float(logp[mask].mean())))
    # 3. Choose.
    winners = choose(run, groups, pick)
    for p, group, place in zip(going, groups, winners):
        run.chains[p] += group[place].ids
        run.costs[p].sampled += sum(len(candidate.ids) for candidate in group)
    return winners


def read(run, step, p, ids, logp):
    """The tokens of one candidate for sample p -> Candidate."""
    text = run.tokenizer.decode(run.chains[p] + ids)
    complete = step.complete(run.tokenizer.decode(ids), text, ids[-1] == run.tokenizer.eos_id)
    return Candidate(p, ids, text, logp, complete)


def choose(run, groups, pick):
    """P' lists of Candidates -> the place of each winner: among the complete ones, among all where there is none."""
    contenders = []                 # places in the lists
    for group in groups:
        complete = [place for place, candidate in enumerate(group) if candidate.complete]
        contenders.append(complete or list(range(len(group))))
    chosen = pick(run, [[group[place] for place in places] for group, places in zip(groups, contenders)])
    return [places[place] for places, place in zip(contenders, chosen)]


def is_over(run, p, max_new):
    tokens = run.chains[p]
    return tokens[-1] == run.tokenizer.eos_id or len(tokens) == max_new


def go_on(run, going, kept, winners, n):
    """Makes every winner the start of its n next candidates. going: the samples; kept: where they are in the cache."""
    sampler = run.sampler
    device = run.batch.ids.device
    sampler.select(torch.tensor(kept, device=device), torch.tensor(winners, device=device)[:, None])
    sampler.compact()
    # What decode leaves out of the cache: a row's last token.
    last = torch.tensor([run.chains[p][-1] for p in going], device=device)
    sampler.extend(last[:, None, None])
    every = torch.arange(len(going), device=device)
    sampler.select(every, torch.zeros(len(going), n, dtype=torch.long, device=device))


def found_by(run, p):
    tokens = run.chains[p]
    return Found(text=run.tokenizer.decode(tokens), tokens=len(tokens), cut=tokens[-1] != run.tokenizer.eos_id,
                 cost=run.costs[p])
