"""The work of train.py's --bench done by others, for turns with ours: TRL's GRPOTrainer, Hugging Face's generate.

A LLaVA of the same sizes with random weights, prompts of 12 words and a picture, every completion of full length, CLIP
frozen, one update a rollout, no KL. TRL comes with the `peers` extra, transformers with `test`; nothing else needs this
file.
"""
import importlib.metadata
import importlib.util
import random
import tempfile
import time

import numpy as np
import torch
from PIL import Image

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
UNK, BOS, EOS, IMAGE, PAD = range(len(SPECIAL))
WORDS = 12                          # of a question
TEMPLATE = ("{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} {% else %}"
            "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
            "{% endif %}{% endfor %}{% endif %}{% endfor %}")


def version(package):
    """Of an installed package; "" where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return ""
    return importlib.metadata.version(package)


def llava(config):
    """Hugging Face's LLaVA of the sizes of a model.vlm.VlmConfig, with random weights, its image tower frozen."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    clip, llm = config.clip, config.llm
    vision = CLIPVisionConfig(
        image_size=clip.image_size, patch_size=clip.patch, hidden_size=clip.width, intermediate_size=4 * clip.width,
        num_hidden_layers=clip.layers, num_attention_heads=clip.heads, projection_dim=clip.width)
    text = LlamaConfig(
        vocab_size=llm.vocab, hidden_size=llm.width, intermediate_size=llm.ff, num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads, num_key_value_heads=llm.kv_heads, tie_word_embeddings=llm.tied,
        max_position_embeddings=4096, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE,
        vision_feature_layer=config.feature_layer, vision_feature_select_strategy="default"))
    model.model.vision_tower.requires_grad_(False)
    return model


def processor(config):
    """Words to ids and pictures to pixels, as `llava` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
    size = config.clip.image_size
    words = SPECIAL + [f"w{n}" for n in range(config.llm.vocab - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", additional_special_tokens=["<image>"], chat_template=TEMPLATE)
    pictures = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(image_processor=pictures, tokenizer=fast, patch_size=config.clip.patch,
                          num_additional_image_tokens=1, vision_feature_select_strategy="default",
                          chat_template=TEMPLATE)


def questions(count, image_size):
    """Random conversations of a question each, as TRL takes them, and their pictures."""
    from datasets import Dataset
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 64, WORDS)) for _ in range(count)]
    shape = (image_size, image_size, 3)
    return Dataset.from_dict({
        "prompt": [[{"role": "user", "content": text}] for text in texts],
        "image": [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for _ in range(count)]})


def trl_step(config, P, G, C, turns, between, device, dtype):
    """Runs `turns` + 1 steps of TRL's GRPOTrainer on P prompts x G completions of C tokens and calls between() after
    each -> the seconds of all but the first."""
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    seconds = []

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)
            between()
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=P * G, num_generations=G, max_completion_length=C,
            max_steps=turns + 1, beta=0.0, num_iterations=1, temperature=1.0, use_cpu=device.type == "cpu", bf16=False,
            gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=10**6, disable_tqdm=True,
            generation_kwargs={"suppress_tokens": [EOS, IMAGE, PAD], "min_new_tokens": C})
        GRPOTrainer(model=llava(config).to(dtype), args=options, callbacks=[Turns()],
                    train_dataset=questions(P * (turns + 2), config.clip.image_size),
                    reward_funcs=lambda completions, **_: [random.random() for _ in completions],
                    processing_class=processor(config)).train()
    return seconds[1:]


def generation(config, P, G, C, device, dtype):
    """-> a function that samples G completions of C tokens for each of P prompts with Hugging Face's generate."""
    model = llava(config).to(device, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(SPECIAL), config.llm.vocab, (P, WORDS), generator=generator)
    picture = torch.full((P, config.image_tokens), IMAGE)
    ids = torch.cat([torch.full((P, 1), BOS), picture, words], dim=1)
    size = config.clip.image_size
    pixels = torch.randn(P, 3, size, size, generator=generator)
    ids = ids.repeat_interleave(G, 0).to(device)
    pixels = pixels.repeat_interleave(G, 0).to(device, dtype)

    @torch.no_grad()
    def generate():
        done = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=True,
                              temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=C, min_new_tokens=C,
                              suppress_tokens=[EOS, IMAGE, PAD], pad_token_id=PAD)
        if done.shape[1] < ids.shape[1] + C:
            raise RuntimeError(f"generate gave {done.shape[1] - ids.shape[1]} new tokens, expected {C}")

    return generate
