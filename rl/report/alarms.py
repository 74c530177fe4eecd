"""What in a run's log a reader should look at first: sentences of numbers, by fixed thresholds, that name no cause.

    for sentence in alarms(log, notes): ..

Begin and end of a stage are the means of its first and of its last tenth. Nothing here proves a fault, and a run
without a sentence may have one.
"""
import math

import numpy as np

FALL = 0.1                  # of a share: lower at the end by so much
GROWTH = 1.5                # of lengths: longer, or shorter, at the end by this factor
SPIKE = 10.0                # of losses, gradient norms and learning rates against their median
DRIFT = {"float32": 1e-3, "float64": 1e-3}      # |ratio - 1| of log-probs at sampling and in the update: rounding
DRIFT_IN_BF16 = 0.1         # the same where products are rounded to bf16, by --dtype
MOSTLY = 0.5                # a share of completions or groups that is called most of them


def alarms(log, notes=(), dtype="float32"):
    """Lines of log.jsonl, the notes of a run's start and its --dtype -> sentences, in order of the stages."""
    drift = DRIFT.get(dtype, DRIFT_IN_BF16)
    stages = {}                                 # stage -> its lines
    bad = []
    for line in log:
        if "bad_record" in line:
            bad.append(line)
        elif "step" in line:
            stages.setdefault(line["stage"], []).append(line)
    found = [f"Noted at the start: {note}" for note in dict.fromkeys(notes)]
    if bad:
        found.append(f"{len(bad)} records could not be used; the first, of {bad[0]['stage']}: {bad[0]['bad_record']}")
    for stage, lines in stages.items():
        of_stage = of_training(lines)
        if "reward" in lines[0]:
            of_stage += of_rewards(lines) + of_update(lines, drift)
        found += [f"{stage}: {sentence}" for sentence in of_stage]
    return found


def values_of(lines, name):
    """(n,) of the lines that have a finite number of that name."""
    values = [line[name] for line in lines if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])]
    return np.array(values, dtype=float)


def begin_and_end(lines, name):
    """Means of the first and of the last tenth; None of fewer than four values."""
    values = values_of(lines, name)
    if len(values) < 4:
        return None
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


def of_training(lines):
    """Sentences on what every stage logs: losses, gradients, learning rates."""
    found = []
    odd = [line["step"] for line in lines for name in ("loss", "grad_norm", "reward")
           if isinstance(line.get(name), float) and not math.isfinite(line[name])]
    if odd:
        found.append(f"a loss, gradient or reward is no finite number in {len({*odd})} steps, first in step {odd[0]}")
    if "loss" in lines[0] and "reward" not in lines[0]:
        empty = sum(line.get("loss") is None for line in lines)
        if empty:
            found.append(f"{empty} of {len(lines)} steps had no usable record")
        ends = begin_and_end(lines, "loss")
        if ends and ends[1] > ends[0]:
            found.append(f"the loss is higher at the end than at the beginning, {ends[1]:.3g} after {ends[0]:.3g}")
    late = lines[len(lines) // 10:]             # where a stage begins, gradients are large
    for name, words in (("grad_norm", "the gradient's norm"), ("lr", "the learning rate")):
        values = values_of(late, name)
        if len(values) < 4 or not np.median(values) > 0:
            continue
        times = values.max() / np.median(values)
        if times > SPIKE:
            at = [line["step"] for line in late if line.get(name) == values.max()][0]
            found.append(f"{words} reaches {values.max():.3g} in step {at}, {times:.0f} times its median")
    rates = begin_and_end(lines, "lr")
    if rates and rates[1] > 2 * rates[0] > 0:
        found.append(f"the learning rate is higher at the end than at the beginning, {rates[1]:.3g} after "
                     f"{rates[0]:.3g}")
    return found


def of_rewards(lines):
    """Sentences on what reinforcement learning's rollouts log."""
    found = []
    for name, words in (("reward", "the reward"), ("reward/correctness", "the share of right answers"),
                        ("reward/format", "the share of well-formed completions")):
        ends = begin_and_end(lines, name)
        if ends and ends[1] < ends[0] - FALL:
            found.append(f"{words} falls from {ends[0]:.2f} to {ends[1]:.2f}")
    for name in ("reward/correctness", "reward/format"):
        values = values_of(lines, name)
        odd = [value for value in values if not 0 <= value <= 1]
        if odd:
            found.append(f"{name} is a share, and outside of 0 and 1 in {len(odd)} of {len(lines)} steps, as "
                         f"{odd[0]:.2f}")
    reward, right = begin_and_end(lines, "reward"), begin_and_end(lines, "reward/correctness")
    if reward and right and reward[1] > reward[0] + FALL and right[1] <= right[0]:
        found.append(f"the reward rises from {reward[0]:.2f} to {reward[1]:.2f} while the share of right answers does "
                     f"not: {right[0]:.2f}, then {right[1]:.2f}")
    length = begin_and_end(lines, "length")
    if length and not 1 / GROWTH < length[1] / max(length[0], 1e-9) < GROWTH:
        found.append(f"completions go from {length[0]:.1f} to {length[1]:.1f} tokens")
    cut = begin_and_end(lines, "truncated")
    if cut and cut[1] > MOSTLY:
        found.append(f"{cut[1]:.2f} of the completions at the end are cut off by the token budget")
    flat = begin_and_end(lines, "flat")
    if flat and flat[1] > MOSTLY:
        told = f"{flat[1]:.2f} of the groups at the end have one reward for all completions, which teaches nothing"
        solved, unsolved = begin_and_end(lines, "all_right"), begin_and_end(lines, "none_right")
        if solved and unsolved:
            told += f"; in {solved[1]:.2f} all completions earn correctness, in {unsolved[1]:.2f} none"
        found.append(told)
    failures = int(values_of(lines, "reward_failures").sum())
    if failures:
        found.append(f"{failures} calls of rewards of one's own failed")
    return found


def of_update(lines, drift_allowed):
    """Sentences on what reinforcement learning's updates log."""
    found = []
    idle = sum(not line.get("updates") for line in lines)
    if idle > MOSTLY * len(lines):
        found.append(f"{idle} of {len(lines)} rollouts had no update")
    drift = values_of(lines, "drift_max")
    if len(drift) and drift.max() > drift_allowed:
        found.append(f"the update's log-probs differ from those at sampling, before any step: |ratio - 1| up to "
                     f"{drift.max():.2g}")
    entropy = begin_and_end(lines, "entropy")
    if entropy and entropy[1] < 0.1 * entropy[0]:
        found.append(f"the entropy falls from {entropy[0]:.3f} to {entropy[1]:.3f} nats a token")
    clipped = values_of(lines, "clip_low").sum() + values_of(lines, "clip_high").sum()
    if clipped > 0.3 * len(lines):
        found.append(f"{clipped / len(lines):.2f} of the tokens lie beyond the clip")
    stopped = int(values_of(lines, "stopped").sum())
    if stopped:
        found.append(f"--kl-stop ended {stopped} of {len(lines)} updates early")
    return found
