"""What does learning during evaluation gain, with the mixture and without it?

    python -m studies.ttt ARTIFACT [--documents 100] [--longest 4096] [--rank 8] [--alpha 16]
        [--lr 1e-4] [--chunk 48] [--batch 16] [--chunks-825 32768]

It reads a packed model and the first documents of the validation stream of DATA_PATH, and scores
them in three ways; each row is compared with the row before it that does not learn:

- `documents apart`: every document is scored alone, in chunks of --chunk targets, each with as many
  earlier tokens of the document as fit into EVAL_SEQ_LEN. `adapters` does the same and learns: each
  document has its own low-rank change of the attention's K and output, of both matrices of the MLP
  and of the head, W + (alpha / rank) B A with B = 0 at the start. A chunk is scored, then the
  adapters take one step of AdamW (beta1 0, beta2 0.99, no decay) on the mean nats of its
  targets. Documents do not see each other. So do the challenge's records from 2026-03-17_LoRA_TTT
  on; sizes and rates here are those of its last ones.
- `one stream`: as a run scores it, with EVAL_STRIDE. `chunks` learns as PR #825 did (section 12 of
  the script): TTT_EPOCHS and the other TTT settings in the environment hold, and --chunks-825 gives
  the chunk length.

Each row is mixed with n-gram counts after it was scored (NGRAM_ALPHA=online, the whole stream of
these documents). So the last column says what learning adds to the mixture. Seconds are of
computing, on the hardware named in the first line. Documents longer than --longest tokens are left
out.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import train_gpt as t
from tools import common

ADAPTED = ("attn.k", "attn.proj", "mlp.fc", "mlp.proj")  # of every block; and the head


class Adapters(nn.Module):
    """Low-rank changes of a model's matrices, one set for each document of a batch. Between
    `attach` and `detach` the model computes with them."""

    def __init__(self, model: t.GPT, documents: int, rank: int, alpha: float):
        super().__init__()
        self.model = model
        self.scale = alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()  # A and B
        self.matrices = {
            name.replace(".", "_"): module
            for name, module in model.named_modules()
            if name.endswith(ADAPTED)
        }
        shapes = {name: module.weight.shape for name, module in self.matrices.items()}
        shapes["head"] = model.embed.weight.shape
        for name, (outputs, inputs) in shapes.items():
            down = torch.empty(documents, inputs, rank).uniform_(-1, 1) * (3 / inputs) ** 0.5
            self.down[name] = nn.Parameter(down)
            self.up[name] = nn.Parameter(torch.zeros(documents, rank, outputs))
        self.handles = []

    def change(self, name: str, x_BTI: torch.Tensor) -> torch.Tensor:
        """What the adapters of the first B documents add to the output of a matrix whose input is
        x."""
        B = len(x_BTI)
        return self.scale * (x_BTI @ self.down[name][:B]) @ self.up[name][:B]

    def attach(self) -> None:
        for name, module in self.matrices.items():

            def add(module, args, output, name=name):
                x, *factor = args  # the factor scales the matrix's rows: of blocks' projections
                change = self.change(name, x)
                return output + (change * factor[0].squeeze(-1) if factor else change)

            self.handles.append(module.register_forward_hook(add))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, V), before the softcap."""
        return self.model.logits(hidden_BTD) + self.change("head", t.norm(hidden_BTD))


def score_documents(
    model: t.GPT, documents: list[np.ndarray], chunk: int, learn: dict | None, batch: int
) -> list[np.ndarray]:
    """nll and entropy in nats, (2, targets) of each document, by windows that never leave it.
    `learn`: rank, alpha and lr of adapters; None: do not learn. Documents of similar length share a
    batch, longer ones first."""
    model.requires_grad_(False)
    by_length = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    found = [np.empty((2, len(d) - 1), np.float32) for d in documents]
    for begin in range(0, len(by_length), batch):
        some = by_length[begin : begin + batch]
        scores = score_batch(model, [documents[i] for i in some], chunk, learn)
        for i, scores_2N in zip(some, scores):
            found[i][:] = scores_2N[:, : found[i].shape[1]]
    return found


def score_batch(model, documents: list[np.ndarray], chunk: int, learn: dict | None) -> list:
    """`score_documents` for documents that are scored side by side, chunk after chunk, each as far
    as it goes; the longest comes first."""
    hp = model.hp
    device = model.embed.weight.device
    _, passes = t.block_passes(hp)
    longest = max(map(len, documents)) - 1
    ids = torch.zeros(len(documents), longest + 1, dtype=torch.int64)
    ends = torch.tensor([len(d) - 1 for d in documents], device=device)
    for row, document in zip(ids, documents):
        row[: len(document)] = torch.from_numpy(document.astype(np.int64))
    ids = ids.to(device)
    adapters = optimizer = None
    if learn:
        adapters = Adapters(model, len(documents), learn["rank"], learn["alpha"]).to(device)
        adapters.down.requires_grad_(True)
        parameters = [*adapters.down.values(), *adapters.up.values()]
        optimizer = torch.optim.AdamW(parameters, learn["lr"], betas=(0.0, 0.99), weight_decay=0.0)
        adapters.attach()
    scores = torch.empty(2, len(documents), longest)
    try:
        for first in range(0, longest, chunk):
            last = min(first + chunk, longest)
            start = max(0, last - hp.eval_seq_len)
            open_ones = int((ends > first).sum())
            some = ids[:open_ones]
            with torch.set_grad_enabled(bool(learn)):
                hidden = model.hidden(some[:, start:last], passes, last=last - first)
                logits = adapters.logits(hidden) if adapters else model.logits(hidden)
                logp = t.log_probabilities(logits, hp.logit_softcap)
                nll = -logp.gather(2, some[:, first + 1 : last + 1, None])[..., 0]
            with torch.no_grad():
                entropy = -(logp.exp() * logp).sum(-1)
                scores[:, :open_ones, first:last] = torch.stack((nll, entropy)).cpu()
            if optimizer and last < longest:  # scored: now learn
                is_real = torch.arange(first, last, device=device) < ends[:open_ones, None]
                (nll * is_real).sum().div(chunk).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        if adapters:
            adapters.detach()
    return list(scores.numpy().transpose(1, 0, 2))


def score_stream(model: t.GPT, validation: t.Validation, stride: int, learn: bool) -> np.ndarray:
    """(2, targets), as a run scores them: with test-time training by chunks, or without."""
    _, passes = t.block_passes(model.hp)
    scorer = t.Scorer(model, passes)
    ranks = t.Ranks({})
    if learn:
        log = t.RunLog()
        parts = t.score_and_learn(scorer, t.training_loss, validation, stride, ranks, log)
    else:
        parts = t.score(scorer, validation.tokens, stride, ranks)
    return np.concatenate([*parts], 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.ttt", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--documents", type=int, default=100, help="of the stream, from its start")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--rank", type=int, nargs="+", default=[8], help="one row for each")
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4], help="one row for each")
    parser.add_argument("--chunk", type=int, default=48, help="targets scored before each step")
    parser.add_argument("--batch", type=int, default=16, help="documents side by side")
    parser.add_argument("--chunks-825", type=int, nargs="*", default=[32768])
    args = parser.parse_args()
    try:
        study(args)
    except t.UserError as error:
        sys.exit(f"ttt.py: error: {error}")


def study(args) -> None:
    model, hp = common.load_for_environment(args.artifact)
    validation = t.load_validation(hp)
    documents, tokens = first_documents(validation.tokens, args.documents, args.longest)
    target_bytes = t.ByteCounter(hp)(tokens)
    part = t.Validation(tokens, lambda _: target_bytes)
    print(f"{args.artifact}: {common.describe_device()}")
    print(
        f"{len(documents)} documents, {part.num_targets:,} targets, {target_bytes.sum():,} bytes\n"
    )
    print(f"{'':36} {'neural':>9} {'learned':>9} {'mixed':>9} {'learned':>9} {'seconds':>8}")

    def row(label: str, score, base: tuple | None = None) -> tuple:
        scores_2N, seconds = common.timed(score)
        nll, entropy = scores_2N
        found = [t.bits_per_byte(x, target_bytes) for x in (nll, t.mix(tokens, nll, entropy, hp))]
        gains = [f"{a - b:+9.5f}" if base else " " * 9 for a, b in zip(base or found, found)]
        cells = " ".join(f"{bpb:9.5f} {gain}" for bpb, gain in zip(found, gains))
        print(f"{label:36} {cells} {seconds:8.1f}", flush=True)
        return found

    def apart(learn: dict | None) -> np.ndarray:
        torch.manual_seed(hp.seed)  # of the adapters' A
        return np.concatenate(score_documents(model, documents, args.chunk, learn, args.batch), 1)

    base = row("documents apart", partial(apart, None))
    for rank in args.rank:
        for lr in args.lr:
            learn = dict(rank=rank, alpha=args.alpha, lr=lr)
            row(f"  adapters of rank {rank}, lr {lr:g}", partial(apart, learn), base)
    base = row("one stream", partial(score_stream, model, part, hp.eval_stride, False))
    for length in args.chunks_825:
        learner, _ = common.load_for_environment(args.artifact, **settings_825(length))
        label = f"  chunks of {length:,}, {learner.hp.ttt_epochs} epochs"
        row(label, partial(score_stream, learner, part, hp.eval_stride, True), base)


def settings_825(length: int) -> dict[str, str]:
    """PR #825's settings of its learning, unless the environment has others."""
    values = common.script_settings("order_adaptive")
    learning = {name: value for name, value in values.items() if name.startswith("TTT_")}
    given = {name: os.environ.get(name, value) for name, value in learning.items()}
    return given | {"TTT_CHUNK_TOKENS": str(length)}


def first_documents(tokens: np.ndarray, count: int, longest: int):
    """(documents, stream): the first documents of at most `longest` tokens, each with the BOS that
    follows it as its last target; and the same one after the other, without the BOS twice."""
    starts = np.flatnonzero(tokens == t.BOS)
    spans = [(a, b) for a, b in zip(starts[:-1], starts[1:]) if b - a <= longest][:count]
    t.require(bool(spans), "the validation stream has no whole document that is short enough")
    stream = np.concatenate([tokens[a:b] for a, b in spans] + [[t.BOS]])
    return [np.append(tokens[a:b], t.BOS) for a, b in spans], stream.astype(np.uint16)


if __name__ == "__main__":
    main()
