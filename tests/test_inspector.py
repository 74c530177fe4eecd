"""inspect.html in a headless Chromium: what it shows, its filters and keys; and that hostile texts do nothing to it."""
import json
import re
from types import SimpleNamespace

import pytest

import browser
import eval as evaluation
from data.sample import Sample
from model.runs.folder import write_json
from rl.recorder import expanded
from rl.report.inspector import (QUANTITIES, InspectedRun, answer_tokens, inspector_page, read_rollouts, read_text,
                                 sample_of)
from rl.report.web import STYLE
from test_recorder import FILE, Step, page_data
from tiny import picture

needs_chromium = pytest.mark.skipif(browser.PATH is None, reason=browser.MISSING)
HOSTILE = {
    "script": "</script><script>window.hacked = 1</script>", "comment": "<!--<script>", "image": "<img src=x onerror="
    "'window.hacked = 1'>", "rtl": "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd", "word": "w" * 100_000,
    "emoji": "\U0001f469\u200d\U0001f467 \U0001f600", "surrogate": "\ud800 half", "nul": "a\x00b\x1b[31m",
    "template": "$title ${data} $&",
}


def completion(tokens, **more):
    """A completion as rollouts.jsonl has it. Values count up from 0 in tenths below 0."""
    tokens = list(tokens)
    count = len(tokens)
    return dict(text="".join(tokens), ended=True, reward=1.0, right=True, fault="", agrees=True,
                parts=[["correctness", 1, 1, 1, "the gold answer"]], ids=list(range(count)), tokens=tokens,
                sampled=[-0.1 * at for at in range(count)]) | more


def line(step=0, question="what ?", completions=(), **more):
    """A group as rollouts.jsonl has it."""
    return dict(stage="rl", method="grpo", step=step, every=1, role="best", prompt=question, id="s", question=question,
                gold="one", turns=[], source="scenes/at", pictures=[], paths=[], flat=False, updated=True,
                completions=list(completions)) | more


def many(groups=1250):
    """10,000 completions: of each thousand groups some for every filter."""
    lines = []
    for n in range(groups):
        members = []
        for g in range(8):
            text = ["<think>", f" look {n} {g}", "</think>", "<answer>", " one" if g % 2 else " two", "</answer>", ""]
            members.append(completion(
                text, right=n % 7 != 0 and g % 2 == 1, ended=not (n % 11 == 0 and g == 3),
                agrees=not (n % 13 == 0 and g == 2), clipped=[0, 0, int(n % 17 == 0), 0, 0, 0, 0],
                advantage=1.0 - g, logp=[-0.2] * 7, ratio=[1.0, 0.5, 2.0, 1.0, 1.0, 1.0, None], entropy=0.5))
        if n % 19 == 0:
            members[5]["text"] = members[5]["text"].replace("look", "Wait")
            members[5]["tokens"][1] = members[5]["tokens"][1].replace("look", "Wait")
        lines.append(line(n, f"what is at {n % 100} ?", members, flat=n % 5 == 0, role=("best", "worst")[n % 2],
                          method=("grpo", "ppo")[n % 3 == 0]))
    return lines


WANTED = {
    "flat": lambda n: n % 5 == 0, "wrong": lambda n: n % 7 == 0, "cut": lambda n: n % 11 == 0,
    "disagree": lambda n: n % 13 == 0, "clipped": lambda n: n % 17 == 0,
}


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "inspect.html"
    path.write_bytes(inspector_page("Large", [InspectedRun("a", many())]))
    return path


@pytest.fixture
def page(chromium, large):
    """The page of 10,000 completions; at its end it must have had nothing to complain about."""
    opened = chromium.open(large)
    yield opened
    assert opened.said == []
    opened.close()


def show(chromium, folder, runs, theme="light"):
    """A page of these runs, opened."""
    path = folder / "inspect.html"
    path.write_bytes(inspector_page("Some", runs))
    return chromium.open(path, theme)


ROWS_OF_VALUES = ("[...document.querySelectorAll('#values tr')].map("
                  "(row) => [...row.cells].map((cell) => cell.textContent))")


def count(page):
    """How many groups the list has."""
    return page.run("shown.length")


# ---------------------------------------------------------------- ten thousand completions

@needs_chromium
def test_the_list_has_all_groups_and_only_the_visible_rows(page):
    assert page.run("byId('count').textContent") == "1250 of 1250 groups, 10000 completions"
    most = 0
    for share in (0, 0.1, 0.5, 0.77, 1):
        page.run(f"byId('list').scrollTop = {share} * byId('list').scrollHeight; 1")
        page.frame()
        most = max(most, page.run("document.querySelectorAll('.row').length"))
    assert 10 < most < 60
    last = page.run("[...document.querySelectorAll('.row')].map((row) => row.group.number).sort((a, b) => b - a)[0]")
    assert last == 1249
    page.run("byId('list').scrollTop = 52 * 600; 1")
    page.frame()
    box = page.run("document.elementFromPoint(50, byId('list').getBoundingClientRect().top + 10).closest('.row')"
                   ".group.number")
    assert box == 600


@needs_chromium
@pytest.mark.parametrize("name", WANTED)
def test_each_filter_leaves_the_groups_that_it_names(page, name):
    page.run(f"byId('{name}').click()")
    assert count(page) == sum(map(WANTED[name], range(1250))) > 50
    assert page.run("shown.includes(chosen) && rows.size > 0")
    page.run(f"byId('{name}').click()")
    assert count(page) == 1250


@needs_chromium
def test_filters_together_leave_what_all_of_them_name(page):
    page.run("byId('flat').click(); byId('wrong').click()")
    assert count(page) == sum(WANTED["flat"](n) and WANTED["wrong"](n) for n in range(1250))


@needs_chromium
def test_run_stage_and_role_are_chosen(page):
    page.run("byId('role').value = 'worst'; byId('role').onchange()")
    assert count(page) == 625
    page.run("byId('method').value = 'ppo'; byId('method').onchange()")
    assert count(page) == sum(n % 2 == 1 and n % 3 == 0 for n in range(1250))
    page.run("byId('run').value = '0'; byId('run').onchange()")
    assert count(page) == sum(n % 2 == 1 and n % 3 == 0 for n in range(1250))


@needs_chromium
@pytest.mark.parametrize("field, text, wanted", [
    ("word", "wait", sum(n % 19 == 0 for n in range(1250))), ("word", "wai", 0), ("word", "loo", 0), ("word", "ook", 0),
    ("word", "(", 0),
    ("word", "look", 1250), ("search", "WAIT", sum(n % 19 == 0 for n in range(1250))), ("search", "look 1249 7", 1),
    ("search", "step 1249", 1), ("search", "at 33 ?", sum(n % 100 == 33 for n in range(1250))),
    ("search", "nowhere", 0)])
def test_a_word_and_the_search(page, field, text, wanted):
    page.run(f"byId('{field}').value = {json.dumps(text)}; byId('{field}').oninput()")
    assert count(page) == wanted
    hits = page.run("document.querySelectorAll('.card.hit').length")
    assert (hits > 0) == (wanted > 0 and not text.startswith(("at", "step")))       # those stand in no completion
    assert (page.run("byId('detail').textContent") == "No group passes the filters.") == (wanted == 0)
    page.run(f"byId('{field}').value = ''; byId('{field}').oninput()")
    assert page.run("chosen !== null") and count(page) == 1250


@needs_chromium
def test_the_same_prompt_across_steps_is_one_key_away(page):
    assert page.run("chosen.step") == 0
    for key, step in (("n", 100), ("n", 200), ("p", 100), ("p", 0), ("p", 0)):
        page.press(key)
        assert page.run("chosen.step") == step
    assert page.run("document.querySelectorAll('.elsewhere button').length") == 13
    page.press("a")
    assert page.run("[...document.querySelectorAll('.group h2')].map((h) => /step (\\d+)/.exec(h.textContent)[1])") == [
        str(step) for step in range(0, 1250, 100)]


@needs_chromium
def test_keys_move_through_groups_colours_tokens(page):
    page.press("j")
    page.press("j")
    page.press("k")
    assert page.run("chosen.number") == 1 and page.run("document.activeElement.id") == "list"
    before = page.run("byId('colour').value")
    page.press("c")
    assert page.run("byId('colour').value") != before
    page.press("C")
    assert page.run("byId('colour').value") == before == "sampled"
    page.run("document.querySelectorAll('.card')[1].focus()")
    page.press("]")
    page.press("]")
    assert page.run("document.querySelector('.here').at") == 1
    assert "token 2 of 7" in page.run("byId('values').textContent")
    page.press("/")
    page.press("k")                     # into the field, and in every text: no group back
    assert page.run("document.activeElement.id") == "search" and page.run("chosen.number") == 1
    page.press("Escape")
    page.press("?")
    assert page.run("byId('keys').open")


@needs_chromium
def test_values_of_a_token_are_shown_under_the_mouse(page):
    page.hover(".card .text span:nth-child(3)")
    page.wait("!byId('values').hidden")
    rows = page.run(ROWS_OF_VALUES)
    assert ["log-prob at sampling", "-0.2"] in rows and ["ratio", "2"] in rows and ["entropy", "0.5"] in rows
    assert not any("reference" in label for label, _ in rows)           # absent where the loss had none
    page.hover(".card .text span:nth-child(7)")
    page.wait("document.querySelector('.here').at === 6")
    assert ["ratio", "not finite"] in page.run(ROWS_OF_VALUES)


@needs_chromium
def test_tokens_are_coloured_by_each_quantity_that_is_there_and_by_no_other(page):
    offered = page.run("[...byId('colour').options].map((option) => option.value)")
    assert offered == ["", "sampled", "logp", "moved", "entropy", "ratio", "clipped", "advantage"]
    colours = {}
    for name in offered:
        page.run(f"byId('colour').value = '{name}'; byId('colour').onchange()")
        colours[name] = page.run("[...document.querySelectorAll('.card')][7].querySelectorAll('.text span')[2].style"
                                 ".background")
    assert not colours[""] and colours["ratio"].startswith("rgba(var(--plus)")
    assert colours["advantage"].startswith("rgba(var(--minus)") and colours["entropy"] and colours["sampled"]
    page.run("byId('colour').value = 'ratio'; byId('colour').onchange()")
    assert page.run("document.querySelectorAll('.text span.high').length") == 8       # a sign, not colour alone
    below_one = page.run("document.querySelectorAll('.card .text span')[1].style.background")
    assert below_one.startswith("rgba(var(--minus)")


# ---------------------------------------------------------------- hostile texts

@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_hostile_texts_are_shown_and_do_nothing(chromium, tmp_path, theme):
    lines = []
    for name, text in HOSTILE.items():
        member = completion([text, " end"], parts=[[text[:200], 1, 1, 1, text]], fault=text)
        lines.append(line(0, text, [member], gold=text, id=text[:300], source=text[:300], role=name))
    runs = [InspectedRun(HOSTILE[name], lines) for name in ("script", "rtl")]
    page = show(chromium, tmp_path, runs, theme)
    for number, text in enumerate(HOSTILE.values()):
        page.run(f"choose(data.groups[{number}]); byId('search').value = ''; 1")
        page.frame()
        seen = page.run("document.querySelector('.card .text span').textContent")
        if text.replace("\u200d", "").isprintable():
            assert seen == text
        else:
            assert "⟨U+" in seen or "\ufffd" in seen or seen.startswith("\ud800")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("byId('detail').scrollWidth <= byId('detail').clientWidth")
    assert page.run("window.hacked === undefined && document.scripts.length === 2 && document.images.length === 0")
    page.run(f"byId('search').value = {json.dumps(HOSTILE['script'])}; byId('search').oninput()")
    assert count(page) == len(HOSTILE) + 1              # all of the run of this name, and this text of the other
    assert page.said == []
    page.close()


@needs_chromium
def test_text_that_turns_its_direction_turns_nothing_else(chromium, tmp_path):
    member = completion(["\u05d0\u05d1\u05d2 ", "\u202eabc", " end"])
    page = show(chromium, tmp_path, [InspectedRun("a", [line(0, "\u202ewhat", [member])])])
    assert page.run("document.querySelector('.card .text').textContent") == "\u05d0\u05d1\u05d2 ⟨U+202E⟩abc end"
    assert page.run("document.querySelector('.question').textContent") == "⟨U+202E⟩what"
    assert page.said == []
    page.close()


def test_no_text_ends_the_block_of_data():
    lines = [line(0, text, [completion([text])]) for text in HOSTILE.values()]
    html = inspector_page(HOSTILE["script"], [InspectedRun(HOSTILE["comment"], lines)]).decode()
    assert html.count("<script") == html.count("</script>") == 2 and "<!--" not in html
    _, _, rest = html.partition('id="data">')
    data = json.loads(rest.partition("</script>")[0])
    assert [group["completions"][0]["tokens"][0] for group in data["groups"]] == [*HOSTILE.values()]


@needs_chromium
def test_a_page_without_groups_is_a_page(chromium, tmp_path):
    page = show(chromium, tmp_path, [InspectedRun("a", [])])
    assert "Nothing is recorded" in page.run("byId('detail').textContent")
    for key in "jknpac[]":
        page.press(key)
    assert page.said == []
    page.close()


@needs_chromium
def test_a_script_that_is_not_the_pages_own_is_refused_and_seen_by_these_tests(chromium, tmp_path):
    path = tmp_path / "planted.html"
    html = inspector_page("Some", [InspectedRun("a", [])])
    path.write_bytes(html.replace(b"</body>", b"<script>window.hacked = 1</script></body>"))
    page = chromium.open(path)
    assert page.run("window.hacked === undefined") and page.said
    page.close()


# ---------------------------------------------------------------- pictures, runs, reading

@needs_chromium
def test_a_picture_is_in_the_page_once_and_shows_where_the_model_looked(chromium, tmp_path):
    step = Step(tmp_path)
    step.take(0)
    step.take(1)
    lines = read_rollouts(tmp_path)
    looks = {"1": [0] * 8 + [1000], "2": [1000] + [0] * 8}
    for one in lines:
        one["look"] = dict(side=3, fit="crop")
        one["completions"][0]["look"] = looks
    html = inspector_page("Some", [InspectedRun("a", lines)])
    url = lines[0]["pictures"][0].encode()
    assert html.count(url) == 1
    page = show(chromium, tmp_path, [InspectedRun("a", lines)])
    page.wait("document.querySelector('.picture img').complete")
    page.run("document.querySelector('button[aria-pressed]').click()")
    pixels = """(() => {
        const paint = new OffscreenCanvas(3, 3).getContext("2d");
        paint.drawImage(document.querySelector(".picture canvas"), 0, 0);
        return [...paint.getImageData(0, 0, 3, 3).data];
    })()"""
    alphas = page.run(pixels)[3::4]
    assert alphas[0] == alphas[8] == 0 and set(alphas[1:8]) == {217}        # bright where it looked, else .85 dark
    page.hover(".card .text span:nth-child(2)")
    page.wait(f"{pixels}[3] === 217")
    assert page.run(pixels)[3::4] == [217] * 8 + [0]
    page.run("document.querySelector('button[aria-pressed]').click()")
    assert page.run("document.querySelectorAll('canvas').length") == 0
    assert page.said == []
    page.close()


@needs_chromium
def test_runs_and_tests_of_one_prompt_stand_side_by_side(chromium, tmp_path):
    sample = Sample(id="t", images=(picture(0),), question="what ?", answer="two")
    raw = {"text": ["<think> one</think><answer> two</answer>"], "right": [[1]], "format": [[1]], "cut": [[0]]}
    worse = {"text": ["<think> two</think><answer> one</answer>"], "right": [[0]], "cut": [[1]]}
    runs = [InspectedRun(name, [], {"id": [sample]}, {"teacher": {"id": worse}, "cot": {"id": raw}, "rl": {"id": raw}})
            for name in ("a", "b")]
    page = show(chromium, tmp_path, runs)
    labels = page.run("[...document.querySelectorAll('.card div:first-child')].map((head) => head.textContent)")
    assert labels == ["✗ wrong  teacher · cut off · thought and answer disagree",
                      "✓ right  cot · thought and answer disagree", "✓ right  rl · thought and answer disagree"]
    page.press("n")
    assert page.run("document.querySelector('.group h2').textContent").strip() == "b · tests · id"
    assert page.said == []
    page.close()


def test_the_tokens_inside_an_answer_by_hand():
    assert answer_tokens(["<think>", "a", "</think>", "<answer>", " two", " three", "</answer>", ""]) == [4, 5]
    assert answer_tokens(["<answer> t", "wo</ans", "wer>"]) == [0, 1]
    assert answer_tokens(["<REASONING>x</REASONING><CONCLUSION>", "y", "</CONCLUSION>"]) == [1]
    assert answer_tokens(["no", " answer"]) == answer_tokens(["<answer>", "open"]) == []


def test_a_line_gives_back_what_was_asked(tmp_path):
    step = Step(tmp_path)
    step.take(0)
    one = read_rollouts(tmp_path)[-1]
    sample = sample_of(one)
    assert (sample.id, sample.question, sample.answer) == (one["id"], one["question"], one["gold"])
    assert isinstance(sample.images[0], bytes)
    path = tmp_path / "picture.png"
    path.write_bytes(sample.images[0])
    assert sample_of(dict(one, paths=[str(path)])).images == (str(path),)


@pytest.mark.parametrize("flags, said", [
    (["--inspect=absent"], "--inspect=absent must be a run folder with a rollouts.jsonl, as train.py writes it in one "
     "process unless --inspect-every=0; there is none, and runs of several processes write none"),
    (["--inspect=a", "--checkpoint=b"], "--inspect=a reads run folders and takes no --checkpoint= or --llava="),
    (["--attention"], "--attention has no effect without --inspect=, the page that shows it")])
def test_what_cannot_be_inspected_is_one_sentence(flags, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        evaluation.main(flags)


def test_several_runs_and_folders_of_seeds_are_named_one_after_the_other(tmp_path, capsys):
    for name in ("one", "many/seed-0", "many/seed-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / FILE).write_text(json.dumps(line(0, "what ?", [completion(["a"])])) + "\n")
        write_json(tmp_path / name / "config.json", {})
    evaluation.main([f"--inspect={tmp_path / 'one'}", str(tmp_path / "many")])
    assert page_data(tmp_path / "one" / "inspect.html")["runs"] == ["one", "many/seed-0", "many/seed-1"]
    assert "3 groups of 3 runs," in capsys.readouterr().out
    evaluation.main([f"--inspect={tmp_path / 'many'}"])
    assert page_data(tmp_path / "many" / "inspect.html")["runs"] == ["seed-0", "seed-1"]
    evaluation.main([f"--inspect={tmp_path / 'one'}"])
    assert "1 group of 1 run," in capsys.readouterr().out


def test_cells_and_seeds_come_by_their_numbers_whenever_they_were_written(tmp_path):
    wanted = ["cell-1-seed-2", "cell-1-seed-10", "cell-2-seed-2", "cell-10-seed-2"]
    for name in (*reversed(wanted), "shared-seed-2", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).touch()
    folders = evaluation.run_folders(str(tmp_path))
    assert [folder.name for folder in folders] == wanted
    assert evaluation.run_names(folders[:2], several=False) == wanted[:2]
    same = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert evaluation.run_names(same, several=True) == ["a/run", "b/run", "c"]


def test_tests_are_counted_as_groups(tmp_path):
    samples = [Sample(question=name, answer="two") for name in "ab"]
    raw = {"text": ["<answer> two</answer>"], "right": [[1]]}
    run = InspectedRun("a", [], {"id": samples, "walk3": samples}, {"teacher": {"id": raw}, "rl": {"id": raw}})
    path = tmp_path / "inspect.html"
    path.write_bytes(inspector_page("Some", [run]))
    assert len(run.tests()) == len(page_data(path)["groups"]) == 1


def test_attention_is_spent_on_the_newest_stage_first(tmp_path, monkeypatch):
    lines = []
    for stage, count in (("old", 2), ("middle", 3), ("new", 2)):
        (tmp_path / f"{stage}.pt").touch()
        lines += [line(step, stage=stage, pictures=["p"], completions=[completion(["a"]), completion(["b"])])
                  for step in range(count)]
    loaded = []

    def load_vlm(path, device):
        loaded.append(path.stem)
        config = SimpleNamespace(image_tokens=9, projector="mlp", image_fit="crop")
        return SimpleNamespace(config=config), None, {"method": "think"}
    monkeypatch.setattr(evaluation, "load_vlm", load_vlm)
    monkeypatch.setattr(evaluation, "prompts", lambda *asked: None)
    monkeypatch.setattr(evaluation, "looked_at", lambda *asked: None)
    monkeypatch.setattr(evaluation.inspector, "sample_of", lambda line: None)
    monkeypatch.setattr(evaluation, "MOST_LOOKS", 9)
    evaluation.add_attention(tmp_path, {"template": ""}, lines, SimpleNamespace(device="cpu"))
    looked = [(one["stage"], one["step"]) for one in lines if "look" in one]
    assert looked == [("middle", 1), ("middle", 2), ("new", 0), ("new", 1)] and loaded == ["new", "middle"]


def test_every_value_that_a_run_records_is_explained(tmp_path):
    step = Step(tmp_path, algorithm="grpo", epochs=2)
    step.take(0)
    known = {quantity["name"] for quantity in QUANTITIES}
    for one in read_rollouts(tmp_path):
        of_tokens = {*one["completions"][0]} - {"text", "ended", "reward", "right", "parts", "fault", "agrees", "ids",
                                                "tokens"}
        assert of_tokens <= known
        assert all(len(expanded(one["completions"][0][name], 3)) for name in of_tokens)


# ---------------------------------------------------------------- colours

def luminance(rgb):
    """Relative luminance of WCAG 2."""
    linear = []
    for channel in rgb:
        share = channel / 255
        linear.append(share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_the_strongest_colour_of_a_token(theme):
    light, dark = STYLE.split("prefers-color-scheme: dark")
    values = dict(re.findall(r"--(\w+): ([^;}]+)", dark if theme == "dark" else light))
    values |= dict(re.findall(r"--(plus|minus): ([^;}]+)", read_text("inspector.css")))
    card, ink, quiet = (tuple(bytes.fromhex(values[name].strip()[1:])) for name in ("card", "ink", "quiet"))
    assert contrast(card, ink) > 7 and contrast(card, quiet) > 4.5
    for side in ("plus", "minus"):
        colour = tuple(map(int, values[side].split(",")))
        blended = tuple(0.62 * c + 0.38 * b for c, b in zip(colour, card))
        assert contrast(blended, ink) > 4.5
