"""Do the tests notice a defect? 42 of them, of one line each, are put into train_gpt.py in turn.

    python -m tools.mutations            all of them; about ten minutes on two idle cores
    python -m tools.mutations 7 12       these
    python -m tools.mutations --check    run no tests; say which defects no longer fit the script

Each defect is put into a copy of the repository. There the tests that should notice it run until
one of them fails. First they run once on the script as it is. A defect fits if the text that it
replaces is in the script exactly once; otherwise it needs another line. The exit status is 1 if a
defect does not fit, or if the tests did not notice it."""

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
DEADLINE = 3600  # seconds; a run that does not end counts as noticed


@dataclass(frozen=True)
class Mutation:
    section: int  # of train_gpt.py
    old: str  # a text that is in the script once
    new: str  # what replaces it
    tests: str  # of tests/: one or more, separated by spaces

    def misfit(self, source: str) -> str:
        """Why it does not fit the script `source`; empty if it does."""
        found = source.count(self.old)
        if found == 1:
            return ""
        return f"DOES NOT FIT: its text is {found} times in train_gpt.py: {self.old}"


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
        "if is_first and not self.is_patient:",
        "if not self.is_patient:",
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
        'np.searchsorted(self.shard_ends, position, "right")',
        'np.searchsorted(self.shard_ends, position, "left")',
        "test_data.py::test_the_stream_wraps_at_its_end",
    ),
    Mutation(
        3,
        "self.rank * self.share + micro * self.rows",
        "self.rank * self.rows + micro * self.rows",
        "test_data.py::test_a_batch_is_the_same_at_any_number_of_ranks_and_micro_batches",
    ),
    Mutation(
        3,
        "(self.opens_word[target_ids] & self.is_text[before])",
        "self.opens_word[target_ids]",
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
        "normal(0.005)",
        "normal(0.01)",
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
        7,
        'own_SRC.add_(momentum_SRC, alpha=group["momentum"])',
        "own_SRC.add_(momentum_SRC)",
        "test_optimizer.py",
    ),
    Mutation(
        7, "max(1, rows / columns) ** 0.5", "max(1, columns / rows) ** 0.5", "test_optimizer.py"
    ),
    Mutation(
        8,
        "steps_left = min(steps_left, seconds_left / (seconds / step))",
        "steps_left = seconds_left / (seconds / step)",
        "test_optimizer.py",
    ),
    Mutation(
        7,
        "risen = min(1.0, step / hp.muon_momentum_warmup_steps)",
        "risen = step / hp.muon_momentum_warmup_steps",
        "test_optimizer.py::test_muon_momentum_warms_up",
    ),
    Mutation(
        8,
        "(1 - self.decay) / (1 - self.decay**n) if",
        "(1 - self.decay) if",
        "test_optimizer.py",
    ),
    Mutation(
        8,
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
        'units = 3 if state.ranks.device.type == "cuda" else 2',
        "units = 1",
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
        10,
        "is_intact = hashlib.sha256(body).digest() == blob[CHECKSUM_PLACE]",
        "is_intact = True",
        "test_artifact.py::test_a_whole_file_under_the_checksum_of_another_is_refused",
    ),
    Mutation(
        10,
        "occurs = count > 0",
        "occurs = count > 1",
        "test_artifact.py::test_rans_restores_a_symbol_that_is_one_in_forty_thousand",
    ),
    Mutation(
        10,
        "is_whole = engine.eof and not engine.unused_data",
        "is_whole = True",
        "test_artifact.py::test_a_decompression_bomb_is_refused_without_being_inflated",
    ),
    Mutation(
        11,
        "last = min(stride, length) if tail <= stride else length",
        "last = min(stride, length)",
        "test_scoring.py::test_a_score_equals_one_window_at_a_time",
    ),
    Mutation(
        11,
        "padded[1, spans.shape[1] :] = padded[2, -1]",
        "pass",
        "test_ttt.py::test_each_target_of_a_chunk_is_learned_from_once_an_epoch",
    ),
    Mutation(
        12,
        "torch._foreach_lerp_(average, live, 1 - hp.ttt_decay)",
        "torch._foreach_lerp_(average, live, hp.ttt_decay)",
        "test_ttt.py::test_one_update_is_the_written_rule",
    ),
    Mutation(
        12,
        "min(1.0, done / 0.3)",
        "done / 0.3",
        "test_ttt.py::test_the_learning_rate_rises_threefold_then_falls_to_zero",
    ),
    Mutation(
        13,
        "qualifies = context_count >= hp.ngram_min_count",
        "qualifies = context_count > hp.ngram_min_count",
        "test_ngram.py::test_backoff_takes_the_longest_context_that_was_seen_often_enough",
    ),
    Mutation(
        13,
        "return np.cumsum(closes, dtype=np.uint32) - closes",
        "return np.cumsum(closes, dtype=np.uint32)",
        "test_mixture.py",
    ),
    Mutation(
        13,
        "if not (abs(mass - 1) <= 1e-9 and difference <= 1e-9):",
        "if not abs(mass - 1) <= 1e-9:",
        "test_mixture.py::test_the_audit_finds_a_rule_that_mixes_other_than_its_distribution",
    ),
    Mutation(
        14,
        "elapsed, remaining, 0.95 * hp.eval_budget_seconds",
        "elapsed, remaining, 1.05 * hp.eval_budget_seconds",
        "test_ranks.py::test_the_stride_is_the_smallest_that_fits_95_percent_of_the_budget",
    ),
    Mutation(
        14,
        'log.path.with_suffix(".ckpt").unlink(missing_ok=True)',
        "pass",
        "test_script.py::test_a_run_leaves_an_artifact_and_logs",
    ),
    Mutation(
        14,
        "gain = np.bincount(mixture.matched_n, nll - mixture.nll) / math.log(2)",
        "gain = np.bincount(mixture.matched_n, nll - mixture.nll)",
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
    """(pytest's exit status, its output or that it did not end), stopping at the first failure. All
    tests but those of the kernels run in forked processes; kernels need a Triton that was loaded to
    interpret them."""
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
        said, errors = run.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        run.kill()
        return 1, f"FAILED: no end after {DEADLINE} s"
    return run.returncode, said + errors


def outcome(mutation: Mutation, source: str, folder: Path) -> tuple[bool, str]:
    """(whether the tests noticed the defect, by which test or why not)."""
    misfit = mutation.misfit(source)
    if misfit:
        return False, misfit
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


def check(chosen) -> int:
    """Print which of the chosen defects do not fit. Returns the exit status."""
    source = (ROOT / "train_gpt.py").read_text()
    misfits = {number: MUTATIONS[number - 1].misfit(source) for number in chosen}
    for number, misfit in misfits.items():
        if misfit:
            print(f"{number:2} section {MUTATIONS[number - 1].section:2} {misfit}")
    fitting = sum(not misfit for misfit in misfits.values())
    print(f"{fitting} of {len(misfits)} fit")
    return 0 if fitting == len(misfits) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("numbers", nargs="*", type=int, help=f"of 1 to {len(MUTATIONS)}")
    parser.add_argument("--check", action="store_true", help="run no tests")
    args = parser.parse_args()
    chosen = args.numbers or range(1, len(MUTATIONS) + 1)
    if not set(chosen) <= set(range(1, len(MUTATIONS) + 1)):
        parser.error(f"mutations are numbered from 1 to {len(MUTATIONS)}")
    if args.check:
        return check(chosen)

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
