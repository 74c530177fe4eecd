"""A sentencepiece BPE model as a `tokenizer.json`, for programs that read nothing else.

transformers builds one by itself, but for a LLaVA it forgets the space that sentencepiece adds in front of a text, and
every word that begins a stretch becomes another token. What is written here gives sentencepiece's own ids, special
tokens spelt in a text apart, which this format always reads as tokens.
"""
import json

USER_DEFINED = 4        # of sentencepiece_model.proto's SentencePiece.Type


def fields(message):
    """A protobuf message (bytes) -> its (number, value): int for a varint, bytes for all else."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[at:at + size]
        at += size


def user_defined(proto):
    """Ids of the pieces that were given to the trainer, which are never split: nothing else tells them apart."""
    pieces = [dict(fields(value)) for number, value in fields(proto) if number == 1]
    return {i for i, piece in enumerate(pieces) if piece.get(3) == USER_DEFINED}


def merges(vocab, score):
    """Pieces -> the pairs that make them, in the order in which BPE merges them.

    vocab: piece -> id; score: piece -> sentencepiece's, higher is merged first. A piece that can be made of several
    pairs of pieces has them all, by their ids.
    """
    found = []
    for piece in score:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        found += [(-score[piece], vocab[left], vocab[right], left, right) for left, right in pairs]
    return [[left, right] for *_, left, right in sorted(found)]


def tokenizer_json(proto, model, bos_id, added):
    """proto: a sentencepiece model of type BPE, as bytes; model: its SentencePieceProcessor; bos_id: what begins a
    text, or None; added: name -> id of special tokens beside it. -> the text of a tokenizer.json."""
    ids = range(model.get_piece_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    special = {model.id_to_piece(i): i for i in ids if model.is_control(i) or model.is_unknown(i)} | added
    plain = [i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    own = {model.id_to_piece(i): i for i in user_defined(proto)}
    score = {model.id_to_piece(i): model.get_score(i) for i in plain if model.id_to_piece(i) not in own}
    replace = dict(type="Replace", pattern=dict(String=" "), content="\u2581")
    front = [dict(type="Prepend", prepend="\u2581")] if model.encode_as_pieces("a")[0].startswith("\u2581") else []
    begin = [] if bos_id is None else [dict(SpecialToken=dict(id=model.id_to_piece(bos_id), type_id=0))]
    text = [dict(Sequence=dict(id="A", type_id=0))]
    return json.dumps(dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False,
                           special=name in special) for name, i in sorted((own | special).items(), key=lambda x: x[1])],
        normalizer=dict(type="Sequence", normalizers=[*front, replace]), pre_tokenizer=None,
        post_processor=dict(type="TemplateProcessing", single=begin + text, pair=begin + text + [
            dict(Sequence=dict(id="B", type_id=0))], special_tokens={} if bos_id is None else {
                model.id_to_piece(bos_id): dict(id=model.id_to_piece(bos_id), ids=[bos_id],
                                                tokens=[model.id_to_piece(bos_id)])}),
        decoder=dict(type="Sequence", decoders=[
            dict(type="Replace", pattern=dict(String="\u2581"), content=" "), dict(type="ByteFallback"),
            dict(type="Fuse"), *([dict(type="Strip", content=" ", start=1, stop=0)] if front else [])]),
        model=dict(type="BPE", dropout=None, unk_token=model.id_to_piece(model.unk_id()),
                   continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True, byte_fallback=True,
                   ignore_merges=False, vocab=vocab, merges=merges(vocab, score))), ensure_ascii=False)
