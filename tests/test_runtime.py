"""What a run says and hears beside learning: signals, the log, the clock, the other ranks."""

import errno
import io
import os
import re
import signal
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import ALONE, KeptLog, tiny

import train_gpt as t

# ---- signals


END = os._exit  # `quick` replaces it


class Ended(BaseException):
    """In the place of the end of the process."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing waits for a signal that is sent again, and no test ends the process."""

    def end(status):
        assert status == 1
        raise Ended

    monkeypatch.setattr(t.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", end)


def stopped(stop: t.StopSignal) -> t.StopSignal:
    """`stop` after its first signal."""
    with pytest.raises(t.Stopped):
        stop.handle(signal.SIGTERM, None)
    return stop


def test_the_first_signal_stops_what_runs():
    with pytest.raises(t.Stopped, match="^stopped by SIGTERM$"):
        t.StopSignal().handle(signal.SIGTERM, None)


def test_nobody_who_catches_exceptions_catches_a_stop():
    assert not issubclass(t.Stopped, Exception)


def test_a_patient_run_only_notes_the_first_signal():
    stop = t.StopSignal()
    stop.be_patient()
    stop.handle(signal.SIGTERM, None)
    assert stop.name == "SIGTERM"


def test_a_run_that_is_patient_no_longer_is_stopped_at_once():
    stop = t.StopSignal()
    stop.be_patient()
    stop.be_patient(False)
    stopped(stop)


RECEIVED = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def second(monkeypatch):
    """second(stop, number, after): a second signal comes, so many seconds after the first."""

    def second(stop: t.StopSignal, number: int = signal.SIGTERM, after: float = 1.0) -> None:
        reader, writer = os.pipe()
        os.write(writer, bytes([signal.SIGALRM, signal.SIGTERM, signal.SIGALRM, number]))
        os.close(writer)
        times = iter([5.0, 5.0 + after])
        monkeypatch.setattr(t, "perf_counter", lambda: next(times))
        stop.watch(reader, RECEIVED)

    return second


@pytest.mark.parametrize("number", RECEIVED)
def test_a_second_signal_ends_the_process(second, number):
    with pytest.raises(Ended):
        second(t.StopSignal(), number)


def test_a_second_signal_is_told_with_what_is_left(second, tmp_path, capfd):
    log = KeptLog(tmp_path / "run.txt")
    log.leaves("checkpoint", "RESUME=run.ckpt goes on from step 3")
    with pytest.raises(Ended):
        second(t.StopSignal(log))
    said = "stopped by a second signal; RESUME=run.ckpt goes on from step 3"
    assert log.lines == [f"error: Stopped: {said}"]
    assert capfd.readouterr().err == f"train_gpt.py: error: {said}\n"


def test_a_second_signal_leaves_nothing_half_written(second, tmp_path):
    own, other = (tmp_path / f"run.ckpt.{pid}.tmp" for pid in (os.getpid(), 1))
    for path in (own, other):
        path.touch()
    with pytest.raises(Ended):
        second(t.StopSignal(KeptLog(tmp_path / "run.txt")))
    assert list(tmp_path.iterdir()) == [other]


def test_a_second_signal_ends_the_process_even_if_nothing_can_be_said(second, tmp_path):
    class Failing(KeptLog):
        def __call__(self, *args, **options):
            raise OSError

    with pytest.raises(Ended):
        second(t.StopSignal(Failing(tmp_path / "run.txt")))


def test_a_signal_that_is_sent_again_at_once_is_the_same(second):
    """As by torchrun, which has got the Ctrl-C of the terminal too."""
    second(t.StopSignal(), after=t.SENT_AGAIN_SECONDS - 0.01)


def test_a_signal_that_the_handler_sees_again_changes_nothing():
    stopped(t.StopSignal()).handle(signal.SIGINT, None)


@pytest.fixture
def handlers():
    """The handlers of all signals are put back."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", RECEIVED)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_stops_a_run_unless_it_was_ignored(handlers, number, ignored):
    """As nohup ignores HUP, and a script's background jobs INT."""
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    stop = t.StopSignal()
    stop.install()
    assert signal.getsignal(number) == (signal.SIG_IGN if ignored else stop.handle)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGQUIT])
def test_other_signals_keep_their_default(handlers, number):
    before = signal.getsignal(number)
    t.StopSignal().install()
    assert signal.getsignal(number) == before


# ---- the other ranks: with two and more, see test_optimizer.py


def test_alone_any_is_what_this_rank_says():
    assert ALONE.any(True, False, 1, 0) == [True, False, True, False]


def test_alone_a_tensor_from_rank_0_is_the_tensor_itself():
    x = torch.randn(3)
    assert ALONE.from_rank0(x) is x


@pytest.mark.parametrize("number", [0.1, 2.0**53 - 1, False])
def test_alone_a_number_from_rank_0_is_that_number(number):
    assert ALONE.from_rank0(number) == number


def test_numbers_are_summed_in_float64():
    number = 2.0**53 - 1  # the clock's milliseconds, and checksums of 32 bits, are no float32
    assert t.Ranks({}).sum_numbers(number, 0.0) == [number, 0.0]


# ---- what torchrun sets

HAND_MADE = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")


@pytest.mark.parametrize(
    "env, place",
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "", "RANK": ""}, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1, 0)),
        (HAND_MADE | {"WORLD_SIZE": "4", "RANK": "3", "MASTER_PORT": "1"}, (3, 4, 0)),
    ],
)
def test_the_place_among_ranks_is_what_torchrun_says(env, place):
    assert t.place_among_ranks(env) == place


@pytest.mark.parametrize(
    "env, said",
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun "
            "--standalone --nproc_per_node=2 train_gpt.py, or unset WORLD_SIZE",
        ),
        (HAND_MADE | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_PORT: "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected an integer"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1': expected an integer"),
        ({"RANK": "1.5"}, "RANK='1.5': expected an integer"),
        ({"LOCAL_RANK": "9" * 5000}, "LOCAL_RANK='999"),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=1: a rank must be below WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0: a rank must be below"),
    ],
)
def test_a_place_among_ranks_that_cannot_be_is_refused(env, said):
    with pytest.raises(t.UserError) as error:
        t.Ranks(env)
    assert str(error.value).startswith(said)


def test_a_rank_does_not_wait_for_ever_for_the_others(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = HAND_MADE | {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    monkeypatch.setattr(t, "RENDEZVOUS_SECONDS", 0.1)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(t.UserError, match=f"not all of the 2 ranks met at 127.0.0.1:{port} within"):
        t.Ranks(env)


# ---- a GPU that cannot be used


@pytest.mark.parametrize(
    "has_gpu, env, warns",
    [
        (True, {}, True),
        (True, {"CUDA_VISIBLE_DEVICES": "0"}, True),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, False),
        (True, {"CUDA_VISIBLE_DEVICES": "-1"}, False),
        (False, {}, False),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_pointed_out(has_gpu, env, warns, monkeypatch, tmp_path):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update ...")

    monkeypatch.setattr(torch.cuda, "init", init)
    (tmp_path / "dev").mkdir()
    (tmp_path / f"dev/nvidia{0 if has_gpu else 'ctl'}").touch()
    said = (
        "this machine has an NVIDIA GPU that torch cannot use, so the run takes the CPU: "
        "The NVIDIA driver on your system is too old."
    )
    assert t.unusable_gpu(torch.device("cpu"), env, tmp_path) == [said] * warns


def test_a_gpu_that_is_used_is_not_pointed_out(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert t.unusable_gpu(torch.device("cuda"), {}, tmp_path) == []


# ---- what a user sees of other people's errors


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee documentation"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_too_little_memory_is_said_in_one_line(error):
    shown = t.explained(error, {}, tiny(), t.StopSignal(), t.RunLog())
    assert type(shown) is t.UserError
    assert str(shown).startswith("out of memory: try MICRO_BATCH_TOKENS=")
    assert "\n" not in str(shown)


# ---- the clock


@pytest.mark.parametrize(
    "elapsed, more, limit, expected",
    [(8, 1, 10, False), (8, 2, 10, False), (8, 3, 10, True), (11, 0, 10, True), (8, 3, 0, False)],
)
def test_work_overruns_a_limit_only_by_ending_after_it(elapsed, more, limit, expected):
    """A limit of 0 is none."""
    assert t.would_overrun(elapsed, more, limit) == expected


# ---- the log


class NarrowFile:
    """Takes three bytes at a time, as a disk that fills up may."""

    def __init__(self):
        self.got = b""

    def write(self, data: bytes) -> int:
        self.got += data[:3]
        return len(data[:3])


def test_a_line_that_is_written_in_parts_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = t.RunLog("run")
    log.file = NarrowFile()
    log("a line", console=False)
    log("another", console=False)
    assert log.file.got == b"a line\nanother\n"


def test_a_log_that_is_refused_for_a_while_is_whole_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = t.RunLog("run")
    file, log.file = log.file, Refusing(errno.EDQUOT)
    log("a line", console=False)
    log.file = file
    log.close()
    assert (tmp_path / "logs/run.txt").read_text() == "a line\n"


def test_what_a_log_lacks_at_the_end_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = t.RunLog("run")
    log.file = Refusing(errno.EDQUOT)
    log("result {}", console=False)
    with pytest.raises(t.UserError, match="^logs/run.txt: Disk quota exceeded; free space there, "):
        log.close()
    assert "result {}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, said",
    [
        ("x" * 300, "^logs/x+.txt: File name too long; choose a shorter RUN_ID$"),
        ("run", "^logs: File exists; move what has this name away$"),
    ],
)
def test_a_log_that_cannot_be_made_is_refused_with_a_remedy(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    if name == "run":
        (tmp_path / "logs").touch()
    with pytest.raises(t.UserError, match=said):
        t.RunLog(name)


# ---- the console


class Refusing:
    """A file that takes nothing, as on a full disk."""

    def __init__(self, number: int):
        self.number = number

    def write(self, data: bytes) -> int:
        raise OSError(self.number, os.strerror(self.number))


class GoneReader(io.RawIOBase):
    """The end of a pipe whose reader has gone."""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


class LostTerminal(io.StringIO):
    """Was a terminal when it was asked last."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


CONSOLES = dict(
    closed_before=lambda: None,
    closed_since=closed_stream,
    broken_pipe=lambda: io.TextIOWrapper(GoneReader(), "utf-8"),
    lost_terminal=LostTerminal,
    ascii=lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    utf8=lambda: io.TextIOWrapper(io.BytesIO(), "utf-8"),
)
ODD = "\u2581caf\u00e9 \udcff\udce4"  # the last two: bytes of a name that is no UTF-8


@pytest.fixture(params=CONSOLES)
def console(request, monkeypatch):
    """Standard output and error are this console."""
    stream = CONSOLES[request.param]()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)


def test_any_console_and_any_name_leave_the_log_whole(tmp_path, monkeypatch, console):
    monkeypatch.chdir(tmp_path)
    log = t.RunLog(ODD)
    log(f"DATA_PATH={ODD}")
    log("result {}", console=False)
    log.close()
    said = "DATA_PATH=\u2581caf\u00e9 \\udcff\\udce4\nresult {}\n"
    assert log.path.read_text(encoding="utf-8") == said


def test_progress_goes_on_on_any_console(tmp_path, monkeypatch, console):
    monkeypatch.chdir(tmp_path)
    now = [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])
    log = t.RunLog("run")
    progress = t.Progress(log, ODD, 2)
    now[0] = 11
    progress(1)
    assert "50% elapsed:11s left:11s" in log.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [None, t.UserError(ODD), ValueError(ODD)])
def test_the_exit_status_is_right_on_any_console(monkeypatch, console, error):
    class Left(BaseException):
        pass

    def leave(status: int):
        raise Left(status)

    monkeypatch.setattr(t.os, "_exit", leave)
    monkeypatch.setattr(t.signal, "signal", lambda *args: None)
    with pytest.raises(Left) as left:
        t.leave(error, 0)
    assert left.value.args == (0 if error is None else 1,)


def test_an_ascii_console_shows_what_it_cannot_spell_by_number():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    t.say(ODD, stream)
    assert stream.buffer.getvalue() == b"\\u2581caf\\xe9 \\udcff\\udce4\n"


def test_closed_streams_get_no_file_of_the_run(tmp_path):
    """What C++ libraries print must not go into a log or a checkpoint."""
    child = os.fork()
    if not child:
        try:
            os.closerange(0, 3)
            t.fill_closed_streams()
            number = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
            os.write(1, b"printed by a library")
            END(0 if number > 2 else 1)
        finally:
            END(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "log").read_bytes() == b""


# ---- files that cannot be written


def said_of(number: int) -> str:
    """What is said of a file that cannot be written because of the error `number`."""
    return t.write_problem(Path("logs/file"), OSError(number, os.strerror(number)))


def test_space_is_asked_for_only_where_it_lacks():
    lacking = {number for number in errno.errorcode if "free space" in said_of(number)}
    assert lacking == {errno.ENOSPC, errno.EDQUOT}


def test_every_error_has_a_name_and_a_remedy():
    for number in errno.errorcode:
        start = f"logs/file: {os.strerror(number)}; "
        assert said_of(number).startswith(start)
        assert len(said_of(number)) > len(start)


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.EACCES, "let this user write to the folder logs"),
        (errno.EROFS, "make the disk of the folder logs writable"),
        (errno.ENOENT, "make the folder logs"),
        (errno.ENOTDIR, "logs is not a folder: move it away"),
        (errno.EISDIR, "move the folder of this name away"),
        (errno.ENAMETOOLONG, "choose a shorter RUN_ID"),
    ],
)
def test_a_remedy_fits_its_error(number, remedy):
    assert f"; {remedy}" in said_of(number)


def test_an_installation_that_cannot_be_loaded_is_as_none(monkeypatch):
    """One that was built for another torch raises more than ImportError."""

    class Broken(types.ModuleType):
        def __getattr__(self, name: str):
            raise RuntimeError("undefined symbol")

    monkeypatch.setitem(sys.modules, "flash_attn_interface", Broken("flash_attn_interface"))
    monkeypatch.setattr(t.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(t.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert t.find_flash_attention.__wrapped__() == ("sdpa", None)


# ---- what a terminal shows


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_heading_and_a_bar_for_each_phase(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    log = t.RunLog("run")
    t.run(tiny(**corpus, MATRIX_LR=0.03), t.Ranks({}), log, t.StopSignal(), [])
    log.close()
    shown = terminal.getvalue()
    parts = ["\nTrain: 12 steps", "] training 100%", "] validation 100%", "\nCompress"]
    parts += ["\nRead back and score", "] scoring 100%", "\nMix", "neural "]
    places = [shown.find(part) for part in parts]
    assert places == sorted(places) and min(places) >= 0, dict(zip(parts, places))
    assert "MATRIX_LR=0.03" in re.search("changed: (.*)", shown)[1].split()
    written = log.path.read_text().split("=" * 100)[1]
    assert "\nchanged: " in written and "#####" not in written
    assert "training 100%" not in written and "\nTrain:" not in written


def test_a_line_replaces_an_unfinished_bar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    log = t.RunLog("run")
    t.Progress(log, "training", 2)(1)
    log("step:1")
    assert terminal.getvalue().endswith(f"left:0s{t.CLEAR}step:1\n")


def test_a_bar_of_a_resumed_run_tells_the_time_that_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = t.Progress(t.RunLog("run"), "training", 1.0, has_lines=False, done=0.5)
    progress(0.5)
    assert terminal.getvalue().endswith("training 50% elapsed:0s")
    now[0] = 10.0
    progress(0.75)
    assert terminal.getvalue().endswith("training 75% elapsed:10s left:10s")
