"""The step of `train.py --bench=step` in TRL's GRPOTrainer: same sizes, same work, random weights; seconds a step.

    pip install -e ".[peers]" in a venv of its own, then
    python tests/bench_trl.py                   # next to: python train.py --bench=step
    python tests/bench_trl.py --image-size=192

8 prompts of 12 words and a picture, 8 completions of 48 tokens each, EOS suppressed; CLIP frozen, one update a rollout,
no KL, fp32, two threads. The first step is left out, as there.
"""
import argparse
import random
import statistics
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                          LlavaProcessor, PreTrainedTokenizerFast, TrainerCallback)
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, NEW, VOCAB, PATCH = 8, 8, 48, 512, 8
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
TEMPLATE = ("{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} {% else %}"
            "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
            "{% endif %}{% endfor %}{% endif %}{% endfor %}")


def processor(image_size):
    words = SPECIAL + [f"w{n}" for n in range(VOCAB - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", additional_special_tokens=["<image>"], chat_template=TEMPLATE)
    pictures = CLIPImageProcessor(size={"shortest_edge": image_size},
                                  crop_size={"height": image_size, "width": image_size})
    return LlavaProcessor(image_processor=pictures, tokenizer=fast, patch_size=PATCH, num_additional_image_tokens=1,
                          vision_feature_select_strategy="default", chat_template=TEMPLATE)


def model(image_size):
    vision = CLIPVisionConfig(image_size=image_size, patch_size=PATCH, hidden_size=128, intermediate_size=512,
                              num_hidden_layers=4, num_attention_heads=4, projection_dim=128)
    text = LlamaConfig(vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                       num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024, bos_token_id=1,
                       eos_token_id=2, pad_token_id=4)
    llava = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_token_index=3, vision_feature_layer=-2,
        vision_feature_select_strategy="default"))
    llava.model.vision_tower.requires_grad_(False)
    return llava


class Clock(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rng, clock = np.random.default_rng(0), Clock()
    shape = (args.image_size, args.image_size, 3)
    rows = PROMPTS * (args.steps + 1)
    questions = [" ".join(f"w{n}" for n in rng.integers(0, 64, 12)) for _ in range(rows)]
    data = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": question}] for question in questions],
        "image": [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for _ in range(rows)]})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=NEW, max_steps=args.steps, beta=0.0, num_iterations=1, temperature=1.0, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=10**6,
            disable_tqdm=True, generation_kwargs={"suppress_tokens": [2, 3, 4], "min_new_tokens": NEW})
        GRPOTrainer(model=model(args.image_size), args=config, train_dataset=data, callbacks=[clock],
                    reward_funcs=lambda completions, **_: [random.random() for _ in completions],
                    processing_class=processor(args.image_size)).train()
    steps = np.diff(clock.ends).tolist()
    print(f"TRL, {(args.image_size // PATCH) ** 2} image tokens: {statistics.median(steps):.3f} s a step, median of "
          f"{len(steps)} ({min(steps):.3f}-{max(steps):.3f})")


if __name__ == "__main__":
    main()
