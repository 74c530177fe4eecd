"""Ends a run of several ranks that cannot go on, with a sentence that says who and where.

A thread of every rank tells torchrun's store, every BEAT seconds, that it lives and what its rank is at, and reads what
the others tell. A rank that has been silent for SILENCE seconds has died or lost its network. Where no rank has got on
for `patience` seconds, they wait for each other: one has not come to where the others meet.
"""
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

BEAT = 1.0                  # seconds
SILENCE = 50.0              # seconds: a machine with too much to do is slow, and a dead one known within a minute

_dog = None                 # of this process; None in a run of one
_ending = threading.Lock()  # taken for good by what ends this process
_advice = "--resume goes on from the last checkpoint"       # of a sentence that says why a run ends


class Watchdog(threading.Thread):
    """store: of torch.distributed; at, waiting_for: what this rank is at, and waits for."""

    def __init__(self, store, rank, world, patience):
        super().__init__(daemon=True)
        self.store = store
        self.rank = rank
        self.world = world
        self.patience = patience
        self.at = "the start"
        self.waiting_for = ""
        self.marks = 0
        self.beats = 0
        self.is_over = threading.Event()
        now = time.monotonic()
        self.told = {other: ("", "", "") for other in range(world)}     # beats, marks, place
        self.heard = dict.fromkeys(range(world), now)                   # when a rank's beats last changed
        self.moved = now                                                # when any rank's marks last changed

    def run(self):
        while not self.is_over.wait(BEAT):
            try:
                self.tell()
                self.listen()
            except (RuntimeError, OSError):         # the store is on the node that torchrun's agents meet on
                if not self.is_over.is_set():
                    end("the store of torchrun is gone, and with it the node that held the run together; this rank was "
                        f"at {self.place()}")
            fault = self.fault(time.monotonic())
            if fault and not self.is_over.is_set():
                end(fault)

    def place(self):
        waits = f", waiting for {self.waiting_for}" if self.waiting_for else ""
        return self.at + waits

    def tell(self):
        self.beats += 1
        self.store.set(f"rank{self.rank}", f"{self.beats}|{self.marks}|{self.place()}")

    def listen(self):
        """Takes down what the ranks have told."""
        now = time.monotonic()
        for other in range(self.world):
            if not self.store.check([f"rank{other}"]):
                continue
            told = tuple(self.store.get(f"rank{other}").decode().split("|", 2))
            if told[0] != self.told[other][0]:
                self.heard[other] = now
            if told[1] != self.told[other][1]:
                self.moved = now
            self.told[other] = told

    def fault(self, now):
        """Why the run cannot go on at the time `now`, as a sentence; "" where nothing is wrong."""
        for other in range(self.world):
            beats, _, place = self.told[other]
            if beats != "done" and now - self.heard[other] > SILENCE:
                return (f"rank {other} has been silent for {SILENCE:.0f} s; it was at {place or 'the start'}. The run "
                        f"ends; {_advice}")
        if now - self.moved > self.patience:
            return (f"no rank has got on for {self.patience} s: {self.places()}. The run ends; {_advice}, --patience "
                    "waits longer")
        return ""

    def places(self):
        """What each rank is at, those at the same place together."""
        at = {}
        for other in range(self.world):
            at.setdefault(self.told[other][2] or "the start", []).append(str(other))
        words = []
        for place, ranks in at.items():
            words.append(f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks)} at {place}")
        return "; ".join(words)

    def is_first_to_say(self):
        """Whether no other rank has said yet why the run ends. True where nobody can be asked."""
        try:
            return self.store.compare_set("said", "", str(self.rank)) == str(self.rank).encode()
        except (RuntimeError, OSError):
            return True


def store_of_torchrun(timeout, purpose):
    """A connection to the store that torchrun's first agent hosts, with keys of one purpose and attempt: what ranks
    said before they were started again says nothing of those after."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    return dist.PrefixStore(f"seethink/{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def start(rank, world, patience):
    """Sets the dog on. Its connection is its own, so that no wait of the main thread blocks it."""
    global _dog
    _dog = Watchdog(store_of_torchrun(timedelta(seconds=SILENCE), "watchdog"), rank, world, patience)
    _dog.start()


def stop():
    """Calls the dog off: this rank has come to its end. Waits for the others to come to theirs: one that leaves while
    another still receives what it has sent would break that off."""
    global _dog
    if not _dog:
        return
    _dog.is_over.set()
    _dog.join()
    with suppress(RuntimeError, OSError):           # the others may have gone with the store already
        _dog.store.set(f"rank{_dog.rank}", f"done|{_dog.marks}|its end")
        _dog.store.set(f"end{_dog.rank}", "")
        _dog.store.wait([f"end{other}" for other in range(_dog.world)], timedelta(seconds=SILENCE))
    _dog = None


def end(fault, status=1):
    """Ends this process, from whatever thread: the main one may hang in a wait that nothing but the process's end ends.
    Of all ranks one says why. Returns where this process is ending already, by another thread or below a signal."""
    if not _ending.acquire(blocking=False):
        return
    if _dog is None or _dog.is_first_to_say():
        os.write(2, f"train.py: {f'rank {_dog.rank}: ' if _dog else ''}{fault}\n".encode())
    os._exit(status)


def advise(how):
    """What the user is told to do when this run ends before its time."""
    global _advice
    _advice = how


def advice():
    return _advice


def place():
    """What this rank is at, and waits for."""
    return _dog.place() if _dog else "work"


def at(place):
    """What this rank is at from now on, as in "rl, step 3"."""
    if _dog:
        _dog.at = place
        _dog.marks += 1


def waits_for(what):
    """What this rank waits for, "" for nothing."""
    if _dog:
        _dog.waiting_for = what
        _dog.marks += bool(what)
