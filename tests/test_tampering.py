"""A log that was edited after its run contradicts itself, or another file. Each of these changes is
made to the logs of this folder's own runs, and must be refused: as it is, and after `report` has
written README and submission.json anew from the edited logs."""

import re
from pathlib import Path

import pytest
from edit_logs import FILES, as_run, on_h100, parts_of, reported, with_settings, without_probes
from helpers import ADAPTERS, run_script

from record import checks
from record.__main__ import main
from record.checks import check
from record.log import RecordError, parse_log
from record.run import read_runs
from record.tables import compliance

SEEDS = 42, 1337, 2025


@pytest.fixture(scope="module")
def whole():
    """A folder that has only what the logs say: name -> text."""
    return reported()


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy of it to tamper with, and the checks of what it has."""
    monkeypatch.setattr("record.checks.CHECKS", without_probes("files", "figures"))
    (tmp_path / "logs").mkdir()
    for name, text in whole.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def failing(folder) -> dict[str, str]:
    return {found.name: found.evidence for found in check(folder) if found.passed is False}


def log_of(folder, seed: int = 42) -> Path:
    return folder / f"logs/seed{seed}.txt"


def edit(folder, pattern: str, new, seed: int = 42, count: int = 1) -> None:
    """Replace `pattern`, which must be there, below the source of one log."""
    path = log_of(folder, seed)
    source, rest = parts_of(path)
    rest, changed = re.subn(pattern, new, rest, count=count, flags=re.M)
    assert changed, pattern
    path.write_text(source + rest)


def times(share: float, digits: int = 8):
    """A replacement: the second group, a number, times `share`."""
    return lambda found: f"{found[1]}{float(found[2]) * share:.{digits}f}"


def changes(*edits, count: int = 1):
    """Make all of these (pattern, replacement) edits in each log, so that the logs agree with each
    other."""

    def tamper(folder):
        for seed in SEEDS:
            for pattern, new in edits:
                edit(folder, pattern, new, seed, count)

    return tamper


def better_score(folder):
    """The mixed score times 0.9 in every line that says it by name."""
    log = parse_log(log_of(folder))
    neural = log.find("final_int6_sliding").number("val_bpb")
    mixed = log.find("final_ngram_exact")
    bpb, loss = (round(0.9 * mixed.number(key), 8) for key in ("val_bpb", "val_loss"))
    gain = round(neural - bpb, 8)
    line = f"final_ngram_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f} gain:{gain:.8f}"
    edit(folder, r"^final_ngram_exact val_loss:\S+ val_bpb:\S+ gain:\S+", line)
    for key, value in dict(
        mixed_nats_per_token=loss, mixed_bits_per_byte=bpb, gain_bits_per_byte=gain
    ).items():
        edit(folder, rf'("{key}": )[\d.]+', rf"\g<1>{value}")


def better_score_and_screen(folder):
    better_score(folder)
    edit(folder, r"(of the past )([\d.]+)", times(0.9, 4))


def better_score_screen_and_orders(folder):
    """Only the calibration lines still know."""
    better_score_and_screen(folder)
    log = parse_log(log_of(folder))
    orders = [line.number("gain") for line in log.all("ngram_order")]
    more = log.find("final_ngram_exact").number("gain") - sum(orders)
    edit(
        folder, r"^(ngram_order order:7 .*gain:)(\S+)", lambda m: f"{m[1]}{float(m[2]) + more:.8f}"
    )


def one_run_three_times(folder):
    """Seeds and names are changed wherever a log says them."""
    text = log_of(folder).read_text()
    for seed in SEEDS[1:]:
        path = log_of(folder, seed)
        path.write_text(text)
        as_run(path, f"seed{seed}")
        with_settings(path, SEED=str(seed))
        edit(folder, '"seed": 42', f'"seed": {seed}', seed)


def one_run_three_times_with_other_hashes(folder):
    """The hash of the file is invented, too; the losses are still one run's."""
    one_run_three_times(folder)
    for number, seed in enumerate(SEEDS[1:]):
        edit(folder, r"^(artifact:.*sha256:)\w", rf"\g<1>{number}", seed)
        edit(folder, r'("artifact_sha256": ")\w', rf"\g<1>{number}", seed)


def one_run_three_times_with_small_changes(folder):
    """Scores differ in their last digits, and one loss of each log; the others are one run's."""
    one_run_three_times_with_other_hashes(folder)
    for number, seed in enumerate(SEEDS[1:], start=1):
        better_by(folder, seed, nats=-1e-5 * number)
        share = 1 + 1e-5 * number
        edit(folder, r"^(final_float_exact val_loss:)(\S+)", times(share), seed)
        edit(folder, r"^(final_float_exact \S+ val_bpb:)(\S+)", times(share), seed)
        edit(folder, r"^(step:100/.*train_loss:)([\d.]+)", times(1 + 1e-4 * number, 4), seed)


def better_by(folder, seed: int, nats: float) -> None:
    """The mixed score is better by so much wherever a line says it; bins say it with four digits
    only, and stay."""
    log = parse_log(log_of(folder, seed))
    mixed, neural = log.find("final_ngram_exact"), log.find("final_int6_sliding")
    loss, share = mixed.number("val_loss"), 1 - nats / mixed.number("val_loss")
    bpb = round(share * mixed.number("val_bpb"), 8)
    gain = round(neural.number("val_bpb") - bpb, 8)
    line = f"final_ngram_exact val_loss:{loss - nats:.8f} val_bpb:{bpb:.8f} gain:{gain:.8f}"
    edit(folder, r"^final_ngram_exact val_loss:\S+ val_bpb:\S+ gain:\S+", line, seed)
    names = "mixed_nats_per_token", "mixed_bits_per_byte", "gain_bits_per_byte"
    for name, value in zip(names, (round(loss - nats, 8), bpb, gain)):
        edit(folder, rf'("{name}": )[\d.]+', rf"\g<1>{value}", seed)
    edit(folder, r"(of the past )[\d.]+", rf"\g<1>{bpb:.4f}", seed)
    more = gain - sum(line.number("gain") for line in log.all("ngram_order"))
    edit(
        folder,
        r"^(ngram_order order:7 .*gain:)(\S+)",
        lambda found: f"{found[1]}{float(found[2]) + more:.8f}",
        seed,
    )


def one_run_three_times_with_other_losses(folder):
    """Its times and the bins of its entropy are still one run's."""
    one_run_three_times_with_small_changes(folder)
    for number, seed in enumerate(SEEDS[1:], start=1):
        changed = times(1 + 0.01 * number, 4)
        edit(folder, r"^(step:.*train_loss:)([\d.]+)", changed, seed, count=99)
        path = log_of(folder, seed)
        for line in parse_log(path).all("ngram_order "):
            shift = number * 1e-8 * (1 if line["order"] in "246" else -1)
            new = rf"\g<1>{line.number('gain') + shift:.8f}"
            edit(folder, rf"^(ngram_order order:{line['order']} .*gain:)\S+", new, seed)


def as_without_overlap(folder):
    """The log says that there was no time for overlapping windows, but has their score."""
    learning_given_up(folder)
    setting_everywhere(TTT_EPOCHS="0")(folder)
    changes((r" from:3000", ""))(folder)


def other_orders_of_one_seed(folder):
    """A hundred targets move from one order to another; the sum is right."""
    edit(folder, r"^(ngram_order order:2 targets:)(\d+)", lambda m: f"{m[1]}{int(m[2]) - 100}")
    edit(folder, r"^(ngram_order order:3 targets:)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 100}")


def setting(**values):
    """Set it in the list alone, as somebody would who wants to have run with it."""
    edits = [(rf"^{name}=.*", f"{name}={value}") for name, value in values.items()]
    return changes(*edits)


def setting_everywhere(**values):
    """Set it in the list, in `changed:` and in the result."""
    return lambda folder: [with_settings(log_of(folder, seed), **values) for seed in SEEDS]


def second_final_line(folder):
    """A better score under another name, in the right units."""
    line = parse_log(log_of(folder)).find("final_ngram_exact")
    loss, bpb = (f"{0.9 * line.number(key):.8f}" for key in ("val_loss", "val_bpb"))
    new = rf"\1final_best_exact val_loss:{loss} val_bpb:{bpb}\n"
    edit(folder, r"^(final_ngram_exact.*\n)", new)


def second_ngram_line(folder):
    edit(folder, r"^(final_ngram_exact .*\n)", r"\1\1")


def flattered(folder):
    """A tenth more bytes of text, and every bpb by as much smaller, in lines and sums."""
    size = parse_log(log_of(folder)).find("train_tokens:").number("val_bytes")
    share = size / round(1.1 * size)
    changes((r"(val_bytes:)\d+", rf"\g<1>{round(1.1 * size)}"))(folder)
    for pattern, digits in (
        (r"^(final.* val_bpb:)([\d.]+)", 8),
        (r"^(step.* val_bpb:)([\d.]+)", 4),
        (r"(gain:)([\d.]+)", 8),
        (r'(_bits_per_byte": )([\d.]+)', 8),
        (r"^(  neural )([\d.]+)", 4),
        (r"(of the past )([\d.]+)", 4),
    ):
        changes((pattern, times(share, digits)), count=99)(folder)


def smaller_code(folder):
    """Code and total 100,000 bytes less, wherever the log says them by name."""
    log = parse_log(log_of(folder))
    code, total = log.find("Code size:").size, log.find("Total submission size int").size
    edit(folder, r"^(Code size: )\d+", rf"\g<1>{code - 100_000}")
    edit(folder, r"^(Total submission size \S+ )\d+", rf"\g<1>{total - 100_000}")
    edit(folder, r"(artifact_bytes code:)\d+", rf"\g<1>{code - 100_000}")
    edit(folder, r'("code_bytes": )\d+', rf"\g<1>{code - 100_000}")
    edit(folder, r'("submission_bytes": )\d+', rf"\g<1>{total - 100_000}")


def smaller_model(folder):
    log = parse_log(log_of(folder))
    model, total = log.find("Serialized model").size, log.find("Total submission size int").size
    edit(folder, r"^(Serialized model \S+ )\d+", rf"\g<1>{model - 50_000}")
    edit(folder, r"^(Total submission size \S+ )\d+", rf"\g<1>{total - 50_000}")
    edit(folder, r'("submission_bytes": )\d+', rf"\g<1>{total - 50_000}")
    edit(folder, r"^(  artifact )[\d,]+", rf"\g<1>{total - 50_000:,}")


def faster_training(folder):
    """A tenth of every train_time and step_avg, so that they still divide."""
    edit(folder, r"(train_time:)(\d+)", times(0.1, 0), count=99)
    edit(folder, r"(step_avg:)([\d.]+)", times(0.1, 2), count=99)


def much_faster_training(folder):
    """Speeds and the result, too: only the clock that ended training is left."""
    faster_training(folder)
    edit(folder, r"(tok/s:)(\d+)", times(10, 0), count=99)
    edit(folder, r"^(gptq_curvature .*seconds:)([\d.]+)", times(0.1, 1))
    log = parse_log(log_of(folder))
    ms = log.find("gptq_curvature").number("train_time")
    steps = log.validations[-1].step
    edit(folder, r'("step_ms": )[\d.]+', rf"\g<1>{ms / steps:.3f}")
    edit(folder, r'("train_seconds": )[\d.]+', rf"\g<1>{ms / 1e3}")
    edit(folder, r"^(  training )[\d.]+", rf"\g<1>{ms / 1e3:.1f}")


TAMPERED = dict(
    the_mixed_score=better_score,
    the_mixed_score_and_the_screen=better_score_and_screen,
    the_mixed_score_the_screen_and_the_orders=better_score_screen_and_orders,
    the_neural_score=changes(
        (r"^(final_int6_sl\S+ val_loss:)(\S+)", times(0.9)),
        (r"(sl\S+ \S+ val_bpb:)(\S+)", times(0.9)),
    ),
    the_screen_alone=changes((r"(of the past )([\d.]+)", times(0.9, 4))),
    the_result_alone=changes((r'("mixed_bits_per_byte": )([\d.]+)', times(0.9))),
    one_order_s_gain=changes((r"^(ngram_order order:5 .*gain:)(\S+)", times(2))),
    one_order_s_targets=changes((r"^(ngram_order order:5 targets:)(\d+)", times(2, 0))),
    one_bin_s_loss=changes((r"^(calibration entropy:3-4 .* mixed:)(\S+)", times(0.5, 4))),
    one_bin_s_targets=changes((r"^(calibration entropy:3-4 targets:)(\d+)", times(0.5, 0))),
    a_bin_deleted=changes((r"^calibration entropy:3-4 .*\n", "")),
    all_bins_deleted=changes((r"^calibration .*\n", ""), count=99),
    all_orders_deleted=changes((r"^ngram_order .*\n", ""), count=99),
    an_order_beyond_the_settings=changes((r"^ngram_order order:7", "ngram_order order:9")),
    one_run_as_three_seeds=one_run_three_times,
    one_run_as_three_seeds_with_other_hashes=one_run_three_times_with_other_hashes,
    another_order_of_ngrams=setting(NGRAM_ORDER="12"),
    another_order_of_ngrams_everywhere=setting_everywhere(NGRAM_ORDER="12"),
    another_alpha_everywhere=setting_everywhere(NGRAM_ALPHA="entropy"),
    another_stride_everywhere=setting_everywhere(EVAL_STRIDE="256"),
    another_seed=lambda folder: edit(folder, "^SEED=42", "SEED=43"),
    another_learning_rate=setting(MATRIX_LR="0.04"),
    more_steps_everywhere=setting_everywhere(ITERATIONS="9000"),
    another_batch_everywhere=setting_everywhere(TRAIN_BATCH_TOKENS="4096"),
    another_packing_everywhere=setting_everywhere(CODER="lzma"),
    other_bits_everywhere=setting_everywhere(QUANT_BITS="5"),
    a_setting_deleted=changes((r"^GPTQ_TOKENS=.*\n", "")),
    a_setting_twice=changes((r"^(SEED=\d+\n)", r"\1\1")),
    a_loss_that_is_no_number=changes((r"^(step:100/.*train_loss:)[\d.]+", r"\1nan")),
    a_loss_line_deleted=changes((r"^step:100/.*\n", "")),
    times_of_every_line=faster_training,
    times_and_speeds_of_every_line=much_faster_training,
    one_time=changes((r"^(step:100/.*train_time:)(\d+)", times(0.5, 0))),
    one_speed=changes((r"^(step:100/.*tok/s:)(\d+)", times(2, 0))),
    the_time_of_evaluation=changes(
        (r"^(total_eval_time:)([\d.]+)", times(0.7, 1)),
        (r'("eval_seconds": )([\d.]+)', times(0.7, 1)),
    ),
    no_stop_by_the_clock=changes((r"^stopping_early.*\n", "")),
    a_smaller_model=smaller_model,
    smaller_code=smaller_code,
    one_kind_of_bytes=changes((r"^(artifact_bytes .*mlp:)(\d+)", times(0.5, 0))),
    another_artifact=changes((r"^(artifact:.*sha256:)\w", r"\g<1>f")),
    other_bytes_of_text=changes((r"(val_bytes:)(\d+)", times(1.1, 0))),
    other_bytes_of_text_and_of_all_scores=flattered,
    a_shorter_limit_everywhere=setting_everywhere(MAX_WALLCLOCK_SECONDS="60.0"),
    a_longer_limit_everywhere=setting_everywhere(MAX_WALLCLOCK_SECONDS="600.0"),
    no_rounding_in_training=changes((r"^late_qat:on.*\n", "")),
    another_threshold_everywhere=setting_everywhere(LATE_QAT_THRESHOLD="0.9"),
    other_targets=changes((r"(val_targets:)(\d+)", times(2, 0))),
    other_training_data=changes((r"^(data:train_shards \S+:)\d+(:)", r"\g<1>900000000\2")),
    other_hash_of_training_data=changes((r"^(data:train .*sha256:)\w", r"\g<1>0")),
    another_stream=changes(
        (r"^data:stream name:.*", "data:stream name:SP8192 known_by:length only")
    ),
    learning_rates_above_their_peak=changes((r"^(step:100/.*lr_scale:)\S+", r"\g<1>2.0")),
    rounding_to_other_bits=changes((r"^(late_qat:on .*bits:)\d", r"\g<1>5")),
    the_time_of_the_curvature=changes((r"^(gptq_curvature .*seconds:)([\d.]+)", times(0.5, 1))),
    another_budget=changes((r"^(total_eval_time:.*budget:)\d+", r"\g<1>900")),
    another_average=changes((r"^averaging:none", "averaging:ema")),
    other_parameters=changes((r"^(model_params:)(\d+)", times(2, 0))),
    eight_h100=changes((r"^hardware:2 x .*CPU", "hardware:8 x NVIDIA H100 80GB HBM3")),
    memory_of_a_gpu=changes((r"^(averaging)", r"peak memory allocated: 9 MiB reserved: 9 MiB\n\1")),
    two_final_lines=second_ngram_line,
    a_final_line_of_another_name=second_final_line,
    a_line_after_the_result=lambda folder: log_of(folder).write_text(
        f"{log_of(folder).read_text()}final_int6_best_exact val_loss:1 val_bpb:0.5\n"
    ),
    no_result=changes((r"^result .*\n", "")),
    no_artifact=changes((r"^artifact:.*\n", "")),
    no_audit=changes((r"^ngram_audit.*\n", "")),
    one_hash_of_the_stream=lambda folder: edit(folder, r"^(data:val .*sha256:)\w", r"\g<1>f"),
    a_number_that_is_none=setting_everywhere(ITERATIONS="many"),
    a_score_better_in_its_fifth_digit=lambda folder: better_by(folder, 42, nats=9e-5),
    one_run_as_three_seeds_with_small_changes=one_run_three_times_with_small_changes,
    one_run_as_three_seeds_with_other_losses=one_run_three_times_with_other_losses,
    a_score_of_windows_there_was_no_time_for=as_without_overlap,
    one_learning_rate=changes((r"^(step:150/.*lr_scale:)\S+", r"\g<1>0.9000")),
    a_slightly_longer_limit_everywhere=setting_everywhere(MAX_WALLCLOCK_SECONDS="80.0"),
    a_shorter_warmdown_everywhere=setting_everywhere(WARMDOWN_FRAC="0.5"),
    a_least_learning_rate_everywhere=setting_everywhere(MIN_LR="0.1"),
    no_curvature_everywhere=setting_everywhere(QUANTIZER="rows", MAX_WALLCLOCK_SECONDS="68.0"),
    learning_at_evaluation_everywhere=setting_everywhere(TTT_EPOCHS="3"),
    more_learning_than_the_settings_say=lambda folder: learning(folder, epochs=5),
    learning_that_no_setting_asks_for=changes(
        (r"^(total_eval_time)", r"ttt:score_first epochs:3 moved:0.5\n\1")
    ),
    recurrence_everywhere=setting_everywhere(RECUR_LAYERS="1,2"),
    recurrence_that_no_setting_asks_for=changes(
        (r"^(stopping_early)", r"recurrence:on step:120 passes:7\n\1")
    ),
    a_stream_by_its_name_alone=changes((r"^data:stream name:.*", "data:stream name:SP1024")),
    a_stream_known_by_a_hash=changes(
        (r"^data:stream name:.*", "data:stream name:SP1024 known_by:sha256")
    ),
    a_cuda_that_this_torch_has_not=changes((r"^(python:.* cuda:)None", r"\g<1>12.8")),
    a_result_that_says_a_score_twice=changes((r"^result {", r'\g<0>"mixed_bits_per_byte": 1.2, ')),
    a_result_that_says_more=changes((r"^result {", r'\g<0>"val_bpb": 1.2, ')),
    no_forecast_of_the_evaluation=changes((r"^eval_budget.*\n", "")),
    an_indented_score=changes(
        (r"^(total_eval_time)", r"  final_ngram_exact val_loss:2.1 val_bpb:1.2\n\1")
    ),
    a_score_printed_over_another=changes(
        (r"^(final_ngram_exact.*counts:exact)", "\\1\r\x1b[2Kfinal_ngram_exact val_bpb:1.2000")
    ),
    orders_of_one_seed=other_orders_of_one_seed,
    orders_in_another_order=changes((r"^(ngram_order order:2.*\n)(ngram_order.*\n)", r"\2\1")),
    documents_of_one_seed=lambda folder: edit(
        folder, r"^(data:round_trip documents:)\d+", r"\g<1>64"
    ),
    more_targets_enumerated=changes(
        (r"recounted:\d+ enumerated:\d+", "recounted:90 enumerated:90")
    ),
    more_bytes_than_were_decoded=changes((r"^(data:round_trip .*bytes:)(\d+)", times(0.9999, 0))),
)


def test_the_logs_are_whole_before_they_are_tampered_with(folder):
    assert failing(folder) == {}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_log_is_refused_at_its_line(folder, name):
    TAMPERED[name](folder)
    with pytest.raises(RecordError, match=r"logs/seed\d+\.txt:\d+: "):
        read_runs([parse_log(log_of(folder, seed)) for seed in SEEDS])


def test_report_writes_nothing_from_a_tampered_log(folder, whole):
    better_score(folder)
    assert main(["report", "--folder", str(folder)]) == 1
    assert {name: (folder / name).read_text() == whole[name] for name in FILES} == dict.fromkeys(
        FILES, True
    )


def test_check_reports_a_tampered_log_once(folder):
    better_score(folder)
    assert list(failing(folder)) == ["logs"]


@pytest.mark.parametrize(
    "name, spoil, failed",
    [
        ("no text", lambda f: log_of(f).write_bytes(b"\xff\xfe"), ["logs"]),
        ("no score", changes((r"^final_ngram_exact.*\n", "")), ["logs"]),
        ("no table", lambda f: (f / "README.md").write_text("# Ours\n"), ["readme"]),
        ("no JSON", lambda f: (f / "submission.json").write_text("{"), ["hardware"]),
        ("no script", lambda f: (f / "train_gpt.py").unlink(), ["compiles", "source"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_cause_is_reported_once(folder, name, spoil, failed):
    """And by the first check that meets it; what rests on it is not judged."""
    spoil(folder)
    findings = check(folder)
    assert [found.name for found in findings if found.passed is False] == failed
    rest = [found.evidence for found in findings if found.passed is None]
    assert all(re.match("not judged: it rests on what .* refuses", said) for said in rest)


def test_checks_can_be_left_out(folder):
    names = [found.name for found in check(folder, ("logs", "readme"))]
    assert names == [name for name in checks.CHECKS if name not in ("logs", "readme")]


@pytest.mark.parametrize("json", ['{"val_bpb": 1.2, ', '{"hardware": "8 x H100", '])
def test_submission_json_says_nothing_twice(folder, json):
    path = folder / "submission.json"
    path.write_text(path.read_text().replace("{", json, 1))
    assert "twice, expected JSON" in failing(folder)["hardware"]


def numbered_artifact(folder):
    """Another run's artifact had the name."""
    changes((r"^(artifact:.*int6)(\.ptz)", r"\1.2\2"))(folder)


def on_amd_gpus(folder):
    changes(
        (r"^hardware:.* CPU", "hardware:8 x AMD Instinct MI300X"),
        (r"^(python:.* torch:)\S+", r"\g<1>2.9.1+rocm6.4"),
        (r"^(final_float)", r"peak memory allocated: 900 MiB reserved: 950 MiB\n\1"),
    )(folder)


def learning(folder, epochs: int = 3):
    """Each chunk was learned from after it was scored."""
    setting_everywhere(TTT_EPOCHS="3")(folder)
    said = f"ttt:score_first epochs:{epochs} moved:0.5"
    changes((r"^(total_eval_time)", rf"{said}\n\1"))(folder)


def learning_given_up(folder):
    """No way to learn while scoring was fast enough."""
    setting_everywhere(TTT_EPOCHS="3")(folder)
    edits = (r"stride:64", "stride:256"), (r'(?<="stride_tokens": )64', "256")
    for edited in edits:
        changes(edited, count=99)(folder)
    tried = "eval_budget projected:900.0s budget:600s stride:64"
    changes((r"^(eval_budget.*)", rf"{tried}\n\1 from:3000"))(folder)


def other_languages_first(folder):
    """The beginning of an unknown stream may have more bytes per token than the rest."""
    edits = (r"^(data:round_trip.*tokens:)\d+ bytes:\d+", r"\g<1>40000 bytes:160000")
    changes((r"^data:unknown.*", "data:unknown tokens:1 documents:1"), edits)(folder)


HONEST_EDITS = dict(  # lines that runs elsewhere write
    eight_h100=lambda folder: [on_h100(log_of(folder, seed)) for seed in SEEDS],
    eight_amd_gpus=on_amd_gpus,
    an_artifact_of_this_name_was_there=numbered_artifact,
    a_stream_that_begins_inside_a_document=changes(
        (r"^(data:round_trip .*bytes:)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 9}")
    ),
    a_stream_of_several_languages=other_languages_first,
    learning=learning,
    learning_given_up=learning_given_up,
)


@pytest.mark.parametrize("name", HONEST_EDITS)
def test_an_honest_log_from_elsewhere_is_accepted(folder, name):
    HONEST_EDITS[name](folder)
    runs = read_runs([parse_log(log_of(folder, seed)) for seed in SEEDS])
    assert all(compliance(runs).values())


def test_a_run_without_mixing_is_no_result(folder):
    """But it is not said to be cut short."""
    setting_everywhere(NGRAM_ENABLED="False")(folder)
    changes((r"^(ngram_audit|calibration|ngram_order|final_ngram).*\n", ""), count=99)(folder)
    with pytest.raises(RecordError, match="the run mixed nothing .NGRAM_ENABLED=False."):
        read_runs([parse_log(log_of(folder))])


HONEST = dict(  # settings of runs whose logs have other lines, or other numbers in them
    nothing_but_the_first_losses=dict(TRAIN_LOG_EVERY=0, ITERATIONS=24),
    validations=dict(VAL_LOSS_EVERY=3, TRAIN_LOG_EVERY=4, ITERATIONS=13),
    averages=dict(AVERAGING="ema_swa", SWA_EVERY=2, SWA_THRESHOLD=0.9, WARMDOWN_ITERS=11),
    a_clock=dict(ITERATIONS=9000, MAX_WALLCLOCK_SECONDS=6, WARMDOWN_FRAC=0.5),
    a_clock_by_steps=dict(ITERATIONS=9000, MAX_WALLCLOCK_SECONDS=6, WARMDOWN_ITERS=40),
    little_time_to_score=dict(EVAL_BUDGET_SECONDS=0.1, EVAL_STRIDE=1),
    too_little_time=dict(EVAL_BUDGET_SECONDS=0.001),
    learning_at_evaluation=dict(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=2000),
    another_coder=dict(CODER="lzma", QUANT_BITS=5, QUANTIZER="rows"),
    other_mixing=dict(NGRAM_ALPHA="order", NGRAM_ORDER=5, NGRAM_MIN_ORDER=3),
    recurrence=dict(NUM_LAYERS=4, RECUR_LAYERS="1,2", RECUR_START=0.4, SKIP_GATES=1),
    no_late_rounding=dict(LATE_QAT_THRESHOLD=0),
    all_rounded=dict(LATE_QAT_THRESHOLD=1, WARMDOWN_ITERS=11),
    adapters=ADAPTERS,
    adapters_given_up=dict(ADAPTERS, EVAL_BUDGET_SECONDS=0.1),
    learning_given_up=dict(TTT_EPOCHS=2, TTT_CHUNK_TOKENS=100, EVAL_BUDGET_SECONDS=0.1),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_log_agrees_with_itself(corpus, tmp_path, name):
    settings = {"ITERATIONS": 11, "WARMDOWN_ITERS": 4, "GPTQ_TOKENS": 512, **HONEST[name]}
    done = run_script(tmp_path, 0, **corpus, **settings, RUN_ID="honest", SAVE_SCORES=1)
    assert done.returncode == 0, done.stderr[-3000:]
    found = compliance(read_runs([parse_log(tmp_path / "logs/honest.txt")]))
    assert [name for name, holds in found.items() if not holds] == ["three_seeds"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, dict(ITERATIONS=20)], ids=["packed_again", "trained_on"])
def test_the_log_of_a_resumed_run_agrees_with_itself(corpus, tmp_path, more):
    """Its files find others of their names: the first run's."""
    settings = dict(corpus, ITERATIONS=11, GPTQ_TOKENS=512, CHECKPOINT_EVERY=600)
    for changed in ({}, dict(RESUME="logs/test.ckpt", **more)):
        done = run_script(tmp_path, 0, **settings | changed)
        assert done.returncode == 0, done.stderr[-3000:]
    assert read_runs([parse_log(tmp_path / "logs/test_2.txt")])
