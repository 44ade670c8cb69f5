"""bench/, studies/ and tools/ run: small sizes, no timing, the printed rows are there."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SECTIONS, finish, start_python, tiny, write_shard

import train_gpt as t
from tools import common


def run(module: str, *options):
    """`python -m module` with these options."""
    return finish(start_python(ROOT, ["-m", module, *map(str, options)], {}))


@pytest.mark.slow  # some processes that import torch
def test_bench_ngram(tmp_path, rng):
    shard = write_shard(tmp_path / "s.bin", np.minimum(rng.zipf(1.3, 30_000), 1000))
    done = run("bench.ngram", "--tokens", 20_000, "--repeat", 1, shard)
    assert done.returncode == 0, done.stderr
    for row in (
        "exact counts + backoff",
        "online mixture",
        "dictionary cache",
        "np.add.at hash cache",
        "ratio",
    ):
        assert row in done.stdout
    assert "DIFFERS" not in done.stdout


def test_the_mixture_study(tmp_path, rng):
    tokens = np.minimum(rng.zipf(1.3, 3000), 1000)
    shard, scores = write_shard(tmp_path / "s.bin", tokens), tmp_path / "scores.npz"
    nll = rng.exponential(3, 2000).astype(np.float32)
    np.savez(scores, nll=nll, entropy=nll)
    done = run("studies.mixture", scores, shard, "--orders", 3)
    assert done.returncode == 0, done.stderr
    for row in (
        "neural model alone",
        "α by order",
        "online, orders 2-3",
        "mass_min:1.000000000000",
    ):
        assert row in done.stdout
    assert run("studies.mixture", tmp_path / "absent.npz", shard).returncode != 0


@pytest.mark.slow
def test_bench_memory():
    """Started anew: what a fork shares would not be counted as its memory."""
    command = ["-m", "bench.memory", "--tokens", "5000", "--ranks", "2"]
    done = finish(start_python(ROOT, command, {}, forked=False))
    assert done.returncode == 0, done.stderr
    tokens, _, total, first, other, _ = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert tokens == "5,000"
    assert 50 < float(other.split()[0]) < float(first.split()[0].replace(",", ""))
    assert float(total.split()[0].replace(",", "")) > 100


def test_the_averaging_study_scores_every_average(corpus):
    from studies.averaging import one_run

    assert common.demo_settings().model_dim == 128
    assert common.demo_settings(SEED=5).seed == 5
    hp = tiny(**corpus, AVERAGING="ema_swa", SWA_EVERY=1, SWA_THRESHOLD=1, TRAIN_LOG_EVERY=0)
    tokens = np.array(t.load_validation(hp).tokens[:400])
    results = one_run(hp, t.Validation(tokens, t.ByteCounter(hp)))
    assert set(results) == {"none", "ema", "swa", "ema_swa"}
    assert len(set(results.values())) == 4
    assert all(1 < b < 12 for pair in results.values() for b in pair)


def test_bench_artifact_compares_the_coders(capsys):
    from bench.artifact import compare

    torch.manual_seed(3)
    compare(t.GPT(tiny()).state_dict(), tiny())
    out = capsys.readouterr().out
    assert "this container, all of it" in out
    assert "lzma -9e" in out
    assert "Z_HUFFMAN_ONLY" in out


def test_bench_step_counts_what_a_step_computes():
    """Products: 2 FLOPs per weight and token forwards, twice that backwards;
    attention: half of T x T, two products."""
    hp = tiny(MICRO_BATCH_TOKENS=256)
    found, tokens = common.count_step(hp), hp.train_batch_tokens
    # embed: as head
    used = [
        p.numel()
        for name, p in t.GPT(hp).named_parameters()
        if name.endswith(".weight") and p.ndim == 2 and not name.endswith("table.weight")
    ]
    assert found["forward", "products"][0] == 2 * sum(used) * tokens
    assert found["backward", "products"][0] == 4 * sum(used) * tokens
    assert (
        found["forward", "attention"][0]
        == 2 * hp.num_layers * hp.model_dim * hp.train_seq_len * tokens
    )
    off = common.count_step(tiny(MICRO_BATCH_TOKENS=256, FUSED_MLP=0))
    # leaky_relu, then square: bfloat16 in and out
    mlp = hp.num_layers * tokens * int(hp.mlp_mult * hp.model_dim)
    assert off["forward", "elementwise"][1] - found["forward", "elementwise"][1] >= 2 * 2 * 2 * mlp
    assert all(
        off[phase, "products"][0] == found[phase, "products"][0]
        for phase in ("forward", "backward")
    )
    adamw = sum(
        p.numel() for name, p in t.GPT(hp).named_parameters() if name.endswith("table.weight")
    )
    assert found["optimizer", "elementwise"][1] > 7 * 4 * adamw
    assert found["optimizer", "products"][0] > 0
    again = common.count_step(tiny(MICRO_BATCH_TOKENS=512))  # the same step in fewer passes
    assert again["forward", "products"][0] == found["forward", "products"][0]


@pytest.mark.slow  # the compiler's own schedule
def test_bench_fusion_sees_what_the_kernels_save():
    """Of the plain form the compiler writes and reads again what the kernels keep in registers."""
    from bench.fusion import VARIANTS, schedule

    hp, moved = tiny(NUM_LAYERS=1, VE_ENABLED=0, XSA_LAST_N=0), {}
    for name in ("plain", "MLP kernels"):
        graphs = schedule(dataclasses.replace(hp, **VARIANTS[name]))
        moved[name] = sum(size for graph in graphs for _, size, _ in graph)
        ops = " ".join(operations for graph in graphs for _, _, operations in graph)
        assert len(graphs) == 2
        assert ("fused_mlp_backward" in ops) == (name == "MLP kernels")
    tokens, W = hp.train_batch_tokens, int(hp.mlp_mult * hp.model_dim)
    assert moved["plain"] - moved["MLP kernels"] > tokens * 2 * 3 * W
    # put back
    assert t.working_dtype(torch.zeros(1)) == torch.float32
    assert not t.has_kernels(torch.zeros(1))


def test_bench_step_measures_on_a_cpu(capsys):
    from bench.step import measure, print_count

    hp = tiny(COMPILE=0)
    measure(hp, 1, 2, print_count(hp))
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("as it is")).split()
    assert float(row[3]) > 0
    assert row[-1] == "1.00"
    assert "aten::mm" in out
    assert "floor ms" in out


def test_bench_step_measures_only_what_is_asked_for(capsys):
    from bench.step import measure, print_count

    hp = tiny(COMPILE=0)
    measure(hp, 1, 1, print_count(hp), ["as it is", "FlashAttention 4"])
    out = capsys.readouterr().out
    assert "FlashAttention 4: not possible here" in out
    assert out.splitlines()[-1].startswith("as it is")
    with pytest.raises(SystemExit, match="none of as it is, plain, compiled"):
        measure(hp, 1, 1, 1.0, ["as is"])


def test_bench_step_gives_inductor_its_option(monkeypatch):
    """A graph of its own, where this torch has the option."""
    from bench.step import NO_MIX_ORDER, inductor_config, variants

    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    found = variants(tiny(COMPILE=1))
    expected = ["as it is", "not compiled"]
    has_option = hasattr(inductor_config.triton, "mix_order_reduction")
    assert list(found) == expected + [NO_MIX_ORDER] * has_option
    given = [options["options"] for options in asked if "options" in options]
    assert given == [{"triton.mix_order_reduction": False}] * has_option


def test_bench_loader_reads_both_orders(corpus):
    from bench.loader import in_lanes, measure, permuted

    hp = tiny(**corpus)
    loader = t.TokenLoader(hp, 0, 1)
    (ids, targets), *_ = in_lanes(loader, 3)
    T, sequences = hp.train_seq_len, loader.sequences
    for i in range(loader.rows):
        span = loader.span(i * loader.num_tokens // sequences + 3 * T, T + 1)
        np.testing.assert_array_equal(ids[i], span[:-1])
        np.testing.assert_array_equal(targets[i], span[1:])
    assert len(permuted(loader, 3)) == len(in_lanes(loader, 3)) == loader.accumulation
    assert [len(each) for each in measure(loader, 2).values()] == [2, 2]


def test_bench_loader_prints_a_ratio_and_what_an_epoch_takes():
    done = run(
        *("bench.loader", "--shards", 2, "--tokens", 5000),
        *("--rounds", 2, "--epoch", 100_000),
    )
    assert done.returncode == 0, done.stderr
    assert "windows in a random permutation" in done.stdout
    assert re.search(r"^ratio in a round +\d", done.stdout, re.M)
    assert "an epoch of 48 windows" in done.stdout


def test_bench_step_compares_gradients_and_tiles(capsys, monkeypatch):
    """What it does on a GPU, on a CPU: the model without kernels,
    the MLP's kernel by a stand-in."""
    from bench import step

    hp, tiles = tiny(NUM_LAYERS=1, VE_ENABLED=0, XSA_LAST_N=0), []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    step.check_gradients(hp, torch.device("cpu"))
    out = capsys.readouterr().out
    assert float(re.search(r"largest (\S+)", out)[1]) < 1e-4
    assert "torch.float32 against float32" in out
    monkeypatch.setattr(t, "launch_mlp", lambda *args: tiles.append(t.MLP_TILE))
    step.time_tiles(hp, torch.device("cpu"))
    rows = capsys.readouterr().out.splitlines()[2:]
    assert "compiled plain form" in rows[0]
    assert len(rows) == 1 + len(step.TILES)
    in_use = "{BM}x{BN}x{BK} warps {num_warps} stages {num_stages}".format(**t.MLP_TILE)
    assert [row.split("  ")[0] for row in rows if "the one in use" in row] == [in_use]
    assert all(tile in tiles for tile in step.TILES)


def test_bench_scoring_scores_every_stride(corpus, tmp_path, capsys):
    from bench.scoring import measure

    hp, path = tiny(**corpus), tmp_path / "m.ptz"
    path.write_bytes(t.pack(t.GPT(hp).state_dict(), hp).blob)
    measure(hp, path, [8, 32], 400, 1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "as it is" in line]
    windows = [len(t.windows(0, 400, 32, stride)[0]) for stride in (8, 32)]
    assert [int(row[4]) for row in rows] == windows
    assert all(1 < float(row[8]) < 12 for row in rows)
    assert float(rows[1][9]) == pytest.approx(float(rows[1][8]) - float(rows[0][8]), abs=1.1e-4)


def test_the_variants_of_bench_scoring_score_the_same(rng, monkeypatch):
    from bench.scoring import variants

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    hp, tokens = tiny(), rng.integers(0, 300, 100).astype(np.uint16)
    model = t.GPT(hp)
    found = {
        name: common.score(head, tokens, 8, trunk)
        for name, (trunk, head) in variants(model, hp, on_gpu=True).items()
    }
    assert list(found)[:2] == ["as it is", "plain"]
    assert len(found) == 5
    for nll in found.values():
        np.testing.assert_allclose(nll, found["plain"], rtol=1e-5, atol=1e-5)


def factor_of(columns: int):
    """Of damped moments, as the script's: those of a random mixture may be singular in float32."""
    x = torch.randn(4 * columns, columns) @ torch.randn(columns, columns)
    curvature = t.Curvature(x.T @ x / len(x), torch.ones(1))
    return curvature.factors[1]


def test_the_roundings_study_of_one_path_is_gptq(rng):
    from studies.roundings import Machine, search

    w_CR, delta_R, factor_CC = torch.randn(150, 20), torch.rand(20) + 0.1, factor_of(150)
    found = search(w_CR, delta_R, torch.ones(20), factor_CC, Machine(1))
    assert torch.equal(found, t.round_in_turn(w_CR, delta_R, factor_CC))


@pytest.mark.parametrize("states", [4, 8, 16])
def test_the_roundings_study_s_trellis_decodes_to_a_dB_less(rng, states):
    """Of a fine step: 0.9 dB at least of the 1.53 dB that there are (Ungerboeck 1982)."""
    from studies.roundings import Machine, search

    machine = Machine(states)
    w_CR = 6 * torch.randn(300, 50)
    codes_CR = search(w_CR, torch.ones(50), torch.ones(50), torch.eye(300), machine)
    grids_CR = machine.grids(codes_CR.T, torch.zeros(300)).T
    error = float((codes_CR + grids_CR / 2 - w_CR).square().mean())
    assert 0.703 / 12 < error < 10**-0.09 / 12


def test_the_roundings_study_prints_its_rows(corpus, capsys):
    from studies.quantizers import Judge
    from studies.roundings import Study

    model = common.new_model(tiny(**corpus))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    study = Study(Judge(model, common.curvature_of(model), 500), r"blocks\.3\.mlp", 4, None)
    rows = ["gptq", "sdclip-grid", "beam2:0.06", "trellis4-columns"]
    for row in rows:
        study.print_row(row)
    lines = capsys.readouterr().out.splitlines()[-len(rows) :]
    assert [line.split()[2] for line in lines] == rows


@pytest.mark.parametrize("features", [1, 3, 11, 13])
def test_any_two_features_are_on_together_in_a_quarter_of_the_runs(features):
    from studies.recipe import halves

    on = np.array(halves(features), int)
    together = on.T @ on
    expected = len(on) / 4 * (np.ones((features, features)) + np.eye(features))
    np.testing.assert_array_equal(together, expected)


@pytest.fixture
def recipe_study(monkeypatch):
    """studies.recipe, in which a run trains nothing: each feature that is off costs its place in
    the list, in hundredths of a bit, and a seed a tenth. And the runs that were trained."""
    from studies import recipe

    trained = []

    def train(hp):
        trained.append(hp)
        usual, hundredths = t.Hyperparameters().as_env(), 0
        for place, names in enumerate(recipe.FEATURES.values()):
            off = all(hp.as_env()[name] == usual[name] for name in names.split()[:1])
            hundredths += place * off
        return 2 + hundredths / 100 + hp.seed / 10

    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(recipe, "mean_flops", lambda hp: 1e9)
    monkeypatch.setattr(common, "make_demo_corpus", lambda: None)
    monkeypatch.delenv("DATA_PATH", raising=False)

    def start(*options):
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--steps", "8", *options])
        recipe.main()

    return start, trained


FEW = ("--seeds", "1", "2", "--base", "network", "--only", "skip gates", "MLP 4 wide")


@pytest.mark.parametrize("design", [(), ("--halves",)])
def test_the_recipe_study_finds_what_each_feature_gives(recipe_study, capsys, design):
    start, _ = recipe_study
    start(*FEW, *design)
    out = capsys.readouterr().out
    assert re.findall(r"(skip gates|MLP 4 wide) \|.* (\S+) ± 0.0000", out) == [
        ("skip gates", "+0.0200"),
        ("MLP 4 wide", "+0.0800"),
    ]


def test_the_recipe_study_repeats_no_run_that_a_file_has(recipe_study, tmp_path, capsys):
    start, trained = recipe_study
    options = *FEW, "--append", str(tmp_path / "runs.jsonl")
    start(*options)
    first, count = capsys.readouterr().out, len(trained)
    start(*options)
    assert (capsys.readouterr().out, len(trained)) == (first, count)


@pytest.mark.parametrize("characters", [1, 9])
def test_the_recipe_study_repeats_once_a_run_whose_line_was_cut(recipe_study, tmp_path, characters):
    start, trained = recipe_study
    file = tmp_path / "runs.jsonl"
    options = *FEW, "--append", str(file)
    start(*options)
    file.write_text(file.read_text()[:-characters])
    count = len(trained)
    start(*options)
    start(*options)
    assert len(trained) == count + 1


CHANGES_OTHERS = """
class Box:
    def fill(self, other, name):
        self.size = 1
        self.inner.size, (other.size, rest) = 2, (3, 4)
        setattr(other, "size", 5)
        return name.endswith(".weight") or "mlp" in name or name in ("a", "b")

def f(trainer):
    "Has a docstring."
    with open("x") as trainer.file:
        pass
"""


def test_the_measures_of_a_script_count_what_they_name():
    from tools.measure_script import measure

    found = {row.label: [text for _, text in row.found] for row in measure(CHANGES_OTHERS)}
    assert found["attributes set from outside a class"] == [
        "other.size",
        "self.inner.size",
        "setattr(other, 'size', 5)",
        "trainer.file",
    ]
    assert found["functions that take `trainer`"] == ["f"]
    assert len(found["tests of a parameter's name by a part of it"]) == 2
    assert found["public functions and classes without docstring"] == ["Box"]
    assert found["public methods without docstring"] == ["Box.fill"]


def test_logs_are_compared_without_times_and_without_settings_of_the_base_alone():
    from tools.same_numbers import log_values

    log = (
        "=" * 100
        + """
SEED=1
NGRAM_COUNTS=hashed
step:1/2 train_loss:3.5 train_time:70ms
gptq_curvature tokens:16 seconds:7.0 matrices:3
final_ngram_hashed pseudo_bpb:0.5
result {"seed": 1, "train_seconds": 70.0, "code_bytes": 9}
"""
    )
    assert log_values(log) == {
        "setting SEED": "1",
        "step:1/2 train_loss": "3.5",
        "gptq_curvature tokens": "16",
        "gptq_curvature matrices": "3",
        "result seed": "1",
    }


def test_every_mutation_fits_the_script():
    done = run("tools.mutations", "--check")
    assert done.returncode == 0, done.stdout


def test_each_test_file_belongs_to_a_section():
    names = {name for names in SECTIONS.values() for name in names.split()}
    assert names == {path.stem[5:] for path in (ROOT / "tests").glob("test_*.py")}


def test_an_unknown_section_is_refused_in_one_line_with_those_that_there_are():
    done = run("pytest", "tests", "--section=mixtures", "--collect-only")
    assert done.returncode == 4
    assert "ERROR: T=mixtures: expected one of settings, runtime, " in done.stderr


PROGRAMS = [
    f"{path.parent.name}.{path.stem}"
    for folder in ("bench", "studies", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.stem not in ("__init__", "common", "streams")
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_says_how_it_is_used(program):
    done = run(program, "--help")
    assert done.returncode == 0
    assert f"usage: python -m {program} " in done.stdout


# ---- sizes of models


@pytest.fixture
def sizes_study(monkeypatch, tmp_path):
    """studies.sizes, in which a run trains nothing: wider models are better and take more bits; a
    file of fewer than 3 bits per weight doesn't hold them. And a file of its runs."""
    from studies import sizes

    def packed_scores(hp, budgets):
        weights = sizes.parameters(sizes.Size(hp.model_dim, hp.mlp_mult))
        bpb = 2 - hp.model_dim / 1000 + hp.seed / 10
        packed = {str(b): bpb + 4.0 ** -(8 * b / weights) for b in budgets if 8 * b > 3 * weights}
        return {"float": bpb} | packed

    monkeypatch.setattr(sizes, "packed_scores", packed_scores)
    monkeypatch.setattr(sizes, "mean_flops", lambda hp: hp.model_dim**2)
    monkeypatch.setattr(common, "make_demo_corpus", lambda: None)
    monkeypatch.delenv("DATA_PATH", raising=False)
    runs = tmp_path / "runs"

    def start(*options):
        always = ["--sizes", "128x3", "256x3", "--seeds", "1", "2", "--bits", "6", "4"]
        monkeypatch.setattr(sys, "argv", ["sizes.py", *always, "--append", str(runs), *options])
        sizes.main()

    return start, runs


def test_the_study_of_sizes_compares_files_of_equal_bytes(sizes_study, capsys, tmp_path):
    start, _ = sizes_study
    start("--plot", str(tmp_path / "sizes.png"))
    first, second = (row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:])
    assert first[3:] == ["2.0220", "**2.0222**", "**2.0259** |"]
    assert second[3:] == ["1.8940 ± 0.0000", "does not fit", "does not fit |"]
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_a_larger_model_takes_fewer_steps_at_equal_flops(sizes_study, capsys):
    start, _ = sizes_study
    start("--equal", "flops")
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == ["200", "50"]


def test_how_fast_rounding_costs_more_is_read_from_the_runs(sizes_study):
    from studies import sizes

    start, runs = sizes_study
    start("--bits", "5.5", "5", "4", "3.5")
    assert sizes.rounding_growth(runs) == pytest.approx(4)


def test_without_a_cost_of_rounding_there_is_no_prediction(sizes_study):
    from studies import sizes

    start, runs = sizes_study
    start("--sizes", "128x3", "--bits", "12", "11")
    with pytest.raises(ValueError, match="no run in which rounding costs 0.0005 bpb"):
        sizes.rounding_growth(runs)


def test_the_predicted_best_size_is_compared_with_the_preset(sizes_study, capsys, monkeypatch):
    from studies import best_size, recipe

    start, runs = sizes_study
    start("--bits", "5", "4")
    capsys.readouterr()
    monkeypatch.setattr(recipe, "mean_flops", lambda hp: hp.mlp_mult)
    command = ["best_size.py", str(runs), "--sizes", "512x4", "512x8"]
    monkeypatch.setattr(sys, "argv", command)
    best_size.main()
    preset, wider = (row.split(" | ") for row in capsys.readouterr().out.splitlines()[4:])
    assert [float(x.strip(" |")) for x in preset[4:]] == [0, 0, 0, 0]
    capacity, steps, rounding, whole = (float(x.strip(" |")) for x in wider[4:])
    assert wider[2] == "2,750"
    assert capacity < 0 < min(steps, rounding)
    assert whole == pytest.approx(capacity + steps + rounding, abs=2e-4)
