"""When an answer counts as the gold one. All that may differ is stated here, for training and
evaluation alike.

    words       case, the white space between them, full stops at the end; the gold answer or one of
                its aliases
    numbers     the way they are written ("1,000" and "1000.0"); a unit, if the sample names one, or
                none; and as much as the sample's tolerance allows
    choices     the text of the choice; where the question shows them with letters ("(A) red (B) blue",
                "A. red ..") its letter ("B", "(b)", "B.") or both ("B. blue") as well

Whatever is not one of these (a list of answers, an answer with a reason, a part of a word) is
wrong. Judging takes linear time.
"""
import re
import unicodedata
from collections import Counter, defaultdict
from decimal import Decimal
from functools import lru_cache
from string import ascii_lowercase

# ASCII digits only: int("٣") is 3 in Python, but no gold answer is written so.
NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?", re.ASCII)
LONGEST_NUMBER = 40         # characters; a longer text is no number
# The template sets these itself; a second copy inside a text would add a picture or end an answer
# early.
TAG = re.compile(r"<image>|</?(think|answer|summary|caption|reasoning|conclusion)>", re.IGNORECASE)
# Unicode's categories of control characters, zero-width characters and white space.
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
LETTER = re.compile(r"\(?([a-z])(?:[).:]+|$)\s*(.*)", re.DOTALL)


def normalise(answer):
    """Lower case, one space between words, no full stop at the end.

    >>> normalise(" Red  Circle. ")
    'red circle'
    """
    return " ".join(answer.lower().split()).rstrip(". ")


def number(text, unit=""):
    """Normalised text -> its exact value, with or without `unit` after it; None if it is no number.

    >>> number("1,000.50 cm", "cm"), number("3 or 4"), number("nan"), number("1e999")
    (Decimal('1000.50'), None, None, Decimal('1E+999'))
    """
    unit = normalise(unit)
    if unit and text.endswith(unit):
        text = text[:-len(unit)].rstrip()
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def key(answer, unit=""):
    """What an answer is compared by: the number that it is, else its normalised text.

    Without a tolerance, `is_right` takes one answer for another exactly if they have the same key.
    """
    text = normalise(answer)
    value = number(text, unit)
    return text if value is None else value


def commonest_answer(samples):
    """-> (the gold answer that is right most often, the share of `samples` for which it is
    right)."""
    keys = [key(sample.answer, sample.unit) for sample in samples]
    [(commonest, _)] = Counter(keys).most_common(1)
    answer = samples[keys.index(commonest)].answer
    right = sum(is_right(sample, answer) for sample in samples)
    return answer, right / len(samples)


def alike(answers, unit=""):
    """-> lists of the answers that count as the same, in their order. Linear time.

    >>> alike(["1", "two", "1.0", "Two.", "three"])
    [['1', '1.0'], ['two', 'Two.']]
    """
    same = defaultdict(list)
    for answer in answers:
        same[key(answer, unit)].append(answer)
    return [group for group in same.values() if len(group) > 1]


def fault(answer):
    """Why a gold answer can never be judged right, as the end of a sentence; "" when it can.

    >>> fault("..."), fault("two")
    ('is nothing but full stops and spaces, which do not count', '')
    """
    tag = TAG.search(answer)
    if tag:
        return f"holds the tag {tag.group()}, which the prompt template sets itself"
    if not normalise(answer):
        return "is nothing but full stops and spaces, which do not count"
    if all(unicodedata.category(sign) in INVISIBLE for sign in answer):
        return "holds no visible character"
    return ""


@lru_cache(maxsize=4096)
def _accepted(answer, aliases, choices, question):
    """-> (texts that are right, {letter: its choice} for the right choices), all normalised."""
    texts = {normalise(gold) for gold in (answer, *aliases)} - {""}
    letters = {letter: normalise(choice) for letter, choice in zip(ascii_lowercase, choices)}
    if not letters or not _shown_with_letters(letters, normalise(question)):
        return texts, {}
    if any(len(choice) == 1 and choice.isalpha() for choice in letters.values()):
        return texts, {}  # a choice that is itself a letter would make letters ambiguous
    right = {}
    for letter, choice in letters.items():
        if choice in texts or letter == normalise(answer):      # a gold letter names its choice
            right[letter] = choice
    return texts | set(right.values()), right


def _shown_with_letters(letters, question):
    """Whether the question shows every choice behind its letter: "(a) red", "a. red", "a: red"."""
    for letter, choice in letters.items():
        if not re.search(rf"(?<!\w)\(?{letter}[).:]\s*{re.escape(choice)}(?!\w)", question):
            return False
    return True


def verdict(sample, answer):
    """-> (whether the text inside the answer tag is right, why). An empty answer is never right.

    >>> from data.sample import Sample
    >>> verdict(Sample(answer="3", tolerance=0.5, unit="cm"), "3.2 cm")
    (True, 'within 0.5 of 3')
    >>> verdict(Sample(question="Which? (A) red (B) blue", answer="blue", choices=("red", "blue")), "(B)")
    (True, 'choice b')
    """
    given = normalise(answer)
    if not given:
        return False, "no answer"
    aliases = tuple(sample.aliases)
    choices = tuple(sample.choices)
    texts, letters = _accepted(sample.answer, aliases, choices, sample.question)
    if given in texts:
        return True, "the gold answer"
    found = LETTER.fullmatch(given)
    if letters and found:
        letter, rest = found.groups()
        if letter in letters and rest in ("", letters[letter]):
            return True, f"choice {letter}"
    value = number(given, sample.unit)
    if value is None:
        return False, f"expected {sample.answer!r}"
    tolerance = Decimal(str(sample.tolerance))
    for text in texts:
        gold = number(text, sample.unit)
        if gold is None:
            continue
        if value == gold:
            return True, f"equal to {text}"
        # Exponents have three digits at most: the difference of two such numbers is cheap.
        if abs(value - gold) <= tolerance:
            return True, f"within {sample.tolerance:g} of {text}"
    return False, f"expected {sample.answer!r}"


def is_right(sample, answer):
    """Whether the text inside the answer tag is the gold answer."""
    return verdict(sample, answer)[0]


# ---------------------------------------------------------------- samples that nothing could answer

def check_sample(sample):
    """Raises ValueError unless a sample can be asked, taught and judged: no text of it holds a
    tag, its answer can be given, and is right where other choices are wrong."""
    for field in ("question", "answer", "reasoning", "summary", "caption", "aliases", "choices"):
        tag = TAG.search(str(getattr(sample, field)))
        if tag:
            raise ValueError(f"field {field!r} holds the tag {tag.group()}, which the prompt "
                             "template sets itself")
    check_answers(sample)


def check_answers(sample):
    """Raises ValueError unless the answer can be given, and is right where other choices are
    wrong."""
    for gold in (sample.answer, *sample.aliases):
        why = fault(gold)
        if why:
            raise ValueError(f"the answer {gold!r} can never be right: it {why}")
    if sample.choices:
        check_choices(sample)


def check_choices(sample):
    """Raises ValueError unless the gold answer is one of the choices, or its letter, and the
    checker takes no other choice for it."""
    answer = sample.answer
    golds = (answer, *sample.aliases)
    letters = ascii_lowercase[:len(sample.choices)]
    is_letter = len(answer) == 1 and answer.lower() in letters
    if not set(golds) & set(sample.choices) and not is_letter:
        raise ValueError(f"the answer {answer!r} is not among the choices {list(sample.choices)}")
    repeated = alike(sample.choices, sample.unit)
    if repeated:
        names = " and ".join(map(repr, repeated[0]))
        raise ValueError(f"the choices {names} count as the same answer")
    gold_keys = {key(gold, sample.unit) for gold in golds}
    meant = {choice for choice in sample.choices if key(choice, sample.unit) in gold_keys}
    if not meant:
        meant = {sample.choices[letters.index(answer.lower())]}
    for choice in sample.choices:
        right, why = verdict(sample, choice)
        if right and choice not in meant:
            raise ValueError(f"the choice {choice!r} counts as right beside the answer {answer!r}: "
                             f"it is {why}")
