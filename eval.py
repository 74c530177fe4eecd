"""One evaluator for every method: same prompts, same parser, same token budget, with intervals.

    python eval.py --checkpoint=out/embedded-1/rl.pt                     # all splits of the embedded task
    python eval.py --checkpoint=out/embedded-1/rl.pt --ask="what is at b2 ?" --image=picture.png
    python eval.py --llava=DIR --dtype=bfloat16 --ask="What is shown?" --image=picture.jpg
    python eval.py --llava=DIR --data=jsonl:FILE --prompting=ccot        # a scene graph first, then the answer
    python eval.py --checkpoint=out/embedded-1/rl.pt --verdicts          # does it look, does its thought matter?
    python eval.py --checkpoint=out/embedded-1/rl.pt --search=best_of_n --search-n=4 --scorer=oracle
    python eval.py --checkpoint=out/llava-1.5-7b-1/sft.pt --export=hf:DIR
    python eval.py --checkpoint=out/llava-1.5-7b-1/sft.pt --serve=8000       # OpenAI's chat completions
    python eval.py --inspect=out/embedded-1 [out/embedded-2 ..]              # rollouts, token by token: inspect.html
"""
import json
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import baselines, chat, long_walks, scenes, tokenizer, transfer
from data.answers import commonest_answer, is_right
from data.jinja import jinja
from data.prompting import METHODS
from data.records import is_leak
from data.sample import Sample
from data.skills import procedure
from data.supply import real_data, scene_teacher
from data.teachers import TeacherOptions
from data.worlds import DRAWN, world_of
from data.zero_shot import ZeroShot, as_captions
from model import memory, parallel, watchdog
from model.clip import Clip
from model.generate import Sampler, generate
from model.hub import pretrained
from model.hub.export import export_folder, export_hf
from model.look import looked_at
from model.mixed import in_dtype
from model.runs import checkpoint
from model.runs.config import check_fields, choice, from_command_line, number
from model.runs.device import pick_device, pick_dtype
from model.runs.folder import read_config, write_json
from model.vlm import VLM
from rl import interventions, measures
from rl.metrics import reflects
from rl.report import curves, generalisation, growth, inspector, misread, page, routes, statistics, verdicts
from rl.report.baselines import baseline_rows, baselines_text
from rl.report.log import read_log
from rl.report.samples import entries_of
from rl.report.statistics import decoding_name
from rl.rewards import consistency
from rl.rollout import prompts, read
from rl.search import Search, SearchOptions, equal_tokens, find, open_scorer
from rl.serve import Model, Server
from rl.staged import answer_in_stages


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
    """How a model is asked: data.chat's method and template, and its token budget.

    stages: a value of data.prompting.METHODS, which is asked instead of `method`; empty for none. search: how an answer
    is searched for, None to sample it plainly. ValueError for both.
    """
    method: str
    template: str
    max_new: int
    stages: tuple = ()
    search: Search | None = None

    def __post_init__(self):
        if self.stages and self.search:
            raise ValueError(f"search={self.search.label} and a prompting in stages do not go together; expected one "
                             "of them")


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
            vlm = in_dtype(vlm, options.dtype)
        return vlm, tok, state
    name = options.dtype or "float32"
    vlm, tok = pretrained.load_llava(options.llava, pick_dtype(name), device, options.clip)
    vlm = in_dtype(vlm, name)
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

class Answers(NamedTuple):
    """Completions of n samples, G of each.

    texts: n lists of G, what the parser judges; lengths (n, G): tokens sampled; cut (n, G): whether the budget ended
    it. Else None: spent (n, G), of a search all tokens that were sampled and judged for it; before, of a prompting in
    stages n texts, what was said before the first completion of each sample.
    """
    texts: list
    lengths: np.ndarray
    cut: np.ndarray
    spent: np.ndarray | None = None
    before: list | None = None


@torch.no_grad()
def complete(vlm, tok, samples, prompting, rows=512, group=1, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """`group` completions of each sample -> Answers. rows: sampled at once; temperature 0 is greedy. In stages a text
    is the last reply, and a length counts the tokens of all. A search finds one answer of each sample, whatever
    `group`."""
    if prompting.search:
        return _searched(vlm, tok, samples, prompting, rows, temperature, top_k, top_p, seed)
    complete_batch = _in_stages if prompting.stages else _at_once
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p,
                    generator=torch.Generator(vlm.llm.head.device).manual_seed(seed))
    texts = []
    lengths = []
    cut = []
    before = []
    size = max(1, rows // group)
    for start in range(0, len(samples), size):
        asked = samples[start:start + size]
        batch = complete_batch(vlm, tok, asked, prompting, group, sampling)
        texts += batch.texts
        lengths.append(batch.lengths)
        cut.append(batch.cut)
        before += batch.before or []
    return Answers(texts, np.concatenate(lengths), np.concatenate(cut), before=before or None)


def _at_once(vlm, tok, samples, prompting, group, sampling):
    """n samples -> Answers. Each of several ranks answers a part of them, and all have all answers."""
    own = parallel.own_rows(len(samples))
    noise = None
    if parallel.world() > 1 and sampling["temperature"]:        # what they would draw in one process
        noise = Sampler(vlm).noise((len(samples), group), prompting.max_new, sampling["generator"])[own]
    answers = ([], [], [])
    if samples[own]:
        batch = prompts(vlm, tok, samples[own], prompting.method, prompting.template)
        completions, _ = generate(vlm, batch, group, prompting.max_new, tok.eos_id, pad_id=tok.pad_id, noise=noise,
                                  banned=tok.banned(vlm.config.llm.vocab), **sampling)
        ended = ((completions.ids == tok.eos_id) & completions.mask).any(-1)
        answers = read(completions, tok), completions.mask.sum(-1).tolist(), (~ended).tolist()
    texts = []
    lengths = []
    cut = []
    for of_rank in parallel.gather(answers):
        texts += of_rank[0]
        lengths += of_rank[1]
        cut += of_rank[2]
    return Answers(texts, np.array(lengths), np.array(cut))


def _in_stages(vlm, tok, samples, prompting, group, sampling):
    """As `_at_once`."""
    answers = answer_in_stages(Sampler(vlm), tok, samples, prompting.stages, prompting.template, prompting.max_new,
                               group, **sampling)
    texts = []
    lengths = []
    cut = []
    before = []
    for answers_of_one in answers:
        texts.append([answer.text for answer in answers_of_one])
        lengths.append([answer.tokens for answer in answers_of_one])
        cut.append([answer.cut for answer in answers_of_one])
        *earlier, _ = answers_of_one[0].stages.values()
        before.append(" ".join(earlier))
    return Answers(texts, np.array(lengths), np.array(cut), before=before)


def _searched(vlm, tok, samples, prompting, rows, temperature, top_k, top_p, seed):
    """As `complete`, by prompting.search."""
    search = prompting.search
    generator = torch.Generator(vlm.llm.head.device).manual_seed(seed)
    size = max(1, rows // search.n)
    found = []
    with open_scorer(search.scorer) as pick:
        for start in range(0, len(samples), size):
            found += find(Sampler(vlm), tok, samples[start:start + size], search, prompting.method, prompting.template,
                          prompting.max_new, pick, temperature, top_k, top_p, generator)
    return Answers(texts=[[one.text] for one in found],
                   lengths=np.array([[one.tokens] for one in found]),
                   cut=np.array([[one.cut] for one in found]),
                   spent=np.array([[one.cost.spent] for one in found]))


def ask(vlm, tok, sample, prompting, options=JudgeOptions()):
    """Prints the greedy answer to one question; in stages every reply, named, one under another. A search samples as
    `options` say."""
    if prompting.search:
        answers = complete(vlm, tok, [sample], prompting, options.eval_batch, 1, options.eval_temperature,
                           options.eval_top_k, options.eval_top_p)
        print(answers.texts[0][0])
        print(f"({answers.spent[0, 0]} tokens sampled and judged for these {answers.lengths[0, 0]})")
        return
    if not prompting.stages:
        answers = complete(vlm, tok, [sample], prompting)
        print(answers.texts[0][0])
        return
    answers = answer_in_stages(Sampler(vlm), tok, [sample], prompting.stages, prompting.template, prompting.max_new)
    for name, reply in answers[0][0].stages.items():
        print(f"{name}: {reply}")


def server(vlm, tok, prompting, options):
    """A Server of the model, named after the last two parts of its path; it listens already, `run` answers. Raises
    ValueError where it cannot listen."""
    path = (options.llava or options.checkpoint).removesuffix(".pt")
    name = "/".join(Path(path).resolve().parts[-2:])
    model = Model(name, vlm, tok, prompting.template, prompting.max_new, generate)
    try:
        return Server(options.host, options.serve, model)
    except OSError as error:
        raise ValueError(f"--serve={options.serve} cannot be listened to at --host={options.host}: {error}") from None


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


# World -> (sample, completion) -> {name: number} that a report on it reads; each stands in the raw scores, (n, G).
NOTES = {"long_walks": long_walks.noted}


def notes(samples, texts, note):
    """n samples, n lists of G texts -> {name: (n, G) list} of what note(sample, text) says; {} without a `note`."""
    found = {}
    if note is None:
        return found
    for sample, group in zip(samples, texts):
        of_group = [note(sample, text) for text in group]
        for name in of_group[0]:
            found.setdefault(name, []).append([said[name] for said in of_group])
    return found


def kinds(samples):
    """The question kind of each, or the class of its picture."""
    return [sample.source.rpartition("/")[2] for sample in samples]


def evaluate(vlm, tok, samples, prompting, options, note=None):
    """Scores of one method on one split: {"greedy": {...}, options.decoding: {...}}, raw, one entry a prompt.

    options: JudgeOptions; note: of NOTES. A search has no greedy decoding, since its candidates are sampled.
    """
    scores = {}
    if not prompting.search:
        greedy = samples[:options.eval_greedy]
        answers = complete(vlm, tok, greedy, prompting, options.eval_batch, seed=1)
        scores["greedy"] = raw_scores(greedy, answers, note)
    sampled = samples[:options.eval_sampled]
    answers = complete(
        vlm, tok, sampled, prompting, options.eval_batch, options.eval_samples, options.eval_temperature,
        options.eval_top_k, options.eval_top_p, seed=1)
    scores[options.decoding] = raw_scores(sampled, answers, note)
    aliases = []
    for sample in sampled:
        aliases.append([chat.normalise(alias) for alias in sample.aliases])
    scores[options.decoding]["aliases"] = aliases
    return scores


def raw_scores(samples, answers, note=None):
    """What rl/report/statistics.py and verdicts.py read: of each prompt what was right, how long, what was cut off,
    whether thoughts end in the answer and hold words of reflection, its kind, gold answer and first text; and what is
    noted."""
    scores = judge(samples, answers.texts) | notes(samples, answers.texts, note)
    scores["length"] = answers.lengths.tolist()
    scores["cut"] = answers.cut.astype(int).tolist()
    if answers.spent is not None:
        scores["spent"] = answers.spent.tolist()
    if answers.before is not None:
        scores["before"] = answers.before
    scores["agrees"] = of_each(samples, answers.texts, consistency)
    scores["reflects"] = of_each(samples, answers.texts, lambda sample, text: reflects(text))
    scores["kind"] = kinds(samples)
    scores["text"] = [group[0] for group in answers.texts]
    scores["gold"] = [chat.normalise(sample.answer) for sample in samples]
    return scores


def of_each(samples, texts, judges):
    """n samples, n lists of G texts -> (n, G) list of 0 and 1, as judges(sample, text) says."""
    return [[int(judges(sample, text)) for text in group] for sample, group in zip(samples, texts)]


def teacher_scores(samples, options, note=None):
    """The teacher's own chains, judged as one sampled completion a prompt; note: of NOTES."""
    asked = samples[:options.eval_sampled]
    texts = [[chat.target_text(sample.conclusion, sample.reasoning)] for sample in asked]
    scores = judge(asked, texts)
    raw = {"right": scores["right"], "text": [group[0] for group in texts], "kind": kinds(asked)}
    return {options.decoding: raw | notes(asked, texts, note)}


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

@dataclass(frozen=True)
class Contender:
    """A row of a comparison: a checkpoint, and how it is asked.

    is_folder: the path is a LLaVA folder or its name on the hub, which then needs a method. method: of data.chat's
    PROMPTS, "" for the one that it was taught; prompting: of data.prompting's METHODS instead;
    search: how its answers are searched for, None for plain ones; splits: () for all; most: prompts of each at most, 0
    for any number; samples: completions of each prompt, 0 for --eval-samples.
    """
    path: Path | str
    method: str = ""
    prompting: str = ""
    search: Search | None = None
    splits: tuple = ()
    most: int = 0
    samples: int = 0
    is_folder: bool = False

    def tests(self, tests):
        """Those of {split: samples} that it is asked."""
        chosen = self.splits or tests
        return {split: tests[split] for split in chosen}

    def judge(self, options):
        """JudgeOptions -> those that it is judged by."""
        most = self.most or max(options.eval_greedy, options.eval_sampled)
        return replace(options, eval_greedy=min(most, options.eval_greedy),
                       eval_sampled=min(most, options.eval_sampled), eval_samples=self.samples or options.eval_samples)


def compare(folder, cfg, contenders, tests, rewards, has_teacher, to="", trained=None, probes=None, shown=()):
    """Evaluates every method on every split; writes results.json, scores.json, differences.json and the report.

    cfg: train.py's; contenders: method -> Contender; tests: split -> samples; rewards: a Rewards, for the page of
    samples; has_teacher: whether the samples carry a teacher's chains; to: the method that the others' differences are
    to, "" for none; trained: of the routes method -> FLOPs of its training, else None; probes: of post-training on a
    part of the questions a Probes, else None; shown: of pictures in classes the training samples, for the baselines. A
    method that scores.json already holds is not evaluated again. Returns the rows of results.json.
    """
    folder = Path(folder)
    seed = cfg.run.seed
    saved = folder / "scores.json"
    scores = json.loads(saved.read_text()) if saved.exists() else {}
    parallel.barrier()          # all have read it before the first writes
    if has_teacher and "teacher" not in scores:
        note = note_of(cfg)
        scores["teacher"] = {split: teacher_scores(samples, cfg.judge, note) for split, samples in tests.items()}
    width = max([15, *map(len, contenders)])
    for method, contender in contenders.items():
        if method not in scores:
            began = time.perf_counter()
            watchdog.at(f"the evaluation of {method}")
            scores[method] = scores_of(contender, cfg, tests)
            write_json(saved, scores)
            print(f"evaluated {method:<{width}} {time.perf_counter() - began:7.1f} s", flush=True)

    results = []
    for method, splits in scores.items():
        for split, raw in splits.items():
            results += statistics.rows(method, split, raw, seed)
    log = read_log(folder / "log.jsonl")
    training = statistics.training_rows(log, seed)
    differences = [dict(row, seed=seed) for row in statistics.differences(scores, to)]
    judged = verdicts_of(folder, cfg, contenders, tests, scores, to)
    write_json(folder / "kinds.json", statistics.kind_rows(scores, seed))
    write_json(folder / "training.json", training)
    write_json(folder / "differences.json", differences)
    write_json(folder / "verdicts.json", judged)
    texts = special_reports(folder, cfg, contenders, tests, scores, results, trained, probes, shown)
    guesses = ""
    for split, asked in tests.items():
        drawn = asked[0].source.startswith("scenes/")
        guesses += without_looking(split, asked[:cfg.judge.eval_sampled] if drawn else asked)
    tables = [verdicts.verdicts_text(judged), statistics.table(results, scores, to),
              "\n".join(text for text in (statistics.training_table(training), guesses.rstrip("\n")) if text), *texts]
    tables = "\n\n".join(text for text in tables if text)
    write_report(folder, cfg, tests, scores, rewards, log, results, tables)
    write_json(folder / "results.json", results)      # last: a run that has it is finished

    print("\n" + "\n".join(statistics.result_lines(results, differences, to)))
    print("\n" + tables)
    return results


def verdicts_of(folder, cfg, contenders, tests, scores, to):
    """The rows of verdicts.json, on `to`, or without it on the last contender that is asked plainly. What
    interventions.json already holds is not measured again. Arguments as those of `compare`."""
    path = folder / "interventions.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    plain = [name for name, contender in contenders.items() if not (contender.prompting or contender.search)]
    main = to or ["", *plain][-1]
    if main in plain and main not in measured:
        began = time.perf_counter()
        watchdog.at(f"the answers of {main} without its picture or its thought")
        vlm, tok, prompting = opened(contenders[main], cfg)
        home = statistics.main_split(list(tests))
        measured[main] = intervened(vlm, tok, tests[home], prompting, cfg.judge)
        write_json(path, measured)
        print(f"took pictures and thoughts from {main} {time.perf_counter() - began:7.1f} s", flush=True)
    return verdicts.verdicts(scores, verdicts.start_of(scores, main), main, measured, cfg.run.seed)


def intervened(vlm, tok, samples, prompting, options):
    """What a model answers without its picture and its thought, as interventions.intervene has it; no more prompts than
    are asked greedily."""
    asking = measures.Asking(tok, prompting.method, prompting.template, prompting.max_new)
    return interventions.intervene(Sampler(vlm), asking, samples[:options.eval_greedy])


def special_reports(folder, cfg, contenders, tests, scores, results, trained, probes, shown):
    """Writes the files that only some runs have -> their tables as texts. results: the rows of results.json; else as
    for `compare`."""
    texts = []
    seed = cfg.run.seed
    if shown:
        found = measure_baselines(folder, cfg, contenders, tests, scores, shown)
        texts.append(baselines_text(found))
    if cfg.data.data == "monitors":
        found = misread.rows(scores, seed)
        write_json(folder / "misread.json", found)
        texts.append(misread.misread_text(found))
    if trained:
        found = routes.rows(scores, trained, is_leak, procedure, seed)
        write_json(folder / "routes.json", found)
        texts.append(routes.routes_text(scores, found))
    if probes:
        found = generalisation_rows(folder, cfg, contenders, tests, scores, probes)
        write_json(folder / "generalisation.json", found)
        write_picture(folder / "generalisation.png", generalisation.picture(found, transfer.PARTS))
        texts.append(generalisation.generalisation_text([*results, *found], transfer.PARTS))
    grown = growth.rows(scores, seed)
    if grown:
        write_growth(folder, grown)
        texts.append(growth.growth_text(grown))
    return [text for text in texts if text]


def note_of(cfg):
    """What is noted of completions in the world of a run; None for nothing."""
    return NOTES.get(cfg.data.world) if cfg.data.data == "scenes" else None


def scores_of(contender, cfg, tests):
    """{split: raw scores} of a Contender; tests: {split: samples}."""
    vlm, tok, prompting = opened(contender, cfg)
    options = contender.judge(cfg.judge)
    scores = {}
    for split, samples in contender.tests(tests).items():
        scores[split] = evaluate(vlm, tok, samples, prompting, options, note_of(cfg))
    return scores


def opened(contender, cfg):
    """A Contender -> (vlm, tokenizer, Prompting)."""
    place = dict(checkpoint=contender.path)
    if contender.is_folder:
        place = dict(llava=contender.path, clip=cfg.clip.clip)
    vlm, tok, state = load_any(EvalOptions(**place, device=cfg.machine.device, dtype=cfg.machine.dtype))
    stages = METHODS.get(contender.prompting, ())
    prompting = Prompting(contender.method or state["method"], cfg.data.template, cfg.sampling.max_new, stages,
                          contender.search)
    return vlm, tok, prompting


def write_growth(folder, grown):
    """growth.json and growth.png; grown: rows of rl/report/growth.py."""
    write_json(folder / "growth.json", grown)
    draw_growth(folder, grown)


def draw_growth(folder, grown):
    """growth.png alone."""
    write_picture(folder / "growth.png", growth.growth_picture(grown, max(long_walks.TRAINED)))


def write_report(folder, cfg, tests, scores, rewards, log, results, tables):
    """report.html and curves.png. results: the rows of results.json; tables: text, as printed."""
    entries = entries_of(tests, scores, rewards, cfg.judge.decoding)
    html = page.run_page(folder.name, page.gather(folder, results=results, log=log), entries, tables)
    checkpoint.write_bytes(folder / "report.html", html)
    write_picture(folder / "curves.png", curves.curves(log, results))


def write_picture(path, picture):
    """Writes the bytes of a PNG. None, where there was nothing to draw, writes nothing; for want of matplotlib it is
    noted."""
    if picture:
        checkpoint.write_bytes(path, picture)
    elif find_spec("matplotlib") is None:
        print(f'no {path.name}: pip install -e ".[report]" brings matplotlib')


# ---------------------------------------------------------------- baselines of pictures in classes

PIXELS = 64                 # side of a picture whose pixels are compared, or that of the model where it is smaller


def measure_baselines(folder, cfg, contenders, tests, scores, shown):
    """The rows of baselines.json; what stands there already is not measured again. Arguments as those of `compare`;
    scores: {method: {split: raw scores}} of the contenders.

    Right or not are the first answers of baselines on the prompts of greedy decoding; so are those of the stages that
    answer without thinking, `sft` and `sft_direct`, where the run has them.
    """
    path = folder / "baselines.json"
    if path.exists():
        return json.loads(path.read_text())
    asked = {split: samples[:cfg.judge.eval_greedy] for split, samples in tests.items()}
    prompts_of_all = [sample for samples in asked.values() for sample in samples]
    right = {}
    [checkpoint_of_run, *_] = [contender.path for contender in contenders.values() if not contender.is_folder]
    for method, given in simple_answers(cfg, checkpoint_of_run, prompts_of_all, shown).items():
        given = iter(given)
        right[method] = {}
        for split, samples in asked.items():
            right[method][split] = [int(is_right(sample, next(given))) for sample in samples]
    if (folder / "sft.pt").exists():
        right["sft, no thinking"] = right_directly(folder / "sft.pt", cfg, asked)
    if "sft_direct" in scores:
        right["sft_direct, no thinking"] = {}
        for split in asked:
            right["sft_direct, no thinking"][split] = [one for [one] in scores["sft_direct"][split]["greedy"]["right"]]
    rows = baseline_rows(right, cfg.run.seed)
    write_json(path, rows)
    return rows


def simple_answers(cfg, path, asked, shown):
    """{baseline: an answer to each sample of `asked`}. path: a checkpoint of the run, for its image tower; shown: the
    training samples."""
    device = pick_device(cfg.machine.device)
    dtype = pick_dtype(cfg.machine.dtype)
    vlm, tok, state = load_vlm(path, device)
    vlm = vlm.to(dtype)
    side = min(PIXELS, vlm.config.clip.image_size)
    answers = {
        "majority class": baselines.majority(shown, asked),
        "nearest pixels": baselines.nearest_pixels(shown, asked, side),
        "linear probe": baselines.probed(shown, asked, lambda pixels: vlm.features(pixels.to(device)),
                                         vlm.config.pixels),
    }
    clip = zero_shot(cfg, state, tok)
    if clip:
        nearest = clip.nearest(asked, sorted({sample.answer for sample in shown}), 1)
        answers["zero-shot CLIP"] = [name for [name] in nearest]
    return answers


def zero_shot(cfg, towers, tok):
    """The ZeroShot of the CLIP at hand: the one that a run trained, whose weights and config stand in `towers` as in a
    checkpoint, and which reads words by the run's tokenizer `tok`; else that of --clip, with OpenAI's words. None where
    neither has a text tower that can be read. cfg: train.py's."""
    device = pick_device(cfg.machine.device)
    # Cosines of a picture with two classes often differ by less than bfloat16 tells apart.
    dtype = torch.promote_types(pick_dtype(cfg.machine.dtype), torch.float32)
    name = cfg.clip.clip
    if "clip" in towers:
        clip = Clip.from_config(towers["clip_config"], towers["clip"]).to(device, dtype)
        return ZeroShot(clip, as_captions(tok, clip.config.text_length))
    if not name or pretrained.text_fault(name):
        return None
    clip = pretrained.load_clip(name, dtype, device)
    return ZeroShot(clip, pretrained.photo_reader(clip.config.text_length))


def right_directly(path, cfg, asked):
    """{split: samples} -> {split: whether each greedy answer of a checkpoint is right, 0 or 1}."""
    vlm, tok, state = load_vlm(path, pick_device(cfg.machine.device))
    vlm = in_dtype(vlm, cfg.machine.dtype)
    prompting = Prompting(state["method"], cfg.data.template, cfg.sampling.max_new)
    right = {}
    for split, samples in asked.items():
        answers = complete(vlm, tok, samples, prompting, cfg.judge.eval_batch)
        right[split] = [one for [one] in judge(samples, answers.texts)["right"]]
    return right


# ---------------------------------------------------------------- post-training on a part of the questions

def probes_of(supply, options, start):
    """A Supply and JudgeOptions -> Probes, from prompts that nothing trains on."""
    seed = scenes.TEST_SEED[supply.options.eval_set]
    count = options.eval_greedy
    begun = {}
    for kind in transfer.KINDS:
        samples = scenes.load(kind, count, seed, supply.flawless, world=supply.world)
        begun[kind] = (samples, [f"<think> {transfer.beginning(sample)}" for sample in samples])
    parts = supply.of_parts(options.eval_sampled)
    captioned = [sample for samples in parts.values() for sample in samples]
    return measures.Probes(start, parts, begun, scenes.load("sft", count, seed), captioned)


def generalisation_rows(folder, cfg, contenders, tests, scores, probes):
    """The rows of generalisation.json. Arguments as those of `compare`. What measures.json already holds is not
    measured again."""
    device = pick_device(cfg.machine.device)
    dtype = cfg.machine.dtype
    path = folder / "measures.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    start, tok, state = load_vlm(contenders[probes.start].path, device)
    asking = measures.Asking(tok, state["method"], cfg.data.template, cfg.sampling.max_new)
    start = Sampler(in_dtype(start, dtype))
    for method, contender in contenders.items():
        if method not in measured:
            began = time.perf_counter()
            vlm, _, _ = load_vlm(contender.path, device)
            measured[method] = measures.probe(Sampler(in_dtype(vlm, dtype)), start, probes, asking)
            write_json(path, measured)
            print(f"measured {method} {time.perf_counter() - began:7.1f} s", flush=True)
    decoys = {}
    for split in transfer.RULES:
        decoys[split] = [chat.normalise(sample.decoy) for sample in tests[split]]
    guesses = {kind: commonest_answer(tests[kind])[1] for kind in transfer.KINDS}
    return generalisation.rows(scores, measured, decoys, guesses, probes.start, transfer.PARTS, cfg.run.seed)


# ---------------------------------------------------------------- looking into rollouts

TESTS_SHOWN = 24            # prompts of each split
MOST_LOOKS = 2000           # completions, newest first, whose attention is computed
PART_OF_RUN = re.compile("(cell-[0-9]+-)?seed-[0-9]+")      # folders of --seeds and --grid


def inspect(cfg):
    """--inspect: inspect.html of run folders, in the first of them; a folder of seeds or of a grid stands for the runs
    in it."""
    folders = run_folders(cfg.what.inspect)
    names = run_names(folders, "," in cfg.what.inspect)
    runs = []
    for folder, name in zip(folders, names):
        lines = inspector.read_rollouts(folder)
        config = read_config(folder)
        if cfg.what.attention:
            add_attention(folder, config, lines, cfg.what)
        scores, asked = tests_of(folder, config, cfg)
        runs.append(inspector.InspectedRun(name, lines, asked, scores))
    html = inspector.inspector_page(f"Rollouts of {', '.join(names)}", runs)
    path = Path(cfg.what.inspect.split(",")[0]) / "inspect.html"
    checkpoint.write_bytes(path, html)
    groups = sum(len(run.lines) + len(run.tests()) for run in runs)
    of_groups = f"{groups} group{'s' if groups != 1 else ''}"
    of_runs = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    print(f"wrote {path}: {of_groups} of {of_runs}, {len(html) / 1e6:.1f} MB")


def run_folders(names):
    """RUN,RUN2,.. -> run folders; those in a folder of seeds or of a grid by their numbers, since when they were
    written depends on --jobs."""
    folders = []
    for name in names.split(","):
        parts = []
        for path in Path(name).glob(f"*/{inspector.FILE}"):
            if PART_OF_RUN.fullmatch(path.parent.name):
                parts.append(path.parent)
        parts.sort(key=lambda folder: [int(digits) for digits in re.findall("[0-9]+", folder.name)])
        folders += parts or [Path(name)]
    return folders


def run_names(folders, several):
    """Run folders -> what the page calls them. several: whether more than one was given; then seeds and cells, which
    are called the same in all folders, stand behind the name of their folder."""
    paths = [folder.resolve() for folder in folders]
    known = [path.name for path in paths]
    names = []
    for path in paths:
        is_common = PART_OF_RUN.fullmatch(path.name) or known.count(path.name) > 1
        names.append(f"{path.parent.name}/{path.name}" if several and is_common else path.name)
    return names


def tests_of(folder, config, cfg):
    """A run folder and its saved config -> (method -> split -> raw scores of the sampled decoding, split -> the first
    samples); ({}, {}) before a run is evaluated, and where its data are not there any more."""
    path = folder / "scores.json"
    if not path.exists():
        return {}, {}
    judge = JudgeOptions(**{name: config[name] for name in vars(cfg.judge) if name in config})
    what = replace(cfg.what, set=config["eval_set"])
    try:
        tests = test_samples(replace(cfg, what=what, judge=judge), config)
    except (ValueError, OSError) as error:
        print(f"no tests of {folder} on the page: {error}")
        return {}, {}
    scores = {}
    for method, splits in json.loads(path.read_text()).items():
        scores[method] = {split: raw.get(judge.decoding, {}) for split, raw in splits.items()}
    return scores, {split: samples[:TESTS_SHOWN] for split, samples in tests.items()}


def add_attention(folder, config, lines, options):
    """Adds to lines of a run's rollouts where the finished model of their stage looks as it reads what was answered:
    "look" of a group, how its picture was fitted; of a completion {number of an answer's token: attention to each
    patch, in thousandths}. The newest stage comes first, and of a stage the newest groups; a model of which no group
    is left is not loaded."""
    device = pick_device(options.device)
    left = MOST_LOOKS
    for stage in dict.fromkeys(line["stage"] for line in reversed(lines)):
        chosen = newest_of(lines, stage, left)
        if not chosen:
            continue
        path = folder / f"{stage}.pt"
        if not path.exists():
            print(f"no attention of {stage}: it is not finished")
            continue
        vlm, tok, state = load_vlm(path, device)
        side = math.isqrt(vlm.config.image_tokens)
        if vlm.config.projector == "resampler":
            print(f"no attention of {stage}: the tokens of its resampler are no patches")
            continue
        for line in chosen:
            line["look"] = dict(side=side, fit=vlm.config.image_fit)
            batch = prompts(vlm, tok, [inspector.sample_of(line)], state["method"], config["template"])
            for completion in line["completions"]:
                looks = looked_at(vlm, batch, torch.tensor(completion["ids"], device=device))
                completion["look"] = {}
                for at in inspector.answer_tokens(completion["tokens"]):
                    completion["look"][at] = (1000 * looks[at]).round().int().tolist()
                left -= 1


def newest_of(lines, stage, most):
    """Lines of rollouts -> the newest groups with pictures of a stage, newest first, with at most so many
    completions."""
    chosen = []
    for line in reversed(lines):
        if line["stage"] == stage and line["pictures"]:
            most -= len(line["completions"])
            if most < 0:
                break
            chosen.append(line)
    return chosen


def with_runs_joined(argv):
    """--inspect=RUN RUN2 .. -> --inspect=RUN,RUN2,..: no other option takes several words."""
    joined = []
    for word in argv:
        follows = joined and joined[-1].startswith("--inspect=") and not word.startswith("--")
        if follows:
            joined[-1] += f",{word}"
        elif joined and joined[-1] == "--inspect":
            joined[-1] = f"--inspect={word}"
        else:
            joined.append(word)
    return joined


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class EvalOptions:
    """what to evaluate"""
    checkpoint: str = ""                            # a stage's .pt file
    llava: str = ""                                 # a LLaVA folder, or its name on the hub, instead
    clip: str = ""                                  # its image tower, if not in it: a folder, or NAME/TAG
    export: str = ""                                # hf:DIR: write the model there, and stop
    data: str = ""                                  # as train.py's, but llava:FILE; empty: the checkpoint's own
    set: str = choice(*scenes.TEST_SEED)            # prompts to use: test | val (for tuning)
    splits: str = ""                                # which splits, as in id,walk3; empty: all there are
    method: str = choice("", *chat.PROMPTS)         # one of chat.PROMPTS; empty: the checkpoint's own
    prompting: str = choice("", *METHODS)           # ask in stages instead, untrained; empty: by --method
    template: str = choice("", *chat.TEMPLATES)     # chat template; empty: the checkpoint's own
    max_new: int = number(0, "[0, 131072]")         # token budget; 0: the checkpoint's own
    inspect: str = ""                               # run folders, RUN [RUN2 ..]: write inspect.html into the first
    attention: bool = False                         # with --inspect: where each stage's model looks as it answers
    ask: str = ""                                   # ask this question ...
    image: str = ""                                 # ... about this picture, and stop
    verdicts: bool = False                          # does it look, does its thought matter? of --checkpoint; stop
    serve: int = number(-1, "[-1, 65535]")          # answer OpenAI's chat completions at this port; 0: a free one
    host: str = "127.0.0.1"                         # ... of this address: 0.0.0.0 is open to the whole network
    device: str = "auto"                            # auto | cpu | cuda
    dtype: str = choice("", "float32", "mixed", "bfloat16", "float64")  # empty: the checkpoint's, float32 of a folder
    threads: int = number(0, "[0, 1024]")           # CPU threads; 0: torch's choice

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Config:
    """All options, in groups."""
    what: EvalOptions = EvalOptions()
    judge: JudgeOptions = JudgeOptions()
    search: SearchOptions = SearchOptions()


def check(options, search):
    """EvalOptions, SearchOptions: raises ValueError in one sentence about options that do not go together."""
    if options.inspect:
        if options.checkpoint or options.llava:
            raise ValueError(f"--inspect={options.inspect} reads run folders and takes no --checkpoint= or --llava=")
        return
    if options.attention:
        raise ValueError("--attention has no effect without --inspect=, the page that shows it")
    if bool(options.checkpoint) == bool(options.llava):
        raise ValueError("either --checkpoint= must name a stage's .pt file or --llava= a LLaVA folder")
    if options.export:
        export_folder(options.export)
    if options.image and not options.ask:
        raise ValueError(f"--image={options.image} has no effect without --ask=, a question about it")
    if options.prompting and options.method:
        raise ValueError(f"--prompting={options.prompting} and --method={options.method} both say how to ask; expected "
                         "one of them")
    if options.prompting and search.search:
        raise ValueError(f"--prompting={options.prompting} and --search={search.search} do not go together; expected "
                         "one of them")
    if options.ask and search.scorer == "oracle":
        raise ValueError("--scorer=oracle needs the gold answer, which --ask has not; expected another scorer")
    serves = options.serve >= 0
    if options.verdicts and (options.prompting or search.search):
        raise ValueError("--verdicts goes with plain completions: expected it without --prompting and --search")
    for name in ("ask", "export", "data", "method", "prompting", "verdicts"):
        value = getattr(options, name)
        if serves and value:
            raise ValueError(f"--serve={options.serve} and --{name}={value} do not go together: a client brings its "
                             "own questions")
    if serves and search.search:
        raise ValueError(f"--serve={options.serve} and --search={search.search} do not go together: what is served is "
                         "sampled plainly")
    only_asks = options.ask or options.export or serves
    if options.llava and not only_asks and options.data in ("", *DRAWN):
        raise ValueError(f"--llava={options.llava} needs --ask=, --data= or --export=: it was not trained on drawn "
                         "scenes")


def main(argv):
    cfg = from_command_line(Config, {}, with_runs_joined(argv), __doc__)
    options = cfg.what
    check(options, cfg.search)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.inspect:
        return inspect(cfg)
    vlm, tok, state = load_any(options)
    trained = state["config"]
    if options.data.startswith("llava:"):
        raise ValueError(f"--data={options.data} holds conversations, which nothing can check; expected images:DIR or "
                         "jsonl:FILE")
    needs_other_data = trained["data"].startswith("llava:") and not options.data
    if needs_other_data and not (options.ask or options.export or options.serve >= 0):
        raise ValueError(f"--checkpoint={options.checkpoint} was trained on conversations, which nothing can check; it "
                         "needs --ask=, --data= or --export=")
    template = options.template or trained["template"]
    method = options.method or state["method"]
    stages = METHODS.get(options.prompting, ())
    search = cfg.search.chosen
    prompting = Prompting(method, template, options.max_new or trained["max_new"], stages, search)
    if options.export:
        export(vlm, tok, options.export, template)
    elif options.ask:
        sample = Sample(images=(options.image,) if options.image else (), question=options.ask)
        ask(vlm, tok, sample, prompting, cfg.judge)
    elif options.serve >= 0:
        server(vlm, tok, prompting, options).run()
    elif options.verdicts:
        print_verdicts(vlm, tok, state.get("label", state["stage"]), test_samples(cfg, trained), prompting, cfg.judge)
    else:
        label = state.get("label", state["stage"])      # checkpoints of other versions have none
        if options.prompting:
            label = f"{label}+{options.prompting}"
        if search:
            label = f"{label}+{search.label}"
        print_tables(vlm, tok, label, test_samples(cfg, trained), prompting, cfg.judge, trained)


def test_samples(cfg, trained):
    """{split: samples} that the options and the config of the checkpoint name."""
    options = cfg.what
    real, _ = real_data(options.data or trained["data"], trained["val_percent"])
    world = world_of(options.data or trained["data"], trained.get("world", "grid"))     # older checkpoints name none
    known = [split for split in real if split != "train"] if real else [*world.splits]
    chosen = options.splits.split(",") if options.splits else known
    for split in chosen:
        if split not in known:
            raise ValueError(f"--splits={options.splits}: {split!r} must be one of {', '.join(known)}")
    if real:
        return {split: real[split] for split in chosen}
    teacher = scene_teacher(TeacherOptions(slip=trained["slip"], confuse=trained["confuse"],
                                           drop_hop=trained["drop_hop"]), world)
    count = max(cfg.judge.eval_greedy, cfg.judge.eval_sampled)
    seed = scenes.TEST_SEED[options.set]
    return {split: world.load(split, count, seed, teacher) for split in chosen}


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
    if prompting.search:
        for split, raw in scores[label].items():
            print(spent_text(split, raw[options.decoding]))


def print_verdicts(vlm, tok, label, tests, prompting, options):
    """Prints what verdicts say of one model without its start, on every split."""
    for split, samples in tests.items():
        found = intervened(vlm, tok, samples, prompting, options)
        answers = complete(vlm, tok, samples[:options.eval_sampled], prompting, options.eval_batch,
                           options.eval_samples, options.eval_temperature, options.eval_top_k, options.eval_top_p, 1)
        scores = {label: {split: {options.decoding: raw_scores(samples[:options.eval_sampled], answers)}}}
        print(verdicts.verdicts_text(verdicts.verdicts(scores, "", label, {label: found})))


def spent_text(split, raw):
    """One line on what a search cost; raw: raw scores of its decoding."""
    plain = equal_tokens(raw["spent"], raw["length"])
    return (f"{split}: {np.mean(raw['spent']):.1f} tokens sampled and judged for an answer of "
            f"{np.mean(raw['length']):.1f}, the price of {plain} plain ones as long")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):     # a class or an answer that the terminal cannot show ends no run
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except (MemoryError, RuntimeError) as error:
        sys.exit("eval.py: " + memory.shortage(error, "a smaller --eval-batch or --max-new needs less"))
