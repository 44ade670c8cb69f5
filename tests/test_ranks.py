"""One score whatever the number of ranks and however often the run was interrupted;
what is resumed or scored again."""

import json
import re
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    BEFORE_STEP,
    BRIEF,
    SCORES,
    SCRIPT,
    SILENT,
    STEADY,
    KeptLog,
    assert_same,
    checkpoint,
    final_passes,
    finish,
    log_of,
    losses,
    new_state,
    new_training,
    patched,
    run_script,
    score_lines,
    scorer_of,
    shifted,
    start_script,
    tensors_of,
    tiny,
    train,
    validation_of,
    values,
    write_shard,
)

import train_gpt as t

# ---- equal whatever the number of ranks


def test_a_run_on_1_2_and_4_ranks_is_the_same_run(runs):
    logs = {ranks: log_of(cwd) for ranks, (cwd, _) in runs.items()}
    for ranks in set(runs) - {1}:
        for name in SCORES:
            one, more = (float(values(logs[r], name)["val_bpb"]) for r in (1, ranks))
            assert one == pytest.approx(more, abs=1e-5), (name, ranks)
        one, more = losses(logs[1]), losses(logs[ranks])
        assert list(one) == list(more) == list(range(1, 13))
        np.testing.assert_allclose(
            np.float64(list(one.values())), np.float64(list(more.values())), atol=1.01e-4
        )
        for line in ("late_qat:", "averaging:", "train_tokens:"):
            assert re.findall(f"^{line}.*", logs[1], re.M) == re.findall(
                f"^{line}.*", logs[ranks], re.M
            )


@pytest.mark.slow
def test_a_run_from_the_command_line_is_the_run_of_a_fork(runs, corpus, tmp_path):
    """What the other tests start begins where torch has been imported already."""
    done = run_script(tmp_path, 2, forked=False, **corpus)
    assert done.returncode == 0, done.stderr[-3000:]
    log, forked = log_of(tmp_path), log_of(runs[2][0])
    assert losses(log) == losses(forked)
    assert score_lines(log) == score_lines(forked)


@pytest.fixture(scope="module")
def scored(runs, corpus, tmp_path_factory):
    """The artifact of the run on one rank, scored again on 1 and on 3, which training would refuse:
    (log, arrays)."""
    artifact, done = runs[1][0] / "logs/test.int6.ptz", {}
    for ranks in (1, 3):
        cwd = tmp_path_factory.mktemp(f"again{ranks}")
        (cwd / "logs").mkdir()
        (cwd / "logs/test.ckpt").touch()  # of a run whose log was taken away: not ours to remove
        result = run_script(cwd, ranks, **corpus, EVAL_ONLY=artifact, SAVE_SCORES=1)
        assert result.returncode == 0, result.stderr[-3000:]
        assert sorted(p.name for p in cwd.rglob("*")) == [
            "logs",
            "test.ckpt",
            "test.txt",
            "test_scores.npz",
        ]
        with np.load(cwd / "logs/test_scores.npz", allow_pickle=False) as arrays:
            done[ranks] = log_of(cwd), dict(arrays)
    return done


def test_eval_only_repeats_the_digits_of_the_run(runs, scored):
    log, _ = scored[1]
    assert score_lines(log) == score_lines(log_of(runs[1][0]))[1:]  # all but the float weights
    for line in ("Serialized", "Code size", "Total submission size", "ngram_audit"):
        assert values(log, line) == values(log_of(runs[1][0]), line)
    assert "train_loss" not in log
    assert "train_time" not in log


def test_scores_and_counts_do_not_depend_on_the_ranks(scored, corpus):
    tokens = t.load_validation(tiny(**corpus)).tokens
    for ranks, (log, arrays) in scored.items():
        for name in ("nll", "entropy"):
            np.testing.assert_allclose(arrays[name], scored[1][1][name], rtol=0, atol=1e-5)
        np.testing.assert_allclose(arrays["mixed"], scored[1][1]["mixed"], rtol=0, atol=1e-4)
        # counted here, on no rank: the same, bit for bit
        mixed = t.mix(tokens, arrays["nll"], arrays["entropy"], tiny(**corpus))
        assert np.array_equal(mixed.astype(np.float32), arrays["mixed"]), ranks
        for name in SCORES[1:]:
            assert float(values(log, name)["val_bpb"]) == pytest.approx(
                float(values(scored[1][0], name)["val_bpb"]), abs=1e-6
            )
        assert json.loads(str(arrays["settings"]))["EVAL_STRIDE"] == "8"


def test_one_rank_talks_to_nobody(monkeypatch, corpus):
    """Not even to itself: no function of torch.distributed is called."""
    for name in ("all_reduce", "broadcast", "all_gather", "barrier", "init_process_group"):
        monkeypatch.setattr(t.dist, name, None)
    for name in ("reduce_scatter", "all_gather"):
        monkeypatch.setattr(t.dist, f"{name}_single", None, raising=False)  # since torch 2.13
    monkeypatch.setattr(t.dist, "reduce_scatter_tensor", None)
    monkeypatch.setattr(t.dist, "all_gather_into_tensor", None)
    trained, _ = train(corpus, ITERATIONS=2)
    assert trained.steps == 2


# ---- ranks that disagree


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(folder: Path, both: dict, second: dict, script: Path = SCRIPT) -> list[subprocess.Popen]:
    """Two ranks started by hand, each in a folder of its own;
    the second with other settings or another script."""
    group, ranks = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()), []
    for rank, (file, changes) in enumerate(((SCRIPT, {}), (script, second))):
        cwd = folder / str(rank)
        cwd.mkdir(parents=True, exist_ok=True)
        ranks.append(
            start_script(cwd, 0, file, RANK=rank, LOCAL_RANK=rank, **{**group, **both, **changes})
        )
    return ranks


@pytest.fixture(scope="module")
def disagreeing(corpus, tmp_path_factory) -> dict[str, tuple[Path, list]]:
    """What differs -> (folder, what both ranks came to): other settings, another version of the
    script, other shards under the same name, no shards at all. All at once, as rank 1 waits."""
    folder = tmp_path_factory.mktemp("disagreeing")
    other_code = folder / "train_gpt.py"
    other_code.write_text(SCRIPT.read_text() + "# another version\n")
    for rank, first in (("0", 5), ("1", 6)):
        write_shard(folder / f"data files/{rank}/data/fineweb_train_000000.bin", [first] * 2000)
        val = Path(corpus["DATA_PATH"], "fineweb_val_000000.bin")
        shutil.copy(val, folder / f"data files/{rank}/data")
    started = {
        "settings": pair(folder / "settings", corpus, dict(SEED=2)),
        "train_gpt.py": pair(folder / "train_gpt.py_", corpus, {}, other_code),
        "data files": pair(folder / "data files", dict(corpus, DATA_PATH="data"), {}),
        "nothing there": pair(folder / "nothing there", corpus, dict(DATA_PATH="nowhere")),
    }
    return {
        name: (Path(folder, name + "_" * (name == "train_gpt.py")), [finish(r) for r in ranks])
        for name, ranks in started.items()
    }


@pytest.mark.parametrize("name", ["settings", "train_gpt.py", "data files"])
def test_rank_0_names_the_rank_that_disagrees(disagreeing, name):
    folder, (first, _) = disagreeing[name]
    said = f"rank 1: {name} differ from rank 0's: use the same files and settings everywhere"
    assert first.stderr == f"train_gpt.py: error: {said}\n"
    assert said in log_of(folder / "0")


def test_a_rank_without_data_says_so_itself(disagreeing):
    _, (first, second) = disagreeing["nothing there"]
    said = "another rank ended: see what it said; if nothing, a signal stopped it"
    assert first.stderr == f"train_gpt.py: error: {said}\n"
    said = "train_gpt.py: error: rank 1: DATA_PATH=nowhere: no fineweb_train"
    assert second.stderr.startswith(said)


@pytest.mark.parametrize("name", ["settings", "train_gpt.py", "data files", "nothing there"])
def test_ranks_that_disagree_all_end_in_one_line_and_leave_no_artifact(disagreeing, name):
    folder, both = disagreeing[name]
    assert [rank.returncode for rank in both] == [1, 1]
    assert [rank.stderr.count("\n") for rank in both] == [1, 1]
    assert not list(folder.rglob("*.ptz"))


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_the_nearest(corpus, tmp_path):
    done = run_script(tmp_path, 3, **corpus)
    assert done.returncode != 0
    assert done.stderr.count("train_gpt.py: error: ") == 1
    assert (
        "error: 3 ranks cannot share TRAIN_BATCH_TOKENS/TRAIN_SEQ_LEN = 16 sequences equally: "
        "start 4 or 2 ranks" in done.stderr
    )


# ---- going on


def test_warm_up_leaves_no_trace(corpus):
    training = new_training(corpus, **STEADY)
    state, take_step = new_state(training)
    for _ in range(6):
        take_step(t.StepPlan(0.3, final_passes(training.model), None))
    before = tensors_of(state)
    assert (before["ema.0"], before["swa.0"]) == (6, 3)
    t.warm_up(state, take_step)
    assert_same(before, tensors_of(state))


def test_from_every_checkpoint_the_run_goes_on_as_if_never_interrupted(
    corpus, tmp_path, monkeypatch
):
    """CHECKPOINT_EVERY: a copy of each is kept, each third is resumed by a model with other initial
    weights, all end in the same bits."""
    kept, path, save = [], tmp_path / "run.ckpt", t.TrainState.save

    def keep(state):
        save(state)
        kept.append(shutil.copy(path, tmp_path / f"{state.steps}.ckpt"))

    with monkeypatch.context() as patch:
        patch.setattr(t.TrainState, "save", keep)
        whole, log = train(corpus, tmp_path / "run.txt", **STEADY, CHECKPOINT_EVERY=1e-9)
    assert [Path(p).name for p in kept] == [f"{step}.ckpt" for step in range(10)]
    said = losses("\n".join(log.lines))
    for path in kept[::3]:
        step = checkpoint(path)["progress"][0]
        again = new_training(corpus, tmp_path / "again.txt", **STEADY, RESUME=path)
        shifted(again.model)
        trained = t.train(*again)
        again_path = tmp_path / "again.ckpt"
        assert again_path.exists() == (step < 9)  # the end of training is not written again
        if again_path.exists():
            assert_same(checkpoint(kept[-1]), checkpoint(again_path))
            again_path.unlink()  # it would not be written over
        assert all(torch.equal(w, whole.weights[name]) for name, w in trained.weights.items())
        found = losses("\n".join(again.log.lines))
        assert found == {k: v for k, v in said.items() if k > step}
    assert {p.suffix for p in tmp_path.iterdir()} == {".ckpt"}  # nothing half-written is left


def test_a_setting_that_has_changed_since_the_checkpoint_is_pointed_out(corpus, tmp_path):
    state, _ = new_state(new_training(corpus, tmp_path / "run.txt"))
    state.save()
    again = new_training(corpus, EVAL_STRIDE=16, RUN_ID="another")
    new_state(again)[0].restore(str(tmp_path / "run.ckpt"))
    assert again.log.starting("warning:") == ["warning: EVAL_STRIDE=16 here, 8 in the checkpoint"]


def test_the_clock_goes_on_where_it_was(corpus, tmp_path):
    state, _ = new_state(new_training(corpus, tmp_path / "run.txt", **STEADY))
    state.progress.copy_(torch.tensor([4, 1000]))
    state.save()
    again, _ = train(corpus, **STEADY, MAX_WALLCLOCK_SECONDS=1200, RESUME=tmp_path / "run.ckpt")
    # one more step of 250 s might pass the cap
    assert again.steps == 4
    assert 1000 <= again.seconds < 1100


NOT_WHOLE = r"not a whole checkpoint \([^ ][^\n]+\)$"


def a_pickle(path: Path) -> None:
    np.savez(path.open("wb"), **{"model.embed.weight": np.array([object()], object)})


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path: path.unlink(), "No such file or directory$"),
        (lambda path: path.write_bytes(b""), NOT_WHOLE),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-40_000]),
            NOT_WHOLE,
        ),
        (
            lambda path: path.write_bytes(b"\x80\x04\x95 a pickle"),
            NOT_WHOLE,
        ),
        (
            lambda path: path.write_bytes(b"PGOLF\x02" + bytes(5000)),
            NOT_WHOLE,
        ),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), NOT_WHOLE),
        (a_pickle, NOT_WHOLE),
        (
            lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
            "is no checkpoint of this train_gpt.py: go on with the script that wrote it",
        ),
        (
            lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "text"),
            "is no checkpoint of this",
        ),
    ],
    ids=["missing", "empty", "cut", "pickle", "artifact", "npy", "pickle inside", "foreign", "zip"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(corpus, tmp_path, spoil, said):
    state, _ = new_state(new_training(corpus, tmp_path / "run.txt"))
    path = tmp_path / "run.ckpt"
    state.save()
    spoil(path)
    with pytest.raises(t.UserError, match=f"^RESUME={path}: .*{said}") as error:
        state.restore(str(path))
    assert "\n" not in str(error.value)
    assert "unsafely" not in str(error.value)  # as NumPy advises


@pytest.mark.parametrize(
    "other, said",
    [
        (
            dict(MODEL_DIM=32),
            "was begun with MODEL_DIM=32, not 64: set that",
        ),
        (dict(AVERAGING="none"), r"ema.0 is absent, these settings make \(\): set what"),
    ],
    ids=["model", "averages"],
)
def test_a_checkpoint_of_other_settings_is_refused(corpus, tmp_path, other, said):
    new_state(new_training(corpus, tmp_path / "run.txt", **other))[0].save()
    state, _ = new_state(new_training(corpus))
    with pytest.raises(t.UserError, match=said):
        state.restore(str(tmp_path / "run.ckpt"))


def test_a_checkpoint_of_which_less_is_read_than_was_written_is_refused(corpus, tmp_path):
    """The settings claim to be shorter: so NumPy never reads to their checksum."""
    path = tmp_path / "run.ckpt"
    new_state(new_training(corpus, tmp_path / "run.txt"))[0].save()
    blob = bytearray(path.read_bytes())
    length = blob.index(b"<U") + len(b"<U")  # its first digit
    blob[length] -= 1
    path.write_bytes(blob)
    with pytest.raises(t.UserError, match=NOT_WHOLE):
        t.read_checkpoint(str(path))


def test_a_damaged_checkpoint_never_gets_in(corpus, tmp_path, rng):
    """Bits turned, bytes cut out or put in, anywhere: one line,
    or what is read is what was written."""
    small = dict(
        NUM_LAYERS=2,
        VE_LAYERS="1",
        MODEL_DIM=16,
        VE_DIM=2,
        BIGRAM_DIM=2,
        VOCAB_SIZE=512,
        ROPE_DIMS=2,
    )
    path = tmp_path / "run.ckpt"
    new_state(new_training(corpus, tmp_path / "run.txt", **small))[0].save()
    blob, whole = path.read_bytes(), t.read_checkpoint(str(path))
    directory, refused = blob.rindex(b"PK\x01\x02") - 60 * len(whole), 0
    for i in range(300):
        damaged = bytearray(blob)
        at = int(rng.integers(*((0, len(blob)), (directory, len(blob)), (0, 400))[i % 3]))
        if i % 2:
            damaged[at] ^= 1 << int(rng.integers(0, 8))
        else:
            damaged[at : at + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 9)))
        path.write_bytes(damaged)
        try:
            assert all(
                np.array_equal(array, whole[name])
                for name, array in t.read_checkpoint(str(path)).items()
                if name in whole
            ), i
        except t.UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150


INTERRUPT = (
    BEFORE_STEP
    + """
def before(state):
    if state.steps == 7 and RANK == 0 and not state.hp.resume:
        os.kill(os.getppid(), signal.SIGTERM)                          # torchrun
        while not signals: time.sleep(0.01)                            # until it comes back
"""
)


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory):
    """Two ranks, stopped by SIGTERM to torchrun: (folder, what it said, settings, names of the
    files that it left)."""
    settings = {**corpus, **STEADY, **BRIEF, "ITERATIONS": 14, "WARMDOWN_ITERS": 12}
    cwd = tmp_path_factory.mktemp("interrupted")
    done = run_script(cwd, 2, patched(cwd.with_suffix(".py"), INTERRUPT), **settings)
    return cwd, done, settings, sorted(path.name for path in cwd.rglob("*.*"))


@pytest.fixture(scope="module")
def resumed(interrupted, tmp_path_factory) -> dict[int | None, str]:
    """The logs of the run resumed on 1 and 2 ranks and, as None, of one that was not disturbed."""
    cwd, _, settings, _ = interrupted
    logs = {}
    for ranks, name in ((2, "test_2"), (1, "test_3")):
        done = run_script(cwd, ranks, **settings, RESUME="logs/test.ckpt")
        assert done.returncode == 0, done.stderr[-3000:]
        logs[ranks] = log_of(cwd, name)
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    done = run_script(undisturbed, 2, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return logs | {None: log_of(undisturbed)}


def stopped_at(cwd: Path) -> int:
    """The step of which the last line of the log says that a run stopped there."""
    line = r"error: Stopped: step:(\d+)/14: stopped by SIGTERM; RESUME=logs/test.ckpt goes on from "
    return int(re.fullmatch(line + r"step \1", log_of(cwd).splitlines()[-1])[1])


def test_sigterm_to_torchrun_ends_training_after_the_step_with_a_checkpoint(interrupted):
    cwd, stopped, *_ = interrupted
    assert stopped.returncode != 0
    step = stopped_at(cwd)
    assert 7 < step < 14
    assert list(losses(log_of(cwd))) == list(range(1, step + 1))
    assert t.read_checkpoint(str(cwd / "logs/test.ckpt"))["progress"][0] == step


def test_sigterm_to_torchrun_leaves_a_log_and_a_checkpoint_and_nothing_half_written(interrupted):
    *_, left = interrupted
    assert left == ["test.ckpt", "test.txt"]


def test_a_resumed_run_goes_on_to_the_same_digits(interrupted, resumed):
    cwd, *_ = interrupted
    assert losses(log_of(cwd)) | losses(resumed[2]) == losses(resumed[None])
    assert score_lines(resumed[2]) == score_lines(resumed[None])


def test_a_run_resumed_on_another_number_of_ranks_goes_on_nearly_the_same(interrupted, resumed):
    cwd, *_ = interrupted
    both, expected = losses(log_of(cwd)) | losses(resumed[1]), losses(resumed[None])
    assert list(both) == list(expected)
    np.testing.assert_allclose(
        np.float64(list(both.values())), np.float64(list(expected.values())), atol=2e-4
    )
    for line in SCORES[:3]:
        found, undisturbed = (values(log, line)["val_bpb"] for log in (resumed[1], resumed[None]))
        assert float(found) == pytest.approx(float(undisturbed), abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_says_from_where_and_warns_of_nothing(interrupted, resumed, ranks):
    cwd, *_ = interrupted
    assert values(resumed[ranks], "resume:logs/test.ckpt")["step"] == str(stopped_at(cwd))
    assert "warning" not in resumed[ranks]


def test_a_resumed_run_removes_its_own_checkpoint_and_not_what_it_began_from(interrupted, resumed):
    cwd, *_ = interrupted
    assert [path.name for path in cwd.glob("logs/*.ckpt")] == ["test.ckpt"]


# ---- evaluate again


def test_what_cannot_be_scored_again_is_refused_in_one_line(corpus, tmp_path, runs):
    artifact, hp = runs[1][0] / "logs/test.int6.ptz", tiny(**corpus)
    blob = artifact.read_bytes()
    other = "tensors of another model than its settings make"
    for spoilt, said in (
        (None, "No such file"),
        (blob[:-1], "cut or damaged"),
        (b"PK", "no artifact"),
        (b"PGOLF\x03" + blob[6:], "another version of the format"),
        (t.pack(t.GPT(tiny(MODEL_DIM=32)).state_dict(), hp).blob, other),
        (t.pack(t.GPT(tiny(NUM_LAYERS=5)).state_dict(), hp).blob, other),
    ):
        path = tmp_path / "a.ptz"
        path.unlink(missing_ok=True)
        if spoilt is not None:
            path.write_bytes(spoilt)
        with pytest.raises(t.UserError, match=f"^{path}: .*({said})") as error:
            t.read_artifact(path, "", t.GPT(hp), ALONE, SILENT)
        assert "\n" not in str(error.value)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of the functions that are compiled from here on, in the order in which they are
    first called."""
    called = []

    def compile(function, dynamic):
        def first_compiling(*args, **options):
            if function.__name__ not in called:
                called.append(function.__name__)
            return function(*args, **options)

        return first_compiling

    monkeypatch.setattr(torch, "compile", compile)
    return called


@pytest.mark.parametrize("setting, expected", [(1, ["training_loss"]), (0, [])])
def test_training_compiles_its_loss_and_nothing_that_scores(corpus, compiled, setting, expected):
    """Validations of training run the plain trunk."""
    train(corpus, ITERATIONS=1, COMPILE=setting)
    assert compiled == expected


def test_what_scoring_compiles_is_compiled_in_its_own_time(corpus, tmp_path, compiled, monkeypatch):
    """The artifact is written by then, so that no clock misses the compilation."""
    monkeypatch.chdir(tmp_path)
    plain = t.write_artifact

    def write(*args):
        assert compiled == ["training_loss"]
        return plain(*args)

    monkeypatch.setattr(t, "write_artifact", write)
    settings = {**corpus, **BRIEF, "ITERATIONS": 1, "COMPILE": 1, "EVAL_STRIDE": 16}
    t.run(tiny(**settings), ALONE, t.RunLog("compiled"), t.StopSignal(), [])
    assert compiled == ["training_loss", "hidden"]


@pytest.mark.parametrize("setting", ["EVAL_ONLY", "RESUME"])
def test_a_file_that_is_not_there_is_named_by_the_script(corpus, tmp_path, setting):
    done = run_script(tmp_path, 0, **corpus, **{setting: "nowhere"})
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "nowhere: " in done.stderr
    assert done.stderr.startswith("train_gpt.py: error: ")
    # With EVAL_ONLY the settings come from the artifact. They are read before a log is opened.
    assert setting == "EVAL_ONLY" or "error: UserError: " in log_of(tmp_path)


def fake_scoring(monkeypatch, seconds_per_window: float, num_targets: int):
    """Scoring without a model: segments of 1,000 targets that take their time on a clock of their
    own."""
    clock, began = [0.0], []

    def score(scorer, tokens, stride, ranks, part=None):
        began.append(stride)
        for start in range(0, num_targets, 1000):
            size = min(1000, num_targets - start)
            clock[0] += size / stride * seconds_per_window
            yield np.zeros((2, size), np.float32)

    monkeypatch.setattr(t, "score", score)
    monkeypatch.setattr(t, "perf_counter", lambda: clock[0])
    return began


@pytest.mark.parametrize(
    "budget, expected",
    [
        (0, [64]),
        (1700, [64]),
        (1610, [64, 96]),
        (1200, [64, 96]),
        (1000, [64, 96, 128]),
        (500, [64, 96, 128, 256, 512]),
    ],
)
def test_the_stride_is_the_smallest_that_fits_95_percent_of_the_budget(
    monkeypatch, budget, expected
):
    """A window takes a second: 1,562 s at stride 64, 1,042 at 96, 781 at 128, 391 at 256, 195 at
    512, and what was tried."""
    tried, log = fake_scoring(monkeypatch, 1.0, 100_000), KeptLog()
    scorer = scorer_of(t.GPT(tiny(EVAL_SEQ_LEN=2048, EVAL_STRIDE=64, EVAL_BUDGET_SECONDS=budget)))
    validation = validation_of(np.zeros(100_001, np.uint16), None)
    stride, segments = t.score_in_time(scorer, validation, 0.0, ALONE, log)
    assert tried == expected
    assert stride == expected[-1]
    # each target once, of the last stride only
    assert sum(part.shape[1] for part in segments) == 100_000
    if budget:
        assert len(log.starting("eval_budget projected:")) == len(log.lines) == len(expected)


def test_a_budget_that_is_too_small_makes_the_stride_grow_and_says_so(corpus, runs, tmp_path):
    done = run_script(
        tmp_path,
        2,
        **corpus,
        EVAL_ONLY=runs[1][0] / "logs/test.int6.ptz",
        NGRAM_ENABLED=0,
        EVAL_SEQ_LEN=256,
        EVAL_STRIDE=16,
        EVAL_BUDGET_SECONDS=1e-9,
        VAL_BATCH_SIZE=1024,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = log_of(tmp_path)
    tried = re.findall(r"^eval_budget projected:\S+s budget:1e-09s stride:(\d+)$", log, re.M)
    assert tried == ["16", "96", "128", "256"]
    assert values(log, "final_int6_sliding_window_exact")["stride"] == "256"
    total = values(log, "total_eval_time")
    assert total["stride"] == "256"
    assert total["budget"] == "1e-09s"
    assert float(total["total_eval_time"][:-1]) > 0
    roundtrip, sliding = (values(log, name)["val_bpb"] for name in SCORES[1:3])
    # stride 256 is what the round trip takes
    assert float(roundtrip) == pytest.approx(float(sliding), abs=1e-6)
