"""The client of an endpoint, against a real socket: what is retried, what ends a run, and that nothing is lost."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import train
from data import endpoint, records
from data.teaching import EndpointTeacher, in_parallel, make_records
from endpoint_server import KEY, Server, completion, good, number_of, options, picture, questions, text_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")


def run(server, folder, count=1, **values):
    """`count` questions to a server -> (Tally, the records of the file)."""
    teacher = EndpointTeacher(server.url, options(**values), wait=0.01)
    tally = make_records(folder / "out.jsonl", questions(count, folder), (), count, teacher)
    return tally, list(records.read(folder / "out.jsonl"))


def test_a_good_reply_is_kept_with_where_it_comes_from(tmp_path):
    with Server(lambda body, n: good()) as server:
        tally, [record] = run(server, tmp_path, teacher_temperature=0.5, teacher_max_new=99)
    [body] = server.seen
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 99)
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert (record.reason, record.summary, record.caption, record.reasoning, record.conclusion) == (
        "", "a plan", "a picture", "so it is", "two")
    assert (record.teacher, record.model, record.served, record.finish_reason, record.attempt) == (
        server.url, "m", "served-1", "stop", 1)
    assert record.usage == {"prompt_tokens": 11, "completion_tokens": 7}
    assert (tally.kept, tally.dropped, tally.tokens_in, tally.tokens_out) == (1, 0, 11, 7)


def test_at_its_defaults_the_endpoint_is_told_neither_temperature_nor_tokens(tmp_path):
    with Server(lambda body, n: good()) as server:
        run(server, tmp_path)
    assert set(server.seen[0]) == {"model", "messages"}


@pytest.mark.parametrize("bad", [
    (500, {}, b"oops"), (503, {}, b""), "hang", "cut", "reset", (200, {}, b"{]"), (200, {}, b"[]"),
    {"choices": []}, {"error": {"message": "busy"}}, {"choices": [{"message": {"content": 3}}]}])
def test_what_is_no_reply_is_asked_for_again(tmp_path, bad):
    with Server(lambda body, n: bad if n < 3 else good(), hang=0.3) as server:
        tally, [record] = run(server, tmp_path, teacher_timeout=0.15)
    assert (len(server.seen), tally.kept, record.reason) == (3, 1, "")


def test_a_reply_that_comes_drop_by_drop_is_given_up_after_the_timeout(tmp_path):
    with Server(lambda body, n: "drip" if n == 1 else good()) as server:
        began = time.monotonic()
        tally, _ = run(server, tmp_path, teacher_timeout=0.2)
    assert tally.kept == 1 and time.monotonic() - began < 2        # 400 drops would take 20 s


def test_after_429_all_requests_pause_as_long_as_the_endpoint_says(tmp_path):
    refused = []

    def reply(body, n):
        if n == 5:
            refused.append(time.monotonic())
            return 429, {"Retry-After": "1"}, b""
        time.sleep(0.02)
        return good()

    with Server(reply) as server:
        tally, _ = run(server, tmp_path, 12, teacher_jobs=4)
    after = [moment - refused[0] for moment in server.times if moment > refused[0] + 0.2]
    assert (tally.kept, len(server.seen)) == (12, 13)
    assert len(after) >= 4 and min(after) > 0.95


def test_an_overloaded_endpoint_is_left_alone_as_long_as_it_says(tmp_path):
    with Server(lambda body, n: (503, {"Retry-After": "1"}, b"") if n == 1 else good()) as server:
        run(server, tmp_path)
    assert server.times[1] - server.times[0] > 0.95


def test_a_pause_is_capped_and_does_not_count_as_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE", 0.02)
    with Server(lambda body, n: (429, {"Retry-After": "86400"}, b"") if n <= 9 else good()) as server:
        tally, _ = run(server, tmp_path)
    assert (tally.kept, len(server.seen)) == (1, 10)               # more than RETRIES would allow


def test_a_request_that_keeps_failing_is_dropped_and_a_later_run_asks_again(tmp_path):
    said = json.dumps({"error": {"message": f"no memory for {KEY}"}}).encode()
    with Server(lambda body, n: (500, {}, said)) as server:
        tally, [record] = run(server, tmp_path, teacher_tries=3)
    assert len(server.seen) == 1 + endpoint.RETRIES
    assert (record.reason, record.error) == ("failed", "HTTP 500 no memory for [key]") and tally.count["failed"] == 1
    with Server(lambda body, n: good()) as server:
        tally, found = run(server, tmp_path, teacher_tries=3)
    assert (len(server.seen), tally.kept, tally.dropped, len(found)) == (1, 1, 0, 2)


@pytest.mark.parametrize("reply, reason", [
    (completion(None, refusal="I will not."), "refused"),
    (completion("I'm sorry, but I can't help with that."), "refused"),
    ((400, {}, b'{"error": {"message": "content policy"}}'), "refused"),
    (completion("<SUMMARY> a plan</SUMMARY><CAPTION> and", "length"), "cut_off"),
    (completion("", "content_filter"), "cut_off"),
    (completion(None), "empty"), (completion("  "), "empty"),
    (completion("It is two."), "malformed"), (good("three"), "wrong")])
def test_a_reply_to_drop_is_tried_so_often_and_never_again(tmp_path, reply, reason):
    with Server(lambda body, n: reply) as server:
        tally, found = run(server, tmp_path, teacher_tries=2)
        assert (len(server.seen), [record.reason for record in found]) == (2, [reason, reason])
        assert [record.attempt for record in found] == [1, 2] and tally.count[reason] == 2
        run(server, tmp_path, teacher_tries=2)
        assert len(server.seen) == 2
        run(server, tmp_path, teacher_tries=3)                      # one more than the file has
        assert len(server.seen) == 3


def test_the_second_try_stands_beside_the_first(tmp_path):
    with Server(lambda body, n: good("three") if n == 1 else good()) as server:
        tally, found = run(server, tmp_path, teacher_tries=2)
    assert [record.reason for record in found] == ["wrong", ""]
    assert (tally.kept, tally.dropped, tally.tokens_out) == (1, 1, 14)


def test_content_in_parts_is_read(tmp_path):
    parts = [{"type": "text", "text": good()["choices"][0]["message"]["content"]}]
    with Server(lambda body, n: completion(parts)) as server:
        tally, _ = run(server, tmp_path)
    assert tally.kept == 1


# ---------------------------------------------------------------- what ends a run

@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_further_request_could_cure_ends_the_run_at_once_in_one_sentence(tmp_path, capsys, status):
    said = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    with Server(lambda body, n: (status, {}, said)) as server:
        with pytest.raises(ValueError) as error:
            run(server, tmp_path, 100, teacher_jobs=2)
    message = str(error.value)
    assert f"HTTP {status} bad key [key]: " in message and "\n" not in message
    assert len(server.seen) <= 2                                    # those that were under way
    assert KEY not in message + "".join(capsys.readouterr())
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_whoever_asks_after_the_end_is_told_its_reason_and_sends_nothing():
    with Server(lambda body, n: (401, {}, b"no key")) as server:
        client = endpoint.Endpoint(server.url, "m")
        client.reserve(2)
        for _ in range(2):
            with pytest.raises(endpoint.Fatal, match="HTTP 401 no key"):
                client.chat([endpoint.message("user", "What?")], {})
    assert len(server.seen) == 1


def test_a_redirect_is_not_followed(tmp_path):
    with Server(lambda body, n: good()) as other:
        to = f"{other.url}/chat/completions"
        with Server(lambda body, n: (307, {"Location": to}, b"")) as server:
            with pytest.raises(ValueError, match="sends requests on to another address; name that one"):
                run(server, tmp_path)
    assert other.seen == []


def test_failures_in_a_row_end_the_run(tmp_path):
    with Server(lambda body, n: (400, {}, b"no such parameter")) as server:
        with pytest.raises(ValueError, match="3 requests in a row came to nothing; .*no such parameter"):
            run(server, tmp_path, 50, teacher_failures=3, teacher_jobs=1)
    assert len(server.seen) == 3


def test_a_success_between_failures_starts_the_count_anew(tmp_path):
    with Server(lambda body, n: (400, {}, b"") if n % 3 else good()) as server:
        tally, _ = run(server, tmp_path, 9, teacher_failures=3, teacher_jobs=1)
    assert (tally.kept, tally.count["refused"]) == (3, 6)


@pytest.mark.parametrize("prompting, most, kept", [("stages_one_call", 5, 5), ("stages", 11, 2)])
def test_the_limit_on_requests_leaves_no_question_halfway(tmp_path, capsys, prompting, most, kept):
    values = dict(teacher_prompting=prompting, teacher_jobs=3)
    with Server(in_stages) as server:
        tally, _ = run(server, tmp_path, 6, teacher_requests=most, **values)
        assert (tally.kept, len(server.seen)) == (kept, kept * (4 if prompting == "stages" else 1))
        assert "the same command goes on" in capsys.readouterr().out
        tally, _ = run(server, tmp_path, 6, **values)
        assert tally.kept == 6


@pytest.mark.parametrize("url", ["http://user:pass@h/v1", "http://h/v1?key=abc", "ftp://h/v1", "http:///v1",
                                 "http://h:port/v1"])
def test_an_address_that_could_hold_a_secret_is_refused_unspoken(url):
    with pytest.raises(ValueError) as error:
        EndpointTeacher(url, options())
    assert "http://HOST/v1" in str(error.value) and "pass@" not in str(error.value) and "abc" not in str(error.value)


def test_a_key_that_no_header_can_hold_is_refused_unspoken(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nX-Other: two")
    with pytest.raises(ValueError) as error:
        EndpointTeacher("http://h/v1", options())
    assert "OPENAI_API_KEY" in str(error.value) and "sk-one" not in str(error.value)


# ---------------------------------------------------------------- prompts

def in_stages(body, n):
    """Replies to a conversation of any length: all four sections, or the next one."""
    if "four parts" in text_of(body):
        return good()
    said = [message for message in body["messages"] if message["role"] == "assistant"]
    return completion(["the plan", "the picture", "the reason", "<answer> two</answer>"][len(said)])


def test_stage_by_stage_each_request_shows_what_came_before(tmp_path):
    with Server(in_stages) as server:
        tally, [record] = run(server, tmp_path, teacher_prompting="stages")
    assert [len(body["messages"]) for body in server.seen] == [1, 3, 5, 7]
    said = [message["content"] for message in server.seen[-1]["messages"] if message["role"] == "assistant"]
    assert said == ["the plan", "the picture", "the reason"]
    assert (record.summary, record.caption, record.reasoning, record.conclusion) == (*said, "two")
    assert record.usage == {"prompt_tokens": 44, "completion_tokens": 28}      # of all four


def test_a_stage_that_is_cut_off_asks_no_further(tmp_path):
    with Server(lambda body, n: completion("the pl", "length")) as server:
        tally, [record] = run(server, tmp_path, teacher_prompting="stages")
    assert (len(server.seen), record.reason, record.text) == (1, "cut_off", {"summary": "the pl"})


@pytest.mark.parametrize("sees", [False, True])
def test_the_gold_answer_is_in_the_prompt_only_of_a_teacher_that_sees_it(tmp_path, sees):
    with Server(lambda body, n: good()) as server:
        _, [record] = run(server, tmp_path, teacher_sees_answer=sees)
    assert ("The right answer is: two." in text_of(server.seen[0])) == sees == ("two" in text_of(server.seen[0]))
    assert record.sees_answer == sees


# ---------------------------------------------------------------- the key

def test_the_key_is_in_no_file_and_no_output(tmp_path, capfd):
    def reply(body, n):
        said = f"the key is {KEY}"
        return [good(), completion(f"<SUMMARY> {said}</SUMMARY>", KEY), completion(None, refusal=said),
                (400, {"X-Key": KEY}, said.encode())][min(n - 1, 3)]

    with Server(reply) as server:
        source = tmp_path / "mine.jsonl"
        lines = [{"image": picture(tmp_path), "question": f"number {i} ?", "answer": answer, "split": split}
                 for i, (answer, split) in enumerate([("two", "train")] * 5 + [("three", "train"), ("two", "val")])]
        lines[-1]["image"] = other_picture(tmp_path)
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match="2 requests in a row") as error:
            train.main(["--stage=teach", f"--teacher={server.url}", "--teacher-model=m", f"--data=jsonl:{source}",
                        f"--records={tmp_path / 'out.jsonl'}", "--teacher-jobs=1", "--teacher-failures=2",
                        "--teacher-tries=1", "--threads=1"])
    found = list(records.read(tmp_path / "out.jsonl"))
    assert [record.reason for record in found] == ["held_out", "", "malformed", "refused", "refused"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = "".join(capfd.readouterr()) + str(error.value)
    assert b"the key is [key]" in written
    assert KEY not in said and KEY.encode() not in written and json.dumps(KEY)[1:-1].encode() not in written


def other_picture(folder):
    path = folder / "other.png"
    Image.new("RGB", (5, 4), "red").save(path)
    return str(path)


# ---------------------------------------------------------------- killed and resumed; memory

def test_no_more_questions_are_taken_than_twice_the_jobs():
    taken = []
    waiting = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    done = 0
    for _ in in_parallel(lambda i: i, items(), jobs=3):
        done += 1
        waiting.append(len(taken) - done)
    assert done == 100 and max(waiting) <= 6


class Slow:
    def __del__(self):
        time.sleep(0.05)


def test_no_thread_is_left_when_all_is_done():
    local = threading.local()
    threads = set()

    def work(_):
        local.slow = Slow()             # goes when the thread ends, which takes it a while
        threads.add(threading.current_thread())

    list(in_parallel(work, range(6), jobs=2))
    assert threads and not any(thread.is_alive() for thread in threads)


def test_an_error_of_a_thread_is_raised_and_drops_what_waits():
    begun = []
    stopped = []

    def work(i):
        begun.append(i)
        if i == 3:
            raise KeyError(i)
        time.sleep(0.01)

    with pytest.raises(KeyError):
        list(in_parallel(work, range(1000), 2, lambda: stopped.append(True)))
    time.sleep(0.1)
    assert stopped == [True] and len(begun) <= 8


JOBS = 3


def forked(folder, count):
    """A process that makes records, and begins when it is told a port -> (its id, where to write the port).

    It is forked before a server's threads run in this process, none of whose locks it can then inherit."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(read)
        return child, write
    try:
        os.close(write)
        port = os.read(read, 100).decode()
        teacher = EndpointTeacher(f"http://127.0.0.1:{port}/v1", options(teacher_jobs=JOBS), wait=0.01)
        make_records(folder / "out.jsonl", questions(count, folder), (), count, teacher)
    finally:
        os._exit(0)


def killed_and_resumed(folder, count, kills, rng):
    picture(folder)
    path = folder / "out.jsonl"
    asked = Counter()
    in_flight = Counter()

    def reply(body, n):
        time.sleep(0.002)
        return good()

    for _ in range(kills):
        child, write = forked(folder, count)
        with Server(reply) as server:
            os.write(write, str(server.http.server_port).encode())
            os.close(write)
            already = sum(asked.values())
            until = rng.randint(1, max(1, (count - already) // 2))
            while len(server.seen) < until:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        seen = Counter(number_of(body) for body in server.seen)
        done = {record.id for record in records.read(path)}
        unanswered = {i for i in seen if f"q{i}" not in done}
        assert len(unanswered) <= JOBS and max(seen.values()) == 1
        in_flight.update(unanswered)
        asked += seen

    with Server(reply) as server:
        teacher = EndpointTeacher(server.url, options(teacher_jobs=JOBS), wait=0.01)
        tally = make_records(path, questions(count, folder), (), count, teacher)
    asked += Counter(number_of(body) for body in server.seen)
    assert tally.kept == count
    assert sorted(record.id for record in records.read(path)) == sorted(f"q{i}" for i in range(count))
    for i in range(count):
        assert asked[i] == 1 + in_flight[i]


def test_a_killed_run_goes_on_and_asks_nothing_twice_but_what_was_under_way(tmp_path):
    killed_and_resumed(tmp_path, 60, 1, random.Random(0))


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_has_every_record_once(tmp_path):
    killed_and_resumed(tmp_path, 400, 10, random.Random(1))


PROGRAM = """
import os, sys
sys.path.insert(0, "tests")
from pathlib import Path
from endpoint_server import options, questions
from data.teaching import EndpointTeacher, make_records

found = []

def watched(samples):
    for i, sample in enumerate(samples):
        if i % 500 == 0:
            pages = int(open("/proc/self/statm").read().split()[1])
            found.append(pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20)
        yield sample

folder, count = Path(sys.argv[2]), int(sys.argv[3])
teacher = EndpointTeacher(sys.argv[1], options(teacher_jobs=4))
tally = make_records(folder / "out.jsonl", watched(questions(count, folder)), (), count, teacher)
print(tally.kept, found[1], max(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory from")
def test_a_hundred_thousand_records_take_bounded_memory(tmp_path):
    count = int(os.environ.get("SEETHINK_RECORDS", 10_000))        # the claim in full: SEETHINK_RECORDS=100000
    picture(tmp_path)
    bodies = Counter()

    class Lean(Server):
        """Keeps none of the requests."""
        def send(self, handler, reply):
            bodies[""] += 1
            self.seen.clear(), self.times.clear(), self.headers.clear()
            super().send(handler, reply)

    with Lean(lambda body, n: good()) as server:
        done = subprocess.run([sys.executable, "-c", PROGRAM, server.url, str(tmp_path), str(count)], cwd=ROOT,
                              capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, before, peak = (float(word) for word in done.stdout.split())
    print(f"{count} records: {before:.1f} MiB after 500, {peak:.1f} MiB at most")
    assert kept == count == bodies[""]
    # Some 300 bytes a question for its keys, where the records themselves take more than 1,000.
    assert peak - before < 4 + 400 * count / 2 ** 20
