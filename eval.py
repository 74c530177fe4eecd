"""One evaluator for every method: same prompts, same parser, same token budget, with intervals.

    python eval.py --checkpoint=out/embedded-1/rl.pt                     # all splits of the embedded task
    python eval.py --checkpoint=out/embedded-1/rl.pt --ask="what is at b2 ?" --image=picture.png
    python eval.py --llava=DIR --dtype=bfloat16 --ask="What is shown?" --image=picture.jpg
    python eval.py --checkpoint=out/llava-1.5-7b-1/sft.pt --export=hf:DIR
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import chat, scenes, tokenizer
from data.answers import commonest_answer
from data.jinja import jinja
from data.sample import Sample
from data.supply import real_data, scene_teacher
from data.teachers import TeacherOptions
from model import memory
from model.generate import generate
from model.hub import pretrained
from model.hub.export import export_folder, export_hf
from model.runs import checkpoint
from model.runs.config import check_fields, choice, from_command_line, number
from model.runs.device import pick_device, pick_dtype
from model.runs.folder import write_json
from model.vlm import VLM
from rl.report import curves, page, statistics
from rl.report.log import read_log
from rl.report.statistics import decoding_name
from rl.rollout import prompts, read


@dataclass(frozen=True)
class JudgeOptions:
    """evaluation"""
    eval_greedy: int = number(300, "[1, 1000000]")  # prompts a split, greedy
    eval_sampled: int = number(200, "[1, 1000000]")  # prompts a split, sampled
    eval_samples: int = number(8, "[1, 10000]")     # completions of each, sampled, for pass@ and maj@
    eval_temperature: float = number(1.0, "[0.01, 100]")  # of those
    eval_top_k: int = number(0, "[0, 1000000]")     # only so many most probable tokens are sampled; 0: all
    eval_top_p: float = number(1.0, "(0, 1]")       # only the most probable tokens of this mass are sampled
    eval_batch: int = number(512, "[1, 1000000]")   # rows sampled at once

    def __post_init__(self):
        check_fields(self)

    @property
    def decoding(self):
        """The name of the sampled decoding in rows and files, "t1" at temperature 1."""
        return decoding_name(self.eval_temperature, self.eval_top_p, self.eval_top_k)


@dataclass(frozen=True)
class Prompting:
    """How a model is asked: data.chat's method and template, and its token budget."""
    method: str
    template: str
    max_new: int


# ---------------------------------------------------------------- models

def load_vlm(path, device="cpu"):
    """Own checkpoint -> (vlm, tokenizer, saved state); the model is rebuilt from the checkpoint's own config."""
    state = checkpoint.load(path, device)
    if "vlm" not in state:
        raise ValueError(f"checkpoint {str(path)!r} holds no vision-language model (stage {state.get('stage')!r})")
    vlm = VLM.from_config(state["vlm_config"], state.pop("vlm"))
    tok = tokenizer.from_saved(state["tokenizer"], f"the tokenizer in checkpoint {str(path)!r}")
    return vlm.to(device), tok, state


def load_any(options):
    """--checkpoint or --llava -> (vlm, tokenizer, saved state); a folder's state is as if it had been trained here."""
    device = pick_device(options.device)
    if not options.llava:
        vlm, tok, state = load_vlm(options.checkpoint, device)
        if options.dtype:
            vlm = vlm.to(pick_dtype(options.dtype))
        return vlm, tok, state
    dtype = pick_dtype(options.dtype or "float32")
    vlm, tok = pretrained.load_llava(options.llava, dtype, device, options.clip)
    if tok is None:
        raise ValueError(f"--llava={options.llava} holds no tokenizer; expected a tokenizer.model or a tokenizer.json")
    trained = dict(template=chat.template_for(tok), max_new=128, data="", val_percent=20, seed=0)
    return vlm, tok, dict(stage="llava", method="direct", config=trained)


def export(vlm, tok, where, template):
    """Writes a model, its tokenizer and its template as a Hugging Face folder; where: "hf:DIR"."""
    folder = export_folder(where)
    export_hf(vlm, tok, folder, jinja(template))
    print(f"wrote {folder}, for transformers' LlavaForConditionalGeneration and vLLM")


# ---------------------------------------------------------------- asking

@torch.no_grad()
def complete(vlm, tok, samples, prompting, rows=512, group=1, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """`group` completions of each sample -> (lists of texts, lengths (n, group) in tokens). rows: sampled at once;
    temperature 0 is greedy."""
    generator = torch.Generator(vlm.llm.head.device).manual_seed(seed)
    texts = []
    lengths = []
    size = max(1, rows // group)
    for start in range(0, len(samples), size):
        batch = prompts(vlm, tok, samples[start:start + size], prompting.method, prompting.template)
        completions, _ = generate(
            vlm, batch, group, prompting.max_new, tok.eos_id, temperature=temperature, top_k=top_k, top_p=top_p,
            banned=tok.banned(vlm.config.llm.vocab), generator=generator, pad_id=tok.pad_id)
        texts += read(completions, tok)
        lengths += completions.mask.sum(-1).tolist()
    return texts, np.array(lengths)


# ---------------------------------------------------------------- judging

def judge(samples, texts):
    """n samples, n lists of G texts -> dict of (n, G) lists: right, format, and the normalised answers."""
    scores = dict(right=[], format=[], answer=[])
    for sample, group in zip(samples, texts):
        parsed = [chat.parse(text) for text in group]
        scores["right"].append([int(chat.is_right(sample, p.answer)) for p in parsed])
        scores["format"].append([int(p.well_formed) for p in parsed])
        scores["answer"].append([chat.normalise(p.answer) for p in parsed])
    return scores


def kinds(samples):
    """The question kind of each, or the class of its picture."""
    return [sample.source.rpartition("/")[2] for sample in samples]


def evaluate(vlm, tok, samples, prompting, options):
    """Scores of one method on one split: {"greedy": {...}, options.decoding: {...}}, raw, one entry a prompt.

    options: JudgeOptions.
    """
    greedy = samples[:options.eval_greedy]
    texts, lengths = complete(vlm, tok, greedy, prompting, options.eval_batch, seed=1)
    scores = {"greedy": raw_scores(greedy, texts, lengths)}
    sampled = samples[:options.eval_sampled]
    texts, lengths = complete(
        vlm, tok, sampled, prompting, options.eval_batch, options.eval_samples, options.eval_temperature,
        options.eval_top_k, options.eval_top_p, seed=1)
    scores[options.decoding] = raw_scores(sampled, texts, lengths)
    aliases = []
    for sample in sampled:
        aliases.append([chat.normalise(alias) for alias in sample.aliases])
    scores[options.decoding]["aliases"] = aliases
    return scores


def raw_scores(samples, texts, lengths):
    """What rl/report/statistics.py reads: of each prompt what was right, how long, its kind, gold answer and first
    text."""
    scores = judge(samples, texts)
    scores["length"] = lengths.tolist()
    scores["kind"] = kinds(samples)
    scores["text"] = [group[0] for group in texts]
    scores["gold"] = [chat.normalise(sample.answer) for sample in samples]
    return scores


def teacher_scores(samples, options):
    """The teacher's own chains, judged as one sampled completion a prompt."""
    asked = samples[:options.eval_sampled]
    texts = [[chat.target_text(sample.conclusion, sample.reasoning)] for sample in asked]
    scores = judge(asked, texts)
    return {options.decoding: {"right": scores["right"], "text": [group[0] for group in texts], "kind": kinds(asked)}}


def without_looking(split, samples):
    """Text: what the prompts of a split earn without a look at the picture; "" for drawn ones that are no walks."""
    if not samples[0].source.startswith("scenes/"):
        answer, share = commonest_answer(samples)
        return f"always answering {answer!r}, the commonest answer of {split}, is right with {share:.3f}\n"
    walks = [scenes.guess(sample) for sample in samples if "/walk" in sample.source]
    if not walks:
        return ""
    return f"walks of {split}: naming another thing of the picture at random is right with {np.mean(walks):.3f}\n"


# ---------------------------------------------------------------- comparing

def compare(folder, cfg, checkpoints, tests, rewards, has_teacher, to=""):
    """Evaluates every method on every split; writes results.json, scores.json, differences.json and the report.

    cfg: train.py's; checkpoints: method -> path; tests: split -> samples; rewards: a Rewards, for the page of samples;
    has_teacher: whether the samples carry a teacher's chains; to: the method that the others' differences are to, ""
    for none. A method that scores.json already holds is not evaluated again. Returns the rows of results.json.
    """
    folder = Path(folder)
    seed = cfg.run.seed
    saved = folder / "scores.json"
    scores = json.loads(saved.read_text()) if saved.exists() else {}
    if has_teacher and "teacher" not in scores:
        scores["teacher"] = {split: teacher_scores(samples, cfg.judge) for split, samples in tests.items()}
    for method, path in checkpoints.items():
        if method not in scores:
            began = time.perf_counter()
            scores[method] = scores_of_checkpoint(path, cfg, tests)
            write_json(saved, scores)
            print(f"evaluated {method:<16}{time.perf_counter() - began:7.1f} s", flush=True)

    results = []
    for method, splits in scores.items():
        for split, raw in splits.items():
            results += statistics.rows(method, split, raw, seed)
    log = read_log(folder / "log.jsonl")
    training = statistics.training_rows(log, seed)
    differences = [dict(row, seed=seed) for row in statistics.differences(scores, to)]
    write_json(folder / "kinds.json", statistics.kind_rows(scores, seed))
    write_json(folder / "training.json", training)
    write_json(folder / "differences.json", differences)
    write_report(folder, cfg, tests, scores, rewards, log, results)
    write_json(folder / "results.json", results)      # last: a run that has it is finished

    print("\n" + "\n".join(statistics.result_lines(results, differences, to)))
    print("\n" + statistics.table(results, scores, to))
    print("\n" + statistics.training_table(training))
    for split, samples in tests.items():
        drawn = samples[0].source.startswith("scenes/")
        asked = samples[:cfg.judge.eval_sampled] if drawn else samples
        print(without_looking(split, asked), end="")
    return results


def scores_of_checkpoint(path, cfg, tests):
    """{split: raw scores} of what a stage made."""
    vlm, tok, state = load_vlm(path, pick_device(cfg.machine.device))
    vlm = vlm.to(pick_dtype(cfg.machine.dtype))
    prompting = Prompting(state["method"], cfg.data.template, cfg.sampling.max_new)
    return {split: evaluate(vlm, tok, samples, prompting, cfg.judge) for split, samples in tests.items()}


def write_report(folder, cfg, tests, scores, rewards, log, results):
    """samples.html and curves.png."""
    decoding = cfg.judge.decoding
    title = f"Samples of {folder.name}, {statistics.decoding_title(decoding)}"
    html = page.samples_page(title, tests, scores, rewards, decoding)
    checkpoint.write_atomically(folder / "samples.html", lambda file: file.write(html))
    picture = curves.curves(log, results)
    if picture:
        checkpoint.write_atomically(folder / "curves.png", lambda file: file.write(picture))
    else:
        print('no curves.png: pip install -e ".[report]" brings matplotlib')


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class EvalOptions:
    """what to evaluate"""
    checkpoint: str = ""                            # a stage's .pt file
    llava: str = ""                                 # a LLaVA folder, or its name on the hub, instead
    clip: str = ""                                  # its image tower, if not in it: a folder, or NAME/TAG
    export: str = ""                                # hf:DIR: write the model there, and stop
    data: str = ""                                  # images:DIR or jsonl:FILE; empty: the checkpoint's own
    set: str = choice(*scenes.TEST_SEED)            # prompts to use: test | val (for tuning)
    splits: str = ""                                # which splits, as in id,walk3; empty: all there are
    method: str = choice("", *chat.PROMPTS)         # direct | think | asked; empty: the checkpoint's own
    template: str = choice("", *chat.TEMPLATES)     # chat template; empty: the checkpoint's own
    max_new: int = number(0, "[0, 131072]")         # token budget; 0: the checkpoint's own
    ask: str = ""                                   # ask this question ...
    image: str = ""                                 # ... about this picture, and stop
    device: str = "auto"                            # auto | cpu | cuda
    dtype: str = choice("", "float32", "bfloat16", "float64")  # empty: the checkpoint's, float32 of a folder
    threads: int = number(0, "[0, 1024]")           # CPU threads; 0: torch's choice

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Config:
    """All options, in groups."""
    what: EvalOptions = EvalOptions()
    judge: JudgeOptions = JudgeOptions()


def check(options):
    """Raises ValueError in one sentence about options that do not go together."""
    if bool(options.checkpoint) == bool(options.llava):
        raise ValueError("either --checkpoint= must name a stage's .pt file or --llava= a LLaVA folder")
    if options.export:
        export_folder(options.export)
    if options.image and not options.ask:
        raise ValueError(f"--image={options.image} has no effect without --ask=, a question about it")
    only_asks = options.ask or options.export
    if options.llava and not only_asks and options.data in ("", "scenes"):
        raise ValueError(f"--llava={options.llava} needs --ask=, --data= or --export=: it was not trained on drawn "
                         "scenes")


def main(argv):
    cfg = from_command_line(Config, {}, argv, __doc__)
    options = cfg.what
    check(options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    vlm, tok, state = load_any(options)
    trained = state["config"]
    if options.data.startswith("llava:"):
        raise ValueError(f"--data={options.data} holds conversations, which nothing can check; expected images:DIR or "
                         "jsonl:FILE")
    needs_other_data = trained["data"].startswith("llava:") and not options.data
    if needs_other_data and not (options.ask or options.export):
        raise ValueError(f"--checkpoint={options.checkpoint} was trained on conversations, which nothing can check; it "
                         "needs --ask=, --data= or --export=")
    template = options.template or trained["template"]
    prompting = Prompting(options.method or state["method"], template, options.max_new or trained["max_new"])
    if options.export:
        export(vlm, tok, options.export, template)
    elif options.ask:
        sample = Sample(images=(options.image,) if options.image else (), question=options.ask)
        texts, _ = complete(vlm, tok, [sample], prompting)
        print(texts[0][0])
    else:
        label = state.get("label", state["stage"])      # checkpoints of other versions have none
        print_tables(vlm, tok, label, test_samples(cfg, trained), prompting, cfg.judge, trained)


def test_samples(cfg, trained):
    """{split: samples} that the options and the config of the checkpoint name."""
    options = cfg.what
    real, _ = real_data(options.data or trained["data"], trained["val_percent"])
    known = [split for split in real if split != "train"] if real else [*scenes.SPLITS]
    chosen = options.splits.split(",") if options.splits else known
    for split in chosen:
        if split not in known:
            raise ValueError(f"--splits={options.splits}: {split!r} must be one of {', '.join(known)}")
    if real:
        return {split: real[split] for split in chosen}
    teacher = scene_teacher(TeacherOptions(slip=trained["slip"], confuse=trained["confuse"],
                                           drop_hop=trained["drop_hop"]))
    count = max(cfg.judge.eval_greedy, cfg.judge.eval_sampled)
    seed = scenes.TEST_SEED[options.set]
    return {split: scenes.load(split, count, seed, teacher) for split in chosen}


def print_tables(vlm, tok, label, tests, prompting, options, trained):
    """Evaluates one model on every split and prints the tables."""
    results = []
    scores = {label: {}}
    for split, samples in tests.items():
        scores[label][split] = evaluate(vlm, tok, samples, prompting, options)
        results += statistics.rows(label, split, scores[label][split], trained["seed"])
    print(statistics.table(results, scores))
    for split, samples in tests.items():
        if not samples[0].source.startswith("scenes/"):
            print(without_looking(split, samples), end="")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):     # a class or an answer that the terminal cannot show ends no run
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except (MemoryError, RuntimeError) as error:
        sys.exit("eval.py: " + memory.shortage(error, "a smaller --eval-batch or --max-new needs less"))
