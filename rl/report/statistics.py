"""From raw scores to rows with intervals, paired differences and text tables.

Raw scores of a method on a split: {"greedy": {...}, "t1": {...}}, a decoding (see `decoding_name`)
each, with one entry a prompt: right and format (n, G), length (n, G), answer (n, G), gold (n,),
aliases (n,), kind (n,), text (n,) the first completion.
"""
import math
import re
from collections import Counter

import numpy as np

from data.chat import normalise
from rl.report.inference import (best_constant, bootstrap, constant_guess, cover_at, holm, interval,
                                 interval_of_differences, macro_average, minimum_detectable, paired_t, pass_at_k)

CLASS_MEAN = "class-averaged accuracy"      # its rows have no interval; n is the number of classes
MACRO = "macro average"                     # of the accuracies by question kind
COVERS = (0.25, 0.5, 0.75, 1.0)             # thresholds of Cover@tau
MOST_KINDS = 8                              # kinds of questions that a line of a table can hold
WORST = 5                                   # those shown where there are more


# ---------------------------------------------------------------- names of decodings and splits

def decoding_name(temperature, top_p=1.0, top_k=0):
    """How completions are chosen, as rows name it; top_p 1 and top_k 0 leave nothing out.

    >>> decoding_name(0.0), decoding_name(1.0), decoding_name(0.7, 0.9, 50)
    ('greedy', 't1', 't0.7-p0.9-k50')
    """
    if temperature == 0:
        return "greedy"
    name = f"t{_digits(temperature)}"
    if top_p < 1:
        name += f"-p{_digits(top_p)}"
    if top_k > 0:
        name += f"-k{top_k}"
    return name


def decoding_title(name):
    """A decoding's name as people read it.

    >>> decoding_title("t0.7-p0.9-k50"), decoding_title("greedy")
    ('T = 0.7, top-p 0.9, top-k 50', 'greedy')
    """
    found = re.fullmatch(r"t([\d.].*?)(?:-p(.+?))?(?:-k(\d+))?", name)
    if not found:
        return name
    temperature, top_p, top_k = found.groups()
    title = f"T = {temperature}"
    if top_p:
        title += f", top-p {top_p}"
    if top_k:
        title += f", top-k {top_k}"
    return title


def _digits(value):
    """All digits of a number, but not the ".0" of a whole one: no two settings share a name."""
    return repr(float(value)).removesuffix(".0")


def decodings_of(rows):
    """The decodings of rows: greedy first, the sampled ones in the order they come."""
    names = dict.fromkeys(row["decoding"] for row in rows)
    return sorted(names, key=lambda name: name != "greedy")


def main_decoding(rows):
    """The first sampled decoding of the rows, else greedy; "t1" without rows."""
    names = decodings_of(rows)
    sampled = [name for name in names if name != "greedy"]
    return (sampled or names or ["t1"])[0]


def main_decoding_of(decodings):
    """{split: {decoding: raw scores}} of a method -> the first sampled decoding, else greedy."""
    return main_decoding([dict(decoding=name) for of_split in decodings.values() for name in of_split])


def main_split(splits):
    """The split that is like training: "id" of drawn scenes, "val" of real data, else the first."""
    for name in ("id", "val"):
        if name in splits:
            return name
    return splits[0]


# ---------------------------------------------------------------- from scores to rows

def majority_right(answers, gold, aliases):
    """1 when the commonest non-empty answer is right; ties go to the one sampled first.

    Votes are counted by normalised text: two numbers within the tolerance of each other, or two
    names of one thing, are different votes. The winner is right when it is the gold answer or one
    of its aliases, both normalised, word for word.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0
    [(answer, _)] = votes.most_common(1)
    return int(answer in (gold, *aliases))


def per_prompt(scores, metric):
    """Raw scores of a decoding -> (n,) array of the metric, one value a prompt; None where it is
    not defined."""
    if metric == "accuracy":
        return np.mean(scores["right"], axis=1)
    completions = len(scores["right"][0])
    if metric.startswith("pass@"):
        k = int(metric.removeprefix("pass@"))
        return pass_at_k(scores["right"], k) if 1 < k <= completions else None
    if metric.startswith("cover@"):
        return cover_at(scores["right"], float(metric.removeprefix("cover@"))) if completions > 1 else None
    if metric.startswith("maj@"):
        if "aliases" not in scores or completions < 2:
            return None
        prompts = zip(scores["answer"], scores["gold"], scores["aliases"])
        return np.array([majority_right(*prompt) for prompt in prompts], dtype=float)
    return np.mean(scores[metric], axis=1) if metric in scores else None


def within(low, high, least, most):
    """An interval cut to what the quantity can be; None in place of an end that is infinite."""
    low = max(low, least)
    high = min(high, most)
    return (low if math.isfinite(low) else None), (high if math.isfinite(high) else None)


def rows(method, split, scores, seed):
    """Raw scores of a split -> rows: method, split, decoding, metric, value, low, high, n, seed."""
    out = []
    for decoding, raw in scores.items():
        label = dict(method=method, split=split, decoding=decoding)
        completions = len(raw["right"][0])
        for metric in ("accuracy", "format", "length", *_of_many(completions)):
            values = per_prompt(raw, metric)
            if values is None:
                continue
            value, low, high = bootstrap(values) if metric == "length" else interval(values)
            low, high = within(low, high, 0.0, math.inf if metric == "length" else 1.0)
            out.append(dict(label, metric=metric, value=value, low=low, high=high, n=len(values),
                            seed=seed))
        of_classes = class_mean(raw)
        if of_classes:
            value, classes = of_classes
            out.append(dict(label, metric=CLASS_MEAN, value=value, low=None, high=None, n=classes,
                            seed=seed))
        elif len({*raw["kind"]}) > 1:
            value = macro_average(per_prompt(raw, "accuracy"), raw["kind"])
            out.append(dict(label, metric=MACRO, value=value, low=None, high=None,
                            n=len({*raw["kind"]}), seed=seed))
    return out


def _of_many(completions):
    """Metrics of several completions of a prompt: pass@k for k of 2, 4, .. and all of them,
    Cover@tau, and the majority."""
    ks = []
    k = 2
    while k < completions:
        ks.append(k)
        k *= 2
    metrics = [f"pass@{k}" for k in (*ks, completions)]
    metrics += [f"cover@{tau:g}" for tau in COVERS]
    return [*metrics, f"maj@{completions}"]


def curve_rows(place, scores):
    """{split: raw scores} of the model at a point of a stage's training -> rows of curve.json, accuracies; place: their
    other fields."""
    out = []
    for split, decodings in scores.items():
        for decoding, raw in decodings.items():
            value = float(np.mean(raw["right"]))
            out.append(dict(place, split=split, decoding=decoding, metric="curve", value=value))
    return out


def differences(scores, to):
    """Paired differences in accuracy, method minus `to`, on the prompts of both, with intervals over
    prompts.

    scores: method -> split -> raw scores. Rows like those of `rows`, metric "accuracy - {to}".
    """
    out = []
    for method, split, decoding, raw in _each(scores):
        other = scores.get(to, {}).get(split, {}).get(decoding)
        if method == to or other is None:
            continue
        values = per_prompt(raw, "accuracy")
        others = per_prompt(other, "accuracy")
        n = min(len(values), len(others))           # a method may be asked the first of the prompts
        delta = values[:n] - others[:n]
        mean, low, high = interval_of_differences(delta)
        low, high = within(low, high, -1.0, 1.0)
        out.append(dict(method=method, split=split, decoding=decoding, metric=f"accuracy - {to}",
                        value=mean, low=low, high=high, n=len(delta)))
    return out


def _each(scores):
    """Yields (method, split, decoding, raw scores of that decoding)."""
    for method, splits in scores.items():
        for split, decodings in splits.items():
            for decoding, raw in decodings.items():
                yield method, split, decoding, raw


def by_kind(scores):
    """Raw scores of a decoding -> {question kind: (accuracy, n)}."""
    accuracy = per_prompt(scores, "accuracy")
    kinds = np.array(scores["kind"])
    out = {}
    for kind in sorted(set(scores["kind"])):
        chosen = accuracy[kinds == kind]
        out[kind] = float(chosen.mean()), len(chosen)
    return out


def class_mean(scores):
    """Raw scores of a decoding on pictures of classes -> (accuracy averaged over classes, classes).

    Each class counts alike, however many pictures it has. None where kinds are not classes.
    """
    if "gold" not in scores or [normalise(kind) for kind in scores["kind"]] != list(scores["gold"]):
        return None
    accuracies = [accuracy for accuracy, _ in by_kind(scores).values()]
    return float(np.mean(accuracies)), len(accuracies)


def kind_rows(scores, seed):
    """scores: method -> split -> raw scores. -> rows with metric "accuracy on KIND", value and
    n."""
    out = []
    for method, split, decoding, raw in _each(scores):
        for kind, (value, n) in by_kind(raw).items():
            out.append(dict(method=method, split=split, decoding=decoding,
                            metric=f"accuracy on {kind}", value=value, n=n, seed=seed))
    return out


def training_rows(log, seed, last=10):
    """Lines of log.jsonl -> rows on how each RL stage went.

    Their decoding is "training", their metric "RL", and their split names a column of the table.
    s/step: median; clipped, %: tokens beyond the clip on either side, mean over all rollouts with
    an update; right, format, entropy, in nats a token: means over the `last` rollouts; 1000
    samples: completions drawn in all; updates: optimizer steps.
    """
    methods = {}                                # method -> its lines
    for line in log:
        if "reward" in line:
            methods.setdefault(line["method"], []).append(line)
    out = []
    for method, lines in methods.items():
        seconds = []
        for line in lines:
            seconds.append(sum(line[name] for name in line if name.startswith("seconds_")))
        end = lines[-last:]
        columns = {
            "1000 samples": lines[-1]["samples"] / 1000,
            "updates": sum(line.get("updates", 0) for line in lines),
            "s/step": float(np.median(seconds)),
            "clipped, %": 100 * (_mean_of("clip_low", lines) + _mean_of("clip_high", lines)),
            "right": _mean_of("reward/correctness", end),
            "format": _mean_of("reward/format", end),
            "entropy": _mean_of("entropy", end),
        }
        if not any("clip_low" in line for line in lines):       # SAPO, or a ratio that is held at 1: nothing clips
            del columns["clipped, %"]
        for column, value in columns.items():
            out.append(dict(method=method, split=column, decoding="training", metric="RL",
                            value=value, seed=seed))
    return out


def _mean_of(name, lines):
    """Mean of a number over the lines that have it; 0 without any."""
    values = [line[name] for line in lines if name in line]
    return float(np.mean(values)) if values else 0.0


# ---------------------------------------------------------------- the result in three lines

def result_lines(rows, differences, to, over="prompts"):
    """What a run found, in three lines, from fixed templates: they state numbers, not causes.

    1. The accuracy of the main method on the split that is like training, beside that of `cot`,
       imitation alone.
    2. The best of the other methods there, and the paired difference.
    3. That difference on the other splits: on which its interval lies above 0, below 0, or includes
       0 ("not shown"). With a single split the form and the length of completions instead.

    rows: of results.json; differences: of differences.json; to: the main method, "" for the last
    one; over: what the intervals are over, prompts or seeds.
    """
    decoding = main_decoding(rows)
    accuracy = {}                               # (method, split) -> row
    for row in rows:
        if row["metric"] == "accuracy" and row["decoding"] == decoding:
            accuracy[row["method"], row["split"]] = row
    paired = {}                                 # (method, split) -> row
    for row in differences:
        if row["metric"] == f"accuracy - {to}" and row["decoding"] == decoding:
            paired[row["method"], row["split"]] = row
    if not accuracy:
        return ["Result: no method was evaluated.", "There is nothing to compare it with.",
                "There is no other split."]

    methods = list(dict.fromkeys(method for method, _ in accuracy))
    trained = [method for method in methods if method != "teacher"] or methods
    main = to if to in methods else trained[-1]
    splits = [split for method, split in accuracy if method == main]
    home = main_split(splits)
    others = [method for method in methods if method != main and (method, home) in accuracy and is_candidate(method)]
    best = max(others, key=lambda method: accuracy[method, home]["value"], default="")

    row = accuracy[main, home]
    count = f"1 {over.removesuffix('s')}" if row["n"] == 1 else f"{row['n']} {over}"
    first = f"Result on {home}, {decoding_title(decoding)} [95 % interval over {count}]: "
    first += f"{main} is right on {share_text(row)}"
    if "cot" in others:
        first += f"; cot, imitation alone, on {share_text(accuracy['cot', home])}"

    if best:
        second = f"Best other method on {home}: {best} with {share_text(accuracy[best, home])}; "
        second += _difference_words(best, main, paired.get((best, home)))
    else:
        second = "No other method was evaluated"

    away = [split for split in splits if split != home]
    if not away:
        third = _form_and_length(rows, main, home, decoding)
    elif any((best, split) in paired for split in away):
        third = _on_other_splits(best, main, {split: paired.get((best, split)) for split in away})
    else:
        shares = ", ".join(f"{split} {share_text(accuracy[main, split])}" for split in away)
        third = f"On the other splits {main} is right on: {shares}"
    return [f"{first}.", f"{second}.", f"{third}."]


def is_candidate(method):
    """Whether a row may be called the best other method: not a search that knows the gold answers, which bounds
    methods and is none, nor another point of the training of one that has its own row."""
    return not method.endswith((",oracle]", "@best"))


def _side(row):
    """Where the interval of a difference lies: "above" or "below" 0, else "not shown"."""
    if not _has_interval(row) or row["low"] <= 0 <= row["high"]:
        return "not shown"
    return "above" if row["low"] > 0 else "below"


def _has_interval(row):
    return all(end is not None and math.isfinite(end) for end in (row["low"], row["high"]))


def _difference_words(method, main, row):
    if row is None:
        return "no paired difference was computed"
    words = f"{method} minus {main}, paired by prompt, {100 * row['value']:+.1f} points"
    if not _has_interval(row):
        return f"a difference is not shown: {words}, without an interval"
    words += f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    if _side(row) == "not shown":
        return f"a difference is not shown: {words}, an interval that includes 0"
    return words


def _on_other_splits(method, main, of_split):
    """of_split: split -> the row of its paired difference, or None."""
    sides = {"above": [], "below": [], "not shown": []}
    for split, row in of_split.items():
        sides["not shown" if row is None else _side(row)].append(split)
    words = []
    for side, splits in sides.items():
        where = side if side == "not shown" else f"{side} 0"
        names = f" ({', '.join(splits)})" if splits else ""
        words.append(f"{where} on {len(splits)}{names}")
    return f"On the other splits {method} minus {main} is {', '.join(words)}"


def _form_and_length(rows, main, split, decoding):
    words = []
    for method in dict.fromkeys((main, "cot")):
        found = {}                              # metric -> row
        for row in rows:
            if (row["method"], row["split"], row["decoding"]) == (method, split, decoding):
                found[row["metric"]] = row
        if "format" in found and "length" in found:
            form = share_text(found["format"])
            length = _tokens(found["length"])
            words.append(f"{method} keeps the form in {form}, with {length} tokens a completion")
    return "; ".join(words) or "Form and length were not measured"


# ---------------------------------------------------------------- tables

def grid(title, columns, lines):
    """Text table: title, column heads, lines of (label, cells)."""
    rows = [("", columns), *lines]
    width = max([10, *(len(label) for label, _ in lines)])
    widths = []
    for place in range(len(columns)):
        widths.append(2 + max(len(cells[place]) for _, cells in rows))
    out = [title]
    for label, cells in rows:
        out.append(label.ljust(width) + "".join(map(str.rjust, cells, widths)))
    return "\n".join(out)


def share_grid(title, rows):
    """A line a method, a column a split, of rows of one decoding and metric."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    cells = {}                                  # method -> {split: text}
    for row in rows:
        cells.setdefault(row["method"], {})[row["split"]] = share_text(row)
    lines = [(method, [texts.get(split, "") for split in splits]) for method, texts in cells.items()]
    return grid(title, splits, lines)


def share_text(row):
    if not _has_interval(row):
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def _points(row):
    return f"{100 * row['value']:+.1f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"


def _classes(row):
    return f"{row['value']:.3f} ({row['n']})"


def _tokens(row):
    return f"{row['value']:.1f}"


def table(results, scores, to=""):
    """The whole comparison as text: accuracies with intervals and what one constant answer to a
    split earns, differences to the method `to`, votes, format, length, question kinds."""
    accuracies = [row for row in results if row["metric"] == "accuracy"]
    splits = list(dict.fromkeys(row["split"] for row in accuracies))
    methods = list(dict.fromkeys(row["method"] for row in accuracies))
    others = [method for method in methods if method != to]
    decodings = decodings_of(results)
    sampled = [name for name in decodings if name != "greedy"]
    found = {}
    for row in [*results, *differences(scores, to)]:
        found[row["method"], row["split"], row["decoding"], row["metric"]] = row

    def metric_grid(title, methods, decoding, metric, form):
        """A table with a line a method and a column a split; a cell without a row stays empty, a
        method without any is left out."""
        lines = []
        for method in methods:
            cells = []
            for split in splits:
                row = found.get((method, split, decoding, metric))
                cells.append("" if row is None else form(row))
            if any(cells):
                lines.append((method, cells))
        return grid(title, splits, lines) if lines else ""

    tables = []
    for decoding in decodings:
        title = decoding_title(decoding)
        heading = f"Accuracy, {title} [95 % interval over prompts]"
        accuracy = metric_grid(heading, methods, decoding, "accuracy", share_text)
        tables.append("\n".join([accuracy, *_best_constants(scores, splits, decoding)]))
        of_classes = {row["method"] for row in results
                      if row["metric"] == CLASS_MEAN and row["decoding"] == decoding}
        if of_classes:
            chosen = [method for method in methods if method in of_classes]
            heading = f"{CLASS_MEAN.capitalize()}, {title} (classes)"
            tables.append(metric_grid(heading, chosen, decoding, CLASS_MEAN, _classes))
        if to in scores and others:
            heading = f"Paired difference to {to} in points, {title} [95 % interval over prompts]"
            tables.append(metric_grid(heading, others, decoding, f"accuracy - {to}", _points))
    metrics = {row["metric"] for row in results}
    passes = sorted((metric for metric in metrics if metric.startswith("pass@")), key=_k_of)
    votes = [*sorted(metric for metric in metrics if metric.startswith("maj@")), *passes[-1:]]
    for metric in (*votes, "format", "length"):     # of pass@k the largest k; the others follow
        form = _tokens if metric == "length" else share_text
        named = "" if metric == "length" else " [95 % interval over prompts]"
        for decoding in sampled:
            heading = f"{metric}, {decoding_title(decoding)}{named}"
            tables.append(metric_grid(heading, methods, decoding, metric, form))
    home = main_split(splits) if splits else ""
    for decoding in sampled:
        tables.append(_spread(found, methods, home, decoding, passes[:-1]))
    for split in splits:
        for decoding in decodings:
            kinds = {}
            for method, of_split in scores.items():
                if decoding in of_split.get(split, {}):
                    kinds[method] = by_kind(of_split[split][decoding])
            heading = f"Accuracy on {split} by question kind, {decoding_title(decoding)} (n)"
            tables.append(_kinds(heading, kinds, _constant(scores, split, decoding)))
    return "\n\n".join(text for text in tables if text)


def _k_of(metric):
    """"pass@8" -> 8."""
    return int(metric.rpartition("@")[2])


def _spread(found, methods, split, decoding, passes):
    """How the right completions of a split lie: pass@k for the smaller k, and Cover@tau, the share of
    prompts whose completions are right at least so often; "" without either."""
    columns = [*passes, *(f"cover@{tau:g}" for tau in COVERS)]
    lines = []
    for method in methods:
        rows = [found.get((method, split, decoding, column)) for column in columns]
        if any(rows):
            lines.append((method, ["" if row is None else share_text(row) for row in rows]))
    title = f"pass@k and Cover@tau on {split}, {decoding_title(decoding)} [95 % interval over prompts]"
    return grid(title, columns, lines) if lines else ""


def _asked(scores, split, decoding):
    """Gold answers and kinds of the prompts of a split, of the method that was asked the most; two
    empty lists where no method's scores hold gold answers."""
    gold = []
    kinds = []
    for of_method in scores.values():
        raw = of_method.get(split, {}).get(decoding, {})
        if len(raw.get("gold", [])) > len(gold):
            gold = raw["gold"]
            kinds = raw["kind"]
    return gold, kinds


def _constant(scores, split, decoding):
    """{kind: accuracy of always giving its commonest gold answer} on a split; {} without gold
    answers, and where kinds are the classes of pictures, each with one answer."""
    guesses = constant_guess(*_asked(scores, split, decoding))
    shares = {kind: share for kind, (_, share) in guesses.items()}
    return {} if min(shares.values(), default=1) == 1 else shares


def _best_constants(scores, splits, decoding):
    """A line on what one constant answer to all prompts of a split earns; [] without gold answers."""
    words = []
    for split in splits:
        gold, _ = _asked(scores, split, decoding)
        if gold:
            answer, share = best_constant(gold)
            words.append(f"{split} {share:.3f} ({answer})")
    return [f"One constant answer to all prompts would be right on: {', '.join(words)}"] if words else []


def _kinds(title, kinds, constant):
    """kinds: method -> {kind: (accuracy, n)} -> text, with the mean over kinds and, as a last line,
    what a constant answer to each kind earns; "" for one kind. Where a line cannot hold all kinds,
    each of the worst ones has a line."""
    accuracies = {}                             # kind -> that of each method
    for of_method in kinds.values():
        for kind, (accuracy, _) in of_method.items():
            accuracies.setdefault(kind, []).append(accuracy)
    names = sorted(accuracies)
    if len(names) < 2:
        return ""

    def cell(method, kind):
        if kind not in kinds[method]:
            return ""
        accuracy, count = kinds[method][kind]
        return f"{accuracy:.3f} ({count})"

    lines = []
    if len(names) <= MOST_KINDS:
        for method, of_method in kinds.items():
            mean = np.mean([accuracy for accuracy, _ in of_method.values()])
            lines.append((method, [*(cell(method, kind) for kind in names), f"{mean:.3f}"]))
        if constant:
            shares = [f"{constant[kind]:.3f}" if kind in constant else "" for kind in names]
            mean = np.mean(list(constant.values()))
            lines.append(("(a constant)", [*shares, f"{mean:.3f}"]))
        return grid(title, [*names, MACRO], lines)
    worst = sorted(names, key=lambda kind: np.mean(accuracies[kind]))[:WORST]
    for kind in worst:
        lines.append((kind, [cell(method, kind) for method in kinds]))
    title = f"{title}, the worst {WORST} of {len(names)}; kinds.json has all"
    return grid(title, list(kinds), lines)


def training_table(rows):
    """training_rows of one run as text; "" without any."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(row["split"] for row in rows))
    cells = {(row["method"], row["split"]): f"{row['value']:.3f}" for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append((method, [cells.get((method, column), "") for column in columns]))
    return grid("Training, RL", columns, lines)


# ---------------------------------------------------------------- several seeds

def over_seeds(results):
    """Rows of several seeds -> rows with mean, 95 % t-interval and standard deviation over the
    seeds, and for differences the p of none: value, low, high, sd, n, p. Differences that are equal
    with every seed have no interval: its ends are infinite."""
    grouped = {}                                # a row's names -> its value for each seed
    for row in results:
        names = row["method"], row["split"], row["decoding"], row["metric"]
        grouped.setdefault(names, []).append(row["value"])
    out = []
    for (method, split, decoding, metric), values in grouped.items():
        found = paired_t(values)
        if metric.startswith("accuracy - ") and math.isnan(found.p):
            found = found._replace(low=-math.inf, high=math.inf)
        out.append(dict(method=method, split=split, decoding=decoding, metric=metric,
                        value=found.mean, low=found.low, high=found.high, sd=found.sd, n=found.n,
                        p=found.p))
    return out


def seeds_table(results):
    """Rows of several seeds -> text: mean [95 % t-interval over seeds] and standard deviation.

    The interval is about the training seeds: all of them answer the same prompts, whose own spread
    each run prints.
    """
    merged = over_seeds(results)
    tables = []
    kinds = {row["metric"] for row in merged if row["metric"].startswith("accuracy on ")}
    if len(kinds) > MOST_KINDS:                 # each would be a table
        merged = [row for row in merged if row["metric"] not in kinds]
        tables.append(f"Accuracy by question kind, {len(kinds)} of them: see kinds.json")
    grouped = {}                                # (decoding, metric) -> its rows
    spread = []                                 # those that share a table
    for row in merged:
        if row["metric"].startswith(("pass@", "cover@")):
            spread.append(row)
        else:
            grouped.setdefault((row["decoding"], row["metric"]), []).append(row)
    tables += _spread_over_seeds(spread)
    for (decoding, metric), rows in grouped.items():
        count = max(row["n"] for row in rows)
        what = f"{metric}, {decoding_title(decoding)}"
        if metric.startswith("accuracy - ") and count > 1:
            tables.append(_differences_grid(f"{what}, in points", rows))
        else:
            title = f"{what}: mean over {count} seeds [95 % t-interval over seeds] sd"
            tables.append(_seeds_grid(title, rows))
    return "\n\n".join(tables)


def _spread_over_seeds(rows):
    """Rows of pass@k and Cover@tau -> a table a decoding, of the split that is like training."""
    if not rows:
        return []
    home = main_split(list(dict.fromkeys(row["split"] for row in rows)))
    tables = []
    for decoding in decodings_of(rows):
        chosen = [dict(row, split=row["metric"]) for row in rows
                  if (row["split"], row["decoding"]) == (home, decoding)]
        title = (f"pass@k and Cover@tau on {home}, {decoding_title(decoding)}: mean over {rows[0]['n']} seeds [95 % "
                 "t-interval over seeds] sd")
        tables.append(_seeds_grid(title, chosen))
    return tables


def _differences_grid(title, rows):
    """Paired differences over seeds, each held against 0, and what they could have shown. Cells that are equal with
    every seed, or are of one seed, have neither interval nor test, but count as comparisons: the
    family is not chosen by what came out."""
    tested = [row for row in rows if not math.isnan(row["p"])]
    adjusted = holm([*(row["p"] for row in tested), *[1.0] * (len(rows) - len(tested))])
    cells = {}                                  # (method, split) -> text
    for row in rows:
        cells[row["method"], row["split"]] = f"{100 * row['value']:+.1f}"
    for row, p in zip(tested, adjusted):
        mark = " *" if p < 0.05 else "  "
        interval_text = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        cells[row["method"], row["split"]] += f" {interval_text} {p:.3f}{mark}"
    splits = list(dict.fromkeys(row["split"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for method in methods:
        lines.append((method, [cells.get((method, split), "") for split in splits]))
    count = max(row["n"] for row in rows)
    title = (f"{title}: mean over {count} seeds [95 % paired t-interval over seeds], p after Holm's correction over "
             f"these {len(rows)} comparisons, * below .05")
    notes = [grid(title, splits, lines)]
    if tested:
        before = [100 * minimum_detectable(row["sd"], row["n"]) for row in tested]
        after = [100 * minimum_detectable(row["sd"], row["n"], 0.05 / len(rows)) for row in tested]
        notes.append(f"A true difference would have been found four times of five: before the correction from "
                     f"{np.median(before):.1f} points on in half of those tested, from {max(before):.1f} in all; as "
                     f"the first to be found of all {len(rows)} from {np.median(after):.1f} on in half, from "
                     f"{max(after):.1f} in all.")
    untested = len(rows) - len(tested)
    if untested:
        notes.append(f"Without an interval: {untested}, whose seeds do not differ, so that there is no test.")
    return "\n".join(notes)


def by_seed(rows, decoding):
    """Rows of several seeds -> {(method, split, metric): {seed: value}} of one decoding."""
    found = {}
    for row in rows:
        if row["decoding"] == decoding:
            found.setdefault((row["method"], row["split"], row["metric"]), {})[row["seed"]] = row["value"]
    return found


def less(one, base):
    """{seed: value} of two methods -> inference.Paired, the first less the second; None where they do not have the same
    seeds, as when a share is of no completion for some."""
    if not base or one.keys() != base.keys():
        return None
    return paired_t([one[seed] - base[seed] for seed in base])


def paired_grid(title, cells):
    """{(method, column): inference.Paired or None} of one comparison -> text, in points, corrected for all of its
    cells; "" without any."""
    cells = {place: cell for place, cell in cells.items() if cell is not None}
    if not cells:
        return ""
    adjusted = holm([1.0 if math.isnan(cell.p) else cell.p for cell in cells.values()])
    texts = {}                                  # method -> column -> text
    for ((method, column), cell), p in zip(cells.items(), adjusted):
        mark = " *" if p < 0.05 else "  "
        interval = f" [{100 * cell.low:+.1f}, {100 * cell.high:+.1f}]"
        if math.isnan(cell.p):                  # equal with every seed
            interval = ""
        texts.setdefault(method, {})[column] = f"{100 * cell.mean:+.1f}{interval}{mark}"
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = []
    for method, of_method in texts.items():
        lines.append((method, [of_method.get(column, "") for column in columns]))
    count = next(iter(cells.values())).n
    title = (f"{title}: mean over {count} seeds [95 % paired t-interval over seeds], * where p after Holm's "
             f"correction over these {len(cells)} is below .05")
    return grid(title, columns, lines)


def _seeds_grid(title, rows):
    methods = {}                                # method -> split -> text
    for row in rows:
        text = f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}] {row['sd']:.3f}"
        methods.setdefault(row["method"], {})[row["split"]] = text
    # In the order of the method that has most of them: the teacher has some costs alone.
    fullest = max(methods.values(), key=len)
    splits = list(dict.fromkeys([*fullest, *(row["split"] for row in rows)]))
    lines = []
    for method, texts in methods.items():
        lines.append((method, [texts.get(split, "") for split in splits]))
    return grid(title, splits, lines)
