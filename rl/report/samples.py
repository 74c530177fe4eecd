"""The samples of a run, a part of report.html: pictures, questions and what each method answered.

    html = section(entries_of(tests, scores, rewards, "t1"))    # for the page of a run
    page = document("My samples", section(entries), STYLE)      # a page of entries of your own

Read the samples before the curves.
"""
import base64
import io
import re

from data.chat import is_right, parse
from data.sample import read_image
from rl.report.web import escape

STYLE = """
.entry { display: flex; flex-wrap: wrap; gap: 1.4em }
.entry > div { flex: 1 1 32em; min-width: 0 }
.entry > img { width: 15em; align-self: flex-start }
.entry table { margin-top: .6em; width: 100% }
.entry th { overflow-wrap: anywhere; max-width: 14em }
.question { font-size: 1.15em; margin: .1em 0 .5em; overflow-wrap: anywhere }
"""


OPEN = 8                    # entries that are shown at once; the others unfold


def entries_of(tests, scores, rewards, decoding, each=OPEN):
    """The first `each` prompts of every split with each method's first completion -> entries, as `section` takes them.

    tests: split -> samples; scores: method -> split -> raw scores (see rl/report/statistics.py), of
    which the completions of `decoding` are shown; rewards: has `names`, `parts(sample, text)` ->
    {name: value} and `why(sample, text)` -> str.
    """
    entries = []
    for split, samples_of_split in tests.items():
        texts = {}                              # method -> its first completion of each prompt
        for method, splits in scores.items():
            raw = splits.get(split, {}).get(decoding, {})
            texts[method] = raw.get("text", [])
        for n, sample in enumerate(samples_of_split[:each]):
            answered = {method: written[n] for method, written in texts.items() if n < len(written)}
            if not answered:                    # fewer prompts were sampled than are shown
                break
            completions = []
            for method, text in answered.items():
                completions.append(_judged(method, sample, text, rewards))
            entries.append(dict(images=sample.images, prompt=sample.question, answer=sample.answer,
                                kind=f"{split}, {sample.source}", completions=completions))
    return entries


def _judged(method, sample, text, rewards):
    """A completion as `section` takes it. Whether it is right is not asked of the reward, which may be at fault."""
    parts = rewards.parts(sample, text)
    shown = {name: parts[name] for name in rewards.names}
    right = is_right(sample, parse(text).answer) if "correctness" in shown else None
    return dict(method=method, text=text, right=right, reward=shown, why=rewards.why(sample, text))


def section(entries):
    """Entries -> HTML that needs no other file and no script; all but the first OPEN are folded.

    An entry is a dict: images (each a path, the bytes of an encoded picture, or an (H, W, 3) uint8 array), prompt,
    answer (gold), kind, and completions, each dict(method, text, right, reward={"correctness": 1.0, ..}, why), in the
    order shown; right: True, False, or None where that is not asked. Texts are untrusted: all of them are escaped.
    """
    parts = [_counts(entries), *map(_entry, entries[:OPEN])]
    if len(entries) > OPEN:
        folded = "\n".join(map(_entry, entries[OPEN:]))
        parts.append(f"<details><summary>{len(entries) - OPEN} more prompts</summary>{folded}</details>")
    return "\n".join(parts)


def _verdict(right):
    # A word and a symbol beside the colour, for those who do not see it.
    words = {True: '<span class="good">✓ right</span>',
             False: '<span class="bad">✗ wrong</span>'}
    return words.get(right, "")


def _counts(entries):
    """How many of the shown completions are right, by method.

    The real numbers, with intervals, are in results.json.
    """
    judged = {}                                 # method -> whether each of its completions is right
    for entry in entries:
        for completion in entry["completions"]:
            judged.setdefault(completion["method"], []).append(completion["right"])
    rows = ""
    for method, right in judged.items():
        if None not in right:
            count = f"{right.count(True)} of {len(right)} right"
            rows += f"<tr><th>{escape(method)}</th><td>{count}</td></tr>"
    return f'<p class="quiet">{len(entries)} prompts.</p><table>{rows}</table>'


def _entry(entry):
    """A prompt with its pictures and a table of its completions, as HTML."""
    pictures = "".join(map(_picture, entry["images"]))
    rows = "".join(map(_row, entry["completions"]))
    return (f'<div class="card entry">{pictures}<div><div class="quiet">{escape(entry["kind"])}</div>'
            f'<div class="question">{escape(entry["prompt"])}</div><div>Gold answer: '
            f'<b>{escape(entry["answer"])}</b></div><table>{rows}</table></div></div>')


def _row(completion):
    """A completion as a row of its prompt's table, as HTML."""
    # Tags in colour: they are found after escaping, so that nothing in the text is ever markup.
    text = re.sub(r"&lt;/?\w+&gt;", r'<span class="tag">\g<0></span>', escape(completion["text"]))
    rewards = ", ".join(f"{name} {value:g}" for name, value in completion["reward"].items())
    verdict = _verdict(completion["right"])
    why = escape(completion["why"])
    return (f'<tr><th>{escape(completion["method"])}</th><td>{verdict}</td>'
            f'<td><div class="text">{text or "(empty)"}</div>'
            f'<div class="quiet">{escape(rewards)} &middot; {why}</div></td></tr>')


def _picture(source, most=480):
    """An <img> with the picture inside; large ones are shrunk, small ones get hard pixel edges."""
    picture = read_image(source)
    small = "small" if max(picture.size) <= 160 else ""
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{small}" alt="picture" src="data:image/png;base64,{data}">'
