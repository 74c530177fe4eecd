"""Where each record of a JSON file begins and ends, found without parsing: a gigabyte takes
seconds, not minutes.

A bracket counts when it stands outside a string. So all that must be known about a byte is whether
an odd number of quotes came before it, and how many brackets are open there; numpy counts both, a
chunk at a time.
"""
import codecs

import numpy as np

WHITE = b" \t\r\n"              # what JSON calls white space
CHUNK = 2 ** 24  # bytes looked at together: few enough for little memory, enough for numpy to pay
EXPECTED = "expected a JSON list of objects, or JSON objects one after the other"


def spans(file):
    """Binary file -> (start, stop), each (n,) int64: the bytes of its n records.

    The file is one list of objects, or objects one after the other (one a line, or each over many
    lines); a byte order mark may come first. Raises ValueError, a sentence that follows the file's
    name, when it is anything else or is cut short. What is inside an object is not looked at.
    """
    offset = 0                                  # of the chunk in the file
    if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        offset = len(codecs.BOM_UTF8)
    file.seek(offset)
    base = None                                 # brackets open between records: 1 in a list, else 0
    escaped = False                             # is the next byte?
    in_string = False                           # is the next byte?
    depth = 0                                   # open brackets
    found = 0                                   # records that have begun
    gap = b""  # what stands after the last record, without white space
    starts = [np.zeros(0, np.int64)]
    stops = [np.zeros(0, np.int64)]
    while text := file.read(CHUNK):
        if base is None:
            base = _base(text)
        if base is None:                        # nothing but white space so far
            offset += len(text)
            continue
        chunk = np.frombuffer(text, dtype=np.uint8)
        quotes, escaped = unescaped_quotes(chunk, escaped)
        at, step = brackets(chunk, quotes, in_string)
        in_string = bool((len(quotes) + in_string) % 2)
        before = depth
        after = before + np.cumsum(step)        # open brackets behind each of the brackets
        if len(after):
            depth = int(after[-1])
        start = at[(step > 0) & (after == base + 1)]
        stop = at[(step < 0) & (after == base)] + 1
        # Gaps lead from a stop to the next start. The first may have begun in the chunk before, the
        # last may go on in the next one.
        gap_begins = stop.tolist()
        if before <= base:
            gap_begins.insert(0, 0)
        gap_ends = start.tolist()
        if depth <= base:
            gap_ends.append(len(text))
        gaps = [text[a:b].translate(None, WHITE) for a, b in zip(gap_begins, gap_ends)]
        if before <= base:
            gaps[0] = gap + gaps[0]
        gap = gaps.pop() if depth <= base else b""
        check(gaps, found, base)
        if len(gap) > 2:  # "[]" is the longest that can still be right at the end
            check([gap], found + len(gaps), base)
        lists = np.flatnonzero(chunk[start] != ord("{"))
        if len(lists):
            raise ValueError(f"has a list as record {found + lists[0]}; {EXPECTED}")
        crossed = np.flatnonzero(chunk[stop - 1] != ord("}"))
        if len(crossed):
            number = found - (before > base) + crossed[0]
            raise ValueError(f"has brackets that do not match in record {number}")
        found += len(gaps)
        starts.append(start + offset)
        stops.append(stop + offset)
        offset += len(text)
    _check_end(base, depth, found, gap)
    return np.concatenate(starts), np.concatenate(stops)


def _base(text):
    """How many brackets are open between records, by the first byte of the file; None for white
    space."""
    head = text.lstrip(WHITE)
    if not head:
        return None
    if head[:1] not in (b"[", b"{"):
        raise ValueError(f"begins with {head[:20]!r}; {EXPECTED}")
    return int(head[:1] == b"[")


def _check_end(base, depth, found, gap):
    """Raises ValueError unless the file may end here, after `gap`."""
    if base is None:
        raise ValueError(f"is empty; {EXPECTED}")
    if depth > base:
        raise ValueError(f"is cut short: record {found - 1} never closes; is the download complete?")
    if base and gap in (b"[", b"", b","):
        raise ValueError(f"is cut short: its list never closes after {found} records; is the "
                         "download complete?")
    if gap == b"[]":
        raise ValueError(f"holds no records; {EXPECTED}")
    if gap != b"]" * base:
        raise ValueError(f"ends with {gap!r}; {EXPECTED}")


def check(gaps, found, base):
    """What stands before records `found`, `found` + 1, ... must be the list's own bracket and
    commas, or nothing. Raises ValueError for anything else."""
    for number, gap in enumerate(gaps, found):
        if not base:
            wanted = b""
        elif number:
            wanted = b","
        else:
            wanted = b"["
        if gap != wanted:
            raise ValueError(f"has {gap[:20]!r} before record {number} where {wanted!r} belongs; "
                             f"{EXPECTED}")


def unescaped_quotes(chunk, escaped):
    """(n,) uint8, is its first byte escaped? -> (positions of the quotes that are not escaped, is
    the byte after the chunk escaped?)

    In a run of backslashes the first, third, .. escape what follows them; the others are escaped
    themselves.

    >>> unescaped_quotes(np.frombuffer(rb'"\\"\\\\"', np.uint8), False)
    (array([0, 5]), False)
    """
    slashes = np.flatnonzero(chunk == ord("\\"))
    slashes = np.concatenate([[-1] * escaped, slashes]).astype(np.int64)  # the one before the chunk
    begins = np.diff(slashes, prepend=-3) > 1
    place = slashes - np.maximum.accumulate(np.where(begins, slashes, -1))      # in its run, from 0
    follows = np.zeros(len(chunk) + 1, dtype=bool)
    follows[slashes[place % 2 == 0] + 1] = True
    quotes = np.flatnonzero(chunk == ord('"'))
    return quotes[~follows[quotes]], bool(follows[-1])


def brackets(chunk, quotes, in_string):
    """-> (positions of the brackets outside strings, +1 for each that opens and -1 for each that
    closes)."""
    folded = chunk | 0x20                                   # makes { of [, and } of ]
    at = np.flatnonzero((folded == ord("{")) | (folded == ord("}")))
    at = at[(np.searchsorted(quotes, at) + in_string) % 2 == 0]
    return at, np.where(folded[at] == ord("{"), 1, -1)
