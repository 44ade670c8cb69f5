"""A second, slow reading of the n-gram mixture: one token at a time, dictionaries only.

It predicts the whole vocabulary before it sees the token, then learns the token, and nothing else:
so it is what a decoder runs. The tests compare the sorted, vectorised production code with it."""

import math
from collections import Counter, defaultdict

import numpy as np

import train_gpt as t

CENTERS = (4.5, 4.2, 3.8, 3.5, 3.2, 3.0)  # PR #825: nats, for n = 2 ... 7


class Predictor:
    """p(v) for all v at the next position, from a model's distribution and what was seen so far."""

    def __init__(self, first_token: int, total: int, hp: t.Hyperparameters):
        self.hp, self.stream, self.edges = hp, [first_token], set(t.block_edges(total))
        lengths = range(2, hp.ngram_order + 1)
        # context -> [(position, token), ...]
        self.followed = {n: defaultdict(list) for n in lengths}
        self.counts = {n: defaultdict(Counter) for n in lengths}  # context -> token -> how often
        # The same of the open document, emptied by each BOS, and what its tokens cost, cubed.
        self.doc_counts = {n: defaultdict(Counter) for n in lengths}
        self.surprise = Counter()
        shapes = {1: (2, t.BUCKETS[0])} | dict.fromkeys(lengths, (3, *t.BUCKETS))
        self.credits = {n: np.zeros(shape) for n, shape in shapes.items()}
        self.fresh = {n: np.zeros(shape) for n, shape in shapes.items()}
        self.mix_weights = {n: t.bucket_weights(self.credits[n]) for n in shapes}
        self.log_odds = 0.0  # of the mixture against the model

    def context(self, n):
        return tuple(self.stream[len(self.stream) - n + 1 :]) if len(self.stream) >= n - 1 else None

    def bucket(self, n, past, entropy):
        """The bucket whose mixing weights are used: a function of the context's past and of the
        model's entropy, never of the target."""
        frequency = min(len(past).bit_length() - 1, 7)
        distinct = len(self.counts[n][self.context(n)])
        share_known = min(4 * (len(past) - distinct) // len(past), 3)
        gap = len(self.stream) - past[-1][0]
        distance = sum(gap >= tokens for tokens in (512, 2048))
        here = self.doc_counts[n][self.context(n)].total()
        in_document = 0 if here == 0 else 1 if here == 1 else 2 if here < 4 else 3
        whole_nats = int(min(max(entropy, 0), 5))
        state = (distance * 4 + share_known) * 8 + frequency
        return (whole_nats * 4 + in_document) * 96 + state

    def predict(self, model: np.ndarray, entropy: float) -> np.ndarray:
        """The mixed distribution over the vocabulary, given the model's."""
        self.model, self.links = model, []
        if self.hp.ngram_alpha != "online":
            return self.predict_backoff(model, entropy)
        p = model
        if self.surprise.total():
            p = self.link(1, int(min(max(entropy, 0), 5)), p, [self.quotient(self.surprise)])
        for n in range(2, self.hp.ngram_order + 1):
            past = self.followed[n][self.context(n)] if self.context(n) is not None else []
            if past and n >= self.hp.ngram_min_order:
                counted = self.quotient(self.counts[n][self.context(n)])
                here = self.doc_counts[n][self.context(n)]
                known = 0 < here.total() < 255
                experts = [counted, self.quotient(here) if known else counted]
                p = self.link(n, self.bucket(n, past, entropy), p, experts)
        self.top, trust = p, 1 / (1 + math.exp(-min(max(self.log_odds, -500), 500)))
        return trust * p + (1 - trust) * model

    def quotient(self, counts: Counter) -> np.ndarray:
        p = np.zeros_like(self.model)
        p[list(counts)] = list(counts.values())
        return p / counts.total()

    def link(self, n, bucket, p, experts) -> np.ndarray:
        """One link of the chain; what each expert gave is kept until the token is known."""
        parts = [w * q for w, q in zip(self.mix_weights[n][:, bucket], (p, *experts))]
        self.links.append((n, bucket, parts, sum(parts)))
        return sum(parts)

    def predict_backoff(self, model, entropy):
        self.top = model
        for n in range(self.hp.ngram_order, self.hp.ngram_min_order - 1, -1):
            past = self.followed[n][self.context(n)] if self.context(n) is not None else []
            if len(past) >= self.hp.ngram_min_count:
                alpha = self.backoff_alpha(entropy, n)
                counted = np.zeros_like(model)
                for v, c in self.counts[n][self.context(n)].items():
                    counted[v] = c / len(past)
                return (1 - alpha) * model + alpha * counted
        return model

    def backoff_alpha(self, entropy, n):
        """From ALPHA_MIN to ALPHA_MAX, half-way at 4 nats or at the entropy that n has."""
        center = dict(entropy=4.0, order=CENTERS[min(n, 7) - 2])[self.hp.ngram_alpha]
        rising = 1 / (1 + math.exp(-2 * (entropy - center)))
        return self.hp.alpha_min + (self.hp.alpha_max - self.hp.alpha_min) * rising

    def learn(self, token: int) -> None:
        """Only now the token is seen."""
        for n, bucket, parts, p in self.links:
            for expert, part in enumerate(parts):
                self.fresh[n].reshape(len(parts), -1)[expert, bucket] += part[token] / p[token]
        if self.hp.ngram_alpha == "online":
            self.log_odds += math.log(self.top[token] / self.model[token])
        for n in range(2, self.hp.ngram_order + 1):
            if self.context(n) is not None:
                self.followed[n][self.context(n)].append((len(self.stream), token))
                self.counts[n][self.context(n)][token] += 1
                self.doc_counts[n][self.context(n)][token] += 1
        nats = float(np.float32(-math.log(self.model[token])))  # as scores are kept
        self.surprise[token] += round(min(nats, 40) ** 3)
        self.stream.append(token)
        if token == t.BOS:
            self.surprise.clear()
            for counts in self.doc_counts.values():
                counts.clear()
        if len(self.stream) - 1 in self.edges:
            for n in self.credits:
                self.credits[n] = 0.97 * self.credits[n] + self.fresh[n]
                self.fresh[n][:] = 0
                self.mix_weights[n] = t.bucket_weights(self.credits[n])
