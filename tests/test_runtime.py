"""What a run says and hears beside learning: signals, the log, the other ranks."""

import signal

import pytest

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
    stop.patient = True
    stop.handle(signal.SIGTERM, None)
    assert stop.name == "SIGTERM"


def test_numbers_are_summed_in_float64():
    number = 2.0**53 - 1  # the clock's milliseconds, and checksums of 32 bits, are no float32
    assert t.Ranks({}).sum_numbers(number, 0.0) == [number, 0.0]


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
