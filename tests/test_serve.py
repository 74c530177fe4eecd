"""eval.py --serve: answers over a real socket equal eval.py's own, and what no client can do to the server."""
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from data import tokenizer
from data.chat import encode
from data.sample import Sample
from hostile_http import PICTURE, ask, attack, bomb, cases, data_url, encoded, exchange, look_at, post
from model.generate import Completions, generate
from model.runs import checkpoint
from rl.requests import Limits, Refused
from rl.serve import Model, Server, _ends
from tiny import make_vlm

BODY = 2 ** 20
LIMITS = Limits(body=BODY, sampled=64, seconds=20.0)
TOKENIZER = tokenizer.train(["what is at b2 ? red circle two"], ["<image>"], 400)
VLM = make_vlm(llm=dict(vocab=len(TOKENIZER)))
PROMPTING = evaluation.Prompting(method="direct", template="brief", max_new=8)


def make_model(answer=generate, limits=LIMITS):
    return Model("tiny/rl", VLM, TOKENIZER, PROMPTING.template, PROMPTING.max_new, answer, limits)


@contextmanager
def serving(model):
    """A Server of the model in a thread."""
    server = Server("127.0.0.1", 0, model)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.close()


@pytest.fixture(scope="module")
def port():
    with serving(make_model()) as server:
        yield server.server_port


def answers(port, raw):
    """The texts, reasons and usage that a request gets."""
    status, _, body = exchange(port, raw)
    assert status == 200, body
    found = json.loads(body)
    assert found["object"] == "chat.completion" and found["model"] == "tiny/rl"
    assert [choice["index"] for choice in found["choices"]] == [*range(len(found["choices"]))]
    texts = [choice["message"]["content"] for choice in found["choices"]]
    return texts, [choice["finish_reason"] for choice in found["choices"]], found["usage"]


def error(port, raw):
    """(status, message) of a refused request."""
    status, _, body = exchange(port, raw)
    return status, json.loads(body)["error"]["message"]


def prompt(**fields):
    """The prompt ids that a request becomes."""
    return make_model().read(json.dumps(ask(**fields)).encode()).row[0]


def ids_of(sample, system=None):
    return encode(sample, TOKENIZER, VLM.config.image_tokens, "direct", "brief", system=system)[0]


def picture_part():
    return dict(type="image_url", image_url=dict(url=data_url(PICTURE)))


# ---------------------------------------------------------------- answers

def test_a_greedy_answer_about_a_picture_is_evals_own(port):
    picture = np.asarray(Image.linear_gradient("L").resize((40, 23)).convert("RGB"))
    sample = Sample(images=(picture,), question="what is at b2 ?")
    own = evaluation.complete(VLM, TOKENIZER, [sample], PROMPTING)
    raw = look_at(data_url(PICTURE), text="what is at b2 ?").replace(b'"max_tokens": 4', b'"max_tokens": 8')
    texts, _, usage = answers(port, raw)
    assert texts == own.texts[0]
    asked = len(ids_of(sample))
    assert usage == dict(prompt_tokens=asked, completion_tokens=8, total_tokens=asked + 8)
    assert answers(port, post(ask(max_tokens=8)))[0] != texts       # without the picture it is another


def test_answers_sampled_with_a_seed_are_evals_own(port):
    own = evaluation.complete(VLM, TOKENIZER, [Sample(question="what ?")], PROMPTING, group=3, temperature=0.8,
                              top_p=0.9, seed=5)
    request = ask("what ?", n=3, temperature=0.8, top_p=0.9, seed=5, max_tokens=None)
    texts, _, _ = answers(port, post(request))
    assert texts == own.texts[0] and len(set(texts)) > 1
    assert answers(port, post(request | dict(seed=6)))[0] != texts


def test_without_a_seed_two_requests_are_sampled_apart(port):
    one, two = (answers(port, post(ask(temperature=None, max_tokens=8)))[0] for _ in range(2))
    assert one != two


def test_a_temperature_close_to_0_is_greedy(port):
    greedy, _, _ = answers(port, post(ask(max_tokens=8)))
    assert answers(port, post(ask(max_tokens=8, temperature=1e-320, top_p=0.9, n=2)))[0] == greedy * 2


def test_an_answer_ends_in_front_of_the_first_stop_text(port):
    [whole], [reason], usage = answers(port, post(ask(max_tokens=8)))
    assert reason == "length" and usage["completion_tokens"] == 8
    # Two letters of it in the order in which they first appear.
    early, late = [*dict.fromkeys(letter for letter in whole if letter.isascii())][:2]
    wanted = whole[:whole.index(early)]
    [text], [reason], usage = answers(port, post(ask(max_tokens=8, stop=[late, early])))
    assert (text, reason) == (wanted, "stop") and usage["completion_tokens"] < 8
    assert answers(port, post(ask(max_tokens=8, stop=early)))[0] == [wanted]


def test_a_stop_text_may_lie_across_tokens():
    ids = TOKENIZER.encode("red circle")
    assert len(ids) > 1
    says = _ends(TOKENIZER, ["d circle"], lambda: False)
    assert says(torch.tensor([ids])).tolist() == [True] and says(torch.tensor([ids[:-1]])).tolist() == [False]
    assert _ends(TOKENIZER, [], lambda: True)(torch.tensor([ids])).tolist() == [True]


def test_max_tokens_cuts_an_answer_off(port):
    for name in ("max_tokens", "max_completion_tokens"):
        _, [reason], usage = answers(port, post(ask(**{"max_tokens": 7, name: 3})))
        assert reason == "length" and usage["completion_tokens"] == 3


def test_the_end_of_the_turn_is_a_stop_and_no_text():
    [word] = TOKENIZER.encode("b")[-1:]

    def says_one_word(vlm, batch, group, max_new, eos_id, **options):
        ids = torch.tensor([[[word, eos_id, 0], [word, word, word]]])
        mask = torch.tensor([[[True, True, False], [True, True, True]]])
        return Completions(ids, mask, ids.double()), 0

    model = make_model(says_one_word)
    found = model.answer(model.read(json.dumps(ask(n=2)).encode()), lambda: False)
    assert [choice["message"]["content"] for choice in found["choices"]] == ["b", "bbb"]
    assert [choice["finish_reason"] for choice in found["choices"]] == ["stop", "length"]
    assert found["usage"]["completion_tokens"] == 5


def test_models_and_health_are_listed(port):
    status, _, body = exchange(port, b"GET /v1/models HTTP/1.1\r\n\r\n")
    assert status == 200 and [model["id"] for model in json.loads(body)["data"]] == ["tiny/rl"]
    status, _, body = exchange(port, b"GET /health HTTP/1.1\r\n\r\n")
    assert status == 200 and json.loads(body) == {"status": "ok"}


# ---------------------------------------------------------------- prompts

def test_earlier_messages_are_turns_and_system_opens():
    messages = [dict(role="system", content="be short ."), dict(role="user", content=[picture_part()]),
                dict(role="assistant", content="red"), dict(role="user", content="two ?")]
    sample = Sample(images=(PICTURE,), turns=(("", "red"),), question="two ?")
    assert prompt(messages=messages) == ids_of(sample, system="be short .")
    assert ids_of(sample, system="be short .") != ids_of(sample)


def test_a_picture_of_a_later_message_stands_there():
    messages = [dict(role="user", content="a"), dict(role="assistant", content="b"),
                dict(role="user", content=[dict(type="text", text="c"), picture_part()])]
    sample = Sample(images=(PICTURE,), turns=(("a", "b"),), question="<image>\nc")
    assert prompt(messages=messages) == ids_of(sample)


@pytest.mark.parametrize("content, literal", [
    ("the <image> of", "the < image> of"), ("<<image>image>", "<< image>image>"), ("<<image>>", "<< image>>"),
    ([dict(type="text", text="<ima"), dict(type="text", text="ge>")], "< image>")])
def test_a_placeholder_that_a_client_spells_is_no_picture(content, literal):
    messages = [dict(role="user", content=content)]
    assert prompt(messages=messages) == ids_of(Sample(question=literal))
    assert TOKENIZER.image_id not in prompt(messages=messages)
    messages[0]["content"] = [picture_part(), dict(type="text", text="<image>")]
    assert prompt(messages=messages).count(TOKENIZER.image_id) == VLM.config.image_tokens


def test_the_room_of_the_model_bounds_max_tokens():
    room = len(prompt()) + 5
    model = make_model(limits=Limits(room=room))
    assert model.read(json.dumps(ask(max_tokens=5)).encode()).max_tokens == 5
    assert model.read(json.dumps(ask(max_tokens=None)).encode()).max_tokens == 5       # the model's own 8 do not fit
    with pytest.raises(Refused, match=f"the prompt's {room - 5} tokens and max_tokens=6 exceed the {room} tokens"):
        model.read(json.dumps(ask(max_tokens=6)).encode())
    with pytest.raises(Refused, match="n=3 answers of max_tokens=22 exceed the 64 tokens of one request"):
        make_model().read(json.dumps(ask(n=3, max_tokens=22)).encode())


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("raw, status, said", [
    (post(ask(n=65)), 400, "n=65 must be a whole number from 1 to 64"),
    (post(ask(temperature="0")), 400, "temperature='0' must be a number in [0, 2]"),
    (post(ask(top_p=0)), 400, "top_p=0 must be a number in (0, 1]"),
    (post(ask(stream=True)), 400, "stream must be false: this server sends an answer as a whole"),
    (post(ask(frequency_penalty=0.5)), 400, "frequency_penalty=0.5 cannot be served; leave the field out"),
    (post(ask(messages=[dict(role="tool", content="a")])), 400, "messages[0].role='tool' must be 'user'"),
    (post(ask(model="gpt-9")), 404, "model must be 'tiny/rl', the only one here, not 'gpt-9'"),
    (post(b"[" * 10_000), 400, "the body's JSON is nested too deeply"),
    (look_at("file:///etc/passwd"), 400, "messages[0].content has the picture 'file:///etc/passwd'; expected"),
    (look_at(data_url(bomb(60_000, 60_000))), 400, "picture 0 of messages cannot be used: it has far too many pixels"),
    (look_at(data_url(bomb(8_192, 8_192))), 400, "picture 0 of messages cannot be used: it has 8192 x 8192 pixels"),
    (look_at(data_url(PICTURE[:60])), 400, "picture 0 of messages cannot be used: image of 60 bytes cannot be read")])
def test_a_refusal_names_what_was_expected(port, raw, status, said):
    found = error(port, raw)
    assert found[0] == status and found[1].startswith(said)


def test_a_picture_is_at_most_so_many_pixels():
    limits = Limits(pixels=12, side=5)
    for size, fits in (((3, 4), True), ((13, 1), False), ((4, 4), False), ((6, 2), False), ((2, 5), True)):
        model = make_model(limits=limits)
        if fits:
            assert model.see(encoded(Image.new("RGB", size))).shape == (15, 15, 3)
        else:
            with pytest.raises(ValueError, match=f"it has {size[0]} x {size[1]} pixels; expected .* at most 12 pixels"):
                model.see(encoded(Image.new("RGB", size)))


def test_a_hundred_hostile_requests_get_their_status_and_the_next_one_its_answer(port):
    before = answers(port, post(ask()))
    statuses = attack(port, 100, BODY, patience=0.1)
    assert {400, 404} <= set(statuses) and statuses[500] == 0
    assert answers(port, post(ask())) == before


def test_every_listed_request_gets_its_status(port):
    for name, raw, status in cases(BODY):
        assert (name, exchange(port, raw)[0]) == (name, status)


def test_a_slow_request_is_ended():
    limits = Limits(seconds=0.2)
    with serving(make_model(limits=limits)) as server:
        began = time.monotonic()
        late = "the request did not arrive in time"
        assert error(server.server_port, post(ask())[:-5]) == (408, late)
        assert error(server.server_port, b"GET /health HT") == (408, late)
        # A byte every tenth of a second does not buy more time.
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.settimeout(0.05)
            got = b""
            while not got and time.monotonic() - began < 5:
                connection.sendall(b"G")
                try:
                    got = connection.recv(100)
                except TimeoutError:
                    pass
        assert got.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 5


# ---------------------------------------------------------------- the queue

class Held:
    """A `generate` that waits for `go` in its first call, and counts its calls."""

    def __init__(self):
        self.calls = 0
        self.started = threading.Event()
        self.go = threading.Event()

    def __call__(self, *args, **options):
        self.calls += 1
        self.started.set()
        assert self.go.wait(20)
        return generate(*args, **options)


def wait_for(fact):
    end = time.monotonic() + 20
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.005)


def send(port, raw):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(raw)
    return connection


def test_a_full_queue_is_a_503_and_those_in_it_are_answered():
    held = Held()
    with serving(make_model(held, Limits(waiting=1))) as server:
        first = send(server.server_port, post(ask()))
        assert held.started.wait(20)
        second = send(server.server_port, post(ask()))
        wait_for(lambda: server.waiting.taken == 2)
        status, head, body = exchange(server.server_port, post(ask()))
        assert status == 503 and "Retry-After: 1" in head and b"as many requests wait as may, 2; try again" in body
        assert exchange(server.server_port, b"GET /health HTTP/1.1\r\n\r\n")[0] == 200
        held.go.set()
        for connection in (first, second):
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            connection.close()


def test_a_client_gone_before_its_turn_is_not_computed():
    held = Held()
    with serving(make_model(held, Limits(waiting=1))) as server:
        first = send(server.server_port, post(ask()))
        assert held.started.wait(20)
        send(server.server_port, post(ask())).close()
        wait_for(lambda: server.waiting.taken == 2)
        held.go.set()
        wait_for(lambda: server.waiting.taken == 0)
        assert exchange(server.server_port, post(ask()))[0] == 200
        assert held.calls == 2
        first.close()


def test_an_answer_that_nobody_waits_for_is_broken_off():
    started = threading.Event()
    ended = threading.Event()

    def endless(vlm, batch, group, max_new, eos_id, stop, **options):
        started.set()
        while not stop(torch.zeros(group, 1, dtype=torch.long)).all():
            time.sleep(0.005)
        ended.set()
        return generate(vlm, batch, group, max_new, eos_id, **options)

    with serving(make_model(endless)) as server:
        connection = send(server.server_port, post(ask()))
        assert started.wait(20)
        assert not ended.wait(0.1)
        connection.close()
        assert ended.wait(20)


def test_connections_beyond_the_limit_get_a_503():
    with serving(make_model(limits=Limits(connections=2))) as server:
        idle = [send(server.server_port, b"GET ") for _ in range(2)]
        status, message = error(server.server_port, b"GET /health HTTP/1.1\r\n\r\n")
        assert status == 503 and message.startswith("as many connections are open as may be, 2;")
        for connection in idle:
            connection.close()
        wait_for(lambda: exchange(server.server_port, b"GET /health HTTP/1.1\r\n\r\n")[0] == 200)


def test_bodies_that_are_read_at_once_are_counted_in_bytes():
    big = post(ask(user="x" * 3000))
    with serving(make_model(limits=Limits(bodies=5000))) as server:
        half = send(server.server_port, big[:1000])
        wait_for(lambda: server.bodies.taken > 3000)
        status, message = error(server.server_port, big)
        assert status == 503 and "bodies may take, 5000;" in message
        half.close()
        wait_for(lambda: server.bodies.taken == 0)
        assert exchange(server.server_port, big)[0] == 200


@pytest.mark.parametrize("failure, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "the model ran out of memory; a smaller n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the model ran out of memory"),
    (RuntimeError("shape '[3]' is invalid"), "the model failed on this request"),
    (ZeroDivisionError("secret"), "the model failed on this request")])
def test_a_model_that_fails_is_a_500_and_the_next_request_is_answered(failure, said, capsys):
    failures = [failure]

    def fails_once(*args, **options):
        if failures:
            raise failures.pop()
        return generate(*args, **options)

    with serving(make_model(fails_once)) as server:
        status, message = error(server.server_port, post(ask()))
        assert status == 500 and message.startswith(said) and "secret" not in message
        assert answers(server.server_port, post(ask()))[1] == ["length"]
    assert f"a request failed: {type(failure).__name__}: {failure}" in capsys.readouterr().err


# ---------------------------------------------------------------- eval.py

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "run-1" / "rl.pt"
    path.parent.mkdir()
    checkpoint.save(path, dict(stage="rl", method="think", vlm_config=VLM.config_dict(), vlm=VLM.state_dict(),
                               tokenizer=TOKENIZER.saved, config=dict(template="brief", max_new=6, data="")))
    return path


def test_eval_serves_until_an_interrupt(saved, capsys, monkeypatch):
    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    evaluation.main([f"--checkpoint={saved}", "--serve=0"])
    said = capsys.readouterr().out
    assert re.fullmatch(r"serving run-1/rl at http://127\.0\.0\.1:[1-9]\d*/v1\nstopped\n", said)


@pytest.mark.parametrize("flags, said", [
    (["--serve=0", "--ask=what ?"], "--serve=0 and --ask=what ? do not go together: a client brings its own questions"),
    (["--serve=0", "--data=jsonl:x"], "--serve=0 and --data=jsonl:x do not go together"),
    (["--serve=0", "--export=hf:x"], "--serve=0 and --export=hf:x do not go together"),
    (["--serve=0", "--method=think"], "--serve=0 and --method=think do not go together"),
    (["--serve=0", "--prompting=ccot"], "--serve=0 and --prompting=ccot do not go together"),
    (["--serve=70000"], "--serve=70000 must lie in [-1, 65535]"),
    (["--serve=here"], "--serve=here must be a whole number")])
def test_flags_that_do_not_go_with_serve_are_one_sentence(saved, flags, said):
    with pytest.raises(ValueError) as caught:
        evaluation.main([f"--checkpoint={saved}", *flags])
    assert str(caught.value).startswith(said)


def test_a_port_in_use_is_one_sentence(saved):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--serve={number} cannot be listened to at --host=127.0.0.1"):
            evaluation.main([f"--checkpoint={saved}", f"--serve={number}"])


def resident(pid):
    """MiB of memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1024


@pytest.mark.slow
def test_a_thousand_hostile_requests_cost_little_memory_and_an_interrupt_ends_the_server(saved):
    command = [sys.executable, "eval.py", f"--checkpoint={saved}", "--serve=0", "--device=cpu"]
    # What a shell runs in the background ignores interrupts, and so would a child of these tests.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, preexec_fn=heeds)
    try:
        line = process.stdout.readline()
        number = int(re.search(r":(\d+)/v1$", line)[1])
        before = answers_of_run(number)
        began = resident(process.pid)
        statuses = attack(number, 1000, Limits().body)
        after = resident(process.pid)
        print(f"{dict(statuses)}; resident {began} MiB before, {after} MiB after")
        assert answers_of_run(number) == before
        assert statuses[500] == 0 and after < began + 300
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
    finally:
        process.kill()


def answers_of_run(port):
    status, _, body = exchange(port, post(ask()))
    assert status == 200
    return json.loads(body)["choices"]
