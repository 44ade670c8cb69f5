"""Logs for tests: those of this folder's own runs, and changes that leave a log in agreement with
itself, as if the run had been another one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT

import train_gpt as t
from record import checks
from record.consistency import settings_of_source
from record.folder import Folder
from record.log import RULE, Log, parse_log
from record.run import seed_of

FILES = "train_gpt.py", "README.md", "submission.json", "requirements.txt"
PROBES = "imports", "parameters", "causal", "sums_to_one", "one_pass"


def reported() -> dict[str, str]:
    """The texts of a submission with the runs of this folder: name -> text. README has the table
    alone, and the script is that of the logs, so that one that is being worked on hides nothing."""
    logs = Folder(ROOT).logs
    texts = {name: (ROOT / name).read_text() for name in FILES} | {"train_gpt.py": logs[0].source}
    table = re.search(r"<!-- results:begin -->.*<!-- results:end -->", texts["README.md"], re.S)
    texts["README.md"] = f"# Ours\n\n{table[0]}\n"
    return texts | {f"logs/seed{seed_of(log)}.txt": log.path.read_text() for log in logs}


def without_probes(*more: str) -> dict[str, Callable]:
    """The checks that do not run the script, but for `more`."""
    return {name: found for name, found in checks.CHECKS.items() if name not in (*PROBES, *more)}


def parts_of(path: Path) -> tuple[str, str]:
    """(source with the rule under it, what the run wrote) of a log."""
    source, rule, rest = path.read_text().partition(f"\n{RULE}\n")
    return source + rule, rest


def customary(log: Log, settings: dict[str, str]) -> dict[str, str]:
    """How the lines of other scripts start, and what they say by the settings."""
    data, tokenizer = settings["DATA_PATH"], settings["TOKENIZER_PATH"]
    shards, targets = log.find("train_loader:")["train_shards"], log.find("val_loader:")["tokens"]
    folder = Path(settings["TRAIN_DATA_PATH"] or data).name
    return {
        "seed:": f"seed:{settings['SEED']}",
        "train_loader:": f"train_loader:dataset:{folder} train_shards:{shards}",
        "val_loader:": f"val_loader:shards pattern={data}/fineweb_val_*.bin tokens:{targets}",
        "val_bpb:": f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={tokenizer}",
    }


def with_settings(path: Path, **changes: str) -> None:
    """Rewrites the log as if the settings had been these, wherever it says so. Scores, times and
    sizes stay."""
    log, (source, rest) = parse_log(path), parts_of(path)
    settings, defaults = log.settings | changes, settings_of_source(log.source)
    changed = {name: x for name, x in settings.items() if x != defaults[name]}
    known = customary(log, settings) | {f"{name}=": f"{name}={x}" for name, x in settings.items()}
    lines = []
    for line in rest.split("\n"):
        start = next((start for start in known if line.startswith(start)), None)
        if start:
            line = known[start]
        elif line.startswith("changed:"):
            line = "changed: " + " ".join(f"{name}={x}" for name, x in changed.items())
        elif line.startswith("result "):
            result = json.loads(line.removeprefix("result ")) | {"settings": changed}
            line = f"result {json.dumps(result)}"
        lines.append(line)
    path.write_text(source + "\n".join(lines))


def as_run(path: Path, run_id: str) -> None:
    """Rewrites the log as if the run had had this RUN_ID."""
    source, rest = parts_of(path)
    old = parse_log(path).settings["RUN_ID"]
    path.write_text(source + rest.replace(old, run_id))


H100 = dict(
    MAX_WALLCLOCK_SECONDS="600.0",
    TRAIN_BATCH_TOKENS="786432",
    TRAIN_SEQ_LEN="2048",
    TRAIN_LOG_EVERY="500",
    VAL_LOSS_EVERY="4000",
    WARMDOWN_FRAC="0.0",
    GPTQ_RESERVE_SECONDS="12.0",
)


def training_on_h100(hp, seed: int, val_loss: float, ratio: float, parameters: str) -> list[str]:
    """What train_gpt.py writes of a training of 600 s on 8 x H100, from the first step to the
    measurement of the curvature. `ratio`: bits per byte for each nat per token."""
    step_ms, lines, step, is_late = 82.5 + 0.01 * (seed % 97), [], 0, False
    while True:
        step += 1
        seconds = step * step_ms / 1e3
        scale = t.lr_scale(step, seconds, hp)
        clock = f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / step:.2f}ms"
        start = f"step:{step}/{hp.iterations}"
        if step <= 10 or step % hp.train_log_every == 0:
            loss = f"train_loss:{val_loss + 3 / step + seed / 1e4:.4f}"
            speed = f"tok/s:{hp.train_batch_tokens * step / seconds:.0f}"
            lines.append(f"{start} {loss} {clock} {speed} lr_scale:{scale:.4f}")
        if seconds > hp.seconds_for_steps - 4 * step_ms / 1e3:
            break
        if step % hp.val_loss_every == 0:
            lines.append(f"{start} val_loss:{4:.4f} val_bpb:{4 * ratio:.4f} {clock}")
        if scale < hp.late_qat_threshold and not is_late:
            is_late = True
            facts = f"lr_scale:{scale:.4f} bits:{hp.quant_bits} {hp.qat_rounding}"
            lines.append(f"late_qat:on step:{step} {facts}")
    ms = 1e3 * seconds + 9_312
    return [
        *lines,
        f"stopping_early: wallclock_cap {clock.split()[0]} {start}",
        f"{start} val_loss:{val_loss:.4f} val_bpb:{val_loss * ratio:.4f} {clock}",
        f"averaging:none  parameters:{parameters}",
        "gptq_curvature tokens:1048576 seconds:9.3 matrices:67 dead_columns:0 "
        f"train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms",
        "peak memory allocated: 21472 MiB reserved: 22004 MiB",
    ]


def on_h100(path: Path) -> None:
    """Rewrites the log as if the run had been trained on 8 x H100. Data and scores stay."""
    with_settings(path, **H100)
    log, (source, rest) = parse_log(path), parts_of(path)
    hp = t.Hyperparameters.from_env(log.settings)
    exact, parameters = log.find("final_float_exact"), log.find("averaging:")["parameters"]
    loss, bpb = (exact.number(key) for key in ("val_loss", "val_bpb"))
    training = training_on_h100(hp, seed_of(log), loss, bpb / loss, parameters)
    ms = int(re.search(r"train_time:(\d+)", training[-2])[1])
    step = int(re.search(r"step:(\d+)", training[-4])[1])
    result = json.loads(log.find("result ").text.removeprefix("result "))
    result |= {"steps": step, "step_ms": round(ms / step, 3), "train_seconds": ms / 1e3}
    for pattern, new in (
        (r"^step:1/(.*\n)*gptq_curvature.*", "\n".join(training)),
        (r"torch:\S+ cuda:\S+", "torch:2.9.1+cu128 cuda:12.8"),
        (
            "^hardware:.*",
            "hardware:8 x NVIDIA H100 80GB HBM3 threads:1 cores:208 attention:flash_attention_3 "
            "accumulation:1",
        ),
        (r"^  training [\d.]+ s, \d+ steps", f"  training {ms / 1e3:.1f} s, {step} steps"),
        ("^result .*", f"result {json.dumps(result)}"),
    ):
        rest, found = re.subn(pattern, lambda _, new=new: new, rest, flags=re.M)
        assert found == 1, pattern
    path.write_text(source + rest)
