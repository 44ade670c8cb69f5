"""Do the tests notice a defect? Each of MUTATIONS, a change of one line, is put into train_gpt.py.

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
        "else low is None or low <= value <= high",
        "else low is None or low <= value",
        "test_bounds.py::test_a_number_beyond_its_bounds_is_refused",
    ),
    Mutation(
        1,
        "if self.eval_stride > self.eval_seq_len:",
        "if self.eval_stride >= self.eval_seq_len:",
        "test_settings.py::test_windows_may_follow_each_other_without_overlap",
    ),
    Mutation(
        1,
        "text == text.strip() and not re.search",
        "not re.search",
        "test_bounds.py::test_a_path_with_stray_characters_is_refused_not_changed",
    ),
    Mutation(
        1,
        'is_one_word and text[0] != "." and',
        "is_one_word and",
        "test_bounds.py::test_a_run_id_that_is_no_file_name_is_refused",
    ),
    Mutation(
        1,
        "block = 2 * D * D + 2 * D * values",
        "block = 2 * D * D + D * values",
        "test_artifact.py::test_what_the_settings_count_are_the_matrices_of_the_model",
    ),
    Mutation(
        1,
        "return self.reason_for_no_effect(switch) if is_on else",
        'return "" if is_on else',
        "test_settings.py::test_a_setting_of_a_feature_that_is_off_is_pointed_out",
    ),
    Mutation(
        1,
        "cutoff=0.82",
        "cutoff=0.7",
        "test_settings.py::test_names_that_only_resemble_a_setting_are_left_alone",
    ),
    Mutation(
        1,
        "import concurrent.futures\nimport difflib",
        "from __future__ import annotations\n\nimport concurrent.futures\nimport difflib",
        "test_source.py::test_it_can_be_imported_without_an_entry_in_sys_modules",
    ),
    Mutation(
        1,
        "if self.model_numbers > MOST_WEIGHTS:",
        "if self.model_numbers > 1e30:",
        "test_artifact.py::test_a_model_too_large_to_be_read_back_is_refused_before_it_is_trained",
    ),
    Mutation(
        1,
        '"XSA_LAST_N", "LN_SCALE"),',
        '"XSA_LAST_N"),',
        "test_load.py::test_all_that_the_model_reads_is_in_the_artifact",
    ),
    Mutation(
        1,
        "            here == there,\n",
        "            True,\n",
        "test_load.py::test_a_setting_that_contradicts_the_artifact_is_refused_with_both_values",
    ),
    Mutation(
        2,
        "class Stopped(BaseException):",
        "class Stopped(UserError):",
        "test_runtime.py::test_nobody_who_catches_exceptions_catches_a_stop",
    ),
    Mutation(
        2,
        "                    self.end_at_once()",
        "                    return",
        "test_runtime.py::test_a_second_signal_ends_the_process",
    ),
    Mutation(
        2,
        "signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN_SECONDS)",
        "pass",
        "test_faults.py::test_a_stop_that_python_ignores_is_raised_again",
    ),
    Mutation(
        2,
        "if signal.getsignal(number) != signal.SIG_IGN]",
        "if True]",
        "test_runtime.py::test_a_signal_stops_a_run_unless_it_was_ignored",
    ),
    Mutation(
        2,
        "torch.tensor(numbers, dtype=torch.float64)",
        "torch.tensor(numbers, dtype=torch.float32)",
        "test_runtime.py",
    ),
    Mutation(
        2,
        "if self.has_lines and now - self.last_line >= 10:",
        "if self.has_lines and now - self.last_line > 10:",
        "test_script.py::test_progress_is_a_line_every_ten_seconds",
    ),
    Mutation(
        2,
        "self.unwritten = self.unwritten[written:]",
        'self.unwritten = b""',
        "test_runtime.py",
    ),
    Mutation(
        2,
        'f"{line}\\n".encode(errors="backslashreplace")',
        'f"{line}\\n".encode()',
        "test_runtime.py::test_any_console_and_any_name_leave_the_log_whole",
    ),
    Mutation(
        2,
        "with suppress(OSError):  # what made writing fail may make this fail too",
        "with suppress():",
        "test_faults.py::test_a_file_that_cannot_even_be_removed_does_not_hide_the_error",
    ),
    Mutation(
        2,
        "absent = [name for name in names if not env.get(name)]",
        "absent = []",
        "test_runtime.py::test_a_place_among_ranks_that_cannot_be_is_refused",
    ),
    Mutation(
        2,
        'env.get("CUDA_VISIBLE_DEVICES") in ("", "-1")',
        'env.get("CUDA_VISIBLE_DEVICES") == ""',
        "test_runtime.py::test_a_gpu_that_torch_cannot_use_is_pointed_out",
    ),
    Mutation(
        3,
        'np.searchsorted(self.shard_ends, position, "right")',
        'np.searchsorted(self.shard_ends, position, "left")',
        "test_data.py::test_the_stream_wraps_at_its_end",
    ),
    Mutation(
        3,
        "self.rank * self.sequences_per_rank + micro * self.rows",
        "self.rank * self.rows + micro * self.rows",
        "test_data.py::test_a_batch_is_the_same_at_any_number_of_ranks_and_micro_batches",
    ),
    Mutation(
        3,
        "sizes -= is_first & self.opens_word[tokens]",
        "sizes -= self.opens_word[tokens]",
        "test_stream.py::test_bytes_follow_the_definition_token_by_token",
    ),
    Mutation(
        3,
        "digest.update(file.read(4096))",
        "pass",
        "test_ranks.py::test_rank_0_names_the_rank_that_disagrees",
    ),
    Mutation(
        3,
        '_([0-9]{6})\\.bin")',
        '_([0-9]{6}).*\\.bin")',
        "test_stream.py::test_what_may_be_taken_for_a_validation_shard_is_refused_by_name",
    ),
    Mutation(
        3,
        "if self.sidecar is None else self.sidecar[1:]",
        "if self.sidecar is None else self.sidecar[:-1]",
        "test_stream.py::test_byte_shards_are_the_targets_bytes_and_no_tokens",
    ),
    Mutation(
        3,
        "failed += size != number or not came_back(ids, new, is_cut, counter)",
        "failed += size != number",
        "test_stream.py::test_another_tokenizer_of_the_same_size_is_refused_with_both_numbers",
    ),
    Mutation(
        3,
        'text.replace("\\u2581", " ").encode()',
        'text.replace("\\u2581", "").encode()',
        "test_stream.py::test_bytes_follow_the_definition_token_by_token",
    ),
    Mutation(
        8,
        "                found == here,",
        "                True,",
        "test_stream.py::test_resume_refuses_other_data",
    ),
    Mutation(
        3,
        "OPEN_SHARDS = 256",
        "OPEN_SHARDS = 9999",
        "test_stream.py::test_more_shards_than_a_process_may_open",
    ),
    Mutation(
        3,
        "nll.sum(dtype=np.float64)",
        "nll.sum()",
        "test_scoring.py::test_bits_per_byte_sums_in_float64",
    ),
    Mutation(
        3,
        "file.seek(4 * SHARD_HEADER)",
        "file.seek(0)",
        "test_stream.py::test_a_copied_validation_shard_is_refused",
    ),
    Mutation(
        3,
        "self.opens_word = has_text & np.array(",
        "self.opens_word = np.array(",
        "test_stream.py::test_a_piece_that_is_no_text_has_no_space_to_drop",
    ),
    Mutation(
        3,
        "for path in paths[1:]:\n        round_trip(",
        "for path in []:\n        round_trip(",
        "test_stream.py::test_each_validation_shard_must_be_of_the_tokenizer",
    ),
    Mutation(
        8,
        'name in MODEL_SETTINGS and name not in ("QUANT_BITS", "CODER")',
        "False",
        "test_stream.py::test_resume_refuses_another_model",
    ),
    Mutation(
        14,
        "path.is_file() and size <= SIZE_CAP",
        "path.is_file()",
        "test_load.py::test_load_reads_nothing_that_is_larger_than_artifacts_or_has_no_end",
    ),
    Mutation(
        4,
        "base *= stretch ** (r / (r - 2))",
        "base *= stretch ** (r / r)",
        "test_model.py",
    ),
    Mutation(
        14,
        "0 < hp.late_qat_threshold <= lowest",
        "0 < hp.late_qat_threshold < lowest",
        "test_training.py::test_what_cannot_act_is_said_in_one_line",
    ),
    Mutation(
        14,
        "loader.rows <= 2 < min(loader.most_rows, loader.sequences_per_rank)",
        "loader.rows <= 2 < loader.most_rows",
        "test_training.py::test_nothing_is_said_where_all_can_act",
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
        "std=0.005 if hp.tie_embeddings",
        "std=0.01 if hp.tie_embeddings",
        "test_model.py",
    ),
    Mutation(
        4,
        "z = self.feed(lanes[1])",
        "z = self.feed(lanes[0])",
        "test_model.py::test_every_feature_equals_its_plain_reading",
    ),
    Mutation(
        4,
        "hp.recur_layers * (hp.recur_times - 1)",
        "hp.recur_layers * hp.recur_times",
        "test_model.py::test_every_feature_equals_its_plain_reading",
    ),
    Mutation(
        8,
        "max(training_share(step, seconds, hp) - start, 0.0)",
        "training_share(step, seconds, hp) - start",
        "test_frontier.py",
    ),
    Mutation(
        9,
        "self.num_inputs += len(x_NC)",
        "self.num_inputs = len(x_NC)",
        "test_gptq.py::test_curvature_is_the_mean_over_training_tokens",
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
        "return 2 * units + max(hp.gptq_seconds,",
        "return units + max(hp.gptq_seconds,",
        "test_script.py::test_no_step_begins_that_would_pass_the_cap_if_it_took_twice_the_average",
    ),
    Mutation(
        8,
        "            log_progress_validation(state, validation)\n            state.start_clock()",
        "            log_progress_validation(state, validation)",
        "test_script.py::test_no_step_begins_that_would_pass_the_cap_if_it_took_twice_the_average",
    ),
    Mutation(
        8,
        "checkpoints * state.longest[",
        "0 * state.longest[",
        "test_clocks.py",
    ),
    Mutation(
        8,
        'free_path(self.log.path.with_suffix(".ckpt"))',
        'self.log.path.with_suffix(".ckpt")',
        "test_faults.py::test_a_checkpoint_that_is_resumed_under_its_own_name_is_kept_as_it_is",
    ),
    Mutation(
        8,
        "    if not state.is_over:",
        "    if True:",
        "test_faults.py::test_resume_after_training_goes_straight_to_packing_and_leaves_a_whole_record",
    ),
    Mutation(
        9,
        "would_overrun(seconds, 2 * longest, hp.gptq_seconds)",
        "would_overrun(seconds, longest, hp.gptq_seconds)",
        "test_clocks.py test_gptq.py::test_measuring_ends_when_its_time_does",
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
        "plain = engine.decompress(packed, most + 1)",
        "plain = engine.decompress(packed)",
        "test_artifact.py::test_a_decompression_bomb_is_refused_without_being_inflated",
    ),
    Mutation(
        10,
        "is_whole = engine.eof and not engine.unused_data",
        "is_whole = True",
        "test_coders.py::test_codes_that_are_cut_or_too_long_are_refused",
    ),
    Mutation(
        10,
        "require_table(entries, tensor_table(like, hp))",
        "pass",
        "test_artifact.py::test_another_model_is_refused_before_its_codes_are_decoded",
    ),
    Mutation(
        10,
        "(found - median).abs() <= USUAL_RANGE",
        "(found - median).abs() <= 1000",
        "test_gptq.py::test_rows_next_to_zero_do_not_move_the_step_sizes_of_others",
    ),
    Mutation(
        10,
        "octaves[name] = ratio[w_RC.any(1)]",
        "octaves[name] = ratio",
        "test_gptq.py::test_rows_next_to_zero_do_not_move_the_step_sizes_of_others",
    ),
    Mutation(
        9,
        "self.outputs_R.double().mean() <= LEAST_COST",
        "self.outputs_R.double().mean() < 0",
        "test_gptq.py::test_a_matrix_without_gradients_or_inputs_is_rounded_by_rows_and_moves_no_other",
    ),
    Mutation(
        10,
        "self.coarsest = max([COARSEST, *",
        "self.coarsest = min([COARSEST, *",
        "test_quantizers.py::test_at_its_coarsest_all_codes_are_small test_gptq.py",
    ),
    Mutation(
        10,
        'parameter_row(n).kind == "matrix"]',
        'parameter_row(n).kind != "vector"]',
        "test_quantizers.py::test_levels_are_the_largest_code_in_the_file",
    ),
    Mutation(
        10,
        'by_rans = best if hp.coder == "rans" else',
        "by_rans = best if hp.coder else",
        "test_coders.py::test_the_bytes_that_rans_would_take_are_known",
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
        "betas=(0.0, 0.99)",
        "betas=(0.9, 0.99)",
        "test_adapters.py::test_each_document_is_learned_as_the_slow_reference_does",
    ),
    Mutation(
        12,
        "scored = is_target & (positions >= firsts[:rows, None])",
        "scored = is_target",
        "test_adapters.py::test_the_window_before_a_piece_is_learned_from_and_not_scored",
    ),
    Mutation(
        12,
        "start = max(document, first - hp.eval_seq_len)",
        "start = max(0, first - hp.eval_seq_len)",
        "test_adapters.py::test_pieces_score_each_target_once_and_stay_inside_their_document",
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
        "needed <= disk.free or not disk.total",
        "sizes[paths[0]] <= disk.free or not disk.total",
        "test_faults.py::test_files_must_fit_on_their_disk_together",
    ),
    Mutation(
        14,
        "if needed <= available:",
        "if available:",
        "test_dry_run.py::test_counting_must_have_room_in_memory",
    ),
    Mutation(
        14,
        "if most <= 0.95 * whole:",
        "if most <= whole:",
        "test_dry_run.py::test_the_gpu_must_have_memory_to_spare",
    ),
    Mutation(
        14,
        "chunks = batches * loader.accumulation * math.ceil(loader.rows / rows)",
        "chunks = batches * loader.accumulation",
        "test_dry_run.py::test_the_curvature_without_a_time_limit_takes_all_chunks",
    ),
    Mutation(
        8,
        "validated = last_scores if passes == last_passes and not is_averaged else None",
        "validated = last_scores if not is_averaged else None",
        "test_training.py::test_a_network_without_its_recurrence_is_validated_again_with_it",
    ),
    Mutation(
        14,
        "checkpoint.unlink()",
        "pass",
        "test_script.py::test_a_run_leaves_an_artifact_and_logs",
    ),
    Mutation(
        14,
        "while not budget.is_late_after(more, spare=more):",
        "while True:",
        "test_clocks.py",
    ),
    Mutation(
        14,
        "gain = np.bincount(mixture.matched_n, nll - mixture.nll) / math.log(2)",
        "gain = np.bincount(mixture.matched_n, nll - mixture.nll)",
        "test_script.py::test_the_gains_by_order_add_up_to_the_gain",
    ),
    Mutation(
        14,
        "require_valid(found == (written or found),",
        "require_valid(True,",
        "test_load.py::test_a_file_that_something_else_has_replaced_is_not_scored",
    ),
    Mutation(
        14,
        '"code_bytes": len(SOURCE),',
        '"code_bytes": Path(__file__).stat().st_size,',
        "test_load.py::test_a_script_that_is_renamed_during_the_run_does_not_end_it",
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
