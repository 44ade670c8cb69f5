"""What only running the script can tell: it is imported where there is no GPU, no flash-attention
and no Triton, and a small model of it scores an invented stream. `run_probe` does so in a process
of its own, which is this module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from .folder import load_script
from .log import RecordError, require

HIDDEN = "flash_attn", "flash_attn_interface", "flash_attn_3", "triton"
PROBE_SECONDS = 600  # ten times what a busy machine takes: what is not there by then never comes
KEPT = set("PATH HOME TMPDIR LANG LD_LIBRARY_PATH VIRTUAL_ENV SYSTEMROOT".split())  # noqa: SIM905
PROBED = dict(  # a model of every feature that takes milliseconds
    **dict(VOCAB_SIZE=32, NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, ROPE_DIMS=8),
    **dict(MLP_MULT=2, VE_LAYERS="1,2", VE_DIM=8, XSA_LAST_N=1),
    **dict(BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8, TRAIN_SEQ_LEN=16, TRAIN_BATCH_TOKENS=64),
    **dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=5, VAL_BATCH_SIZE=256, TTT_CHUNK_TOKENS=50),
    **dict(TTT_CHUNK_SIZE=7, TTT_BATCH_SIZE=4),
    **dict(COMPILE=0),
)


@lru_cache
def run_probe(source: str, settings: str) -> dict[str, list]:
    """{check: [passed, evidence]} of a script's source and settings (JSON), from `probe` in another
    process."""
    env = {key: value for key, value in os.environ.items() if key in KEPT}
    env |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as elsewhere:
        script = Path(elsewhere, "train_gpt.py")
        script.write_bytes(source.encode())
        command = [sys.executable, "-m", "record.probe", str(script)]
        talk = dict(input=settings, capture_output=True, timeout=PROBE_SECONDS)
        talk |= dict(encoding="utf-8", errors="backslashreplace")
        try:
            done = subprocess.run(command, cwd=elsewhere, env=env, **talk)
            return json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            problem = f"the script did not answer in {PROBE_SECONDS} s"
        except (IndexError, ValueError, RecursionError):  # the last line is no JSON
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            problem = f"the process died: {said[-1]}"
    return {name: [False, problem] for name in ("imports", *PROBES)}


class Hider:
    """An import hook: what is in HIDDEN is not installed."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


class OneRank:
    """Stands in for the script's Ranks: one process, on the CPU."""

    rank, world_size = 0, 1

    def __init__(self):
        import torch

        self.device = torch.device("cpu")

    def __getattr__(self, name: str):
        # sum_over_ranks, from_rank0, ...: one rank's is all
        return lambda *args: args[0] if args else None


def probe(script: Path, settings: dict[str, str]) -> dict[str, list]:
    """Import the script, run every probe on it."""
    sys.meta_path.insert(0, Hider())
    where = f"without {', '.join(HIDDEN)} and CUDA"
    try:
        module = load_script(script)
    except BaseException as error:  # a script may also exit while it is imported
        problem = f"train_gpt.py cannot be imported {where}: {type(error).__name__}: {error}"
        return {name: [False, problem] for name in ("imports", *PROBES)}
    found = dict(imports=[True, where])
    for name, function in PROBES.items():
        try:
            found[name] = [True, function(module, settings)]
        except RecordError as error:
            found[name] = [False, str(error)]
        except Exception as error:
            problem = f"the script's functions failed: {type(error).__name__}: {error}"
            found[name] = [False, problem]
    return found


def probe_parameters(module, settings: dict[str, str]) -> str:
    """How many parameters the logged settings make."""
    import torch

    with torch.device("meta"):
        model = module.GPT(module.Hyperparameters.from_env(settings))
    return str(sum(p.numel() for p in model.parameters()))


class Probed:
    """A small model with random weights that learns and is mixed as the logged settings say, on an
    invented stream."""

    def __init__(self, module, settings: dict[str, str]):
        import torch

        seed = int.from_bytes(os.urandom(4), "little")
        self.module, self.rng, self.seed = module, np.random.default_rng(seed), f"seed {seed}"
        asked = ("NGRAM_", "ALPHA_", "TTT_")
        kept = {key: value for key, value in settings.items() if key.startswith(asked)}
        # one epoch shows as much as many
        kept["TTT_EPOCHS"] = str(min(1, int(kept.get("TTT_EPOCHS", "0"))))
        small = {key: str(value) for key, value in PROBED.items()}
        self.hp = module.Hyperparameters.from_env(kept | small)
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.model = module.GPT(self.hp)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.2 * torch.randn_like(p))

    def require(self, holds, problem: str) -> None:
        require(holds, f"{problem} ({self.seed})")

    def stream(self, size: int) -> np.ndarray:
        """Random tokens in which pieces recur, so that counts matter."""
        pieces = self.rng.integers(1, self.hp.vocab_size, (12, 9))
        some = [pieces[i][: 3 + i % 7] for i in self.rng.integers(0, 12, size)]
        return np.concatenate(some)[:size].astype(np.uint16)

    def neural(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nll, entropy) in nats of the targets, by the script's score or, where the
        run learned, by its score_documents or score_and_learn."""
        module, stride = self.module, self.hp.eval_stride
        scorer = module.Scorer(self.model, module.block_passes(self.hp)[1])
        silent = module.RunLog()  # without a name it writes no file and prints nothing
        if self.hp.ttt_lora_rank:
            segments = module.score_documents(scorer, tokens, OneRank())
        elif self.hp.ttt_epochs:
            validation = module.Validation(
                tokens, lambda stream: np.ones(len(stream) - 1, np.uint16)
            )
            segments = module.score_and_learn(
                scorer, module.training_loss, validation, stride, OneRank(), silent
            )
        else:
            segments = module.score(scorer, tokens, stride, OneRank())
        nll, entropy = (np.concatenate(parts) for parts in list(zip(*segments))[:2])
        require(len(nll) == len(tokens) - 1, f"{len(nll)} scores for {len(tokens) - 1} targets")
        return nll, entropy

    def mixed(
        self, tokens: np.ndarray, nll: np.ndarray, entropy: np.ndarray, pieces=()
    ) -> np.ndarray:
        """nats after mixing; the scores arrive in one piece, or cut at `pieces`."""
        mixture = self.module.Mixture(tokens, self.hp)
        for end in (*pieces, len(nll)):
            mixture.extend(nll[:end], entropy[:end])
        return np.array(mixture.nll)

    def scores(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Neural nll, entropy, mixed nll."""
        nll, entropy = self.neural(tokens)
        return nll, entropy, self.mixed(tokens, nll, entropy)


def probe_causal(module, settings: dict[str, str]) -> str:
    """Changing the future changes no score of the past."""
    probed = Probed(module, settings)
    tokens, cuts = probed.stream(700), [1, 64, 65, 301, 640]
    scores, names = probed.scores(tokens), ("neural nll", "entropy", "mixed nll")
    for cut in cuts:
        other = tokens.copy()
        shift = probed.rng.integers(1, probed.hp.vocab_size, 700 - cut - 1)
        other[cut + 1 :] = (other[cut + 1 :] + shift) % probed.hp.vocab_size
        changed = probed.scores(other)
        # an entropy is fixed before its target is seen
        for name, before, after, exempt in zip(names, scores, changed, (0, 1, 0)):
            far = np.abs(before[: cut + exempt] - after[: cut + exempt])
            probed.require(
                far.max() < 1e-4,
                f"{name} of target {int(far.argmax())} changes by {far.max():.3g} nats when only "
                f"targets from {cut} on change: it looks ahead",
            )
        moved = np.abs(scores[2][cut:] - changed[2][cut:]).max()
        probed.require(moved >= 1e-3, "no score changes when the stream does")
    places = ", ".join(map(str, cuts))
    return f"targets before {places} keep their scores when later ones change ({probed.seed})"


def probe_sum(module, settings: dict[str, str]) -> str:
    """With each token of the vocabulary in one place, the probabilities of that place sum to 1."""
    probed, sums = Probed(module, settings), []
    tokens, at = probed.stream(300), [20, 150, 290]
    for target in at:
        # what comes later matters to no score: see probe_causal
        p, known = np.zeros(2), tokens[: target + 9].copy()
        for token in range(probed.hp.vocab_size):
            known[target + 1] = token
            nll, _, mixed = probed.scores(known)
            p += np.exp(-np.array([nll[target], mixed[target]], float))
        sums += p.tolist()
        for name, mass in zip(("the model's", "the mixture's"), p):
            probed.require(
                abs(mass - 1) < 1e-4,
                f"{name} probabilities of target {target} sum to {mass:.6f} over the vocabulary, "
                "expected 1",
            )
    places = ", ".join(map(str, at))
    return f"{min(sums):.7f} to {max(sums):.7f} at targets {places} ({probed.seed})"


class Bigram:
    """A model whose score of each target can be known: logits are a row of a table, chosen by the
    token before."""

    def __init__(self, hp, table):
        import torch

        self.hp, self.embed = hp, torch.nn.Embedding.from_pretrained(table)

    def hidden(self, ids, passes, last=0):
        return self.embed(ids[:, -last:])

    def scores(self, rows, targets):
        import torch

        logp = rows.log_softmax(-1)
        return torch.stack((-logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))


def probe_once(module, settings: dict[str, str]) -> str:
    """Windows score each target once, left to right; a mixture does not depend on the pieces scores
    come in."""
    import torch

    probed, trials = Probed(module, settings), 40
    table = torch.randn(probed.hp.vocab_size, probed.hp.vocab_size)
    for _ in range(trials):
        size, length = int(probed.rng.integers(2, 400)), int(probed.rng.integers(1, 100))
        stride, tokens = int(probed.rng.integers(1, length + 1)), probed.stream(size)
        hp = replace(probed.hp, eval_seq_len=length, eval_stride=stride, ttt_lora_rank=0)
        model = Bigram(hp, table)
        segments = module.score(module.Scorer(model, ()), tokens, stride, OneRank())
        nll = np.concatenate([segment[0] for segment in segments])
        known = -table.log_softmax(-1).numpy()[tokens[:-1].astype(int), tokens[1:].astype(int)]
        probed.require(
            len(nll) == len(known) and np.abs(nll - known).max() < 1e-4,
            f"{len(nll)} scores for {size - 1} targets, window {length}, stride {stride}: expected "
            "that of each target once, in order",
        )
    tokens = probed.stream(300)
    nll, entropy = probed.neural(tokens)
    whole, pieces = (probed.mixed(tokens, nll, entropy, at) for at in ((), (1, 100, 101, 250)))
    far = np.abs(whole - pieces).max()
    problem = f"the mixture changes by {far:.3g} nats with the pieces its scores come in"
    probed.require(far < 1e-9, problem)
    return (
        f"{trials} random streams, windows and strides; a mixture in pieces equals one at once "
        f"({probed.seed})"
    )


PROBES = dict(
    parameters=probe_parameters, causal=probe_causal, sums_to_one=probe_sum, one_pass=probe_once
)

if __name__ == "__main__":
    print(json.dumps(probe(Path(sys.argv[1]), json.load(sys.stdin)), allow_nan=False))
