"""What pictures in classes are worth to simple methods: baselines.json and its table.

    rows = baseline_rows({"majority class": {"val": [1, 0, ..]}}, seed)     # right or not, prompt by prompt
    print(baselines_text(rows))
"""
from rl.report.inference import interval
from rl.report.statistics import share_grid


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
    return share_grid("Baselines, accuracy on the prompts of greedy decoding [95 % interval over prompts]", rows)
