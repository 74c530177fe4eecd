"""When an answer counts as the gold one. All that may differ is stated here, for training and evaluation alike.

    words       case, the white space between them, full stops at the end; the gold answer or one of its aliases
    numbers     the way they are written ("1,000" and "1000.0"); a unit, if the sample names one, or none; and as much
                as the sample's tolerance allows
    choices     the text of the choice; where the question shows them with letters ("(A) red (B) blue", "A. red ..") its
                letter ("B", "(b)", "B.") or both ("B. blue") as well

Whatever is not one of these, a list of answers, an answer with a reason, a part of a word, is wrong. Linear time.
"""
import re
import unicodedata
from collections import defaultdict
from decimal import Decimal
from functools import lru_cache
from string import ascii_lowercase

# ASCII digits alone: int("٣") is 3 in Python, but no gold answer is written so. Nothing longer is a number.
NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?", re.ASCII)
LONGEST_NUMBER = 40
# The template sets these itself; a second copy inside a text would add a picture or end an answer early.
TAG = re.compile(r"<image>|</?(think|answer|summary|caption|reasoning|conclusion)>", re.IGNORECASE)
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}      # Unicode's categories: controls, zero-width characters, white space
LETTER = re.compile(r"\(?([a-z])(?:[).:]+|$)\s*(.*)", re.DOTALL)


def normalise(answer):
    """Lower case, one space between words, no full stop at the end.

    >>> normalise(" Red  Circle. ")
    'red circle'
    """
    return " ".join(answer.lower().split()).rstrip(". ")


def number(text, unit=""):
    """The number that a normalised text is, exactly, `unit` after it or not; else None.

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

    Without a tolerance `is_right` cannot tell apart the answers of one key, and no others.
    """
    text = normalise(answer)
    value = number(text, unit)
    return text if value is None else value


def alike(answers, unit=""):
    """Lists of the answers that count as the same, in their order. Linear time.

    >>> alike(["1", "two", "1.0", "Two.", "three"])
    [['1', '1.0'], ['two', 'Two.']]
    """
    same = defaultdict(list)
    for answer in answers:
        same[key(answer, unit)].append(answer)
    return [group for group in same.values() if len(group) > 1]


def fault(answer):
    """Why a gold answer can never be given and judged right, as the end of a sentence; "" when it can.

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
def _gold(answer, aliases, choices, question):
    """-> accepted texts, and {letter: accepted text after it} of the right choices."""
    texts = {normalise(gold) for gold in (answer, *aliases)} - {""}
    letters = {letter: normalise(choice) for letter, choice in zip(ascii_lowercase, choices)}
    question = normalise(question)
    shown = all(re.search(rf"(?<!\w)\(?{letter}[).:]\s*{re.escape(choice)}(?!\w)", question)
                for letter, choice in letters.items())
    if not letters or not shown or any(len(choice) == 1 and choice.isalpha() for choice in letters.values()):
        return texts, {}                # a choice that is itself a letter would make letters ambiguous
    # A gold answer that is a letter names its choice.
    right = {letter: choice for letter, choice in letters.items() if choice in texts or letter == normalise(answer)}
    return texts | set(right.values()), right


def verdict(sample, answer):
    """-> (whether it is right, why), of the text inside the answer tag. An empty answer is never right.

    >>> from data.sample import Sample
    >>> verdict(Sample(answer="3", tolerance=0.5, unit="cm"), "3.2 cm")
    (True, 'within 0.5 of 3')
    >>> verdict(Sample(question="Which? (A) red (B) blue", answer="blue", choices=("red", "blue")), "(B)")
    (True, 'choice b')
    """
    given = normalise(answer)
    if not given:
        return False, "no answer"
    texts, letters = _gold(sample.answer, tuple(sample.aliases), tuple(sample.choices), sample.question)
    if given in texts:
        return True, "the gold answer"
    if letters and (found := LETTER.fullmatch(given)):
        letter, rest = found.groups()
        if letter in letters and rest in ("", letters[letter]):
            return True, f"choice {letter}"
    value = number(given, sample.unit)
    if value is not None:
        for text in texts:
            gold = number(text, sample.unit)
            # Exponents of three digits at most: the difference of two such numbers is cheap.
            if gold is not None and abs(value - gold) <= Decimal(str(sample.tolerance)):
                return True, f"within {sample.tolerance:g} of {text}" if value != gold else f"equal to {text}"
    return False, f"expected {sample.answer!r}"


def is_right(sample, answer):
    """Whether the text inside the answer tag is the gold answer."""
    return verdict(sample, answer)[0]
