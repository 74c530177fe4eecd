"""What a person reads before an RL run: --explain shows single completions, the preflight the whole batch."""
import textwrap

from data.chat import ASKED, FORMS
from rl import metrics


def explanation(samples, prompts, rollout, advantage, rewards):
    """Text: for every prompt its picture, question and gold answer; every completion with each reward, the reason, what
    it counts after gate and weight, and its advantage (P, G, C), that of the first token (all of a completion share it,
    but with a critic)."""
    lines = []
    for p, (sample, prompt) in enumerate(zip(samples, prompts)):
        pictures = ", ".join(picture_words(image) for image in sample.images) or "none"
        flat = "" if advantage[p].any() else "; all advantages are 0: this group teaches nothing"
        lines += ["", f"picture  {pictures}", f"prompt   {prompt!r}", f"gold     {sample.answer!r}{flat}"]
        for g, text in enumerate(rollout.texts[p]):
            ended = "" if rollout.ended[p, g] else ", cut off at the budget"
            tokens = int(rollout.mask[p, g].sum())
            lines.append(f"  {g + 1}. {tokens} tokens{ended}: reward {rollout.reward[p, g]:g}, "
                         f"advantage {advantage[p, g, 0]:+.3f}")
            lines.append(textwrap.indent(repr(text), "     "))
            for r, (name, weight) in enumerate(rewards.weights.items()):
                value = rollout.parts[name][p, g].item()
                gate = "" if value == rollout.rewards[p, g, r].item() else ", gated"
                lines.append(f"     {name:<12}{value:6.3f} x {weight:g}{gate}   {rewards.reason(name, sample, text)}")
    return "\n".join(lines)


def picture_words(image):
    """A picture of a sample in a few words."""
    if isinstance(image, str):
        return image
    if isinstance(image, bytes):
        return f"{len(image)} bytes"
    return f"drawn, {image.shape[1]} x {image.shape[0]}"


def preflight_text(rollout, active, costs, steps, refill=0, advice=""):
    """Text: what a batch of rollouts from the model as it is looks like, how long the run will take, and warnings.

    active: share of the groups that can move the model; costs: what metrics.costs says of rollout and update; refill:
    how many more rollouts a step may take; steps: of the stage, None where FLOPs end it; advice: what to do where no
    completion has the form that a right answer must have to count, "" where it counts without.
    """
    line = metrics.of_rollout(rollout)
    P, G = rollout.reward.shape
    shares = [f"{name} {line[f'reward/{name}']:.3f}" for name in rollout.parts]
    pass_at_g = (rollout.parts["correctness"] > 0).any(1).float().mean()
    shares.append(f"pass@{G} {pass_at_g:.3f}")
    update = costs["seconds_update"]
    sampling = sum(costs[f"seconds_{name}"] for name in ("encode", "prefill", "decode", "score"))
    rollouts = 1 + refill
    if active:                  # as many as it takes to fill the batch
        rollouts = min(rollouts, 1 / active)
    if not refill:
        rollouts = 1
    step = update + rollouts * sampling
    end = "until it has spent the FLOPs it is given"
    if steps is not None:
        end = f"about {step * steps / 60:.1f} minutes in all"
    text = [f"  preflight, {P} prompts x {G}: reward {line['reward']:.3f}, flat groups {line['flat']:.2f}, "
            f"{line['length']:.1f} tokens, {100 * line['truncated']:.0f} % cut off, "
            f"{costs['tokens_per_second']:.0f} tokens/s",
            f"  {', '.join(shares)}; {step:.2f} s a step (update {update:.2f}), {end}"]
    return "\n".join(text + [f"  warning: {warning}" for warning in warnings(line, active, advice)])


def formless_advice(method, template):
    """What to do where no completion has the form that rewards ask for. method: how the model was asked."""
    ways = []
    if method in FORMS:
        ways.append("teach it longer or faster in stage cot (--cot-steps, --cot-lr)")
    else:
        ways.append("teach it first by chains of thought (stage cot, --cot-steps)")
        others = [other for other in ASKED if other != method]
        if template != "brief":
            ways.append(f"ask for it by --method={' or '.join(others)}")
    ways.append("let right answers count without it (--gated=False)")
    return ", or ".join(ways)


def warnings(line, active, advice=""):
    """What of a rollout's metrics promises little, a sentence each."""
    found = []
    if advice and line.get("reward/format") == 0:
        found.append("no completion has the form that rewards ask for, so that all are 0 and nothing can be learned: "
                     f"{advice}")
    elif active < 0.05:
        found.append("almost no group can move the model, all rewards in it being equal or all completions left out: "
                     "easier or harder prompts, a larger --group, a warmer start or another reward would help")
    if line["reward/correctness"] < 0.02:
        found.append("almost no completion is right; RL finds only what the model sometimes does already")
    if line["reward/correctness"] > 0.98:
        found.append("almost every completion is right already")
    if line["truncated"] > 0.5:
        found.insert(0, "most completions are cut off before they answer; see --max-new")
    return found
