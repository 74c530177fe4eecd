"""One evaluator for every method: same prompts, same parser, same token budget, with intervals.

    python eval.py --checkpoint=out/embedded-1/rl.pt                     # all splits of the embedded task
    python eval.py --checkpoint=out/embedded-1/rl.pt --ask="what is at b2 ?" --image=picture.png
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import chat, images, jsonl, scenes
from data.sample import Sample, collate, read_image, to_pixels
from data.tokenizer import Tokenizer
from model import checkpoint
from model.config import from_command_line, to_command_line
from model.device import pick_device, pick_dtype
from model.generate import generate
from model.vlm import VLM
from model.runfolder import RunFolder, choose, write_json
from rl import report, rewards, statistics
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
    return {"t1": {"right": scores["right"], "text": [group[0] for group in texts],
                   "kind": [sample.source.rpartition("/")[2] for sample in asked]}}


@torch.no_grad()
def shape_probe(tower, feature_layer, scenes_each=1500):
    """Share of objects whose shape a linear read-out finds in the tower's patch tokens, {"id": .., "pairs": ..}.

    Ridge regression on one-hot shapes, fitted on `scenes_each` scenes of the validation prompts; the object's cell is
    known. Raises ValueError when the tower's patches are not the cells of the drawn scenes.
    """
    if tower.config.patches != scenes.CELLS ** 2 or tower.config.image_size != scenes.SIZE:
        raise ValueError("the shape probe needs one patch for each cell of the drawn scenes")

    def objects(samples, held_out_only):
        pixels = to_pixels([sample.images[0] for sample in samples], scenes.SIZE).to(tower.proj)
        tokens = torch.cat([tower.features(part, feature_layer) for part in pixels.split(256)]).float().cpu()
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

    x, y = objects(scenes.load("id", scenes_each, TEST_SEED["val"]), False)
    target = torch.nn.functional.one_hot(y, len(scenes.SHAPES)).float()
    weight = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1]) * x.var(0).mean(), x.T @ target)
    found = {}
    for split in ("id", "pairs"):
        x, y = objects(scenes.load(split, 600, TEST_SEED["test"]), split == "pairs")
        found[split] = float(((x @ weight).argmax(1) == y).float().mean())
    return found


def compare(folder, cfg, checkpoints, tests, teacher):
    """Evaluates every method on every split; writes results.json, scores.json, differences.json and the report.

    checkpoints: method -> path; tests: split -> samples; teacher: whether the samples carry a teacher's chains. A
    method that scores.json already holds is not evaluated again. Returns the rows of results.json.
    """
    saved = Path(folder) / "scores.json"
    scores = json.loads(saved.read_text()) if saved.exists() else {}
    if teacher:
        scores.setdefault("teacher", {split: teacher_scores(samples, cfg) for split, samples in tests.items()})
    for method, path in checkpoints.items():
        if method not in scores:
            began = time.perf_counter()
            vlm, tokenizer, state = load_vlm(path, pick_device(cfg.device))
            settings = SimpleNamespace(**{**asdict(cfg), "method": state["method"]})
            scores[method] = {split: evaluate(vlm.to(pick_dtype(cfg.dtype)), tokenizer, samples, settings)
                              for split, samples in tests.items()}
            write_json(saved, scores)
            print(f"evaluated {method:<16}{time.perf_counter() - began:7.1f} s", flush=True)
    results = [row for method, of in scores.items() for split, raw in of.items()
               for row in statistics.rows(method, split, raw, cfg.seed)]
    write_json(Path(folder) / "results.json", results)
    write_json(Path(folder) / "differences.json", statistics.differences(scores))
    show_samples(Path(folder), tests, scores, rewards.parse_weights(cfg.rewards))
    if not report.curves(report.read_log(Path(folder) / "log.jsonl"), results, Path(folder) / "curves.png"):
        print('no curves.png: pip install -e ".[report]" brings matplotlib')
    print("\n" + statistics.table(results, scores))
    for split, samples in tests.items():
        walks = [scenes.guess(sample) for sample in samples[:cfg.eval_sampled] if "/walk" in sample.source]
        if walks:
            print(f"walks of {split}: naming another thing of the picture at random is right with {np.mean(walks):.3f}")
    return results


def show_samples(folder, tests, scores, weights, each=8):
    """samples.html: the first prompts of every split with each method's first completion at T = 1."""
    entries = []
    for split, samples in tests.items():
        for n, sample in enumerate(samples[:each]):
            texts = {method: of[split]["t1"]["text"][n] for method, of in scores.items()
                     if n < len(of[split]["t1"].get("text", ()))}
            entries.append(dict(
                image=sample.images[0], prompt=sample.question, answer=sample.answer, kind=f"{split}, {sample.source}",
                completions=[dict(method=method, text=text, why=rewards.why(sample, text),
                                  reward={name: rewards.REWARDS[name](sample, text) for name in weights})
                             for method, text in texts.items()]))
    report.samples(entries, folder / "samples.html", f"Samples of {folder.name}, T = 1")


def many_seeds(script, cfg):
    """Runs `script`, train.py, for each seed in a process of its own, --jobs at a time.

    Prints mean, spread and 95 % t-intervals over the seeds; results.json holds the rows of all.
    """
    root = choose(cfg.out, cfg.preset, cfg.resume)
    if cfg.resume:
        # Without --threads the number of jobs decides the threads of each, and with them the rounding.
        RunFolder(root).reopen(asdict(cfg), ("resume", "out", *(["jobs"] if cfg.threads else [])), ())
    else:
        RunFolder(root).create(asdict(cfg))
    threads = cfg.threads or max(1, (os.cpu_count() or 1) // cfg.jobs)
    shared = replace(cfg, seeds=0, jobs=1, resume=False, threads=threads)
    waiting, running, results = list(range(cfg.seed, cfg.seed + cfg.seeds)), {}, []
    while waiting or running:
        while waiting and len(running) < cfg.jobs:
            seed = waiting.pop(0)
            out = root / f"seed-{seed}"
            one = replace(shared, seed=seed, out=str(out), resume=(out / "config.json").exists())
            with open(root / f"seed-{seed}.txt", "a") as file:
                running[seed] = subprocess.Popen([sys.executable, script, *to_command_line(one)], stdout=file)
        for seed, process in list(running.items()):
            if process.poll() is not None:
                del running[seed]
                if process.returncode:
                    for other in running.values():
                        other.terminate()
                    raise ValueError(f"seed {seed} stopped with exit code {process.returncode}; its output is in "
                                     f"{root / f'seed-{seed}.txt'}; --resume --out={root} goes on")
                results += json.loads((root / f"seed-{seed}" / "results.json").read_text())
                print(f"seed {seed} done, see {root / f'seed-{seed}.txt'}")
        time.sleep(0.5)
    write_json(root / "results.json", sorted(results, key=lambda row: row["seed"]))
    print(statistics.seeds_table(results))


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # a stage's .pt file
    preset: str = ""                # (none)
    set: str = "test"               # prompts to use: test | val (for tuning)
    splits: str = "id,crowded,pairs,walk3,walk4"   # of drawn scenes; other data has its validation split alone
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
    for name, allowed in dict(set=tuple(TEST_SEED), method=("", *chat.PROMPTS), template=("", *chat.TEMPLATES)).items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be one of {', '.join(a for a in allowed if a)}")
    for name, low in dict(eval_greedy=1, eval_sampled=1, eval_samples=1, eval_batch=1, max_new=0).items():
        if getattr(cfg, name) < low:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(cfg, name)} must be at least {low}")
    for split in cfg.splits.split(","):
        if split not in scenes.SPLITS:
            raise ValueError(f"--splits={cfg.splits}: {split!r} must be one of {', '.join(scenes.SPLITS)}")
    vlm, tokenizer, state = load_vlm(cfg.checkpoint, pick_device(cfg.device))
    vlm.eval()
    trained = state["config"]
    settings = SimpleNamespace(method=cfg.method or state["method"], template=cfg.template or trained["template"],
                               max_new=cfg.max_new or trained["max_new"], eval_batch=cfg.eval_batch,
                               eval_greedy=cfg.eval_greedy, eval_sampled=cfg.eval_sampled,
                               eval_samples=cfg.eval_samples)
    if cfg.ask:
        pictures = (np.asarray(read_image(cfg.image)),) if cfg.image else ()
        texts, _ = complete(vlm, tokenizer, [Sample(images=pictures, question=cfg.ask)], settings)
        print(texts[0][0])
        return
    source, _, where = trained["data"].partition(":")
    own = {} if source == "scenes" else dict(
        val={"images": images, "jsonl": jsonl}[source].load(where, trained["val_percent"])[0]["val"])
    results, scores = [], {state["stage"]: {}}
    for split in own or cfg.splits.split(","):
        count = max(cfg.eval_greedy, cfg.eval_sampled)
        samples = own[split] if own else scenes.load(split, count, TEST_SEED[cfg.set])
        scores[state["stage"]][split] = evaluate(vlm, tokenizer, samples, settings)
        results += statistics.rows(state["stage"], split, scores[state["stage"]][split], cfg.seed)
    print(statistics.table(results, scores))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
