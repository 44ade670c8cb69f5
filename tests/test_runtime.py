"""What a run says and hears beside learning: signals, the log, the clock, the other ranks."""

import signal

import pytest
import torch
from helpers import ALONE

import train_gpt as t


def test_the_first_signal_stops_what_runs():
    with pytest.raises(t.Stopped, match="^stopped by SIGTERM$"):
        t.StopSignal().handle(signal.SIGTERM, None)


def test_a_second_signal_does_not_interrupt_what_the_first_one_began():
    stop = t.StopSignal()
    with pytest.raises(t.Stopped):
        stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGINT, None)


def test_a_patient_run_only_notes_a_signal():
    stop = t.StopSignal()
    stop.be_patient()
    stop.handle(signal.SIGTERM, None)
    assert stop.name == "SIGTERM"


def test_a_run_that_is_patient_no_longer_is_stopped_at_once():
    stop = t.StopSignal()
    stop.be_patient()
    stop.be_patient(False)
    with pytest.raises(t.Stopped):
        stop.handle(signal.SIGTERM, None)


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
