"""A reward that harms its own process: hostile(sample, "fork 3") forks and then returns 3, if it is still there."""
import contextlib
import fcntl
import os
import signal
import sys
import threading
import time


class Silent(Exception):
    def __str__(self):
        raise RuntimeError


def write(data):
    """Into every pipe it can find, the one of its answers among them."""
    for fd in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(fd, data)


def fork():
    os.fork()


def close_stdin():
    sys.stdin.close()


def close_fd_0():
    with contextlib.suppress(OSError):
        os.close(0)


def read_stdin():
    with contextlib.suppress(OSError):
        os.read(0, 1 << 20)


def print_much():
    print("y" * 100_000)


def write_to_stdout():
    os.write(1, b'{"number": 1, "value": 1.0, "error": ""}\n')


def leave_a_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()


def leave_a_child():
    if os.fork() == 0:
        time.sleep(1000)


def throw():
    raise ValueError("no")


def throw_half_a_character():
    raise ValueError("\ud800")


def throw_silently():
    raise Silent


def leave():
    sys.exit(0)


def deep():
    return deep()


def exit_at_once():
    os._exit(0)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all():
    os.killpg(os.getpgrp(), signal.SIGKILL)


def close_all():
    os.closerange(0, 100)


def close_pipes():
    os.closerange(3, 100)


def close_what_it_reads():
    for fd in range(3, 20):
        with contextlib.suppress(OSError):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                os.close(fd)


def replace_pipes():
    for fd in range(3, 10):
        os.dup2(2, fd)


def go_on_as_a_child():
    if os.fork():
        os._exit(0)


def write_a_line():
    write(b"garbage\n")


def write_part_of_a_line():
    write(b"garbage")


def write_many_lines():
    write(b'{"value": 1.0}\n' * 1000)


def write_without_end():
    while True:
        write(b"[" * 60_000)


def hang():
    time.sleep(1000)


HARMLESS = [fork, read_stdin, close_stdin, close_fd_0, print_much, write_to_stdout, leave_a_thread, leave_a_child]
FAILING = [throw, throw_half_a_character, throw_silently, leave, deep]      # the process goes on
FATAL = [exit_at_once, kill, kill_all, close_all, close_pipes, close_what_it_reads, replace_pipes, go_on_as_a_child,
         write_a_line, write_part_of_a_line, write_many_lines, write_without_end]
HARM = {harm.__name__: harm for harm in [*HARMLESS, *FAILING, *FATAL, hang]}


def hostile(sample, text):
    harm, _, number = text.rpartition(" ")
    if harm:
        HARM[harm]()
    return float(number)


def dies_between_calls(sample, text):
    threading.Timer(0.05, exit_at_once).start()
    return 1.0


def writes_between_calls(sample, text):
    threading.Timer(0.05, write_without_end).start()
    return 1.0


def reads_no_more(sample, text):
    """Stops its process a little after it has answered."""
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    return 1.0


def runs_on(sample, text):
    threading.Thread(target=hang).start()
    return 1.0
