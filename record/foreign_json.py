"""Checks of submission.json against the logs: what each of its numbers is a number of."""

from __future__ import annotations

from .field_log import Fact, Run
from .foreign_folder import Claim, ForeignFolder, agrees, mean_of, total_bytes
from .foreign_verdict import CANNOT, FAIL, MOST_SHOWN, PASS, WARN, Finding, sizes_of, worst_of


def check_json_score(folder: ForeignFolder) -> Finding:
    """The score of submission.json is the mean of the logs' scores."""
    claim = folder.score_claim
    if not claim and folder.json_file:
        return WARN, f"{folder.json_file}: no val_bpb"
    if not claim:
        return CANNOT, "there is no submission.json"
    text = f"{folder.json_file}: {claim.key} {claim.value}"
    groups = [runs for runs in (folder.runs, folder.all_runs) if any(run.scores for run in runs)]
    checked = [fact for run in folder.all_runs for fact in run.all("validation")[-1:]]
    same = [fact for fact in checked if agrees(claim, fact.value)]
    if not groups and not same:
        return CANNOT, f"{text}; no log has a score"
    for runs in groups:
        scored = [run for run in runs if run.scores]
        if agrees(claim, mean_of([run.scores[-1].value for run in scored])):
            places = ", ".join(run.scores[-1].place for run in scored[:MOST_SHOWN])
            return PASS, f"{text} is the mean of {len(scored)} runs' last scores ({places})"
    for runs in groups:
        if finding := score_of_another_kind(claim, text, [run for run in runs if run.scores]):
            return finding
    if same:
        return WARN, f"{text} is the last validation of training ({same[-1].place}), before packing"
    parts = [told["score"] for told in folder.seed_claims.values() if "score" in told]
    every = [fact.value for run in folder.all_runs for fact in run.scores]
    is_mean = parts and agrees(claim, mean_of([part.value for part in parts]), parts[0].unit)
    if is_mean and all(any(agrees(part, value) for value in every) for part in parts):
        return WARN, f"{text} is the mean of its own results per seed, each of them in a log"
    finals = [run.scores[-1] for run in folder.runs if run.scores]
    mean = mean_of([fact.value for fact in finals])
    shown = ", ".join(f"{fact.value} ({fact.place})" for fact in finals[:MOST_SHOWN])
    said = f"{text} is the score of no log and no mean of them; they say {shown}, mean {mean:.5f}"
    if folder.seeds_without_log:
        return CANNOT, f"{said}; the logs of seeds {folder.seeds_without_log} are not here"
    return FAIL, said


def score_of_another_kind(claim: Claim, text: str, runs: list[Run]) -> Finding | None:
    """The claimed score is that of another evaluation, or of one run of several."""
    finals = [run.scores[-1] for run in runs]
    mean = mean_of([fact.value for fact in finals])
    labels = [{fact.label: fact for fact in run.scores} for run in runs]
    for label in labels[0]:
        values = [told[label].value for told in labels if label in told]
        if len(values) == len(runs) and agrees(claim, mean_of(values)):
            last = f"the last scores' mean is {mean:.5f} ({finals[-1].label})"
            return WARN, f"{text} is the mean of {len(runs)} x `{label}`; {last}"
    for fact in finals:
        if agrees(claim, fact.value):
            which = "one run's score"
            if fact.value == min(one.value for one in finals):
                which = "the best run's score"
            elif fact.value == max(one.value for one in finals):
                which = "the worst run's score"
            return WARN, f"{text} is {which} ({fact.place}); the mean of {len(runs)} is {mean:.5f}"
    for run in runs:
        for fact in run.scores:
            if agrees(claim, fact.value):
                last = f"its last score is {run.scores[-1].value} ({run.scores[-1].place})"
                return WARN, f"{text} is `{fact.label}` of one run ({fact.place}); {last}"
    return None


def check_json_seeds(folder: ForeignFolder) -> Finding:
    """What submission.json says of each seed is in a log of that seed."""
    findings = []
    for seed, claims in folder.seed_claims.items():
        runs = [run for run in folder.all_runs if run.seed == seed]
        if not runs:
            findings.append((CANNOT, f"{folder.json_file}: no log of seed {seed}"))
            continue
        known = dict(
            score=[fact for run in runs for fact in run.scores],
            bytes=[fact for run in runs for fact in total_bytes(run)],
        )
        for name, claim in claims.items():
            if known[name]:
                findings.append(judge_seed(folder, seed, claim, known[name]))
    return worst_of(findings, "submission.json gives no results per seed, or the logs give none")


def judge_seed(folder: ForeignFolder, seed: int, claim: Claim, facts: list[Fact]) -> Finding:
    """The verdict on one number of one seed."""
    text = f"{folder.json_file}: seed {seed}, {claim.key} {claim.value}"
    for fact in facts:
        if agrees(claim, fact.value, fact.slack):
            return PASS, f"{text} ({fact.place})"
    last = facts[-1]
    packed = [
        fact
        for run in folder.all_runs
        if run.seed == seed
        for fact in run.all("packed")
        if agrees(claim, fact.value)
    ]
    if packed:
        problem = f"is the model alone ({packed[0].place}), without the code"
        return WARN, f"{text} {problem}; the total is {last.value:,.0f} ({last.place})"
    elsewhere = [fact for run in folder.all_runs for fact in run.scores]
    same = [fact.place for fact in elsewhere if agrees(claim, fact.value)]
    found = f"; {same[0]} says that" if same else ""
    return FAIL, f"{text}, but {last.place} says {last.value:,.8g} ({last.label}){found}"


def check_json_bytes(folder: ForeignFolder) -> Finding:
    """The bytes of submission.json are those of the largest run."""
    claim = folder.bytes_claim
    if not claim:
        return CANNOT, f"{folder.json_file or 'no submission.json'}: no bytes_total"
    text = f"{folder.json_file}: {claim.key} {claim.value:,}"
    told = [sizes_of(folder, run) for run in folder.runs]
    sizes = [max(facts, key=lambda fact: fact.value) for facts in told if facts]
    if not sizes:
        return CANNOT, f"{text}; no log says a size"
    largest = max(sizes, key=lambda fact: fact.value)
    mean = mean_of([fact.value for fact in sizes])
    others = [fact for run in folder.all_runs for fact in total_bytes(run)]
    packed = [fact for run in folder.all_runs for fact in run.all("packed")]
    whole = f"the largest run has {largest.value:,.0f} ({largest.place})"
    if agrees(claim, largest.value, largest.slack):
        return PASS, f"{text}; {whole}"
    if same := [fact for fact in sizes if agrees(claim, fact.value, fact.slack)]:
        return WARN, f"{text} is one run's ({same[0].place}); {whole}"
    if agrees(claim, mean, 1):
        return WARN, f"{text} is the mean of {len(sizes)} runs; {whole}"
    if same := [fact for fact in others if agrees(claim, fact.value, fact.slack)]:
        return WARN, f"{text} is that of a run that is not reported ({same[0].place}); {whole}"
    if same := [fact for fact in packed if agrees(claim, fact.value, fact.slack)]:
        return WARN, f"{text} is the model without the code ({same[0].place}); {whole}"
    models = [fact for run in folder.runs for fact in run.all("packed")[-1:]]
    if agrees(claim, mean_of([fact.value for fact in models]), 1):
        return WARN, f"{text} is the mean of {len(models)} models without the code; {whole}"
    size = folder.script_bytes or 0
    if same := [fact for fact in models if agrees(claim, fact.value + size)]:
        return WARN, f"{text} is one run's model ({same[0].place}) and the script here; {whole}"
    if folder.seeds_without_log:
        return CANNOT, f"{text}; {whole}; logs of seeds {folder.seeds_without_log} are not here"
    return FAIL, f"{text} is in no log and no mean of them; {whole}"
