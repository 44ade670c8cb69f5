"""README's results, the table of systems, the page of settings, and which rules the logs show to be
kept: functions of the logs and of the script."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev

from .consistency import LEARNS, gave_way
from .fill import fill
from .folder import inside, load_script, read_json, with_part, write_all
from .log import Log, parse_log, require
from .run import LEAST_SEEDS, LIMITS, Run, data_lines, read_systems

SYSTEMS_PAGE = Path("docs/predecessors.md")
SETTINGS_PAGE = Path("docs/settings.md")
TRACKS = "10min_16mb", "non_record_16mb"
COLUMNS = (  # heading, number of a run, how it is written
    ("step_avg", "step_ms", "{:.2f} ms"),
    ("steps", "steps", "{:,.0f}"),
    ("neural bpb", "neural_bits_per_byte", "{:.5f}"),
    ("**mixed bpb**", "mixed_bits_per_byte", "**{:.5f}**"),
    ("gain", "gain_bits_per_byte", "{:.5f}"),
    ("eval s", "eval_seconds", "{:.1f}"),
    ("artifact bytes", "submission_bytes", "{:,.0f}"),
)


# --- what runs have in common ---


def common(runs: list[Run], prefix: str, key: str) -> str:
    """What the logs say after `key`: one text, or the different ones joined."""
    return "; ".join(sorted({run.log.find(prefix)[key] for run in runs}))


def hardware(runs: list[Run]) -> str:
    return common(runs, "hardware:", "hardware")


def data_facts(runs: list[Run]) -> dict[str, str | int]:
    """The data of the runs, for submission.json: names of folders and of the tokenizer's file, a
    SHA-256 and a number of shards for each part, the name of the validation stream, and how many
    tokens, targets and bytes there are."""
    log = runs[0].log
    train, val, tokenizer, stream, header, *val_bytes = data_lines(log)
    folder, model = (Path(log.setting(name)) for name in ("DATA_PATH", "TOKENIZER_PATH"))
    names = {"train": Path(log.settings.get("TRAIN_DATA_PATH") or folder).name, "val": folder.name}
    facts = {}
    for line in (train, val, tokenizer, *val_bytes):
        part = line["data"]
        facts[part] = names.get(part, model.name if part == "tokenizer" else folder.name)
        facts[f"{part}_sha256"] = line["sha256"]
    facts |= {f"{line['data']}_shards": int(line.number("shards")) for line in (train, val)}
    sizes = "train_tokens", "val_targets", "val_bytes"
    return facts | {"stream": stream["name"]} | {key: int(header.number(key)) for key in sizes}


# --- tables ---


def results_table(runs: list[Run], folder: Path) -> str:
    """The table between README's markers: a row per seed, linked to its log; mean; sample standard
    deviation."""
    columns = [[getattr(run, name) for run in runs] for _, name, _ in COLUMNS]
    spread = [stdev(column) if len(runs) > 1 else None for column in columns]
    names = [f"[{run.seed}]({inside(run.log.path, folder)})" for run in runs]
    rows = zip([*names, "mean", "std"], [*zip(*columns), map(fmean, columns), spread])
    forms = [form for _, _, form in COLUMNS]
    facts, cap = data_facts(runs), LIMITS["artifact"].most
    budget = float(runs[0].log.setting("MAX_WALLCLOCK_SECONDS"))
    return fill(
        "table.md",
        heads=["Seed", *(heading for heading, _, _ in COLUMNS)],
        rows=[
            [name, *("-" if v is None else form.format(v) for form, v in zip(forms, values))]
            for name, values in rows
        ],
        caption=f"Measured on {hardware(runs)} with torch {common(runs, 'python:', 'torch')}; "
        f"{facts['val']}: {facts['val_targets']:,} targets, {facts['val_bytes']:,} bytes; training "
        f"{f'at most {budget:g} s' if budget else 'no limit'} of wall-clock "
        f"({max(run.train_seconds for run in runs):.1f} s used), scoring stride "
        f"{', '.join(map(str, sorted({run.stride_tokens for run in runs})))}. Largest submission: "
        f"{max(run.submission_bytes for run in runs):,} of {cap:,} bytes, code included. bpb: bits "
        "per byte; std: sample standard deviation over the seeds.",
    )


def systems_table(systems: dict[str, list[Run]]) -> str:
    """A row per system: means over its seeds, and the sample standard deviation of the mixed
    bpb. A system has a pseudo score if studies/predecessors.py has replayed each of its runs."""
    rows = []
    for name, runs in systems.items():
        bpbs = [run.mixed_bits_per_byte for run in runs]
        pseudo = mass = "-"
        replayed = [found for run in runs if (found := replay_of(run))]
        if len(replayed) == len(runs):
            pseudo = f"*{fmean(found['pseudo_bpb'] for found in replayed):.4f}*"
            mass = f"{fmean(found['mass'] for found in replayed):.1f}"
        rows.append(
            (
                f"`runs/{name}.sh`",
                ", ".join(str(run.seed) for run in runs),
                f"{fmean(run.neural_bits_per_byte for run in runs):.4f}",
                f"**{fmean(bpbs):.4f}**",
                f"{stdev(bpbs):.4f}" if len(runs) > 1 else "-",
                pseudo,
                mass,
                coder_of(runs[0]),
                f"{fmean(run.submission_bytes for run in runs):,.0f}",
                f"{fmean(map(bytes_by_rans, runs)):,.0f}",
                f"{fmean(run.train_seconds for run in runs):.1f}",
                f"{fmean(run.eval_seconds for run in runs):.1f}",
            )
        )
    every_run = [run for runs in systems.values() for run in runs]
    facts = data_facts(every_run)
    return fill(
        "table.md",
        heads=[
            *("System", "seeds", "neural bpb", "**mixed bpb**, exact counts", "std"),
            *("hashed, *not a bpb*", "its mass", "coder", "artifact bytes", "by rANS"),
            *("train s", "eval s"),
        ],
        rows=rows,
        caption=f"Measured on {hardware(every_run)}; {facts['val']}: {facts['val_targets']:,} "
        "targets. Hashed: what the pull request's method reports; its counts sum to the mass over "
        "the vocabulary, not 1. By rANS: the bytes of the same weights with CODER=rans.",
    )


def coder_of(run: Run) -> str:
    """The value of CODER: `lzma`, if the log names the artifact `int6+lzma`."""
    label = run.log.find("Total submission size int").text.split(":")[0]
    return label.rpartition("+")[2]


def bytes_by_rans(run: Run) -> float:
    """`submission_bytes`, if rANS had coded the same weights."""
    if coder_of(run) == "rans":
        return run.submission_bytes
    return run.code_bytes + run.log.find("fit_artifact ").number("bytes_by_rans")


def replay_of(run: Run) -> dict[str, float] | None:
    """What studies/predecessors.py wrote beside the run's log; None: nothing. RecordError: it
    replayed another run's scores, or its numbers are missing."""
    path = run.log.path.with_name(f"{run.log.name}_predecessors.json")
    if not path.exists():
        return None
    made_by = "`python -m studies.predecessors SCORES.npz --rule ...`"
    found = read_json(path, made_by)
    for key in ("pseudo_bpb", "mass", "neural_bpb"):
        problem = f"{key} is {found.get(key, 'missing')}, expected a number; make it by {made_by}"
        require(isinstance(found.get(key), (int, float)), f"{path}: {problem}")
    neural = run.neural_bits_per_byte
    problem = f"neural_bpb is {found['neural_bpb']}, but {run.log.path} says {neural}"
    is_its = abs(found["neural_bpb"] - neural) <= 1e-8
    require(is_its, f"{path}: {problem}: scores of another run; replay this one's")
    return found


def settings_page(script: Path) -> str:
    """Every environment variable of `script`, its default, range and meaning, under its headings in
    Hyperparameters."""
    loaded = load_script(script)
    defaults = loaded.Hyperparameters().as_env()
    groups = []
    for title, group in loaded.setting_groups().items():
        rows = [(f.name.upper(), loaded.allowed(f), f.metadata["doc"]) for f in group]
        groups.append((title, [(name, defaults[name], *others) for name, *others in rows]))
    return fill("settings.md", groups=groups, script=loaded) + "\n"


# --- the rules, as the logs show them ---


def compliance(runs: list[Run]) -> dict[str, bool]:
    """The rules, each decided by what the logs say; a fact that is missing makes it false."""
    logs, audits = [run.log for run in runs], [run.audit for run in runs]
    holds = {
        limit.rule: all(limit.read(log)[0] <= limit.most for log in logs)
        for limit in LIMITS.values()
    }
    masses = [audit.number(key) for audit in audits for key in ("mass_min", "mass_max")]
    return holds | dict(
        three_seeds=len({run.seed for run in runs}) >= LEAST_SEEDS,
        same_code=len({log.source for log in logs}) == 1,
        exact_counts=all(log.find("final_ngram_exact").get("counts") == "exact" for log in logs),
        each_target_scored_once=not any(map(unscored, logs)),
        distribution_sums_to_one=all(audit.number("enumerated") > 0 for audit in audits)
        and all(abs(mass - 1) <= 1e-9 for mass in masses),
        scored_before_update=all(map(score_first, logs))
        and all(audit.number(key) > 0 for audit in audits for key in ("recounted", "prefix")),
        no_pickle=not any(unsafe_reading(log.source) for log in logs),
    )


def unscored(log: Log) -> str:
    """Why the log does not show that each target is scored once; empty: it does."""
    targets = str(int(log.find("train_tokens:").number("val_targets")))
    audit = log.find("ngram_audit")
    if audit["targets"] != f"{targets}/{targets}":
        expected = f"{targets}/{targets} (val_targets of the header)"
        return f"{audit.place}: targets:{audit['targets']}, expected {expected}"
    for line in log.all("scored "):
        if (line["targets"], line["of"]) != (targets, targets):
            return f"{line.place}: {line.text!r}, expected targets:{targets} of:{targets}"
    return ""


def score_first(log: Log) -> bool:
    """Test-time training says in its `ttt:` lines that it scores before it learns; without lines it
    must be off, or given up for lack of time."""
    if lines := log.all("ttt:"):
        return any("score_first" in line.text for line in lines)
    return gave_way(log) or all(log.settings.get(name, "0") == "0" for name in LEARNS)


UNSAFE_MODULES = "pickle cPickle dill cloudpickle marshal shelve joblib".split()  # noqa: SIM905


@lru_cache  # a check asks of each log, which are of one script
def unsafe_reading(source: str) -> str:
    """The first thing in `source` that could run code from a file: pickle, torch.load, eval; empty:
    none."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError) as error:
        return f"it is not Python: {error}"
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in UNSAFE_MODULES for name in names):
            return f"line {node.lineno} imports {names[0]}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                called in ("eval", "exec", "__import__")
                or options.get("allow_pickle") == "True"
                or called == "torch.load"
                and options.get("weights_only") != "True"
            ):
                return f"line {node.lineno} calls {ast.unparse(node)[:80]}"
    return ""


# --- what the commands write ---


def systems(paths: list[Path], folder: Path) -> dict[str, list[Run]]:
    """Rewrites the table of systems from logs named <system>_seed<seed>.txt. RecordError: nothing
    is written."""
    page = folder / SYSTEMS_PAGE
    with_part(page, "systems", "")
    runs = read_systems([parse_log(path) for path in paths])
    write_all({page: with_part(page, "systems", systems_table(runs))})
    return runs


def settings(folder: Path) -> Path:
    """Rewrites the page of environment variables; returns its path."""
    page = folder / SETTINGS_PAGE
    write_all({page: settings_page(folder / "train_gpt.py")})
    return page
