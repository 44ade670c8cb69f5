"""submission.json: what a person says of the submission, and the numbers of the logs. People may
add fields; a field that logs decide must say what they say."""

from __future__ import annotations

import datetime
import json
import re
from decimal import Decimal
from pathlib import Path
from statistics import fmean, stdev

from .folder import Folder, read_json, with_part, write_all
from .log import parse_log, require
from .run import Run, read_runs
from .tables import TRACKS, common, compliance, data_facts, hardware, results_table

PERSONAL = {  # what no log knows: --help text of the flag
    "author": "who made it",
    "github_id": "GitHub account",
    "name": "title of the submission",
    "blurb": "one or two sentences on what it does",
    "date": "of the submission, YYYY-MM-DD",
    "track": f"{' or '.join(TRACKS)}",  # the second has no time limits
}
HOME = "address of the project that made it, https://...; only `copy` needs it"


def submission(runs: list[Run], said: dict) -> dict:
    """submission.json: what a person said, and the numbers of the runs. Fields that are not written
    here are a person's own, and stay as they are."""
    bpbs = [run.mixed_bits_per_byte for run in runs]
    losses = [run.mixed_nats_per_token for run in runs]
    written = {
        **{key: said[key] for key in (*PERSONAL, "home") if key in said},
        "val_bpb": round(fmean(bpbs), 8),
        "val_bpb_std": round(stdev(bpbs), 8) if len(runs) > 1 else None,
        "val_loss": round(fmean(losses), 8),
        "val_loss_std": round(stdev(losses), 8) if len(runs) > 1 else None,
        **before_packing(runs),
        "step_stop": round(fmean(run.steps for run in runs)),
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): seed_result(run) for run in runs},
        "bytes_total": max(run.submission_bytes for run in runs),
        "bytes_code": runs[0].code_bytes,
        "hardware": hardware(runs),
        "pytorch_version": common(runs, "python:", "torch"),
        "data": data_facts(runs),
        "compliance": compliance(runs),
    }
    own = {key: value for key, value in said.items() if key != "seed_results"}
    results = said.get("seed_results")
    for seed in written["seed_results"] if isinstance(results, dict) else ():
        own.setdefault("seed_results", {})[seed] = results.get(seed)
    return joined(written, own)


def seed_result(run: Run) -> dict[str, float]:
    return dict(
        val_loss=run.mixed_nats_per_token,
        val_bpb=run.mixed_bits_per_byte,
        artifact_bytes=run.submission_bytes,
        steps=run.steps,
        step_avg_ms=run.step_ms,
        eval_time_s=run.eval_seconds,
    )


def before_packing(runs: list[Run]) -> dict[str, float]:
    """The mean scores of the weights before they are packed, without overlapping windows and
    without counts. Empty if a log does not say them."""
    if not all(run.log.has("final_float_exact") for run in runs):
        return {}
    lines = [run.log.find("final_float_exact") for run in runs]
    means = {key: fmean(line.number(key) for line in lines) for key in ("val_loss", "val_bpb")}
    return {f"pre_quant_{key}": round(mean, 8) for key, mean in means.items()}


def joined(written: dict, own: dict) -> dict:
    """`written`, and after it, at every depth, the fields that only `own` has."""
    found = dict(written)
    for key, value in own.items():
        if key not in found:
            found[key] = value
        elif isinstance(found[key], dict) and isinstance(value, dict):
            found[key] = joined(found[key], value)
    return found


# Fields that people add and logs decide: name -> the number of a run, and what it is multiplied by.
DECIDED = dict(
    wallclock_seconds=("train_seconds", 1),
    train_seconds=("train_seconds", 1),
    train_time_s=("train_seconds", 1),
    train_time_seconds=("train_seconds", 1),
    train_time_ms=("train_seconds", 1000),
    eval_seconds=("eval_seconds", 1),
    eval_time_s=("eval_seconds", 1),
    eval_time_seconds=("eval_seconds", 1),
    eval_time_s_mean=("eval_seconds", 1),
    eval_time_ms=("eval_seconds", 1000),
    step_avg_ms=("step_ms", 1),
    step_avg_ms_mean=("step_ms", 1),
    steps=("steps", 1),
    train_steps_mean=("steps", 1),
    mean_val_bpb=("mixed_bits_per_byte", 1),
    val_bpb_mean=("mixed_bits_per_byte", 1),
    mean_val_loss=("mixed_nats_per_token", 1),
    val_loss_mean=("mixed_nats_per_token", 1),
    artifact_bytes=("submission_bytes", 1),
    artifact_bytes_max=("submission_bytes", 1),
    artifact_bytes_mean=("submission_bytes", 1),
)


def contradicted(found: dict, runs: list[Run]) -> tuple[str, str]:
    """(field, what the logs say) of the first of a person's own fields that no run, nor the mean of
    all, agrees with to the digits that are written; empty: there is none."""
    for name, (number, factor) in DECIDED.items():
        values = found.get(name, [])
        known = [factor * getattr(run, number) for run in runs]
        for value in values if isinstance(values, list) else [values]:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            exponent = Decimal(str(value)).normalize().as_tuple().exponent if is_number else 0
            digits = max(0, -exponent)
            near = (
                abs(value - x) <= 0.51 * 10.0**-digits for x in (*known, fmean(known)) if is_number
            )
            if not any(near):
                return name, ", ".join(f"{x:.10g}" for x in known)
    return "", ""


def personal_facts(folder: Path, flags: dict[str, str | None]) -> dict:
    """All that the folder's submission.json says, with author, name, date, ... of the flags, where
    they are given. RecordError: one is missing."""
    path = folder / "submission.json"
    said = read_json(path) if path.exists() else {}
    said |= {key: value for key, value in flags.items() if value is not None}
    for key, meaning in PERSONAL.items():
        require(
            isinstance(said.get(key), str) and said[key].strip(),
            f"{path}: has no {key!r} ({meaning}); give `report --{key.replace('_', '-')}`",
        )
    try:
        is_date = datetime.date.fromisoformat(said["date"]).isoformat() == said["date"]
    except ValueError:
        is_date = False
    problem = f"found the date {said['date']!r}, expected YYYY-MM-DD; give `report --date`"
    require(is_date, f"{path}: {problem}")
    problem = f"found the track {said['track']!r}, expected {PERSONAL['track']}"
    require(said["track"] in TRACKS, f"{path}: {problem}; give `report --track`")
    if "home" in said:
        is_address = re.fullmatch(r"https?://[^\s/]+\.[^\s/]+(/\S*)?", str(said["home"]))
        problem = f"found the home {said['home']!r}, expected an address that begins with https://"
        require(is_address, f"{path}: {problem}; give `report --home`")
    return said


def as_json(found: dict) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def report(paths: list[Path], folder: Path, flags: dict[str, str | None]) -> list[Run]:
    """Rewrites README's table and submission.json in `folder` from logs, by default those that the
    table links to. RecordError: nothing is written."""
    readme, path = folder / "README.md", folder / "submission.json"
    with_part(readme, "results", "")  # has it the markers?
    paths = paths or Folder(folder).linked_logs()
    problem = "its results table links to no logs; name one LOG per seed"
    require(paths, f"{readme}: {problem}")
    runs = read_runs([parse_log(path) for path in paths])
    found = submission(runs, personal_facts(folder, flags))
    name, known = contradicted(found, runs)
    problem = f"{name} is {found.get(name)}, the logs say {known}; correct it, or leave it out"
    require(not name, f"{path}: {problem}")
    page = with_part(readme, "results", results_table(runs, folder))
    write_all({readme: page, path: as_json(found)})
    return runs
