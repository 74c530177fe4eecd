"""What --plan prints: memory of a rank against the shards that sharding makes, seconds by hand."""
import os
from dataclasses import replace

import pytest
import torch

import measure_ranks
import train
from model import cards, flops, memory, peaks
from model.cards import (OPTIMIZER_BYTES, Work, exchange_seconds, gather_seconds, memory_of, parts_of, rollout_seconds,
                         seconds_of)
from model.peaks import CPU_EFFICIENCY, EFFICIENCY, Card
from model.runs.config import change
from tiny import make_vlm

# 1 FLOP/s, 1 byte/s and the like: what is left of a time is the count.
SLOW = Card(flops=1 / EFFICIENCY["matmul"], memory=1.0, bandwidth=1 / EFFICIENCY["bandwidth"],
            inside=1 / EFFICIENCY["exchange"], outside=0.1 / EFFICIENCY["exchange"], of_a_node=4)
OPTIM = train.Config().optim
RL = Work(prompts=4, micro=2, tokens=15, group=3, new=6)
SFT = Work(prompts=4, micro=2, tokens=15)


def numbers(parameters):
    return sum(p.numel() for p in parameters)


def early_numbers(vlm):
    """Of what lies around the blocks that whose gradient is there before the embedding's."""
    _, around, _ = parts_of(vlm)
    return numbers(around) - vlm.llm.embed_tokens.weight.numel()        # the tests' heads are not tied


def test_a_plan_is_a_card_and_a_number():
    assert cards.parse("h200x64") == ("h200", 64)
    assert cards.parse("cpux2") == ("cpu", 2)
    for wrong in ("h100", "x8", "h100x0", "tpux8", "h100x8x", "cpu", "cpux0", "cpux257"):
        with pytest.raises(ValueError, match=f"--plan={wrong} must be CARDxN"):
            cards.parse(wrong)


def test_on_one_card_memory_is_that_of_the_plan_of_one_process():
    vlm = make_vlm(torch.bfloat16)
    tokens = RL.micro * (15 + 18)
    whole = memory.plan(vlm, tokens, 4, 33, OPTIM.moments, OPTIM.master, RL.micro * 18, RL.micro)
    for shard in ("none", "full"):
        found = memory_of(vlm, RL, shard, 1, 8, OPTIM)
        assert {name: found[name] for name in ("weights", "gradients", "optimizer")} == {
            name: whole[name] for name in ("weights", "gradients", "optimizer")}


@pytest.mark.parametrize("shard, ranks, holders", [("full", 2, 2), ("full", 16, 16), ("hybrid", 16, 4)])
def test_in_shards_a_rank_holds_its_part_in_fp32_and_the_tower_whole(shard, ranks, holders):
    vlm = make_vlm(torch.bfloat16)
    blocks, around, tower = parts_of(vlm)
    held = numbers(p for block in blocks for p in block) + numbers(around)
    assert held + numbers(tower) == numbers(vlm.parameters())
    found = memory_of(vlm, SFT, shard, ranks, 4, OPTIM)
    assert found["weights"] == 2 * numbers(tower) + 4 * held // holders
    assert found["optimizer"] == 8 * held // holders
    # Two blocks, the one at work and the next, and what lies around them; gradients of a block beside the shards, and
    # those of what lies around, whole, as they are.
    assert found["gathered"] == 2 * (2 * numbers(blocks[0]) + numbers(around))
    assert found["gradients"] == 4 * held // holders + 4 * numbers(blocks[0]) + 2 * early_numbers(vlm)


def test_with_many_ranks_the_whole_weights_that_are_loaded_set_the_peak():
    vlm = make_vlm(torch.bfloat16, llm=dict(layers=40))
    blocks, around, tower = parts_of(vlm)
    held = numbers(p for block in blocks for p in block) + numbers(around)
    small = replace(SFT, micro=1, tokens=2)
    found = memory_of(vlm, small, "full", 1024, 8, OPTIM)
    assert found == dict(weights=2 * numbers(tower), loaded=2 * held + 4 * numbers(blocks[0]))
    copied = memory_of(vlm, small, "full", 1024, 8, OPTIM, twin=True)
    assert copied["loaded"] == found["loaded"] + memory.twin(vlm)


def test_on_a_cpu_the_first_rank_holds_whole_weights_while_it_saves():
    vlm = make_vlm(torch.float32, llm=dict(layers=40))
    blocks, around, tower = parts_of(vlm)
    held = [p for block in blocks for p in block] + around
    found = memory_of(vlm, replace(SFT, micro=1, tokens=2), "full", 16, 16, OPTIM, device=torch.device("cpu"))
    assert found["saved"] == 4 * numbers(held) + 4 * max(p.numel() for p in held)
    assert found["weights"] == 4 * numbers(tower) + 4 * numbers(held) // 16
    assert found["optimizer"] == 8 * numbers(held) // 16


def test_a_heap_with_room_keeps_holes():
    vlm = make_vlm(torch.float32)
    cpu = torch.device("cpu")
    long = replace(SFT, micro=4, tokens=20000)
    tight, roomy = (memory_of(vlm, long, "none", 1, 1, OPTIM, device=cpu, gives_back=tells) for tells in (True, False))
    assert tight["holes"] == 0 and roomy["holes"] == roomy["activations"]


def test_the_larger_of_rollout_and_update_counts():
    vlm = make_vlm(torch.bfloat16)
    long = replace(RL, group=50, new=1000, prompts=64)
    assert memory_of(vlm, long, "full", 2, 8, OPTIM)["cache"] > 0
    assert "activations" not in memory_of(vlm, long, "full", 2, 8, OPTIM)
    assert "activations" in memory_of(vlm, replace(RL, prompts=2), "full", 2, 8, OPTIM)


@pytest.mark.slow
def test_the_plan_lies_within_a_fifth_of_the_peak_of_every_rank_that_holds_the_most(tmp_path):
    # SEETHINK_PEAKS=1: of 200 M parameters, on 1, 2 and 4 ranks.
    size, counts = ("large", [1, 2, 4]) if os.environ.get("SEETHINK_PEAKS") else ("small", [2])
    found = measure_ranks.measure(tmp_path, size, counts)
    print(f"\n{measure_ranks.text(found)}")
    assert len(found) == 2 * len(counts)
    assert all(abs(sum(planned.values()) / max(peaks) - 1) < 0.2 for _, _, planned, peaks in found)


def test_seconds_are_flops_and_bytes_over_the_rates():
    vlm = make_vlm(torch.bfloat16)
    batch = SFT.batch(2)
    found = seconds_of(vlm, SFT, "none", 1, SLOW)
    assert found["update"] == pytest.approx(2 * (flops.update(vlm, batch) + flops.encode(vlm, 2)))
    assert found["exchange"] == 0
    trained = numbers(p for p in vlm.parameters() if p.requires_grad)
    assert found["optimizer"] == pytest.approx(OPTIMIZER_BYTES * trained)
    blocks, around, _ = parts_of(vlm)
    held = 2 * (numbers(p for block in blocks for p in block) + numbers(around))
    prompts = flops.encode(vlm, 4) + flops.prompt(vlm, RL.batch(4))
    multiplied = flops.cached(vlm.llm, 12, 15 + 3) + flops.head(vlm.llm, 12)
    assert rollout_seconds(vlm, RL, held, SLOW) == pytest.approx(prompts + 6 * multiplied)      # more than it reads
    wide = replace(SLOW, flops=1e12)
    read = held + 4 * (15 + 9) * memory.slot(vlm.llm)
    assert rollout_seconds(vlm, RL, held, wide) == pytest.approx(6 * read, rel=1e-6)


def test_what_ranks_send_is_counted_by_the_ring():
    vlm = make_vlm(torch.bfloat16)
    blocks, around, _ = parts_of(vlm)
    held = numbers(p for block in blocks for p in block) + numbers(around)
    shown = 1 - EFFICIENCY["hidden"]
    assert exchange_seconds(vlm, SFT, "none", 4, SLOW) == pytest.approx(2 * 3 / 4 * 4 * held)
    assert exchange_seconds(vlm, SFT, "none", 8, SLOW) == pytest.approx(10 * 2 * 7 / 8 * 4 * held)
    # Two micro-batches: four times weights in bf16, twice gradients in fp32; a rollout waits for all weights.
    assert exchange_seconds(vlm, SFT, "full", 4, SLOW) == pytest.approx(3 / 4 * 16 * held * shown)
    assert exchange_seconds(vlm, RL, "full", 4, SLOW) == pytest.approx(3 / 4 * 16 * held * shown)
    assert gather_seconds(2 * held, "full", 4, SLOW) == pytest.approx(3 / 4 * 2 * held)
    assert gather_seconds(2 * held, "none", 4, SLOW) == 0
    assert exchange_seconds(vlm, SFT, "hybrid", 8, SLOW) == pytest.approx(
        3 / 4 * 16 * held * shown + 10 * 2 * 2 * 4 * held / 4 * shown)


def test_a_critic_of_its_own_is_a_second_decoder_that_trains():
    vlm = make_vlm(torch.bfloat16)
    both = replace(RL, critic=True)
    alone = memory_of(vlm, RL, "none", 1, 4, OPTIM)
    found = memory_of(vlm, both, "none", 1, 4, OPTIM)
    assert found["critic"] == memory.twin(vlm) + alone["gradients"] + alone["optimizer"]
    blocks, around, _ = parts_of(vlm)
    held = numbers(p for block in blocks for p in block) + numbers(around)
    alone = memory_of(vlm, RL, "full", 8, 4, OPTIM)
    found = memory_of(vlm, both, "full", 8, 4, OPTIM)
    # fp32 weights and two moments in shards; gradients of a block are there for one decoder at a time, those of what
    # lies around the blocks for both.
    assert found["critic"] == 12 * held // 8
    assert found["gradients"] == alone["gradients"] + 4 * held // 8 + 2 * early_numbers(vlm)
    assert found["gathered"] == 2 * alone["gathered"] and found["activations"] == 2 * alone["activations"]
    batch = RL.batch(2)
    more = flops.update(vlm, batch, (2, 3, 6), rows=0) + flops.forward(vlm, batch, (2, 3, 6), rows=0)
    assert (seconds_of(vlm, both, "none", 1, SLOW)["update"] - seconds_of(vlm, RL, "none", 1, SLOW)["update"]
            == pytest.approx(2 * more))
    # In two micro-batches: gathered four times more, and twice to score; gradients in fp32 twice.
    more = exchange_seconds(vlm, both, "full", 4, SLOW) - exchange_seconds(vlm, RL, "full", 4, SLOW)
    assert more == pytest.approx(3 / 4 * (6 * 2 + 2 * 4) * held * (1 - EFFICIENCY["hidden"]))


@pytest.mark.parametrize("options, scored, exact, critic", [
    (dict(), 0, False, False), (dict(epochs=2), 1, False, False), (dict(top_entropy=0.5), 1, False, False),
    (dict(correct="mask"), 1, False, False), (dict(baseline="critic", std="batch"), 1, False, False),
    (dict(baseline="critic", std="batch", critic="separate"), 1, False, True), (dict(kl_coef=0.1), 1, False, False),
    (dict(kl_coef=0.1, kl_in="reward"), 2, False, False), (dict(kl_coef=0.1, kl="exact"), 0, True, False),
    (dict(kl_coef=0.1, kl="exact", kl_in="reward"), 2, False, False), (dict(critic="separate"), 0, False, False)])
def test_forwards_are_those_that_score_and_the_update_ask_for(options, scored, exact, critic):
    work = cards.work_of(change(train.Config(), **options), "rl", 9, 6, 1)
    assert (work.scored, work.exact, work.critic) == (scored, exact, critic)


def test_a_scored_reference_is_gathered_once_one_of_an_exact_kl_once_a_micro_batch():
    vlm = make_vlm(torch.bfloat16)
    blocks, around, _ = parts_of(vlm)
    held = 2 * (numbers(p for block in blocks for p in block) + numbers(around))
    base = exchange_seconds(vlm, replace(RL, passes=3), "full", 4, SLOW)
    for options, gathers in ((dict(scored=1), 2), (dict(exact=True), 6)):
        more = exchange_seconds(vlm, replace(RL, passes=3, **options), "full", 4, SLOW) - base
        assert more == pytest.approx(3 / 4 * gathers * held * (1 - EFFICIENCY["hidden"]))


@pytest.mark.parametrize("flags, said", [
    (["--stage=foo"], "--stage=foo: 'foo' must be one of clip, align"),
    (["--stage=teach"], "--stage=teach: 'teach' must be one of clip, align"),
    (["--grid=norm=token"], "--grid=norm=token must be left out beside --plan"), (["--seeds=2"], "--seeds=2 must be"),
    (["--tune=rl", "--seed=100"], "--tune=rl must be"), (["--bench=step"], "--bench=step must be"),
    (["--stage=clip", "--plan=h100"], "--plan=h100 must be CARDxN")])
def test_what_a_plan_cannot_tell_is_refused_in_one_sentence(flags, said, capsys):
    with pytest.raises(ValueError, match=said):
        train.main(["--plan=h100x8", *flags])
    assert not capsys.readouterr().out


def test_of_clip_a_plan_says_that_it_has_no_table(capsys):
    train.main(["--plan=h100x8", "--stage=clip"])
    assert capsys.readouterr().out.startswith("clip: no table")


def test_the_table_names_its_assumptions_and_what_does_not_fit(capsys):
    train.main(["--preset=llava-1.5-7b", "--stage=rl", "--plan=h100x16"])
    title, assumed, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("rl, 7.05 G parameters, a card: 1 prompt of 636 tokens (60 of them text, assumed), "
                            "8 completions of 128 tokens each")
    assert "modelled from assumed peaks" in assumed
    assert [tuple(row.split()[:2]) for row in rows] == [
        ("1", "none"), ("8", "none"), ("8", "full"), *((str(count), shard) for count in (16, 64, 1024)
                                                       for shard in ("none", "full", "hybrid"))]
    assert [row.endswith("does not fit 75 GiB") for row in rows] == [row.split()[1] == "none" for row in rows]
    with pytest.raises(ValueError, match="--plan=h100 must be CARDxN"):
        train.main(["--preset=llava-1.5-7b", "--plan=h100"])


def test_prompts_are_dealt_out_over_the_cards_that_were_asked_for():
    cfg = change(train.Config(), rl_batch=64, micro_batch=4, group=8, max_new=100, epochs=2)
    work = cards.work_of(cfg, "rl", 576, 60, 16)
    assert (work.prompts, work.micro, work.tokens, work.passes, work.scored, work.micros) == (4, 4, 636, 2, 1, 2)
    assert cards.work_of(cfg, "sft", 576, 60, 64).prompts == 1


# ---------------------------------------------------------------- this machine's CPU

CPU = Card(flops=1e11, memory=1e10, bandwidth=1e10, inside=4e8, outside=4e8, of_a_node=2, sums=1e9, operation=3e-6,
           shares=CPU_EFFICIENCY)


@pytest.mark.parametrize("work", [SFT, RL, replace(RL, scored=1, passes=2)])
def test_on_a_cpu_more_of_anything_takes_longer_and_a_better_one_less(work):
    vlm = make_vlm(torch.float32)
    whole = sum(seconds_of(vlm, work, "full", 2, CPU).values())
    assert whole > 0
    for more in (dict(prompts=8), dict(tokens=30), dict(micro=1)):          # micro-batches: more calls, more gathering
        assert sum(seconds_of(vlm, replace(work, **more), "full", 2, CPU).values()) > whole
    deeper = make_vlm(torch.float32, llm=dict(layers=5))
    assert sum(seconds_of(deeper, work, "full", 2, CPU).values()) > whole
    for better in (dict(flops=2e11), dict(bandwidth=2e10), dict(inside=8e8), dict(operation=1e-6)):
        assert sum(seconds_of(vlm, work, "full", 2, replace(CPU, **better)).values()) < whole
    assert (exchange_seconds(vlm, work, "none", 2, replace(CPU, sums=0.0))
            == pytest.approx(2.5 * exchange_seconds(vlm, work, "none", 2, CPU)))


def test_a_cpus_update_is_products_traffic_and_calls():
    vlm = make_vlm(torch.float32)
    kept = memory.plan(vlm, 2 * SFT.tokens, pictures=2)["activations"]
    multiplied = flops.update(vlm, SFT.batch(2)) + flops.encode(vlm, 2)
    calls = vlm.llm.config.layers * 175 * 2 * 3e-6
    # Two micro-batches: products at .8 of the peak, what autograd keeps five times over the memory, two units a call.
    assert seconds_of(vlm, SFT, "none", 1, CPU)["update"] == pytest.approx(
        2 * (multiplied / 0.8e11 + 5 * kept / 1e10 + calls))


def test_a_core_reads_weights_and_multiplies_one_after_the_other():
    vlm = make_vlm(torch.float32)
    silent = replace(CPU, operation=0.0)
    both = rollout_seconds(vlm, RL, 1e6, silent)
    reads = rollout_seconds(vlm, RL, 1e6, replace(silent, flops=1e30))
    multiplies = rollout_seconds(vlm, RL, 1e6, replace(silent, bandwidth=1e30))
    assert both == pytest.approx(reads + multiplies)


@pytest.mark.parametrize("ranks", [1, 2])
def test_this_machine_is_measured_and_shared_by_its_ranks(ranks, monkeypatch, capsys):
    for name, few in dict(MATMUL=128, READ=2 ** 18, SENT=2 ** 10, SMALL=10).items():
        monkeypatch.setattr(peaks, name, few)
    threads = torch.get_num_threads()
    card = peaks.cpu.__wrapped__(ranks)
    assert torch.get_num_threads() == threads
    assert card.memory * ranks == peaks.whole_memory() and card.of_a_node == ranks
    assert min(card.flops, card.bandwidth, card.inside, card.sums, card.operation) > 0
    monkeypatch.setattr(cards, "card_of", lambda name, count: card)
    train.main([f"--plan=cpux{ranks}", "--stage=sft", "--preset=tiny"])
    title, *lines = capsys.readouterr().out.splitlines()
    counts = sorted({1, ranks})
    assert all(line.startswith("modelled from measured peaks x assumed shares of a CPU")
               for line in lines[:len(counts)])
    assert [tuple(line.split()[:2]) for line in lines[len(counts) + 1:]] == [("1", "none"), ("2", "none"),
                                                                             ("2", "full")][:2 * ranks - 1]
