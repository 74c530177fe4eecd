"""Zero-shot CLIP: the nearest answers of the CLIP at hand, and the chains and baselines that read them."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import eval as evaluation
import train
from data import teachers
from data.sample import Sample
from data.tokenizer import train as train_tokenizer
from data.zero_shot import ZeroShot, as_captions
from llava_folder import write_models
from model.hub import pretrained
from model.runs import checkpoint
from model.runs.config import change
from tiny import shake

ANSWERS = ["red", "Blue", "a très long name of a class, longer than this text tower reads", "king penguin", "7 cm",
           "zebra", "3", "it's"]
SIDE, PATCH, LENGTH = 15, 5, 12


class Shades:
    """Stands in for CLIP: a picture is nearest to the text whose number of tokens is nearest to its grey."""
    config = SimpleNamespace(text_length=4, image_size=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    logit_scale = torch.zeros((), dtype=torch.float64)

    def encode_image(self, pixels):
        assert pixels.dtype == torch.float64 and pixels.shape[1:] == (3, 2, 2)
        return circle(pixels.mean((1, 2, 3)))

    def encode_text(self, ids, length):
        assert ids.shape == (len(length), int(length.max()))
        return circle(torch.tensor([{2: 0.0, 3: 0.5, 4: 1.0}[int(n)] for n in length], dtype=torch.float64))


def circle(shade):
    return torch.stack([shade.cos(), shade.sin()], dim=1)


def test_nearest_answers_are_those_of_the_encoder_best_first_over_all_batches():
    tokenizer = train_tokenizer(["a b c d e f"] * 2, [f"▁{letter}" for letter in "abcdef"], 300)
    answers = ["a", "a b", "a b c d e f"]           # 2, 3 and, cut off, 4 tokens with the end token
    level = (0, 120, 255)
    samples = [Sample(images=(np.full((2, 2, 3), level[n % 3], np.uint8),)) for n in range(130)]
    clip = ZeroShot(Shades(), as_captions(tokenizer, Shades.config.text_length))
    found = clip.nearest(samples, answers, 2)
    assert len(found) == 130 and all(len(row) == 2 for row in found)
    assert [row[0] for row in found] == [answers[n % 3] for n in range(130)]
    assert found[0] == ["a", "a b"]
    many = clip.nearest(samples[:3], answers * 100, 300)        # texts of more than one batch
    assert many[2] == [answers[2]] * 100 + [answers[1]] * 100 + [answers[0]] * 100


# ---------------------------------------------------------------- the CLIP that --clip names

def pictures(folder, count=12, square=False):
    """Files of odd shapes, or of squares of any size, each mostly of one colour."""
    rng = np.random.default_rng(0)
    files = []
    for n in range(count):
        width, height = rng.integers(9, 40, 2)
        if square:
            height = width
        pixels = rng.integers(0, 60, (height, width, 3)) + rng.integers(0, 190, 3)
        files.append(str(folder / f"{n}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    return files


def open_clip_model(folder, **text):
    """(--clip of a tiny model of open_clip's with random weights, itself)."""
    folder.mkdir()
    name = f"seethink-words-{folder.name}"
    (folder / f"{name}.json").write_text(json.dumps(dict(
        embed_dim=7, quick_gelu=True,
        vision_cfg=dict(image_size=SIDE, patch_size=PATCH, width=12, layers=3, head_width=4),
        text_cfg=dict(context_length=LENGTH, vocab_size=49408, width=10, heads=5, layers=2) | text)))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = shake(open_clip.create_model(name, pretrained=None)).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"{name}:{folder / 'weights.pt'}", model


def clip_folder(folder, vocab=49408, **changes):
    """A tiny CLIP of transformers' in a folder, with OpenAI's vocabulary and colours of its own -> itself."""
    torch.manual_seed(0)
    text = dict(hidden_size=10, intermediate_size=40, num_hidden_layers=2, num_attention_heads=5,
                max_position_embeddings=LENGTH, vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1)
    vision = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE,
                  patch_size=PATCH)
    model = shake(CLIPModel(CLIPConfig(text_config=text | changes, vision_config=vision, projection_dim=7))).eval()
    with torch.no_grad():               # embeddings of random towers hardly differ otherwise
        model.vision_model.embeddings.patch_embedding.weight *= 5
    model.save_pretrained(folder)
    processor = dict(image_mean=[0.2, 0.5, 0.8], image_std=[0.3, 0.2, 0.1], size=dict(shortest_edge=SIDE),
                     crop_size=dict(height=SIDE, width=SIDE), image_processor_type="CLIPImageProcessor")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    words = SimpleTokenizer()
    spelled = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    pieces = {spelled.get(piece, piece): place for piece, place in words.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(pieces))
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    return model


def named(name):
    """The ZeroShot of --clip=name."""
    return evaluation.zero_shot(change(train.Config(), clip=str(name), device="cpu"), {}, None)


def ranking(images, texts):
    """Unit vectors of n pictures and of all answers -> the answers, nearest first, of each picture."""
    order = (images @ texts.T).argsort(dim=1, descending=True)
    return [[ANSWERS[place] for place in row] for row in order.tolist()]


@torch.no_grad()
def test_nearest_answers_are_those_of_open_clip(tmp_path):
    name, theirs = open_clip_model(tmp_path / "clip")
    files = pictures(tmp_path, square=True)     # of others open_clip cuts the middle out a pixel beside, at times
    prepared = open_clip.image_transform(SIDE, is_train=False)
    pixels = torch.stack([prepared(Image.open(file)) for file in files])
    texts = [f"a photo of a {answer}." for answer in ANSWERS]
    ids = open_clip.get_tokenizer(name.partition(":")[0])(texts)
    assert ids.shape == (len(ANSWERS), LENGTH)
    wanted = ranking(theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True))
    assert len({*map(tuple, wanted)}) > 2
    samples = [Sample(images=(file,)) for file in files]
    assert named(name).nearest(samples, ANSWERS, 9) == wanted
    assert named(name).nearest(samples, ANSWERS, 2) == [row[:2] for row in wanted]


@torch.no_grad()
def test_nearest_answers_are_those_of_transformers_with_the_folders_own_colours(tmp_path):
    theirs = clip_folder(tmp_path / "clip")
    files = pictures(tmp_path)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")
    words = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    texts = [f"a photo of a {answer}." for answer in ANSWERS]
    out = theirs(pixel_values=processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"],
                 **words(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))
    wanted = ranking(out.image_embeds, out.text_embeds)
    assert len({*map(tuple, wanted)}) > 2
    clip = named(tmp_path / "clip")
    samples = [Sample(images=(file,)) for file in files]
    assert clip.nearest(samples, ANSWERS, 9) == wanted
    object.__setattr__(clip.clip, "config", train.ClipConfig(image_size=SIDE, patch=PATCH))
    assert clip.nearest(samples, ANSWERS, 9) != wanted          # OpenAI's colours would be seen here


def test_a_clip_trained_here_comes_before_the_one_that_is_named(tmp_path):
    name, _ = open_clip_model(tmp_path / "first")
    config = train.ClipOptions(clip_width=12, clip_heads=3).config(vocab=300)
    towers = dict(clip=train.Clip(config).state_dict(), clip_config=vars(config))
    tokenizer = train_tokenizer(["a b"], [], 300)
    found = evaluation.zero_shot(change(train.Config(), clip=name, device="cpu", dtype="bfloat16"), towers, tokenizer)
    assert found.clip.config == config and found.read("a b") == [*tokenizer.encode(" a b"), tokenizer.eos_id]
    assert found.clip.logit_scale.dtype == torch.float32        # cosines in bfloat16 tell few classes apart


def test_what_cannot_read_words_says_why(tmp_path):
    name, _ = open_clip_model(tmp_path / "narrow", vocab_size=300)
    clip_folder(tmp_path / "small", vocab=99)
    model = clip_folder(tmp_path / "swapped")
    pieces = json.loads((tmp_path / "swapped" / "vocab.json").read_text())
    pieces["a"], pieces["b"] = pieces["b"], pieces["a"]
    (tmp_path / "swapped" / "vocab.json").write_text(json.dumps(pieces))
    model.vision_model.save_pretrained(tmp_path / "tower")
    for clip, fault in ((name, "has a vocabulary of 300 pieces, not OpenAI's 49408"),
                        (tmp_path / "small", "has a vocabulary of 99 pieces, not OpenAI's 49408"),
                        (tmp_path / "swapped", "has another vocabulary than OpenAI's"),
                        (tmp_path / "tower", "holds no text tower")):
        assert pretrained.text_fault(str(clip)) == fault
        assert named(clip) is None
    (tmp_path / "swapped" / "vocab.json").unlink()
    assert pretrained.text_fault(str(tmp_path / "swapped")) == ""


# ---------------------------------------------------------------- in a run

SHORT = ["--align-steps=1", "--sft-steps=1", "--cot-steps=2", "--rl-steps=1", "--batch=4", "--rl-batch=2", "--group=2",
         "--max-new=24", "--eval-greedy=4", "--eval-sampled=2", "--eval-samples=2", "--threads=1", "--compare=none"]


def red_and_blue(folder):
    """-> --data of ten pictures to train on and six to test."""
    rng = np.random.default_rng(0)
    for n in range(16):
        pixels = rng.integers(0, 90, (20, 30, 3), dtype=np.uint8)
        pixels[..., (0, 2)[n % 2]] += 160
        place = folder / ("train" if n < 10 else "val") / ("red", "blue")[n % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{n}.png")
    return f"--data=images:{folder}"


def test_a_pretrained_run_learns_chains_over_what_its_clip_finds_nearest(tmp_path, capsys, monkeypatch):
    write_models(tmp_path)
    name, _ = open_clip_model(tmp_path / "run_clip")
    data = red_and_blue(tmp_path / "pictures")
    taught = []
    records = teachers.records
    monkeypatch.setattr(teachers, "records", lambda samples, *rest: taught.extend(samples) or records(samples, *rest))
    base = [f"--clip={name}", f"--llm={tmp_path / 'llm'}", data, *SHORT]
    train.main([*base, "--stage=align,sft,cot,rl", f"--out={tmp_path / 'run'}"])
    samples = taught[-10:]              # before that, looks ahead at how long chains can be
    nearest = named(name).nearest(samples, ["blue", "red"], 3)
    for sample, candidates in zip(samples, nearest):
        assert sample.reasoning == f"it looks like {' or '.join(candidates)} . it is {sample.conclusion}"
    assert checkpoint.load(tmp_path / "run" / "rl.pt")["method"] == "think"
    found = {row["method"]: row for row in json.loads((tmp_path / "run" / "baselines.json").read_text())}
    assert [*found] == ["majority class", "nearest pixels", "linear probe", "zero-shot CLIP", "sft, no thinking"]
    said = [line for line in capsys.readouterr().out.splitlines() if "zero-shot CLIP" in line]
    assert len(said) == 1

    # From a checkpoint of that run, which carries no text tower, the name is needed again.
    again = [f"--init={tmp_path / 'run' / 'sft.pt'}", data, *SHORT, "--stage=cot"]
    with pytest.raises(ValueError, match="cot needs a reasoning in every line.*--init=.*sft.pt carries none"):
        train.main([*again, f"--out={tmp_path / 'without'}"])
    assert not (tmp_path / "without").exists()
    train.main([*again, f"--clip={name}", f"--out={tmp_path / 'with'}"])
    assert (tmp_path / "with" / "cot.pt").exists()


def test_a_clip_that_names_nothing_is_refused_before_the_run_folder_is_made(tmp_path):
    write_models(tmp_path)              # its CLIP has a vocabulary of 99 pieces
    data = red_and_blue(tmp_path / "pictures")
    base = [f"--clip={tmp_path / 'clip'}", f"--llm={tmp_path / 'llm'}", data, *SHORT, f"--out={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="--stage=align,cot: cot needs a reasoning in every line.*or --clip=NAME of a "
                                         "CLIP with both towers.*has a vocabulary of 99 pieces") as error:
        train.main([*base, "--stage=align,cot"])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    (tmp_path / "mine.py").write_text("def teach(sample, rng):\n    return 'looks so', sample.answer\n")
    teacher = f"--teacher={tmp_path / 'mine.py'}:teach"
    # Flawless chains are never those of --teacher.
    with pytest.raises(ValueError, match="perfect needs a reasoning in every line"):
        train.main([*base, "--stage=align,cot,rl,perfect", teacher])
    train.main([*base, "--stage=align,cot", teacher])
    found = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert "zero-shot CLIP" not in {row["method"] for row in found}
    shutil.rmtree(tmp_path / "run")
