"""The vision-language model of LLaVA (arXiv 2304.08485): frozen CLIP features -> projector W -> decoder.

One `forward` serves scoring, supervised fine-tuning and reinforcement learning. Shapes: P prompts of T tokens, I
pictures of N patches, G completions of C tokens, D decoder width, Dv vision width, V vocabulary.
"""
import copy
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import nn

from kernels import linear_kl, linear_logp
from model.clip import ClipConfig, ImageTower
from model.llama import Llama, LlamaConfig
from model.lora import adapters, attach, merge, off


@dataclass(frozen=True)
class VlmConfig:
    clip: ClipConfig = field(default_factory=ClipConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    projector: str = "linear"       # linear: LLaVA's W | mlp2x_gelu: LLaVA-1.5
    feature_layer: int = -2         # block whose patch tokens are used; LLaVA: second to last
    image_positions: bool = False   # a learned vector is added to each of the N image tokens
    image_id: int = -200            # stands for an image token in `ids`; outside the vocabulary, so never sampled
    image_fit: str = "crop"         # how pictures become square: crop | pad (LLaVA-1.5 from its second stage on)
    folder_image_id: int = -200     # what the checkpoint's own folder writes for image_id; `logits` takes it, too
    speaks: bool = False            # the decoder came with a language: aligning trains the projector alone
    lora: tuple = ()                # the decoder's adapters: targets, rank, alpha; empty: none

    def __post_init__(self):
        if self.projector not in ("linear", "mlp2x_gelu"):
            raise ValueError(f"projector {self.projector!r} must be linear or mlp2x_gelu")
        if self.image_fit not in ("crop", "pad"):
            raise ValueError(f"image_fit {self.image_fit!r} must be crop or pad")
        if self.feature_layer >= 0:     # as Hugging Face counts: 0 is what goes into the first block
            object.__setattr__(self, "feature_layer", self.feature_layer - self.clip.layers - 1)

    @property
    def image_tokens(self):
        """How many tokens of a prompt a picture becomes."""
        return self.clip.patches

    @property
    def pixels(self):
        """How `collate` makes this model's pixels, as its arguments."""
        return dict(image_size=self.clip.image_size, fit=self.image_fit, mean=self.clip.mean, std=self.clip.std)


@dataclass
class Output:
    """logp and entropy: (M,) for a batch's M targets in reading order, (P, G, C) for completions.

    hidden: the states those were read from, (M, D) or (P, G, C + 1, D).
    """
    logp: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor


class VLM(nn.Module):
    def __init__(self, config: VlmConfig):
        super().__init__()
        self.config = c = config
        self.visual = ImageTower(c.clip).cut(c.feature_layer)
        self.make_projector()
        self.llm = Llama(c.llm)
        if c.lora:
            attach(self.llm, *c.lora)

    def make_projector(self):
        """A new W, and new positions, in the place of what is there."""
        c = self.config
        if c.projector == "linear":
            self.projector = nn.Linear(c.clip.width, c.llm.width)
        else:
            self.projector = nn.Sequential(nn.Linear(c.clip.width, c.llm.width), nn.GELU(),
                                           nn.Linear(c.llm.width, c.llm.width))
        if c.image_positions:
            # As large as a projected patch: much smaller, and finding a cell takes hundreds of steps to get going.
            self.image_position = nn.Parameter(torch.randn(c.clip.patches, c.llm.width))

    @classmethod
    def from_config(cls, config: dict, state=None):
        """Rebuild from the nested dict that `config_dict` wrote into a checkpoint; its weights, when given, become the
        model's own without a copy."""
        config = VlmConfig(**{**config, "clip": ClipConfig(**config["clip"]), "llm": LlamaConfig(**config["llm"])})
        if state is None:
            return cls(config)
        with torch.device("meta"):
            vlm = cls(config)
        vlm.load_state_dict(state, assign=True)
        return vlm

    @classmethod
    def from_parts(cls, config, tower, llm):
        """An image tower's and a decoder's weights, shared, not copied, and a new projector on a CPU, in fp32."""
        with torch.device("meta"):
            vlm = cls(config)
        known = tower.state_dict()
        vlm.visual.load_state_dict({name: known[name] for name in vlm.visual.state_dict()}, assign=True)
        vlm.llm.load_state_dict(llm.state_dict(), assign=True)
        vlm.make_projector()
        return vlm

    def adapt(self, targets, rank, alpha):
        """Merges the adapters there are, then gives the decoder new ones, as `lora.attach`; rank 0: none."""
        if self.config.lora:
            merge(self.llm).requires_grad_(True)
        if rank:
            attach(self.llm, targets, rank, alpha)
        self.config = replace(self.config, lora=(targets, rank, alpha) if rank else ())

    def config_dict(self):
        return asdict(self.config)

    def encode(self, batch):
        """Fills batch.features (I, N, Dv) once; CLIP is frozen in every stage of this model, so without gradient."""
        if len(batch.pixels) and not len(batch.features):
            with torch.no_grad():
                pixels = batch.pixels.to(self.visual.positional_embedding.dtype)
                batch.features = self.visual.features(pixels, self.config.feature_layer)
        return batch

    def embed(self, batch):
        """ids and pictures -> decoder inputs (P, T, D): projected patches replace the image ids, by mask."""
        self.encode(batch)
        is_image = batch.ids == self.config.image_id
        x = self.llm.embed_tokens(batch.ids.masked_fill(is_image, 0))
        slots, patches = int(is_image.sum()), batch.features.shape[:2].numel() if len(batch.features) else 0
        if slots != patches:
            raise ValueError(f"the prompts hold {slots} image tokens but their pictures give {patches}")
        if slots:
            image = self.projector(batch.features)
            if self.config.image_positions:
                image = image + self.image_position
            x = x.masked_scatter(is_image[..., None], image.to(x.dtype))
        return x

    def forward(self, batch, completions=None, temperature=1.0):
        """Log-prob and entropy of what is to be predicted, never through an (tokens, V) tensor.

        Without completions: of the batch's own targets (a target at position t is predicted from t - 1).
        With completions (P, G, C) int64: of every completion token given its prompt; padding there is the caller's to
        mask. `temperature` divides the logits, as in sampling.
        """
        if completions is None:
            hidden = self.llm(self.embed(batch), batch.length)[0][:, :-1][batch.target[:, 1:]]
            predicted, states = batch.ids[:, 1:][batch.target[:, 1:]], hidden
        else:
            hidden = self.states(batch, completions)
            predicted, states = completions, hidden[..., :-1, :]
        logp, entropy = linear_logp(states.flatten(0, -2), self.llm.head, predicted.flatten(), temperature)
        return Output(logp.view(predicted.shape), entropy.view(predicted.shape), hidden)

    def states(self, batch, completions):
        """Hidden states (P, G, C + 1, D) of the completions (P, G, C): t predicts token t, C follows the last."""
        return self.llm(self.embed(batch), batch.length, self.llm.embed_tokens(completions))[1]

    def kl(self, hidden, theirs, reference, temperature=1.0):
        """Exact KL(self || reference) (P, G, C) before each completion token, of both models' states there."""
        mine, other = (states[..., :-1, :].flatten(0, -2) for states in (hidden, theirs))
        shape = (*hidden.shape[:2], hidden.shape[2] - 1)
        return linear_kl(mine, self.llm.head, other, reference.llm.head, temperature).view(shape)

    def twin(self):
        """A copy with the same weights. The image tower, frozen in every stage of this model, is shared; beside
        adapters so is whatever else of the decoder stands still."""
        still = [p for p in self.llm.parameters() if not p.requires_grad] if adapters(self.llm) else []
        twin = copy.deepcopy(self, {id(shared): shared for shared in (self.visual, *still)})
        compiled = [vars(layer).pop(half, None) for layer in twin.llm.layers for half in ("before", "after")]
        if any(compiled):               # they were copied as functions, which go on reading the weights of this model
            twin.llm.compile_blocks()
        return twin

    def base(self):
        """The model as it is now but without its adapters, a frozen reference that costs next to no memory. None
        without adapters, or where the decoder trains beside them: then a reference must be a `twin()`."""
        apart = {id(p) for layer in adapters(self.llm) for p in (layer.lora_a, layer.lora_b)}
        beside = any(p.requires_grad and id(p) not in apart for p in self.llm.parameters())
        return Base(self) if apart and not beside else None

    def logits(self, pixels, ids):
        """All logits (P, T, V) of full rows without padding, for study and parity tests only.

        pixels (I, 3, S, S), ids (P, T) with an image id, this model's or its folder's, for each patch.
        """
        if self.config.folder_image_id != self.config.image_id:
            ids = ids.masked_fill(ids == self.config.folder_image_id, self.config.image_id)
        batch = SimpleNamespace(ids=ids, pixels=pixels, features=torch.zeros(0))
        return self.llm(self.embed(batch), torch.full_like(ids[:, 0], ids.shape[1]))[0] @ self.llm.head.T


class Base(VLM):
    """What `VLM.base` gives: the decoder and the tower of `vlm`, shared, with the adapters off, and a copy of what may
    train beside them, the projector and the image positions.

    Only that copy is in its state dict, so that a checkpoint of policy and reference holds one decoder. No gradient
    passes through it.
    """

    def __init__(self, vlm):
        nn.Module.__init__(self)                # a VLM's would make a second decoder
        self.config, self._shared = vlm.config, (vlm.visual, vlm.llm)       # in a tuple a module is not registered
        self.projector = copy.deepcopy(vlm.projector).requires_grad_(False)
        if vlm.config.image_positions:
            self.image_position = copy.deepcopy(vlm.image_position).requires_grad_(False)

    @property
    def visual(self):
        return self._shared[0]

    @property
    def llm(self):
        return self._shared[1]

    @torch.no_grad()
    def forward(self, batch, completions=None, temperature=1.0):
        with off(self.llm):
            return super().forward(batch, completions, temperature)

    @torch.no_grad()
    def states(self, batch, completions):
        with off(self.llm):
            return super().states(batch, completions)

    @torch.no_grad()
    def logits(self, pixels, ids):
        with off(self.llm):
            return super().logits(pixels, ids)
