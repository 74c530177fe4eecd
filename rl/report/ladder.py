"""A learning rate from a ladder: every arm of a comparison gets the best of the same rates, on validation prompts.

    best, rungs = climb(measure)            # measure(rate) -> a row with value, low, high, n
    print(ladder_text("llava_o1", best, rungs))
"""
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
MOST = 9                    # rates measured in all; a best one that still lies at an end is printed as such


def climb(measure):
    """Measures every rate, and twice or half the outermost one as long as the best lies at an end of the ladder.

    -> (the best rate, the lower one of equals; {rate: its row} in ascending order). Where all rates are equal nothing
    says which way to go on.
    """
    rungs = {rate: measure(rate) for rate in RATES}
    while len(rungs) < MOST and not are_equal(rungs):
        best = best_of(rungs)
        if best == min(rungs):
            further = best / 2
        elif best == max(rungs):
            further = best * 2
        else:
            break
        rungs[further] = measure(further)
    return best_of(rungs), dict(sorted(rungs.items()))


def best_of(rungs):
    """{rate: row} -> the rate of the highest value, the lower one of equals."""
    return min(rungs, key=lambda rate: (-rungs[rate]["value"], rate))


def are_equal(rungs):
    return len({row["value"] for row in rungs.values()}) == 1


def ladder_text(arm, best, rungs):
    """The ladder as text, a rate a line; says so when the best one lies at an end."""
    no_choice = are_equal(rungs)
    lines = [f"learning rates of {arm}, accuracy on validation prompts [95 % interval over {_prompts(rungs)} prompts]:"]
    for rate, row in rungs.items():
        mark = "  <- best" if rate == best and not no_choice else ""
        lines.append(f"  {rate:<11g} {row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]{mark}")
    if no_choice:
        lines.append("  no rate is better than another: the lowest one stands for the arm, and nothing was chosen")
    elif best in (min(rungs), max(rungs)):
        lines.append(f"  the best lies at an end of the ladder, which was extended to {len(rungs)} rates")
    return "\n".join(lines)


def _prompts(rungs):
    return next(iter(rungs.values()))["n"]
