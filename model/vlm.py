"""The vision-language model of LLaVA (arXiv 2304.08485): frozen CLIP features -> projector W -> decoder.

One `forward` serves scoring, supervised fine-tuning and reinforcement learning. Shapes: P prompts of T tokens, I
pictures of N patches, G completions of C tokens, D decoder width, Dv vision width, V vocabulary.
"""
import copy
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from kernels import linear_kl, linear_logp
from model.clip import ClipConfig, ImageTower
from model.llama import Llama, LlamaConfig


@dataclass(frozen=True)
class VlmConfig:
    clip: ClipConfig = field(default_factory=ClipConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    projector: str = "linear"       # linear: LLaVA's W | mlp2x_gelu: LLaVA-1.5
    feature_layer: int = -2         # block whose patch tokens are used; LLaVA: second to last
    image_positions: bool = False   # a learned vector is added to each of the N image tokens
    image_id: int = -200            # stands for an image token in `ids`; outside the vocabulary, so never sampled

    def __post_init__(self):
        if self.projector not in ("linear", "mlp2x_gelu"):
            raise ValueError(f"projector {self.projector!r} must be linear or mlp2x_gelu")


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
        self.visual = ImageTower(c.clip)
        if c.projector == "linear":
            self.projector = nn.Linear(c.clip.width, c.llm.width)
        else:
            self.projector = nn.Sequential(nn.Linear(c.clip.width, c.llm.width), nn.GELU(),
                                           nn.Linear(c.llm.width, c.llm.width))
        if c.image_positions:
            # As large as a projected patch: much smaller, and finding a cell takes hundreds of steps to get going.
            self.image_position = nn.Parameter(torch.randn(c.clip.patches, c.llm.width))
        self.llm = Llama(c.llm)

    @classmethod
    def from_config(cls, config: dict):
        """Rebuild from the nested dict that `config_dict` wrote into a checkpoint."""
        return cls(VlmConfig(**{**config, "clip": ClipConfig(**config["clip"]), "llm": LlamaConfig(**config["llm"])}))

    def config_dict(self):
        return asdict(self.config)

    def encode(self, batch):
        """Fills batch.features (I, N, Dv) once; CLIP is frozen in every stage of this model, so without gradient."""
        if len(batch.pixels) and not len(batch.features):
            with torch.no_grad():
                pixels = batch.pixels.to(self.visual.proj.dtype)
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
        """A copy with the same weights. The image tower, frozen in every stage of this model, is shared."""
        return copy.deepcopy(self, {id(self.visual): self.visual})

    def logits(self, pixels, ids):
        """All logits (P, T, V) of full rows without padding, for study and parity tests only."""
        batch = SimpleNamespace(ids=ids, pixels=pixels, features=torch.zeros(0))
        return self.llm(self.embed(batch), torch.full_like(ids[:, 0], ids.shape[1]))[0] @ self.llm.head.T
