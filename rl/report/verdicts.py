"""What a run shows beside its accuracy, each question answered by a fixed rule over intervals, or "not shown".

    found = verdicts(scores, "cot", "grpo_token", measured)    # for verdicts.json
    print(verdicts_text(found))

    sharpening   is the model right more often on what its start could already solve, or on prompts that it could not?
    form         is it right more often where its start had the form right, too?
    looking      do its answers depend on the picture?
    thinking     do its answers depend on its thought?
    reflection   are completions with a word of reflection right more often than others of the same prompt?

Raw scores as in rl/report/statistics.py; besides, of each completion (n, G), agrees, whether the thought ends in the
answer, and reflects, whether it holds a word of reflection. measured: by rl/interventions.py.

A rule finds a difference where its 95 % interval over prompts lies on one side of 0, and no difference worth the name
where it lies below MARGIN. All else is "not shown". Intervals are over prompts, one model each, and not corrected for
the number of questions and splits.
"""
from dataclasses import asdict, dataclass

import numpy as np

from rl.report.inference import constant_guess, interval, interval_of_differences, paired_t, pass_at_k
from rl.report.statistics import decoding_title, main_decoding_of, main_split

MARGIN = 0.05               # shares and differences below it are called none
LEAST = 10                  # prompts that a measure needs: intervals of fewer say nothing
NOT_SHOWN = "not shown"
NOT_MEASURED = "not measured"
STARTS = ("cot", "before", "base")      # rows that reinforcement learning may start from, first choice first

# What is said, by question and finding. {main}, {start} and {where} are names, all others are measures.
SENTENCES = {
    ("sharpening", "sharpening"):
        "On {where} {main} is right more often than {start}, pass@1 {pass@1}, while pass@{k} differs by {pass@k}, less "
        "than {margin} points more: the gain lies on prompts that {start} solves within {k} samples.",
    ("sharpening", "capability"):
        "On {where} {main} solves prompts that {start} does not: of those that {start} did not solve in {half} {tries} "
        "it solves more in as many others than {start} itself, by {new}, and pass@{k} differs by {pass@k}.",
    ("sharpening", NOT_SHOWN):
        "On {where} neither is shown: {main} less {start} is {pass@1} in pass@1, {pass@k} in pass@{k}, and {new} on "
        "prompts that {start} did not solve in {half} {tries}.",
    ("form", "more than form"):
        "On {where} {main} is right more often than {start} among well-formed completions of the same prompts, too: "
        "{formed}; among all completions {all}.",
    ("form", "form alone"):
        "On {where} {main} is right more often than {start} among all completions, {all}, but among well-formed ones "
        "by less than {margin} points: {formed}.",
    ("form", NOT_SHOWN):
        "On {where} neither is shown: {main} less {start} is {all} among all completions, {formed} among well-formed "
        "ones.",
    ("looking", "looks"):
        "On {where} the answers of {main} depend on the picture: as it is {as it is} are right, blanked {blanked}, "
        "another prompt's {shuffled}; one constant answer to each kind of question would earn {constant}.",
    ("looking", "does not look"):
        "On {where} no dependence of {main} on the picture is seen above {margin} points: as it is {as it is} are "
        "right, blanked {blanked}, another prompt's {shuffled}; {changed} of the answers change with the picture.",
    ("looking", NOT_SHOWN):
        "On {where} it is not shown whether {main} looks: the picture as it is less a blank one {less blanked}, less "
        "another prompt's {less shuffled}.",
    ("thinking", "matters"):
        "On {where} the answers of {main} depend on the thought: behind its own {own} are right, behind another "
        "prompt's {replaced}, behind none {removed}; {follows} of the answers are those of the other prompt.",
    ("thinking", "decorative"):
        "On {where} no dependence of the answers of {main} on its thought is seen above {margin} points: behind its "
        "own {own} are right, behind another prompt's {replaced}, behind none {removed}, behind half of it {cut}.",
    ("thinking", NOT_SHOWN):
        "On {where} it is not shown whether the thought of {main} matters: behind its own less behind another "
        "prompt's {less replaced}, less behind none {less removed}.",
    ("reflection", "more often right"):
        "On {where} {share} of the completions of {main} hold a word of reflection; they are right more often than "
        "others of the same prompt, by {difference}.",
    ("reflection", "less often right"):
        "On {where} {share} of the completions of {main} hold a word of reflection; they are right less often than "
        "others of the same prompt, by {difference}.",
    ("reflection", "absent"):
        "On {where} no completion of {main} holds a word of reflection.",
    ("reflection", NOT_SHOWN):
        "On {where} {share} of the completions of {main} hold a word of reflection; that they are right more or less "
        "often than others of the same prompt is not shown: {difference}.",
}


# How a table calls the measures; differences between two of them, "less ..", are left out there.
LABELS = {
    "pass@k": "right in one of all samples", "cover@0.5": "right in half of them", "cover@1": "right in all of them",
    "new": "solved anew, of those that the start's first half of samples did not solve",
    "all": "accuracy", "formed": "accuracy among well-formed", "form": "well-formed",
    "as it is": "right with the picture", "blanked": "with a blank one", "shuffled": "with another prompt's",
    "masked": "with every second patch covered", "constant": "one constant answer to each kind",
    "own": "right behind its own thought", "replaced": "behind another prompt's", "removed": "behind none",
    "cut": "behind half of it", "follows": "answers of the other prompt", "changed": "answers that change with it",
    "share": "completions with one", "difference": "right more often with one",
}

COMPARED = ("sharpening", "form")       # questions whose measures are of a model less those of its start


@dataclass(frozen=True)
class Measure:
    """A number over n prompts and its 95 % interval; low and high None where there is none. is_difference: of two
    shares, told in points."""
    value: float
    low: float | None
    high: float | None
    n: int
    is_difference: bool = False

    def __str__(self):
        if not self.n:
            return "(of no prompt)"
        if self.is_difference:
            text = f"{100 * self.value:+.1f}"
            ends = None if self.low is None else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        else:
            text = f"{self.value:.3f}"
            ends = None if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return text + (ends or "")


@dataclass(frozen=True)
class Verdict:
    """question: of SENTENCES; finding: one of its findings, or NOT_MEASURED; measures: {name: Measure}."""
    question: str
    finding: str
    measures: dict
    numbers: dict               # whole numbers that the sentence names

    def sentence(self, main, start, where):
        """What was found, from the fixed templates."""
        if self.finding == NOT_MEASURED:
            return f"On {where} nothing was measured of it."
        words = {name: str(measure) for name, measure in self.measures.items()}
        words["tries"] = "sample" if self.numbers.get("half") == 1 else "samples"
        template = SENTENCES[self.question, self.finding]
        return template.format(main=main, start=start, where=where, margin=f"{100 * MARGIN:g}", **self.numbers, **words)


def share(values):
    """(n,) shares -> Measure."""
    value, low, high = interval(values)
    if len(values) < 2:
        low = high = None
    return Measure(value, low, high, len(values))


def difference(values):
    """(n,) differences -> Measure; without an interval of fewer than LEAST prompts, and 0 of none."""
    if not len(values):
        return Measure(0.0, None, None, 0, True)
    value, low, high = interval_of_differences(values)
    if len(values) < LEAST:
        low = high = None
    return Measure(value, low, high, len(values), True)


def is_above(measure):
    return measure.low is not None and measure.low > 0


def is_below(measure):
    return measure.high is not None and measure.high < 0


def is_small(measure):
    """Whether its interval lies below MARGIN."""
    return measure.high is not None and measure.high < MARGIN


def not_measured(question):
    return Verdict(question, NOT_MEASURED, {}, {})


# ---------------------------------------------------------------- from the scores alone

def sharpening(start, main):
    """Raw scores of a start and of what it became -> Verdict.

    Prompts that the start never solved in n samples are not those that it cannot solve: its next samples would solve
    some of them. So the first half of its samples names the prompts, and its second half is what the model is held
    against, with as many samples. A skill that the start has once in a hundred samples still counts as new here: more
    samples (--eval-samples) tell the two apart.
    """
    before, after = _same_prompts(start, main, "right")
    k = before.shape[1]
    if k < 2 or after.shape[1] != k:
        return not_measured("sharpening")
    half = k // 2
    unsolved = before[:, :half].sum(1) == 0
    again = before[unsolved, half:2 * half].any(1)
    measures = {
        "pass@1": difference(after.mean(1) - before.mean(1)),
        "pass@k": difference(pass_at_k(after, k) - pass_at_k(before, k)),
        "new": difference(pass_at_k(after[unsolved], half) - again),
        "cover@0.5": difference((after.mean(1) >= 0.5).astype(float) - (before.mean(1) >= 0.5)),
        "cover@1": difference((after.mean(1) == 1).astype(float) - (before.mean(1) == 1)),
    }
    finding = NOT_SHOWN
    if is_above(measures["new"]) and is_above(measures["pass@k"]):
        finding = "capability"
    elif is_above(measures["pass@1"]) and is_small(measures["pass@k"]):
        finding = "sharpening"
    return Verdict("sharpening", finding, measures, {"k": k, "half": half})


def form(start, main):
    """As `sharpening`: the gain among well-formed completions of the same prompts, which a gain of form alone has not.

    Well-formed completions of a start that mostly fails may be its easier ones: the prompts are the same, the
    completions are what they are.
    """
    before, after = _same_prompts(start, main, "right")
    formed_before, formed_after = _same_prompts(start, main, "format")
    both = formed_before.any(1) & formed_after.any(1)
    among = []
    for right, formed in ((after, formed_after), (before, formed_before)):
        among.append((right * formed)[both].sum(1) / formed[both].sum(1))
    measures = {
        "all": difference(after.mean(1) - before.mean(1)),
        "formed": difference(among[0] - among[1]),
        "form": difference(formed_after.mean(1) - formed_before.mean(1)),
    }
    finding = NOT_SHOWN
    if is_above(measures["formed"]):
        finding = "more than form"
    elif is_above(measures["all"]) and is_small(measures["formed"]):
        finding = "form alone"
    return Verdict("form", finding, measures, {})


def reflection(main):
    """Raw scores -> Verdict. Compared within a prompt: words of reflection stand more often where questions are
    hard."""
    if "reflects" not in main:
        return not_measured("reflection")
    reflects = np.array(main["reflects"], dtype=bool)
    measures = {
        "share": share(reflects.mean(1)),
        "difference": difference(within_prompts(reflects, np.array(main["right"]))),
    }
    finding = NOT_SHOWN
    if not reflects.any():
        finding = "absent"
    elif is_above(measures["difference"]):
        finding = "more often right"
    elif is_below(measures["difference"]):
        finding = "less often right"
    return Verdict("reflection", finding, measures, {})


def within_prompts(chosen, right):
    """chosen (n, G) of bool, right (n, G) -> (m,): of the m prompts with completions of both sorts, the accuracy of
    the chosen ones less that of the others."""
    counts = chosen.sum(1)
    both = (counts > 0) & (counts < chosen.shape[1])
    chosen = chosen[both]
    right = right[both]
    of_chosen = (right * chosen).sum(1) / chosen.sum(1)
    of_others = (right * ~chosen).sum(1) / (~chosen).sum(1)
    return of_chosen - of_others


def _same_prompts(start, main, name):
    """Of two raw scores the (n, G) arrays of that name, of the prompts of both."""
    before = np.array(start[name])
    after = np.array(main[name])
    n = min(len(before), len(after))
    return before[:n], after[:n]


# ---------------------------------------------------------------- from interventions

def looking(looks):
    """{"as it is", "blanked", "shuffled", "masked": {right, answer}, "gold": .., "kind": ..}, (n,) each -> Verdict.

    A model that answers each kind of question by its commonest answer earns `constant` without a look. Answers that do
    not change at all with the picture are asked for besides: a model that is never right loses nothing by a blank, and
    one that hardly ever answers shows nothing by answers that stay empty.
    """
    if not looks or len(looks["gold"]) < LEAST:
        return not_measured("looking")
    guesses = constant_guess(looks["gold"], looks["kind"])
    right = {name: np.array(looks[name]["right"], dtype=float) for name in ("as it is", "blanked", "shuffled",
                                                                           "masked")}
    constant = float(np.mean([guesses[kind][1] for kind in looks["kind"]]))
    measures = {name: share(values) for name, values in right.items()}
    for name in ("blanked", "shuffled", "masked"):
        measures[f"less {name}"] = difference(right["as it is"] - right[name])
    changed = _changed(looks["as it is"], looks["shuffled"])
    if len(changed):
        measures["changed"] = share(changed)
    measures["constant"] = Measure(constant, None, None, len(looks["gold"]))
    finding = NOT_SHOWN
    if is_above(measures["less blanked"]) and is_above(measures["less shuffled"]):
        finding = "looks"
    elif len(changed) < LEAST:
        return not_measured("looking")
    elif all(is_small(measures[name]) for name in ("less blanked", "less shuffled", "changed")):
        finding = "does not look"
    return Verdict("looking", finding, measures, {})


def thinking(thoughts, main=None):
    """{"own", "removed", "replaced", "cut": {right, answer}, "donor": ..}, (n,) each -> Verdict; donor: the answer that
    the other prompt's thought led to. main: raw scores, for the share of completions whose thought ends in the answer.

    The rule goes by replaced thoughts, which look like the model's own: an empty thought is a text that it never saw,
    so that a loss there may be one of form.
    """
    if not thoughts or len(thoughts["donor"]) < LEAST:
        return not_measured("thinking")
    right = {name: np.array(thoughts[name]["right"], dtype=float) for name in ("own", "replaced", "removed", "cut")}
    measures = {name: share(values) for name, values in right.items()}
    for name in ("replaced", "removed", "cut"):
        measures[f"less {name}"] = difference(right["own"] - right[name])
    changed = _changed(thoughts["own"], thoughts["replaced"])
    if len(changed):
        measures["changed"] = share(changed)
    follows = np.array(thoughts["replaced"]["answer"]) == np.array(thoughts["donor"])
    measures["follows"] = share(follows.astype(float))
    if main and "agrees" in main:
        agrees = np.array(main["agrees"], dtype=bool)
        measures["thought ends in the answer"] = share(agrees.mean(1))
        measures["right, where it does less where it does not"] = difference(
            within_prompts(agrees, np.array(main["right"])))
    finding = NOT_SHOWN
    if is_above(measures["less replaced"]):
        finding = "matters"
    elif len(changed) < LEAST:
        return not_measured("thinking")
    elif all(is_small(measures[name]) for name in ("less replaced", "less removed", "less cut", "changed")):
        finding = "decorative"
    return Verdict("thinking", finding, measures, {})


def _changed(one, other):
    """{right, answer} twice -> (m,): whether the answers differ, of the m prompts that are answered at least once: two
    empty answers are no unchanged one, and an answer that is given only once is a changed one."""
    first = np.array(one["answer"])
    second = np.array(other["answer"])
    answered = (first != "") | (second != "")
    return (first != second)[answered].astype(float)


# ---------------------------------------------------------------- all of them

def start_of(methods, main):
    """The row that is taken for what `main` started from; "" where there is none."""
    return next((name for name in STARTS if name in methods and name != main), "")


def verdicts(scores, start, main, measured, seed=0):
    """scores: method -> split -> raw scores; start, main: methods, start "" for none; measured: {method: {"looking":
    .., "thinking": ..}} on the split that is like training -> rows of verdicts.json, a split and question each."""
    if main not in scores:
        return []
    decoding = main_decoding_of(scores[main])
    home = main_split(list(scores[main]))
    found = []
    for split, decodings in scores[main].items():
        raw = decodings[decoding]
        before = scores.get(start, {}).get(split, {}).get(decoding)
        judged = []
        if before:
            judged += [sharpening(before, raw), form(before, raw)]
        if split == home:
            of_main = measured.get(main, {})
            judged += [looking(of_main.get("looking")), thinking(of_main.get("thinking"), raw)]
        judged.append(reflection(raw))
        where = f"{split}, {decoding_title(decoding)},"
        greedy = f"{split}, greedy,"
        for verdict in judged:
            place = greedy if verdict.question in ("looking", "thinking") else where
            found.append(dict(
                question=verdict.question, split=split, decoding=decoding, method=main, start=start,
                finding=verdict.finding, sentence=verdict.sentence(main, start, place),
                measures={name: asdict(measure) for name, measure in verdict.measures.items()}, seed=seed))
    return found


def title_of(found):
    """What rows of verdicts.json are about: without a start nothing is said of a gain."""
    if not found or found[0]["start"]:
        return "What the gain is made of"
    return f"What answers of {found[0]['method']} depend on"


def verdicts_text(found):
    """The sentences of the split that is like training, and by how many splits the others were found."""
    if not found:
        return ""
    home = main_split([row["split"] for row in found])
    lines = [f"{title_of(found)}, split {home}, by fixed rules over 95 % intervals over prompts, not corrected for "
             "their number:"]
    for row in found:
        if row["split"] == home:
            lines.append(f"  {row['question']}: {row['finding']}. {row['sentence']}")
    for question in ("sharpening", "form"):
        others = [f"{row['split']} {row['finding']}" for row in found
                  if row["question"] == question and row["split"] != home]
        if others:
            lines.append(f"  {question} on the other splits: {', '.join(others)}")
    return "\n".join(lines)


def by_place(found):
    """Rows -> {(question, split): its rows, one a seed}."""
    places = {}
    for row in found:
        places.setdefault((row["question"], row["split"]), []).append(row)
    return places


def counted(rows):
    """The finding of a row; of those of several seeds each finding with its number."""
    findings = [row["finding"] for row in rows]
    if len(findings) < 2:
        return "".join(findings)
    return ", ".join(f"{finding} {findings.count(finding)}" for finding in dict.fromkeys(findings))


def measures_over_seeds(rows):
    """Rows of one question and split, one a seed -> {name: Measure}, whose n counts seeds: means with 95 % t-intervals
    over the seeds in which there was something to measure, without one of fewer than three."""
    values = {}                                 # name -> the seeds' values
    kinds = {}                                  # name -> is_difference
    for row in rows:
        for name, measure in row["measures"].items():
            if measure["n"]:
                values.setdefault(name, []).append(measure["value"])
                kinds[name] = measure["is_difference"]
    found = {}
    for name, of_seeds in values.items():
        mean = paired_t(of_seeds)
        has_interval = len(of_seeds) > 2
        found[name] = Measure(mean.mean, mean.low if has_interval else None, mean.high if has_interval else None,
                              len(of_seeds), kinds[name])
    return found


def measures_text(rows):
    """What was measured of one question and split with several seeds, as a line."""
    told = []
    for name, measure in measures_over_seeds(rows).items():
        if not name.startswith("less "):
            some = f" of {measure.n} of {len(rows)} seeds" if measure.n < len(rows) else ""
            told.append(f"{LABELS.get(name, name)} {measure}{some}")
    compared = f"{rows[0]['method']} less {rows[0]['start']}: " if rows[0]["question"] in COMPARED and told else ""
    return compared + "; ".join(told)


def means_of(seeds):
    """What is shown of so many seeds, in words."""
    return "means [95 % t-interval over seeds]" if seeds > 2 else "means"


def over_seeds_text(found):
    """Rows of several seeds -> text: how often each finding came, and on the split that is like training what was
    measured."""
    if not found:
        return ""
    home = main_split([row["split"] for row in found])
    places = by_place(found)
    seeds = max(len(rows) for rows in places.values())
    lines = [f"{title_of(found)}, by how many seeds; split {home} with {means_of(seeds)}, differences in points:"]
    for (question, split), rows in places.items():
        measured = measures_text(rows)
        line = f"  {question}, {split}: {counted(rows)}"
        if split == home and measured:
            line += f". {measured}"
        lines.append(line)
    return "\n".join(lines)
