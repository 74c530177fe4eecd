"""model.clip against open_clip, with random weights moved over by name."""
import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from model.clip import Clip, ClipConfig, ImageTower, contrastive_loss
from tiny import difference, shake

CONFIG = ClipConfig(image_size=15, patch=5, width=12, layers=3, heads=3, embed=7, text_width=10, text_layers=2,
                    text_heads=5, text_length=11, vocab=31)
EOT = CONFIG.vocab - 1      # open_clip reads a text at its largest id


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def act(request):
    return request.param


@pytest.fixture(scope="module")
def reference(act, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    c = CONFIG
    (folder / f"tiny_{act}.json").write_text(json.dumps(dict(
        embed_dim=c.embed, quick_gelu=act == "quick_gelu",
        vision_cfg=dict(image_size=c.image_size, patch_size=c.patch, width=c.width, layers=c.layers,
                        head_width=c.width // c.heads),
        text_cfg=dict(context_length=c.text_length, vocab_size=c.vocab, width=c.text_width, heads=c.text_heads,
                      layers=c.text_layers))))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    return shake(open_clip.create_model(f"tiny_{act}", pretrained=None)).eval()


def ours(reference, act, **changes):
    model = Clip(ClipConfig(**vars(CONFIG) | dict(act=act) | changes))
    model.load_state_dict({name: value for name, value in reference.state_dict().items() if name != "attn_mask"})
    return model


def pictures(count=3):
    return torch.randn(count, 3, 15, 15, generator=torch.Generator().manual_seed(1))


def texts():
    ids = torch.randint(1, EOT, (4, 11), generator=torch.Generator().manual_seed(2))
    length = torch.tensor([11, 2, 7, 1])
    for row, n in enumerate(length):
        ids[row, n - 1], ids[row, n:] = EOT, 0
    return ids, length


def test_pooled_image_output_equals_open_clip(reference, act):
    with torch.no_grad():
        assert difference(ours(reference, act).visual(pictures()), reference.visual(pictures())) < 2e-6


def test_second_to_last_block_features_equal_open_clip(reference, act):
    with torch.no_grad():
        wanted = reference.visual.forward_intermediates(
            pictures(), indices=[CONFIG.layers - 2], normalize_intermediates=False, intermediates_only=True,
            output_fmt="NLC")["image_intermediates"][0]
        tower = ours(reference, act).visual
        assert difference(tower.features(pictures(), -2), wanted) < 5e-6
        assert difference(tower.features(pictures(), -1), wanted) > 0.1


def test_text_output_equals_open_clip(reference, act):
    ids, length = texts()
    with torch.no_grad():
        given = ours(reference, act).encode_text(ids, length)
        assert difference(given, reference.encode_text(ids, normalize=True)) < 2e-6


def test_contrastive_loss_and_every_gradient_equal_open_clip(reference, act):
    ids, length = texts()
    model = ours(reference, act).double()
    reference = reference.double()
    pixels = pictures(4).double()
    loss = contrastive_loss(model.encode_image(pixels), model.encode_text(ids, length), model.logit_scale)
    wanted = open_clip.ClipLoss()(reference.encode_image(pixels, normalize=True),
                                  reference.encode_text(ids, normalize=True), reference.logit_scale.exp())
    grads = [dict(zip(dict(m.named_parameters()), torch.autograd.grad(value, list(m.parameters()))))
             for m, value in ((model, loss), (reference, wanted))]
    reference.float()
    assert difference(loss.detach(), wanted.detach()) < 1e-12 and difference(*grads) < 1e-10


def test_the_other_gelu_is_caught(reference, act):
    other = {"quick_gelu": "gelu", "gelu": "quick_gelu"}[act]
    ids, length = texts()
    with torch.no_grad():
        wrong = ours(reference, other)
        assert difference(wrong.visual(pictures()), reference.visual(pictures())) > 1e-3
        assert difference(wrong.encode_text(ids, length), reference.encode_text(ids, normalize=True)) > 1e-3


def test_text_padding_changes_nothing():
    model = shake(Clip(CONFIG))
    ids, length = texts()
    with torch.no_grad():
        whole = model.encode_text(ids, length)
        for row, n in enumerate(length.tolist()):
            assert difference(model.encode_text(ids[row:row + 1, :n], length[row:row + 1])[0], whole[row]) < 1e-5
    with pytest.raises(ValueError, match="12 tokens.*text_length 11"):
        model.encode_text(torch.ones(1, 12, dtype=torch.long), torch.tensor([12]))


@pytest.mark.parametrize("stem, pool", [("mlp", "mean"), ("conv", "mean"), ("mlp", "class")])
def test_blocks_after_the_feature_layer_are_not_computed(stem, pool):
    tower = shake(ImageTower(ClipConfig(**vars(CONFIG) | dict(stem=stem, pool=pool))))
    ran = []
    for block in tower.transformer.resblocks:
        block.register_forward_hook(lambda block, inputs, out: ran.append(out))
    x = tower.features(pictures(), -2)
    assert len(ran) == CONFIG.layers - 1 and x.shape == (3, 9, 12)
    assert torch.equal(x, ran[-1][:, 1:] if pool == "class" else ran[-1])
    for layer in (0, 1, -CONFIG.layers - 1):
        with pytest.raises(ValueError, match=f"feature layer {layer}"):
            tower.features(pictures(), layer)


def test_the_mlp_stem_reads_each_patch_by_itself_in_reading_order():
    tower = shake(ImageTower(ClipConfig(**vars(CONFIG) | dict(stem="mlp", pool="mean"))))
    pixels = pictures(1)
    changed = pixels.clone()
    changed[:, :, 5:10, 0:5] += 1           # second row of patches, first column: patch 3 of 9
    with torch.no_grad():
        moved = (tower._embed(changed) - tower._embed(pixels)).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False] * 3 + [True] + [False] * 5


def unit(rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)


def test_identity_as_positives_is_the_classic_loss():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(5, 3), dim=-1), F.normalize(torch.randn(5, 3), dim=-1)
    scale = torch.tensor(1.5)
    assert torch.equal(contrastive_loss(image, text, scale, torch.eye(5, dtype=torch.bool)),
                       contrastive_loss(image, text, scale))


def test_equal_captions_share_the_target_equally():
    # Pairs 0 and 1 have the same caption. At scale 1, pictures along x, captions along x, x and y: row 0 of the logits
    # is (1, 1, 0), with target (1/2, 1/2, 0); row 2, of a picture along y, is (0, 0, 1), with target (0, 0, 1).
    image, text = unit([[1, 0], [1, 0], [0, 1]]), unit([[1, 0], [1, 0], [0, 1]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    e = math.e
    wanted = (2 * math.log((2 * e + 1) / e) + math.log((e + 2) / e)) / 3
    given = contrastive_loss(image, text, torch.tensor(0.0, dtype=torch.float64), same)
    assert given.item() == pytest.approx(wanted, abs=1e-12)


def test_the_loss_is_symmetric_when_duplicates_are_counted():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(5, 3), dim=-1), F.normalize(torch.randn(5, 3), dim=-1)
    caption = torch.tensor([0, 1, 0, 2, 0])
    same = caption[:, None] == caption
    one, other = (contrastive_loss(a, b, torch.tensor(1.0), same) for a, b in ((image, text), (text, image)))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_the_temperature_is_capped_at_one_hundredth():
    # Each picture beside the other's caption: both rows and both columns lose the whole scale, 100 nats.
    image, text = unit([[1, 0], [0, 1]]), unit([[0, 1], [1, 0]])
    for scale, wanted in ((math.log(100), 100), (5.0, 100), (math.log(90), 90)):
        assert contrastive_loss(image, text, torch.tensor(scale, dtype=torch.float64)).item() == pytest.approx(wanted)
