"""The decoder's x stream against transformers' LlamaForCausalLM, with random weights moved over by name."""
import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from model.llama import Llama, LlamaConfig
from tiny import difference, gradients, shake

CONFIG = dict(vocab=41, width=24, layers=3, heads=6, kv_heads=2, ff=35, theta=5000.0, eps=1e-3, tied=False)
IDS = torch.randint(41, (2, 13), generator=torch.Generator().manual_seed(1))
LABELS = torch.where(torch.arange(13) % 3 == 0, -100, IDS)


def reference(tied):
    c = CONFIG
    torch.manual_seed(0)
    model = LlamaForCausalLM(HFConfig(
        vocab_size=c["vocab"], hidden_size=c["width"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"], intermediate_size=c["ff"], rms_norm_eps=c["eps"], tie_word_embeddings=tied,
        rope_parameters=dict(rope_type="default", rope_theta=c["theta"]), attn_implementation="eager"))
    return shake(model).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def hf(request):
    return reference(request.param)


def ours(hf, **changes):
    model = Llama(LlamaConfig(**CONFIG | dict(tied=hf.config.tie_word_embeddings) | changes))
    model.load_state_dict({name.removeprefix("model."): value for name, value in hf.state_dict().items()
                           if not (model.config.tied and name == "lm_head.weight")})
    return model


def logits(model):
    states, none = model(model.embed_tokens(IDS), torch.tensor([13, 13]))
    assert none is None
    return states @ model.head.T


def test_logits_equal_transformers(hf):
    with torch.no_grad():
        assert difference(logits(ours(hf)), hf(IDS).logits) < 1e-5


def test_every_gradient_equals_transformers(hf):
    model = ours(hf)
    loss = torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    wanted = hf(IDS, labels=LABELS).loss
    assert difference(loss.detach(), wanted.detach()) < 1e-5
    given, grads = gradients(model, loss), gradients(hf, wanted)
    assert difference(given, {name.removeprefix("model."): grad for name, grad in grads.items()}) < 1e-5
    assert given.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("planted", [dict(theta=10000.0), dict(eps=2e-3), dict(eps=1e-5)])
def test_a_wrong_setting_is_caught(hf, planted):
    with torch.no_grad():
        assert difference(logits(ours(hf, **planted)), hf(IDS).logits) > 1e-4


def test_right_padding_changes_nothing(hf):
    model = ours(hf).double()
    with torch.no_grad():
        x = model.embed_tokens(IDS)
        padded = torch.cat([x, 7 * torch.ones(2, 4, 24)], dim=1)
        assert difference(model(padded, torch.tensor([13, 13]))[0][:, :13], model(x, torch.tensor([13, 13]))[0]) < 1e-12


def test_rope_is_exact_at_any_position():
    # Beyond 2^24 an fp32 angle has lost the position itself. Frequencies of a head of 4: 1 and 10000^(-1/2) = 1/100.
    position = 2 ** 24 + 1
    model = Llama(LlamaConfig(vocab=3, width=4, layers=1, heads=1, kv_heads=1, ff=1))
    cos, sin = model.rope(torch.tensor([[position]]), torch.float32)
    angle = torch.tensor([position, position / 100] * 2, dtype=torch.float64)
    sine = angle.sin() * torch.tensor([-1, -1, 1, 1])
    assert (cos.flatten() - angle.cos()).abs().max() < 1e-6 and (sin.flatten() - sine).abs().max() < 1e-6
