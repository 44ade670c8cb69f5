"""Do the tests notice? 42 defects of one line each, put into train_gpt.py one at a time.

    python -m tools.mutations            all; about ten minutes on two idle cores
    python -m tools.mutations 7 12       these

Each is put into a copy of the repository, where the tests that should notice it run until one
fails. Before, they run once on the script as it is. A text that is no longer in the script, or is
there twice, is said: then the defect needs another line. The exit status is 1 if any survived or
did not fit."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.preloaded import Run

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 3600  # seconds; a run that does not end is noticed too


@dataclass(frozen=True)
class Mutation:
    section: int  # of train_gpt.py
    old: str  # a text that is there once
    new: str
    tests: str  # of tests/: one or more, separated by spaces


MUTATIONS = [
    Mutation(
        1,
        "low is None or (low <= value <= high and value < math.inf)",
        "low is None or low <= value <= high",
        "test_settings.py::test_impossible_settings_are_refused_in_one_line",
    ),
    Mutation(
        1,
        "if self.eval_stride > self.eval_seq_len:",
        "if self.eval_stride >= self.eval_seq_len:",
        "test_settings.py::test_windows_may_follow_each_other_without_overlap",
    ),
    Mutation(
        1,
        "cutoff=0.82",
        "cutoff=0.7",
        "test_settings.py::test_names_that_only_resemble_a_setting_are_left_alone",
    ),
    Mutation(
        2,
        "if is_first and not self.patient:",
        "if not self.patient:",
        "test_runtime.py",
    ),
    Mutation(
        2,
        "torch.tensor(numbers, dtype=torch.float64)",
        "torch.tensor(numbers, dtype=torch.float32)",
        "test_runtime.py",
    ),
    Mutation(
        2,
        "if now - self.last_line >= 10:",
        "if now - self.last_line > 10:",
        "test_script.py::test_progress_is_a_line_every_ten_seconds",
    ),
    Mutation(
        2,
        "self.unwritten = self.unwritten[written:]",
        'self.unwritten = b""',
        "test_runtime.py",
    ),
    Mutation(
        3,
        'np.searchsorted(self.ends, place, "right")',
        'np.searchsorted(self.ends, place, "left")',
        "test_data.py::test_the_stream_wraps_at_its_end",
    ),
    Mutation(
        3,
        "i * self.tokens // self.sequences",
        "i * (self.tokens // self.sequences)",
        "test_data.py::test_ranks_share_each_global_batch_without_overlap",
    ),
    Mutation(
        3,
        "(self.opens_word[targets] & self.is_text[before])",
        "self.opens_word[targets]",
        "test_data.py::test_bytes_follow_the_definition_token_by_token",
    ),
    Mutation(
        3,
        "crc = zlib.crc32(data[-(1 << 16) :], zlib.crc32(data[: 1 << 16]))",
        "crc = 0",
        "test_ranks.py::test_rank_0_names_the_rank_that_disagrees",
    ),
    Mutation(
        3,
        "nll.sum(dtype=np.float64)",
        "nll.sum()",
        "test_scoring.py::test_bits_per_byte_sums_in_float64",
    ),
    Mutation(
        4,
        "base *= (span / 1024) ** (r / (r - 2))",
        "base *= (span / 1024) ** (r / r)",
        "test_model.py",
    ),
    Mutation(4, ".tril(T - S)", ".tril(T - S + 1)", "test_model.py"),
    Mutation(
        4,
        "(36313 * ids_BT[:, 1:]) ^ (27191 * ids_BT[:, :-1])",
        "(27191 * ids_BT[:, 1:]) ^ (36313 * ids_BT[:, :-1])",
        "test_model.py::test_every_feature_equals_its_plain_reading",
    ),
    Mutation(
        4,
        "partial(nn.init.normal_, std=0.005)",
        "partial(nn.init.normal_, std=0.01)",
        "test_model.py",
    ),
    Mutation(
        4, "nn.Parameter(torch.tensor(-1.5))", "nn.Parameter(torch.tensor(1.5))", "test_model.py"
    ),
    Mutation(
        5,
        "dz_NW.mT @ x_ND, g_ND.mT @ h_NW",
        "dz_NW.mT @ x_ND, g_ND.mT @ dz_NW",
        "test_kernels.py::test_gradcheck_of_the_mlp",
    ),
    Mutation(
        5,
        "slope, backward=True)",
        "1.0, backward=True)",
        "test_kernels.py::test_mlp_of_any_size_equals_float64",
    ),
    Mutation(
        6,
        'own_SRC.add_(momentum_SRC, alpha=group["momentum"])',
        "own_SRC.add_(momentum_SRC)",
        "test_optimizer.py",
    ),
    Mutation(6, "max(1, R / C) ** 0.5", "max(1, C / R) ** 0.5", "test_optimizer.py"),
    Mutation(
        6,
        "left = min(left, seconds_left / (seconds / step))",
        "left = seconds_left / (seconds / step)",
        "test_optimizer.py",
    ),
    Mutation(
        6,
        "share = min(1.0, step / hp.muon_momentum_warmup_steps)",
        "share = step / hp.muon_momentum_warmup_steps",
        "test_optimizer.py::test_muon_momentum_warms_up",
    ),
    Mutation(
        7,
        "(1 - self.decay) / (1 - self.decay**n) if",
        "(1 - self.decay) if",
        "test_optimizer.py",
    ),
    Mutation(
        7,
        "step % hp.swa_every == 0",
        "(step - 1) % hp.swa_every == 0",
        "test_optimizer.py test_ranks.py::test_warm_up_leaves_no_trace",
    ),
    Mutation(
        8,
        "16 - 15 * scale / hp.late_qat_threshold",
        "16 * scale / hp.late_qat_threshold",
        "test_training.py",
    ),
    Mutation(
        8,
        "seconds * (1 + 2 / step)",
        "seconds * (1 + 1 / step)",
        "test_script.py::test_no_step_begins_that_would_pass_the_cap_if_it_took_twice_the_average",
    ),
    Mutation(
        8,
        "started += perf_counter() - paused",
        "pass",
        "test_script.py::test_no_step_begins_that_would_pass_the_cap_if_it_took_twice_the_average",
    ),
    Mutation(
        8,
        "torch._foreach_copy_(tensors, before)",
        "pass",
        "test_ranks.py::test_warm_up_leaves_no_trace",
    ),
    Mutation(
        9,
        "is_intact = hashlib.sha256(body).digest() == blob[CHECKSUM]",
        "is_intact = True",
        "test_artifact.py::test_a_whole_file_under_the_checksum_of_another_is_refused",
    ),
    Mutation(
        9,
        "comes = count > 0",
        "comes = count > 1",
        "test_artifact.py::test_rans_restores_a_symbol_that_is_one_in_forty_thousand",
    ),
    Mutation(
        9,
        "is_whole = engine.eof and not engine.unused_data",
        "is_whole = True",
        "test_artifact.py::test_a_decompression_bomb_is_refused_without_being_inflated",
    ),
    Mutation(
        10,
        "last = min(stride, length) if reaches_back <= stride else length",
        "last = min(stride, length)",
        "test_scoring.py::test_score_stream_equals_one_window_at_a_time",
    ),
    Mutation(
        10,
        "padded[1, spans.shape[1] :] = padded[2, -1]",
        "pass",
        "test_ttt.py::test_each_target_of_a_chunk_is_learned_from_once_an_epoch",
    ),
    Mutation(
        11,
        "torch._foreach_lerp_(mean, live, 1 - hp.ttt_decay)",
        "torch._foreach_lerp_(mean, live, hp.ttt_decay)",
        "test_ttt.py::test_one_update_is_the_written_rule",
    ),
    Mutation(
        11,
        "min(1.0, done / 0.3)",
        "done / 0.3",
        "test_ttt.py::test_the_learning_rate_rises_threefold_then_falls_to_zero",
    ),
    Mutation(
        12,
        "wins = context >= hp.ngram_min_count",
        "wins = context > hp.ngram_min_count",
        "test_ngram.py::test_backoff_takes_the_longest_context_that_was_seen_often_enough",
    ),
    Mutation(
        12,
        "return np.cumsum(closes, dtype=np.uint32) - closes",
        "return np.cumsum(closes, dtype=np.uint32)",
        "test_mixture.py",
    ),
    Mutation(
        12,
        "abs(mass - 1) > 1e-9 or abs(nll + math.log(p)) > 1e-9",
        "abs(mass - 1) > 1e-9",
        "test_ngram.py::test_the_audit_finds_a_rule_that_mixes_other_than_its_distribution",
    ),
    Mutation(
        13,
        "is_late = 0 < 0.95 * hp.eval_budget_seconds < projected",
        "is_late = 0 < 1.05 * hp.eval_budget_seconds < projected",
        "test_ranks.py::test_the_stride_is_the_smallest_that_fits_95_percent_of_the_budget",
    ),
    Mutation(
        13,
        'log.path.with_suffix(".ckpt").unlink(missing_ok=True)',
        "pass",
        "test_script.py::test_a_run_leaves_an_artifact_and_logs",
    ),
    Mutation(
        13,
        "gain = np.bincount(mixture.order, nll - mixture.nll) / math.log(2)",
        "gain = np.bincount(mixture.order, nll - mixture.nll)",
        "test_script.py::test_the_gains_by_order_add_up_to_the_gain",
    ),
]


def copy_repository(folder: Path) -> None:
    """The files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """(pytest's status, what it said or that it did not end) until the first failure. Forked, but
    for kernels, which need a Triton that was loaded to interpret them."""
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    env = {name: x for name, x in os.environ.items() if name not in ("FRESH", "SHUFFLE")}
    paths = [f"tests/{test}" for test in tests]
    command = ["-m", "pytest", *options, *paths]
    if any("test_kernels" in path for path in paths):
        pipe = subprocess.PIPE
        run = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=env, text=True, stdout=pipe, stderr=pipe
        )
    else:
        run = Run(command, folder, env, has_runs=True)
    try:
        said = "".join(run.communicate(timeout=DEADLINE))
    except subprocess.TimeoutExpired:
        run.kill()
        return 1, f"FAILED: no end after {DEADLINE} s"
    return run.returncode, said


def outcome(mutation: Mutation, source: str, folder: Path) -> tuple[bool, str]:
    """(was it caught, by what or why not)."""
    found = source.count(mutation.old)
    if found != 1:
        return False, f"DOES NOT FIT: its text is {found} times in train_gpt.py: {mutation.old}"
    script = folder / "train_gpt.py"
    script.write_text(source.replace(mutation.old, mutation.new))
    status, said = run_tests(folder, mutation.tests.split())
    script.write_text(source)
    if status == 0:
        return False, f"SURVIVED: {mutation.old} -> {mutation.new}"
    if status != 1:  # no test failed: none was found, or pytest itself failed
        return False, f"NOT RUN: pytest ended with status {status}: {mutation.tests}"
    failed = re.findall(r"^(?:FAILED|ERROR) ?(?:tests/)?(.*?)(?: - .*)?$", said, re.M)
    return True, f"caught by {failed[0]}" if failed else "caught"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("numbers", nargs="*", type=int, help=f"of 1 to {len(MUTATIONS)}")
    chosen = parser.parse_args().numbers or range(1, len(MUTATIONS) + 1)
    if not set(chosen) <= set(range(1, len(MUTATIONS) + 1)):
        parser.error(f"mutations are numbered from 1 to {len(MUTATIONS)}")

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        copy_repository(folder)
        source = (folder / "train_gpt.py").read_text()
        tests = {test for number in chosen for test in MUTATIONS[number - 1].tests.split()}
        kernels = {test for test in tests if test.startswith("test_kernels")}
        for some in filter(None, (kernels, tests - kernels)):
            status, said = run_tests(folder, sorted(some))
            if status:
                print(said, "these tests do not pass without any mutation", sep="\n")
                return 1

        caught = 0
        for number in chosen:
            mutation = MUTATIONS[number - 1]
            is_caught, how = outcome(mutation, source, folder)
            caught += is_caught
            print(f"{number:2} section {mutation.section:2} {how}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
