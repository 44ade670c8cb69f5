"""studies/: the ideas that the script does without are what they claim to be."""

import numpy as np
import pytest
from helpers import stream_of, target_scores, tiny

import train_gpt as t
from studies import judges, mixture, tilt, ttt

# --- the tilt of one guessed token ---


@pytest.mark.parametrize("kind", ["noisy_copies", "one_token", "documents", "random"])
def test_the_guess_is_what_followed_the_longest_match_most_recently(rng, kind):
    tokens = stream_of(kind, rng, 300)
    length, guess = tilt.guesses(tokens)
    for target in range(len(tokens) - 1):
        best = (0, 0)
        for before in range(target):  # the place of an earlier token, whose follower is known
            match = 0
            while match <= before and match < tilt.LONGEST:
                if tokens[before - match] != tokens[target - match]:
                    break
                match += 1
            best = max(best, (match, before))
        assert length[target] == best[0]
        assert guess[target] == (tokens[best[1] + 1] if best[0] else 0)


def test_tilted_probabilities_sum_to_one(rng):
    """The target may be any token: the guess, or another one."""
    V, N = 5, 400
    model_NV = rng.dirichlet(np.ones(V), N)
    guess, length = rng.integers(0, V, N), rng.integers(0, 14, N)
    p_guess = model_NV[np.arange(N), guess]
    learned = tilt.Tilt()
    target = rng.integers(0, V, N)
    learned.apply(model_NV[np.arange(N), target], p_guess, length, target == guess)
    total = np.zeros(N)
    for v in range(V):
        one = tilt.Tilt()
        one.credits = learned.credits.copy()
        total += one.apply(model_NV[:, v], p_guess, length, (guess == v) & (length > 0))
    np.testing.assert_allclose(total, np.ones(N), atol=1e-9)


def test_a_guess_that_often_comes_true_gains(rng):
    tokens = stream_of("noisy_copies", rng, 4000)
    length, guess = tilt.guesses(tokens)
    nll = np.full(len(tokens) - 1, np.log(300.0))
    is_true = (guess == tokens[1:]) & (length > 0)
    found = tilt.tilted_nll(nll, np.full(len(nll), 1 / 300), length, is_true)
    assert found[2000:].mean() < 0.6 * nll.mean()


# --- learning during evaluation ---


def test_the_first_documents_are_cut_out_whole(rng):
    tokens = np.array([1, 5, 6, 1, 7, 1, 8, 9, 9, 9, 1, 4, 4], np.uint16)
    count, stream = ttt.first_documents(tokens, 5, longest=3)
    assert count == 2
    assert stream.tolist() == [1, 5, 6, 1, 7, 1]


# --- mixing rules that are not in the script ---


@pytest.mark.parametrize("name", mixture.ADDED)
def test_each_idea_is_a_valid_code(rng, name):
    tokens = stream_of("documents", rng, 3000)
    _, nll, entropy = target_scores(tokens, rng, 300)
    mixed = mixture.mixed(tokens, nll, entropy, tiny(NGRAM_ALPHA="online"), mixture.ADDED[name])
    assert "recounted" in mixed.audit()  # sums to 1, recounted, or it raises
    assert not np.array_equal(mixed.nll, t.mix(tokens, nll, entropy, tiny()))


def test_a_prior_of_the_usual_strength_is_the_rule_itself(rng):
    tokens = stream_of("documents", rng, 2000)
    _, nll, entropy = target_scores(tokens, rng, 300)
    hp = tiny(NGRAM_ALPHA="online")
    same = mixture.with_strength(t.PRIOR_STRENGTH)
    found = mixture.mixed(tokens, nll, entropy, hp, same).nll
    np.testing.assert_allclose(found, t.mix(tokens, nll, entropy, hp), atol=1e-9)


def test_the_table_of_judges_has_a_column_per_model(rng, tmp_path, capsys, monkeypatch):
    tokens = stream_of("documents", rng, 1500)
    paths = []
    for name in ("weak", "strong_scores"):
        _, nll, entropy = target_scores(tokens, rng, 300)
        path = tmp_path / f"{name}.npz"
        nll, entropy = nll.astype(np.float32), np.float32(entropy)
        np.savez(path, tokens=tokens, nll=nll, entropy=entropy, bytes=np.full(1499, 2, np.uint8))
        paths.append(str(path))
    monkeypatch.setattr("sys.argv", ["judges", *paths])
    judges.main()
    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if line.startswith("| gain")]
    assert len(heads) == 2 and all("| weak: " in h and "| strong: " in h for h in heads)
    row = next(line for line in said.splitlines() if line.startswith("| online |"))
    assert len(row.split("|")) == 5
