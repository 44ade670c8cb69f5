"""The three predecessors' launch scripts, end to end at tiny sizes:
what each claims must show in what it did."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from edit_logs import with_settings
from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    finish,
    launched,
    start_python,
    tiny,
    torchrun,
    values,
)

import train_gpt as t
from record import tables
from record.log import RecordError
from studies import predecessors

# what a script itself sets is left to it
OWN = ("NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "XSA_LAST_N", "LATE_QAT_THRESHOLD", "EMA_DECAY")
SMALL = {k: v for k, v in TINY.items() if k not in OWN} | dict(
    NUM_HEADS=8,
    WARMDOWN_ITERS=10,
    SWA_EVERY=1,
    SWA_THRESHOLD=0.8,
    TTT_CHUNK_TOKENS=2048,
    EVAL_STRIDE=16,
    CHECKPOINT_EVERY=1000,
)


class Launched(NamedTuple):
    """What a launch script's run left, and the study that the script starts after it."""

    log: str
    state: dict[str, torch.Tensor]  # the artifact's
    checkpoint: dict[str, np.ndarray]
    replayed: dict  # the study's JSON


def launch(system: str, folder: Path, corpus) -> Launched:
    """The run and then the study that runs/<system>.sh starts."""
    (folder / "logs").mkdir()
    (folder / "logs/test.txt").touch()  # the log's name is taken: the run gives it a number
    done = finish(start_python(folder, *launched(system, folder, **SMALL, **corpus)))
    assert done.returncode == 0, done.stderr[-3000:]
    _, _, scores, *options = (folder / "study").read_text().split("\0")[:-1]
    predecessors.main([str(folder / scores), *options])
    stem = str(folder / scores).removesuffix("_scores.npz")
    with np.load(f"{stem}.ckpt", allow_pickle=False) as checkpoint:
        arrays = dict(checkpoint)
    artifact = next(folder.glob("logs/*.int*.ptz"))
    replayed = json.loads(Path(f"{stem}_predecessors.json").read_text())
    log = Path(f"{stem}.txt").read_text()
    _, state = t.decompress(artifact.read_bytes())
    return Launched(log, state, arrays, replayed)


@pytest.fixture(scope="module")
def logs(corpus, tmp_path_factory) -> dict[str, Launched]:
    systems = "backoff", "order_adaptive", "prefill"
    return {system: launch(system, tmp_path_factory.mktemp(system), corpus) for system in systems}


def packed_weights_are(state, arrays, expected) -> bool:
    """Are the artifact's matrices nearer to `expected`, by parameter, than to the last weights?"""
    names = [n for n in state if n.startswith("blocks") and n.endswith("weight")]
    error = {
        kind: sum(float((state[n] - torch.from_numpy(w[n])).square().sum()) for n in names)
        for kind, w in (("expected", expected), ("last", {n: arrays[f"model.{n}"] for n in names}))
    }
    return error["expected"] < 0.5 * error["last"]


def mean_of(arrays, name) -> dict[str, np.ndarray]:
    order = [k.removeprefix("model.") for k in arrays if k.startswith("model.")]
    return {n: arrays[f"{name}.{i + 1}"] for i, n in enumerate(order)}


@pytest.mark.parametrize("system", ["backoff", "order_adaptive", "prefill", "frontier", "sp8192"])
def test_without_a_gpu_a_launch_script_starts_two_ranks(system, tmp_path):
    arguments, _ = launched(system, tmp_path)
    assert arguments == [*torchrun(2), str(SCRIPT)]


def test_without_ranks_a_launch_script_starts_no_torchrun(tmp_path):
    arguments, _ = launched("frontier", tmp_path, NPROC=0)
    assert arguments == [str(SCRIPT)]


@pytest.mark.parametrize("system", ["backoff", "order_adaptive", "prefill"])
def test_the_log_has_the_valid_number(logs, system):
    log = logs[system].log
    exact = values(log, "final_ngram_exact")
    assert exact["alpha"] == dict(order_adaptive="order").get(system, "entropy")
    assert exact["counts"] == "exact"
    assert float(exact["val_bpb"]) > 0
    assert values(log, "ngram_audit")["mass_max"] == "1.000000000000"


@pytest.mark.parametrize("system, rule", dict(backoff=889, order_adaptive=825, prefill=806).items())
def test_the_study_says_what_the_pull_request_would_have_reported(logs, system, rule):
    """Of that very run, from its saved scores, by the rule that is its own."""
    replayed, log = logs[system].replayed, logs[system].log
    bits = 5 if system == "order_adaptive" else 6
    neural = float(values(log, f"final_int{bits}_sliding_window_exact")["val_bpb"])
    assert replayed["pull_request"] == rule
    assert replayed["neural_bpb"] == pytest.approx(neural, abs=1e-8)
    assert replayed["mass"] > 1.05


def test_backoff_packs_the_middle_of_ema_and_tight_swa(logs):
    log, state, arrays, _ = logs["backoff"]
    facts = values(log, "averaging:ema_swa")
    assert int(facts["ema_updates"]) == 12
    assert int(facts["swa_updates"]) >= 1
    ema, swa = mean_of(arrays, "ema"), mean_of(arrays, "swa")
    assert packed_weights_are(state, arrays, {n: (ema[n] + swa[n]) / 2 for n in ema})
    assert "late_qat:on" in log
    assert "bits:6 straight" in log


def test_order_adaptive_is_mha_with_xsa_everywhere_wide_and_int5(logs, corpus):
    log, state, *_ = logs["order_adaptive"]
    for setting in (
        "NUM_HEADS=8",
        "NUM_KV_HEADS=8",
        "XSA_LAST_N=4",
        "MLP_MULT=3.5",
        "QUANT_BITS=5",
        "TTT_EPOCHS=3",
    ):
        assert f"\n{setting}\n" in log
    assert state["blocks.0.attn.k.weight"].shape == (64, 64)  # as many key heads as query heads
    assert state["blocks.0.mlp.fc.weight"].shape == (224, 64)  # 3.5 x 64
    model = t.GPT(tiny(**{**SMALL, **corpus}, NUM_KV_HEADS=8, XSA_LAST_N=4, MLP_MULT=3.5))
    assert int(values(log, "averaging:")["parameters"]) == sum(
        p.numel() for p in model.parameters()
    )
    assert all(block.attn.xsa for block in model.blocks)
    assert float(values(log, "fit_artifact")["coarsen"]) == 1
    for name, w in state.items():
        if name.startswith("blocks") and name.endswith("weight"):
            distinct = [len(row.unique()) for row in w]
            assert max(distinct) <= 31  # codes -15 ... 15
    # and not of fewer bits
    assert max(len(row.unique()) for row in state["blocks.0.mlp.fc.weight"]) > 15
    assert "bits:5 soft" in log


def test_order_adaptive_learns_while_it_scores(logs):
    log = logs["order_adaptive"].log
    assert float(values(log, "ttt:score_first")["moved"]) > 0
    assert "\nttt:" not in logs["backoff"].log


def test_prefill_packs_swa_of_a_model_with_slope_09(logs):
    log, state, arrays, _ = logs["prefill"]
    assert int(values(log, "averaging:swa")["swa_updates"]) >= 1
    assert "\nLEAKY_SLOPE=0.9\n" in log
    assert packed_weights_are(state, arrays, mean_of(arrays, "swa"))
    losses = [
        values(logs[system].log, "step:12/12 train_loss")["train_loss"]
        for system in ("backoff", "prefill")
    ]
    assert losses[0] != losses[1]  # the slope changes what is learned


def test_each_script_names_its_source_and_takes_the_environment():
    for system, source, setting in (
        ("backoff", "#889", "NGRAM_ALPHA"),
        ("order_adaptive", "#825", "TTT_EPOCHS"),
        ("prefill", "#806", "WARMDOWN_ITERS"),
    ):
        text = (ROOT / f"runs/{system}.sh").read_text()
        assert source in text
        assert f"{setting}=${{{setting}:-" in text
        assert "Different here" in text


@pytest.mark.parametrize("hardness", [1.0, 4.0, 16.0])
def test_soft_rounding_goes_from_identity_to_round(rng, hardness):
    x = torch.randn(1000, dtype=torch.float64) * 3
    x.requires_grad_()
    y = t.soft_round(x, torch.tensor(hardness, dtype=torch.float64))
    low = torch.floor(x)
    expected = low + 0.5 + torch.tanh(hardness * (x - low - 0.5)) / (2 * math.tanh(hardness / 2))
    torch.testing.assert_close(y, expected)
    assert (torch.gradient(y.detach()[x.argsort()])[0] >= 0).all()  # monotone
    y.sum().backward()
    slope = (
        hardness
        * (1 - torch.tanh(hardness * (x.detach() - low - 0.5)) ** 2)
        / (2 * math.tanh(hardness / 2))
    )
    torch.testing.assert_close(x.grad, slope)  # not a straight-through 1
    error = (y - x.detach().round()).abs().mean()
    assert error < {1.0: 0.27, 4.0: 0.18, 16.0: 0.06}[hardness]


def test_soft_qat_trains_on_what_it_computes(corpus):
    """With QAT_ROUNDING=soft forward and gradients are those of the softly rounded weights."""
    hp = tiny(QAT_ROUNDING="soft", QUANT_BITS=5)
    torch.manual_seed(5)
    model, ids = t.GPT(hp), torch.randint(0, 512, (2, 33))
    _, passes = t.block_passes(hp)
    losses = {
        h: t.training_loss(
            model, ids[:, :-1], ids[:, 1:], passes, None if h is None else torch.tensor(h)
        ).item()
        for h in (None, 1.0, 200.0)
    }
    hard = {
        n: t.quantize_rows(p.detach(), largest)
        for n, p in model.named_parameters()
        if (largest := t.largest_code(n, p, hp))
    }
    for n, p in model.named_parameters():
        if n in hard:
            p.data = hard[n][0] * hard[n][1]
    hard_loss = model(ids[:, :-1], ids[:, 1:], passes).item()
    assert losses[200.0] == pytest.approx(hard_loss, abs=1e-3)
    assert abs(losses[1.0] - losses[None]) < abs(losses[200.0] - losses[None]) + 1e-4


def test_the_table_of_systems_is_that_of_the_logs(logs, tmp_path):
    page = tmp_path / "docs/predecessors.md"
    page.parent.mkdir()
    page.write_text("# x\n<!-- systems:begin -->\nold\n<!-- systems:end -->\nrest\n")
    paths = []
    for system in logs:
        paths.append(tmp_path / f"logs/systems/{system}_seed1337.txt")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        named = logs[system].log.replace("logs/test_2", f"logs/{system}_seed1337")
        paths[-1].write_text(named.replace('"run_id": "test_2"', f'"run_id": "{system}_seed1337"'))
        with_settings(paths[-1], RUN_ID=f"{system}_seed1337")
        replayed = paths[-1].with_name(f"{system}_seed1337_predecessors.json")
        replayed.write_text(json.dumps(logs[system].replayed))
    tables.systems(paths, tmp_path)
    written = page.read_text()
    assert "old" not in written
    assert written.endswith("rest\n")
    for system, (log, _, _, replayed) in logs.items():
        row = next(line for line in written.splitlines() if f"runs/{system}.sh" in line)
        for line in ("final_int", "final_ngram_exact"):
            assert f"{float(values(log, line)['val_bpb']):.4f}" in row
        assert f"*{replayed['pseudo_bpb']:.4f}* | {replayed['mass']:.1f}" in row
        assert (
            f"{int(log.split('Total submission size')[-1].split(': ')[1].split(' ')[0]):,}" in row
        )
    (tmp_path / "logs/odd.txt").write_text("")
    with pytest.raises(RecordError, match="odd.txt: its name says no system"):
        tables.systems([tmp_path / "logs/odd.txt"], tmp_path)
    assert page.read_text() == written
