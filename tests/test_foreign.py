"""`record check` of a folder that nobody here wrote: what it reads, what it finds, that it runs
nothing and ends."""

import base64
import json
import lzma
import os
import re
import subprocess
import sys
import time
import zlib

import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from record import field_script, foreign, whose
from record.__main__ import main
from record.field_log import Unreadable, read_log
from record.foreign_folder import ForeignFolder, last_unit

SEEDS = 42, 1337, 2025
TOKENS = 62_021_632
BYTES_PER_TOKEN = 2.43592
CODE = "import torch\n\n\ndef main():\n    return torch.zeros(1)\n"

LOG = """val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./fineweb_val_*.bin tokens:{tokens}
model_params:26993766
seed:{seed}
warmup_step:1/20
step:1/20000 train_loss:6.{seed} train_time:90ms step_avg:90.00ms
step:2/20000 train_loss:5.{seed} train_time:180ms step_avg:90.00ms
step:6000/20000 train_loss:2.{seed} train_time:540000ms step_avg:90.00ms
step:6600/20000 val_loss:1.9500 val_bpb:1.1549 train_time:{train}ms step_avg:90.00ms
stopping_early: wallclock_cap train_time:{train}ms step:6600/20000
peak memory allocated: 20000 MiB reserved: 21000 MiB
Serialized model: 106000000 bytes
Code size: {code} bytes
Serialized model {label}: {model} bytes
Total submission size {label}: {total} bytes
final_int6_roundtrip val_loss:1.9600 val_bpb:1.1608 eval_time:9000ms
final_{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:64 eval_time:{eval}ms
final_{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""


def log_text(seed: int, **changes) -> str:
    """A log of a script of the field, with some of its numbers changed."""
    values = dict(seed=seed, tokens=TOKENS, train=599_950, code=len(CODE), model=15_800_000)
    values |= dict(label="int6+lzma", name="sliding_window", eval=80_000)
    at = SEEDS.index(seed) if seed in SEEDS else 0
    values |= dict(bpb=1.1201 + at * 0.0007) | changes
    values.setdefault("total", values["model"] + values["code"])
    values.setdefault("loss", values["bpb"] * BYTES_PER_TOKEN * 0.69314718)
    return LOG.format(**values)


MEAN = 1.1208


def write(folder, logs=None, script=CODE, **fields):
    """A record folder with three seeds; `fields` change its submission.json, None removes one."""
    told = dict(author="someone", val_bpb=MEAN, val_loss=1.8924, bytes_total=15_800_000 + len(CODE))
    told = {key: value for key, value in (told | fields).items() if value is not None}
    (folder / "submission.json").write_text(json.dumps(told, allow_nan=False))
    if script is not None:
        (folder / "train_gpt.py").write_text(script)
    for name, text in (logs or {f"train_seed{s}.log": log_text(s) for s in SEEDS}).items():
        (folder / name).write_text(text)
    return folder


def found(folder) -> dict[str, tuple[str, str]]:
    """{check: (verdict, evidence)}"""
    return {one.name: (one.verdict, one.evidence) for one in foreign.judge(folder)}


def of_one(folder, check: str, **changes) -> tuple[str, str]:
    """The verdict on three seeds of which one has changed numbers."""
    logs = {f"train_seed{s}.log": log_text(s) for s in SEEDS}
    logs["train_seed1337.log"] = log_text(1337, **changes)
    return found(write(folder, logs))[check]


def run_of(folder, text: str):
    """The first run in a log with this text."""
    (folder / "train.log").write_text(text)
    return read_log(folder / "train.log", "train.log").runs[0]


# --- what a log says ---


def test_a_good_folder_fails_nothing(tmp_path):
    assert {v for v, _ in found(write(tmp_path)).values()} <= {"PASS", "CANNOT TELL"}


def test_evidence_names_file_and_line(tmp_path):
    verdict, evidence = of_one(tmp_path, "artifact", model=16_100_000)
    assert verdict == "FAIL" and "train_seed1337.log:16: " in evidence


@pytest.mark.parametrize("label", ["int8+zlib", "quantized+brotli", "int6+lzma", "mixed_int5-22"])
def test_a_size_is_read_under_any_label(tmp_path, label):
    assert of_one(tmp_path, "artifact", model=16_100_000, label=label)[0] == "FAIL"


@pytest.mark.parametrize(
    "line",
    [
        "Total submission size: 16100000 bytes",
        "total_submission_bytes: 16,100,000",
        "Artifact: 16,100,000 bytes (15.35 MB)",
        "artifact_bytes:   16100000",
        "budget:16100000/16000000 (16.10/16.00MB)",
        "Total submission size: 16.10 MB",
    ],
)
def test_a_size_is_read_in_other_words(tmp_path, line):
    text = re.sub(r"(?m)^(Total sub|Serialized).*$", "", log_text(42)) + line + "\n"
    assert found(write(tmp_path, {"train.log": text}))["artifact"][0] == "FAIL"


def test_the_size_before_packing_is_no_total(tmp_path):
    text = log_text(42).replace(
        "Serialized model int6",
        f"Total submission size: {106_000_000 + len(CODE)} bytes\nSerialized model int6",
    )
    assert found(write(tmp_path, {"train.log": text}))["artifact"][0] == "PASS"


@pytest.mark.parametrize(
    "text", ["599.95s", "599950ms", "9.9992m", " 599950 ms", " 599.95 seconds"]
)
def test_a_training_time_is_read_in_any_unit(tmp_path, text):
    run = run_of(tmp_path, f"5/20 train_loss: 2.1 train_time:{text} tok/s: 8000\n")
    assert run.all("train_time")[0].value == pytest.approx(599.95, abs=0.01)


@pytest.mark.parametrize(
    "line", ["seed:7", "  seed: 7", "SEED=7", "run seed=7 lr=0.1", '"seed": 7,']
)
def test_a_seed_is_read_in_any_form(tmp_path, line):
    assert run_of(tmp_path, f"{line}\n1/2 train_loss: 1.0\n2/2 train_loss: 1.0\n").seed == 7


def test_a_seed_is_read_in_the_name_of_the_file(tmp_path):
    (tmp_path / "run_seed-7.log").write_text("final val_loss:2.0 val_bpb:1.2\n")
    assert read_log(tmp_path / "run_seed-7.log", "run_seed-7.log").runs[0].seed == 7


def test_a_number_in_a_name_is_no_seed_against_the_log(tmp_path):
    logs = {f"train_s64_{s}.log": log_text(s) for s in SEEDS}
    assert found(write(tmp_path, logs))["seeds"][0] == "PASS"


@pytest.mark.parametrize("name", ["run_s7.log", "ternary_log_7.txt", "s7.out"])
def test_a_seed_is_guessed_from_a_name_where_nothing_else_says_it(tmp_path, name):
    (tmp_path / name).write_text("final val_loss:2.0 val_bpb:1.2\n")
    assert read_log(tmp_path / name, name).runs[0].seed == 7


@pytest.mark.parametrize(
    "line",
    [
        "final_int6_exact val_loss:1.9 val_bpb:1.125",
        "quantized_ttt val_loss: 1.9 val_bpb: 1.125 eval_time: 300s",
        "ttt:done val_loss=1.9 val_bpb=1.125 elapsed=300s",
        "val_bpb:          1.125",
        "TTT BPB:          1.125 (delta: -0.01)",
    ],
)
def test_a_score_is_read_in_any_form(tmp_path, line):
    assert [fact.value for fact in run_of(tmp_path, line + "\n").scores] == [1.125]


def test_progress_of_an_evaluation_is_no_score(tmp_path):
    text = "final val_loss:1.9 val_bpb:1.1\n  ttt_chunk [5/10] bpb=1.3 time=2s\n"
    assert [fact.value for fact in run_of(tmp_path, text).scores] == [1.1]


def test_source_in_a_log_is_not_read_as_results(tmp_path):
    source = 'import os\ndef f():\n    log(f"x")\n    # val_bpb: 0.1\n    val_bpb: 0.2\n'
    text = f"seed:1\n{source}{'=' * 100}\nfinal val_loss:1.9 val_bpb:1.1\n"
    assert [fact.value for fact in run_of(tmp_path, text).scores] == [1.1]


def test_source_without_a_rule_ends_at_the_first_line_of_a_log(tmp_path):
    text = f"{CODE}seed:7\nfinal val_loss:1.9 val_bpb:1.1\n"
    run = run_of(tmp_path, text)
    assert (run.seed, [fact.value for fact in run.scores]) == (7, [1.1])


def test_a_file_with_two_runs_has_two(tmp_path):
    (tmp_path / "train.log").write_text(log_text(42) + log_text(1337))
    runs = read_log(tmp_path / "train.log", "train.log").runs
    assert [run.seed for run in runs] == [42, 1337]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-8-sig"])
def test_other_encodings_are_read(tmp_path, codec):
    (tmp_path / "train.log").write_bytes(log_text(42).encode(codec))
    assert read_log(tmp_path / "train.log", "train.log").runs[0].seed == 42


def test_a_broken_log_does_not_hide_the_others(tmp_path):
    write(tmp_path)
    (tmp_path / "train_seed7.log").write_bytes(bytes(range(256)) * 40)
    told = found(tmp_path)
    assert told["seeds"][0] == "PASS" and "train_seed7.log: binary" in told["folder"][1]


@pytest.mark.parametrize("gone", ["seed", "Code", "Total", "stopping", "val_loader", "final_slid"])
def test_a_missing_line_hides_no_other_check(tmp_path, gone):
    logs = {f"train_seed{s}.log": re.sub(rf"(?m)^{gone}.*\n", "", log_text(s)) for s in SEEDS}
    told = [verdict for verdict, _ in found(write(tmp_path, logs)).values()]
    assert told.count("PASS") >= 12


# --- what is found ---


def test_all_parts_of_the_evaluation_count(tmp_path):
    verdict, evidence = of_one(tmp_path, "eval_time", eval=595_000)
    assert verdict == "FAIL" and "9.0 + 595.0 = 604.0 s" in evidence


def test_a_part_that_is_printed_twice_counts_once(tmp_path):
    logs = {"train.log": log_text(42, eval=400_000) + "ttt eval time: 400.0s\n"}
    assert found(write(tmp_path, logs))["eval_time"][0] == "PASS"


def test_diagnostics_alone_make_it_a_warning(tmp_path):
    line = "DIAGNOSTIC post_ema val_loss:1.9 val_bpb:1.13 eval_time:550000ms\n"
    assert found(write(tmp_path, {"train.log": log_text(42) + line}))["eval_time"][0] == "WARN"


@pytest.mark.parametrize(
    ("train", "verdict"), [(600_000, "PASS"), (600_080, "WARN"), (600_500, "FAIL")]
)
def test_training_over_its_time_by_less_than_a_step_is_a_warning(tmp_path, train, verdict):
    assert of_one(tmp_path, "train_time", train=train)[0] == verdict


def test_an_unlimited_track_has_no_limit_of_time(tmp_path):
    logs = {"train.log": log_text(42, train=14_400_000)}
    write(tmp_path, logs, track="non_record_16mb")
    assert found(tmp_path)["train_time"][0] == "INFO"


def test_two_seeds_are_too_few(tmp_path):
    logs = {f"train_seed{s}.log": log_text(s) for s in SEEDS[:2]}
    assert found(write(tmp_path, logs))["seeds"][0] == "FAIL"


def test_a_seed_that_its_name_contradicts_fails(tmp_path):
    logs = {f"train_seed{s}.log": log_text(s) for s in SEEDS[:2]} | {
        "train_seed9.log": log_text(2025)
    }
    verdict, evidence = found(write(tmp_path, logs))["seeds"]
    assert verdict == "FAIL" and "its name says seed 9, its lines say 2025" in evidence


def test_one_run_under_two_seeds_is_found(tmp_path):
    copy = re.sub(r"seed:42", "seed:1337", log_text(42))
    logs = {"train_seed42.log": log_text(42), "train_seed1337.log": copy}
    assert found(write(tmp_path, logs))["distinct"][0] == "FAIL"


def test_a_bpb_as_val_loss_is_found(tmp_path):
    verdict, evidence = found(write(tmp_path, val_bpb=None, val_loss=MEAN))["units"]
    assert verdict == "FAIL" and "is the bpb of train_seed" in evidence


def test_a_log_whose_loss_is_its_bpb_is_found(tmp_path):
    assert of_one(tmp_path, "units", loss=1.25, bpb=1.25)[0] == "FAIL"


def test_a_run_that_is_not_reported_is_a_warning_at_most(tmp_path):
    logs = {f"train_seed{s}.log": log_text(s) for s in SEEDS}
    logs["train_seed7.log"] = log_text(7, model=17_000_000)
    verdict, evidence = found(write(tmp_path, logs, seeds=list(SEEDS)))["artifact"]
    assert verdict == "WARN" and "a run that the submission does not report" in evidence


def test_a_trial_in_another_folder_is_not_reported(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials/train_seed7.log").write_text(log_text(7, model=17_000_000))
    assert found(write(tmp_path))["artifact"][0] == "WARN"


@pytest.mark.parametrize(
    ("score", "verdict", "said"),
    [
        (MEAN, "PASS", "the mean of 3 runs"),
        (1.1201, "WARN", "the best run's score"),
        (1.1215, "WARN", "the worst run's score"),
        (1.1608, "WARN", "the mean of 3 x `final_int6_roundtrip`"),
        (1.1549, "WARN", "the last validation of training"),
        (1.1, "FAIL", "the score of no log"),
    ],
)
def test_the_score_of_the_json_is_named_by_what_it_is(tmp_path, score, verdict, said):
    told = found(write(tmp_path, val_bpb=score, val_loss=None))["json_score"]
    assert told[0] == verdict and said in told[1]


@pytest.mark.parametrize(
    ("size", "verdict", "said"),
    [
        (15_900_000, "PASS", "the largest run"),
        (15_700_000, "WARN", "one run's"),
        (15_806_667, "WARN", "the mean of 3 runs"),
        (15_900_000 - len(CODE), "WARN", "the model without the code"),
        (8_622_077, "FAIL", "in no log"),
    ],
)
def test_the_bytes_of_the_json_are_named_by_what_they_are(tmp_path, size, verdict, said):
    totals = dict(zip(SEEDS, (15_700_000, 15_820_000, 15_900_000)))
    logs = {f"train_seed{s}.log": log_text(s, model=n - len(CODE)) for s, n in totals.items()}
    told = found(write(tmp_path, logs, bytes_total=size))["json_bytes"]
    assert told[0] == verdict and said in told[1]


@pytest.mark.parametrize(
    "fields",
    [
        dict(seed_results={"42": dict(val_bpb=1.1107)}),
        dict(seeds=[dict(seed=42, val_bpb=1.1107)]),
        dict(val_bpb_seeds={"42": 1.1107}),
        dict(seed_42=dict(val_bpb="1.1107")),
    ],
)
def test_results_per_seed_are_read_in_any_form(tmp_path, fields):
    assert found(write(tmp_path, **fields))["json_seeds"][0] == "FAIL"


def test_a_result_of_a_seed_that_its_log_contradicts_fails(tmp_path):
    results = {"42": dict(val_bpb=1.1201), "1337": dict(val_bpb=1.1107)}
    verdict, evidence = found(write(tmp_path, seed_results=results))["json_seeds"]
    assert verdict == "FAIL" and "seed 1337, val_bpb 1.1107" in evidence


def test_seeds_without_a_log_leave_the_score_open(tmp_path):
    write(tmp_path, {"train.log": log_text(42)}, val_bpb=1.1, seeds=[42, 7, 9])
    assert found(tmp_path)["json_score"][0] == "CANNOT TELL"


def test_another_script_than_the_logs_fails(tmp_path):
    assert found(write(tmp_path, script=CODE + "# more\n"))["code_bytes"][0] == "FAIL"


def test_a_log_of_another_script_of_the_folder_passes(tmp_path):
    write(tmp_path, script=CODE + "# more\n")
    (tmp_path / "train_other.py").write_text(CODE)
    assert found(tmp_path)["code_bytes"][0] == "PASS"


def test_a_total_under_its_parts_fails(tmp_path):
    assert of_one(tmp_path, "size_sum", total=15_000_000)[0] == "FAIL"


def test_too_many_bytes_per_token_fail(tmp_path):
    """A double count of the spaces gave 17 % too many."""
    loss = 1.12 * BYTES_PER_TOKEN * 0.693147
    verdict, evidence = of_one(tmp_path, "bytes_per_token", loss=loss, bpb=1.12 / 1.177)
    assert verdict == "FAIL" and "2.8671 bytes per token" in evidence


def test_another_tokenizer_of_the_same_text_passes(tmp_path):
    loss = 1.12 * 3 * 0.69314718
    told = of_one(tmp_path, "bytes_per_token", loss=loss, tokens=50_360_000)
    assert told[0] == "PASS"


def test_a_stream_of_a_length_that_nobody_else_has_stays_open(tmp_path):
    verdict, evidence = of_one(tmp_path, "stream", tokens=50_000_000)
    assert verdict == "CANNOT TELL" and "50,000,000 tokens" in evidence


@pytest.mark.parametrize(
    "line",
    [
        "ngram_eval:cutoff at 76.3% of windows",
        "scored 40000 of 62000 tokens",
        "  val_doc_fraction: 0.5",
    ],
)
def test_a_partial_stream_fails_where_the_log_says_so(tmp_path, line):
    logs = {"train.log": log_text(42) + line + "\n"}
    assert found(write(tmp_path, logs))["whole_stream"][0] == "FAIL"


def test_nan_fails(tmp_path):
    logs = {"train.log": log_text(42).replace("train_loss:2.42", "train_loss:nan")}
    assert found(write(tmp_path, logs))["finite"][0] == "FAIL"


# --- the script ---

HASHED = """
import numpy as np
def score(tokens, ctx_tables, full_tables, mask, primes, nll):
    for start in range(0, 100, 10):
        h = np.zeros(10, np.uint64)
        for k in range(3):
            h ^= tokens[start + k] * primes[k % len(primes)]
        ctx_key = (h & mask).astype(np.int64)
        full_key = ((h ^ (tokens[start + 3] * primes[3])) & mask).astype(np.int64)
        p = full_tables[full_key] / ctx_tables[ctx_key]
        np.add.at(ctx_tables, ctx_key, 1)
        np.add.at(full_tables, full_key, 1)
"""
UPDATED_FIRST = HASHED.replace(
    "        p = full", "        np.add.at(full_tables, full_key, 1)\n        p = full"
)


def packed(code: str, how: str) -> str:
    data = code.encode()
    if how == "lzma":
        text = base64.b85encode(lzma.compress(data))
        return f"import lzma, base64\nexec(lzma.decompress(base64.b85decode({text!r})))\n"
    if how == "zlib":
        text = base64.b64encode(zlib.compress(data))
        return f"import zlib, base64\nexec(zlib.decompress(base64.b64decode({text!r})))\n"
    return f"exec(bytes.fromhex({data.hex()!r}))\n"


@pytest.mark.parametrize("how", ["plain", "lzma", "zlib", "hex"])
def test_a_table_keyed_by_the_target_is_found_however_it_is_packed(tmp_path, how):
    script = HASHED if how == "plain" else packed(HASHED, how)
    write(tmp_path, {"train.log": log_text(42, name="ngram")}, script=script)
    assert found(tmp_path)["hashed_targets"][0] == "FAIL"


def test_such_a_table_is_a_warning_where_no_log_says_that_it_is_used(tmp_path):
    assert found(write(tmp_path, script=HASHED))["hashed_targets"][0] == "WARN"


def test_a_hashed_embedding_of_inputs_is_no_such_table(tmp_path):
    lines = "h = (36313 * t[1:] ^ 27191 * t[:-1]) % m", "return self.embed(h)"
    script = "def f(self, t, m):\n" + "".join(f"    {line}\n" for line in lines)
    assert found(write(tmp_path, script=script))["hashed_targets"][0] == "PASS"


def test_an_update_before_the_score_is_found(tmp_path):
    assert found(write(tmp_path, script=UPDATED_FIRST))["updates_first"][0] == "WARN"


def test_an_update_after_the_score_is_fine(tmp_path):
    assert found(write(tmp_path, script=HASHED))["updates_first"][0] == "PASS"


def test_a_sibling_that_the_script_needs_is_found(tmp_path):
    write(tmp_path, script="import helper\n")
    (tmp_path / "helper.py").write_text("x = 1\n" * 1000)
    verdict, evidence = found(tmp_path)["siblings"]
    assert verdict == "WARN" and "helper.py (6,000 bytes)" in evidence


def test_a_script_that_runs_another_file_is_found(tmp_path):
    write(tmp_path, script='exec(open(__file__.replace("train_gpt.py", "real.py")).read())\n')
    (tmp_path / "real.py").write_text(HASHED)
    told = found(tmp_path)
    assert "real.py" in told["siblings"][1] and told["hashed_targets"][0] == "WARN"


@pytest.mark.parametrize("line", ["import requests", "os.system('curl http://x.y/z')"])
def test_the_network_is_found(tmp_path, line):
    assert found(write(tmp_path, script=f"import os\n{line}\n"))["network"][0] == "WARN"


def test_a_pickle_is_information(tmp_path):
    assert found(write(tmp_path, script="import pickle\n"))["pickle"][0] == "INFO"


def test_code_of_a_newer_python_is_read(tmp_path):
    newer = """import requests\nprint(f"{'a' + f"{x["b"]}"}", 1)\n"""
    assert found(write(tmp_path, script=newer))["network"][0] == "WARN"


def test_the_source_in_a_log_is_compared_with_the_script(tmp_path):
    text = CODE.replace("zeros", "ones") + "=" * 100 + "\n" + log_text(42)
    verdict, evidence = found(write(tmp_path, {"train.log": text}))["source"]
    assert verdict == "WARN" and "train_gpt.py:5" in evidence


def test_a_part_of_the_source_in_a_log_is_no_pass(tmp_path):
    text = "import torch\n" + "=" * 100 + "\n" + log_text(42)
    assert found(write(tmp_path, {"train.log": text}))["source"][0] == "CANNOT TELL"


# --- nothing runs, and everything ends ---

SPY = "from pathlib import Path\nPath(__file__).with_name('RAN').write_text('x')\n"


def our_looking(folder):
    """A folder with the logs of this project, beside a script that leaves a file when it runs."""
    write(folder, {"x.log": "x"}, script=SPY)
    (folder / "logs").mkdir()
    for path in (ROOT / "logs").glob("seed*.txt"):
        (folder / "logs" / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("judge_as", [[], ["--as", "ours"], ["--as", "foreign"]])
def test_a_foreign_script_never_runs(tmp_path, capsys, judge_as):
    our_looking(tmp_path)
    main(["check", str(tmp_path), *judge_as])
    out = capsys.readouterr().out
    assert (list(tmp_path.rglob("RAN")), "CANNOT TELL causal" in out) == ([], True)


@pytest.mark.parametrize("command", ["settings", "copy"])
def test_no_other_command_runs_a_foreign_script(tmp_path, command):
    (tmp_path / "theirs").mkdir()
    folder = our_looking(tmp_path / "theirs")
    for name in ("README.md", "submission.json", "requirements.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "train_gpt.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    (tmp_path / "dest").mkdir()
    rest = [tmp_path / "dest", "--home", "https://x.org", "--force"] if command == "copy" else []
    parts = [sys.executable, "-m", "record", command, "--folder", folder, *rest]
    subprocess.run([*map(str, parts)], cwd=ROOT)
    assert not list(tmp_path.rglob("RAN"))


def test_our_logs_are_judged_by_our_checks(tmp_path, capsys):
    main(["check", str(our_looking(tmp_path))])
    assert "FAIL source" in capsys.readouterr().out


def test_only_the_same_bytes_may_run(tmp_path):
    source = (ROOT / "train_gpt.py").read_bytes()
    answers = []
    for data in (source, source + b"\n"):
        (tmp_path / "train_gpt.py").write_bytes(data)
        answers.append(whose.may_run(tmp_path))
    assert answers == [True, False]


@pytest.mark.parametrize("name", ["logs/x.log", "README.md"])
def test_a_copy_of_our_script_beside_a_pipe_is_a_foreign_folder(tmp_path, name):
    (tmp_path / "logs").mkdir()
    (tmp_path / "train_gpt.py").write_bytes((ROOT / "train_gpt.py").read_bytes())
    answers = [whose.is_ours(tmp_path)]
    os.mkfifo(tmp_path / name)
    assert [*answers, whose.is_ours(tmp_path)] == [True, False]


def test_a_clone_of_this_project_is_ours_whatever_git_keeps_in_it(tmp_path):
    (tmp_path / ".git/objects/aa/bb/cc/dd/ee").mkdir(parents=True)
    (tmp_path / "train_gpt.py").write_bytes((ROOT / "train_gpt.py").read_bytes() + b"# mine\n")
    assert whose.is_ours(tmp_path)


def test_what_a_terminal_would_obey_is_written_out(tmp_path):
    text = log_text(42, name="\x07evil\x9b31m", eval=700_000)
    evidence = found(write(tmp_path, {"train\x1b[2J.log": text}))["eval_time"][1]
    assert evidence.isprintable()


def test_a_packed_script_never_runs(tmp_path):
    write(tmp_path, script=packed(SPY, "lzma"))
    told = found(tmp_path)
    assert told["script"][0] == "PASS" and not list(tmp_path.rglob("RAN"))


def test_a_bomb_is_unpacked_up_to_a_limit(tmp_path):
    bomb = packed("import os\n" + "#" * 3_000_000, "lzma")
    write(tmp_path, script=bomb)
    assert "was read up to" in found(tmp_path)["script"][1]


@pytest.mark.parametrize("check", ["hashed_targets", "updates_first", "siblings", "network"])
def test_code_that_was_not_read_is_not_passed(tmp_path, check):
    write(tmp_path, script=packed("import os\n" + "#" * 3_000_000, "lzma"))
    assert found(tmp_path)[check][0] == "CANNOT TELL"


@pytest.mark.parametrize("check", ["hashed_targets", "updates_first", "siblings", "network"])
def test_code_of_an_unknown_packing_is_not_passed(tmp_path, check):
    write(tmp_path, script=f"import mine\nexec(mine.unpack({'x' * 500!r}))\n")
    assert found(tmp_path)[check][0] == "CANNOT TELL"


def test_code_that_is_packed_again_and_again_ends():
    code = "import os\n" + "x = 1\n" * 40
    for _ in range(8):
        code = packed(code, "zlib")
    layers, notes = field_script.layers_of("x.py", code)
    assert len(layers) == field_script.MOST_LAYERS + 1 and "not unpacked further" in notes[0]


def test_a_script_of_loops_in_loops_is_not_walked_again_and_again(tmp_path):
    loops = "".join(f"{' ' * depth}for i in x:\n" for depth in range(18))
    script = loops + f"{' ' * 18}counts[0] += 1\n" * 20_000
    write(tmp_path, script=script)
    assert "too much code to look at" in found(tmp_path)["script"][1]


def test_a_log_of_a_gigabyte_is_read_at_both_ends(tmp_path):
    path = tmp_path / "train_seed42.log"
    with path.open("wb") as file:
        file.write(b"seed:42\n")
        file.seek(1 << 30)
        file.write(b"\nfinal val_loss:1.9 val_bpb:1.1\n")
    log = read_log(path, path.name)
    assert log.runs[0].seed == 42 and log.runs[0].scores[0].place == "train_seed42.log:-1"


def test_what_was_not_read_is_said(tmp_path):
    (tmp_path / "train.log").write_text("final val_loss:1.9 val_bpb:1.1\n" + "x" * 9_000_000)
    assert "were not read" in found(tmp_path)["folder"][1]


def test_a_link_out_of_the_folder_is_named_and_not_followed(tmp_path):
    folder, outside = tmp_path / "record", tmp_path / "secret.log"
    folder.mkdir()
    outside.write_text(log_text(42))
    (folder / "train.log").symlink_to(outside)
    told = found(folder)
    assert "outside of the folder" in told["folder"][1] and told["seeds"][0] == "CANNOT TELL"


def test_a_link_is_not_opened_even_if_it_was_a_file_when_it_was_listed(tmp_path):
    (tmp_path / "secret.log").write_text(log_text(42))
    (tmp_path / "train.log").symlink_to(tmp_path / "secret.log")
    with pytest.raises(Unreadable):
        read_log(tmp_path / "train.log", "train.log")


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    write(tmp_path)
    os.mkfifo(tmp_path / "train_seed9.log")
    assert "train_seed9.log is no regular file" in found(tmp_path)["folder"][1]


def test_a_script_that_is_a_pipe_is_not_waited_for(tmp_path):
    write(tmp_path, script=None)
    os.mkfifo(tmp_path / "train_gpt.py")
    assert main(["check", str(tmp_path)]) == 0


def test_thousands_of_files_end_in_seconds(tmp_path):
    for number in range(3_100):
        (tmp_path / f"{number}.log").touch()
    start = time.perf_counter()
    told = found(tmp_path)
    assert "too many logs" in told["folder"][1] and time.perf_counter() - start < 30


def test_folders_in_folders_end(tmp_path):
    (tmp_path / "/".join(["a"] * 200)).mkdir(parents=True)
    assert "deeper than" in found(tmp_path)["folder"][1]


def test_a_json_of_brackets_is_said_to_be_broken(tmp_path):
    write(tmp_path)
    (tmp_path / "submission.json").write_text("[" * 100_000)
    assert "submission.json: no JSON" in found(tmp_path)["folder"][1]


LINES = st.lists(
    st.one_of(
        st.sampled_from(LOG.splitlines()),
        st.from_regex(r"[a-z_]{1,12}(:| ?= ?|: )[0-9.,eE+-]{0,9}(ms|s|m| bytes)?( [a-z:=0-9.]*)?"),
        st.text(max_size=60),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=LINES, data=st.binary(max_size=60), script=st.text(max_size=80))
def test_no_content_makes_a_check_fail_to_answer(tmp_path, lines, data, script):
    (tmp_path / "a_seed1.log").write_text("\n".join(lines), "utf-8", "replace")
    (tmp_path / "b.log").write_bytes(data)
    (tmp_path / "submission.json").write_bytes(b'{"val_bpb": 1.1, "seeds": [1]}' + data[:2])
    (tmp_path / "train_gpt.py").write_text("import os\n" + script, "utf-8", "replace")
    assert [one for one in foreign.judge(tmp_path) if "this check failed" in one.evidence] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["val_bpb", "val_loss", "seeds", "seed_results", "42", "bytes_total"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=JSON)
def test_no_json_makes_a_check_fail_to_answer(tmp_path, content):
    (tmp_path / "train.log").write_text(log_text(42))
    # Python writes and reads Infinity and NaN, which no standard knows
    (tmp_path / "submission.json").write_text(json.dumps(content), "utf-8", "replace")
    assert [one for one in foreign.judge(tmp_path) if "this check failed" in one.evidence] == []


# --- the command ---


def test_the_command_ends_with_1_if_a_check_fails(tmp_path, capsys):
    """As the predecessors: over the cap and over the time, a JSON that says otherwise."""
    changes = dict(model=17_081_794, eval=895_000, train=600_015)
    logs = {f"train_seed{s}.log": log_text(s, **changes) for s in SEEDS[:2]}
    write(tmp_path, logs, val_loss=1.1204, val_bpb=None, bytes_total=8_622_077)
    assert main(["check", str(tmp_path)]) == 1
    failed = "seeds, artifact, eval_time, units, json_bytes"
    assert capsys.readouterr().out.endswith(f"; FAIL: {failed}\n")


def test_the_command_ends_with_0_if_none_fails(tmp_path):
    assert main(["check", str(write(tmp_path))]) == 0


def test_a_fail_comes_with_advice_for_a_reviewer(tmp_path, capsys):
    logs = {"train.log": log_text(42)}
    main(["check", str(write(tmp_path, logs))])
    assert "FAIL seeds runs with a log: 1" in (out := capsys.readouterr().out)
    assert "reviewer: ask for the missing logs" in out


def test_the_verdicts_come_as_json(tmp_path, capsys):
    main(["check", str(write(tmp_path)), "--json"])
    rows = json.loads(capsys.readouterr().out)["checks"]
    assert [row["name"] for row in rows] == list(foreign.CHECKS)


def test_a_table_has_a_row_for_each_check_and_folder(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    main(["check", str(tmp_path), "--table"])
    out = capsys.readouterr().out
    rows = [f"| {name} |" for name in (*foreign.CHECKS, "one", "two")]
    assert [row for row in rows if f"\n{row}" not in out] == []


def test_a_console_of_another_process_gets_it(tmp_path):
    command = [sys.executable, "-m", "record", "check", str(write(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "unit"), [("1.0640", 1e-4), ("1.064", 1e-3), ("13400000", 1e5), ("15953596", 1)]
)
def test_the_last_digit_of_a_claim_counts_as_it_is_written(tmp_path, text, unit):
    (tmp_path / "submission.json").write_text(f'{{"val_bpb": {text}}}')
    claim = ForeignFolder(tmp_path).score_claim
    assert last_unit(claim.value) == pytest.approx(unit)


# --- work beside the clocks, and how verdicts are printed ---


def with_lines(folder, *lines: str, **changes):
    """Three seeds, with more lines in each log."""
    logs = {f"train_seed{s}.log": log_text(s, **changes) + "\n".join(lines) + "\n" for s in SEEDS}
    return found(write(folder, logs))


@pytest.mark.parametrize("seconds, verdict", [("0.02s", "PASS"), ("4.9s", "WARN")])
def test_quantisers_work_that_would_pass_the_limit_of_training_is_told(tmp_path, seconds, verdict):
    told = with_lines(tmp_path, f"GPTQ:collected 67 Hessians in {seconds}")["train_time"]
    assert told[0] == verdict and ("GPTQ" in told[1]) == (verdict == "WARN")


@pytest.mark.parametrize("seconds, verdict", [("20.1s", "PASS"), ("137.6s", "WARN")])
def test_warm_up_that_would_pass_the_limit_of_evaluation_is_told(tmp_path, seconds, verdict):
    line = f"ttt_lora:compile warmup done ({seconds})"
    assert with_lines(tmp_path, line, eval=510_000)["eval_time"][0] == verdict


def test_seconds_that_are_only_reserved_count_for_nothing(tmp_path):
    told = with_lines(tmp_path, "gptq:reserving 14s, effective=586000ms")
    assert told["train_time"][0] == "PASS"


def test_a_fraction_of_one_is_the_whole_stream(tmp_path):
    assert with_lines(tmp_path, "  val_doc_fraction: 1.0")["whole_stream"][0] == "PASS"


def test_checks_that_cannot_tell_for_one_reason_share_a_line(tmp_path, capsys):
    main(["check", str(write(tmp_path))])
    out = capsys.readouterr().out
    assert "CANNOT TELL causal, sums_to_one, one_pass: only running the script can tell" in out


def test_a_submission_without_a_score_is_worth_a_warning(tmp_path):
    assert found(write(tmp_path, val_bpb=None))["json_score"][0] == "WARN"
