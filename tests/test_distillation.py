"""On-policy distillation: reverse KL to a teacher on the student's own samples (arXiv 2306.13649), against a loop over
tokens and vocabulary, and against TRL."""
from dataclasses import replace

import pytest
import torch

from model import flops
from model.flops import Meter
from model.runs.config import change
from rl.algorithms import of_stage
from rl.learner import Guard, make_learner
from rl.types import Experience
from rl.update import update
from tiny import VOCAB, difference, make_vlm, prompts, random_completions, stream, to_batch
from train import Config

G, C, T = 3, 5, 0.8
ROWS = prompts()
P = len(ROWS)
IDS = random_completions(P, G, C)
LENGTH = torch.arange(P * G).view(P, G) % C + 1
MASK = torch.arange(C) < LENGTH[..., None]
CFG = change(of_stage(Config(), "distilled"), temperature=T, micro_batch=2)


def student():
    return make_vlm(seed=0)


def teacher(**options):
    """Another size of decoder, other weights; the tower that the student has."""
    vlm = make_vlm(seed=5, llm=dict(width=16, heads=4, kv_heads=4, layers=3, ff=20), **options)
    vlm.visual.load_state_dict(student().visual.state_dict())
    return vlm


def experience():
    none = torch.zeros(P, G, C, dtype=torch.float64)
    return Experience(
        batch=to_batch(ROWS), ids=IDS, mask=MASK, trained=MASK, ended=torch.ones(P, G, dtype=torch.bool),
        rewards=none[..., :1], sampled_logp=none, active=torch.ones(P, dtype=torch.bool), advantage=none)


def distil(policy, other, meter=None):
    """-> (gradient of the policy, metrics, the learner) of one step."""
    learner = make_learner(policy, 24, CFG.algorithm, other)
    taken = []

    def take_step(drop=False):
        taken.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        learner.zero_grad(set_to_none=True)
        return {"grad_norm": 1.0}

    found, _ = update(learner, experience(), CFG, take_step, meter or Meter(), Guard(None, "distilled", 3, None))
    [gradient] = taken
    return gradient, found, learner


def logits(vlm, p, g):
    """Logits (n, V) of every token of a completion, the row by itself, all logits held."""
    prompt = len(ROWS[p][0])
    tokens = IDS[p, g, :LENGTH[p, g]]
    states = stream(vlm, ROWS, p, tokens)[prompt - 1:-1]
    return states @ vlm.llm.head.T / T


def in_loops(policy, other):
    """Mean over tokens of the sum over the vocabulary of p_student (log p_student - log p_teacher)."""
    total = 0.0
    for p in range(P):
        for g in range(G):
            ours = logits(policy, p, g).log_softmax(-1)
            with torch.no_grad():
                theirs = logits(other, p, g).log_softmax(-1)
            for t in range(LENGTH[p, g]):
                for word in range(VOCAB):
                    total = total + ours[t, word].exp() * (ours[t, word] - theirs[t, word])
    return total / LENGTH.sum()


def of(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("own_tower", [False, True])
def test_value_and_gradient_equal_a_loop_over_tokens_and_vocabulary(own_tower):
    policy, other = student(), teacher()
    if own_tower:
        with torch.no_grad():
            other.visual.positional_embedding += 0.3
    gradient, found, learner = distil(policy, other)
    assert learner.shares_tower != own_tower
    wanted = in_loops(policy, other)
    assert found["kl_ref"] == pytest.approx(wanted.item(), rel=1e-12)
    assert found["loss"] == pytest.approx(wanted.item(), rel=1e-12)
    assert difference(gradient, of(policy, wanted)) < 1e-12
    assert all(p.grad is None for p in other.parameters())


def test_trl_computes_the_same_on_the_same_tensors():
    gkd = pytest.importorskip("trl.experimental.gkd", reason="the extra peers brings TRL").GKDTrainer
    policy, other = student(), teacher()
    gradient, found, _ = distil(policy, other)
    ours = torch.cat([logits(policy, p, g) for p in range(P) for g in range(G)])
    theirs = torch.cat([logits(other, p, g) for p in range(P) for g in range(G)]).detach()
    labels = torch.zeros(1, len(ours), dtype=torch.long)
    loss = gkd.generalized_jsd_loss(ours[None], theirs[None], labels=labels, beta=1.0, temperature=1.0)
    assert found["kl_ref"] == pytest.approx(loss.item(), rel=1e-12)
    assert difference(gradient, of(policy, loss)) < 1e-12


@pytest.mark.parametrize("own_tower", [False, True])
def test_a_teacher_costs_its_own_forward_and_head(own_tower):
    policy, other = student(), teacher()
    if own_tower:
        with torch.no_grad():
            other.visual.positional_embedding += 0.3
    alone, meter = Meter(), Meter()
    distil(policy, other, meter)
    for index in torch.arange(P).split(2):
        micro = experience().rows(index).trim()
        batch = policy.encode(micro.batch)
        alone.update(policy, batch, micro.ids.shape, int(micro.mask.sum()), upstream=True)
        read = replace(batch, features=batch.features[:0]) if own_tower else batch
        alone.total += flops.teacher(other, read, micro.ids.shape, rows=0)
        alone.total += flops.exact_kl(policy, other, int(micro.mask.sum()), True)
    assert meter.total == alone.total


def test_a_student_that_is_its_own_teacher_has_no_gradient():
    policy = student()
    gradient, found, _ = distil(policy, student())
    assert abs(found["kl_ref"]) < 1e-15
    assert all(grad.abs().max() < 1e-15 for grad in gradient.values())
