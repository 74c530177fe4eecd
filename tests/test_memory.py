"""Planned memory against tensors that exist; blocks computed again in the backward against blocks kept."""
import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import measure_memory
import train
from model import machine, memory
from model.clip import Clip, ClipConfig
from model.generate import Sampler
from model.llama import LlamaConfig
from model.lora import attach
from model.mixed import mix
from model.memory import Announcer, plan, plan_clip, shape_of, table
from model.optim import make_optimizer, optimizer_step
from model.runs.config import change
from model.vlm import VLM, VlmConfig
from test_flops import TOWERS, AttentionOnly, Gathers
from tiny import gradients, make_vlm, prompts, random_completions, to_batch

ROWS = prompts()
P, G, C = len(ROWS), 3, 5
IDS = random_completions(P, G, C)
LARGER = dict(width=48, ff=100, layers=3)       # so that the few numbers a token, not per width, weigh little
TRAINED = pytest.mark.parametrize("trained", ["all", "W", "lora", "lora_qv"])


def model(trained, dtype=torch.float32, **llm):
    vlm = make_vlm(dtype, llm=LARGER | llm)
    vlm.visual.requires_grad_(False)
    if trained == "W":
        vlm.llm.requires_grad_(False)
    if trained.startswith("lora"):
        attach(vlm.llm, "q_proj,v_proj" if trained == "lora_qv" else "all", 4, 8.0, torch.Generator().manual_seed(0))
    return vlm


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------- blocks computed again

@pytest.mark.parametrize("trained", ["all", "W", "lora"])
@pytest.mark.parametrize("completions", [None, IDS], ids=["targets", "completions"])
def test_checkpointing_changes_no_bit(completions, trained):
    found = []
    for checkpointing in (False, True):
        vlm, ran = model(trained), []
        vlm.llm.checkpointing = checkpointing
        vlm.llm.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
        logp = vlm(to_batch(ROWS), completions).logp
        found.append((logp, gradients(vlm, logp.square().sum())))
        assert len(ran) == 1 + checkpointing
        with torch.no_grad():
            vlm(to_batch(ROWS), completions)
        assert len(ran) == 2 + checkpointing        # without gradients nothing is kept that could be computed again
    (kept, gradients_kept), (again, gradients_again) = found
    assert torch.equal(kept, again) and len(gradients_kept) > 3
    assert gradients_kept.keys() == gradients_again.keys()
    assert all(torch.equal(gradients_kept[name], gradients_again[name]) for name in gradients_kept)


# ---------------------------------------------------------------- exact parts

@TRAINED
@pytest.mark.parametrize("dtype, options", [
    (torch.float32, dict()), (torch.float64, dict()), (torch.bfloat16, dict()), (torch.bfloat16, dict(master=False)),
    (torch.bfloat16, dict(moments="bfloat16")), (torch.bfloat16, dict(moments="bfloat16", master=False))])
def test_weights_gradients_and_optimizer_are_exact(dtype, options, trained):
    vlm = model(trained, dtype)
    planned = plan(vlm, 10, **options)
    assert planned["weights"] == size([*vlm.parameters(), *vlm.buffers()])
    optimizer = make_optimizer(vlm, 0.95, 0.0, **options)
    # Of both streams, so that every parameter that trains has a gradient.
    (vlm(to_batch(ROWS)).logp.sum() + vlm(to_batch(ROWS), IDS).logp.sum()).backward()
    assert planned["gradients"] == size(p.grad for p in vlm.parameters() if p.grad is not None) > 0
    optimizer_step(optimizer, 1e-3, 1.0)
    state = [t for one in optimizer.state.values() for t in one.values() if torch.is_tensor(t)]
    assert planned["optimizer"] == size(state) > 0


def test_optimizer_worked_by_hand():
    # bf16, full training: 2 bytes of weight, 4 of gradient and, with m, v and master in fp32, 12 of state, and a count
    # of each tensor's steps.
    vlm = make_vlm(torch.bfloat16).requires_grad_(True)
    count = sum(p.numel() for p in vlm.parameters())
    found = plan(vlm, 0)
    counts = 4 * len(list(vlm.parameters()))
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * count, 4 * count, 12 * count + counts)
    assert found["activations"] == found["cache"] == 0


def test_cache_is_what_the_sampler_allocates():
    vlm, batch = model("all"), to_batch(ROWS)
    sampler = Sampler(vlm).prefill(batch, G, 7)
    slots = batch.ids.shape[1] + G * 7
    assert plan(vlm, 0, rows=P, cache_tokens=slots)["cache"] == size(t for layer in sampler.cache for t in layer) > 0


# ---------------------------------------------------------------- activations

def kept(run, module):
    """Bytes of the distinct storages that autograd keeps of run(), the module's parameters left out."""
    own, found, alive = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)            # an address is not handed out again while its tensor lives
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
    return sum(count for address, count in found.items() if address not in own)


def one_block(vlm, batch, completions):
    """Bytes kept inside one block of the middle."""
    inside = []

    def only_here(layer, args):
        x, y, *rest = args
        x, y = x.detach().requires_grad_(), None if y is None else y.detach().requires_grad_()
        inside.append(kept(lambda: type(layer).forward(layer, x, y, *rest), layer))

    hook = vlm.llm.layers[1].register_forward_pre_hook(only_here)
    vlm.llm.checkpointing = False
    vlm(batch, completions)
    hook.remove()
    return inside[0]


@TRAINED
@pytest.mark.parametrize("llm", [dict(), dict(kv_heads=6), dict(tied=True, qkv_bias=True, qk_norm=True),
                                 dict(head_width=16)], ids=["grouped", "all heads", "qk_norm", "wide heads"])
@pytest.mark.parametrize("completions", [None, IDS], ids=["targets", "completions"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_activations_are_what_autograd_keeps(checkpointing, completions, llm, trained):
    vlm = model(trained, **llm)
    batch = vlm.encode(to_batch(ROWS))
    tokens, own = batch.ids.numel(), 0
    if completions is not None:
        tokens, own = tokens + completions.numel(), completions.numel()
    found = one_block(vlm, batch, completions) if checkpointing else 0
    vlm.llm.checkpointing = checkpointing
    found += kept(lambda: vlm(batch, completions).logp.sum(), vlm)
    assert abs(plan(vlm, tokens, completion_tokens=own)["activations"] / found - 1) < 0.05


@pytest.mark.parametrize("trained", ["all", "W"])
@pytest.mark.parametrize("completions", [None, IDS], ids=["targets", "completions"])
def test_mixed_precision_keeps_bf16_inputs_and_weights(completions, trained):
    vlm = model(trained)
    batch = vlm.encode(to_batch(ROWS))
    tokens, own = batch.ids.numel(), 0
    if completions is not None:
        tokens, own = tokens + completions.numel(), completions.numel()
    weights = plan(vlm, tokens)["weights"]
    mix(vlm.llm)
    planned = plan(vlm, tokens, completion_tokens=own)
    copies = planned["weights"] - weights
    linears = [p for name, p in vlm.llm.layers.named_parameters() if name.endswith("proj.weight")]
    assert copies == 2 * sum(p.numel() for p in linears)
    found = kept(lambda: vlm(batch, completions).logp.sum(), vlm)
    assert abs((planned["activations"] + copies) / found - 1) < 0.05


def test_activations_worked_by_hand():
    # fp32, width 24, 6 heads of 4, ff 28, 2 layers, head of its own, all trained. A block keeps of a token 4 D of norms
    # and inputs, 4 D of q, k, v and output, 6 sums of the heads, 4 ff; then come last norm, states and 20 bytes.
    block = 4 * (8 * 24 + 6 + 4 * 28)
    vlm = make_vlm(torch.float32)
    assert plan(vlm, 7)["activations"] == 7 * (2 * block + 4 * 2 * 24 + 20)
    vlm.llm.checkpointing = True
    assert plan(vlm, 7)["activations"] == 7 * (block + 2 * 4 * 24 + 4 * 2 * 24 + 20)


@pytest.mark.parametrize("clip", [dict(layers=3), dict(layers=3, stem="mlp", pool="mean", ff=31, act="gelu")],
                         ids=["conv, class", "mlp, mean"])
@pytest.mark.parametrize("trained", TOWERS)
def test_activations_of_a_tower_are_what_autograd_keeps(trained, clip):
    vlm = make_vlm(torch.float32, clip=clip)
    TOWERS[trained](vlm)
    pixels = to_batch(ROWS).pixels
    planned = plan(vlm, 50, pictures=4)["activations"] - plan(vlm, 50, pictures=0)["activations"]
    assert planned == kept(lambda: vlm.visual.features(pixels, vlm.config.feature_layer), vlm.visual)


def test_activations_of_a_tower_worked_by_hand():
    # fp32, width 12, 3 heads, ff 48; of two blocks the first is used. A token leaves 4 D of norms and inputs, 4 D of q,
    # k, v and output, 3 ff, 3 sums of the heads, two means and deviations; a picture is 9 patches and a class token.
    vlm = make_vlm(torch.float32)
    frozen = plan(vlm, 50)["activations"]
    vlm.visual.transformer.resblocks[-1:].requires_grad_(True)
    picture = 10 * 4 * (8 * 12 + 3 * 48 + 3 + 4)
    assert plan(vlm, 50, pictures=3)["activations"] == frozen + 3 * picture
    assert plan(vlm, 50)["activations"] == frozen + 5 * picture         # 50 tokens hold 5 pictures of 9


def test_what_cannot_be_planned_is_refused_or_told():
    vlm = make_vlm(torch.float32)
    vlm.visual.requires_grad_(False)
    vlm.llm.layers[1] = AttentionOnly(vlm.llm.config)
    assert table("sft", vlm, 9).endswith(", without the activations of 1 modules of another class")
    assert plan(vlm, 9)["activations"] < plan(make_vlm(torch.float32), 9, pictures=0)["activations"]
    vlm.projector = Gathers()
    with pytest.raises(ValueError, match="projector is a Gathers, whose FLOPs are not known here"):
        plan(vlm, 9)


def test_nothing_that_trains_keeps_nothing():
    vlm = make_vlm().requires_grad_(False)
    found = plan(vlm, 100)
    assert found["weights"] > 0 and not any(found[name] for name in ("gradients", "optimizer", "activations", "cache"))


# ---------------------------------------------------------------- a 7B that is not there

@pytest.fixture
def seven():
    clip = ClipConfig(image_size=336, patch=14, width=1024, layers=24, heads=16, embed=768)
    llm = LlamaConfig(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, ff=11008, tied=False)
    with torch.device("meta"):
        vlm = VLM(VlmConfig(clip, llm, projector="mlp2x_gelu")).bfloat16()
    vlm.visual.requires_grad_(False)
    return vlm


def test_a_7b_is_planned_without_weights(seven):
    decoder, projector = 6738415616, 1024 * 4096 + 4096 + 4096 * 4096 + 4096      # LLaMA's own count; two layers
    found = plan(seven, 2048)
    tensors = 3 + 9 * 32 + 4            # each with a count of its steps
    assert found["gradients"] == 4 * (decoder + projector)
    assert found["optimizer"] == 12 * (decoder + projector) + 4 * tensors
    attach(seven.llm, "all", 8, 16.0)
    # Rank 8 on q, k, v, o (4096 x 4096) and gate, up, down (4096 x 11008) of 32 blocks.
    pairs = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert plan(seven, 2048)["gradients"] == 4 * (pairs + projector)
    # 576 + 448 slots of 32 layers, keys and values, of 4096 numbers of 2 bytes: 512 MiB a prompt.
    assert plan(seven, 0, rows=3, cache_tokens=1024)["cache"] == 3 * 512 * 2 ** 20


def test_the_table_says_what_trains_and_what_it_takes(seven):
    attach(seven.llm, "all", 8, 16.0)
    seven.llm.checkpointing = True
    lines = table("sft", seven, 2048).splitlines()
    words = {line[18:34].strip(): line[34:].split() for line in lines}
    assert all(line.startswith("  sft ") for line in lines)
    assert list(words) == ["visual", "projector", "llm", "adapters", "memory"]
    assert words["visual"][3:] == ["frozen"] and words["projector"][3:] == ["trains"] and words["llm"][3:] == ["partly"]
    assert words["adapters"] == ["19.988", "M", "parameters", "trains,", "part", "of", "llm"]
    memory = lines[-1]
    parts = {name: float(re.search(rf"{name} ([\d.]+)", memory)[1])
             for name in ("weights", "gradients", "optimizer", "activations")}
    assert words["memory"][1:3] == ["GiB", "planned:"] and "for 2048 tokens" in memory and "cache" not in memory
    assert abs(sum(parts.values()) - float(words["memory"][0])) < 0.21 and 12.5 < parts["weights"] < 14


def test_the_table_names_image_positions():
    assert "  rl              image_position      0.000 M parameters   trains" in table("rl", make_vlm(), 9)


@pytest.mark.parametrize("name", ["tokens", "rows", "cache_tokens", "completion_tokens", "pictures"])
def test_a_negative_count_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} -1 must be at least 0"):
        plan(make_vlm(), **dict(tokens=1) | {name: -1})


# ---------------------------------------------------------------- beside the model

CPU = torch.device("cpu")


@pytest.mark.parametrize("clip", [dict(), dict(stem="mlp", pool="mean")], ids=["conv, class", "mlp, mean"])
def test_activations_of_clip_are_what_autograd_keeps(clip):
    # Wide enough that what is left out, the pooled states and the loss, weighs little.
    config = ClipConfig(image_size=32, patch=4, width=48, layers=3, heads=4, embed=16, text_width=40, text_layers=3,
                        text_heads=4, text_length=20, vocab=50, **clip)
    model = Clip(config)
    pixels = torch.randn(3, 3, 32, 32)
    ids = torch.randint(50, (3, 14))
    found = kept(lambda: model.encode_image(pixels).sum() + model.encode_text(ids, torch.tensor([14, 9, 3])).sum(),
                 model)
    planned = plan_clip(model, 3, 14)
    assert abs(planned["activations"] / found - 1) < 0.05
    assert planned["weights"] == planned["gradients"] == size(model.parameters())


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_a_reference_takes_what_its_copy_takes(trained):
    vlm = model(trained)
    switches = SimpleNamespace(kl_coef=0.1, ref_sync=1, baseline="mean", critic="shared")
    own = {p.data_ptr() for p in vlm.parameters()}
    copied = size(p for p in vlm.twin().parameters() if p.data_ptr() not in own)
    assert memory.reference(vlm, switches) == copied > 0
    switches.ref_sync = 0               # adapters are turned off in place of a copy
    assert memory.reference(vlm, switches) == (0 if trained == "lora" else copied)
    switches.kl_coef = 0
    assert memory.reference(vlm, switches) == 0
    switches.baseline, switches.critic = "critic", "separate"
    assert memory.reference(vlm, switches) > 2 * copied


def test_a_critic_with_a_decoder_of_its_own_keeps_as_much_as_the_policy(capsys):
    vlm = model("all")
    activations = {}
    for critic in ("shared", "separate"):
        cfg = change(train.Config(), baseline="critic", std="batch", critic=critic)
        Announcer(CPU).stage("rl", vlm, cfg, 20, samples=True)
        activations[critic] = float(re.search(r"activations ([\d.]+)", capsys.readouterr().out)[1])
    assert activations["separate"] == pytest.approx(2 * activations["shared"], rel=0.05)


def test_the_moment_worked_by_hand():
    # fp32, width 24, ff 28, 37 pieces: logits of 7 tokens and a second gradient of the head, which trains; frozen, the
    # gradients inside a block of 7 tokens. In bf16 the optimizer takes the gradient and the root of one weight in fp32.
    vlm = make_vlm(torch.float32)
    assert memory.moment(vlm, 7, CPU) == 4 * 37 * (7 + 24)
    assert memory.moment(vlm.requires_grad_(False), 7, CPU) == 4 * 7 * (3 * 28 + 2 * 24)
    vlm = make_vlm(torch.bfloat16, llm=dict(vocab=5000)).requires_grad_(True)
    assert memory.moment(vlm, 1, CPU, moments="bfloat16", master=False) == 4 * 5 * 5000 * 24


def test_small_blocks_leave_holes_in_the_heap_of_a_cpu():
    assert memory.holes(100, 576, 4, 77, gives_back=True) == 77
    assert memory.holes(200, 576, 4, 77, gives_back=True) == 0      # 450 KiB: pages of its own
    assert memory.holes(900, 128, 4, 77, gives_back=True) == 77     # as much, of a narrow decoder
    assert memory.holes(900, 576, 4, 77, gives_back=False) == 77


@pytest.mark.parametrize("room, gives_back", [(3 * 10 ** 9, False), (2 * 10 ** 9, True), (None, False)])
def test_blocks_get_pages_of_their_own_where_a_stage_may_take_half_of_the_room(room, gives_back, monkeypatch):
    told = []
    monkeypatch.setattr(machine, "give_blocks_back", told.append)
    monkeypatch.setattr(machine, "room", lambda device: room)
    announcer = memory.Announcer(CPU)
    model = torch.nn.Linear(2, 2, device="meta")
    planned = dict(weights=4 * 10 ** 8, activations=4 * 10 ** 8, held=10 ** 12)     # and as much in holes
    lost = announcer.holes(model, 900, 576, 4, planned)
    assert told == [576] * gives_back
    assert lost == (0 if gives_back else 4 * 10 ** 8)


def test_micro_batches_are_as_long_as_the_longest_record():
    cfg = train.Config()
    cfg = dataclasses.replace(cfg, supervised=dataclasses.replace(cfg.supervised, batch=100, align_batch=7))
    assert shape_of("sft", cfg, 29, False) == (48, 48 * 29, {})
    assert shape_of("align", cfg, 29, False) == (7, 7 * 29, {})
    # 32 prompts of 29 tokens, 8 completions of 32 each.
    sampling = dict(rows=32, cache_tokens=29 + 256, completion_tokens=32 * 256)
    assert shape_of("rl", cfg, 29, True) == (32, 32 * (29 + 256), sampling)
    cfg = dataclasses.replace(cfg, sampling=dataclasses.replace(cfg.sampling, rollout_rows=70))
    assert shape_of("rl", cfg, 29, True)[2] == sampling | dict(rows=8)


def test_a_plan_beyond_the_machine_is_warned_of(monkeypatch, capsys):
    announcer = Announcer(CPU)
    vlm = make_vlm(torch.float32)
    cfg = train.Config()
    monkeypatch.setattr(machine, "room", lambda device: None)
    assert not announcer.stage("sft", vlm, cfg, 30, samples=False)
    monkeypatch.setattr(machine, "room", lambda device: 2 ** 40)
    assert not announcer.stage("sft", vlm, cfg, 30, samples=False)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(machine, "room", lambda device: 2 ** 20)
    assert announcer.stage("rl", vlm, cfg, 30, samples=True)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert "stage rl" in line and "0.0 GiB of the machine are free" in line and "--micro-batch" in line


def test_what_is_there_already_asks_for_no_more_room(monkeypatch, capsys):
    announcer = Announcer(CPU)
    vlm = make_vlm(torch.float32)
    planned = dict(weights=2 ** 30, held=2 ** 32, activations=2 ** 20)
    monkeypatch.setattr(machine, "room", lambda device: 2 ** 21)
    assert not announcer.warn("sft", vlm, planned)
    assert announcer.warn("sft", vlm.to("meta"), planned)       # its weights are still to come


def test_room_is_the_least_of_the_machines_and_the_containers(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "number_after", lambda name, path: dict(MemAvailable=9000, VmRSS=400)[name])
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "LIMITS", (str(tmp_path / "none"), str(limit)))
    assert machine.room(CPU) == 9000
    limit.write_text("max\n")
    assert machine.room(CPU) == 9000
    limit.write_text("1000\n")
    assert machine.room(CPU) == 600
    monkeypatch.setattr(machine, "number_after", lambda name, path: None)
    monkeypatch.setattr(machine, "LIMITS", ())
    assert machine.room(CPU) is None


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's files")
def test_what_the_process_holds_is_seen_and_warming_up_draws_no_number():
    usage = machine.Usage(machine.resident())
    torch.manual_seed(0)
    before = usage.held()
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))
    block = torch.ones(2 ** 24)
    assert 0.9 < (usage.held() - before) / block.nbytes < 1.2


@pytest.mark.parametrize("folder_of", ["scenes", "jsonl"])
def test_a_run_plans_with_the_lengths_of_its_records(folder_of, tmp_path, capsys):
    from test_real_run import colours
    data = "scenes" if folder_of == "scenes" else f"jsonl:{colours(tmp_path, reasoning=True)}"
    train.main(["--preset=tiny", "--vocab=400", f"--data={data}", "--image-size=48", "--patch=12", "--threads=1",
                "--stage=clip,align,sft,cot", f"--out={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    tokens = {stage: int(count) for stage, count in re.findall(r"  (\w+) +memory .* for (\d+) tokens", said)}
    assert [*tokens] == ["clip", "align", "sft", "cot"]
    # 16 records a step, each with 16 tokens of its picture: multiples of 16, and no longer than the longest.
    assert all(tokens[stage] % 16 == 0 and 16 * 17 < tokens[stage] < 16 * 90 for stage in ("align", "sft", "cot"))
    assert tokens["sft"] < tokens["cot"]


@pytest.fixture
def small_llama(tmp_path):
    """A random decoder's folder, of 20 M parameters, with a small tokenizer."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    from test_templates import JSON
    config = HFConfig(vocab_size=320, hidden_size=384, intermediate_size=1024, num_hidden_layers=12,
                      num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0,
                      eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").write_text(JSON)
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(
        dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's files")
def test_the_plan_lies_within_a_quarter_of_the_peak_of_every_stage(tmp_path, small_llama):
    (tmp_path / "embedded").mkdir()
    found = {"embedded": measure_memory.measure(tmp_path / "embedded", []),
             "decoder with LoRA": measure_memory.with_decoder(tmp_path, small_llama / "llm")}
    for title, rows in found.items():
        print(f"\n{title}\n{measure_memory.text(rows)}")
        assert [stage for stage, *_ in rows] == [*measure_memory.STAGES]
        assert all(abs(planned / peak - 1) < 0.25 for _, planned, peak in rows), title
