"""Every registered method once more, in plain NumPy and float64.

Written from the papers' equations as the methods' docstrings state them, one client and
one vector at a time; nothing of the library is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sent:
    """What one client sent: its model, its size, and what it measured."""

    client: int
    model: np.ndarray
    num_examples: float
    accuracy: float = 0.0
    error: float = 1.0
    label_counts: list[int] = field(default_factory=list)
    loss: float = 1.0
    work: float = 1.0


def shares(values):
    values = np.asarray(values, np.float64)
    return values / values.sum()


class FedAvg:
    """The mean by data size; ``number`` and ``population`` are those of the round."""

    least = 1
    number = population = 0

    def step(self, start, sent):
        """Return the weights and the next model."""
        weights = self.weights(start, sent)
        model = start + sum(
            w * (one.model - start) for w, one in zip(weights, sent, strict=True)
        )
        return weights, model

    def weights(self, start, sent):
        return shares([one.num_examples for one in sent])


class FedDisco(FedAvg):
    def __init__(self, metric="kl", a=0.5, b=0.1, scale_with_cohort=False):
        self.metric, self.a, self.b = metric, a, b
        self.scale = scale_with_cohort
        self.known = {}

    def weights(self, start, sent):
        p = super().weights(start, sent)
        if len(sent) == 1:
            return np.ones(1)
        d = []
        for one in sent:
            counts = self.known.setdefault(one.client, one.label_counts)
            own = shares(counts)
            target = np.full(len(own), 1 / len(own))
            if self.metric == "kl":
                some = own > 0
                d.append((own[some] * np.log(own[some] / target[some])).sum())
            elif self.metric == "l1":
                d.append(np.abs(own - target).sum())
            elif self.metric == "l2":
                d.append(np.linalg.norm(own - target))
            else:
                length = np.linalg.norm(own) * np.linalg.norm(target)
                d.append(1 - own @ target / length)
        d = np.maximum(d, 0)
        if self.metric == "kl" and d.sum() > 0:
            d = d / d.sum()
        scale = 10 / len(sent) if self.scale else 1.0
        a = self.a * (1.0 if self.metric == "kl" else scale)
        raw = np.maximum(p - a * d + self.b * scale, 0)
        return raw / raw.sum() if raw.sum() > 0 else p


class IDA(FedAvg):
    def __init__(
        self,
        distance="l1",
        base="uniform",
        fedavg=False,
        intrac=False,
        per_tensor=False,
        tensors=(),
        precision=np.float64,
    ):
        self.precision = precision
        self.order = 1 if distance == "l1" else 2
        self.base, self.fedavg, self.intrac = base, fedavg, intrac
        self.tensors = tensors if per_tensor else (slice(None),)

    def step(self, start, sent):
        p = FedAvg.weights(self, start, sent)
        base = {
            "uniform": sum(one.model for one in sent) / len(sent),
            "sample": sum(w * one.model for w, one in zip(p, sent, strict=True)),
            "previous": start,
        }[self.base]
        factor = np.ones(len(sent))
        if self.fedavg:
            factor = factor * p
        if self.intrac:
            factor = factor / [max(1 / len(sent), one.accuracy) for one in sent]
        model, each = start.copy(), []
        for place in self.tensors:
            distances = np.array(
                [np.linalg.norm((one.model - base)[place], self.order) for one in sent]
            )
            inverse = self.inverse(distances, start[place])
            if len(sent) <= 2 and self.base == "uniform":
                inverse = np.ones(len(sent))
            weights = shares(factor * inverse)
            each.append(weights)
            model[place] = sum(
                w * one.model[place] for w, one in zip(weights, sent, strict=True)
            )
        return np.mean(each, 0), model

    def inverse(self, distances, start):
        # What only rounding can tell apart from 0 is 0.
        rounding = 4 * np.finfo(self.precision).eps * np.linalg.norm(start, self.order)
        distances = np.where(distances > rounding, distances, 0)
        if not distances.any():
            return np.ones(len(distances))
        if (distances <= 1e-8 * distances.max()).any():
            return 1 / (distances + 1e-8 * distances.mean())
        return 1 / (distances + 1e-8)


class FedCE(FedAvg):
    least = 2

    def __init__(self, mode="plus", consensus="evolving", floor=1e-6, clip="before"):
        self.mode, self.consensus = mode, consensus
        self.floor, self.clip = floor, clip
        self.c, self.means, self.rounds = {}, {}, {}

    def weights(self, start, sent):
        updates = [one.model - start for one in sent]
        if self.consensus == "uniform" or not self.c:
            c = [1 / len(sent)] * len(sent)
        else:
            new = 1 / (len(self.c) + 1)
            c = [self.c.get(one.client, new) for one in sent]
        whole = sum(w * u for w, u in zip(c, updates, strict=True))
        for w, u, one in zip(c, updates, sent, strict=True):
            n = self.rounds[one.client] = self.rounds.get(one.client, 0) + 1
            before = self.means.get(one.client, 0.0)
            cosine = self.cosine(u, whole - w * u)
            self.means[one.client] = before + (cosine - before) / n
        gradient = self.share([1 - self.means[one.client] for one in sent])
        data = self.share([one.error for one in sent])
        joined = gradient + data if self.mode == "plus" else gradient * data
        found = self.share(joined)
        self.c |= {one.client: w for one, w in zip(sent, found, strict=True)}
        return found

    def share(self, raw):
        raw = np.maximum(raw, self.floor if self.clip == "before" else 0)
        found = raw / raw.sum() if raw.sum() > 0 else np.full(len(raw), 1 / len(raw))
        return found if self.clip == "before" else np.maximum(found, self.floor)

    @staticmethod
    def cosine(a, b):
        length = np.linalg.norm(a) * np.linalg.norm(b)
        return a @ b / length if length > 1e-12 else 0.0


class AFL(FedAvg):
    def __init__(self, update="projected", step=0.1):
        self.update, self.rate = update, step
        self.seen, self.unseen = {}, None

    def weights(self, start, sent):
        p = super().weights(start, sent)
        if self.unseen is None:
            self.unseen = 1 / self.population
        mixture = {one.client: self.unseen for one in sent} | self.seen
        own = np.array([mixture[one.client] for one in sent])
        others = max(self.population - len(mixture), 0)
        v = np.array([*mixture.values(), *[self.unseen] * others])
        rise = np.zeros(len(v))
        for one in sent:
            rise[[*mixture].index(one.client)] = self.rate * one.loss
        if self.update == "projected":
            v = v + rise
            u = np.sort(v)[::-1]
            spare = (1 - np.cumsum(u)) / np.arange(1, len(u) + 1)
            v = np.maximum(v + spare[np.nonzero(u + spare > 0)[0].max()], 0)
        else:
            v = shares(v * np.exp(rise))
        self.seen = dict(zip(mixture, v[: len(mixture)].tolist(), strict=True))
        self.unseen = float(v[-1]) if others else None
        if len(sent) == 1:
            return np.ones(1)
        return own / own.sum() if own.sum() > 0 else p


class FedBuff(FedAvg):
    """Of updates that are all fresh."""

    def weights(self, start, sent):
        return np.full(len(sent), 1 / len(sent))


class FedAsync:
    """Of models that are all fresh, mixed in one after another."""

    least = 1

    def __init__(self, mixing=0.6):
        self.mixing = mixing

    def step(self, start, sent):
        weights, model = np.zeros(len(sent)), start
        for k, one in enumerate(sent):
            weights *= 1 - self.mixing
            weights[k] = self.mixing
            model = (1 - self.mixing) * model + self.mixing * one.model
        return weights, model


class FedAU(FedAvg):
    def __init__(self, cutoff=np.inf):
        self.cutoff = cutoff
        self.intervals, self.cuts = {}, {}

    def weights(self, start, sent):
        found = []
        for one in sent:
            mine = self.intervals.setdefault(one.client, [])
            cut = self.cuts.get(one.client, 0)
            while self.number - 1 - cut >= self.cutoff:
                mine.append(self.cutoff)
                cut += self.cutoff
            found.append(np.mean(mine) if mine else 1.0)
            mine.append(self.number - cut)
            self.cuts[one.client] = self.number
        return np.array(found) / self.population


class FedNova(FedAvg):
    def weights(self, start, sent):
        p, work = super().weights(start, sent), np.array([one.work for one in sent])
        return (p @ work) * p / work


class QFedAvg(FedAvg):
    def __init__(self, q=0.1, lipschitz=10.0):
        self.q, self.lipschitz = q, lipschitz

    def weights(self, start, sent):
        f = np.array([one.loss for one in sent]) + 1e-10
        g = [self.lipschitz * np.linalg.norm(start - one.model) for one in sent]
        h = self.q * f ** (self.q - 1) * np.square(g) + self.lipschitz * f**self.q
        return self.lipschitz * f**self.q / h.sum()


class FedLAW:
    """With a linear model ``x W^T + b`` on the proxy set, one batch an epoch."""

    least = 1

    def __init__(self, x, y, form="exp", server_epochs=20, optimizer="adam", rate=0.01):
        self.x, self.y = x, y
        self.form, self.epochs = form, server_epochs
        self.optimizer, self.rate = optimizer, rate

    def loss_and_gradient(self, model):
        n, features = self.x.shape
        classes = len(model) // (features + 1)
        weight, bias = np.split(model, [classes * features])
        scores = self.x @ weight.reshape(classes, features).T + bias
        scores -= scores.max(1, keepdims=True)
        totals = np.exp(scores).sum(1, keepdims=True)
        p = np.exp(scores) / totals
        loss = (np.log(totals[:, 0]) - scores[np.arange(n), self.y]).mean()
        p[np.arange(n), self.y] -= 1
        return loss, np.concatenate([(p.T @ self.x).reshape(-1), p.sum(0)]) / n

    def split(self, x):
        theta, phi = x[:-1], x[-1]
        if self.form == "exp":
            shifted = np.exp(theta - theta.max())
            return shifted / shifted.sum(), np.exp(phi)
        return theta**2 / (theta**2).sum(), phi**2

    def by_x(self, x, rows):
        weights, gamma = self.split(x)
        mean = weights @ rows
        _, g = self.loss_and_gradient(gamma * mean)
        apart = rows @ g - mean @ g
        if self.form == "exp":
            return np.append(gamma * weights * apart, gamma * (g @ mean))
        theta, phi = x[:-1], x[-1]
        first = gamma * 2 * theta / (theta**2).sum() * apart
        return np.append(first, 2 * phi * (g @ mean))

    def step(self, start, sent):
        rows = np.stack([one.model for one in sent])
        p = shares([one.num_examples for one in sent])
        if self.form == "exp":
            x, limits = np.append(np.log(p), 0.0), (-1.0, 1.0)
        else:
            x = np.append(np.full(len(p), len(p) ** -0.5), 1.0)
            limits = np.exp(-0.5), np.exp(0.5)
        first = second = np.zeros_like(x)
        for t in range(1, self.epochs + 1):
            g = self.by_x(x, rows)
            if self.optimizer == "adam":
                first = 0.5 * first + 0.5 * g
                second = 0.999 * second + 0.001 * g * g
                size = np.sqrt(second / (1 - 0.999**t)) + 1e-8
                x = x - self.rate * first / (1 - 0.5**t) / size
            else:
                first = 0.9 * first + g
                x = x - self.rate * first
            x[-1] = np.clip(x[-1], *limits)
        weights, gamma = self.split(x)
        before, _ = self.loss_and_gradient(p @ rows)
        after, _ = self.loss_and_gradient(gamma * (weights @ rows))
        if not after <= before:
            return p, p @ rows
        return weights, gamma * (weights @ rows)


class GroupDRO(FedAvg):
    def __init__(self, step=0.1, adjustment=0.0):
        self.rate, self.adjustment, self.logs = step, adjustment, {}

    def weights(self, start, sent):
        for one in sent:
            loss = one.loss + self.adjustment / one.num_examples**0.5
            known = self.logs.get(one.client, 0.0)
            self.logs[one.client] = known + self.rate * loss
        logs = np.array([self.logs[one.client] for one in sent])
        return shares(np.exp(logs - logs.max()))
