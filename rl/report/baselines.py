"""What pictures in classes are worth to simple methods: baselines.json and its table.

    rows = baseline_rows({"majority class": {"val": [1, 0, ..]}}, seed)     # right or not, prompt by prompt
    print(baselines_text(rows))
"""
from rl.report.inference import interval
from rl.report.statistics import grid, share_text


def baseline_rows(right, seed):
    """{method: {split: (n,) of 0 and 1}} -> rows of baselines.json, in the form of results.json's."""
    rows = []
    for method, splits in right.items():
        for split, values in splits.items():
            value, low, high = interval(values)
            rows.append(dict(method=method, split=split, decoding="greedy", metric="baseline", value=value, low=low,
                             high=high, n=len(values), seed=seed))
    return rows


def baselines_text(rows):
    """The table: a line a baseline, a column a split."""
    splits = list(dict.fromkeys(row["split"] for row in rows))
    cells = {}                                  # method -> {split: text}
    for row in rows:
        cells.setdefault(row["method"], {})[row["split"]] = share_text(row)
    lines = [(method, [found.get(split, "") for split in splits]) for method, found in cells.items()]
    return grid("Baselines, accuracy on the prompts of greedy decoding [95 % interval over prompts]", splits, lines)
