"""Files that people open after a run: samples.html and curves.png. Read the samples before the curves.

    log = read_log("out/embedded-1/log.jsonl")
    curves(log, json.load(open("out/embedded-1/results.json")))         # a PNG's bytes, None without matplotlib
    samples(entries, "Samples of embedded-1, T = 1")                    # a page's bytes
"""
import base64
import io
import json
import re
from html import escape
from pathlib import Path

from data.sample import read_image
from rl.report.curves import curves    # noqa: F401: `report.curves`

# The page runs nothing and fetches nothing, whatever a completion says: besides escaping, the browser is told so.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; background: #f6f6f4; max-width: 1100px; margin: 2em auto;
       padding: 0 1em }}
h1 {{ font-size: 1.4em }}
.entry {{ display: flex; flex-wrap: wrap; gap: 1.4em; background: white; border: 1px solid #ddd; border-radius: 6px;
         padding: 1.1em; margin: 1.1em 0 }}
.entry > div {{ flex: 1 1 32em; min-width: 0 }}
img {{ width: 15em; align-self: flex-start; border: 1px solid #ddd }}
img.small {{ image-rendering: pixelated }}
.quiet {{ color: #6a6a6a; font-size: .87em }}
.question {{ font-size: 1.15em; margin: .1em 0 .5em }}
table {{ border-collapse: collapse; width: 100% }}
.entry table {{ margin-top: .6em }}
table.counts {{ width: auto }}
td, th {{ text-align: left; vertical-align: top; padding: .4em .9em .4em 0; border-top: 1px solid #eee;
         font-weight: normal }}
th {{ white-space: nowrap; font-weight: 600 }}
.text {{ font-family: ui-monospace, monospace; font-size: .9em; white-space: pre-wrap; overflow-wrap: anywhere;
        unicode-bidi: isolate }}
.tag {{ color: #7a5aa6 }}
.right, .wrong {{ white-space: nowrap; font-weight: 600 }}
.right {{ color: #00664b }}
.wrong {{ color: #a8410a }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def read_log(path):
    """log.jsonl -> list of dicts; [] without the file. A last line cut off by a kill is skipped."""
    lines = Path(path).read_bytes().splitlines() if Path(path).exists() else []
    log = []
    for number, text in enumerate(lines, 1):
        try:
            log.append(json.loads(text))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON: {text[:80]!r}") from None
    return log


def mean_log(logs):
    """Logs of several seeds -> one whose numbers are their means, step by step; a number that some lack is left out."""
    lines = {}
    for log in logs:
        for line in log:
            if "step" not in line:      # a record that could not be used
                continue
            which = {name: line[name] for name in ("stage", "method", "step") if name in line}
            lines.setdefault(tuple(which.items()), []).append(line)
    return [dict(which) | {
        name: sum(line[name] for line in same) / len(same) for name in same[0]
        if name not in dict(which) and all(isinstance(line.get(name), (int, float)) for line in same)}
        for which, same in lines.items()]


def samples(entries, title):
    """Pictures, questions and what each method answered -> one HTML page, bytes, that needs no other file nor script.

    An entry is a dict: image (path, (H, W, 3) uint8 array, or None), prompt, answer (gold), kind, and completions, each
    dict(method, text, reward={"correctness": 1.0, ..}, why), in the order shown. Texts are untrusted: all are escaped.
    """
    body = "\n".join([_counts(entries), *map(_entry, entries)])
    return PAGE.format(title=escape(title), body=body).encode(errors="replace")     # half a surrogate pair has no UTF-8


def _is_right(completion):
    """True, False, or None when correctness was not a reward."""
    return completion["reward"]["correctness"] > 0 if "correctness" in completion["reward"] else None


def _verdict(right):
    # A word and a symbol beside the colour, for those who do not see it.
    words = {True: '<span class="right">✓ right</span>', False: '<span class="wrong">✗ wrong</span>'}
    return words.get(right, "")


def _counts(entries):
    """How many of the shown completions are right, by method; the real numbers, with intervals, are in results.json."""
    judged = {}
    for entry in entries:
        for completion in entry["completions"]:
            judged.setdefault(completion["method"], []).append(_is_right(completion))
    rows = "".join(f"<tr><th>{escape(method)}</th><td>{right.count(True)} of {len(right)} right</td></tr>"
                   for method, right in judged.items() if None not in right)
    return f'<p class="quiet">{len(entries)} prompts.</p><table class="counts">{rows}</table>'


def _entry(entry):
    rows = []
    for completion in entry["completions"]:
        # Tags in colour: they are found after escaping, so that nothing in the text is ever markup.
        text = re.sub(r"&lt;/?\w+&gt;", r'<span class="tag">\g<0></span>', escape(completion["text"]))
        parts = ", ".join(f"{name} {value:g}" for name, value in completion["reward"].items())
        rows.append(f'<tr><th>{escape(completion["method"])}</th><td>{_verdict(_is_right(completion))}</td>'
                    f'<td><div class="text">{text or "(empty)"}</div>'
                    f'<div class="quiet">{escape(parts)} &middot; {escape(completion["why"])}</div></td></tr>')
    return (f'<div class="entry">{_picture(entry["image"])}<div><div class="quiet">{escape(entry["kind"])}</div>'
            f'<div class="question">{escape(entry["prompt"])}</div><div>Gold answer: '
            f'<b>{escape(entry["answer"])}</b></div><table>{"".join(rows)}</table></div></div>')


def _picture(source, most=480):
    """An <img> with the picture inside; large ones are shrunk, small ones shown with hard pixel edges."""
    if source is None:
        return ""
    picture = read_image(source)
    small = "small" if max(picture.size) <= 160 else ""
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{small}" alt="picture" src="data:image/png;base64,{data}">'
