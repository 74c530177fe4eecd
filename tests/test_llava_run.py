"""Whole runs of the LLaVA recipe: JPEG and PNG files of odd kinds, models from folders, adapters, export, resume."""
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import eval as evaluation
import train
from data import chat
from data.sample import Sample
from llava_folder import train_tokenizer, write_chat_llm, write_models, write_records
from model.hub import pretrained
from model.hub.export import export_hf
from model.lora import adapters, off
from model.runs import checkpoint
from model.runs.config import change
from model.vlm import VLM, VlmConfig
from rl.report.log import mean_log

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """records.json with its pictures, clip, llm; and what a two-stage run on them left in run and hf."""
    folder = tmp_path_factory.mktemp("llava")
    write_models(folder)
    bad = write_records(folder)
    train.main([*flags(folder), f"--out={folder / 'run'}", f"--export=hf:{folder / 'hf'}"])
    return folder, bad


def flags(folder, preset="llava-1.5-7b"):
    return [f"--preset={preset}", f"--clip={folder / 'clip'}", f"--llm={folder / 'llm'}", "--batch=4",
            "--align-batch=4", f"--data=llava:{folder / 'records.json'}", f"--image-root={folder / 'pictures'}",
            "--sft-epochs=2", "--sft-lr=1e-3", "--threads=1", "--save-every=3", "--max-length=200",
            "--template=vicuna_v1"]


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_stages_train_on_real_records_and_name_the_bad_ones(folder):
    folder, bad = folder
    log = lines(folder / "run")
    assert [sum(line["stage"] == stage and "loss" in line for line in log) for stage in ("align", "sft")] == [5, 10]
    for stage in ("align", "sft"):      # each names what it met, once
        said = [line for line in log if line["stage"] == stage and "bad_record" in line]
        assert sorted(line["name"] for line in said) == sorted(bad)
        assert all(f"id {line['name']!r}" in line["bad_record"] and line["kind"] in line["bad_record"] for line in said)
    losses = [line["loss"] for line in log if line["stage"] == "sft" and "loss" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05


def test_align_trains_w_alone_and_sft_the_decoder_too_never_clip(folder):
    folder, _ = folder
    clip, llm = pretrained.load_clip(str(folder / "clip")), pretrained.load_llm(str(folder / "llm"))[0]
    start = {f"llm.{name}": value for name, value in llm.state_dict().items()}
    start |= {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    # Loaded in the recipe's bf16, in which whatever stood still is what it was.
    start = {name: value.bfloat16() for name, value in start.items()}
    align, sft = (checkpoint.load(folder / "run" / f"{stage}.pt")["vlm"] for stage in ("align", "sft"))
    for name, value in sft.items():
        part = name.split(".")[0]
        assert part == "projector" or torch.equal(align[name], start[name])
        assert torch.equal(value, align[name]) == (part == "visual"), name


def test_the_exported_folder_is_the_trained_model_and_can_be_asked(folder, capsys):
    folder, _ = folder
    vlm, tok, _ = evaluation.load_vlm(folder / "run" / "sft.pt")
    back, tok_back = pretrained.load_llava(folder / "hf", torch.bfloat16)
    assert back.state_dict().keys() == vlm.state_dict().keys() and back.config.image_fit == "pad"
    assert all(torch.equal(value, vlm.state_dict()[name]) for name, value in back.state_dict().items())
    text = "What is <image> </s> here?  Two  spaces"
    assert tok_back.encode(text) == tok.encode(text)
    ids = chat.encode(Sample(images=("x",), question="What?"), tok, 9, "direct", "vicuna_v1")[0]
    hf = LlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    pixels, ids = torch.randn(1, 3, 24, 24).bfloat16(), torch.tensor([ids])
    with torch.no_grad():
        theirs = hf(input_ids=ids.masked_fill(ids == -200, hf.config.image_token_index), pixel_values=pixels).logits
        assert (theirs[..., :len(tok)] - vlm.logits(pixels, ids)).abs().max() < 0.05 * theirs.abs().max()
    asked = ["--ask=What colour is the square?", f"--image={folder / 'pictures' / 'turned.jpg'}", "--max-new=9"]
    evaluation.main([f"--checkpoint={folder / 'run' / 'sft.pt'}", *asked])
    first = capsys.readouterr().out
    evaluation.main([f"--llava={folder / 'hf'}", "--dtype=bfloat16", *asked])
    assert capsys.readouterr().out == first and first.strip()


def test_a_run_that_was_stopped_goes_on_bit_by_bit(folder, tmp_path, monkeypatch):
    folder, _ = folder
    save, seen = train.Run.save_progress, []

    def stop(self, stage, step, *rest):
        save(self, stage, step, *rest)
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(train.Run, "save_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags(folder), f"--out={tmp_path / 'run'}"])
    monkeypatch.undo()
    held = checkpoint.load(tmp_path / "run" / "progress.pt")["module"]
    assert any(name.startswith("llm.") for name in held) and not any(name.startswith("visual.") for name in held)
    train.main(["--resume", f"--out={tmp_path / 'run'}"])
    for stage in ("align", "sft"):
        one, other = (checkpoint.load(place / f"{stage}.pt")["vlm"] for place in (folder / "run", tmp_path / "run"))
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("more, said", [
    (["--bad-records=stop"], r"record \d+ \(id 'r(9|11|12)'\)"),
    (["--stage=rl"], "--stage=rl must be clip, align or sft"), (["--image-root=/nowhere"], "image folder '/nowhere'"),
    (["--module-lr=visual:1"], "visual"), (["--lora-targets=q_proj,x"], "x must be all or some of q_proj"),
    (["--clip=ViT-Q-99:/x"], "'ViT-Q-99' is not a model that open_clip knows"),
    (["--llm=/nowhere"], "--llm=/nowhere does not exist"), (["--clip=/nowhere"], "--clip=/nowhere does not exist"),
    (["--export=x"], "--export=x must be hf:DIR"), (["--export=hf:x", "--seeds=2"], "out beside --seeds"),
    (["--stage=clip"], "be left out where stage clip trains one"), (["--module-lr=projektor:1"], "projektor"),
    (["--moments=bfloat16"], "so slow a mean stands still"), (["--llava=/x"], "must be left out beside --llm"),
    (["--data=scenes"], "be images:DIR, jsonl:FILE or llava:FILE"), (["--dtype=float32", "--max-length=1"], "too long"),
])
def test_what_cannot_work_is_one_sentence(more, said, folder, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        train.main([*flags(folder[0]), f"--out={tmp_path / 'run'}", *more])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() or any(flag.startswith(("--bad", "--max")) for flag in more)


def test_weights_of_a_decoder_that_cannot_be_loaded_are_named_before_clip_is_trained(folder, tmp_path, monkeypatch):
    folder, _ = folder
    shutil.copytree(folder / "llm", tmp_path / "llm")
    weights = load_file(tmp_path / "llm/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "llm/model.safetensors", {"format": "pt"})
    monkeypatch.setattr(train.Run, "steps", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match="1 missing .norm.weight."):
        train.main([f"--llm={tmp_path / 'llm'}", f"--data=llava:{folder / 'records.json'}", "--stage=clip,align",
                    f"--image-root={folder / 'pictures'}", f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_clip_from_nothing_that_llava_does_not_know_cannot_be_exported(folder, tmp_path):
    folder, _ = folder
    with pytest.raises(ValueError, match="--export=.* must come with --image-positions=False --clip-stem=conv"):
        train.main([f"--llm={folder / 'llm'}", f"--data=llava:{folder / 'records.json'}", "--stage=clip,align",
                    f"--image-root={folder / 'pictures'}", f"--out={tmp_path / 'run'}",
                    f"--export=hf:{tmp_path / 'hf'}"])


def test_adapters_train_alone_and_the_model_without_them_is_the_reference(folder, tmp_path, monkeypatch):
    folder, _ = folder
    with open(tmp_path / "mine.jsonl", "w") as file:
        for n in range(24):
            Image.new("RGB", (9, 9), (n * 9, 0, 0)).save(tmp_path / f"{n}.png")
            record = dict(image=f"{n}.png", question="What colour?", answer=("red", "blue")[n % 2])
            file.write(json.dumps(record) + "\n")
    learners = []
    make_learner = train.make_learner
    monkeypatch.setattr(train, "make_learner", lambda *args: learners.append(make_learner(*args)) or learners[-1])
    # A reward that always differs within a group, so that every step moves something.
    (tmp_path / "mine.py").write_text("def mine(sample, text):\n    return (sum(map(ord, text)) % 7) / 7\n")
    run = tmp_path / "run"
    train.main([f"--llava={folder / 'hf'}", f"--data=jsonl:{tmp_path / 'mine.jsonl'}", "--stage=rl", f"--out={run}",
                f"--rewards={tmp_path / 'mine.py'}:mine:1", "--lora-rank=2", "--lora-alpha=16", "--lora-targets=all",
                "--kl-coef=0.05", "--rl-steps=2", "--rl-batch=4", "--group=3", "--max-new=24", "--rl-lr=1e-2",
                "--threads=1", "--compare=none", "--epochs=2", "--eval-greedy=2", "--eval-sampled=2",
                "--eval-samples=2", "--dtype=float32"])
    base = pretrained.load_llava(folder / "hf")[0]
    learner = learners[-1]
    assert learner.reference.llm is learner.policy.llm          # no second decoder
    line = lines(run)[-1]
    assert line["updates"] == 2 and line["kl_ref"] > 0
    state = checkpoint.load(run / "rl.pt")
    assert state["vlm_config"]["lora"] == ("all", 2, 16.0)
    moved = {name for name, value in state["vlm"].items() if name in base.state_dict()
             and not torch.equal(value, base.state_dict()[name])}
    assert moved == {"projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"}
    assert all(value.abs().max() > 0 for name, value in state["vlm"].items() if name.endswith("lora_b"))
    # Through a checkpoint, merged on the way out, the same numbers.
    vlm, tok, _ = evaluation.load_vlm(run / "rl.pt")
    evaluation.main([f"--checkpoint={run / 'rl.pt'}", f"--export=hf:{tmp_path / 'out'}"])
    merged = pretrained.load_llava(tmp_path / "out")[0]
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    pixels, ids = torch.randn(1, 3, 24, 24), torch.tensor([[1, *[-200] * 9, 5, 6]])
    with torch.no_grad():
        wanted = vlm.logits(pixels, ids)
        assert (merged.logits(pixels, ids) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_an_exported_decoder_with_adapters_says_greedily_in_transformers_what_it_says_here(tmp_path):
    write_chat_llm(tmp_path / "llm")
    rng = np.random.default_rng(0)
    lines_of_data = []
    for n in range(12):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        colour = ("red", "blue")[n % 2]
        lines_of_data.append(json.dumps(dict(image=f"{n}.png", question=f"What colour is it? {n}", answer=colour,
                                             reasoning="it looks so")))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines_of_data))
    run = tmp_path / "run"
    parts = [f"--llm={tmp_path / 'llm'}", f"--data=jsonl:{tmp_path / 'mine.jsonl'}", "--threads=1", "--align-steps=2",
             "--align-batch=4", "--image-positions=False"]
    train.main([*parts, f"--out={run}", f"--export=hf:{tmp_path / 'hf'}", "--stage=clip,align,sft,cot",
                "--clip-stem=conv", "--clip-pool=class", "--image-size=24", "--patch=12", "--clip-width=16",
                "--clip-heads=2", "--clip-steps=2", "--clip-batch=4",
                "--sft-steps=3", "--cot-steps=5", "--batch=4", "--cot-lr=1e-2", "--lora-rank=4", "--lora-targets=all",
                "--max-new=32", "--eval-greedy=1", "--eval-sampled=1", "--eval-samples=1"])
    vlm, tok, state = evaluation.load_vlm(run / "cot.pt")
    assert state["config"]["template"] == "chatml" and len(adapters(vlm.llm)) == 14
    samples = [Sample(images=(str(tmp_path / f"{n}.png"),), question=f"What is number {n}?") for n in range(12)]
    prompting = evaluation.Prompting(state["method"], "chatml", 32)
    ours = [text for [text] in evaluation.complete(vlm, tok, samples, prompting).texts]
    with off(vlm.llm):
        base = [text for [text] in evaluation.complete(vlm, tok, samples, prompting).texts]
    assert len({*ours}) == 12 and not {*ours} & {*base}         # pictures, questions and adapters all matter

    # What a user of transformers does, prompt and pixels by the folder's own files.
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    for sample, text in zip(samples, ours):
        content = [dict(type="image", image=Image.open(sample.images[0])),
                   dict(type="text", text=sample.question + chat.PROMPTS[state["method"]].english)]
        asked = processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True,
                                              tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            said = hf.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1]:]
        assert processor.tokenizer.decode(said, skip_special_tokens=True) == text

    # The decoder goes onto the CLIP of a checkpoint as well, the same as in the run that trained it.
    train.main([*parts, f"--out={tmp_path / 'again'}", "--stage=align", f"--init={run / 'clip.pt'}"])
    same = [checkpoint.load(folder / "align.pt")["vlm"] for folder in (run, tmp_path / "again")]
    assert all(torch.equal(weight, same[1][name]) for name, weight in same[0].items())


def test_from_nothing_the_records_train_every_part(folder, tmp_path):
    folder, _ = folder
    train.main(["--preset=tiny", f"--data=llava:{folder / 'records.json'}", f"--image-root={folder / 'pictures'}",
                f"--out={tmp_path / 'run'}", "--threads=1", "--clip-batch=8", "--vocab=400", "--text-length=60"])
    assert [path.stem for path in sorted((tmp_path / "run").glob("*.pt"))] == ["align", "clip", "sft"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_model_of_a_billion_parameters_loads_in_little_more_than_its_weights_and_answers(tmp_path):
    torch.manual_seed(0)
    tok = train.tokenizer.Tokenizer(train_tokenizer())
    cfg = change(train.Config(), **train.PRESETS["tinyllama-clip-b"])
    with torch.device("meta"):
        vlm = VLM(VlmConfig(cfg.clip.config(99), cfg.llm.config(-(-len(tok) // 64) * 64), cfg.vlm.projector))
    vlm.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    assert sum(p.numel() for p in vlm.parameters()) > 1e9
    export_hf(vlm, tok, tmp_path / "model", shard_bytes=500 * 2 ** 20)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 5
    del vlm
    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    # Not getrusage's ru_maxrss, which begins at the peak of the process that this one was forked from.
    program = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, eval
from model.hub import pretrained
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
vlm, tokenizer = pretrained.load_llava({str(tmp_path / 'model')!r}, torch.bfloat16)
weights = sum(p.numel() * p.element_size() for p in vlm.parameters())
print((peak() - before) / weights)
"""
    ratio = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    print(f"peak growth {ratio:.3f} times the weights")
    assert 1 <= ratio < 1.3
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), f"--llava={tmp_path / 'model'}", "--dtype=bfloat16",
                           "--ask", "What colour is the square?", "--image", str(tmp_path / "red.png"), "--max-new=8"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def step_lines(run, stage):
    return [line for line in lines(run) if line["stage"] == stage and "step" in line]


def test_a_stage_from_a_checkpoint_keeps_its_template_and_its_frozen_decoder(folder, tmp_path, capsys):
    folder, _ = folder
    data = [f"--data=llava:{folder / 'records.json'}", f"--image-root={folder / 'pictures'}", "--threads=1"]
    init = f"--init={folder / 'run' / 'align.pt'}"
    train.main([init, *data, "--stage=align", "--align-steps=2", f"--out={tmp_path / 'again'}", "--align-batch=4"])
    before, after = (checkpoint.load(place / "align.pt") for place in (folder / "run", tmp_path / "again"))
    assert after["config"]["template"] == "vicuna_v1" and len(step_lines(tmp_path / "again", "align")) == 2
    moved = {name.split(".")[0] for name, value in after["vlm"].items()
             if not torch.equal(value, before["vlm"][name].to(value.dtype))}
    assert moved == {"projector"}
    assert "--init decides the model's shape" in capsys.readouterr().out


def test_steps_take_the_place_of_a_recipes_epochs_and_none_skips_the_stage(folder, tmp_path):
    train.main([*flags(folder[0])[:-6], "--sft-steps=0", "--align-steps=3", "--threads=1", "--max-length=200",
                f"--out={tmp_path / 'run'}"])
    assert len(step_lines(tmp_path / "run", "align")) == 3 and not (tmp_path / "run" / "sft.pt").exists()


def test_a_resumed_runs_log_is_the_uninterrupted_ones_and_a_finished_run_is_not_resumed(folder, tmp_path, monkeypatch):
    folder, _ = folder
    monkeypatch.chdir(tmp_path)
    save = train.Run.save_progress

    def stop(self, stage, step, *rest):
        save(self, stage, step, *rest)
        if stage == "sft" and step == 6:
            raise KeyboardInterrupt
    monkeypatch.setattr(train.Run, "save_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(folder))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train.main(["--resume"])
    run = tmp_path / "out" / "llava-1.5-7b-1"

    def timeless(log):
        return [{name: value for name, value in line.items() if name != "seconds"} for line in log]
    assert timeless(lines(run)) == timeless(lines(folder / "run"))
    with pytest.raises(ValueError, match="found no unfinished run"):
        train.main(["--resume"])


def test_a_step_without_a_usable_record_has_no_loss(folder, tmp_path):
    run = tmp_path / "run"
    train.main([*flags(folder[0]), "--align-batch=1", "--stage=align", f"--out={run}"])
    nothing = [line for line in step_lines(run, "align") if line["loss"] is None]
    assert len(nothing) == 3 and all(line["loss"] > 0 for line in step_lines(run, "align") if line not in nothing)


def test_the_mean_of_seeds_passes_over_lines_without_a_step(folder):
    log = lines(folder[0] / "run")
    assert mean_log([log, log]) == [
        {name: value for name, value in line.items()} for line in log if "step" in line]


@pytest.mark.slow
def test_seeds_train_on_records_side_by_side(folder, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags(folder[0]), "--seeds=2", "--stage=align",
                           f"--out={tmp_path / 'run'}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint.load(tmp_path / "run" / f"seed-{seed}" / "align.pt")["vlm"] for seed in (0, 1))
    assert not torch.equal(one["projector.0.weight"], two["projector.0.weight"])


def test_align_learns_llavas_plain_captions_and_sft_alone_groups_lengths(folder, tmp_path, monkeypatch):
    forms, grouped = set(), {}
    plain, indices = chat.encode_plain, train.batch_indices
    monkeypatch.setattr(chat, "encode_plain", lambda *args: forms.add(args[3]) or plain(*args))
    monkeypatch.setattr(train, "batch_indices", lambda count, size, step, seed, lengths: grouped.setdefault(
        seed, lengths is not None) and indices(count, size, step, seed, lengths) or indices(count, size, step, seed))
    train.main([*flags(folder[0]), f"--out={tmp_path / 'run'}"])
    assert forms == {"vicuna_v1"} and list(grouped.values()) == [False, True]


def test_align_has_no_adapters_and_each_stage_begins_with_new_ones(folder, tmp_path):
    train.main([*flags(folder[0]), "--lora-rank=2", f"--out={tmp_path / 'run'}"])
    align, sft = (checkpoint.load(tmp_path / "run" / f"{stage}.pt") for stage in ("align", "sft"))
    assert align["vlm_config"]["lora"] == () and sft["vlm_config"]["lora"] == ("q_proj,v_proj", 2, 16.0)
    assert not any("lora" in name for name in align["vlm"])
    vlm = VLM.from_config(sft["vlm_config"], sft["vlm"])
    pixels, ids = torch.randn(1, 3, 24, 24).bfloat16(), torch.tensor([[1, *[-200] * 9, 5, 6]])
    with torch.no_grad():
        before = vlm.logits(pixels, ids)
        vlm.adapt("all", 0, 1.0)
        after = vlm.logits(pixels, ids)
    assert not adapters(vlm.llm) and all(p.requires_grad for p in vlm.llm.parameters())
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_a_folder_is_loaded_in_the_dtype_that_was_asked_for(folder):
    for dtype, wanted in (("", torch.float32), ("bfloat16", torch.bfloat16)):
        options = evaluation.EvalOptions(llava=str(folder[0] / "hf"), dtype=dtype)
        assert {p.dtype for p in evaluation.load_any(options)[0].parameters()} == {wanted}


def test_what_nothing_can_check_is_not_evaluated(folder):
    with pytest.raises(ValueError, match="it needs --ask=, --data= or --export="):
        evaluation.main([f"--checkpoint={folder[0] / 'run' / 'sft.pt'}"])


def test_a_pretrained_model_goes_from_sft_to_rl_beside_what_it_was_before(folder, tmp_path, capsys, monkeypatch):
    folder, _ = folder
    for n in range(12):
        Image.new("RGB", (9, 9), (n * 9, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(
        dict(image=f"{n}.png", question="What colour?", answer=("red", "blue")[n % 2])) for n in range(12)))
    mine = [f"--llava={folder / 'hf'}", f"--data=jsonl:{tmp_path / 'mine.jsonl'}", "--threads=1", "--dtype=float32"]
    with pytest.raises(ValueError, match="cot needs a reasoning in every line.*--llava=.*holds the image tower alone"):
        train.main([*mine, "--stage=sft,cot", f"--out={tmp_path / 'none'}"])
    assert not (tmp_path / "none").exists()
    few = ["--lora-rank=0", "--sft-steps=1", "--rl-steps=1", "--rl-batch=2", "--group=2",
           "--max-new=24", "--eval-greedy=1", "--eval-sampled=1", "--eval-samples=1"]
    train.main([*mine, *few, "--cot-steps=0", f"--out={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert said.index("planned: weights") < said.index("config, what differs")       # before a weight is loaded
    sft, rl = (checkpoint.load(tmp_path / "run" / f"{stage}.pt") for stage in ("sft", "rl"))
    assert rl["method"] == "asked" and rl["config"]["template"] == "vicuna_v1"
    assert rl["label"] == "grpo" and methods(tmp_path / "run") == ["before", "grpo"]
    start = pretrained.load_llava(folder / "hf")[0].llm.norm.weight     # RL went on from sft, not from the folder
    assert not torch.equal(sft["vlm"]["llm.norm.weight"], start)
    assert not torch.equal(rl["vlm"]["llm.norm.weight"], start)
    train.main([f"--init={tmp_path / 'run' / 'sft.pt'}", *mine[1:], "--stage=rl", f"--out={tmp_path / 'next'}",
                "--rl-steps=1", "--rl-batch=2", "--group=2", "--max-new=24", "--eval-greedy=1", "--eval-sampled=1",
                "--eval-samples=1"])
    assert checkpoint.load(tmp_path / "next" / "rl.pt")["config"]["template"] == "vicuna_v1"
    assert methods(tmp_path / "next")[0] == "before"

    # Before RL on the folder itself, it is asked as RL asks.
    asked = []
    monkeypatch.setattr(evaluation, "evaluate", partial(noted, asked, evaluation.evaluate))
    train.main([*mine, *few, "--stage=rl", "--method=asked_example", f"--out={tmp_path / 'folder'}"])
    assert methods(tmp_path / "folder") == ["before", "grpo"] and asked == ["asked_example", "asked_example"]


def test_a_llava_folder_stands_beside_the_baselines_of_pictures_in_classes(folder, tmp_path):
    folder, _ = folder
    for n in range(16):
        place = tmp_path / "pictures" / ("train" if n < 10 else "val") / ("red", "blue")[n % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (n * 9, 0, 200 * (n % 2))).save(place / f"{n}.png")
    train.main([f"--llava={folder / 'hf'}", f"--data=images:{tmp_path / 'pictures'}", "--threads=1", "--rl-steps=1",
                "--rl-batch=2", "--group=2", "--max-new=24", "--eval-greedy=2", "--eval-sampled=1",
                "--eval-samples=1", f"--out={tmp_path / 'run'}"])
    found = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert {row["method"] for row in found} == {"majority class", "nearest pixels", "linear probe"}
    assert methods(tmp_path / "run") == ["before", "grpo"]

    # Its checkpoint goes on by adapters and at their rate.
    train.main([f"--init={tmp_path / 'run' / 'rl.pt'}", f"--data=images:{tmp_path / 'pictures'}", "--stage=rl",
                "--rl-steps=0", "--eval-greedy=1", "--eval-sampled=1", "--eval-samples=1", "--max-new=24",
                f"--out={tmp_path / 'next'}"])
    config = json.loads((tmp_path / "next" / "config.json").read_text())
    assert (config["preset"], config["lora_rank"], config["rl_lr"]) == ("llava-rl", 64, 1e-5)


def methods(out):
    return [*dict.fromkeys(row["method"] for row in json.loads((out / "results.json").read_text()))]


def noted(asked, evaluate, vlm, tok, samples, prompting, *options):
    """As eval.evaluate; appends the method to `asked`."""
    asked.append(prompting.method)
    return evaluate(vlm, tok, samples, prompting, *options)


def test_the_clip_stage_names_records_that_are_no_pair(folder, tmp_path):
    folder, _ = folder
    tiny = ["--preset=tiny", f"--data=llava:{folder / 'records.json'}", f"--image-root={folder / 'pictures'}",
            "--stage=clip", "--threads=1", "--clip-batch=8", "--vocab=400", "--text-length=60"]
    train.main([*tiny, f"--out={tmp_path / 'run'}"])
    assert {line["name"]: line["kind"] for line in lines(tmp_path / "run") if "kind" in line}["r10"] == "no pair"
    assert not (tmp_path / "run" / "probe.json").exists()
