"""report.html: a run explains itself on one page. The result first, then what to look at, what the gain is made of,
curves to hover, samples, tables, and what was run.

    found = gather("out/embedded-1")                    # what the folder holds, of one run or of several seeds
    html = run_page("embedded-1", found, entries, tables)       # a page's bytes

Every part that a folder has nothing for is left out, so that the page of a run that stopped is one, too.
"""
import re
from pathlib import Path

from rl.metrics import DEFINITIONS
from rl.report.alarms import alarms
from rl.report.charts import Charts
from rl.report.log import mean_log, read_log, read_rows
from rl.report.samples import STYLE as SAMPLES_STYLE
from rl.report.samples import section
from rl.report.statistics import (decoding_title, decodings_of, main_decoding, main_split, over_seeds, result_lines,
                                  share_text)
from rl.report.verdicts import by_place, counted, means_of, measures_text, title_of
from rl.report.web import document, escape

FILES = ("results", "differences", "kinds", "training", "verdicts", "environment", "probe")
# Numbers of evaluation, as rl/README.md defines them at length.
MEASURES = {
    "accuracy": "share of completions whose answer is the gold one; an interval is over prompts, 95 %",
    "pass@k": "chance that k of a prompt's completions hold a right one, unbiased from those that were sampled",
    "cover@TAU": "share of prompts of whose completions the share TAU or more is right",
    "maj@G": "share of prompts whose commonest answer is right",
    "format": "share of completions that are exactly in the form that was asked for",
    "length": "tokens of a completion, its end included",
    "paired difference": "accuracy of two methods on the same prompts, prompt by prompt, then their mean",
}
# What every step of a supervised stage logs; the loss of stage clip is that of its pairs.
SUPERVISED = {"loss": "nats, of a target token", "lr": "learning rate",
              "grad_norm": "L2 norm of the gradient before clipping"}
# Numbers of a log line that are no curve: names, counters that only grow, and what the first charts show.
NOT_CURVES = ("stage", "method", "step", "flops", "samples", "seconds")
VERDICTS = {"sharpening": "Sharpening or capability?", "form": "Reward or form?", "looking": "Did it look?",
            "thinking": "Does the thought matter?", "reflection": "Words of reflection"}
SCRIPT = Charts.SCRIPT
STYLE = Charts.STYLE + SAMPLES_STYLE + """
nav { position: sticky; top: 0; z-index: 3; background: var(--page); padding: .5em 0; display: flex; flex-wrap: wrap;
      gap: .1em 1.1em; border-bottom: 1px solid var(--line) }
h2 { scroll-margin-top: 3em }
.result p { font-size: 1.05em; margin: .4em 0 }
details { margin: 1em 0 }
summary { cursor: pointer }
pre { overflow-x: auto; font-size: .82em }
.finding { white-space: nowrap; font-weight: 600 }
"""


def gather(folder, **given):
    """What a run folder, or one of several seeds, holds -> {name: what FILES' json, or `given`, has}, and "log",
    "faults", why that is empty, and "seeds", the number of those that its rows are of. given: also "log", where that
    was read before, and "stopped", the error that ended a run."""
    folder = Path(folder)
    found = {}
    for name in FILES:
        found[name] = read_rows(folder / f"{name}.json")
    found |= given
    found["seeds"] = max(1, len({row.get("seed") for row in found["results"]}))
    found["faults"] = []
    if "log" not in given:
        try:
            found["log"] = log_of(folder)
        except ValueError as error:             # of a damaged disk: all else can be told
            found["log"] = []
            found["faults"] = [str(error)]
    return found


def log_of(folder):
    """The log of a run folder; of one of several seeds the mean of theirs. Raises ValueError as read_log."""
    runs = sorted(folder.glob("seed-*/log.jsonl"))
    if runs:
        return mean_log([read_log(run) for run in runs])
    return read_log(folder / "log.jsonl")


def run_page(name, found, entries=(), tables=""):
    """name: of the run; found: of `gather`; entries: of rl/report/samples.py; tables: text, as printed -> the page's
    bytes."""
    charts = Charts()
    notes = [note for entry in found["environment"] for note in entry["notes"]]
    dtype = "float32"
    for entry in found["environment"]:
        dtype, _ = entry["differs"].get("dtype", (dtype, None))
    sentences = found["faults"] + alarms(found["log"], notes, dtype)
    if found.get("stopped"):
        sentences.insert(0, f"The run stopped: {found['stopped']}")
    parts = {
        "Result": result(found),
        "Look at first": as_list(sentences,
                                 "Numbers of the log beyond fixed thresholds. They name no cause, and without one of "
                                 "them a run may still have a fault."),
        title_of(found["verdicts"]): gain(found["verdicts"], found["seeds"]),
        "Accuracy": accuracy(charts, found),
        "Samples": section(entries) if entries else "",
        "Reinforcement learning": learning(charts, found["log"]),
        "Supervised stages": imitation(charts, found["log"]),
        "Tables": f"<details><summary>All tables, as printed</summary><pre>{escape(tables)}</pre></details>"
                  if tables else "",
        "What was run": what_was_run(found),
        "What the numbers mean": definitions(found["log"]),
    }
    body = []
    links = []
    for title, html in parts.items():
        if html:
            place = re.sub("[^a-z]+", "-", title.lower())
            links.append(f'<a href="#{place}">{title}</a>')
            body.append(f'<section id="{place}"><h2>{title}</h2>\n{html}\n</section>')
    nav = f'<nav aria-label="parts of the page">{"".join(links)}</nav>'
    return document(f"Run {name}", "\n".join([nav, *body, charts.data()]), STYLE, SCRIPT)


# ---------------------------------------------------------------- the result

def result(found):
    """The three lines of a result, each a paragraph."""
    differences = found["differences"]
    to = differences[0]["metric"].removeprefix("accuracy - ") if differences else ""
    rows = found["results"]
    over = "prompts"
    if found["seeds"] > 1:
        rows, differences, over = over_seeds(rows), over_seeds(differences), "seeds"
    lines = result_lines(rows, differences, to, over)
    return '<div class="card result">' + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</div>"


def gain(verdicts, seeds):
    """The verdicts: a sentence each of the split that is like training, and what was found on the others; of several
    seeds how often it was found."""
    if not verdicts:
        return ""
    places = by_place(verdicts)
    splits = list(dict.fromkeys(row["split"] for row in verdicts))
    home = main_split(splits)
    questions = list(dict.fromkeys(row["question"] for row in verdicts))
    told = []
    for question in questions:
        rows = places.get((question, home), [])
        for row in rows[:1]:
            sentence = measures_text(rows) if seeds > 1 else row["sentence"]
            told.append(f'<tr><th>{escape(VERDICTS.get(question, question))}</th><td class="finding">'
                        f"{escape(counted(rows))}</td><td>{escape(sentence)}</td></tr>")
    away = [split for split in splits if split != home]
    others = [("", *away)]
    for question in questions:
        cells = [counted(places.get((question, split), [])) for split in away]
        if any(cells):
            others.append((VERDICTS.get(question, question), *cells))
    elsewhere = ""
    if away:
        elsewhere = f'<div class="card wide"><b>On the other splits</b>{plain_table(others)}</div>'
    over = ""
    if seeds > 1:
        over = f" Of {seeds} seeds: {means_of(seeds)}, differences in points."
    return ('<p class="quiet">Fixed rules over 95 % intervals over prompts, each able to find nothing; not corrected '
            f'for their number.{over}</p><div class="card wide"><table>{"".join(told)}</table></div>{elsewhere}')


def as_list(sentences, note):
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<p class="quiet">{note}</p><div class="card"><ul>{items}</ul></div>'


# ---------------------------------------------------------------- accuracy

def accuracy(charts, found):
    """A chart of the main decoding, and a table of every decoding, and of paired differences."""
    rows = [row for row in found["results"] if row["metric"] == "accuracy"]
    differences = found["differences"]
    if not rows:
        return ""
    over = "prompts"
    if found["seeds"] > 1:
        rows, differences, over = over_seeds(rows), over_seeds(differences), f"{found['seeds']} seeds"
    decoding = main_decoding(rows)
    note = f"share right, {decoding_title(decoding)}, with 95 % intervals over {over}"
    chart = charts.shares("Accuracy by split", note, [row for row in rows if row["decoding"] == decoding])
    parts = [f'<div class="charts big">{chart}</div>']
    for name in decodings_of(rows):
        chosen = [row for row in rows if row["decoding"] == name]
        parts.append(grid(f"Accuracy, {decoding_title(name)} [95 % interval over {over}]", chosen, share_text))
    chosen = [row for row in differences if row["decoding"] == decoding]
    if chosen:
        to = chosen[0]["metric"].removeprefix("accuracy - ")
        parts.append(grid(f"Points more than {to}, paired by prompt, {decoding_title(decoding)} [95 % interval over "
                          f"{over}]", chosen, points_text))
    return "\n".join(parts)


def points_text(row):
    """A difference in points with its interval, if it has one."""
    text = f"{100 * row['value']:+.1f}"
    if row["low"] is None or abs(row["low"]) > 1 or abs(row["high"]) > 1:
        return text
    return f"{text} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"


def grid(title, rows, text_of):
    """A table with a line a method and a column a split."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["split"]): text_of(row) for row in rows}
    head = "".join(f"<th>{escape(split)}</th>" for split in splits)
    lines = []
    for method in methods:
        texts = "".join(f'<td class="number">{escape(cells.get((method, split), ""))}</td>' for split in splits)
        lines.append(f"<tr><th>{escape(method)}</th>{texts}</tr>")
    return (f'<div class="card wide"><b>{escape(title)}</b><table><tr><th></th>{head}</tr>{"".join(lines)}</table>'
            "</div>")


# ---------------------------------------------------------------- curves

def series_of(lines, name):
    """[(step, value)] of the lines that have the number."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]


def learning(charts, log):
    """Charts of every number that reinforcement learning logs: a method's rewards together, then one chart a number
    with a series a method."""
    methods = {}                                # method -> its lines
    for line in log:
        if "reward" in line:
            methods.setdefault(line["method"], []).append(line)
    if not methods:
        return ""
    rewards = []
    for method, lines in methods.items():
        parts = ["reward", *(name for name in lines[0] if name.startswith("reward/"))]
        series = {name.removeprefix("reward/"): series_of(lines, name) for name in parts}
        series = {"weighted sum": series.pop("reward"), **series}
        rewards.append(charts.lines(f"Rewards of {method}", "mean over completions", series, from_zero=True))
    others = []
    constants = []
    for name in in_order({name for lines in methods.values() for line in lines for name in line}):
        series = {method: series_of(lines, name) for method, lines in methods.items()}
        values = {value for points in series.values() for _, value in points}
        if len(values) == 1:
            constants.append(f"{name} {values.pop():g}")
        else:
            others.append(charts.lines(name, definition(name), series))
    still = f"<p>Equal in every step: {escape(', '.join(constants))}.</p>" if constants else ""
    return (f'<div class="charts big">{"".join(rewards)}</div>\n<h3>Everything that is logged</h3>\n'
            f'<div class="charts">{"".join(others)}</div>{still}')


# What a reader looks for first, and what only costs time; all else stands between.
FIRST = ("length", "truncated", "flat", "all_right", "none_right", "entropy", "grad_norm", "lr", "kl", "kl_ref",
         "drift_max")
LAST = "(seconds_|tokens_per_second|update_tokens_per_second)"


def in_order(names):
    """The numbers of a log's lines that have a chart of their own, in the order of the charts."""
    names = [name for name in names if name not in NOT_CURVES and not re.match("reward(/|$)", name)]

    def place(name):
        if name in FIRST:
            return 0, FIRST.index(name), name
        return 2 if re.match(LAST, name) else 1, 0, name

    return sorted(names, key=place)


def imitation(charts, log):
    """Charts of every supervised stage."""
    stages = {}                                 # stage -> its lines
    for line in log:
        if "step" in line and "reward" not in line:
            stages.setdefault(line["stage"], []).append(line)
    found = []
    for stage, lines in stages.items():
        for name, note in SUPERVISED.items():
            found.append(charts.lines(f"{stage}: {name}", note, {stage: series_of(lines, name)}))
    return f'<div class="charts">{"".join(found)}</div>' if any(found) else ""


def definition(name):
    """What a logged number is, in a line; "" of one that DEFINITIONS does not have."""
    pattern = re.sub("^(reward|reward_std)/.*", r"\1/<name>", name)
    pattern = re.sub("^words_.*", "words_<word>", pattern)
    pattern = re.sub("^grad_norm_.*", "grad_norm_<module>", pattern)
    name = name if name in DEFINITIONS else pattern
    said = ""                                   # what "the same" is
    for known, (what, unit, estimator) in DEFINITIONS.items():
        if not what.startswith("the same"):
            said = what
        if known == name:
            parts = (what.replace("the same", said), "" if unit == "1" else unit, estimator)
            return ", ".join(part for part in parts if part)
    return ""


def definitions(log):
    """What every number of the tables and of this log means."""
    names = dict.fromkeys(name for line in log if "reward" in line for name in line)
    rows = list(MEASURES.items())
    for name in names:
        text = definition(name)
        if text:
            rows.append((name, text))
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f'<details><summary>{len(rows)} definitions</summary><div class="card wide"><table>{lines}</table></div>' \
           "</details>"


# ---------------------------------------------------------------- what was run

def stage_seconds(log):
    """{stage: seconds}, of a stage that was resumed all that its processes took."""
    found = {}
    last = {}                                   # stage -> the last line's seconds, which begin anew when resumed
    for line in log:
        if "seconds" not in line:
            continue
        stage = line["stage"]
        before = last.get(stage, 0.0)
        step = line["seconds"] - before
        found[stage] = found.get(stage, 0.0) + (step if step >= 0 else line["seconds"])
        last[stage] = line["seconds"]
    return found


def what_was_run(found):
    """Machine, versions, commit, time; the options that differ from the defaults; seconds of each stage; probes."""
    parts = []
    for entry in found["environment"]:
        rows = [(name, entry[name]) for name in entry if name not in ("notes", "differs", "command")]
        rows.append(("command", " ".join(entry["command"])))
        parts.append(plain_table(rows))
    if found["environment"]:
        differs = found["environment"][-1]["differs"]
        rows = [(option, value, default) for option, (value, default) in differs.items()]
        if rows:
            parts.append("<b>Options that differ from the defaults</b>")
            parts.append(plain_table(rows, ("option", "value", "default")))
    seconds = stage_seconds(found["log"])
    if seconds:
        rows = [(stage, f"{value:.1f}") for stage, value in seconds.items()]
        rows.append(("all stages", f"{sum(seconds.values()):.1f}"))
        parts.append("<b>Seconds of training</b>")
        parts.append(plain_table(rows))
    if found["probe"]:
        parts.append("<b>Probe of the features that W reads, share right</b>")
        parts.append(plain_table([(split, f"{value:.3f}") for split, value in found["probe"].items()]))
    return f'<div class="card wide">{"".join(parts)}</div>' if parts else ""


def plain_table(rows, head=()):
    """Rows of values, the first of each a heading."""
    lines = []
    if head:
        lines.append("<tr>" + "".join(f"<th>{escape(word)}</th>" for word in head) + "</tr>")
    for first, *others in rows:
        cells = "".join(f'<td class="text">{escape(str(value))}</td>' for value in others)
        lines.append(f"<tr><th>{escape(str(first))}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
