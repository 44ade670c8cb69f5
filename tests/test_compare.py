"""record compare: runs beside each other, and the test between two groups of seeds."""

import csv
from math import erf

import numpy as np
import pytest

from record import compare
from record.__main__ import main
from record.log import RecordError, parse_log


def write_log(folder, name: str, loss: float | None = 2.0, steps=3, **settings):
    """A log as train_gpt.py writes it; without `loss` the run died after its steps."""
    lines = ["source", "=" * 100, f"RUN_ID={name}", *(f"{n}={v}" for n, v in settings.items())]
    for step in range(1, steps + 1):
        lines.append(
            f"step:{step}/9 train_loss:{5 - step / 10:.4f} train_time:{100 * step}ms "
            "step_avg:100.00ms tok/s:20480 lr_scale:1.0000"
        )
    if loss is not None:
        lines += [
            f"step:{steps}/9 val_loss:2.0 val_bpb:1.2 train_time:{100 * steps}ms step_avg:100.00ms",
            "Total submission size int6+rans: 1234 bytes",
            f"final_int6_sliding_window_exact val_loss:{loss + 0.1:.8f} val_bpb:1.3 stride:64",
            f"final_ngram_exact val_loss:{loss:.8f} val_bpb:{loss / 2:.8f} gain:0.1",
            "total_eval_time:7.5s budget:600s stride:64",
        ]
    path = folder / f"{name}.txt"
    path.write_text("\n".join(lines) + "\n")
    return parse_log(path)


def test_a_row_says_what_its_log_says(tmp_path):
    logs = [
        write_log(tmp_path, "one", 2.0, SEED=42, MATRIX_LR=0.02, NUM_LAYERS=5),
        write_log(tmp_path, "two", 1.5, 4, SEED=7, MATRIX_LR=0.03, NUM_LAYERS=5),
    ]
    _, two = compare.rows(logs)
    assert two == {
        "run": "two",
        "seed": "7",
        "settings": {"MATRIX_LR": "0.03"},
        "steps": 4,
        "step_ms": 100.0,
        "neural_bits_per_byte": 1.3,
        "mixed_bits_per_byte": 0.75,
        "submission_bytes": 1234,
        "train_seconds": 0.4,
        "eval_seconds": 7.5,
    }


def test_a_run_that_died_has_a_row_too(tmp_path):
    died = write_log(tmp_path, "died", None, SEED=1)
    (row,) = compare.rows([died])
    assert (row["steps"], row["mixed_bits_per_byte"], row["submission_bytes"]) == (3, None, None)
    assert " - " in compare.table([row])


def test_many_differences_stand_below_the_table(tmp_path):
    settings = {f"SETTING_{letter}": 12345 for letter in "ABCDEFGH"}
    logs = [write_log(tmp_path, "one", **settings)]
    logs.append(write_log(tmp_path, "two", **dict.fromkeys(settings, 5)))
    text = compare.table(compare.rows(logs))
    assert "\n  SETTING_C: 12345 in one; 5 in two\n" in text
    assert all("SETTING" not in line for line in text.splitlines()[:3])


def test_the_csv_has_the_same_rows(tmp_path, capsys):
    for name, loss in (("a", 2.0), ("b", 1.9)):
        write_log(tmp_path, name, loss, SEED=1)
    paths = [str(tmp_path / f"{name}.txt") for name in "ab"]
    assert main(["compare", *paths, "--csv", str(tmp_path / "c.csv")]) == 0
    with (tmp_path / "c.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["mixed_bits_per_byte"] for row in found] == ["1.0", "0.95"]
    assert "1.0000" in capsys.readouterr().out


def test_losses_are_drawn_in_both_themes(tmp_path, capsys):
    from matplotlib.image import imread

    for name in "ab":
        write_log(tmp_path, name, steps=30)
    paths = [str(tmp_path / f"{name}.txt") for name in "ab"]
    assert main(["compare", *paths, "--plot", str(tmp_path / "p.png")]) == 0
    light, dark = (imread(tmp_path / f"p_{theme}.png")[0, 0, :3] for theme in ("light", "dark"))
    assert light.mean() > 0.9 and dark.mean() < 0.2


def test_a_plot_needs_losses(tmp_path):
    logs = [write_log(tmp_path, "short", steps=1)]
    with pytest.raises(RecordError, match="fewer than two train_loss lines"):
        compare.plot(logs, tmp_path / "p.png")


def two_groups(folder, a: list[float], b: list[float]):
    return [write_log(folder, f"new_{i}", loss, SEED=i) for i, loss in enumerate(a)] + [
        write_log(folder, f"old_{i}", loss, SEED=i) for i, loss in enumerate(b)
    ]


def test_the_test_is_welchs(tmp_path, rng):
    """With so many seeds Student's distribution is nearly normal."""
    a, b = rng.normal(2.0, 0.01, 200), rng.normal(2.002, 0.03, 300)
    said = compare.test(two_groups(tmp_path, a, b), "new", "old_*")
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    p = (1 - erf((b.mean() - a.mean()) / error / np.sqrt(2))) / 2
    assert abs(float(said.split("with p = ")[1].split()[0]) - p) < 0.05 * p + 1e-3
    assert f"{abs(b.mean() - a.mean()):.5f} nats" in said


@pytest.mark.parametrize(
    "gain, holds",
    [(0.02, "holds: p ="), (0.005, "does not hold"), (0.0, "does not hold"), (-0.02, "worse than")],
)
def test_the_challenges_rule_asks_for_five_thousandths(tmp_path, gain, holds):
    a = np.array([2.0, 2.0004, 1.9996])
    assert holds in compare.test(two_groups(tmp_path, a, a + gain), "new", "old")


@pytest.mark.parametrize(
    "a, b, said",
    [
        ("new", "none", "0 of the logs"),
        ("new", "new_*", "found in both groups"),
        ("new_0", "old", "1 of the logs"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(tmp_path, a, b, said):
    logs = two_groups(tmp_path, [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(RecordError, match=said):
        compare.test(logs, a, b)


def test_equal_scores_are_refused(tmp_path):
    with pytest.raises(RecordError, match="same score"):
        compare.test(two_groups(tmp_path, [2.0, 2.0], [2.1, 2.1]), "new", "old")


def test_a_seed_counts_once(tmp_path):
    logs = two_groups(tmp_path, [1.0, 2.0], [1.0, 2.0])
    again = write_log(tmp_path, "new_1_2", 2.0, SEED=1)
    with pytest.raises(RecordError, match="seed 1 is also that of .*new_1.txt"):
        compare.test([*logs, again], "new", "old")


def test_a_group_is_of_one_kind(tmp_path):
    logs = two_groups(tmp_path, [1.0, 2.0], [1.0, 2.0])
    for seed in (7, 8):
        logs.append(write_log(tmp_path, f"new_{seed}", 1.0, SEED=seed, MATRIX_LR=seed))
    with pytest.raises(RecordError, match="differ in MATRIX_LR, expected nothing but the seed"):
        compare.test(logs, "new", "old")


def test_scores_of_different_texts_are_not_compared(tmp_path):
    logs = two_groups(tmp_path, [1.0, 2.0], [1.0, 2.0])
    for log in logs[:2]:
        log.path.write_text(log.path.read_text() + "data:val shards:1 sha256:other\n")
    for log in logs[2:]:
        log.path.write_text(log.path.read_text() + "data:val shards:1 sha256:one\n")
    with pytest.raises(RecordError, match="different texts"):
        compare.test([parse_log(log.path) for log in logs], "new", "old")


def test_a_neural_score_counts_only_without_a_mixture(tmp_path):
    log = write_log(tmp_path, "run", 2.0, SEED=1, NGRAM_ENABLED=True)
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join(line for line in lines if "final_ngram" not in line))
    with pytest.raises(RecordError, match="no final score"):
        compare.final_scores(parse_log(log.path))
    log.path.write_text(log.path.read_text().replace("ENABLED=True", "ENABLED=False"))
    assert compare.final_scores(parse_log(log.path)) == (2.1, 1.3)


def test_logs_of_one_name_are_told_apart(tmp_path):
    logs = []
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        logs.append(write_log(tmp_path / folder, "seed42", steps=5))
    names = [row["run"] for row in compare.rows(logs)]
    assert names == [str(tmp_path / folder / "seed42.txt") for folder in ("old", "new")]


def test_a_log_without_settings_makes_no_difference(tmp_path):
    logs = [write_log(tmp_path, name, SEED=1, NUM_LAYERS=5, DATA_PATH="/my data") for name in "ab"]
    (tmp_path / "x.txt").write_text("")
    logs.append(parse_log(tmp_path / "x.txt"))
    assert compare.rows(logs)[0]["settings"] == {}


def test_a_diverged_run_is_drawn_as_far_as_it_went(tmp_path):
    log = write_log(tmp_path, "nan", steps=4)
    log.path.write_text(log.path.read_text().replace("train_loss:4.6000", "train_loss:nan"))
    assert len(compare.plot([parse_log(log.path)], tmp_path / "p.png")) == 2


def test_a_run_that_died_cannot_be_tested(tmp_path):
    logs = [
        *two_groups(tmp_path, [1.0, 2.0], [1.0, 2.0]),
        write_log(tmp_path, "new_9", None, SEED=9),
    ]
    with pytest.raises(RecordError, match="no final score"):
        compare.test(logs, "new", "old")
