"""What a person reads before an RL run: --explain shows single completions, the preflight the whole batch."""
import textwrap

from data.chat import parse, verdict
from kernels import is_flat
from rl import metrics
from rl.rewards import REWARDS


def reason(name, sample, text):
    """What a reward saw in a completion, in a few words."""
    parsed = parse(text)
    if name == "correctness":
        return f"{parsed.answer!r}: {verdict(sample, parsed.answer)[1]}"
    if name == "format":
        return parsed.fault or "well-formed"
    if name == "length":
        return f"{len(parsed.think.split())} words of thought, {verdict(sample, parsed.answer)[1]}"
    if name == "iou":
        return f"{parsed.answer!r} against {list(sample.boxes)}"
    return (REWARDS[name].__doc__ or "").strip().split("\n")[0] if name in REWARDS else "tokens near the budget"


def explanation(samples, prompts, rollout, advantage, weights):
    """Text: for every prompt its picture, question and gold answer; every completion with each reward, the reason, what
    it counts after gate and weight, and its advantage (P, G, C), that of the first token (all of a completion share it,
    but with a critic)."""
    lines = []
    for p, (sample, prompt) in enumerate(zip(samples, prompts)):
        picture = ", ".join(image if isinstance(image, str) else f"drawn, {image.shape[1]} x {image.shape[0]}"
                            for image in sample.images) or "none"
        flat = ", a flat group: it teaches nothing against itself" if is_flat(rollout.reward[p:p + 1]).item() else ""
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


def preflight(rollout, costs, steps):
    """Text: what a batch of rollouts from the model as it is looks like, how long the run will take, and warnings.

    costs: what metrics.costs says of it and of its update.
    """
    line, (P, G) = metrics.of_rollout(rollout), rollout.reward.shape
    text = [f"  preflight, {P} prompts x {G}: reward {line['reward']:.3f}, flat groups {line['flat']:.2f}, "
            f"{line['length']:.1f} tokens, {100 * line['truncated']:.0f} % cut off, "
            f"{costs['tokens_per_second']:.0f} tokens/s"]
    shares = [f"{name} {line[name]:.3f}" for name in rollout.parts]
    right = rollout.parts.get("correctness")
    if right is not None:
        shares.append(f"pass@{G} {(right > 0).any(1).float().mean():.3f}")
    each = sum(seconds for name, seconds in costs.items() if name.startswith("seconds_"))
    text.append(f"  {', '.join(shares)}; {each:.2f} s a step (update {costs['seconds_update']:.2f}), about "
                f"{each * steps / 60:.1f} minutes in all")
    if line["flat"] > 0.95:
        text.append("  warning: in almost every group all rewards are equal: there is (almost) nothing to learn from. "
                    "Easier or harder prompts, a larger --group, a warmer start or another reward would help")
    if right is not None and line["correctness"] < 0.02:
        text.append("  warning: almost no completion is right; RL finds only what the model sometimes does already")
    if right is not None and line["correctness"] > 0.98:
        text.append("  warning: almost every completion is right already")
    if line["truncated"] > 0.5:
        text.append("  warning: most completions are cut off before they answer; see --max-new")
    return "\n".join(text)
