"""The vision-language model of LLaVA (arXiv 2304.08485): CLIP features -> projector -> decoder.

One `forward` serves scoring, supervised fine-tuning and reinforcement learning. What trains is
decided by `requires_grad` alone, of the image tower as well.

Shapes: P prompts of T tokens, I pictures of N patches that become M tokens each, G completions of C
tokens, D decoder width, Dv vision width, V vocabulary.
"""
import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from kernels import linear_kl, linear_logp
from model import sharding
from model.clip import ClipConfig, ImageTower
from model.flops import trains
from model.llama import Llama, LlamaConfig
from model.lora import adapters, attach, merge, off
from model.projector import PROJECTORS
from model.runs.config import check_fields, choice, number


@dataclass(frozen=True)
class VlmConfig:
    clip: ClipConfig = field(default_factory=ClipConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    projector: str = "linear"       # linear: LLaVA's W | mlp2x_gelu: LLaVA-1.5 | resampler
    feature_layer: int = -2         # block whose patch tokens are used; LLaVA: second to last
    image_positions: bool = False   # a learned vector is added to each image token of a picture
    image_id: int = -200            # an image token in `ids`; outside the vocabulary: never sampled
    image_fit: str = "crop"         # how pictures become square: crop | pad (LLaVA-1.5's stage 2)
    folder_image_id: int = -200     # image_id in the checkpoint's own folder; `logits` takes both
    speaks: bool = False            # the decoder came with a language: align leaves it
    lora: tuple = ()                # the decoder's adapters: targets, rank, alpha; empty: none
    queries: int = 0                # tokens a resampler makes of a picture; 0: a quarter of the patches

    def __post_init__(self):
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector {self.projector!r} must be one of {', '.join(PROJECTORS)}")
        if self.queries < 0:
            raise ValueError(f"queries {self.queries} must be at least 0")
        if self.image_fit not in ("crop", "pad"):
            raise ValueError(f"image_fit {self.image_fit!r} must be crop or pad")
        if self.feature_layer >= 0:     # as Hugging Face counts: 0 is the input of the first block
            object.__setattr__(self, "feature_layer", self.feature_layer - self.clip.layers - 1)

    @property
    def image_tokens(self):
        """How many tokens of a prompt a picture becomes, M."""
        return PROJECTORS[self.projector].tokens(self)

    @property
    def pixels(self):
        """How `collate` makes this model's pixels, as its arguments."""
        return dict(image_size=self.clip.image_size, fit=self.image_fit, mean=self.clip.mean,
                    std=self.clip.std)


@dataclass(frozen=True)
class VlmOptions:
    """how pictures reach the decoder"""
    llava: str = ""                                 # a whole LLaVA to go on with, a folder or name
    feature_layer: int = number(-2, "[-1024, -1]")  # block whose patch tokens W reads; LLaVA: second to last
    projector: str = choice("linear", *PROJECTORS)  # LLaVA's W | LLaVA-1.5's two layers | fewer tokens
    queries: int = number(0, "[0, 131072]")         # tokens that a resampler makes of a picture; 0: patches / 4
    image_positions: bool = True                    # add a learned vector to each image token

    def __post_init__(self):
        check_fields(self)

    def shape(self):
        """The fields of VlmConfig that these options decide."""
        return dict(projector=self.projector, queries=self.queries, feature_layer=self.feature_layer,
                    image_positions=self.image_positions)


@dataclass
class Output:
    """logp and entropy: (S,) for a batch's S targets in reading order, (P, G, C) for completions.

    hidden: the states those were read from, (S, D) or (P, G, C + 1, D).
    """
    logp: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor


def spread(values, rows, mask):
    """values (N,) of the entries `rows` (N,) of a mask, in its shape, 0 elsewhere."""
    out = values.new_zeros(mask.numel()).index_copy(0, rows, values)
    return out.view(mask.shape)


def gathered(upstream, shape, rows):
    """Upstream gradients (of logp, of entropy or None), of tokens in `shape`, at the entries `rows`
    (N,) of that, or at all: each (N,)."""
    found = []
    for x in upstream:
        if x is not None:
            x = x.expand(shape).flatten()
            if rows is not None:
                x = x.index_select(0, rows)
        found.append(x)
    return found


class VLM(nn.Module):
    def __init__(self, config: VlmConfig):
        super().__init__()
        self.config = config
        self.visual = ImageTower(config.clip).cut(config.feature_layer)
        self.visual.requires_grad_(False)       # as LLaVA's; what is to train of it says so afterwards
        self.make_projector()
        self.llm = Llama(config.llm)
        if config.lora:
            attach(self.llm, *config.lora)

    def make_projector(self):
        """A new projector, and new image positions, in the place of those there are."""
        c = self.config
        self.projector = PROJECTORS[c.projector](c)
        if c.image_positions:
            # As large as a projected patch: with much smaller ones it takes hundreds of steps until
            # the model begins to tell cells apart.
            self.image_position = nn.Parameter(torch.randn(c.image_tokens, c.llm.width))

    # ------------------------------------------------------------ from and to checkpoints

    @classmethod
    def from_config(cls, config: dict, state=None):
        """Rebuilds from the nested dict that `config_dict` wrote into a checkpoint. The tensors of
        `state`, when given, become the model's own without a copy."""
        clip = ClipConfig(**config["clip"])
        llm = LlamaConfig(**config["llm"])
        config = VlmConfig(**{**config, "clip": clip, "llm": llm})
        if state is None:
            return cls(config)
        with torch.device("meta"):
            vlm = cls(config)
        vlm.load_state_dict(state, assign=True)
        return vlm

    @classmethod
    def from_parts(cls, config, tower, llm):
        """An image tower's and a decoder's weights, shared, not copied, and a new projector on a
        CPU, in fp32."""
        with torch.device("meta"):
            vlm = cls(config)
        state = tower.state_dict()
        kept = {name: state[name] for name in vlm.visual.state_dict()}
        vlm.visual.load_state_dict(kept, assign=True)
        vlm.llm.load_state_dict(llm.state_dict(), assign=True)
        vlm.make_projector()
        return vlm

    def config_dict(self):
        return asdict(self.config)

    def adapt(self, targets, rank, alpha):
        """Merges the adapters there are, then gives the decoder new ones, as `lora.attach`; rank 0:
        no new ones."""
        if self.config.lora:
            merge(self.llm).requires_grad_(True)
        lora = ()
        if rank:
            attach(self.llm, targets, rank, alpha)
            lora = (targets, rank, alpha)
        self.config = replace(self.config, lora=lora)

    # ------------------------------------------------------------ pictures become tokens

    def features(self, pixels):
        """pixels (I, 3, S, S) -> what the projector reads (I, N, Dv)."""
        pixels = pixels.to(self.visual.positional_embedding.dtype)
        return self.visual.features(pixels, self.config.feature_layer)

    def encode(self, batch):
        """Fills batch.features (I, N, Dv) once, without gradient.

        Where some of the tower trains it leaves the batch alone: features would be those of the
        weights before the last step, and without gradient. `embed` then computes them each time.
        """
        if len(batch.pixels) and not len(batch.features) and not trains(self.visual):
            with torch.no_grad():
                batch.features = self.features(batch.pixels)
        return batch

    def image_embeddings(self, batch):
        """The I pictures of a batch -> decoder inputs (I, M, D); empty without pictures."""
        if trains(self.visual) and len(batch.pixels):
            features = self.features(batch.pixels)
        else:
            features = self.encode(batch).features
        if not len(features):
            return features
        image = self.projector(features)
        if image.shape[1] != self.config.image_tokens:
            raise ValueError(f"projector {self.config.projector!r} makes {image.shape[1]} tokens "
                             f"of a picture, its tokens(config) says {self.config.image_tokens}")
        if self.config.image_positions:
            image = image + self.image_position
        return image

    def embed(self, batch):
        """ids and pictures -> decoder inputs (P, T, D), with image tokens where image ids are."""
        is_image = batch.ids == self.config.image_id
        x = self.llm.embed_tokens(batch.ids.masked_fill(is_image, 0))
        slots = int(is_image.sum())
        tokens = len(batch.pixels) * self.config.image_tokens
        if slots != tokens:
            raise ValueError(f"the prompts hold {slots} image tokens but their pictures give "
                             f"{tokens}")
        is_trained_in_shards = sharding.is_sharded(self) and torch.is_grad_enabled()
        if slots:
            image = self.image_embeddings(batch)
            x = x.masked_scatter(is_image[..., None], image.to(x.dtype))
        elif is_trained_in_shards:      # ranks sum all gradients, also where only some had a picture
            x = x + 0.0 * sum(weight.sum() for weight in self.picture_weights())
        if is_trained_in_shards:
            self.saw_pictures = self.saw_pictures or slots > 0
        return x

    def picture_weights(self):
        """What trains of that which makes features into tokens, a list."""
        weights = [*self.projector.parameters()]
        if self.config.image_positions:
            weights.append(self.image_position)
        return [weight for weight in weights if weight.requires_grad]

    # ------------------------------------------------------------ forward

    def forward(self, batch, completions=None, temperature=1.0, mask=None, upstream=None):
        """Log-prob and entropy of what is to be predicted, never through an (tokens, V) tensor.

        Without completions: of the batch's own targets (a target at position t is predicted from t
        - 1). With completions (P, G, C) int64: of every completion token given its prompt, 0 where
        mask (P, G, C) is False, which spares the head; without one the caller masks their padding.
        `temperature` divides the logits, as in sampling.

        upstream: (of logp, of entropy or None), the gradients that the caller's loss will send back
        to them, tensors that broadcast to their shape, where they are known by now. The head then
        computes its gradient with its log-probs, three products in place of four; RuntimeError in
        the backward if the loss sends others.
        """
        if completions is None:
            is_target = batch.target[:, 1:]
            x, _ = self.llm(self.embed(batch), batch.length)
            hidden = states = x[:, :-1][is_target]          # (S, D)
            predicted = batch.ids[:, 1:][is_target]         # (S,)
        else:
            hidden = self.states(batch, completions)        # (P, G, C + 1, D)
            states = hidden[..., :-1, :]
            predicted = completions
        states = states.flatten(0, -2)
        shape = predicted.shape
        predicted = predicted.flatten()
        rows = None
        if mask is not None:
            rows = mask.flatten().nonzero()[:, 0]
            states = states.index_select(0, rows)
            predicted = predicted.index_select(0, rows)
        if upstream is not None:
            upstream = gathered(upstream, shape, rows)
        logp, entropy = linear_logp(states, self.llm.head, predicted, temperature, upstream=upstream)
        if mask is None:
            return Output(logp.view(shape), entropy.view(shape), hidden)
        return Output(spread(logp, rows, mask), spread(entropy, rows, mask), hidden)

    def states(self, batch, completions):
        """Hidden states (P, G, C + 1, D) of the completions (P, G, C): state t predicts token t,
        state C follows the last."""
        x = self.embed(batch)                               # (P, T, D)
        y = self.llm.embed_tokens(completions)              # (P, G, C, D)
        _, hidden = self.llm(x, batch.length, y)
        return hidden

    def inside(self, call):
        """call(), by what shares this model's decoder: its weights are at hand as in a forward, where
        they lie in shards as well."""
        return call()

    def kl(self, hidden, ref_hidden, reference, mask, temperature=1.0):
        """Exact KL(self || reference) (P, G, C) before each completion token of the mask (P, G, C),
        0 elsewhere, from the states of both models (P, G, C + 1, D)."""
        rows = mask.flatten().nonzero()[:, 0]
        mine = hidden[..., :-1, :].flatten(0, -2).index_select(0, rows)
        theirs = ref_hidden[..., :-1, :].flatten(0, -2).index_select(0, rows)
        kl = linear_kl(mine, self.llm.head, theirs, reference.llm.head, temperature)
        return spread(kl, rows, mask)

    def logits(self, pixels, ids):
        """All logits (P, T, V) of full rows without padding, for study and parity tests only.

        pixels (I, 3, S, S), ids (P, T) with an image id, this model's or its folder's, for each
        image token.
        """
        c = self.config
        if c.folder_image_id != c.image_id:
            ids = ids.masked_fill(ids == c.folder_image_id, c.image_id)
        batch = SimpleNamespace(ids=ids, pixels=pixels, features=torch.zeros(0))
        length = torch.full_like(ids[:, 0], ids.shape[1])
        x, _ = self.llm(self.embed(batch), length)
        return x @ self.llm.head.T

    # ------------------------------------------------------------ copies

    def twin(self):
        """A copy with the same weights. What stands still in this run is shared: the image tower,
        unless some of it trains, and beside adapters the frozen weights of the decoder."""
        shared = []
        if not trains(self.visual):
            shared.append(self.visual)
        if adapters(self.llm):
            shared += [p for p in self.llm.parameters() if not p.requires_grad]
        twin = copy.deepcopy(self, {id(one): one for one in shared})
        if twin.llm.compiled:       # its functions were copied, and still read this model's weights
            twin.llm.compile_blocks()
        return twin

    def base(self):
        """The model as it is now but without its adapters: a frozen reference that costs next to no
        memory.

        Returns None without adapters, and where the decoder trains beside them; a reference must
        then be a `twin()`.
        """
        pairs = {id(p) for layer in adapters(self.llm) for p in (layer.lora_a, layer.lora_b)}
        if not pairs:
            return None
        if any(p.requires_grad and id(p) not in pairs for p in self.llm.parameters()):
            return None
        return Base(self)


class Base(VLM):
    """What `VLM.base` gives: the decoder of `vlm`, shared, with its adapters off, and a copy of
    what may train beside them: projector, image positions and, unless it is frozen, the image
    tower.

    Only the copies are in its state dict, so that a checkpoint of policy and reference holds one
    decoder. No gradient passes through it.
    """

    def __init__(self, vlm):
        nn.Module.__init__(self)        # a VLM's would make a second decoder
        self.config = vlm.config
        vars(self)["policy"] = vlm
        vars(self)["llm"] = vlm.llm     # past nn.Module, which would put it into the state dict
        if trains(vlm.visual):
            self.visual = copy.deepcopy(vlm.visual).requires_grad_(False)
        else:
            vars(self)["visual"] = vlm.visual
        self.projector = copy.deepcopy(vlm.projector).requires_grad_(False)
        if vlm.config.image_positions:
            self.image_position = copy.deepcopy(vlm.image_position).requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch, completions=None, temperature=1.0, mask=None):
        with off(self.llm):
            call = partial(super().forward, batch, completions, temperature, mask)
            return self.policy.inside(call)

    @torch.no_grad()
    def states(self, batch, completions):
        with off(self.llm):
            return self.policy.inside(partial(super().states, batch, completions))

    @torch.no_grad()
    def logits(self, pixels, ids):
        with off(self.llm):
            return super().logits(pixels, ids)
