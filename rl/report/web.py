"""What the pages of a report share: one frame and style sheet, light and dark, and data that no text can break out of.

    document("Run 3", body, script=SCRIPT)      # a page's bytes: one file, no network
    data_block("rows", rows)            # read by JSON.parse(document.getElementById("rows").textContent)

Every text that a model, a data set or a folder's name brings goes through `escape` or `data_block`.
"""
import base64
import hashlib
import json
import math
from html import escape         # noqa: F401

# Series of a chart take these colours in turn: Okabe and Ito's, which colour-blind readers tell apart, darker on white
# and lighter on black; a dash pattern each, for print and for those who see no colour.
SERIES = 8
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #222222; --quiet: #646464; --line: #dcdcdc;
        --good: #00664b; --bad: #a8410a; --tag: #6b4a9c; --link: #0059a8; --mark: #fff0c2;
        --s0: #0072b2; --s1: #c04e00; --s2: #00785a; --s3: #a4568a; --s4: #8f6400; --s5: #2480c2; --s6: #444444;
        --s7: #7a3fb8 }
@media (prefers-color-scheme: dark) {
:root { --page: #16181b; --card: #202327; --ink: #e6e6e3; --quiet: #a3a6aa; --line: #3a3e44;
        --good: #4fd1a5; --bad: #ff9a62; --tag: #c3a6f0; --link: #7cc0ff; --mark: #51430f;
        --s0: #56b4e9; --s1: #f28c4b; --s2: #35c79a; --s3: #e29bc6; --s4: #e6b730; --s5: #8fc7f5; --s6: #c9c9c9;
        --s7: #c39bf5 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1100px;
       margin: 2em auto; padding: 0 1em }
a { color: var(--link) }
h1 { font-size: 1.4em }
h2 { font-size: 1.15em; margin-top: 2em }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 1.1em; margin: 1.1em 0 }
.quiet { color: var(--quiet); font-size: .87em }
.good, .bad { white-space: nowrap; font-weight: 600 }
.good { color: var(--good) }
.bad { color: var(--bad) }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: .35em .9em .35em 0; border-top: 1px solid var(--line);
         font-weight: normal }
th { font-weight: 600 }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.wide { overflow-x: auto }
.text { font-family: ui-monospace, monospace; font-size: .9em; white-space: pre-wrap; overflow-wrap: anywhere;
        unicode-bidi: isolate }
.tag { color: var(--tag) }
img { border: 1px solid var(--line) }
img.small { image-rendering: pixelated }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
"""

# A page fetches nothing and runs no script but its own one, whatever a completion says: its texts are escaped, and the
# browser is told so as well.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{may}">
<style>{style}</style></head><body>
<h1>{title}</h1>
{body}
{script}</body></html>
"""


def document(title, body, style="", script=""):
    """A title, HTML and, if there are any, further style and one script -> a page, bytes."""
    may = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        may = f"; script-src 'sha256-{digest}'"
        script = f"<script>{script}</script>\n"
    html = PAGE.format(title=escape(title), body=body, style=STYLE + style, may=may, script=script)
    return html.encode(errors="replace")        # half a surrogate pair has no UTF-8


def data_block(name, value):
    """A value of JSON's kinds -> a <script> that holds it as data, whatever its texts are: no < is left in it."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def finite(value):
    """The value with None in place of every number that JSON has no word for, as of a loss that is nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value
