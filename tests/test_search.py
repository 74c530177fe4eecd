"""Search at inference against slow loops over single sequences, scripted candidates, and counts made by hand."""
import importlib
import json
from collections import Counter

import numpy as np
import pytest
import torch

import eval as evaluation
from data import chat
from data.sample import Sample
from model import generate as generation
from model.generate import Sampler
from rl import search as module
from rl.search import Candidate, Search, SearchOptions, choose, equal_tokens, find, open_scorer, total
from test_flops import counted
from test_generate import last_state
from tiny import BOS, EOS, IMAGE, PAD, PATCHES, difference, make_vlm, picture, random_completions, speak_for, to_batch
from tiny import prompts as odd_prompts

BUDGET = 14
WORDS = {3: "</think>", 4: " .", 5: "<answer> two</answer>", 6: "<answer> three</answer>", 7: "</SUMMARY>",
         8: "</CAPTION>", 9: "</REASONING>", 10: "<CONCLUSION> two</CONCLUSION>"}


class Toy:
    """A tokenizer of 37 tokens that spell whole words and tags; a prompt has a token for each of its letters."""
    pad_id, bos_id, eos_id, image_id = PAD, BOS, EOS, IMAGE

    def encode(self, text):
        return [11 + ord(letter) % 26 for letter in text]

    def encode_with_offsets(self, text):
        return self.encode(text), [(i, i + 1) for i in range(len(text))]

    def decode(self, ids):
        return "".join(WORDS.get(i, f" w{i}") for i in ids if i > EOS)

    def banned(self, vocab):
        return (PAD, BOS)


TOY = Toy()


# One picture, none, two with a turn before; the prompts have other lengths.
SAMPLES = [Sample(id="a", images=(picture(0),), question="what", answer="two"),
           Sample(id="b", question="which one", answer="three"),
           Sample(id="c", images=(picture(1), picture(2)), turns=(("a<image>b", "yes"),), question="and <image> so",
                  answer="two"),
           Sample(id="d", images=(picture(3),), question="a b c d e f", answer="three")]


def model(dtype=torch.float64, often=0.0):
    """often: how much all states speak for the tokens that end something, so that candidates end early and late."""
    vlm = make_vlm(dtype, seed=3)
    if often:
        speak_for(vlm, range(2, 11), often)
    return vlm


def searched(search, vlm=None, samples=SAMPLES, method="think", seed=0, max_new=BUDGET, **options):
    """-> P Found, the sampler."""
    sampler = Sampler(vlm or model(often=2.0))
    with open_scorer(search.scorer) as pick:
        found = find(sampler, TOY, samples, search, method, "brief", max_new, pick,
                     generator=torch.Generator().manual_seed(seed), **options)
    return found, sampler


# ---------------------------------------------------------------- a slow loop over single sequences

def slow_logp(vlm, sample, method, tokens, temperature):
    """Log-probs (V,) of the next token, everything computed anew, one sequence."""
    batch = module.prompts(vlm, TOY, [sample], method, "brief")
    x = torch.cat([vlm.embed(batch), vlm.llm.embed_tokens(torch.tensor([tokens], dtype=torch.long))], dim=1)
    state = vlm.llm(x, torch.tensor([x.shape[1]]))[0][0, -1]
    return (state @ vlm.llm.head.T / temperature).log_softmax(-1)


def slow_search(vlm, samples, method, n, seed, ends, wants, temperature):
    """-> (chain of each sample, tokens sampled for each, what happened, counted).

    ends[i], wants[i](own, text, ended): of step i, the last again and again. Draws: of each step one number a candidate
    and token, of the samples that go on side by side, as the batch draws them.
    """
    generator = torch.Generator().manual_seed(seed)
    chains = [[] for _ in samples]
    spent = [0] * len(samples)
    going = list(range(len(samples)))
    happened = Counter()
    step = 0
    while going:
        end = ends[min(step, len(ends) - 1)]
        want = wants[min(step, len(wants) - 1)]
        own = {(p, c): [] for p in going for c in range(n)}
        logps = {place: [] for place in own}
        active = set(own)
        left = BUDGET - min(len(chains[p]) for p in going)
        noise = torch.rand(len(going), n, left, dtype=torch.float64, generator=generator)
        for t in range(left):
            for p, c in sorted(active):
                logp = slow_logp(vlm, samples[p], method, chains[p] + own[p, c], temperature)
                mass = logp.exp()
                mass[list(TOY.banned(0))] = 0
                mass = mass.cumsum(0) / mass.sum()
                token = int((mass <= noise[going.index(p), c, t]).sum())
                own[p, c].append(token)
                logps[p, c].append(float(logp[token]))
                said = end and end in TOY.decode(own[p, c])
                full = len(chains[p]) + len(own[p, c]) == BUDGET
                if token == EOS or said or full:
                    active.remove((p, c))
        still = []
        for p in going:
            best = None
            for c in range(n):
                spent[p] += len(own[p, c])
                text = TOY.decode(chains[p] + own[p, c])
                rank = (want(TOY.decode(own[p, c]), text, own[p, c][-1] == EOS), np.mean(logps[p, c]))
                if best is None or rank > best[0]:
                    best = (rank, c)
            happened["lost all" if not best[0][0] else "complete"] += 1
            happened["another than the first"] += best[1] > 0
            chains[p] += own[p, best[1]]
            if chains[p][-1] != EOS and len(chains[p]) < BUDGET:
                still.append(p)
        happened["went on without some"] += 0 < len(still) < len(going)
        going = still
        step += 1
    happened["steps"] = step
    return chains, spent, happened


WAYS = {
    "best_of_n": ("think", [""], [lambda own, text, ended: chat.parse(text).answer != ""]),
    "sentence_beam": ("think", [" ."], [lambda own, text, ended: ended or " ." in own]),
    "stage_beam": ("think", ["</think>", ""], [lambda own, text, ended: "</think>" in own,
                                               lambda own, text, ended: "</answer>" in own]),
    "stage_beam of four": ("llava_cot", ["</SUMMARY>", "</CAPTION>", "</REASONING>", ""],
                           [lambda own, text, ended: "</SUMMARY>" in own, lambda own, text, ended: "</CAPTION>" in own,
                            lambda own, text, ended: "</REASONING>" in own,
                            lambda own, text, ended: "</CONCLUSION>" in own]),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_search_equals_a_slow_loop_over_single_sequences(way, monkeypatch):
    # Rows that leave the batch would only change which number a row draws.
    monkeypatch.setattr(generation, "_worth_dropping", lambda alive: None)
    method, ends, wants = WAYS[way]
    vlm = model(often=2.0)
    happened = Counter()
    for seed in range(2):
        chains, spent, what = slow_search(vlm, SAMPLES, method, 3, seed, ends, wants, 0.9)
        found, _ = searched(Search(way.split()[0], 3), vlm, method=method, seed=seed, temperature=0.9)
        assert [one.text for one in found] == [TOY.decode(chain) for chain in chains]
        assert [one.tokens for one in found] == [len(chain) for chain in chains]
        assert [one.cut for one in found] == [chain[-1] != EOS for chain in chains]
        assert [one.cost.sampled for one in found] == spent
        happened += what
    assert happened["another than the first"] > 2 and happened["lost all"] and happened["complete"] > 2
    if way != "best_of_n":
        assert happened["went on without some"]


@torch.no_grad()
@pytest.mark.parametrize("method", module.SEARCHES)
def test_one_candidate_is_plain_sampling(method):
    vlm = model(often=2.0)
    plain = evaluation.Prompting("think", "brief", BUDGET)
    searching = evaluation.Prompting("think", "brief", BUDGET, search=Search(method, 1))
    wanted = evaluation.complete(vlm, TOY, SAMPLES * 2, plain, 4, temperature=0.8, top_k=20, seed=5)
    found = evaluation.complete(vlm, TOY, SAMPLES * 2, searching, 4, temperature=0.8, top_k=20, seed=5)
    assert found.texts == wanted.texts and len(set(map(str, wanted.texts))) > 4
    assert found.lengths.tolist() == found.spent.tolist() == wanted.lengths.tolist()
    assert found.cut.tolist() == wanted.cut.tolist()


@torch.no_grad()
def test_best_of_n_with_the_oracle_is_right_exactly_where_one_of_n_is():
    vlm = model(often=2.0)
    samples = SAMPLES * 6
    plain = evaluation.Prompting("think", "brief", BUDGET)
    drawn = evaluation.complete(vlm, TOY, samples, plain, 1000, group=3, temperature=1.0, seed=2)
    right = np.array(evaluation.judge(samples, drawn.texts)["right"])
    searching = evaluation.Prompting("think", "brief", BUDGET, search=Search("best_of_n", 3, "oracle"))
    found = evaluation.complete(vlm, TOY, samples, searching, 1000, temperature=1.0, seed=2)
    assert [row[0] for row in evaluation.judge(samples, found.texts)["right"]] == right.max(1).tolist()
    assert right.mean() < right.max(1).mean() < 1
    assert found.spent[:, 0].tolist() == drawn.lengths.sum(1).tolist()


# ---------------------------------------------------------------- candidates by hand

def candidate(text, logp=0.0, complete=True, prompt=0):
    return Candidate(prompt, [], text, logp, complete)


class FakeRun:
    """What scorers read of a run."""
    samples = [Sample(answer="two"), Sample(answer="5", unit="cm")]


def voted(*answers, prompt=0):
    """The place of the answer that a majority takes; "" for a candidate without one."""
    [step] = module.whole_answer(Search("majority"), "think")
    group = []
    for answer in answers:
        text = f"<answer> {answer}</answer>" if answer else "so it is"
        group.append(candidate(text, complete=step.complete(text, text, True), prompt=prompt))
    return choose(FakeRun, [group], module.most_common)[0]


@pytest.mark.parametrize("answers, place", [
    (("3", "2.0", "2"), 1),                             # 2.0 and 2 are one answer
    (("b", "a", "a", "B."), 0),                         # a tie: the one seen first
    (("", "", "a", "", "b", "b"), 4),                   # those without an answer have no vote
    (("", "...", "a"), 2),                              # full stops are no answer
    (("", "", ""), 0)])
def test_a_majority_takes_the_commonest_answer(answers, place):
    assert voted(*answers) == place


def test_a_majority_counts_an_answer_with_its_unit_as_the_number():
    assert voted("4", "5 cm", "5", prompt=1) == 1
    assert voted("4", "5 cm", "5", prompt=0) == 0


def test_candidates_without_an_end_tag_lose_unless_all_lack_it():
    first = [candidate("a", -1.0, False), candidate("b", -3.0), candidate("c", -2.0)]
    second = [candidate("a", -3.0, False), candidate("b", -2.0, False), candidate("c", -2.0, False)]
    assert choose(FakeRun, [first, second], module.SCORERS["logp"]) == [2, 1]


def test_the_oracle_takes_the_first_right_answer_and_the_first_of_all_without_one():
    groups = [[candidate(f"<answer> {answer}</answer>") for answer in ("one", "two", "Two")],
              [candidate("<answer> 4</answer>", prompt=1), candidate("<answer> 6</answer>", prompt=1)]]
    assert choose(FakeRun, groups, module.SCORERS["oracle"]) == [1, 0]


@pytest.mark.parametrize("method, tags", [
    ("llava_cot", ("</SUMMARY>", "</CAPTION>", "</REASONING>", "</CONCLUSION>")), ("think", ("</think>", "</answer>")),
    ("asked", ("</think>", "</answer>")), ("direct", ("</answer>",))])
def test_stages_end_at_the_tags_of_the_form_in_use(method, tags):
    steps = module.stages(Search("stage_beam"), method)
    assert [step.stop for step in steps] == [*tags[:-1], ""]        # the last goes on to the end of the answer
    for step, tag in zip(steps, tags):
        assert step.complete(f"so{tag}", "", False) and not step.complete("so", f"so{tag}", True)


# ---------------------------------------------------------------- whole searches by hand, with real tokenizers

class Script:
    """Stands for kernels.sample: draws given texts. calls: of each step of the search, P' lists of n (text, ended)."""

    def __init__(self, tokenizer, calls):
        self.grids = []
        for call in calls:
            rows = [[tokenizer.encode(text) + [tokenizer.eos_id] * ended for text, ended in group] for group in call]
            longest = max(len(row) for group in rows for row in group)
            for t in range(longest):
                self.grids.append([[row[t] if t < len(row) else 5 for row in group] for group in rows])
        self.lengths = [[[len(tokenizer.encode(text)) + ended for text, ended in group] for group in call]
                        for call in calls]

    def __call__(self, logits, *_, **__):
        tokens = torch.tensor(self.grids.pop(0))
        assert tokens.shape == logits.shape[:-1]
        return tokens, torch.zeros(tokens.shape, dtype=torch.float64), None


# By a reward that counts words, the long one without its tag would win.
SCRIPT = [
    [[(" so</think>", False), (" it is so</think>", False), (" on and on and on", True)],
     [(" no end", True), (" no end either", True), (" nor", True)]],
    [[("<answer> two", True), ("<answer> two</answer>", True), ("<answer></answer>", True)]],
]


def real_tokenizers():
    pytest.importorskip("tokenizers")
    return importlib.import_module("test_templates")


@torch.no_grad()
@pytest.mark.parametrize("name, template", [("VICUNA", "vicuna_v1"), ("VICUNA", "llama_2"), ("QWEN", "chatml"),
                                            ("OWN", "brief")])
def test_tags_of_several_tokens_end_a_stage(name, template, monkeypatch, tmp_path):
    tokenizer = getattr(real_tokenizers(), name)
    vlm = make_vlm(llm=dict(vocab=len(tokenizer)))
    script = Script(tokenizer, SCRIPT)
    monkeypatch.setattr(generation, "sample", script)
    monkeypatch.setattr(generation, "_worth_dropping", lambda alive: None)
    (tmp_path / "mine.py").write_text("def words(sample, text):\n    return len(text.split())\n")
    sampler = Sampler(vlm)
    with open_scorer(f"{tmp_path}/mine.py:words") as pick:
        found = find(sampler, tokenizer, SAMPLES[:2], Search("stage_beam", 3), "think", template, 60, pick)
    assert not script.grids                                         # every step ended where its tag does
    assert found[0].text.replace("> <", "><").strip() == "it is so</think><answer> two</answer>"
    assert found[1].text.strip() == "no end either"
    one, two = script.lengths
    assert [each.cost.sampled for each in found] == [sum(one[0]) + sum(two[0]), sum(one[1])]
    assert [each.tokens for each in found] == [one[0][1] + two[0][1], one[1][1]]
    assert [each.cost.judged for each in found] == [0, 0]
    length = [len(chat.encode(sample, tokenizer, PATCHES, "think", template)[0]) for sample in SAMPLES[:2]]
    assert [each.cost.prefilled for each in found] == length
    cost = total(found, sampler.meter)
    assert (cost.sampled, cost.prefilled, cost.flops) == (sum(map(sum, [*one, *two])), sum(length), sampler.meter.total)
    assert cost.spent == cost.sampled


# ---------------------------------------------------------------- the model as its own judge

def slow_margin(vlm, sample, question):
    """log p("first") - log p("second") behind a question about a sample, each a sequence of its own."""
    asked = Sample(images=sample.images, turns=sample.turns, question=question)
    values = []
    for word in (" first", " second"):
        ids, taught, images = chat.encode(asked, TOY, PATCHES, "direct", "brief", word)
        ids, taught = ids[:-1], taught[:-1]                     # without EOS
        batch = to_batch([(ids, taught, images)])
        values.append(float(vlm(batch).logp.sum()))
    return values[0] - values[1]


def judging_run(vlm, samples):
    batch = vlm.encode(module.prompts(vlm, TOY, samples, "think", "brief"))
    costs = [module.Cost() for _ in samples]
    return module.Run(Sampler(vlm), TOY, samples, batch, "brief", [[] for _ in samples], costs)


@torch.no_grad()
def test_the_judge_compares_log_probs_in_both_orders():
    vlm = model()
    run = judging_run(vlm, SAMPLES)
    pairs = [(candidate(" a<image>", prompt=2), candidate(" bb", prompt=2)), (candidate(" same"), candidate(" same")),
             (candidate(" x", prompt=1), candidate(" yyy", prompt=1))]
    margins = module.prefers(run, pairs)
    for (one, other), margin in zip(pairs, margins):
        sample = SAMPLES[one.prompt]
        texts = [each.text.replace("<image>", "< image>").strip() for each in (one, other)]
        there, back = [slow_margin(vlm, sample, f"{sample.question} {a} or {b} first or second ?")
                       for a, b in (texts, texts[::-1])]
        assert abs(margin - (there - back)) < 1e-9
    assert margins[1] == 0 and abs(margins[0]) > 1e-3 < abs(margins[2])
    flipped = module.prefers(run, [(other, one) for one, other in pairs])
    assert np.allclose(flipped, [-margin for margin in margins], atol=1e-9)
    # By hand: " a< image> or bb first or second ?" (without its first space: 33 letters behind one), " first" and
    # " second" (6 + 7 letters); twice for the orders, twice for the two calls. The prompt of "think" is longer by its
    # " think ." than the judge's question is, so that it takes 8 letters off.
    own = int(run.batch.length[2])
    assert run.costs[2].prefilled == 4 * own
    assert run.costs[2].judged == 4 * (len(" a< image> or bb first or second ?") - len(" think .") + 13)
    assert run.costs[3] == module.Cost()


def test_a_knockout_meets_pair_by_pair_and_a_tie_keeps_the_earlier(monkeypatch):
    asked = []

    def by_number(run, pairs):
        asked.append([(one.text, other.text) for one, other in pairs])
        return [float(one.text[0]) - float(other.text[0]) for one, other in pairs]

    monkeypatch.setattr(module, "prefers", by_number)
    groups = [[candidate(text) for text in texts] for texts in (["1", "3a", "3b", "2", "3c"], ["5"], ["2", "4"])]
    assert module.knockout(None, groups) == [1, 0, 1]
    assert asked == [[("1", "3a"), ("3b", "2"), ("2", "4")], [("3a", "3b")], [("3a", "3c")]]


@torch.no_grad()
@pytest.mark.parametrize("method", ["best_of_n", "stage_beam"])
def test_the_meter_counts_the_flops_of_a_search_that_judges_itself(method):
    vlm = model(torch.float32, often=2.0)
    done = []
    executed = counted(lambda: done.append(searched(Search(method, 3, "self"), vlm)))
    found, sampler = done[0]
    assert executed == total(found, sampler.meter).flops > 0
    assert sum(one.cost.judged > 0 for one in found) > 1


# ---------------------------------------------------------------- the sampler's part

@torch.no_grad()
def test_compacting_frees_the_holes_and_changes_no_state():
    vlm = model()
    rows = odd_prompts()
    ids = random_completions(len(rows), 2, 6, seed=7)
    sampler = Sampler(vlm).prefill(to_batch(rows), 2, 6)
    sampler.extend(ids[..., :3], torch.tensor([[[1, 0, 1], [0, 1, 0]]]).bool().expand(len(rows), -1, -1))
    assert sampler.used == 3
    sampler.compact()
    assert sampler.used == 2
    sampler.extend(ids[..., 3:4])
    assert sampler.used == 3
    for p in range(len(rows)):
        assert difference(sampler.state[p, 0], last_state(vlm, p, ids[p, 0, [0, 2, 3]])) < 1e-12
        assert difference(sampler.state[p, 1], last_state(vlm, p, ids[p, 1, [1, 3]])) < 1e-12


@torch.no_grad()
def test_a_row_takes_as_many_tokens_as_its_own_limit_and_no_more():
    vlm = model()
    limit = torch.tensor([[1, 9, 4]] * 5)
    options = dict(temperature=0, banned=(PAD, BOS, EOS))
    done = Sampler(vlm).prefill(to_batch(odd_prompts()), 3, 9).decode(9, EOS, limit=limit, **options)
    free = Sampler(vlm).prefill(to_batch(odd_prompts()), 3, 9).decode(9, EOS, **options)
    assert torch.equal(done.mask.sum(-1), limit)
    assert torch.equal(done.ids[done.mask], free.ids[done.mask])


# ---------------------------------------------------------------- in eval.py

def test_equal_tokens_says_how_many_plain_answers_cost_as_much():
    assert equal_tokens([90, 110], [[20, 30], [30, 20]]) == 4
    assert equal_tokens([99], [[25]]) == 3                          # never more than the search spent
    assert equal_tokens([10], [[25]]) == 1


def test_a_row_with_a_search_is_found_once_under_the_sampled_decoding(capsys):
    vlm = model(often=2.0)
    options = evaluation.JudgeOptions(eval_greedy=4, eval_sampled=3, eval_samples=2)
    prompting = evaluation.Prompting("think", "brief", BUDGET, search=Search("stage_beam", 3, "logp"))
    scores = evaluation.evaluate(vlm, TOY, SAMPLES, prompting, options)
    assert list(scores) == ["t1"]
    raw = scores["t1"]
    assert np.shape(raw["right"]) == np.shape(raw["spent"]) == (3, 1)
    assert (np.array(raw["spent"]) > np.array(raw["length"])).all()
    assert json.loads(json.dumps(raw)) == raw
    evaluation.print_tables(vlm, TOY, "rl", {"id": SAMPLES}, prompting, options, dict(seed=0))
    said = capsys.readouterr().out
    price = equal_tokens(raw["spent"], raw["length"])
    assert f"id: {np.mean(raw['spent']):.1f} tokens sampled and judged for an answer of" in said
    assert f"the price of {price} plain ones as long" in said
    plain = evaluation.evaluate(vlm, TOY, SAMPLES, evaluation.Prompting("think", "brief", BUDGET), options)
    assert list(plain) == ["greedy", "t1"] and "spent" not in plain["t1"]


def test_a_contender_of_a_comparison_may_search(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "load_vlm", lambda *_: (model(), TOY, dict(method="think")))

    def evaluate(vlm, tok, samples, prompting, options, note):
        seen.append(prompting)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    import train
    search = Search("best_of_n", 4, "logp")
    evaluation.scores_of(evaluation.Contender("x.pt", search=search), train.Config(), {"id": SAMPLES})
    assert [prompting.search for prompting in seen] == [search]


def test_labels_name_method_candidates_and_scorer():
    assert Search("stage_beam", 4, "logp").label == "stage_beam[4,logp]"
    assert Search("best_of_n", 2, "oracle").label == "best_of_n[2,oracle]"
    assert Search("sentence_beam", 4, "some/mine.py:brevity").label == "sentence_beam[4,brevity]"
    assert Search("majority", 8).label == "majority[8]"


def test_a_question_can_be_asked_with_a_search(monkeypatch, capsys):
    vlm = model(often=2.0)
    state = dict(stage="rl", method="think", config=dict(template="brief", max_new=BUDGET, data="scenes"))
    monkeypatch.setattr(evaluation, "load_any", lambda options: (vlm, TOY, state))
    evaluation.main(["--checkpoint=x.pt", "--ask=what", "--search=best_of_n", "--search-n=3", "--eval-temperature=0.9"])
    text, cost = capsys.readouterr().out.splitlines()
    [one], _ = searched(Search("best_of_n", 3), vlm, [Sample(question="what")], temperature=0.9)
    assert text == one.text and cost == f"({one.cost.sampled} tokens sampled and judged for these {one.tokens})"


@pytest.mark.parametrize("flags, said", [
    (["--search=guess"], "--search=guess must be one of majority, best_of_n, sentence_beam, stage_beam"),
    (["--search=best_of_n", "--search-n=0"], "--search-n=0 must lie in [1, 10000]"),
    (["--search=best_of_n", "--scorer=taste"], "--scorer=taste must be one of self, logp, oracle, or FILE.py:NAME"),
    (["--search=best_of_n", "--scorer=no.py:such"], "--scorer=no.py:such: the file 'no.py' does not exist"),
    (["--scorer=self"], "--scorer=self has no effect with --search=; expected a --search that chooses by a scorer"),
    (["--search=majority", "--scorer=self"], "--scorer=self has no effect with --search=majority; expected a --search"),
    (["--search=sentence_beam", "--sentence-end="], "--sentence-end= must hold the text that ends a sentence"),
    (["--search=stage_beam", "--prompting=ccot"], "--prompting=ccot and --search=stage_beam do not go together; expec"),
    (["--search=best_of_n", "--scorer=oracle", "--ask=what ?"], "--scorer=oracle needs the gold answer, which --ask")])
def test_bad_flags_are_one_sentence(flags, said):
    with pytest.raises(ValueError) as caught:
        evaluation.main(["--checkpoint=x.pt", *flags])
    assert str(caught.value).startswith(said) and str(caught.value).isprintable()


def test_what_python_callers_get_wrong_is_one_sentence():
    with pytest.raises(ValueError, match="search=best_of_n.2,logp. and a prompting in stages do not go together"):
        evaluation.Prompting("think", "brief", 9, stages=("a stage",), search=Search("best_of_n", 2))
    with pytest.raises(ValueError, match="temperature=0.0 makes all 2 candidates of a search the same"):
        searched(Search("best_of_n", 2), temperature=0.0)
    assert SearchOptions().chosen is None
    assert SearchOptions(search="best_of_n", search_n=2).chosen == Search("best_of_n", 2, "logp", " .")
