"""What a person reads before an RL run: --explain shows single completions, the preflight the whole batch."""
import textwrap

from data.chat import parse, verdict
from rl import metrics
from rl.rewards import REWARDS
from rl.worker import Worker


def reason(name, sample, text):
    """What a reward saw in a completion, in a few words."""
    parsed = parse(text)
    if name == "correctness":
        return f"{parsed.answer!r}: {verdict(sample, parsed.answer)[1]}"
    if name == "format":
        return parsed.fault or "well-formed"
    if name == "length":
        return verdict(sample, parsed.answer)[1]
    if name == "iou":
        return f"{parsed.answer!r} against {list(sample.boxes)}"
    if name not in REWARDS:
        return "tokens near the budget"
    return "" if isinstance(REWARDS[name], Worker) else (REWARDS[name].__doc__ or "").strip().split("\n")[0]


def explanation(samples, prompts, rollout, advantage, weights):
    """Text: for every prompt its picture, question and gold answer; every completion with each reward, the reason, what
    it counts after gate and weight, and its advantage (P, G, C), that of the first token (all of a completion share it,
    but with a critic)."""
    lines = []
    for p, (sample, prompt) in enumerate(zip(samples, prompts)):
        picture = ", ".join(image if isinstance(image, str) else f"drawn, {image.shape[1]} x {image.shape[0]}"
                            for image in sample.images) or "none"
        flat = "" if advantage[p].any() else "; all advantages are 0: this group teaches nothing"
        lines += ["", f"picture  {picture}", f"prompt   {prompt!r}", f"gold     {sample.answer!r}{flat}"]
        for g, text in enumerate(rollout.texts[p]):
            ended = "" if rollout.ended[p, g] else ", cut off at the budget"
            lines += [f"  {g + 1}. {int(rollout.mask[p, g].sum())} tokens{ended}: reward {rollout.reward[p, g]:g}, "
                      f"advantage {advantage[p, g, 0]:+.3f}", textwrap.indent(repr(text), "     ")]
            for r, (name, weight) in enumerate(weights.items()):
                value, counted = rollout.parts[name][p, g].item(), rollout.rewards[p, g, r].item()
                gate = "" if value == counted else ", gated"
                lines.append(f"     {name:<12}{value:6.3f} x {weight:g}{gate}   {reason(name, sample, text)}")
    return "\n".join(lines)


def preflight(rollout, active, costs, steps, refill=0):
    """Text: what a batch of rollouts from the model as it is looks like, how long the run will take, and warnings.

    active: share of the groups that can move the model; costs: what metrics.costs says of rollout and update; refill:
    how many more rollouts a step may take.
    """
    line, (P, G) = metrics.of_rollout(rollout), rollout.reward.shape
    text = [f"  preflight, {P} prompts x {G}: reward {line['reward']:.3f}, flat groups {line['flat']:.2f}, "
            f"{line['length']:.1f} tokens, {100 * line['truncated']:.0f} % cut off, "
            f"{costs['tokens_per_second']:.0f} tokens/s"]
    shares = [f"{name} {line[f'reward/{name}']:.3f}" for name in rollout.parts]
    shares.append(f"pass@{G} {(rollout.parts['correctness'] > 0).any(1).float().mean():.3f}")
    tries = min(1 + refill, 1 / max(active, 1e-9)) if refill else 1
    each = costs["seconds_update"] + tries * sum(seconds for name, seconds in costs.items()
                                                 if name.startswith("seconds_") and name != "seconds_update")
    text.append(f"  {', '.join(shares)}; {each:.2f} s a step (update {costs['seconds_update']:.2f}), about "
                f"{each * steps / 60:.1f} minutes in all")
    if active < 0.05:
        text.append("  warning: almost no group can move the model, all rewards in it being equal or all completions "
                    "left out: easier or harder prompts, a larger --group, a warmer start or another reward would help")
    if line["reward/correctness"] < 0.02:
        text.append("  warning: almost no completion is right; RL finds only what the model sometimes does already")
    if line["reward/correctness"] > 0.98:
        text.append("  warning: almost every completion is right already")
    if line["truncated"] > 0.5:
        text.append("  warning: most completions are cut off before they answer; see --max-new")
    return "\n".join(text)
