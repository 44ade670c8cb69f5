"""The script as users start it: under torchrun, in an empty folder,
with settings from the environment."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    BEFORE_STEP,
    BRIEF,
    ROOT,
    SCORES,
    patched,
    run_script,
    scores_of,
    tiny,
    values,
    write_shard,
)

import train_gpt as t

# ---- a run


@dataclass
class Ran:
    """A run on so many ranks, and what it left."""

    ranks: int
    cwd: Path
    said: str
    log: str


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ran(request, runs) -> Ran:
    cwd, result = runs[request.param]
    return Ran(request.param, cwd, result.stdout, (cwd / "logs/test.txt").read_text())


@pytest.mark.parametrize("averaging, validations", [("none", 2), ("ema", 3)])
def test_no_weights_are_validated_twice(tmp_path, corpus, averaging, validations):
    """Those that are trained; their averages, if there are any; those in the file."""
    code = """
plain = t.validation_scores
def counted(*args):
    print("a validation")
    return plain(*args)
t.validation_scores = counted
"""
    script = patched(tmp_path / "counting.py", code)
    done = run_script(tmp_path, 0, script, **corpus, **BRIEF, AVERAGING=averaging)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a validation") == validations
    (trained,) = re.findall(r"^step:\S+ val_loss:(\S+)", done.stdout, re.M)
    (packed,) = re.findall(r"^final_float_exact val_loss:(\S+)", done.stdout, re.M)
    assert (f"{float(packed):.4f}" == trained) == (averaging == "none")


def test_the_log_begins_with_the_source(ran):
    assert ran.log.startswith((ROOT / "train_gpt.py").read_text())


def test_the_log_has_what_repeats_the_run(ran):
    for fact in (
        f"hardware:{ran.ranks} x ",
        "attention:sdpa",
        "torch:",
        "\nNUM_LAYERS=4\n",
        "\nVE_LAYERS=2,3\n",
    ):
        assert fact in ran.log


@pytest.mark.parametrize(
    "line",
    [
        r"data:val shards:1 tokens:6001 sha256:[0-9a-f]{64}",
        r"data:tokenizer sha256:[0-9a-f]{64}",
        r"data:train shards:3 tokens:\d+ sha256:[0-9a-f]{64}",
        r"data:train_shards 000000:\d+:[0-9a-f]{16} 000001:\S+ 000002:\S+",
        r"data:stream name:unknown",
        r"data:round_trip documents:\d+ parts:1 tokens:\d+ bytes:\d+",
        r"data:unknown tokens:0 documents:0",
    ],
)
def test_the_log_says_what_was_trained_on_and_scored(ran, line):
    assert re.search(f"^{line}$", ran.log, re.M)


@pytest.mark.parametrize(
    "line",
    [
        r"seed:1337",
        r"model_params:\d+",
        r"train_loader:dataset:\S+ train_shards:3",
        r"val_loader:shards pattern=\S+/fineweb_val_\*\.bin tokens:6000",
        r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=\S+/tiny\.model",
    ],
)
def test_the_log_has_the_lines_that_other_tools_look_for(ran, line):
    written = ran.log.split("=" * 100)[1]
    assert len(re.findall(f"^{line}$", written, re.M)) == 1


def test_a_mistyped_setting_is_pointed_out(ran):
    assert "warning: NUM_LAYER is set but is no setting; did you mean NUM_LAYERS?" in ran.said


def test_a_setting_without_effect_is_pointed_out(ran):
    assert "warning: TTT_LR=0.5 has no effect with TTT_EPOCHS=0" in ran.said


def test_each_step_has_a_line(ran):
    line = (
        r"^step:(\d+)/12 train_loss:\d+\.\d+ train_time:\d+ms step_avg:\S+ms tok/s:\d+ "
        r"lr_scale:\S+$"
    )
    assert re.findall(line, ran.log, re.M) == [str(step) for step in range(1, 13)]


def test_the_log_says_when_late_qat_begins(ran):
    assert "\nlate_qat:on step:11 lr_scale:0.1667 bits:6 straight\n" in ran.log


@pytest.mark.parametrize("name", SCORES)
def test_a_score_in_nats_and_in_bits_per_byte_are_the_same(ran, name):
    found = values(ran.log, name)
    bytes_per_target = float(found["val_loss"]) / np.log(2) / float(found["val_bpb"])
    said = values(ran.log, "train_tokens:")
    exact = int(said["val_bytes"]) / int(said["val_targets"])
    assert bytes_per_target == pytest.approx(exact, rel=1e-6)


def test_exact_counts_lower_the_score_of_real_text(ran):
    mixed, neural = values(ran.log, "final_ngram_exact"), values(ran.log, "final_int6_sliding")
    assert mixed["counts"] == "exact"
    assert float(mixed["val_bpb"]) < float(neural["val_bpb"])


def test_the_log_has_an_audit_of_the_mixture(ran):
    audit = values(ran.log, "ngram_audit")
    assert audit["targets"] == "6000/6000"
    assert audit["prefix"] == "6000"
    assert int(audit["recounted"]) > 0
    assert audit["mass_min"] == audit["mass_max"] == "1.000000000000"


def test_the_log_has_the_size_of_code_and_artifact(ran):
    size = (ran.cwd / "logs/test.int6.ptz").stat().st_size
    assert f"Serialized model int6+rans: {size} bytes" in ran.log
    total = size + (ROOT / "train_gpt.py").stat().st_size
    assert f"Total submission size int6+rans: {total} bytes" in ran.log


@pytest.mark.parametrize(
    "word", ["neural", "mixed", "artifact", "training", "evaluation", "logs/test.txt"]
)
def test_a_run_ends_with_a_summary(ran, word):
    assert re.search(rf"^  .*{word}", ran.said.split("total_eval_time")[-1], re.M)


def test_a_run_leaves_an_artifact_and_logs(ran):
    """No checkpoint: the artifact is whole."""
    assert sorted(p.name for p in ran.cwd.iterdir()) == ["final_model.int6.ptz", "logs"]
    assert sorted(p.name for p in ran.cwd.glob("logs/*")) == ["test.int6.ptz", "test.txt"]


def test_the_gains_by_order_add_up_to_the_gain(runs):
    log = (runs[1][0] / "logs/test.txt").read_text()
    gains = re.findall(r"^ngram_order order:\d+ targets:\d+ gain:(\S+)$", log, re.M)
    gain = float(values(log, "final_ngram_exact")["gain"])
    assert sum(map(float, gains)) == pytest.approx(gain, abs=1e-7)


def test_what_was_scored_is_what_is_in_the_file(runs, corpus):
    """Read the artifact back by hand, score it, mix it: the same digits as the log."""
    cwd, _ = runs[1]
    hp = tiny(**corpus)
    model = t.GPT(hp)
    model.load_state_dict(t.decompress((cwd / "logs/test.int6.ptz").read_bytes())[1])
    validation = t.load_validation(hp)
    nll, entropy = scores_of(model, validation.tokens, hp.eval_stride)
    log = (cwd / "logs/test.txt").read_text()
    for name, nats in (
        ("final_int6_sliding_window_exact", nll),
        ("final_ngram_exact", t.mix(validation.tokens, nll, entropy, hp)),
    ):
        assert float(values(log, name)["val_bpb"]) == pytest.approx(
            t.bits_per_byte(nats, validation.target_bytes), abs=1e-6
        )


def test_a_run_is_deterministic_and_never_overwrites_a_log(runs, corpus, tmp_path):
    cwd = shutil.copytree(runs[1][0], tmp_path / "run", symlinks=True)
    before = (cwd / "logs/test.txt").read_text()
    assert run_script(cwd, 0, **corpus).returncode == 0
    assert (cwd / "logs/test.txt").read_text() == before
    again = (cwd / "logs/test_2.txt").read_text()
    for name in ("final_int6_roundtrip_exact", "final_ngram_exact"):
        assert values(again, name)["val_bpb"] == values(before, name)["val_bpb"]


# No matter how fast the machine is: a step takes 40 ms, a validation a second, nothing else any.
STEADY_CLOCK = (
    BEFORE_STEP
    + """
clock = [0.0]
def before(state): clock[0] += 0.04
plain_validate = t.validate
def validate(*args):
    clock[0] += 1
    return plain_validate(*args)
t.validate = validate
t.perf_counter = lambda: clock[0]
"""
)


@pytest.fixture(scope="module")
def timed(corpus, tmp_path_factory) -> str:
    """What a run said that the clock has ended."""
    folder = tmp_path_factory.mktemp("timed")
    done = run_script(
        folder,
        0,
        patched(folder.with_suffix(".py"), STEADY_CLOCK),
        **corpus,
        ITERATIONS=100_000,
        MAX_WALLCLOCK_SECONDS=3.29,
        GPTQ_RESERVE_SECONDS=0.3,
        WARMDOWN_ITERS=30,
        TRAIN_LOG_EVERY=0,
        VAL_LOSS_EVERY=20,
        AVERAGING="swa",
        SWA_EVERY=1,
        COMPILE=0,
        **BRIEF,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_step_begins_that_would_pass_the_cap_if_it_took_twice_the_average(timed):
    """73 steps are 2.92 s, 74 and one more 3.00. Validations, a second each, do not count. The
    cap is that of 3.29 s less what is kept for GPTQ."""
    assert "stopping_early: wallclock_cap train_time:2920ms step:73/100000\n" in timed


def test_the_last_steps_before_the_cap_are_of_late_qat(timed):
    assert re.search(r"^late_qat:on step:\d+", timed, re.M)


def test_the_last_steps_before_the_cap_are_averaged(timed):
    assert int(values(timed, "averaging:swa")["swa_updates"]) > 0


def test_a_validation_on_the_way_has_a_line(timed):
    line = r"^step:20/100000 val_loss:\S+ val_bpb:\S+ train_time:800ms step_avg:40.00ms$"
    assert re.search(line, timed, re.M)


def test_without_counts_there_is_no_mixed_score(timed):
    assert "final_ngram_exact" not in timed
    assert "bpb, not mixed" in timed


@pytest.mark.parametrize(
    "broken, said",
    [
        (
            dict(DATA_PATH="nowhere"),
            r"DATA_PATH=nowhere: no fineweb_train_ .* there; `make demo` needs no data",
        ),
        (dict(NUM_LAYERS="eleven"), "NUM_LAYERS='eleven': expected an integer"),
        (dict(VOCAB_SIZE=600), "has 512 pieces, but VOCAB_SIZE=600"),
        (dict(EVAL_SEQ_LEN=7000), "the validation stream has 6001 tokens, a window needs 7001"),
    ],
    ids=lambda b: next(iter(b)) if isinstance(b, dict) else "",
)
def test_bad_input_gets_one_line_and_leaves_no_artifact(corpus, tmp_path, broken, said):
    done = run_script(tmp_path, 0, **{**corpus, **broken})
    assert done.returncode != 0, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert done.stderr.startswith("train_gpt.py: error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "final_model.int6.ptz").exists()


def test_under_torchrun_the_error_is_said_once(corpus, tmp_path):
    done = run_script(tmp_path, 2, **{**corpus, "DATA_PATH": "nowhere"})
    assert done.returncode != 0
    assert done.stderr.count("train_gpt.py: error: DATA_PATH=nowhere") == 1
    assert not list(tmp_path.glob("final_model*"))


def test_a_bad_token_during_training_names_its_shard(corpus, tmp_path):
    write_shard(tmp_path / "data/fineweb_train_000000.bin", [1, 2, 3] * 500 + [999])
    done = run_script(tmp_path, 0, **{**corpus, "TRAIN_DATA_PATH": str(tmp_path / "data")})
    assert done.returncode != 0
    assert "fineweb_train_000000.bin: holds token 999" in done.stderr
    assert "error: UserError" in (tmp_path / "logs/test.txt").read_text()


# ---- saved scores


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    """(what a run said, its saved scores)."""
    folder = tmp_path_factory.mktemp("saved")
    settings = dict(NGRAM_ALPHA="order", ITERATIONS=2, EVAL_STRIDE=16, SAVE_SCORES=1)
    done = run_script(folder, 0, **{**corpus, **settings})
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "logs/test_scores.npz", allow_pickle=False) as arrays:
        return done.stdout, dict(arrays)


def test_saved_scores_are_those_of_the_log(saved):
    said, arrays = saved
    of_targets = {name: (x.shape, x.dtype.name) for name, x in arrays.items() if x.ndim}
    assert of_targets == dict.fromkeys(("nll", "entropy", "mixed"), ((6000,), "float32"))
    for line, name in (("final_int6_sliding", "nll"), ("final_ngram_exact", "mixed")):
        loss = float(values(said, line)["val_loss"])
        assert arrays[name].mean() == pytest.approx(loss, abs=1e-5)


def test_saved_scores_know_their_settings(saved):
    _, arrays = saved
    assert json.loads(str(arrays["settings"]))["NGRAM_ALPHA"] == "order"


def test_the_log_says_that_the_counts_are_exact(saved):
    said, _ = saved
    line = values(said, "final_ngram_exact")
    assert (line["counts"], line["alpha"]) == ("exact", "order")


# ---- errors, the log


def test_an_error_repeats_which_names_are_no_settings(corpus, tmp_path):
    done = run_script(
        tmp_path, 0, TOKENIZER_PATH=corpus["TOKENIZER_PATH"], DATA_PTAH=corpus["DATA_PATH"]
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.fullmatch(
        "train_gpt.py: error: DATA_PATH=.*: no fineweb_train_.*; DATA_PTAH is set but is no "
        "setting; did you mean DATA_PATH.*\n",
        done.stderr,
    )
    assert (tmp_path / "logs/test.txt").read_text().rstrip().endswith("did you mean DATA_PATH?")


@pytest.mark.parametrize("run_id, rank", [("", 0), ("named", 1)])
def test_a_log_without_a_name_or_of_another_rank_is_silent(
    tmp_path, monkeypatch, capsys, run_id, rank
):
    monkeypatch.chdir(tmp_path)
    log = t.RunLog(run_id, rank)
    log("a line")
    t.Progress(log, "work", 2)(1)
    log.close()
    assert log.path is None
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_progress_is_a_line_every_ten_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    now = [100.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])
    progress = t.Progress(t.RunLog("long"), "scoring", 40)
    for done in range(0, 41, 4):  # 2.5 s each
        progress(done)
        now[0] += 2.5
    expected = "scoring 40% elapsed:10s left:15s\nscoring 80% elapsed:20s left:5s\n"
    assert (tmp_path / "logs/long.txt").read_text() == expected
    assert capsys.readouterr().out == expected
