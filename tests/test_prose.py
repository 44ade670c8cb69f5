"""Figures in sentences that a page marks as those of the logs must be theirs."""

import pytest
from edit_logs import reported

from record import checks
from record.folder import Folder
from record.log import RecordError, parse_log
from record.run import read_runs


@pytest.fixture(scope="module")
def texts():
    return reported()


@pytest.fixture
def folder(texts, tmp_path):
    (tmp_path / "logs").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def judged(folder, sentence: str, mark: str) -> str:
    """What the check says of a README with this sentence and this mark."""
    page = folder / "README.md"
    page.write_text(f"{page.read_text()}\n{sentence}\n<!-- from the logs: {mark} -->\n")
    try:
        return checks.check_readme(Folder(folder))
    except RecordError as error:
        return str(error)


def score(folder) -> float:
    runs = read_runs([parse_log(path) for path in sorted(folder.glob("logs/seed*.txt"))])
    return sum(run.mixed_bits_per_byte for run in runs) / len(runs)


@pytest.mark.parametrize("digits", [1, 3, 6])
def test_a_figure_may_be_rounded(folder, digits):
    piece = f"{score(folder):.{digits}f} bpb"
    said = judged(folder, f"It has {piece}.", f'"{piece}": mixed_bits_per_byte')
    assert said.endswith("; 1 marked figures in sentences are theirs")


def test_a_sentence_may_go_over_a_line_s_end_and_name_settings_and_logs(folder):
    bpb = parse_log(folder / "logs/seed42.txt").find("final_float_exact").number("val_bpb")
    mark = f'"trained {70} s, {bpb:.2f}": MAX_WALLCLOCK_SECONDS, '
    said = judged(
        folder, f"trained\n70 s, {bpb:.2f}", f"{mark}logs/seed42.txt final_float_exact val_bpb"
    )
    assert "; 2 marked figures" in said


@pytest.mark.parametrize(
    "sentence, mark, said",
    [
        (
            "It has 0.9 bpb.",
            '"0.9 bpb": mixed_bits_per_byte',
            "README.md: 0.9 in '0.9 bpb' is not the 1",
        ),
        ("It has 1 bpb.", '"2 bpb": mixed_bits_per_byte', "names '2 bpb', which it does not say"),
        ("It has 1 bpb.", '"1 bpb": steps, seed', "has 1 numbers, its mark names 2 sources"),
        ("It has 1 bpb.", '"1 bpb": bpb', "'bpb' is no number of a run, expected one of"),
        ("It has 1 bpb.", "1 bpb is the score", 'expected "piece of the page": source'),
        ("It has 1 bpb.", '"1 bpb": NO_SETTING', "found no setting NO_SETTING"),
    ],
    ids=["stale", "not there", "too many", "no number", "no mark", "no setting"],
)
def test_a_mark_that_does_not_hold_is_refused(folder, sentence, mark, said):
    assert said in judged(folder, sentence, mark)
