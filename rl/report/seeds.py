"""What the runs of several seeds have in common: joint files of rows, a picture, and a text.

    print(report_seeds(folder, range(5), write))        # folder/seed-0 .. seed-4 are finished runs
"""
import json
from pathlib import Path

from rl.report.curves import curves
from rl.report.log import mean_log, read_log
from rl.report.matched import frontier, matched_text
from rl.report.page import gather, run_page
from rl.report.statistics import main_decoding, over_seeds, result_lines, seeds_table
from rl.report.verdicts import over_seeds_text

FILES = ("results", "differences", "kinds", "training", "baselines", "misread", "routes", "generalisation", "growth",
         "curve", "verdicts")
# Files with tables of their own: rl/report/matched.py, generalisation.py, growth.py, verdicts.py.
NOT_TABLES = ("curve", "generalisation", "growth", "verdicts")


def report_seeds(folder, seeds, write):
    """Joins what each seed left in `folder`/seed-N; -> text: three lines of result, probes, tables.

    Writes those of FILES that the runs left, each with the rows of all seeds, curves.png, report.html and, where arms
    were followed, frontier.png, by `write(path, bytes)`. Where nothing was evaluated the text is "".
    """
    folder = Path(folder)
    runs = [folder / f"seed-{seed}" for seed in seeds]
    joint = {}                                  # name of a file -> the rows of all seeds
    for name in FILES:
        if (runs[0] / f"{name}.json").exists():
            joint[name] = _rows_of_all(runs, name)
    for name in reversed(joint):                # results.json last: a run that has it is finished
        write(folder / f"{name}.json", json.dumps(joint[name], indent=0).encode())
    if not joint.get("results"):
        return ""

    log = mean_log([read_log(run / "log.jsonl") for run in runs])
    picture = curves(log, over_seeds(joint["results"]))
    if picture:
        write(folder / "curves.png", picture)

    shown = []                  # all but question kinds by greedy decoding: there are tables enough
    for rows in (rows for name, rows in joint.items() if name not in NOT_TABLES):
        for row in rows:
            if row["decoding"] != "greedy" or not row["metric"].startswith("accuracy on "):
                shown.append(row)
    lines = result_lines(over_seeds(joint["results"]), over_seeds(joint.get("differences", [])),
                         _compared_to(joint.get("differences", [])), over="seeds")
    parts = ["\n".join([*lines, *_probes(runs)]), over_seeds_text(joint.get("verdicts", [])), seeds_table(shown)]
    text = "\n\n".join(part for part in parts if part)
    if joint.get("curve"):
        text += "\n\n" + _along(folder, joint, write)
    write(folder / "report.html", run_page(folder.name, gather(folder, log=log, **joint), tables=text))
    return text


def _along(folder, joint, write):
    """frontier.png, and the arms at equal accuracy as text."""
    decoding = main_decoding(joint["results"])
    picture = frontier(joint["curve"], decoding)
    if picture:
        write(folder / "frontier.png", picture)
    return matched_text(joint["curve"], decoding)


def _rows_of_all(runs, name):
    rows = []
    for run in runs:
        rows += json.loads((run / f"{name}.json").read_text())
    return rows


def _compared_to(differences):
    """The method that the rows of differences.json are differences to; "" without rows."""
    if not differences:
        return ""
    return differences[0]["metric"].removeprefix("accuracy - ")


def _probes(runs):
    """A line of text with every seed's shape or digit probe, as a list; [] where a run has none."""
    files = [run / "probe.json" for run in runs]
    if not all(file.exists() for file in files):
        return []
    texts = []
    for file in files:
        shares = json.loads(file.read_text())
        texts.append(", ".join(f"{split} {share:.3f}" for split, share in shares.items()))
    return ["probe of the features that W reads, seed by seed: " + "; ".join(texts)]
