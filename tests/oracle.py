"""Algorithm 1 of *Step-Ahead Error Feedback* (Xu, Huo, Huang) in plain float64 numpy.

What the library is tested against. It shares no code with the library and is as slow and plain as
it likes. All parameters of the model are laid end to end in one vector of R^d, so that the lines
of `run` are those of the paper; row numbers are those of the table in hvd_saef.memory.algorithm.

    here      paper                  what it is
    K, k      K, k                   number of workers, one worker
    t         t                      the round, counted from 0
    x         x_t                    the consensus point, the same on every worker
    e[k]      e_t^k                  worker k's compression error
    s         e_t                    the server's compression error
    b[k]      x_{t+1/2}^k            where worker k's round starts, one step ahead of x
    y[k]      x_{t+1}^k (first use)  where its local steps have brought it
    delta     Delta_{t+1}^k          what worker k would like to subtract from x
    D         Delta_{t+1}            what the server would
    u         C(Delta_{t+1})         what everybody does subtract: x_{t+1} = x_t - u
    C         C                      the compressor, block by block
    m         m_t^k                  the momentum, local to worker k (in `LocalOptimizer`)
    lr        eta_t                  the learning rate
    p         p                      the averaging period (None: infinity)
    x~        x~_t                   the auxiliary point x - (s + mean of e[k])

Not in the paper: alpha scales the step ahead (1: SAEF, 0: EF), beta steps ahead by the server's
error too, H > 1 local steps make a round, blocks cut parameters up, and C is the identity in the
first `warmup_steps` rounds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# (worker k, step index, parameters at which) -> gradients. None: the worker has none for that
# parameter in that step.
Gradient = Callable[[int, int, list[Array]], list[Array | None]]


@dataclass(frozen=True)
class Setup:
    """Everything that determines a run but the start and the gradients."""

    workers: int
    compressor: str  # "sign" | "topk" | "none"
    ratio: float = 0.1  # of every block, for "topk"
    feedback: str = "saef"  # "saef" | "ef" | "none"
    step_ahead: float = 1.0  # alpha, of "saef" only
    server_step_ahead: float = 0.0  # beta
    double_compression: bool = True  # the paper's DC; False is SC
    averaging_period: int | None = None  # p
    local_steps: int = 1  # H
    warmup_steps: int = 0  # in rounds
    block_size: int | None = None  # None: one block a parameter
    optimizer: str = "sgd"  # "sgd" | "sgdm" | "nesterov" | "adamw"
    lr: Callable[[int], float] = field(kw_only=True)  # of the index of the step() call, from 0
    momentum: float = 0.9  # of "sgdm" and "nesterov"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weights: tuple[float, ...] | None = None  # of each worker in means over k; None: all alike

    def __post_init__(self) -> None:
        """Refuse a misspelt name, which would otherwise be some other algorithm."""
        if self.compressor not in ("sign", "topk", "none"):
            raise ValueError(f"compressor: {self.compressor!r}")
        if self.feedback not in ("saef", "ef", "none"):
            raise ValueError(f"feedback: {self.feedback!r}")
        if self.optimizer not in ("sgd", "sgdm", "nesterov", "adamw"):
            raise ValueError(f"optimizer: {self.optimizer!r}")


@dataclass(frozen=True)
class Trajectory:
    """Where a run has come to, and two histories with one entry for each completed round.

    If the last step completed a round, rows 1 and 2 of the next round are done.
    """

    x: list[Array]
    parameters: list[list[Array]]  # of each worker: what its model holds now
    errors: list[list[Array]]  # of each worker: e_k
    server_error: list[Array]
    auxiliary: list[list[Array]]  # x~ after the round
    mean_update: list[list[Array]]  # mean over the workers of b - y


def mean(vectors: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    """Sum in rank order, then divide."""
    counted = [vector * w for vector, w in zip(vectors, weights, strict=True)] if weights else vectors
    total: Array = counted[0].copy()
    for vector in counted[1:]:
        total += vector
    total /= sum(weights) if weights else len(vectors)
    return total


def sign(v: Array) -> Array:
    """Equation 2: (||v||_1 / d) sgn(v); a zero has the sign of its sign bit."""
    out: Array = np.copysign(np.abs(v).sum() / v.size, v)
    return out


def topk(v: Array, ratio: float) -> Array:
    """Keep the k entries of largest magnitude; of equal ones, that of the lower index."""
    k = min(v.size, max(1, math.ceil(ratio * v.size)))
    kept = np.argsort(-np.abs(v), kind="stable")[:k]
    out = np.zeros_like(v)
    out[kept] = v[kept]
    return out


class LocalOptimizer:
    """One worker's torch.optim.SGD or AdamW: row 3. Its state never leaves the worker."""

    def __init__(self, setup: Setup) -> None:
        """Start without state: a parameter's begins at its first gradient."""
        self.setup = setup
        self.m: dict[int, Array] = {}  # the momentum; AdamW: the mean gradient
        self.v: dict[int, Array] = {}  # AdamW: the mean squared gradient
        self.count: dict[int, int] = {}  # AdamW: the steps that this parameter has taken

    def step(self, i: int, w: Array, g: Array, lr: float) -> Array:
        """Where parameter number i goes from w with the gradient g."""
        if self.setup.optimizer == "adamw":
            return self._adamw(i, w, g, lr)
        return self._sgd(i, w, g, lr)

    def _sgd(self, i: int, w: Array, g: Array, lr: float) -> Array:
        mu = self.setup.momentum
        d = g + self.setup.weight_decay * w
        if self.setup.optimizer == "sgd":
            return w - lr * d
        self.m[i] = mu * self.m[i] + d if i in self.m else d
        if self.setup.optimizer == "nesterov":
            return w - lr * (d + mu * self.m[i])
        return w - lr * self.m[i]

    def _adamw(self, i: int, w: Array, g: Array, lr: float) -> Array:
        beta1, beta2 = self.setup.betas
        n = self.count[i] = self.count.get(i, 0) + 1
        self.m[i] = beta1 * self.m.get(i, np.zeros_like(w)) + (1 - beta1) * g
        self.v[i] = beta2 * self.v.get(i, np.zeros_like(w)) + (1 - beta2) * g * g
        m_hat = self.m[i] / (1 - beta1**n)
        v_hat = self.v[i] / (1 - beta2**n)
        w = w * (1 - lr * self.setup.weight_decay)
        return w - lr * m_hat / (np.sqrt(v_hat) + self.setup.eps)


def run(setup: Setup, start: list[Array], gradient: Gradient, steps: int) -> Trajectory:
    """Call step() `steps` times on every worker, from `start`."""
    K, H, p = setup.workers, setup.local_steps, setup.averaging_period
    alpha = setup.step_ahead if setup.feedback == "saef" else 0.0
    beta, weights = setup.server_step_ahead, setup.weights

    shapes = [np.shape(w) for w in start]
    ends = [int(end) for end in np.cumsum([np.size(w) for w in start])]
    where = [slice(i, j) for i, j in zip([0, *ends], ends, strict=False)]  # of each parameter
    blocks = [
        slice(i, min(i + n, w.stop))
        for w in where
        for n in [setup.block_size or max(1, w.stop - w.start)]
        for i in range(w.start, w.stop, n)
    ]

    def split(vector: Array) -> list[Array]:
        return [vector[w].reshape(shape).copy() for w, shape in zip(where, shapes, strict=True)]

    def C(v: Array, t: int) -> Array:
        out: Array = v.copy()
        if setup.compressor == "none" or t < setup.warmup_steps:
            return out
        for block in blocks:
            one = v[block]
            out[block] = sign(one) if setup.compressor == "sign" else topk(one, setup.ratio)
        return out

    def begin_round(t: int) -> None:
        if p is not None and (t + 1) % p == 0:  # row 1
            e[:] = [mean(e, weights)] * K
        for k in range(K):  # row 2
            b[k] = x - alpha * e[k] - beta * s
            y[k] = b[k].copy()

    x: Array = np.concatenate([np.asarray(w, dtype=np.float64).reshape(-1) for w in start])
    s = np.zeros_like(x)
    e = [np.zeros_like(x) for _ in range(K)]
    b = [np.zeros_like(x) for _ in range(K)]
    y = [np.zeros_like(x) for _ in range(K)]
    optimizers = [LocalOptimizer(setup) for _ in range(K)]
    auxiliary: list[list[Array]] = []
    mean_update: list[list[Array]] = []

    t = 0
    begin_round(t)
    for step in range(steps):
        for k in range(K):  # row 3: one of its H local steps
            gradients = gradient(k, step, split(y[k]))
            for i, (w, shape, g) in enumerate(zip(where, shapes, gradients, strict=True)):
                if g is not None:
                    flat = np.asarray(g, dtype=np.float64).reshape(shape).reshape(-1)
                    y[k][w] = optimizers[k].step(i, y[k][w], flat, setup.lr(step))
        if (step + 1) % H != 0:
            continue

        sent = []
        for k in range(K):  # row 4
            delta = e[k] + (b[k] - y[k])
            sent.append(C(delta, t))
            if setup.feedback != "none":
                e[k] = delta - sent[k]
        u = mean(sent, weights)  # row 5
        if setup.double_compression:  # row 5'
            D = s + u
            u = C(D, t)
            if setup.feedback != "none":
                s = D - u
        x = x - u  # row 6

        auxiliary.append(split(x - (s + mean(e, weights))))
        mean_update.append(split(mean([b[k] - y[k] for k in range(K)], weights)))
        t += 1
        begin_round(t)

    return Trajectory(
        x=split(x),
        parameters=[split(y[k]) for k in range(K)],
        errors=[split(e[k]) for k in range(K)],
        server_error=split(s),
        auxiliary=auxiliary,
        mean_update=mean_update,
    )
