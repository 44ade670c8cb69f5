"""Every mixing rule on the saved scores of several models: which gain, and how the gain falls as a
model learns.

    python -m studies.judges SCORES.npz [SCORES.npz ...]

Each file is of a run with SAVE_SCORES=1, and names the run's stream and tokenizer; or it holds
`tokens` and `bytes` itself. It prints Markdown: for each model one column, for each rule one row
with the gain over that model, in bits per byte. A second table has the gains in each third of the
stream. `studies/judges.sh` trains and scores models for it. The rules are those of studies/mixture,
which tells more about one model.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import train_gpt
from studies import mixture
from train_gpt import UserError, bits_per_byte

RULES = {"α by entropy": "entropy", "α by order": "order", "online": "online"}


def read(path: Path) -> tuple[np.ndarray, ...]:
    """(tokens, nll, entropy, bytes of each target)."""
    scores = mixture.read_scores(path)
    nll, entropy = scores["nll"], scores["entropy"]
    if "tokens" in scores:
        return scores["tokens"].astype(np.uint16), nll, entropy, scores["bytes"]
    with np.load(path, allow_pickle=False) as file:
        if "settings" not in file:
            raise UserError(f"{path}: holds neither tokens nor the settings of its run")
        settings = json.loads(str(file["settings"]))
    hp = train_gpt.Hyperparameters.from_env(settings)
    stream = train_gpt.load_validation(hp)
    if stream.num_targets != len(nll):
        raise UserError(
            f"{path}: {len(nll)} scores, but the stream in {hp.data_path} has "
            f"{stream.num_targets} targets"
        )
    return stream.tokens, nll, entropy, stream.target_bytes


def gains(path: Path) -> tuple[str, dict[str, list[float]]]:
    """(head of the column, rule -> gain on the whole and on each third)."""
    tokens, nll, entropy, counted = read(path)
    N = len(nll)
    edges = ((0, N), (0, N // 3), (N // 3, 2 * N // 3), (2 * N // 3, N))
    vocabulary = max(1024, int(tokens.max()) + 1)
    found = {}

    def add(label: str, rule=None, **changes) -> None:
        hp = mixture.settings(vocab_size=vocabulary, **changes)
        mixed = mixture.mixed(tokens, nll, entropy, hp, rule)
        mixed.audit()  # raises what makes it no code
        found[label] = [
            bits_per_byte(nll[a:b], counted[a:b]) - bits_per_byte(mixed.nll[a:b], counted[a:b])
            for a, b in edges
        ]

    for label, alpha in RULES.items():
        add(label, ngram_alpha=alpha)
    add("online, up to n = 16", ngram_order=16)
    for label, rule in (mixture.LEFT_OUT | mixture.ADDED).items():
        add(f"online {label}" if label.startswith("without") else f"online, {label}", rule)
    name = path.stem.removesuffix("_scores")
    return f"{name}: {bits_per_byte(nll, counted):.4f}", found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.judges", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("scores", type=Path, nargs="+", metavar="SCORES.npz")
    args = parser.parse_args()
    try:
        columns = dict(gains(path) for path in args.scores)
    except UserError as error:
        sys.exit(f"judges.py: error: {error}")
    first, *_ = columns.values()
    for title, cell in (
        ("gain of", lambda gain: f"{gain[0]:+.4f}"),
        ("gain in each third of", lambda gain: " ".join(f"{part:+.4f}" for part in gain[1:])),
    ):
        print(f"\n| {title} | " + " | ".join(columns) + " |")
        print("|---|" + "---|" * len(columns))
        for rule in first:
            cells = [cell(column[rule]) for column in columns.values()]
            print(f"| {rule} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
