"""log.jsonl and other files of a run, read back, and the mean of the logs of several seeds."""
import json
from pathlib import Path


def read_log(path):
    """log.jsonl -> list of dicts; [] without the file.

    A last line that was cut off by a kill is skipped. Raises ValueError for any other line that is
    not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    log = []
    for number, line in enumerate(lines, 1):
        try:
            log.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON: {line[:80]!r}") from None
    return log


def read_rows(path):
    """What a JSON file of a run holds; [] without the file, and of one that a full or damaged disk left torn: no report
    is worth the run that it is about."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return []


def mean_log(logs):
    """Logs of several seeds -> one log whose numbers are their means, step by step.

    A number that is missing from one of the seeds at a step is left out there.
    """
    grouped = {}                        # stage, method, step, as far as given -> the seeds' lines
    for log in logs:
        for line in log:
            if "step" not in line:      # a record that could not be used
                continue
            key = tuple((name, line[name]) for name in ("stage", "method", "step") if name in line)
            grouped.setdefault(key, []).append(line)

    means = []
    for key, lines in grouped.items():
        mean = dict(key)
        for name in lines[0]:
            values = [line.get(name) for line in lines]
            if name not in mean and all(isinstance(value, (int, float)) for value in values):
                mean[name] = sum(values) / len(values)
        means.append(mean)
    return means
