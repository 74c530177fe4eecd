"""A sentencepiece BPE model as a `tokenizer.json`, for programs that read nothing else.

transformers builds one by itself, but for a LLaVA it forgets the space that sentencepiece adds in
front of a text, and every word that begins a stretch becomes another token. What is written here
gives sentencepiece's own ids, except for special tokens spelt in a text: this format always reads
them as tokens.
"""
import json

USER_DEFINED = 4        # of sentencepiece_model.proto's SentencePiece.Type
SPACE = "\u2581"        # sentencepiece's sign for a space


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
        # 1 and 5 are of fixed size, what else there is begins with its length.
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[at:at + size]
        at += size


def user_defined(proto):
    """Ids of the pieces that were given to the trainer, which are never split: nothing else tells
    them apart."""
    pieces = [dict(fields(value)) for number, value in fields(proto) if number == 1]
    return {i for i, piece in enumerate(pieces) if piece.get(3) == USER_DEFINED}


def merges(vocab, score):
    """Pieces -> the pairs that make them, in the order in which BPE merges them.

    vocab: piece -> id; score: piece -> sentencepiece's, higher is merged first. A piece that can be
    made of several pairs of pieces has them all, by their ids.
    """
    found = []
    for piece in score:
        for border in range(1, len(piece)):
            left = piece[:border]
            right = piece[border:]
            if left in vocab and right in vocab:
                found.append((-score[piece], vocab[left], vocab[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def tokenizer_json(proto, model, bos_id, added):
    """A sentencepiece model of type BPE -> the text of a tokenizer.json.

    proto: the model as bytes; model: its SentencePieceProcessor; bos_id: what begins a text, or
    None; added: name -> id of special tokens beside it.
    """
    vocab, special, score = {}, {}, {}
    given = user_defined(proto)
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        vocab[piece] = i
        if model.is_control(i) or model.is_unknown(i):
            special[piece] = i
        elif not model.is_byte(i) and i not in given:
            score[piece] = model.get_score(i)
    special |= added
    never_split = special | {model.id_to_piece(i): i for i in given}
    adds_space = model.encode_as_pieces("a")[0].startswith(SPACE)
    contents = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=_added_tokens(never_split, special),
        normalizer=_normalizer(adds_space),
        pre_tokenizer=None,
        post_processor=_post_processor(model, bos_id),
        decoder=_decoder(adds_space),
        model=dict(type="BPE", dropout=None, unk_token=model.id_to_piece(model.unk_id()),
                   continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True,
                   byte_fallback=True, ignore_merges=False, vocab=vocab, merges=merges(vocab, score)))
    return json.dumps(contents, ensure_ascii=False)


def _added_tokens(never_split, special):
    tokens = []
    for name, i in sorted(never_split.items(), key=lambda item: item[1]):
        tokens.append(dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False,
                           normalized=False, special=name in special))
    return tokens


def _normalizer(adds_space):
    steps = []
    if adds_space:
        steps.append(dict(type="Prepend", prepend=SPACE))
    steps.append(dict(type="Replace", pattern=dict(String=" "), content=SPACE))
    return dict(type="Sequence", normalizers=steps)


def _post_processor(model, bos_id):
    """Puts the BOS, if there is one, in front of a text."""
    front, tokens = [], {}
    if bos_id is not None:
        name = model.id_to_piece(bos_id)
        front = [dict(SpecialToken=dict(id=name, type_id=0))]
        tokens = {name: dict(id=name, ids=[bos_id], tokens=[name])}
    first = dict(Sequence=dict(id="A", type_id=0))
    second = dict(Sequence=dict(id="B", type_id=0))
    return dict(type="TemplateProcessing", single=[*front, first], pair=[*front, first, second],
                special_tokens=tokens)


def _decoder(adds_space):
    steps = [dict(type="Replace", pattern=dict(String=SPACE), content=" "),
             dict(type="ByteFallback"),
             dict(type="Fuse")]
    if adds_space:
        steps.append(dict(type="Strip", content=" ", start=1, stop=0))
    return dict(type="Sequence", decoders=steps)
