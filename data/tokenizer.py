"""Sentencepiece tokenizer, trained on the data's own text; its model travels with the checkpoint as bytes."""
import io
import re

import sentencepiece as spm

UNK, BOS, EOS = 0, 1, 2
IMAGE_ID = -200     # an image token; outside the vocabulary, so that it can be neither spelt nor sampled


class Tokenizer:
    """proto: a serialised sentencepiece model. Padding is the unknown piece, as in LLaVA."""
    bos_id, eos_id, pad_id, image_id = BOS, EOS, UNK, IMAGE_ID

    def __init__(self, proto: bytes):
        self.proto = proto
        self.model = spm.SentencePieceProcessor(model_proto=proto)

    def __len__(self):
        return self.model.get_piece_size()

    @property
    def banned(self):
        """Ids that are never sampled: padding (= unknown) and the beginning of a text."""
        return (self.pad_id, self.bos_id)

    def encode(self, text):
        """Text -> ids, without BOS or EOS. Tags are pieces of their own, "</s>" is literal text."""
        return self.model.encode(text)

    def decode(self, ids):
        """Ids -> text; EOS, BOS, padding and the spare rows of a padded embedding give nothing."""
        # A space that no piece holds comes back from its bytes as sentencepiece's own sign for it.
        return self.model.decode([i for i in ids if EOS < i < len(self)]).replace("\u2581", " ")


def train(texts, pieces, size):
    """Byte-pair encoding of `texts` with at most `size` entries, byte fallback, and `pieces` never split.

    Spaces are kept as they are and none is added in front, so decode(encode(text)) == text for any text without
    U+2581, which is sentencepiece's space.
    """
    texts = list(texts)
    # With every word a piece of its own BPE has nothing left to merge and refuses a larger size: never ask for more.
    words = {word for text in texts for word in re.findall(r"\s?\S+", text)}
    letters = {letter for text in texts for letter in text}
    room = 259 + len(pieces) + len(letters) + sum(len(word) for word in words)
    size = min(size, room)
    while True:
        buffer = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=buffer, vocab_size=size, model_type="bpe",
                byte_fallback=True, character_coverage=1.0, user_defined_symbols=list(pieces), split_digits=True,
                add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
                hard_vocab_limit=False, num_threads=1, minloglevel=2, max_sentence_length=100_000)
            return Tokenizer(buffer.getvalue())
        except RuntimeError as error:
            limit = re.search(r"<= (\d+)", str(error))
            if limit and int(limit[1]) < size:
                size = int(limit[1])
                continue
            needed = re.search(r"required_chars. \d+ vs (\d+)", str(error))
            reason = (f"the data's {len(letters)} characters, the tags and 256 bytes need at least {needed[1]}"
                      if needed else f"or the tokenizer cannot be trained: {str(error).splitlines()[0]}")
            raise ValueError(f"--vocab={size} is too small: {reason}") from None
