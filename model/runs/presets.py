"""The presets of train.py: overrides of its Config, for small worlds and for published recipes.

A recipe names its parts on the hub and states their shapes, so that a run can be planned, and a test can count
parameters, without a single download; what --clip, --llm or --llava load decides over the shapes given here. Both its
stages keep CLIP frozen: align trains only the projector, on captions, sft projector and decoder on conversations.
Hyper-parameters are LLaVA's (arXiv 2304.08485, section 4.1) and LLaVA-1.5's (arXiv 2310.03744, table 9).
"""
from model.runs.checkpoint import load

CLIP_L = dict(clip="ViT-L-14-quickgelu/openai", image_size=224, patch=14, clip_width=1024, clip_layers=24,
              clip_heads=16, embed=768, text_width=768, text_layers=12, text_heads=12, text_length=77,
              clip_stem="conv", clip_pool="class", image_positions=False)
CLIP_L_336 = CLIP_L | dict(clip="ViT-L-14-336-quickgelu/openai", image_size=336)
CLIP_B = CLIP_L | dict(clip="ViT-B-16-quickgelu/openai", patch=16, clip_width=768, clip_layers=12, clip_heads=12,
                       embed=512, text_width=512, text_heads=8)

VICUNA_7B = dict(llm="lmsys/vicuna-7b-v1.5", vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, ff=11008,
                 theta=10000.0, eps=1e-5, tied=False, template="vicuna_v1")
VICUNA_7B_V1 = VICUNA_7B | dict(llm="lmsys/vicuna-7b-v1.3", eps=1e-6)           # of LLaMA 1, whose eps is another
VICUNA_13B = VICUNA_7B | dict(llm="lmsys/vicuna-13b-v1.5", width=5120, layers=40, heads=40, kv_heads=40, ff=13824)
LLAMA_70B = VICUNA_7B | dict(llm="meta-llama/Llama-2-70b-chat-hf", width=8192, layers=80, heads=64, kv_heads=8,
                             ff=28672)
TINYLLAMA = VICUNA_7B | dict(llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0", width=2048, layers=22, kv_heads=4, ff=5632)
SMOLLM2 = dict(llm="HuggingFaceTB/SmolLM2-135M-Instruct", vocab=49152, width=576, layers=30, heads=9, kv_heads=3,
               ff=1536, theta=100000.0, eps=1e-5, tied=True, template="chatml")
QWEN_05B = dict(llm="Qwen/Qwen2.5-0.5B-Instruct", vocab=151936, width=896, layers=24, heads=14, kv_heads=2, ff=4864,
                theta=1000000.0, eps=1e-6, tied=True, qkv_bias=True, template="chatml")

# As rl/algorithms.py has it.
GRPO = dict(algorithm="grpo", norm="sequence", flat="count", kl_coef=0.04)

LLAVA_V1 = dict(
    projector="linear", image_fit="crop", align_lr=2e-3, align_batch=128, align_epochs=1.0, sft_lr=2e-5, batch=128,
    sft_epochs=3.0, warmup=0.03, final_lr=0.0, weight_decay=0.0, beta2=0.999, grad_clip=1.0, max_length=2048,
    dtype="bfloat16", checkpointing=True, micro_batch=4, max_new=128, save_every=500,
    # reinforcement learning after it, of all weights: R1-V's and Visual-RFT's
    compare="none", cot_steps=0, **GRPO, rl_lr=1e-6, rl_batch=8)
LLAVA_15 = LLAVA_V1 | dict(projector="mlp2x_gelu", image_fit="pad", align_lr=1e-3, align_batch=256, sft_epochs=1.0,
                           group_lengths=True)

# For pictures in classes: a few hundred are known by heart after a few epochs; more steps gain nothing on others.
SMALL_CLIP = dict(image_size=64, patch=16, clip_steps=200, clip_batch=64)

# Reinforcement learning of pretrained models by adapters, on pictures and questions of one's own. GRPO, its KL of 0.04,
# groups of 8 and temperature 1 are R1-V's and Visual-RFT's (arXiv 2503.01785), which take 200 steps; 1e-5 is VLM-R1's
# rate of adapters (arXiv 2504.07615), 2e-4 LLaVA-1.5's of supervised ones. A few chains teach the tags before: `cot`.
RL_OF_PRETRAINED = SMALL_CLIP | dict(
    compare="none", template="auto", projector="linear", image_positions=False, image_fit="pad",
    lora_rank=64, lora_alpha=128.0, lora_targets="all", align_lr=1e-3, align_steps=200, sft_lr=2e-4, sft_steps=0,
    cot_lr=2e-4, cot_steps=100, forget_close=0.0, batch=16, **GRPO, rl_lr=1e-5, rl_batch=8, rl_steps=200, max_new=256,
    warmup=0.03, final_lr=0.0, weight_decay=0.0, beta2=0.99, grad_clip=1.0, save_every=50)
ON_A_GPU = dict(dtype="bfloat16", checkpointing=True, micro_batch=4)
ASKS_FOR_TAGS = dict(cot_steps=0)       # of a whole LLaVA, which follows its prompt, nothing else is taught

RL_RECIPES = {
    # from nothing but the decoder, on two CPU cores: a small CLIP first; the rate of rl is the one that --tune chose
    "smollm2-small": SMOLLM2 | RL_OF_PRETRAINED | dict(
        lora_rank=16, lora_alpha=32.0, align_lr=1e-2, align_steps=150, cot_steps=60, cot_lr=5e-4, rl_steps=60,
        rl_lr=2.5e-4, max_new=40, eval_greedy=100, eval_sampled=100, eval_samples=4, save_every=10),
    "qwen2.5-0.5b-rl": CLIP_L | QWEN_05B | RL_OF_PRETRAINED | ON_A_GPU,
    "llava-1.5-7b-rl": RL_OF_PRETRAINED | ON_A_GPU | ASKS_FOR_TAGS | dict(llava="llava-hf/llava-1.5-7b-hf"),
}

RECIPES = {
    "llava-v1-7b": CLIP_L | VICUNA_7B_V1 | LLAVA_V1,
    "llava-1.5-7b": CLIP_L_336 | VICUNA_7B | LLAVA_15,
    "llava-1.5-13b": CLIP_L_336 | VICUNA_13B | LLAVA_15,
    # LLaVA-1.5's recipe on parts that one small GPU, or a patient laptop, can train
    "tinyllama-clip-b": CLIP_B | TINYLLAMA | LLAVA_15,
    "smollm2-clip-b": CLIP_B | SMOLLM2 | LLAVA_15 | dict(dtype="float32", checkpointing=False),
    "qwen2.5-0.5b-clip-l": CLIP_L | QWEN_05B | LLAVA_15,
}


# Of --bench, with the sizes of decoders of others. What CLIP adds is small.
BENCH = dict(bench="step", image_size=64, patch=8, clip_layers=4, clip_stem="conv", clip_pool="class", tied=False,
             image_positions=False, rl_batch=8, max_new=48, rl_steps=9)
BENCH_576 = BENCH | dict(image_size=192, max_new=256, rl_steps=3)


def sizes(decoder):
    """Without its name, which would load it, and what belongs to its text."""
    return {name: value for name, value in decoder.items() if name not in ("llm", "template")}


DRAWN = {"scenes": "embedded", "monitors": "monitors"}      # --data of drawn pictures -> its preset


def preset_of(given):
    """The preset for flags that name none. A checkpoint of a run with pretrained parts goes on as these would."""
    data = given.get("data", "scenes")
    if given.get("bench"):
        return "bench"
    named = {name: given[name] for name in ("clip", "llm", "llava") if given.get(name)}
    if data.startswith("llava:") and (named or given.get("init")):
        return "llava"
    if given.get("init") and not named:
        config = load(given["init"]).get("config", {})
        named = {name: config[name] for name in ("clip", "llm", "llava") if config.get(name)}
    if named and data not in DRAWN:
        return "llava-rl" if "llava" in named else "llm-rl"
    return DRAWN.get(data, "images")


# Of the arms of the main comparison and of --compare=generalisation, as --tune chose them on validation prompts of seed
# 100: the ladders stand in rl/report/README.md.
TUNED = ("cot:2e-3,rl:1e-3,grpo_token_kl:5e-4,reinforce:5e-4,negative:1e-3,rejection_first:5e-4,rejection:1.25e-4,"
         "rejection_iterated:2.5e-4,cot_continued:1e-3,filtered:5e-4,sft_direct:1e-3,perfect:2e-3,distilled:1e-3")

TUNED_ON_PARTS = (
    "rl_walks:5e-4,rl_kl_walks:5e-4,filtered_walks:1e-3,replay_walks:2e-3,rejection_walks:1e-3,continued_walks:4e-3,"
    "gold_walks:1e-3,rl_looks:5e-4,rl_kl_looks:5e-4,filtered_looks:2e-3,replay_looks:1e-3,rejection_looks:1e-3,"
    "continued_looks:5e-4,gold_looks:1e-3")

PRESETS = {
    "": preset_of,
    "embedded": dict(rates=TUNED),
    # the main comparison with every arm, followed along its training
    "evidence": dict(compare="evidence", curve=6, rates=TUNED),
    # staged prompting, LLaVA-o1 and RL from one base that knows small skills; the rates are those that --tune chose
    "routes": dict(compare="routes", cot_format="llava_cot", skills=True, max_new=64, sft_steps=400, rl_steps=200,
                   rates="rl_from_base:2.5e-4,llava_o1:2e-3,llava_o1_blind:2e-3,rl_from_o1:2.5e-4",
                   eval_greedy=200, eval_sampled=100),
    # post-training on walks or on looks, tested on all; the rates are those that --tune chose
    "generalisation": dict(compare="generalisation", world="transfer", replay=0.25, rl_steps=100, eval_greedy=200,
                           eval_sampled=100, eval_samples=4, rates=TUNED_ON_PARTS),
    # does thinking grow? Walks longer than any trained one, from a teacher that sometimes looks again
    "long_walks": dict(
        world="long_walks", compare="long_walks", max_new=96, confuse=0.2, drop_hop=0.2, rl_steps=120,
        rates="rl:5e-4,rl_pass_at_k:2.5e-4,rl_curriculum:5e-4,filtered:2e-3,cot_continued:2e-3",
        eval_greedy=100, eval_sampled=60),
    # drawn patient monitors: larger pictures, longer chains; the rates are those that --tune chose
    "monitors": dict(data="monitors", image_size=80, patch=16, pictures=10000, questions=8000, traces=8000,
                     rl_prompts=3200, max_new=48, rates="rl:5e-4,filtered:5e-4,cot_continued:1e-3"),
    # LLaVA-1.5's training of whatever parts are named; a part that is not is a small one, from nothing
    "llava": LLAVA_15 | dict(template="auto", image_positions=False, dtype="float32", checkpointing=False),
    # reinforcement learning of whatever parts, or whole LLaVA, are named
    "llm-rl": RL_OF_PRETRAINED,
    "llava-rl": RL_OF_PRETRAINED | ASKS_FOR_TAGS,
    **RECIPES,
    **RL_RECIPES,
    "images": SMALL_CLIP | dict(align_steps=30, sft_steps=30, cot_steps=100, batch=48, rl_steps=30, rl_batch=16,
                                max_new=48, vocab=1024, save_every=50),
    # a shape for --plan
    "llava-70b": CLIP_L_336 | LLAMA_70B | LLAVA_15,
    # the shape of the step that is timed against other trainers
    "bench": BENCH | dict(width=192, heads=6, kv_heads=6, ff=512),
    "bench-135m": BENCH | sizes(SMOLLM2) | dict(rl_steps=3),
    "bench-0.5b": BENCH_576 | sizes(QWEN_05B),
    "bench-7b": BENCH_576 | sizes(VICUNA_7B) | dict(dtype="bfloat16", lora_rank=16, lora_targets="all",
                                                     checkpointing=True),
    "tiny": dict(clip_width=32, clip_layers=2, clip_heads=2, text_width=32, text_layers=1, text_heads=2, embed=32,
                 width=32, layers=2, heads=2, kv_heads=1, ff=64, pictures=256, questions=256, traces=256, rl_prompts=64,
                 clip_steps=12, clip_batch=32, align_steps=12, sft_steps=8, cot_steps=12, batch=16, rl_steps=8,
                 rl_batch=4, group=4, max_new=16, eval_greedy=8, eval_sampled=4, eval_samples=2, save_every=3),
}
