"""model.projector: what a projector owes the model, and the resampler's own count of its FLOPs."""
import pytest
import torch
from torch import nn

from model import projector
from model.flops import Meter
from model.projector import PROJECTORS
from model.vlm import VLM, VlmConfig
from test_flops import counted, only
from tiny import PATCHES, difference, gradients, make_vlm, prompts, to_batch

FEATURES = torch.randn(3, PATCHES, 12, generator=torch.Generator().manual_seed(0))


def resampler(queries=4):
    return make_vlm(torch.float32, projector="resampler", queries=queries).projector


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_projector_makes_as_many_tokens_as_it_says(name):
    vlm = make_vlm(torch.float32, projector=name, queries=4)
    wanted = vlm.config.image_tokens
    assert wanted == {"linear": PATCHES, "mlp2x_gelu": PATCHES, "resampler": 4}.get(name, wanted)
    assert vlm.projector(FEATURES).shape == (3, wanted, 24)
    assert vlm.image_position.shape == (wanted, 24)


def test_a_projector_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="'mlp3x' must be one of linear, mlp2x_gelu, resampler"):
        VlmConfig(projector="mlp3x")
    with pytest.raises(ValueError, match="queries -1 must be at least 0"):
        VlmConfig(projector="resampler", queries=-1)


def test_a_resampler_makes_a_quarter_of_the_patches_unless_told_otherwise():
    assert VlmConfig(projector="resampler").image_tokens == VlmConfig().clip.patches // 4
    assert VlmConfig(projector="resampler", queries=3).image_tokens == 3


@pytest.mark.parametrize("name, plain", [
    ("linear", lambda: nn.Linear(12, 24)),
    ("mlp2x_gelu", lambda: nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24)))])
def test_names_and_initialisation_are_those_of_plain_layers(name, plain):
    config = make_vlm(projector=name).config
    torch.manual_seed(0)
    given = PROJECTORS[name](config)
    torch.manual_seed(0)
    wanted = plain()
    assert list(given.state_dict()) == list(wanted.state_dict())
    assert all(torch.equal(given.state_dict()[key], wanted.state_dict()[key]) for key in wanted.state_dict())
    assert torch.equal(given(FEATURES), wanted(FEATURES))


class Pooled(nn.Linear):
    """What a user would write: W on the mean of three patches in a row."""

    def __init__(self, config):
        super().__init__(config.clip.width, config.llm.width)

    @staticmethod
    def tokens(config):
        return config.clip.patches // 3

    def forward(self, features):
        return super().forward(features.unflatten(1, (-1, 3)).mean(2))

    def flops(self, pictures):
        return 2 * 3 * pictures * self.weight.numel()

    def backward_flops(self, pictures, features_train=False):
        return 2 * 3 * pictures * self.weight.numel() * self.weight.requires_grad


def test_a_class_and_a_line_of_the_table_make_a_projector(monkeypatch):
    monkeypatch.setitem(PROJECTORS, "pooled", Pooled)
    vlm = make_vlm(projector="pooled")
    rows = prompts(image_tokens=3)
    grads = gradients(vlm, vlm(to_batch(rows)).logp.sum())
    assert grads["projector.weight"].abs().max() > 0 and grads["image_position"].shape == (3, 24)
    meter = Meter()
    meter.update(vlm, to_batch(rows))               # which refuses a module that does not state its cost
    assert meter.total > 0
    again = VLM.from_config(vlm.config_dict(), vlm.state_dict())
    assert torch.equal(again(to_batch(rows)).logp, vlm(to_batch(rows)).logp)


def test_a_projector_that_makes_another_number_of_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(Pooled, "tokens", staticmethod(lambda config: 9))
    monkeypatch.setitem(PROJECTORS, "pooled", Pooled)
    vlm = make_vlm(projector="pooled", image_positions=False)
    with pytest.raises(ValueError, match=r"'pooled' makes 3 tokens of a picture, its tokens\(config\) says 9"):
        vlm(to_batch(prompts()))


# ---------------------------------------------------------------- the resampler

def test_a_resampler_does_not_mind_the_order_of_the_patches_nor_the_pictures_beside():
    made = resampler().double()
    features = FEATURES.double()
    tokens = made(features)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(1))
    assert difference(made(features[:, order]), tokens) < 1e-12
    assert difference(made(features[1:2]), tokens[1:2]) < 1e-12


def test_a_query_gathers_the_mean_where_no_key_stands_out():
    # Keys of zero make all scores equal: every query gathers the mean of the values.
    made = resampler().double()
    nn.init.zeros_(made.k_proj.weight)
    mean = made.v_proj(made.kv_norm(FEATURES.double())).mean(1, keepdim=True)
    assert difference(made(FEATURES.double()), made.o_proj(mean).expand(-1, 4, -1)) < 1e-12


TRAINED = {"everything": only(""), "queries": only("queries"), "norm of the queries": only("q_norm"),
           "norm of the features": only("kv_norm"), "q": only("q_proj"), "keys": only("k_proj"),
           "values": only("v_proj"), "bias of the values": only("v_proj.bias"), "output": only("o_proj"),
           "bias of the output": only("o_proj.bias"), "nothing": only("?")}


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("queries", [1, 4])
def test_flops_of_a_resamplers_forward(queries, pictures):
    made = resampler(queries)
    assert counted(lambda: made(FEATURES[:pictures])) == made.flops(pictures) > 0
    assert made.flops(0) == made.backward_flops(0) == 0


@pytest.mark.parametrize("features_train", [False, True])
@pytest.mark.parametrize("trained", TRAINED)
def test_flops_of_a_resamplers_backward_are_those_of_what_trains(trained, features_train):
    made = resampler()
    TRAINED[trained](made)
    features = FEATURES.clone().requires_grad_(features_train)

    def run():
        tokens = made(features).sum()
        if tokens.requires_grad:
            tokens.backward()
    assert counted(run) == made.flops(3) + made.backward_flops(3, features_train)


def test_flops_of_a_resampler_worked_by_hand():
    # 2 pictures of 9 patches of width 12; 4 queries of width 24, heads 6 of width 4: 24.
    # Forward: q 4 rows of 24 x 24, once; k, v 18 rows of 12 x 24; two products of 4 x 9 x 24 a picture; o 8 rows.
    q, kv, product, o = 4 * 24 * 24, 18 * 12 * 24, 2 * 4 * 9 * 24, 8 * 24 * 24
    made = resampler()
    assert made.flops(2) == 2 * (q + 2 * kv + 2 * product + o)
    # Backward: two for each Linear, weight and input, and five for attention.
    assert made.backward_flops(2) == 2 * (2 * q + 4 * kv + 5 * product + 2 * o)


def test_the_contract_is_written_down():
    for method in ("tokens(config)", "forward(features)", "flops(pictures)",
                   "backward_flops(pictures, features_train=False)"):
        assert method in projector.__doc__
