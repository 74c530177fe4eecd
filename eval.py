"""One evaluator for every method: same prompts, same parser, same token budget, with intervals.

    python eval.py --checkpoint=out/embedded/grpo.pt                     # all splits of the embedded task
    python eval.py --checkpoint=out/embedded/grpo.pt --ask="what is at b2 ?" --image=picture.png
"""
import math
import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from data import chat, scenes
from data.sample import Sample, collate, read_image
from data.tokenizer import Tokenizer
from model import checkpoint
from model.config import from_command_line
from model.device import pick_device
from model.generate import generate
from model.vlm import VLM
from rl.rollout import read

TEST_SEED = {"test": 1_000_001, "val": 2_000_002}     # the same prompts for every method and every training seed


def load_vlm(path, device="cpu"):
    """Own checkpoint -> (vlm, tokenizer, saved state); the model is rebuilt from the checkpoint's own config."""
    state = checkpoint.load(path, device)
    if "vlm" not in state:
        raise ValueError(f"checkpoint {str(path)!r} holds no vision-language model (stage {state.get('stage')!r})")
    vlm = VLM.from_config(state["vlm_config"])
    vlm.load_state_dict(state["vlm"])
    return vlm.to(device), Tokenizer(state["tokenizer"]), state


def prompts(vlm, tokenizer, samples, method, template):
    """Samples -> Batch of prompts, on the model's device."""
    c = vlm.config.clip
    rows = [chat.encode(sample, tokenizer, c.patches, method, template) for sample in samples]
    return collate(rows, tokenizer.pad_id, c.image_size).to(vlm.llm.head.device)


@torch.no_grad()
def complete(vlm, tokenizer, samples, settings, group=1, temperature=0.0, seed=0):
    """Texts and lengths of `group` completions a sample: (list of lists of str, (n, group) int array).

    settings: method, template, max_new, eval_batch.
    """
    device = vlm.llm.head.device
    generator = torch.Generator(device).manual_seed(seed)
    texts, lengths = [], []
    size = max(1, settings.eval_batch // group)
    for start in range(0, len(samples), size):
        batch = prompts(vlm, tokenizer, samples[start:start + size], settings.method, settings.template)
        done, _ = generate(vlm, batch, group, settings.max_new, tokenizer.eos_id, temperature=temperature,
                           banned=tokenizer.banned, generator=generator, pad_id=tokenizer.pad_id)
        texts += read(done, tokenizer)
        lengths += done.mask.sum(-1).tolist()
    return texts, np.array(lengths)


def judge(samples, texts):
    """Texts -> dict of (n, G) lists: right, format, and the normalised answers."""
    parsed = [[chat.parse(text) for text in group] for group in texts]
    return dict(right=[[int(chat.is_right(sample, p.answer)) for p in group] for sample, group in zip(samples, parsed)],
                format=[[int(p.well_formed) for p in group] for group in parsed],
                answer=[[chat.normalise(p.answer) for p in group] for group in parsed])


def evaluate(vlm, tokenizer, samples, settings):
    """Scores of one method on one split: {"greedy": {...}, "t1": {...}}, raw, one entry a prompt.

    settings: method, template, max_new, eval_batch, eval_greedy (prompts), eval_sampled (prompts), eval_samples
    (completions of each at T = 1).
    """
    scores = {}
    for decoding, count, group in (("greedy", settings.eval_greedy, 1),
                                   ("t1", settings.eval_sampled, settings.eval_samples)):
        asked = samples[:count]
        texts, lengths = complete(vlm, tokenizer, asked, settings, group, float(decoding == "t1"), seed=1)
        scores[decoding] = dict(judge(asked, texts), length=lengths.tolist(),
                                kind=[sample.source.rpartition("/")[2] for sample in asked])
        scores[decoding]["text"] = [group[0] for group in texts]
        scores[decoding]["gold"] = [chat.normalise(sample.answer) for sample in asked]
        if decoding == "t1":
            scores[decoding]["aliases"] = [[chat.normalise(a) for a in sample.aliases] for sample in asked]
    return scores


def teacher_scores(samples, settings):
    """The teacher's own chains, judged as one completion a prompt."""
    asked = samples[:settings.eval_sampled]
    texts = [[chat.target_text(sample.conclusion, sample.reasoning)] for sample in asked]
    scores = judge(asked, texts)
    return {"t1": {"right": scores["right"], "kind": [sample.source.rpartition("/")[2] for sample in asked]}}


def majority_right(answers, gold, aliases):
    """1 when the commonest non-empty answer is right; ties go to the one sampled first."""
    votes = Counter(answer for answer in answers if answer)
    return int(bool(votes) and votes.most_common(1)[0][0] in (gold, *aliases))


def per_prompt(scores, metric):
    """Raw scores of a decoding -> (n,) array of the metric, one value a prompt; None where it is not defined."""
    if metric == "accuracy":
        return np.mean(scores["right"], axis=1)
    if metric.startswith("pass@"):
        return np.max(scores["right"], axis=1).astype(float) if len(scores["right"][0]) > 1 else None
    if metric.startswith("maj@"):
        if "aliases" not in scores or len(scores["right"][0]) < 2:
            return None
        return np.array([majority_right(*entry) for entry in zip(scores["answer"], scores["gold"], scores["aliases"])],
                        dtype=float)
    return np.mean(scores[metric], axis=1) if metric in scores else None


def interval(values):
    """Mean of one value a prompt with its 95 % interval: (mean, low, high).

    Wilson's interval for 0/1 values, the normal one otherwise (several completions of a prompt are not independent, so
    the prompt is the unit).
    """
    values = np.asarray(values, dtype=float)
    n, mean = len(values), float(values.mean())
    if set(np.unique(values)) <= {0.0, 1.0}:
        z = 1.96
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return mean, centre - half, centre + half
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else float("inf")
    return mean, mean - half, mean + half


def rows(method, split, scores, seed):
    """Raw scores of a split -> rows (method, split, decoding, metric, value, low, high, n, seed)."""
    out = []
    for decoding, of in scores.items():
        group = len(of["right"][0])
        for metric in ("accuracy", "format", "length", f"pass@{group}", f"maj@{group}"):
            values = per_prompt(of, metric)
            if values is not None:
                value, low, high = interval(values)
                out.append(dict(method=method, split=split, decoding=decoding, metric=metric, value=value, low=low,
                                high=high, n=len(values), seed=seed))
    return out


def differences(scores, to="grpo"):
    """Paired differences in accuracy, method minus `to`, on the same prompts, with their 95 % intervals.

    scores: method -> split -> raw scores. Rows like those of `rows`, metric "accuracy - {to}".
    """
    out = []
    for method, splits in scores.items():
        for split, of in splits.items():
            for decoding, mine in of.items():
                theirs = scores.get(to, {}).get(split, {}).get(decoding)
                if method == to or theirs is None:
                    continue
                a, b = per_prompt(mine, "accuracy"), per_prompt(theirs, "accuracy")
                delta = a - b
                half = 1.96 * float(delta.std(ddof=1)) / math.sqrt(len(delta)) if len(delta) > 1 else float("inf")
                mean = float(delta.mean())
                out.append(dict(method=method, split=split, decoding=decoding, metric=f"accuracy - {to}", value=mean,
                                low=mean - half, high=mean + half, n=len(delta)))
    return out


def by_kind(scores):
    """Raw scores of a decoding -> {question kind: (accuracy, n)}."""
    accuracy, kinds = per_prompt(scores, "accuracy"), np.array(scores["kind"])
    return {kind: (float(accuracy[kinds == kind].mean()), int((kinds == kind).sum())) for kind in sorted(set(kinds))}


def _grid(title, columns, lines):
    """Text table: title, column heads, lines of (label, cells)."""
    width = max([len(label) for label, _ in lines] + [10])
    cell = max([len(text) for _, cells in lines for text in cells] + [len(column) for column in columns]) + 2
    head = " " * width + "".join(column.rjust(cell) for column in columns)
    return "\n".join([title, head, *(label.ljust(width) + "".join(text.rjust(cell) for text in cells)
                                     for label, cells in lines)])


def table(results, scores):
    """Everything the comparison says, as text: accuracies with intervals, differences, format, voting, kinds."""
    splits = list(dict.fromkeys(row["split"] for row in results if row["metric"] == "accuracy"))
    methods = list(dict.fromkeys(row["method"] for row in results if row["metric"] == "accuracy"))
    found = {(r["method"], r["split"], r["decoding"], r["metric"]): r for r in [*results, *differences(scores)]}

    def cells(method, decoding, metric, form):
        return [form(found[key]) if (key := (method, split, decoding, metric)) in found else "" for split in splits]

    def share(row):
        return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"

    def points(row):
        return f"{100 * row['value']:+.1f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"

    parts = []
    for decoding, words in (("greedy", "greedy"), ("t1", "T = 1")):
        parts.append(_grid(f"Accuracy, {words} [95 % interval]", splits,
                           [(m, cells(m, decoding, "accuracy", share)) for m in methods]))
        parts.append(_grid(f"Paired difference to grpo in points, {words} [95 % interval]", splits,
                           [(m, cells(m, decoding, "accuracy - grpo", points)) for m in methods if m != "grpo"]))
    sampled = sorted({row["metric"] for row in results if row["metric"].startswith(("pass@", "maj@"))})
    for metric in sampled:
        parts.append(_grid(f"{metric}, T = 1", splits, [(m, cells(m, "t1", metric, share)) for m in methods]))
    for metric, form in (("format", share), ("length", lambda row: f"{row['value']:.1f}")):
        parts.append(_grid(f"{metric}, T = 1", splits, [(m, cells(m, "t1", metric, form)) for m in methods]))
    kinds = {method: by_kind(of[splits[0]]["t1"]) for method, of in scores.items() if splits and splits[0] in of}
    names = sorted({kind for of in kinds.values() for kind in of})
    if len(names) > 1:
        parts.append(_grid(f"Accuracy on {splits[0]} by question kind, T = 1 (n)", names,
                           [(m, [f"{of[k][0]:.3f} ({of[k][1]})" if k in of else "" for k in names])
                            for m, of in kinds.items()]))
    return "\n\n".join(part for part in parts if part)


def over_seeds(results):
    """Rows of several seeds -> rows with mean, 95 % t-interval over the seeds, and their standard deviation `sd`."""
    t95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    grouped = {}
    for row in results:
        grouped.setdefault((row["method"], row["split"], row["decoding"], row["metric"]), []).append(row["value"])
    out = []
    for (method, split, decoding, metric), values in grouped.items():
        mean, sd = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        half = t95.get(len(values), 1.96) * sd / math.sqrt(len(values)) if len(values) > 1 else float("inf")
        out.append(dict(method=method, split=split, decoding=decoding, metric=metric, value=mean, low=mean - half,
                        high=mean + half, sd=sd, n=len(values)))
    return out


def seeds_table(results):
    """Rows of several seeds -> text: mean [95 % t-interval over seeds] and standard deviation."""
    merged = over_seeds(results)
    parts = []
    for decoding, metric in dict.fromkeys((row["decoding"], row["metric"]) for row in merged):
        these = [row for row in merged if (row["decoding"], row["metric"]) == (decoding, metric)]
        splits = list(dict.fromkeys(row["split"] for row in these))
        at = {(row["method"], row["split"]): row for row in these}
        parts.append(_grid(f"{metric}, {decoding}: mean over {these[0]['n']} seeds [95 % t-interval] sd", splits, [
            (method, [f"{at[method, s]['value']:.3f} [{at[method, s]['low']:.2f}, {at[method, s]['high']:.2f}] "
                      f"{at[method, s]['sd']:.3f}" if (method, s) in at else "" for s in splits])
            for method in dict.fromkeys(row["method"] for row in these)]))
    return "\n\n".join(parts)


@torch.no_grad()
def shape_probe(tower, feature_layer, scenes_each=1500):
    """Share of objects whose shape a linear read-out finds in the tower's patch tokens, {"id": .., "pairs": ..}.

    Ridge regression on one-hot shapes, fitted on `scenes_each` training scenes; the object's cell is known. Raises
    ValueError when the tower's patches are not the cells of the drawn scenes.
    """
    if tower.config.patches != scenes.CELLS ** 2 or tower.config.image_size != scenes.SIZE:
        raise ValueError("the shape probe needs one patch for each cell of the drawn scenes")

    def objects(samples, held_out_only):
        from data.sample import to_pixels
        device = tower.proj.device
        tokens = torch.cat([tower.features(to_pixels([s.images[0] for s in samples[i:i + 256]], scenes.SIZE).to(device),
                                           feature_layer) for i in range(0, len(samples), 256)]).float().cpu()
        x, y = [], []
        for row, sample in enumerate(samples):
            for entry in sample.caption.split(" , "):
                cell, color, shape = entry.split()
                if held_out_only and (color, shape) not in scenes.HELD_OUT:
                    continue
                x.append(tokens[row, (int(cell[1]) - 1) * scenes.CELLS + "abcd".index(cell[0])])
                y.append(scenes.SHAPES.index(shape))
        x = torch.stack(x)
        return torch.cat([x, torch.ones(len(x), 1)], 1), torch.tensor(y)

    x, y = objects(scenes.load("align", scenes_each, TEST_SEED["val"]), False)
    target = torch.nn.functional.one_hot(y, len(scenes.SHAPES)).float()
    weight = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1]) * x.var(0).mean(), x.T @ target)
    found = {}
    for split in ("id", "pairs"):
        x, y = objects(scenes.load(split, 600, TEST_SEED["test"]), split == "pairs")
        found[split] = float(((x @ weight).argmax(1) == y).float().mean())
    return found


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # a stage's .pt file
    preset: str = ""                # (none)
    set: str = "test"               # prompts to use: test | val (for tuning)
    splits: str = "id,crowded,pairs,walk3,walk4"   # which splits
    eval_greedy: int = 300          # prompts a split, greedy
    eval_sampled: int = 200         # prompts a split, T = 1
    eval_samples: int = 8           # completions of each at T = 1
    eval_batch: int = 512           # rows sampled at once
    max_new: int = 0                # token budget; 0: the checkpoint's own
    method: str = ""                # prompt: direct | think | asked; empty: the checkpoint's own
    template: str = ""              # chat template; empty: the checkpoint's own
    ask: str = ""                   # ask this question ...
    image: str = ""                 # ... about this picture, and stop
    device: str = "auto"            # auto | cpu | cuda
    seed: int = 0                   # stands in the rows' seed column


def main(argv):
    cfg = from_command_line(Config, {"": lambda given: "default", "default": {}}, argv, __doc__)
    if not cfg.checkpoint:
        raise ValueError("--checkpoint= must name a stage's .pt file")
    vlm, tokenizer, state = load_vlm(cfg.checkpoint, pick_device(cfg.device))
    vlm.eval()
    trained = state["config"]
    settings = SimpleNamespace(method=cfg.method or state["method"], template=cfg.template or trained["template"],
                               max_new=cfg.max_new or trained["max_new"], eval_batch=cfg.eval_batch,
                               eval_greedy=cfg.eval_greedy, eval_sampled=cfg.eval_sampled,
                               eval_samples=cfg.eval_samples)
    if cfg.ask:
        images = (np.asarray(read_image(cfg.image)),) if cfg.image else ()
        texts, _ = complete(vlm, tokenizer, [Sample(images=images, question=cfg.ask)], settings)
        print(texts[0][0])
        return
    if cfg.set not in TEST_SEED:
        raise ValueError(f"--set={cfg.set} must be test or val")
    results, scores = [], {state["stage"]: {}}
    for split in cfg.splits.split(","):
        if split not in scenes.SPLITS:
            raise ValueError(f"--splits={cfg.splits}: {split!r} must be one of {', '.join(scenes.SPLITS)}")
        samples = scenes.load(split, max(cfg.eval_greedy, cfg.eval_sampled), TEST_SEED[cfg.set])
        scores[state["stage"]][split] = evaluate(vlm, tokenizer, samples, settings)
        results += rows(state["stage"], split, scores[state["stage"]][split], cfg.seed)
    print(table(results, scores))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
