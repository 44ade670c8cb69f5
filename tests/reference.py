"""A second, slow reading of the n-gram mixture: one token at a time, dictionaries only.

It predicts the whole vocabulary before it sees the token, then learns the token, and nothing else:
so it is what a decoder runs. The tests compare the sorted, vectorised production code with it."""

import math
from collections import Counter, defaultdict

import numpy as np

import train_gpt as t


class Predictor:
    """p(v) for all v at the next position, from a model's distribution and what was seen so far."""

    def __init__(self, first_token: int, total: int, hp: t.Hyperparameters):
        self.hp, self.stream, self.edges = hp, [first_token], set(t.block_edges(total))
        orders = range(2, hp.ngram_order + 1)
        # context -> [(position, token), ...]
        self.followed = {n: defaultdict(list) for n in orders}
        self.counts = {n: defaultdict(Counter) for n in orders}  # context -> token -> how often
        shape = (3, t.NGRAM_STATES, t.GAPS, t.ENTROPY_BUCKETS)
        self.credits = {n: np.zeros(shape) for n in orders}
        self.fresh = {n: np.zeros(shape) for n in orders}
        self.weights = {n: t.bucket_weights(self.credits[n]) for n in orders}
        self.log_odds = 0.0  # of the mixture against the model

    def context(self, n):
        return tuple(self.stream[len(self.stream) - n + 1 :]) if len(self.stream) >= n - 1 else None

    def bucket(self, n, past, entropy):
        """What DESIGN calls features: of the context's past and the model's entropy,
        never of the target."""
        size = min(len(past).bit_length() - 1, 7)
        distinct = len(self.counts[n][self.context(n)])
        share = min(4 * (len(past) - distinct) // len(past), 3)
        repeated = len(past) > 1 and past[-1][1] == past[-2][1]
        position = len(self.stream)
        begun = max((i for i, token in enumerate(self.stream) if token == t.BOS), default=0)
        here = position - past[-1][0] <= min(position - 1 - begun, 65535)
        gap = min(((position - past[-1][0]).bit_length() - 1) // 2, t.GAPS - 1)
        state = ((size * 4 + share) * 2 + repeated) * 2 + here
        whole_nats = int(min(max(entropy, 0), t.ENTROPY_BUCKETS - 1))
        return (state * t.GAPS + gap) * t.ENTROPY_BUCKETS + whole_nats

    def predict(self, model: np.ndarray, entropy: float) -> np.ndarray:
        """The mixed distribution over the vocabulary, given the model's."""
        self.model, self.levels = model, []
        if self.hp.ngram_alpha != "online":
            return self.predict_backoff(model, entropy)
        p = model
        for n in range(2, self.hp.ngram_order + 1):
            past = self.followed[n][self.context(n)] if self.context(n) is not None else []
            if past and n >= self.hp.ngram_min_order:
                bucket = self.bucket(n, past, entropy)
                counted, last = np.zeros_like(p), np.zeros_like(p)
                for v, c in self.counts[n][self.context(n)].items():
                    counted[v] = c / len(past)
                last[past[-1][1]] = 1
                parts = [w * q for w, q in zip(self.weights[n][:, bucket], (p, counted, last))]
                p = sum(parts)
                self.levels.append((n, bucket, parts, p))
        self.top, trust = p, 1 / (1 + math.exp(-min(max(self.log_odds, -500), 500)))
        return trust * p + (1 - trust) * model

    def predict_backoff(self, model, entropy):
        self.top = model
        for n in range(self.hp.ngram_order, self.hp.ngram_min_order - 1, -1):
            past = self.followed[n][self.context(n)] if self.context(n) is not None else []
            if len(past) >= self.hp.ngram_min_count:
                alpha = self.backoff_weight(entropy, n)
                counted = np.zeros_like(model)
                for v, c in self.counts[n][self.context(n)].items():
                    counted[v] = c / len(past)
                return (1 - alpha) * model + alpha * counted
        return model

    def backoff_weight(self, entropy, n):
        """From ALPHA_MIN to ALPHA_MAX, half-way at 4 nats or at the order's own entropy."""
        of_order = t.ORDER_CENTERS[min(n, 7) - 2]
        center = dict(entropy=4.0, order=of_order)[self.hp.ngram_alpha]
        rising = 1 / (1 + math.exp(-2 * (entropy - center)))
        return self.hp.alpha_min + (self.hp.alpha_max - self.hp.alpha_min) * rising

    def learn(self, token: int) -> None:
        """Only now the token is seen."""
        for n, bucket, parts, p in self.levels:
            for expert in range(3):
                self.fresh[n].reshape(3, -1)[expert, bucket] += parts[expert][token] / p[token]
        if self.hp.ngram_alpha == "online":
            self.log_odds += math.log(self.top[token] / self.model[token])
        for n in range(2, self.hp.ngram_order + 1):
            if self.context(n) is not None:
                self.followed[n][self.context(n)].append((len(self.stream), token))
                self.counts[n][self.context(n)][token] += 1
        self.stream.append(token)
        if len(self.stream) - 1 in self.edges:
            for n in self.credits:
                self.credits[n] += self.fresh[n]
                self.fresh[n][:] = 0
                self.weights[n] = t.bucket_weights(self.credits[n])
