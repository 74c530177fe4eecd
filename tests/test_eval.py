"""eval.py from a checkpoint to its table and its answers."""
import json

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import train
from model.runs import checkpoint
from rl.report import curves


def test_the_commonest_answer_is_judged_by_the_checker_on_the_whole_split():
    # Five prompts: 1 and 1.0 are one answer, and so is 1.2 within its tolerance; 2 is right for two of them.
    golds = [("1", 0), ("2", 0), ("1.0", 0), ("2", 0), ("1.2", 0.5)]
    samples = [evaluation.Sample(question="?", answer=gold, tolerance=tolerance) for gold, tolerance in golds]
    assert evaluation.commonest_answer(samples) == ("1", 0.6)
    assert "always answering '1', the commonest answer of val, is right with 0.600\n" == (
        evaluation.without_looking("val", samples))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of clip, align and cot, a step each."""
    out = tmp_path_factory.mktemp("eval") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "curves", lambda *_: b"none")
        train.main(["--preset=tiny", "--patch=24", "--clip-steps=1", "--align-steps=1", "--sft-steps=0",
                    "--cot-steps=1", "--pictures=8", "--traces=8", "--clip-batch=4", "--batch=4", "--eval-greedy=3",
                    "--eval-sampled=2", "--stage=clip,align,cot", f"--out={out}"])
    return out


def test_eval_gives_the_numbers_of_the_run_itself(run, capsys):
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--eval-greedy=3", "--eval-sampled=2", "--eval-samples=2"])
    said = capsys.readouterr().out
    found = {(r["split"], r["decoding"], r["metric"]): r for r in json.loads((run / "results.json").read_text())
             if r["method"] == "cot"}
    for title, decoding, metric in (("Accuracy, greedy", "greedy", "accuracy"), ("Accuracy, T = 1", "t1", "accuracy"),
                                    ("length, T = 1", "t1", "length")):
        [part] = [part for part in said.split("\n\n") if part.startswith(title)]
        splits, line = (row.split() for row in part.splitlines()[1:3])
        assert splits == ["id", "crowded", "pairs", "walk3", "walk4"] and line[0] == "cot"
        numbers = [word for word in line[1:] if "[" not in word and "]" not in word]
        form = "{:.1f}" if metric == "length" else "{:.3f}"
        assert numbers == [form.format(found[split, decoding, metric]["value"]) for split in splits]


def test_eval_asks_the_prompts_that_the_run_asked(run, monkeypatch):
    asked, evaluate = {}, evaluation.evaluate

    def spy(vlm, tokenizer, samples, *options):
        asked[samples[0].split] = [evaluation.chat.normalise(sample.answer) for sample in samples[:3]]
        return evaluate(vlm, tokenizer, samples, *options)

    monkeypatch.setattr(evaluation, "evaluate", spy)
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--eval-greedy=3", "--eval-sampled=2", "--eval-samples=2"])
    scores = json.loads((run / "scores.json").read_text())["cot"]
    assert asked == {split: of["greedy"]["gold"] for split, of in scores.items()}


def test_a_checkpoint_of_an_earlier_version_loads_and_goes_on(run, tmp_path, capsys):
    state = checkpoint.load(run / "cot.pt")
    newer = ("teacher", "queries", "top_k", "top_p", "eval_temperature", "eval_top_k", "eval_top_p", "flags")
    old = {name: value for name, value in state["config"].items() if name not in newer}
    del state["vlm_config"]["queries"]
    checkpoint.save(tmp_path / "old.pt", dict(state, config=old | dict(an_option_that_is_gone=1)))
    few = ["--eval-greedy=3", "--eval-sampled=2", "--eval-samples=2"]
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", *few])
    wanted = capsys.readouterr().out
    evaluation.main([f"--checkpoint={tmp_path / 'old.pt'}", *few])
    assert capsys.readouterr().out == wanted
    train.main(["--preset=tiny", "--stage=rl", "--rl-steps=1", f"--init={tmp_path / 'old.pt'}", *few,
                f"--out={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "rl.pt").exists()


def test_the_first_validation_pictures_are_of_every_class(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(80):
        folder = tmp_path / ("train", "val")[n % 2] / "abcd"[n // 2 % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    splits, _ = evaluation.real_data(f"images:{tmp_path}", 20)
    assert {sample.answer for sample in splits["val"][:16]} == set("abcd")


def test_the_sets_test_and_val_hold_other_prompts():
    one, two = (evaluation.scenes.load("id", 50, evaluation.scenes.TEST_SEED[name]) for name in ("test", "val"))
    assert not {sample.images[0].tobytes() for sample in one} & {sample.images[0].tobytes() for sample in two}


def test_ask_answers_about_a_picture_and_without_one(run, tmp_path, capsys):
    Image.new("RGB", (50, 60), "red").save(tmp_path / "a.png")
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--ask=what is at b2 ?", f"--image={tmp_path / 'a.png'}"])
    seen = capsys.readouterr().out
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--ask=what is at b2 ?", f"--image={tmp_path / 'a.png'}"])
    assert capsys.readouterr().out == seen and seen.strip() and "Accuracy" not in seen
    vlm, tokenizer, state = evaluation.load_vlm(run / "cot.pt")
    prompting = evaluation.Prompting(method="think", template="brief", max_new=16)
    pictures = (np.asarray(Image.new("RGB", (50, 60), "red")),)
    answers = evaluation.complete(vlm, tokenizer, [evaluation.Sample(images=pictures, question="what is at b2 ?")],
                                  prompting, rows=8)
    assert seen == answers.texts[0][0] + "\n"
    evaluation.main([f"--checkpoint={run / 'cot.pt'}", "--ask=what is at b2 ?", "--max-new=3"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("flags, said", [
    (["--checkpoint="], "either --checkpoint= must name a stage's .pt file or --llava="),
    (["--chekpoint=x"], "unknown option --chekpoint; did you mean --checkpoint?"),
    (["--method=guess"], "--method=guess must be one of direct, think, asked"),
    (["--template=x"], "--template=x must be one of brief, vicuna_v1"),
    (["--set=train"], "--set=train must be one of test, val"),
    (["--splits=id,far"], "--splits=id,far: 'far' must be one of id, crowded, pairs, walk3, walk4"),
    (["--eval-samples=0"], "--eval-samples=0 must lie in [1, 10000]"),
    (["--max-new=-1"], "--max-new=-1 must lie in [0, 131072]"),
    (["--ask=what ?", "--image=/no/such.png"], "image '/no/such.png' does not exist"),
    (["--device=tpu"], "--device=tpu is not available here"),
    (["--data=nonsense:x"], "--data=nonsense:x must be scenes, monitors, images:DIR, torchvision:NAME@DIR, jsonl:FILE, "
     "records:FILE or llava:FILE"),
    (["--data=llava:x"], "--data=llava:x holds conversations, which nothing can check; expected images:DIR or jsonl:"),
    (["--checkpoint=/no/such.pt"], "checkpoint '/no/such.pt' does not exist")])
def test_what_eval_does_not_understand_is_one_sentence(run, flags, said):
    with pytest.raises(ValueError) as caught:
        evaluation.main([f"--checkpoint={run / 'cot.pt'}", *flags])
    assert str(caught.value).startswith(said) and str(caught.value).isprintable()
