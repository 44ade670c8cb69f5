"""How many bits per byte does a text of your own cost a packed model?

    TOKENIZER_PATH=FILE python -m examples.score_text TEXT [ARTIFACT] [--tokens] [--page OUT.html]

TEXT is a UTF-8 file, taken as one document. Prints the bits per byte of the model alone and with
the mixture; with --tokens also a line per token: its text, the bits that it cost, and those that
the mixture saved. --page writes the page of `make view`.
"""

import json
import math
import tempfile
from pathlib import Path

import numpy as np

import train_gpt as t
from examples import last_artifact, load, new_parser, run
from record.view import view


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("artifact", nargs="?", default=last_artifact())
    parser.add_argument("--tokens", action="store_true", help="a line per token")
    parser.add_argument("--page", type=Path, metavar="OUT.html")
    args = parser.parse_args()
    model, hp, counter = load(args.artifact)
    text = args.text.read_text(encoding="utf-8")
    ids = counter.pieces.encode(text)
    tokens = np.array([t.BOS, *ids], np.uint16)
    target_bytes = counter(tokens)
    t.require(target_bytes.sum() > 0, f"{args.text}: expected some text")

    scorer = t.Scorer(model, t.block_passes(hp)[1])
    segments = t.score(scorer, tokens, hp.eval_stride, t.Ranks({}))
    nll, entropy = np.concatenate([*segments], 1)
    mixed = t.mix(tokens, nll, entropy, hp)
    neural_bpb, mixed_bpb = (t.bits_per_byte(x, target_bytes) for x in (nll, mixed))
    lost = len(text.encode()) - target_bytes.sum()
    print(
        f"{len(ids)} tokens, {target_bytes.sum()} bytes ({lost} are lost: white space, as a rule)"
    )
    print(f"bits per byte: {neural_bpb:.4f} model alone, {mixed_bpb:.4f} mixed")
    if args.tokens:
        for i, cost, saved in zip(ids, nll / math.log(2), (nll - mixed) / math.log(2)):
            print(f"{counter.pieces.id_to_piece(i)}\t{cost:.2f}\t{saved:+.2f}")
    if args.page:
        with tempfile.TemporaryDirectory() as folder:  # the page is made from what a run saves
            header = np.array([20240520, 1, len(tokens), *[0] * 253], "<i4")
            Path(folder, "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
            env = {"DATA_PATH": folder, "EVAL_SEQ_LEN": "1", "EVAL_STRIDE": "1", "EVAL_ONLY": ""}
            path, settings = Path(folder, "scores.npz"), json.dumps(hp.as_env() | env)
            np.savez(path, nll=nll, entropy=entropy, mixed=mixed, settings=settings)
            print(view(path, args.page).path.resolve().as_uri())


if __name__ == "__main__":
    run(main)
