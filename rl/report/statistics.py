"""From raw scores to rows with intervals, paired differences and text tables.

Raw scores of a method on a split: {"greedy": {...}, "t1": {...}}, each with one entry a prompt: right and format
(n, G), length (n, G), answer (n, G), gold (n,), aliases (n,), kind (n,), text (n,) the first completion.
"""
import math
from collections import Counter

import numpy as np

from data.chat import normalise

CLASS_MEAN = "class-averaged accuracy"      # its rows have no interval; n is the number of classes
MOST_KINDS = 8                              # kinds of questions that a line of a table can hold
WORST = 5                                   # those shown where there are more


def majority_right(answers, gold, aliases):
    """1 when the commonest non-empty answer is right; ties go to the one sampled first."""
    votes = Counter(answer for answer in answers if answer)
    return int(bool(votes) and votes.most_common(1)[0][0] in (gold, *aliases))


def per_prompt(scores, metric):
    """Raw scores of a decoding -> (n,) array of the metric, one value a prompt; None where it is not defined."""
    if metric == "accuracy":
        return np.mean(scores["right"], axis=1)
    if metric.startswith("pass@"):
        return np.max(scores["right"], axis=1).astype(float) if len(scores["right"][0]) > 1 else None
    if metric.startswith("maj@"):
        if "aliases" not in scores or len(scores["right"][0]) < 2:
            return None
        return np.array([majority_right(*entry) for entry in zip(scores["answer"], scores["gold"], scores["aliases"])],
                        dtype=float)
    return np.mean(scores[metric], axis=1) if metric in scores else None


def interval(values):
    """Mean of one value a prompt with its 95 % interval: (mean, low, high).

    Wilson's interval for 0/1 values, the normal one otherwise (several completions of a prompt are not independent, so
    the prompt is the unit).
    """
    values = np.asarray(values, dtype=float)
    n, mean = len(values), float(values.mean())
    if set(np.unique(values)) <= {0.0, 1.0}:
        z = 1.96
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return mean, centre - half, centre + half
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else float("inf")
    return mean, mean - half, mean + half


def within(low, high, least, most):
    """An interval cut to what the quantity can be; where that has no bound, None for one of infinite width."""
    return tuple(edge if math.isfinite(edge) else None for edge in (max(low, least), min(high, most)))


def rows(method, split, scores, seed):
    """Raw scores of a split -> rows (method, split, decoding, metric, value, low, high, n, seed)."""
    out = []
    for decoding, of in scores.items():
        group = len(of["right"][0])
        for metric in ("accuracy", "format", "length", f"pass@{group}", f"maj@{group}"):
            values = per_prompt(of, metric)
            if values is not None:
                value, *ends = interval(values)
                low, high = within(*ends, 0.0, math.inf if metric == "length" else 1.0)
                out.append(dict(method=method, split=split, decoding=decoding, metric=metric, value=value, low=low,
                                high=high, n=len(values), seed=seed))
        if found := class_mean(of):
            value, classes = found
            out.append(dict(method=method, split=split, decoding=decoding, metric=CLASS_MEAN, value=value, low=None,
                            high=None, n=classes, seed=seed))
    return out


def differences(scores, to):
    """Paired differences in accuracy, method minus `to`, on the same prompts, with their 95 % intervals.

    scores: method -> split -> raw scores. Rows like those of `rows`, metric "accuracy - {to}".
    """
    out = []
    for method, splits in scores.items():
        for split, of in splits.items():
            for decoding, mine in of.items():
                theirs = scores.get(to, {}).get(split, {}).get(decoding)
                if method == to or theirs is None:
                    continue
                a, b = per_prompt(mine, "accuracy"), per_prompt(theirs, "accuracy")
                delta = a - b
                half = 1.96 * float(delta.std(ddof=1)) / math.sqrt(len(delta)) if len(delta) > 1 else float("inf")
                mean = float(delta.mean())
                low, high = within(mean - half, mean + half, -1.0, 1.0)
                out.append(dict(method=method, split=split, decoding=decoding, metric=f"accuracy - {to}", value=mean,
                                low=low, high=high, n=len(delta)))
    return out


def by_kind(scores):
    """Raw scores of a decoding -> {question kind: (accuracy, n)}."""
    accuracy, kinds = per_prompt(scores, "accuracy"), np.array(scores["kind"])
    return {kind: (float(accuracy[kinds == kind].mean()), int((kinds == kind).sum())) for kind in sorted(set(kinds))}


def class_mean(scores):
    """Raw scores of a decoding on pictures whose kind is their class -> (accuracy averaged over classes, classes): each
    class counts alike, however many pictures it has. None where kinds are not classes."""
    if "gold" not in scores or [normalise(kind) for kind in scores["kind"]] != list(scores["gold"]):
        return None
    accuracies = [accuracy for accuracy, _ in by_kind(scores).values()]
    return float(np.mean(accuracies)), len(accuracies)


def kind_rows(scores, seed):
    """scores: method -> split -> raw scores -> rows (method, split, decoding, metric "accuracy on KIND", value, n)."""
    return [dict(method=method, split=split, decoding=decoding, metric=f"accuracy on {kind}", value=value, n=n,
                 seed=seed)
            for method, splits in scores.items() for split, of in splits.items() for decoding, raw in of.items()
            for kind, (value, n) in by_kind(raw).items()]


def training_rows(log, seed, last=10):
    """Lines of log.jsonl -> rows on how each RL stage went, decoding "training", metric "RL", a column each as split.

    s/step: median; clipped, %: tokens beyond the clip on either side, mean over all rollouts with an update; right,
    format, entropy, in nats a token: means over the `last` rollouts; 1000 samples: completions drawn in all.
    """
    methods, out = {}, []
    for line in log:
        if "reward" in line:
            methods.setdefault(line["method"], []).append(line)
    for method, lines in methods.items():
        def mean(name, of):
            values = [line[name] for line in of if name in line]
            return float(np.mean(values)) if values else 0.0

        columns = {
            "1000 samples": lines[-1]["samples"] / 1000,
            "s/step": float(np.median([sum(line[name] for name in line if name.startswith("seconds_"))
                                       for line in lines])),
            "clipped, %": 100 * (mean("clip_low", lines) + mean("clip_high", lines)),
            "right": mean("reward/correctness", lines[-last:]),
            "format": mean("reward/format", lines[-last:]),
            "entropy": mean("entropy", lines[-last:])}
        out += [dict(method=method, split=column, decoding="training", metric="RL", value=value, seed=seed)
                for column, value in columns.items()]
    return out


def training_table(rows):
    """training_rows of one run as text; "" without any."""
    columns, at = list(dict.fromkeys(row["split"] for row in rows)), {}
    for row in rows:
        at.setdefault(row["method"], []).append(f"{row['value']:.3f}")
    return _grid("Training, RL", columns, list(at.items())) if rows else ""


def _grid(title, columns, lines):
    """Text table: title, column heads, lines of (label, cells)."""
    width = max([len(label) for label, _ in lines] + [10])
    cell = max([len(text) for _, cells in lines for text in cells] + [len(column) for column in columns]) + 2
    head = " " * width + "".join(column.rjust(cell) for column in columns)
    return "\n".join([title, head, *(label.ljust(width) + "".join(text.rjust(cell) for text in cells)
                                     for label, cells in lines)])


def table(results, scores, to=""):
    """Everything the comparison says, as text: accuracies with intervals, differences to the method `to`, format,
    voting, kinds."""
    splits = list(dict.fromkeys(row["split"] for row in results if row["metric"] == "accuracy"))
    methods = list(dict.fromkeys(row["method"] for row in results if row["metric"] == "accuracy"))
    found = {(r["method"], r["split"], r["decoding"], r["metric"]): r for r in [*results, *differences(scores, to)]}

    def cells(method, decoding, metric, form):
        return [form(found[key]) if (key := (method, split, decoding, metric)) in found else "" for split in splits]

    def share(row):
        return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"

    def points(row):
        return f"{100 * row['value']:+.1f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"

    parts = []
    for decoding, words in (("greedy", "greedy"), ("t1", "T = 1")):
        parts.append(_grid(f"Accuracy, {words} [95 % interval]", splits,
                           [(m, cells(m, decoding, "accuracy", share)) for m in methods]))
        if any(row["metric"] == CLASS_MEAN for row in results):
            parts.append(_grid(f"{CLASS_MEAN.capitalize()}, {words} (classes)", splits,
                               [(m, cells(m, decoding, CLASS_MEAN, lambda row: f"{row['value']:.3f} ({row['n']})"))
                                for m in methods if (m, splits[0], decoding, CLASS_MEAN) in found]))
        if to in scores and len(methods) > 1:
            parts.append(_grid(f"Paired difference to {to} in points, {words} [95 % interval]", splits,
                               [(m, cells(m, decoding, f"accuracy - {to}", points)) for m in methods if m != to]))
    sampled = sorted({row["metric"] for row in results if row["metric"].startswith(("pass@", "maj@"))})
    for metric in sampled:
        parts.append(_grid(f"{metric}, T = 1", splits, [(m, cells(m, "t1", metric, share)) for m in methods]))
    for metric, form in (("format", share), ("length", lambda row: f"{row['value']:.1f}")):
        parts.append(_grid(f"{metric}, T = 1", splits, [(m, cells(m, "t1", metric, form)) for m in methods]))
    for split in splits:
        for decoding, words in (("greedy", "greedy"), ("t1", "T = 1")):
            kinds = {method: by_kind(of[split][decoding]) for method, of in scores.items()
                     if decoding in of.get(split, ())}
            parts.append(_kinds(f"Accuracy on {split} by question kind, {words} (n)", kinds))
    return "\n\n".join(part for part in parts if part)


def _kinds(title, kinds):
    """kinds: method -> {kind: (accuracy, n)} -> text; "" for one kind. Where a line cannot hold all kinds, each of the
    worst ones has a line."""
    names = sorted({kind for of in kinds.values() for kind in of})
    if len(names) < 2:
        return ""

    def cell(method, kind):
        if kind not in kinds[method]:
            return ""
        accuracy, count = kinds[method][kind]
        return f"{accuracy:.3f} ({count})"

    if len(names) <= MOST_KINDS:
        return _grid(title, names, [(method, [cell(method, kind) for kind in names]) for method in kinds])

    def over_methods(kind):
        return np.mean([of[kind][0] for of in kinds.values() if kind in of])

    worst = sorted(names, key=over_methods)[:WORST]
    title = f"{title}, the worst {WORST} of {len(names)}; kinds.json has all"
    return _grid(title, list(kinds), [(kind, [cell(method, kind) for method in kinds]) for kind in worst])


def t95(n):
    """Student's 97.5 % quantile for the mean of n values."""
    if n <= 10:
        return {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}[n]
    # Expansion around the normal quantile (Abramowitz & Stegun 26.7.5); off by less than 1e-4 from here on.
    z, nu = 1.959964, n - 1
    return (z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3))


def over_seeds(results):
    """Rows of several seeds -> rows with mean, 95 % t-interval over the seeds, and their standard deviation `sd`."""
    grouped = {}
    for row in results:
        grouped.setdefault((row["method"], row["split"], row["decoding"], row["metric"]), []).append(row["value"])
    out = []
    for (method, split, decoding, metric), values in grouped.items():
        mean, sd = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        half = t95(len(values)) * sd / math.sqrt(len(values)) if len(values) > 1 else float("inf")
        out.append(dict(method=method, split=split, decoding=decoding, metric=metric, value=mean, low=mean - half,
                        high=mean + half, sd=sd, n=len(values)))
    return out


def seeds_table(results):
    """Rows of several seeds -> text: mean [95 % t-interval over seeds] and standard deviation.

    The interval is about the training seeds: all of them answer the same prompts, whose own spread each run prints.
    """
    merged = over_seeds(results)
    parts = []
    kinds = {row["metric"] for row in merged if row["metric"].startswith("accuracy on ")}
    if len(kinds) > MOST_KINDS:         # a table each
        merged = [row for row in merged if row["metric"] not in kinds]
        parts.append(f"Accuracy by question kind, {len(kinds)} of them: see kinds.json")
    for decoding, metric in dict.fromkeys((row["decoding"], row["metric"]) for row in merged):
        these = [row for row in merged if (row["decoding"], row["metric"]) == (decoding, metric)]
        splits = list(dict.fromkeys(row["split"] for row in these))
        at = {(row["method"], row["split"]): row for row in these}
        parts.append(_grid(f"{metric}, {decoding}: mean over {these[0]['n']} seeds [95 % t-interval] sd", splits, [
            (method, [f"{at[method, s]['value']:.3f} [{at[method, s]['low']:.2f}, {at[method, s]['high']:.2f}] "
                      f"{at[method, s]['sd']:.3f}" if (method, s) in at else "" for s in splits])
            for method in dict.fromkeys(row["method"] for row in these)]))
    return "\n\n".join(parts)
