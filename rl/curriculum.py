"""A curriculum: the easy prompts first, then more and more of the hard ones, until all are open.

    order = by_difficulty(samples, difficulty)                  # the easy ones first
    count = open_prompts(share, len(order))                     # the first so many may be asked now
"""
FIRST = 1 / 3               # of the prompts, that are open from the beginning
ALL_FROM = 0.5              # of the stage, after which all are


def open_prompts(share, count):
    """How many of `count` prompts, the easy ones first, are open once this share of the stage, 0 to 1, is behind.

    FIRST of them at the beginning, growing evenly to all at ALL_FROM of the stage; never none. A function of its
    arguments alone, so that a resumed run goes on with the same prompts.

    >>> [open_prompts(step / 8, 90) for step in range(6)]
    [30, 45, 60, 75, 90, 90]
    """
    grown = min(1.0, share / ALL_FROM)
    return max(1, round(count * (FIRST + (1 - FIRST) * grown)))


def by_difficulty(samples, difficulty):
    """Samples, the easiest first, those of one difficulty in the order they had.

    difficulty(sample) -> a number. What it raises, ValueError for a sample that has none, is not caught."""
    return sorted(samples, key=difficulty)
