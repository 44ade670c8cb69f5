"""The predecessors' hashed counts against dictionaries, the study that replays a run's scores with
them, and the launch scripts that start it."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import termios
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from helpers import DEADLINE, ROOT, TINY, tiny, write_shard

import train_gpt as t
from studies import predecessors as study

# --- the counts and their mixture, one token at a time --------------------------------------------

PRIMES = {
    "889": (36313, 27191, 51647, 81929, 131071, 175447, 209591),
    "825": (36313, 27191, 51647, 81929, 131071, 174763, 233017),
    "806": (36313, 27191, 51647, 81929, 131071, 174763, 233017),
}
CENTERS_825 = {0: 4.0, 2: 4.5, 3: 4.2, 4: 3.8, 5: 3.5, 6: 3.2, 7: 3.0}
V = 100


def hash_keys(P, tokens, i: int, n: int, v: int, B: int) -> tuple[int, int]:
    """(context bucket, pair bucket) of the n-gram that ends with v in place of token i."""
    w, h = n - 1, 0
    for k in range(w):
        h ^= tokens[i - w + k] * P[k]
    return h & (B - 1), (h ^ v * P[w]) & (B - 1)


def slow_counts(rule: str, tokens: list[int], B: int, lengths=range(2, 8), least=2):
    """Yields per target, before it is counted: (n, context count, pair count of every token)."""
    P = PRIMES[rule]
    contexts, pairs = ({n: Counter() for n in lengths} for _ in range(2))
    for i in range(1, len(tokens)):
        found = 0, V, [int(rule == "825")] * V
        for n in lengths:
            if i >= n - 1:
                seen = contexts[n][hash_keys(P, tokens, i, n, 0, B)[0]]
                if seen >= least:
                    keys = (hash_keys(P, tokens, i, n, v, B)[1] for v in range(V))
                    found = n, seen, [min(pairs[n][key], seen) for key in keys]
        yield found
        for n in lengths:
            if i >= n - 1:
                context, pair = hash_keys(P, tokens, i, n, tokens[i], B)
                contexts[n][context] += 1
                pairs[n][pair] += 1


def slow_nats(rule: str, found, token: int, nll: float, entropy: float) -> float:
    """What a target costs by the pull request's formula, ALPHA_MIN 0.05 and ALPHA_MAX 0.60."""
    n, context, pairs = found
    if n == 0 and rule != "825":
        return nll
    center = CENTERS_825[n] if rule == "825" else 4.0
    alpha = 0.05 + 0.55 / (1 + math.exp(-2 * (entropy - center)))
    return -math.log((1 - alpha) * math.exp(-nll) + alpha * pairs[token] / context)


def noisy_copies(rng, length: int) -> np.ndarray:
    """A motif with errors: long grams come back, short ones are ambiguous."""
    motif, noise = rng.integers(0, 30, 60), rng.integers(0, V, length)
    copies = np.where(rng.random(length) < 0.9, np.resize(motif, length), noise)
    return copies.astype(np.uint16)


def scores_of(rng, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """(nll, entropy) of no model in particular."""
    return tuple(rng.exponential(3, targets).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("rule", ["889", "825", "806"])
def test_counts_are_those_of_dictionaries_that_count_token_by_token(rng, rule):
    tokens, B = noisy_copies(rng, 500), 64
    counts = study.HashedCounts(tokens, study.RULES[rule], V, buckets=B)
    for target, (n, context, pairs) in enumerate(slow_counts(rule, tokens.tolist(), B)):
        assert counts.n[target] == n, target
        assert counts.pair[target] == pairs[tokens[target + 1]], target
        if n or rule == "825":
            assert counts.context[target] == context, target


@pytest.mark.parametrize("rule", ["889", "825"])
def test_continuations_are_the_counts_of_every_token(rng, rule):
    tokens, B = noisy_copies(rng, 500), 64
    counts = study.HashedCounts(tokens, study.RULES[rule], V, buckets=B)
    for target, (n, context, pairs) in enumerate(slow_counts(rule, tokens.tolist(), B)):
        if target % 20 == 0 and (n or rule == "825"):
            got, of_context = counts.continuations(target)
            assert (got.tolist(), of_context) == (pairs, context)
            assert counts.mass(np.array([target])) == pytest.approx(sum(pairs) / context)


@pytest.mark.parametrize("rule", ["889", "825", "806"])
def test_the_mixture_is_the_pull_requests_formula(rng, rule):
    tokens, B = noisy_copies(rng, 500), 64
    nll, entropy = scores_of(rng, 499)
    counts = study.HashedCounts(tokens, study.RULES[rule], V, buckets=B)
    targets = zip(tokens[1:].tolist(), nll.tolist(), entropy.tolist())
    slow = slow_counts(rule, tokens.tolist(), B)
    expected = [slow_nats(rule, found, *target) for found, target in zip(slow, targets)]
    got = study.mix(counts, nll, entropy, 0.05, 0.60)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_lengths_and_minimum_count_are_those_asked_for(rng):
    tokens, B = noisy_copies(rng, 500), 64
    counts = study.HashedCounts(tokens, study.RULES["889"], V, range(3, 6), B, 4)
    slow = slow_counts("889", tokens.tolist(), B, range(3, 6), 4)
    assert [(n, c) for n, c, _ in slow if n] == [
        (n, c) for n, c in zip(counts.n, counts.context) if n
    ]


@pytest.mark.parametrize("chunk", [1, 77])
def test_the_size_of_a_chunk_changes_nothing(rng, monkeypatch, chunk):
    tokens, (nll, entropy) = noisy_copies(rng, 600), scores_of(rng, 599)
    found = []
    for size in (study.CHUNK, chunk):
        monkeypatch.setattr(study, "CHUNK", size)
        counts = study.HashedCounts(tokens, study.RULES["825"], V, buckets=128)
        pairs, context = counts.continuations(300)
        arrays = counts.n, counts.context, counts.pair, pairs, np.array(context)
        found.append([*arrays, study.mix(counts, nll, entropy, 0.05, 0.60)])
    for whole, in_pieces in zip(*found):
        assert np.array_equal(whole, in_pieces)


def test_without_collisions_the_mass_is_one_and_with_them_far_more(rng):
    tokens = noisy_copies(rng, 2000)
    masses = {}
    for buckets in (1 << 26, 64):
        counts = study.HashedCounts(tokens, study.RULES["889"], V, range(2, 4), buckets)
        masses[buckets] = counts.mass(np.flatnonzero(counts.n)[-32:])
    assert masses[1 << 26] == pytest.approx(1)
    assert masses[64] > 10


def test_on_the_real_sample_the_mass_is_41():
    """The figure of the design, where the sample lies beside the checkout."""
    sample = ROOT.parent / "shared/data/fineweb_sample/fineweb_val_000000.bin"
    if not sample.is_file():
        pytest.skip("no FineWeb sample beside the checkout")
    tokens = np.array(t.load_shard(sample))
    counts = study.HashedCounts(tokens, study.RULES["889"], 1024)
    assert 35 < counts.mass(np.flatnonzero(counts.n)[-64:]) < 55


# --- the study ------------------------------------------------------------------------------------


def save_scores(path: Path, corpus, **changes) -> Path:
    """Scores of the corpus' validation stream as a run writes them; `changes` replace arrays, and
    None takes one away."""
    targets = len(t.load_validation(tiny(**corpus)).tokens) - 1
    nll, entropy = scores_of(np.random.default_rng(5), targets)
    settings = json.dumps({key: str(value) for key, value in {**TINY, **corpus}.items()})
    arrays = dict(nll=nll, entropy=entropy, mixed=nll, settings=settings) | changes
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def neural_bpb(path: Path, corpus) -> float:
    """What the log of that run would say."""
    target_bytes = t.load_validation(tiny(**corpus)).target_bytes
    with np.load(path) as file:
        return round(t.bits_per_byte(file["nll"], target_bytes), 8)


@pytest.mark.parametrize("rule", ["889", "825", "806"])
def test_the_json_says_what_was_replayed(corpus, tmp_path, capsys, rule):
    scores = save_scores(tmp_path / "logs/a_scores.npz", corpus)
    study.main([str(scores), "--rule", rule])
    found = json.loads((tmp_path / "logs/a_predecessors.json").read_text())
    tokens = t.load_validation(tiny(**corpus)).tokens
    counts = study.HashedCounts(tokens, study.RULES[rule], 512)
    matched = np.flatnonzero(counts.n)
    with np.load(scores) as file:
        mixed = study.mix(counts, file["nll"], file["entropy"], 0.05, 0.60)
    target_bytes = t.load_validation(tiny(**corpus)).target_bytes
    assert found == dict(
        pull_request=int(rule),
        pseudo_bpb=t.bits_per_byte(mixed, target_bytes),
        mass=counts.mass(matched[-32:]),
        mass_targets=32,
        neural_bpb=pytest.approx(neural_bpb(scores, corpus), abs=1e-8),
        targets=6000,
        targets_with_known_context=len(matched),
        orders="2-7",
        min_count=2,
        alpha_min=0.05,
        alpha_max=0.6,
        buckets=4_194_304,
        scores="a_scores.npz",
        scores_sha256=hashlib.sha256(scores.read_bytes()).hexdigest(),
    )
    said = capsys.readouterr().out
    assert f"pull_request:{rule} pseudo_bpb:{found['pseudo_bpb']:.8f} " in said
    assert " bpb:" not in said
    assert sorted(path.name for path in scores.parent.iterdir()) == [
        "a_predecessors.json",
        "a_scores.npz",
    ]


def test_grams_longer_than_the_primes_reach_are_left_out(corpus, tmp_path):
    settings = {**TINY, **corpus, "NGRAM_ORDER": 12, "NGRAM_MIN_ORDER": 3}
    settings = json.dumps({key: str(value) for key, value in settings.items()})
    scores = save_scores(tmp_path / "a_scores.npz", corpus, settings=settings)
    assert study.replay(scores, "889", {})["orders"] == "3-7"


def test_data_that_moved_are_named_by_an_option(corpus, tmp_path):
    moved = dict(DATA_PATH="gone", TOKENIZER_PATH="gone.model")
    settings = json.dumps({key: str(value) for key, value in {**TINY, **moved}.items()})
    scores = save_scores(tmp_path / "a_scores.npz", corpus, settings=settings)
    there = ["--data-path", corpus["DATA_PATH"], "--tokenizer-path", corpus["TOKENIZER_PATH"]]
    study.main([str(scores), "--rule", "889", *there])
    assert (tmp_path / "a_predecessors.json").exists()


def test_the_log_beside_the_scores_is_that_of_their_run(corpus, tmp_path):
    scores = save_scores(tmp_path / "a_scores.npz", corpus)
    result = json.dumps(dict(neural_bits_per_byte=neural_bpb(scores, corpus)))
    (tmp_path / "a.txt").write_text(f'log(f"result {{x}}")\n{"=" * 100}\nresult {result}\n')
    study.main([str(scores), "--rule", "889"])
    assert (tmp_path / "a_predecessors.json").exists()


def other_log(path: Path, corpus) -> None:
    path.with_name("a.txt").write_text('result {"neural_bits_per_byte": 1.5}\n')
    save_scores(path, corpus)


def unfinished_log(path: Path, corpus) -> None:
    path.with_name("a.txt").write_text("step:1/20000 train_loss:6.9\n")
    save_scores(path, corpus)


def other_stream(path: Path, corpus) -> None:
    save_scores(path, corpus, nll=np.ones(5999, np.float32), entropy=np.ones(5999, np.float32))


def settings_of(**changes):
    def save(path: Path, corpus) -> None:
        settings = {key: str(value) for key, value in {**TINY, **corpus, **changes}.items()}
        save_scores(path, corpus, settings=json.dumps(settings))

    return save


def never_twice(path: Path, corpus) -> None:
    """Scores of a stream in which no token comes twice: of pieces that are whole words."""
    sp = spm.SentencePieceProcessor(model_file=corpus["TOKENIZER_PATH"])
    words = [i for i in range(260, 512) if sp.encode(sp.decode([i])) == [i]]
    write_shard(path.parent / "fineweb_val_000000.bin", words)
    once = dict(TOKENIZER_PATH=corpus["TOKENIZER_PATH"], DATA_PATH=str(path.parent))
    save_scores(path, once)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path, corpus: None, "a_scores.npz: no such file; expected logs/<RUN_ID>_scores"),
        (lambda path, corpus: path.write_text("x"), "a_scores.npz: not an npz file of plain"),
        (lambda path, corpus: save_scores(path, corpus, nll=None), "holds no nll; expected"),
        (lambda path, corpus: save_scores(path, corpus, entropy=None), "holds no entropy;"),
        (lambda path, corpus: save_scores(path, corpus, settings=None), "holds no settings;"),
        (lambda path, corpus: save_scores(path, corpus, settings="[1]"), "no JSON object"),
        (
            lambda path, corpus: save_scores(path, corpus, nll=np.full(6000, np.nan)),
            "nll is float64 of shape (6000,), expected finite floats, one per target",
        ),
        (
            lambda path, corpus: save_scores(path, corpus, nll=np.ones(5999)),
            "holds 5999 nll and 6000 entropies",
        ),
        (other_stream, "holds scores of 5999 targets, but the validation stream in"),
        (settings_of(DATA_PATH="gone"), "DATA_PATH=gone: no fineweb_val_"),
        (settings_of(NGRAM_MIN_ORDER=8, NGRAM_ORDER=9), "NGRAM_MIN_ORDER=8, but the pull"),
        (other_log, "a.txt: says neural_bits_per_byte 1.5, but"),
        (unfinished_log, "a.txt: has no result line: the run did not end"),
        (never_twice, "no context of the stream came NGRAM_MIN_COUNT=2 times before"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_line(corpus, tmp_path, spoil, said):
    path = tmp_path / "a_scores.npz"
    spoil(path, corpus)
    with pytest.raises(SystemExit) as error:
        study.main([str(path), "--rule", "889"])
    assert said in error.value.code
    assert error.value.code.startswith("predecessors.py: error: ")
    assert "\n" not in error.value.code
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_said_in_one_line(corpus, tmp_path):
    scores = save_scores(tmp_path / "a_scores.npz", corpus)
    (tmp_path / "a_predecessors.json").mkdir()
    with pytest.raises(SystemExit, match="a_predecessors.json: .*; nothing was written"):
        study.main([str(scores), "--rule", "889"])
    assert not list(tmp_path.glob("*.tmp"))


# --- the launch scripts ---------------------------------------------------------------------------

# In the place of Python: finds no GPU, starts SCRIPT as torchrun would, and plays the study. What
# is started, and what becomes of it, is a line of the file `events`.
PYTHON = """#!/usr/bin/env bash
case "$*" in
-c*) echo 0 ;;
*torch.distributed.run*) exec bash "${!#}" ;;
*)  echo "study ${*:2}" >> events
    trap 'echo "study got TERM" >> events; exit 9' TERM
    while [ -n "${ENDLESS_STUDY:-}" ] && [ ! -e end ]; do sleep 0.02; done
    exit "${STUDY_STATUS:-0}" ;;
esac
"""
SCRIPT = """
for name in TERM INT HUP QUIT; do trap "echo got $name >> events; sleep 0.1; exit 7" $name; done
echo "run $RUN_ID" >> events
while [ -n "${ENDLESS:-}" ] && [ ! -e end ]; do sleep 0.02; done
exit "${RUN_STATUS:-0}"
"""
LAUNCHERS = dict(backoff=889, order_adaptive=825, prefill=806)


@pytest.fixture
def launch(tmp_path):
    """launch(system, **environment) starts that launch script in tmp_path, with stand-ins for
    Python and train_gpt.py."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "script").write_text(SCRIPT)
    (tmp_path / "logs").mkdir()
    started = []

    def launch(system: str, how: dict | None = None, **env) -> subprocess.Popen:
        env = {"PATH": os.environ["PATH"], "PYTHON": "./python", "SCRIPT": "script", **env}
        command = ["bash", f"runs/{system}.sh"]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **(how or {})))
        return started[-1]

    yield launch
    (tmp_path / "end").touch()  # what a test that failed has left ends by itself
    for process in started:
        if process.poll() is None:
            process.kill()


def events(folder: Path) -> list[str]:
    path = folder / "events"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_event(folder: Path, start: str) -> None:
    end = time.monotonic() + DEADLINE
    while not any(event.startswith(start) for event in events(folder)):
        assert time.monotonic() < end, f"{start} did not come: {events(folder)}"
        time.sleep(0.01)


@pytest.mark.parametrize("system, rule", LAUNCHERS.items())
def test_a_launch_script_replays_the_scores_of_its_run(tmp_path, launch, system, rule):
    assert launch(system, RUN_ID="test").wait(DEADLINE) == 0
    replay = f"study studies.predecessors logs/test_scores.npz --rule {rule}"
    assert events(tmp_path) == ["run test", replay]


@pytest.mark.parametrize("system", ["demo", "frontier"])
def test_the_other_launch_scripts_only_run(tmp_path, launch, system):
    assert launch(system, RUN_ID="test", RUN_STATUS="5").wait(DEADLINE) == 5
    assert events(tmp_path) == ["run test"]


def test_without_a_name_the_run_gets_one_that_the_study_knows(tmp_path, launch):
    assert launch("backoff", SEED="42").wait(DEADLINE) == 0
    run, replay = events(tmp_path)
    name = run.removeprefix("run ")
    assert name.endswith("_seed42")
    assert replay == f"study studies.predecessors logs/{name}_scores.npz --rule 889"


def test_the_study_reads_the_scores_of_a_log_with_a_number(tmp_path, launch):
    for name in ("test", "test_2"):
        (tmp_path / f"logs/{name}.txt").touch()
    assert launch("backoff", RUN_ID="test").wait(DEADLINE) == 0
    assert events(tmp_path)[1].split()[2] == "logs/test_3_scores.npz"


def test_without_scores_there_is_nothing_to_replay(tmp_path, launch):
    assert launch("backoff", RUN_ID="test", SAVE_SCORES="0").wait(DEADLINE) == 0
    assert events(tmp_path) == ["run test"]


def test_a_run_that_fails_is_not_replayed_and_its_status_is_kept(tmp_path, launch):
    assert launch("backoff", RUN_ID="test", RUN_STATUS="3").wait(DEADLINE) == 3
    assert events(tmp_path) == ["run test"]


def test_a_study_that_fails_is_not_hidden(tmp_path, launch):
    assert launch("backoff", RUN_ID="test", STUDY_STATUS="4").wait(DEADLINE) == 4
    assert len(events(tmp_path)) == 2


@pytest.mark.parametrize(
    "system, name",
    [
        *[("backoff", name) for name in ("TERM", "INT", "HUP", "QUIT")],
        *[(system, "TERM") for system in ("order_adaptive", "prefill", "demo", "frontier")],
    ],
)
def test_a_signal_to_the_launcher_stops_the_run(tmp_path, launch, system, name):
    """Once, and it waits for the run's end; then nothing is replayed."""
    process = launch(system, RUN_ID="test", ENDLESS="1")
    wait_for_event(tmp_path, "run")
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert process.wait(DEADLINE) == 7
    assert events(tmp_path) == ["run test", f"got {name}"]


def test_only_the_first_signal_is_passed_on(tmp_path, launch):
    process = launch("backoff", RUN_ID="test", ENDLESS="1")
    wait_for_event(tmp_path, "run")
    process.send_signal(signal.SIGINT)
    wait_for_event(tmp_path, "got INT")
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 7
    assert events(tmp_path) == ["run test", "got INT"]


def test_ctrl_c_in_a_terminal_reaches_the_run_once(tmp_path, launch):
    keyboard, terminal = os.openpty()
    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    session = dict(start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    process = launch("backoff", streams | session, RUN_ID="test", ENDLESS="1")
    wait_for_event(tmp_path, "run")
    os.write(keyboard, b"\x03")
    assert process.wait(DEADLINE) == 7
    assert events(tmp_path) == ["run test", "got INT"]
    for end in (keyboard, terminal):
        with contextlib.suppress(OSError):
            os.close(end)


def test_a_signal_stops_the_study(tmp_path, launch):
    process = launch("backoff", RUN_ID="test", ENDLESS_STUDY="1")
    wait_for_event(tmp_path, "study")
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 9
    assert events(tmp_path)[-1] == "study got TERM"
