"""One evaluator for every method: same prompts, same parser, same token budget, with intervals.

    python eval.py --checkpoint=out/embedded-1/rl.pt                     # all splits of the embedded task
    python eval.py --checkpoint=out/embedded-1/rl.pt --ask="what is at b2 ?" --image=picture.png
    python eval.py --llava=DIR --dtype=bfloat16 --ask="What is shown?" --image=picture.jpg
    python eval.py --checkpoint=out/llava-1.5-7b-1/sft.pt --export=hf:DIR
"""
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import chat, scenes, tokenizer
from data.answers import key as answer_key
from data.jinja import jinja
from data.sample import Sample, batch_indices, collate, to_pixels
from data.supply import TEST_SEED, Supply, real_data, scene_teacher
from model import memory
from model.hub import pretrained
from model.runs import checkpoint
from model.clip import Clip
from model.runs.config import check_ranges, from_command_line, to_command_line
from model.runs.device import pick_device, pick_dtype
from model.hub.export import export_folder, export_hf
from model.generate import Sampler, generate
from model.optim import make_optimizer, optimizer_step, seed_of, show_trained
from model.vlm import VLM, VlmConfig
from model.runs.folder import RunFolder, choose, write_json
from rl import bench, explain, metrics, rewards
from rl.report import page, statistics
from rl.report.log import mean_log, read_log
from rl.learner import Guard, make_learner
from rl.rollout import collect, read
from rl.update import estimated, informative, scored, update


def load_vlm(path, device="cpu"):
    """Own checkpoint -> (vlm, tokenizer, saved state); the model is rebuilt from the checkpoint's own config."""
    state = checkpoint.load(path, device)
    if "vlm" not in state:
        raise ValueError(f"checkpoint {str(path)!r} holds no vision-language model (stage {state.get('stage')!r})")
    vlm = VLM.from_config(state["vlm_config"], state.pop("vlm"))
    tok = tokenizer.from_saved(state["tokenizer"], f"the tokenizer in checkpoint {str(path)!r}")
    return vlm.to(device), tok, state


def load_any(cfg):
    """--checkpoint or --llava -> (vlm, tokenizer, saved state); a folder's state is as if it had been trained here."""
    device = pick_device(cfg.device)
    if not cfg.llava:
        vlm, tok, state = load_vlm(cfg.checkpoint, device)
        return vlm.to(pick_dtype(cfg.dtype)) if cfg.dtype else vlm, tok, state
    vlm, tok = pretrained.load_llava(cfg.llava, pick_dtype(cfg.dtype or "float32"), device, cfg.clip)
    if tok is None:
        raise ValueError(f"--llava={cfg.llava} holds no tokenizer; expected a tokenizer.model or a tokenizer.json")
    trained = dict(template=chat.template_for(tok), max_new=128, data="", val_percent=20, seed=0)
    return vlm, tok, dict(stage="llava", method="direct", config=trained)


def export(vlm, tok, where, template):
    """Writes a model, its tokenizer and its template as a Hugging Face folder; where: "hf:DIR"."""
    folder = export_folder(where)
    export_hf(vlm, tok, folder, jinja(template))
    print(f"wrote {folder}, for transformers' LlavaForConditionalGeneration and vLLM")


def prompts(vlm, tokenizer, samples, method, template):
    """Samples -> Batch of prompts, on the model's device."""
    rows = [chat.encode(sample, tokenizer, vlm.config.image_tokens, method, template) for sample in samples]
    return collate(rows, tokenizer.pad_id, **vlm.config.pixels).to(vlm.llm.head.device)


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
                           banned=tokenizer.banned(vlm.config.llm.vocab), generator=generator, pad_id=tokenizer.pad_id)
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


def roll_out(run, vlm, samples, method, cfg, weights, generator, clock=None):
    """Samples cfg.group completions of each sample and rewards them; -> (Batch, Rollout)."""
    tok, clock = run.tokenizer, clock or metrics.Clock(run.device)
    batch = prompts(vlm, tok, samples, method, cfg.template)
    run.spend(vlm, "encode", len(batch.pixels))
    vlm.encode(batch)
    clock.lap("encode")
    sampler = Sampler(vlm).prefill(batch, cfg.group, cfg.max_new)
    clock.lap("prefill")
    done = sampler.decode(cfg.max_new, tok.eos_id, temperature=cfg.temperature, banned=tok.banned(vlm.config.llm.vocab),
                          generator=generator, min_new=cfg.min_new, pad_id=tok.pad_id)
    run.flops += sampler.meter.total
    clock.lap("decode")
    rollout = collect(done, samples, tok, weights, cfg.gated, cfg.max_new, cfg.overlong_share)
    clock.lap("score")
    return batch, rollout


def look_ahead(run, stage, vlm, samples, method, cfg):
    """Before reinforcement learning: one rollout and an update that is thrown away, as the preflight says it; with
    --explain as many prompts in full, instead."""
    count, weights = cfg.explain or cfg.rl_batch, rewards.weights_of(cfg)
    learner = make_learner(vlm, vlm.config.llm.width, cfg)
    optimizer = make_optimizer(learner, 0.0, 0.0)           # never steps
    guard = Guard(run.folder, f"{stage}-preflight", math.inf, checkpoint.save)
    asked = [samples[i] for i in batch_indices(len(samples), count, 0, seed_of(cfg.seed, stage, "order"))]
    generator = torch.Generator(run.device).manual_seed(seed_of(cfg.seed, stage, "preflight"))
    clock, spend = metrics.Clock(run.device), lambda *_: None
    batch, rollout = roll_out(run, vlm, asked, method, cfg, weights, generator, clock)
    experience = informative(batch, rollout, cfg, everyone=bool(cfg.explain))
    active, passed = int(experience.active.sum()), 0
    if active:
        experience, _ = estimated(learner, scored(learner, experience, cfg, spend), weights, cfg)
    if cfg.explain:
        asked_as = [chat.prompt_text(sample, method, cfg.template) for sample in asked]
        print(explain.explanation(asked, asked_as, rollout, experience.advantage, weights))
    else:
        if active:
            passed = update(learner, experience, cfg, lambda drop=False: {"grad_norm": optimizer_step(
                optimizer, 0.0, 1.0, drop=True)[0]}, spend, guard).get("passed", 0)
        clock.lap("update")
        print(explain.preflight(rollout, active / count, metrics.costs(clock.laps, rollout, passed), cfg.rl_steps,
                                cfg.refill))
    run.flops = 0


@torch.no_grad()
def nearest_answers(state, samples, answers, tokenizer, count, device, dtype):
    """For each sample's picture the `count` answers its embedding is nearest to, best first (zero-shot CLIP).

    state: of a checkpoint that carries both towers. Raises ValueError when it does not.
    """
    if "clip" not in state:
        raise ValueError("chains on real pictures need a checkpoint that carries its CLIP text tower")
    model = Clip.from_config(state["clip_config"], state["clip"]).to(device, dtype)
    texts = [tokenizer.encode(" " + answer)[:model.config.text_length - 1] + [tokenizer.eos_id] for answer in answers]
    batch = collate([(ids, [0] * len(ids), ()) for ids in texts], tokenizer.pad_id, 1).to(device)
    found = []
    for i in range(0, len(samples), 64):
        pixels = to_pixels([sample.images[0] for sample in samples[i:i + 64]], model.config.image_size)
        found += model.nearest(pixels.to(device, dtype), batch.ids, batch.length, count)
    return [[answers[j] for j in row] for row in found]


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


def compare(folder, cfg, checkpoints, tests, teacher, to=""):
    """Evaluates every method on every split; writes results.json, scores.json, differences.json and the report.

    checkpoints: method -> path; tests: split -> samples; teacher: whether the samples carry a teacher's chains; to: the
    method that the others' differences are to, "" for none. A method that scores.json already holds is not evaluated
    again. Returns the rows of results.json.
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
    log = read_log(Path(folder) / "log.jsonl")
    training = statistics.training_rows(log, cfg.seed)
    write_json(Path(folder) / "kinds.json", statistics.kind_rows(scores, cfg.seed))
    write_json(Path(folder) / "training.json", training)
    write_json(Path(folder) / "differences.json",
               [dict(row, seed=cfg.seed) for row in statistics.differences(scores, to)])
    html = samples_page(f"Samples of {Path(folder).name}, T = 1", tests, scores, cfg)
    checkpoint.write_atomically(Path(folder) / "samples.html", lambda file: file.write(html))
    if curves := page.curves(log, results):
        checkpoint.write_atomically(Path(folder) / "curves.png", lambda file: file.write(curves))
    else:
        print('no curves.png: pip install -e ".[report]" brings matplotlib')
    write_json(Path(folder) / "results.json", results)      # last: a run that has it is finished
    print("\n" + statistics.table(results, scores, to))
    print("\n" + statistics.training_table(training))
    for split, samples in tests.items():
        asked = samples[:cfg.eval_sampled] if teacher else samples
        print(without_looking(split, asked, drawn=teacher), end="")
    return results


def commonest_answer(samples):
    """-> (the gold answer that is right most often, the share of `samples` it is right for), by the checker."""
    keys = [answer_key(sample.answer, sample.unit) for sample in samples]
    [(most, _)] = Counter(keys).most_common(1)
    answer = samples[keys.index(most)].answer
    return answer, float(np.mean([chat.is_right(sample, answer) for sample in samples]))


def without_looking(split, samples, drawn):
    """Text: what the prompts of a split earn without a look at the picture; "" for drawn ones that are no walks."""
    if not drawn:
        answer, share = commonest_answer(samples)
        return f"always answering {answer!r}, the commonest answer of {split}, is right with {share:.3f}\n"
    walks = [scenes.guess(sample) for sample in samples if "/walk" in sample.source]
    if not walks:
        return ""
    return f"walks of {split}: naming another thing of the picture at random is right with {np.mean(walks):.3f}\n"


def samples_page(title, tests, scores, cfg, each=8):
    """HTML: the first prompts of every split with each method's first completion at T = 1, and what it earned."""
    entries, weights = [], rewards.parse_weights(cfg.rewards, cfg.reward_timeout, cfg.reward_errors)
    for split, samples in tests.items():
        for n, sample in enumerate(samples[:min(each, cfg.eval_sampled)]):
            texts = {method: of[split]["t1"]["text"][n] for method, of in scores.items()
                     if n < len(of[split]["t1"].get("text", ()))}
            entries.append(dict(
                images=sample.images, prompt=sample.question, answer=sample.answer, kind=f"{split}, {sample.source}",
                completions=[dict(method=method, text=text, why=rewards.why(sample, text, weights, cfg.gated),
                                  reward={name: rewards.REWARDS[name](sample, text) for name in weights})
                             for method, text in texts.items()]))
    return page.samples(entries, title)


def many_seeds(script, cfg):
    """Runs `script`, train.py, for each seed in a process of its own, --jobs at a time.

    Prints mean, spread and 95 % t-intervals over the seeds; results.json, differences.json, kinds.json and
    training.json hold the rows of all. What no seed could start with is said before the folder is made.
    """
    samples = Supply(cfg).own()
    if cfg.init:
        checkpoint.load(cfg.init)
    with RunFolder(choose(cfg.out, cfg.preset, cfg.resume)) as run:
        if cfg.resume:
            # Without --threads the number of jobs decides the threads of each, and with them the rounding.
            run.reopen(asdict(cfg), ("resume", "out", *(["jobs"] if cfg.threads else [])), (), samples)
        else:
            run.create(asdict(cfg), samples)
        run_seeds(script, cfg, run.folder)


def run_seeds(script, cfg, root):
    """The seeds of `many_seeds`, in the folder `root`, and what they have in common."""
    threads = cfg.threads or max(1, (os.cpu_count() or 1) // cfg.jobs)
    shared = replace(cfg, seeds=0, jobs=1, resume=False, threads=threads)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    waiting, running = list(seeds), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that the seeds below end, too
    try:
        while waiting or running:
            while waiting and len(running) < cfg.jobs:
                seed = waiting.pop(0)
                out = root / f"seed-{seed}"
                one = replace(shared, seed=seed, out=str(out), resume=(out / "config.json").exists())
                with open(root / f"seed-{seed}.txt", "a") as file:
                    running[seed] = subprocess.Popen([sys.executable, script, *to_command_line(one)], stdout=file,
                                                     stderr=subprocess.STDOUT)
            for seed, process in list(running.items()):
                if process.poll() is not None:
                    del running[seed]
                    said = root / f"seed-{seed}.txt"
                    if process.returncode:
                        last = (said.read_text(errors="replace").splitlines() or ["nothing"])[-1]
                        raise ValueError(f"seed {seed} stopped with exit code {process.returncode}, saying {last!r} "
                                         f"(all of it in {said}); --resume --out={root} goes on")
                    print(f"seed {seed} done, see {said}")
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
    of_all = {name: [row for seed in seeds for row in json.loads((root / f"seed-{seed}" / f"{name}.json").read_text())]
              for name in ("results", "differences", "kinds", "training")
              if (root / f"seed-{cfg.seed}" / f"{name}.json").exists()}
    for name, rows in reversed(of_all.items()):                     # a run that has results.json is finished
        write_json(root / f"{name}.json", rows)
    if not of_all.get("results"):       # nothing was evaluated
        return
    log = mean_log([read_log(root / f"seed-{seed}" / "log.jsonl") for seed in seeds])
    if curves := page.curves(log, statistics.over_seeds(of_all["results"])):
        checkpoint.write_atomically(root / "curves.png", lambda file: file.write(curves))
    probes = [root / f"seed-{seed}" / "probe.json" for seed in seeds]
    if all(probe.exists() for probe in probes):
        print("shape probe, seed by seed: " + "; ".join(
            ", ".join(f"{split} {share:.3f}" for split, share in json.loads(probe.read_text()).items())
            for probe in probes))
    print(statistics.seeds_table([row for rows in of_all.values() for row in rows if "greedy" not in row["decoding"]
                                  or not row["metric"].startswith("accuracy on")]))


def run_bench(cfg, make_run, reinforce, steps=6):
    """--bench=step: an RL step and its parts, no early stop. --bench=prefix: shared prompts against repeated ones.

    Random weights and pictures, prompts of 12 words; the first step is left out.
    """
    rewards.REWARDS["bench"] = bench.varied
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(replace(cfg, rewards="bench:1", gated=False, save_every=steps + 1, min_new=cfg.max_new), folder)
        pieces = [*chat.TAGS, *(f"▁{word}" for word in bench.WORDS)]
        run.tokenizer = tokenizer.train([" ".join(bench.WORDS)] * 2, pieces, cfg.vocab)
        vlm = run.ready(VLM(VlmConfig(cfg.clip_config(cfg.vocab), cfg.llm_config(cfg.vocab), cfg.projector,
                                      cfg.feature_layer, cfg.image_positions)), "bench")
        show_trained("bench", vlm)
        samples = bench.samples(cfg.rl_batch * steps, cfg.image_size)
        what = (f"{cfg.rl_batch} prompts x {cfg.group}, {cfg.max_new} new tokens, {vlm.config.image_tokens} image "
                f"tokens, {run.device}, {torch.get_num_threads()} threads")
        if cfg.bench == "prefix":
            batch = prompts(vlm, run.tokenizer, samples[:cfg.rl_batch], "direct", cfg.template)
            completions = torch.randint(3, cfg.vocab, (cfg.rl_batch, cfg.group, cfg.max_new), device=run.device)
            print(bench.prefix_text(what, bench.shared_prefix(vlm, batch, completions)))
            return
        reinforce(run, "bench", vlm, samples, "direct", steps, run.cfg)
        lines = [json.loads(line) for line in run.log_path.read_text().splitlines()][1:]
    print(bench.step_text(what, lines))


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # a stage's .pt file
    llava: str = ""                 # a LLaVA folder, or its name on the hub, instead
    clip: str = ""                  # its image tower, where the folder has none: a folder, or open_clip's NAME/TAG
    export: str = ""                # hf:DIR: write the model there for transformers and vLLM, and stop
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
    data: str = ""                  # images:DIR or jsonl:FILE; empty: what the checkpoint was trained on
    device: str = "auto"            # auto | cpu | cuda
    dtype: str = ""                 # float32 | bfloat16 | float64; empty: the checkpoint's, float32 of a folder


RANGES = {
    "[1, 1000000]": "eval_greedy eval_sampled eval_batch",
    "[1, 10000]": "eval_samples",
    "[0, 131072]": "max_new",
}


def main(argv):
    cfg = from_command_line(Config, {"": lambda given: "default", "default": {}}, argv, __doc__)
    if bool(cfg.checkpoint) == bool(cfg.llava):
        raise ValueError("either --checkpoint= must name a stage's .pt file or --llava= a LLaVA folder")
    if cfg.export:
        export_folder(cfg.export)
    check_ranges(cfg, RANGES, dict(
        set=tuple(TEST_SEED), method=("", *chat.PROMPTS), template=("", *chat.TEMPLATES)))
    for split in cfg.splits.split(","):
        if split not in scenes.SPLITS:
            raise ValueError(f"--splits={cfg.splits}: {split!r} must be one of {', '.join(scenes.SPLITS)}")
    if cfg.image and not cfg.ask:
        raise ValueError(f"--image={cfg.image} has no effect without --ask=, a question about it")
    if cfg.llava and not (cfg.ask or cfg.export or cfg.data):
        raise ValueError(f"--llava={cfg.llava} needs --ask=, --data= or --export=: it was not trained on drawn scenes")
    vlm, tok, state = load_any(cfg)
    trained = state["config"]
    if cfg.data.startswith("llava:"):
        raise ValueError(f"--data={cfg.data} holds conversations, which nothing can check; expected images:DIR or "
                         "jsonl:FILE")
    if trained["data"].startswith("llava:") and not (cfg.ask or cfg.export or cfg.data):
        raise ValueError(f"--checkpoint={cfg.checkpoint} was trained on conversations, which nothing can check; it "
                         "needs --ask=, --data= or --export=")
    if cfg.export:
        return export(vlm, tok, cfg.export, cfg.template or trained["template"])
    settings = SimpleNamespace(method=cfg.method or state["method"], template=cfg.template or trained["template"],
                               max_new=cfg.max_new or trained["max_new"], eval_batch=cfg.eval_batch,
                               eval_greedy=cfg.eval_greedy, eval_sampled=cfg.eval_sampled,
                               eval_samples=cfg.eval_samples)
    if cfg.ask:
        pictures = (cfg.image,) if cfg.image else ()
        texts, _ = complete(vlm, tok, [Sample(images=pictures, question=cfg.ask)], settings)
        print(texts[0][0])
        return
    real, _ = real_data(cfg.data or trained["data"], trained["val_percent"])
    label = state.get("label", state["stage"])      # checkpoints of other versions have none
    results, scores = [], {label: {}}
    teacher = None if real else scene_teacher(SimpleNamespace(**trained))
    for split in ["val"] if real else cfg.splits.split(","):
        count = max(cfg.eval_greedy, cfg.eval_sampled)
        samples = real["val"] if real else scenes.load(split, count, TEST_SEED[cfg.set], teacher)
        scores[label][split] = evaluate(vlm, tok, samples, settings)
        results += statistics.rows(label, split, scores[label][split], trained["seed"])
    print(statistics.table(results, scores))
    if real:
        print(without_looking("val", real["val"], drawn=False), end="")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):     # a class or an answer that the terminal cannot show ends no run
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except (MemoryError, RuntimeError) as error:
        sys.exit("eval.py: " + memory.shortage(error, "a smaller --eval-batch or --max-new needs less"))
