"""What a person sees while reinforcement learning runs.

    live = Live("rl", rewards)
    live.show(run.bar, step, share, line)           # after each step
    live.say(run.bar, text)                         # now and then a completion
    live.close()

On a terminal one line below the bar, written over at every step; elsewhere, where lines are kept, one line a step:

    rl 17: reward 0.62 (correctness 0.55, format 0.98), flat 0.41, entropy 0.52, 21.3 tokens, 812 tokens/s, 2:31 left
"""
import sys
import time

from tqdm import tqdm

WIDEST = 400                # characters of a completion that is shown


class Live:
    """rewards: a Rewards, whose parts are shown. quiet: shows nothing."""

    def __init__(self, stage, rewards, quiet=False):
        self.stage = stage
        self.quiet = quiet
        self.names = list(rewards.weights)
        self.status = None          # the line below the bar
        self.began = time.perf_counter()
        self.share = None           # of the stage that was done when the first step was shown

    def show(self, bar, step, share, line):
        """share: of the stage, with this step done; line: what log.jsonl has of the step. bar: tqdm's of the stage."""
        if self.quiet:
            return
        text = step_text(line, self.names) + self._left(share)
        if bar.disable:
            print(f"  {self.stage} {step}: {text}", flush=True)
            return
        if self.status is None:
            self.status = tqdm(bar_format="  {desc}", position=1, leave=False)
        self.status.set_description_str(text)

    def say(self, bar, sample, text):
        """A completion of a sample's question, above the bar; nothing where there is no terminal."""
        if not bar.disable:
            bar.write(f"  {self.stage}: {sample.question!r} ({sample.answer!r}): {shortened(text)}", file=sys.stderr)

    def _left(self, share):
        """How long the rest of the stage takes at the pace of the steps since the first one that was shown."""
        now = time.perf_counter()
        if self.share is None:
            self.began = now
            self.share = share
        done = share - self.share
        if done <= 0:
            return ""
        seconds = (now - self.began) * max(0.0, 1 - share) / done
        return f", {tqdm.format_interval(seconds)} left"

    def close(self):
        if self.status is not None:
            self.status.close()


def step_text(line, names):
    """What log.jsonl has of a step -> the numbers that one looks at first. names: of the rewards. An entropy is there
    only where the step had an update."""
    parts = ", ".join(f"{name} {line[f'reward/{name}']:.2f}" for name in names)
    words = [f"reward {line['reward']:.2f} ({parts})", f"flat {line['flat']:.2f}"]
    if "entropy" in line:
        words.append(f"entropy {line['entropy']:.2f}")
    words += [f"{line['length']:.1f} tokens", f"{line['tokens_per_second']:.0f} tokens/s"]
    return ", ".join(words)


def shortened(text):
    """A completion on one line, whatever it holds: control characters are escaped."""
    if len(text) > WIDEST:
        text = text[:WIDEST] + " .."
    return repr(text)
