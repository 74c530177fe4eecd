"""Twenty LLaVA records with pictures of every odd kind, and tiny random models as folders, for the
runs on real data.

    python tests/llava_folder.py DIR        # DIR/records.json, DIR/pictures, DIR/clip, DIR/llm
"""
import io
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

COLOURS = dict(red=(220, 30, 30), green=(30, 180, 40), blue=(40, 60, 220), yellow=(230, 220, 40))


def picture(rng, width, height, colour):
    """A photograph's stand-in: a coloured square on noise."""
    array = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
    side = max(1, min(width, height) // 2)
    array[(height - side) // 2:(height + side) // 2,
          (width - side) // 2:(width + side) // 2] = colour
    return Image.fromarray(array)


def write_records(folder, count=20):
    """DIR/records.json and its pictures: JPEG and PNG of odd sizes, three of them bad; -> the
    names of the bad."""
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    (pictures / "sub").mkdir(parents=True)
    records = []
    for n in range(count):
        colour = [*COLOURS][n % 4]
        image = picture(rng, *rng.integers(17, 160, 2).tolist(), COLOURS[colour])
        file = f"sub/{n}.png" if n % 2 else f"sub/{n}.jpg"
        options = {}
        if n == 4:
            file = "grey.jpg"
            image = image.convert("L")
        if n == 5:
            file = "palette.png"
            image = image.quantize(16)
        if n == 6:
            file = "alpha.png"
            image = image.convert("RGBA")
            image.putalpha(128)
        if n == 7:
            file = "turned.jpg"
            options["exif"] = Image.Exif()
            options["exif"][0x112] = 6
        if n == 8:
            file = "dot.png"
            image = Image.new("RGB", (1, 1), COLOURS[colour])
        image.save(pictures / file, **options)
        if n == 9:      # a download that broke off
            file = "cut.jpg"
            image.resize((300, 300)).save(pictures / file)
            (pictures / file).write_bytes((pictures / file).read_bytes()[:-400])
        question = "What colour is the square?"
        asked = f"<image>\n{question}" if n % 3 else f"{question}\n<image>"
        turns = [("human", asked), ("gpt", f"The square is {colour}.")]
        if n % 4 == 1:
            turns += [("human", " And the rest?"), ("gpt", "Grey noise.")]
        if n == 10:     # a record without a picture
            turns = [("human", "Say hello."), ("gpt", "Hello!")]
        if n == 11:
            turns[1] = ("gpt", "It is <image>.")
        conversation = [{"from": who, "value": text} for who, text in turns]
        record = dict(id=f"r{n}", image=file, conversations=conversation)
        if n == 10:
            del record["image"]
        if n == 12:
            record["image"] = "nowhere.jpg"
        records.append(record)
    (folder / "records.json").write_text(json.dumps(records, indent=1))
    return ["r9", "r11", "r12"]


def train_tokenizer(dummy_prefix=True):
    """A small sentencepiece model of Vicuna's kind, as bytes."""
    proto = io.BytesIO()
    texts = [f"USER: What colour is the square? ASSISTANT: The square is {name}. Hello! Grey noise."
             for name in COLOURS]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3), model_writer=proto, vocab_size=400, model_type="bpe",
        byte_fallback=True, split_digits=True, add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
        normalization_rule_name="identity", minloglevel=2)
    return proto.getvalue()


def byte_level_json(texts):
    """A small tokenizer.json of Qwen's and SmolLM2's kind, with ChatML's tokens, as text."""
    import tokenizers
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(texts, trainer)
    return model.to_str()


def write_chat_llm(folder):
    """A tiny decoder of SmolLM2's kind: tied, byte-level, ChatML's tokens; random weights."""
    torch.manual_seed(0)
    source = byte_level_json(["system user assistant\nWhat colour is it? red blue\n"] * 4)
    llm = LlamaConfig(
        vocab_size=len(json.loads(source)["model"]["vocab"]), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, initializer_range=0.3)
    LlamaForCausalLM(llm).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(source)
    names = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def write_models(folder, side=24, patch=8):
    """DIR/clip and DIR/llm, as transformers writes them, with random weights."""
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                  image_size=side, patch_size=patch)
    text = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=99, max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    clip = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    CLIPModel(clip).save_pretrained(folder / "clip")
    proto = train_tokenizer()
    vocab = spm.SentencePieceProcessor(model_proto=proto).get_piece_size()
    llm = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False)
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    (folder / "llm" / "tokenizer.model").write_bytes(proto)


if __name__ == "__main__":
    write_records(Path(sys.argv[1]))
    write_models(Path(sys.argv[1]))
