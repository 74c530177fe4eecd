"""Tokenizers: sentencepiece, trained here or a real model's, and byte-level BPE read from a
`tokenizer.json`.

Both kinds answer to the same names; a tokenizer travels inside a checkpoint as what `saved` gives
(`from_saved`):

    bos_id, eos_id, pad_id      ids; bos_id is None where texts begin without one
    image_id                    an image token
    len(t)                      number of ids, added tokens included: the largest one + 1
    encode(text)                -> ids, without BOS or EOS; special tokens spelt in `text` are literal text
    encode_with_offsets(text)   -> (ids, [(start, end)]), each id's characters text[start:end]
    decode(ids)                 -> text
    special(name)               -> id of the token spelt exactly so; ValueError when there is none
    banned(vocab)               -> ids never sampled from a head of `vocab` rows
"""
import io
import json
import re
from pathlib import Path

import sentencepiece as spm

from data.fast import tokenizer_json
from model.runs.config import first_line

# an image token; outside the vocabulary, so that it can be neither spelt nor sampled
IMAGE_ID = -200
TURN_END = "<|im_end|>"


def _banned(self, vocab):
    """Ids never sampled from a head of `vocab` rows: all that give no text, but the EOS."""
    ids = {*self.silent, *range(len(self), vocab)} - {self.eos_id, None}
    return tuple(sorted(i for i in ids if i < vocab))       # a padding id may lie outside the head


class Tokenizer:
    """proto: a serialised sentencepiece model. added: name -> id of special tokens that a model's
    folder adds to it; text never becomes one of them, and they give no text.

    names: "bos", "eos" or "pad" -> the token's name where the sentencepiece model's own is not
    meant; None for "bos": texts begin without one. Padding without a token of its own is the
    unknown piece, as in LLaVA. ValueError when the bytes are no model, when a name is unknown, or
    without an EOS.
    """
    image_id = IMAGE_ID
    banned = _banned

    def __init__(self, proto: bytes, added=None, names=None):
        self.proto = proto
        self.names = dict(names or {})
        self.model = _sentencepiece(proto)
        self.pieces = self.model.get_piece_size()
        self.added = {}
        for name, i in (added or {}).items():
            if i >= self.pieces or self.model.id_to_piece(i) != name:  # folders list <s> as well
                self.added[name] = i
        own = self._own_ids()
        ids = dict(own)
        for role, name in self.names.items():
            ids[role] = None if name is None else self.special(name)
        if ids["eos"] is None:
            raise ValueError("the sentencepiece model has no end-of-text piece, and no eos_token "
                             "is named for it")
        self.bos_id = ids["bos"]
        self.eos_id = ids["eos"]
        self.pad_id = ids["pad"]
        self.as_trained = not self.added and ids == own
        self.silent = {*ids.values(), *self.added.values(), self.model.unk_id()}

    def _own_ids(self):
        """Role -> id as the sentencepiece model itself has it, None for none."""
        ids = {"bos": self.model.bos_id(), "eos": self.model.eos_id(), "pad": self.model.pad_id()}
        for role, i in ids.items():
            if i < 0:                           # sentencepiece's none
                ids[role] = None
        if ids["pad"] is None:
            ids["pad"] = self.model.unk_id()
        return ids

    def __len__(self):
        return max(self.pieces, 1 + max(self.added.values(), default=0))

    @property
    def saved(self):
        """What a checkpoint keeps: the model's bytes, or a dict where the folder adds something."""
        if self.as_trained:
            return self.proto
        return dict(proto=self.proto, added=self.added, names=self.names)

    def fast_json(self, added):
        """The text of a tokenizer.json that gives the same ids; added: name -> id of special
        tokens."""
        return tokenizer_json(self.proto, self.model, self.bos_id, added)

    def encode(self, text):
        """Text -> ids, without BOS or EOS. Tags are pieces of their own, "</s>" is literal text."""
        return self.model.encode(text)

    def encode_with_offsets(self, text):
        """Text -> (ids, [(start, end)]) in characters.

        A space that the tokenizer adds in front is (0, 0). Where the bytes of one character are
        tokens of their own, the last one has the character; those before it are empty and begin
        where it begins.
        """
        # Newer sentencepiece counts bytes, older characters, under another name. Both cut the text
        # into the same surfaces, which follow each other, but for white space that a model drops at
        # the front.
        encode = getattr(self.model, "encode_as_immutable_proto", None)
        if encode is None:
            encode = self.model.encode_as_proto
        ids, spans = [], []
        at = 0
        for piece in encode(text).pieces:
            start = text.index(piece.surface, at)
            at = start + len(piece.surface)
            ids.append(piece.id)
            spans.append((start, at))
        return ids, spans

    def decode(self, ids):
        """Ids -> text; EOS, BOS, padding, added tokens and the spare rows of a padded embedding
        give nothing."""
        # A space that no piece holds comes back from its bytes as sentencepiece's own sign for it.
        kept = [i for i in ids if 0 <= i < self.pieces and i not in self.silent]
        return self.model.decode(kept).replace("\u2581", " ")

    def special(self, name):
        """Id of the token `name`, added or a piece of the model; ValueError when there is none."""
        if name in self.added:
            return self.added[name]
        piece = self.model.piece_to_id(name)
        if self.model.id_to_piece(piece) != name:           # an unknown name gives the unknown id
            raise ValueError(f"the tokenizer has no token {name!r}")
        return piece


def _sentencepiece(proto):
    """Bytes -> SentencePieceProcessor; ValueError when they are no model."""
    model = spm.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(proto)        # the constructor takes no bytes for no model
    except RuntimeError:            # it names a line of its own source
        raise ValueError(f"no sentencepiece model can be read from its {len(proto)} bytes; "
                         "expected the tokenizer.model that sentencepiece wrote, whole") from None
    return model


class BytePairTokenizer:
    """Byte-level BPE (Qwen, SmolLM2, GPT-2) from the text of a `tokenizer.json`, by the
    `tokenizers` package.

    bos, eos, pad: names of tokens. No bos (None): texts begin without one; no pad: EOS pads. A
    tokenizer with <|im_end|> has that for its EOS, whatever `eos` says: ChatML ends a turn with it,
    `eos` may end a document. ValueError without the package, when the text is no BPE tokenizer,
    when a name is unknown, or without an EOS.

    A Llama-2 type tokenizer.json, sentencepiece written down in this format, works as well, but its
    `tokenizer.model` is the reference: the two differ on texts that begin with spaces.
    """
    image_id = IMAGE_ID
    banned = _banned

    def __init__(self, source: str, bos, eos, pad):
        self.source = source
        self.names = dict(bos=bos, eos=eos, pad=pad)
        self.model = _byte_pairs(source)
        turn_end = self.model.token_to_id(TURN_END)
        if turn_end is None and not eos:
            raise ValueError("the tokenizer.json has no end-of-text token: no eos_token is named for it")
        self.bos_id = self.special(bos) if bos else None
        self.eos_id = self.special(eos) if turn_end is None else turn_end
        self.pad_id = self.special(pad) if pad else self.eos_id
        self.size = 1 + max(self.model.get_vocab(with_added_tokens=True).values())
        self.silent = {self.bos_id, self.eos_id, self.pad_id}

    def __len__(self):
        return self.size

    @property
    def saved(self):
        """What a checkpoint keeps."""
        return dict(json=self.source, **self.names)

    def encode(self, text):
        """Text -> ids, without BOS or EOS."""
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text):
        """Text -> (ids, [(start, end)]) in characters; all bytes of one character have that
        character."""
        encoding = self.model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids):
        """Ids -> text; EOS, BOS, padding, other special tokens and ids without a token give
        nothing."""
        kept = [i for i in ids if 0 <= i < self.size and i not in self.silent]
        # a <think> not marked special is text
        return self.model.decode(kept, skip_special_tokens=True)

    def special(self, name):
        """Id of the token `name`; ValueError when there is none."""
        found = self.model.token_to_id(name)
        if found is None:
            raise ValueError(f"the tokenizer has no token {name!r}")
        return found


def _byte_pairs(source):
    """The text of a tokenizer.json -> tokenizers.Tokenizer; ValueError when it is no BPE tokenizer,
    or without the package."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("a byte-level tokenizer.json needs the package `tokenizers`: "
                         "pip install -e \".[hf]\"") from None
    try:
        # Without what a file may ask for beyond text -> ids: cut or padded texts, shortened
        # offsets.
        fields = json.loads(source) | dict(post_processor=None, truncation=None, padding=None)
        kind = fields["model"].get("type", "BPE")
        if kind != "BPE":
            raise ValueError(f"its model is {kind!r} and must be 'BPE'")
        model = tokenizers.Tokenizer.from_str(json.dumps(fields))
    except Exception as error:      # the package raises nothing narrower for a damaged file
        reason = first_line(error)
        raise ValueError(f"no tokenizer.json can be read from its text: {reason}") from None
    # "<|im_end|>" in a question is text, not the end of the turn
    model.encode_special_tokens = True
    return model


# ---------------------------------------------------------------- from a checkpoint, from a folder

def from_saved(saved, where="a saved tokenizer"):
    """What `saved` gave -> the tokenizer again; ValueError for anything else. where: the file, as
    an error names it."""
    try:
        if isinstance(saved, bytes):
            return Tokenizer(saved)
        if isinstance(saved, dict) and set(saved) == {"proto", "added", "names"}:
            return Tokenizer(**saved)
        if isinstance(saved, dict) and set(saved) == {"json", "bos", "eos", "pad"}:
            return BytePairTokenizer(saved["json"], saved["bos"], saved["eos"], saved["pad"])
    except (ValueError, TypeError, AttributeError) as error:        # a dict may hold anything
        reason = first_line(error)
        raise ValueError(f"{where} cannot be used: {reason}") from None
    raise ValueError(f"{where} must be bytes or the dict that `saved` gives, not {type(saved).__name__}")


def load(folder, rows=None):
    """The tokenizer in a model's folder: `tokenizer.model`, else `tokenizer.json`; None when there
    is neither.

    rows: of the model's embedding; tokens that a folder adds beyond them (Llama 2's <pad>) are left
    out.

    BOS, EOS and padding are named by tokenizer_config.json, else by special_tokens_map.json;
    padding without a token of its own is the unknown token, else EOS. `add_bos_token` decides
    whether texts begin with the BOS; without it a sentencepiece model's do, and a tokenizer.json's
    do when it puts one there itself. Raises ValueError naming what is damaged or missing.
    """
    folder = Path(folder)
    for path in (folder / "tokenizer.model", folder / "tokenizer.json"):
        if path.is_file():
            break
    else:
        return None
    try:
        config = _object(folder / "tokenizer_config.json")
        names = _names(_object(folder / "special_tokens_map.json")) | _names(config)
        if path.name == "tokenizer.json":
            return _load_byte_pairs(path, config, names)
        return _load_sentencepiece(path, config, names, rows)
    except (ValueError, OSError) as error:
        raise ValueError(f"the tokenizer {str(path)!r} cannot be used: {error}") from None


def _load_byte_pairs(path, config, names):
    """tokenizer.json, and the names of its special tokens by role -> BytePairTokenizer."""
    bos = names.get("bos")
    begins = config.get("add_bos_token")
    if begins is None:
        # What the tokenizer puts around a text names its tokens.
        frame = json.dumps(_object(path).get("post_processor"))
        begins = json.dumps(bos) in frame
    if not begins:
        bos = None
    pad = names.get("pad") or names.get("unk")
    return BytePairTokenizer(path.read_text(encoding="utf-8"), bos, names.get("eos"), pad)


def _load_sentencepiece(path, config, names, rows):
    """tokenizer.model, and the names of its special tokens by role -> Tokenizer."""
    named = {}
    if names.get("eos"):
        named["eos"] = names["eos"]
    pad = names.get("pad") or names.get("unk")
    if pad:
        named["pad"] = pad
    if config.get("add_bos_token") is False:
        named["bos"] = None
    elif "bos" in names:
        named["bos"] = names["bos"]
    added, beyond = {}, set()
    for name, i in _added(path.parent, config).items():
        if rows is not None and i >= rows:
            beyond.add(name)
        else:
            added[name] = i
    named = {role: name for role, name in named.items() if name not in beyond}
    return Tokenizer(path.read_bytes(), added, named)


def _object(path):
    """A file's JSON object, {} without the file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, not {type(found).__name__}")
    return found


def _names(config):
    """Role -> name of its token or None, of the roles that `config` speaks of."""
    found = {}
    for role in ("bos", "eos", "pad", "unk"):
        if f"{role}_token" not in config:
            continue
        token = config[f"{role}_token"]
        name = token.get("content") if isinstance(token, dict) else token
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{role}_token must be a string or an object with its content, not {token!r}")
        found[role] = name
    return found


def _added(folder, config):
    """Name -> id of the tokens that added_tokens.json or a tokenizer_config.json lists."""
    listed = {}
    try:
        for i, token in config.get("added_tokens_decoder", {}).items():
            listed[token["content"]] = int(i)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("added_tokens_decoder must map ids to objects with a content") from None
    listed |= _object(folder / "added_tokens.json")
    for name, i in listed.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"the added token {name!r} must have a number from 0 on for its id, not {i!r}")
    return listed


# ---------------------------------------------------------------- training one

def train(texts, pieces, size):
    """Byte-pair encoding of `texts` with at most `size` entries, byte fallback, and `pieces` never
    split.

    Spaces are kept as they are and none is added in front, so decode(encode(text)) == text for any
    text without U+2581, which is sentencepiece's space.
    """
    texts = list(texts)
    # With every word a piece of its own BPE has nothing left to merge and refuses a larger size:
    # never ask for more.
    words = set()
    letters = set()
    for text in texts:
        words.update(re.findall(r"\s?\S+", text))
        letters.update(text)
    room = 259 + len(pieces) + len(letters) + sum(len(word) for word in words)
    size = min(size, room)
    while True:
        buffer = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=buffer, vocab_size=size, model_type="bpe",
                byte_fallback=True, character_coverage=1.0, user_defined_symbols=list(pieces),
                split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
                normalization_rule_name="identity", hard_vocab_limit=False, num_threads=1, minloglevel=2,
                max_sentence_length=100_000)
            return Tokenizer(buffer.getvalue())
        except RuntimeError as error:
            message = str(error)
        limit = re.search(r"<= (\d+)", message)
        if limit and int(limit[1]) < size:  # too large for these texts: the error names the largest
            size = int(limit[1])
            continue
        needed = re.search(r"required_chars. \d+ vs (\d+)", message)
        if not needed:
            raise ValueError(f"--vocab={size}: sentencepiece cannot train a tokenizer of that size "
                             "on this data")
        raise ValueError(f"--vocab={size} is too small: the data's {len(letters)} characters, the "
                         f"tags and 256 bytes need at least {needed[1]}")
