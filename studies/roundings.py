"""Roundings beyond GPTQ, at equal bytes: what each costs against the script's own.

    python -m studies.roundings [--seeds 1337 42 7] [--bits 4 5] [--rows gptq trellis8 ...]
    python -m studies.roundings --weights W0.npz W1.npz --data DIR [--held-out DIR]

Models, options and bytes are those of studies.quantizers: the container of `rows` with codes of so
many bits; here each row's own container is within 1/5000 of it. A line gives the KL divergence from
the float model's predictions, and how much of it is more or less than that of `gptq` (the standard
error of the difference beside it). The rows:

    gptq       the script's: steps by the curvature, each error carried on
    sdclip     each row's step is in proportion to its standard deviation
    flat       all matrices have the same geometric mean of their steps; rows differ as in gptq
    KIND:F     the steps of the matrices of this kind times F (embed, bigram, value_embed, q, k, v,
               proj, fc, down)
    beamN[:L]  of each row the N best paths survive each column, by error + L * bits of the coder's
               tables; beam1:L is rate-distortion rounding, beam1 is GPTQ. The file's format stays
    trellisN[:L]  trellis-coded (dependent) quantisation of N = 4, 8 or 16 states, by the Viterbi
               algorithm, each survivor carrying its own errors on

and, after gptq, sdclip, beamN or trellisN: `-grid`, nothing is carried on; `-natural`, the columns
in their own order instead of by falling moment (a trellis's file then need not hold the order);
`-rising`; `-columns`, natural, with steps by column where a matrix is no table.

A trellis has two grids of the same step, one shifted by half of it; to which of them a code
belongs, the parities of the codes before it in its row say. So the grid is twice as fine, and a
code names one of half its points. Bytes are real: each of the two grids has its own tables.
"""

import lzma
import re
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from studies import quantizers
from tools.common import gptq_of, mean_and_error, t

# Parity-check polynomials (h0, h1) of Ungerboeck's best codes in one dimension (1982), in octal
CODES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4)}
BLOCK = 64  # columns after which the errors of the best survivor are carried on to all others
AHEAD = 24  # columns beyond a block that the search looks at before it decides


class Machine:
    """The states of a trellis: which grid (0 or 1, shifted by half a step) a code belongs to, and
    where its parity leads. One state: no trellis, one grid; then any paths may survive."""

    def __init__(self, states: int, survivors: int = 1):
        self.is_trellis = states > 1
        self.survivors = max(states, survivors)
        self.grid_S = torch.zeros(states, dtype=torch.long)
        self.next_SP = torch.zeros(states, 2, dtype=torch.long)
        if states > 1:
            self.fill(*CODES[states])
        comes = [[] for _ in range(states)]
        for state in range(states):
            for parity in (0, 1):
                comes[self.next_SP[state, parity]].append(2 * state + parity)
        self.into_S2 = torch.tensor(comes)  # the two ways into a state: 2 * state + parity

    def survive(self, price_WR):
        """(S, R) each: the costs of the paths that are kept, and which of the 2 S ways they are."""
        if not self.is_trellis:
            cost_SR, way_SR = price_WR.topk(self.survivors, dim=0, largest=False)
            return cost_SR, way_SR
        cost_SR, chosen_SR = price_WR[self.into_S2.T].min(0)
        return cost_SR, self.into_S2.gather(1, chosen_SR)

    def fill(self, h0: int, h1: int):
        """As a shift register of the syndrome: the grid of the next code is its lowest bit."""
        states = len(self.grid_S)
        for state in range(states):
            grid = state & 1
            self.grid_S[state] = grid
            for parity in (0, 1):
                added = (h0 if grid else 0) ^ (h1 if parity else 0)
                self.next_SP[state, parity] = (state ^ added) >> 1

    def grids(self, codes_RC, rank_C):
        """(R, C): the grid of each code, as a decoder finds it, column after column by rank."""
        state_R = torch.zeros(len(codes_RC), dtype=torch.long)
        grids_RC = torch.empty(codes_RC.shape, dtype=torch.long)
        for c in rank_C.argsort(descending=True, stable=True):
            grids_RC[:, c] = self.grid_S[state_R]
            state_R = self.next_SP[state_R, codes_RC[:, c].long() & 1]
        return grids_RC


class Prices:
    """Bits of a code by the coder's own tables."""

    def __init__(self, freqs: list):
        """One array of `table_frequencies` per grid."""
        freq = np.stack(freqs).astype(np.float32)
        bits = t.SCALE - np.log2(np.maximum(freq, 1))
        bits[freq == 0] = t.SCALE + 2
        self.bits = torch.from_numpy(bits.astype(np.float32).ravel())

    def __call__(self, grid_S11, tables_R, codes_SPR):
        pair = (grid_S11 * t.TABLES + tables_R) * t.SYMBOLS + 128
        return self.bits[pair + codes_SPR.long()]


def search(w_CR, step_R, weight_R, factor_CC, machine, price=None, tables_CR=None, rate=0.0):
    """Codes (C, R) of the columns in their order: by the Viterbi algorithm, each survivor carrying
    its own errors on by the factor, the path of least weight * error^2 + rate * bits. One state and
    no rate: GPTQ."""
    survivors = machine.survivors
    w_CR = w_CR.clone()
    codes_CR = torch.empty_like(w_CR)
    d_C = factor_CC.diagonal().double().pow(-2)
    d_C = (d_C / d_C.mean()).float()
    grid_S11 = machine.grid_S[:, None, None].expand(survivors, 1, 1)
    cost_SR = torch.full((survivors, w_CR.size(1)), torch.inf)
    cost_SR[0] = 0.0
    carries = bool(factor_CC.triu(1).any())

    for start in range(0, len(w_CR), BLOCK):
        seen = slice(start, start + BLOCK + AHEAD)
        factor = factor_CC[seen, seen]
        w_cSR = w_CR[seen, None].repeat(1, survivors, 1)
        paths = []
        for c in range(len(w_cSR)):
            x_SR = w_cSR[c] / step_R - grid_S11[:, 0] / 2
            low_SR = x_SR.floor().clamp(-t.LARGEST_CODE, t.LARGEST_CODE - 1)
            is_odd_SR = low_SR.remainder(2)
            codes_SPR = torch.stack([low_SR + is_odd_SR, low_SR + 1 - is_odd_SR], 1)
            off_SPR = x_SR[:, None] - codes_SPR
            price_SPR = off_SPR.square() * (weight_R * d_C[start + c])
            if rate:
                price_SPR += rate * price(grid_S11, tables_CR[start + c], codes_SPR)
            price_SPR += cost_SR[:, None]

            cost_SR, way_SR = machine.survive(price_SPR.flatten(0, 1))
            codes_SR = codes_SPR.flatten(0, 1).gather(0, way_SR)
            error_SR = off_SPR.flatten(0, 1).gather(0, way_SR) * (step_R / factor[c, c])
            paths.append((way_SR >> 1, codes_SR, error_SR))
            if carries and c + 1 < len(w_cSR):
                rest_cSR = w_cSR[c + 1 :]
                if survivors > 1:
                    rest_cSR = rest_cSR.gather(1, paths[-1][0].expand_as(rest_cSR))
                rest_cSR -= factor[c, c + 1 :, None, None] * error_SR
                w_cSR[c + 1 :] = rest_cSR

        state_1R = cost_SR.argmin(0, keepdim=True)
        errors_cR = torch.empty(len(paths), w_CR.size(1))
        for c in reversed(range(len(paths))):
            if c == BLOCK - 1:
                cost_SR = torch.full_like(cost_SR, torch.inf).scatter_(0, state_1R, 0.0)
            before_SR, codes_SR, error_SR = paths[c]
            codes_CR[start + c] = codes_SR.gather(0, state_1R)[0]
            errors_cR[c] = error_SR.gather(0, state_1R)[0]
            state_1R = before_SR.gather(0, state_1R)
        if carries:
            end = start + BLOCK
            w_CR[end:] -= factor_CC[start:end, end:].T @ errors_cR[:BLOCK]
    return codes_CR


# ---- codes <-> bytes


@dataclass
class Packed:
    size: int  # bytes of the container
    weights: int  # how many are coded
    back: dict  # the state dict that a decoder gets
    freqs: list  # `table_frequencies` of each grid
    tables: dict  # name -> the table of each code, (R, C)


def pack(state, hp, coarsen: float, quantizer, machine) -> Packed:
    """As `t.pack`, with tables and rANS words per grid; of one state, of as many bytes."""
    entries, codes, numbers, _ = t.quantize_state(state, hp, coarsen, quantizer)
    classes = [t.spread_classes(matrix) for matrix in codes]
    coded = [entry.name for entry in entries if entry.is_coded]
    tables = {name: t.tables_of(*both) for name, both in zip(coded, classes)}
    ranks, grids = {}, {}
    for name, matrix in zip(coded, codes):
        grids[name] = torch.zeros(matrix.shape, dtype=torch.long)
        if machine.is_trellis:
            ranks[name] = quantizer.curvature[name].rank_C
            grids[name] = machine.grids(torch.from_numpy(matrix), ranks[name])
    symbols = {name: m.astype(np.int16) + 128 for name, m in zip(coded, codes)}
    freqs, words = [], []
    for grid in machine.grid_S.unique():
        pairs = [
            (tables[name] * t.SYMBOLS + symbols[name])[(grids[name] == grid).numpy()]
            for name in coded
        ]
        freq, coded_words = t.rans_encode(np.concatenate(pairs))
        freqs.append(freq)
        words.append(coded_words)

    back = {}
    for entry, part in zip(entries, numbers):
        if entry.is_coded:
            step = torch.from_numpy(part).view(torch.bfloat16).float()
            values = torch.from_numpy(symbols[entry.name]) - 128 + grids[entry.name] / 2
            scale_C = getattr(quantizer.curvature[entry.name], "scale_C", 1.0)
            back[entry.name] = values * step / scale_C
        else:
            back[entry.name] = torch.from_numpy(part).float().view(entry.shape)
    row_first = [rows for rows, _ in classes] + [columns for _, columns in classes]
    curvature = [quantizer.curvature[name] for name in coded]
    row_first += [c.exponents_C.numpy().astype("<i2") for c in curvature if type(c) is Columns]
    if machine.is_trellis:
        row_first += [rank.numpy().astype("<i2") for rank in ranks.values()]
    by_byte = np.frombuffer(b"".join([*freqs, *row_first, *numbers]), np.uint8).reshape(-1, 2).T
    text = "".join(entry.line() for entry in entries).encode()
    side = lzma.compress(text + b"\0" + by_byte.tobytes(), **t.LZMA)
    size = t.CHECKSUM.stop + 4 + len(side) + sum(map(len, words))
    return Packed(size, sum(matrix.size for matrix in codes), back, freqs, tables)


def fit(state, hp, budget: int, quantizer, machine, coarsen: float = 1.0):
    """(a Packed within 1/5000 of the budget, its coarsen): Newton's method, a bit less of each
    weight doubling the step."""
    for _ in range(10):
        packed = pack(state, hp, coarsen, quantizer, machine)
        excess = packed.size - budget
        if abs(excess) <= max(50, budget / 5000):
            break
        coarsen *= 2 ** (8 * excess / packed.weights)
    return packed, coarsen


# ---- the quantisers


class Ordered(t.Curvature):
    """The columns by falling `rank`, whole numbers that a file can hold."""

    scale_C = 1.0  # of the columns before they are rounded

    @cached_property
    def rank_C(self):
        return (2 * self.inputs_CC.diagonal().clamp_min(1e-30).log2()).round()

    @cached_property
    def factors(self):
        H_CC = self.inputs_CC.double()
        order_C = self.rank_C.argsort(descending=True, stable=True)
        H_CC = H_CC[order_C][:, order_C]
        H_CC = H_CC + 0.01 * H_CC.diagonal().mean() * torch.eye(len(H_CC))
        inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(H_CC))
        return order_C, torch.linalg.cholesky(inverse_CC, upper=True).float()


class Natural(Ordered):
    """The columns in their own order."""

    @property
    def rank_C(self):
        return torch.zeros(len(self.inputs_CC))


class Rising(Ordered):
    """The columns that matter least first."""

    @property
    def rank_C(self):
        return (-2 * self.inputs_CC.diagonal().clamp_min(1e-30).log2()).round()


class Columns(Natural):
    """A step per column as well, so that a unit error costs as much in each: a power of 2^(1/4)."""

    @cached_property
    def exponents_C(self):
        unit_C = -super().factors[1].diagonal().log2()  # half the log of what a unit error costs
        return (4 * (unit_C - unit_C.mean())).round()

    @cached_property
    def scale_C(self):
        return torch.exp2(self.exponents_C / 4)

    @cached_property
    def factors(self):
        order_C, factor_CC = super().factors
        return order_C, factor_CC * self.scale_C


ORDERS = {"natural": Natural, "rising": Rising, "columns": Columns}


def with_steps(curvature: dict, steps: dict, kind=t.Curvature):
    """The curvature, its steps replaced. Tables, pressed against 8 bits, get no steps by column."""
    found = {}
    asked = kind
    for name, c in curvature.items():
        is_table = name.endswith(("table.weight", "embed.weight"))
        kind = Natural if asked is Columns and is_table else asked
        found[name] = kind(c.inputs_CC, c.outputs_R)
        found[name].steps = steps[name]
        if kind is t.Curvature:
            found[name].factors = c.factors
        if kind is Columns:  # the mean cost of a unit error has become the geometric one
            plain, now = (x.factors[1].diagonal().pow(-2).mean() for x in (c, found[name]))
            found[name].steps = steps[name] * (plain / now).sqrt()
    return found


class Searched(t.GPTQ):
    """The steps of GPTQ, codes by `search`."""

    def __init__(self, gptq, machine, carries=True, rate=0.0, base: Packed | None = None):
        super().__init__(gptq.rows.hp, gptq.curvature, gptq.scale, carries)
        self.machine = machine
        self.rate = rate
        self.tables = base.tables if rate else {}
        self.price = Prices(base.freqs) if rate else None

    def quantize(self, name: str, w_RC, coarsen: float):
        c = self.curvature[name]
        w_RC = w_RC * getattr(c, "scale_C", 1.0)
        wanted = c.steps * (self.scale * coarsen)
        reach = w_RC.abs().amax(1, keepdim=True) / t.LARGEST_CODE
        step = torch.maximum(wanted, reach).clamp_min(1e-30).bfloat16().float()
        weight_R = (step / wanted)[:, 0].square()
        order_C, factor_CC = c.factors
        if not self.carries:
            d_C = c.inputs_CC.diagonal()[order_C]
            factor_CC = (d_C + 0.01 * d_C.mean()).rsqrt().diag()
        tables = None
        if self.rate:
            tables = torch.from_numpy(self.tables[name].T[order_C.numpy()].astype(np.int64))
        codes_CR = torch.empty_like(w_RC.T)
        codes_CR[order_C] = search(
            w_RC.T[order_C],
            step[:, 0],
            weight_R,
            factor_CC,
            self.machine,
            self.price,
            tables,
            self.rate,
        )
        return codes_CR.T.contiguous(), step


def kind_of(name: str) -> str:
    if not name.startswith("blocks"):
        return name.split(".")[0]
    return "down" if name.endswith("mlp.proj.weight") else name.split(".")[3]


class Study:
    """All rows of one model at one number of bytes; only matrices whose names match are rounded."""

    def __init__(self, judge, only: str, bits: int, coarsen: float | None):
        self.judge = judge
        self.state = {name: w for name, w in judge.state.items() if re.search(only, name)}
        self.hp, self.budget = quantizers.budget_of(bits, self.state, judge.model.hp)
        self.scale = gptq_of(judge.state, self.hp, judge.curvature).scale
        self.curvature = {name: c for name, c in judge.curvature.items() if name in self.state}
        self.label = f"{bits} bits"
        if coarsen:
            self.budget = pack(self.state, self.hp, coarsen, self.gptq(), Machine(1)).size
            self.label = f"coarsen {coarsen}"
        self.fitted = {}  # label -> (Packed, coarsen)
        self.costs = {}  # label -> KL of each target

    def gptq(self, change=lambda name, steps: steps, kind=t.Curvature):
        """A GPTQ of changed steps; those of coarsen 1 have the geometric mean of the script's."""
        steps = {name: change(name, c.steps) for name, c in self.curvature.items()}
        log_ratio = weights = 0
        for name, c in self.curvature.items():
            count = self.state[name].numel()
            log_ratio += count * float((c.steps / steps[name]).log2().mean())
            weights += count
        curvature = with_steps(self.curvature, steps, kind)
        return t.GPTQ(self.hp, curvature, self.scale * 2 ** (log_ratio / weights))

    def quantizer(self, label: str):
        """(quantiser, machine) of a row."""
        name, _, number = label.partition(":")
        name, _, variant = name.partition("-")
        found = re.fullmatch(r"(beam|trellis)(\d+)", name)
        if found:
            rate = float(number or 0)
            is_trellis = found[1] == "trellis"
            machine = Machine(int(found[2])) if is_trellis else Machine(1, int(found[2]))
            kind = Ordered if is_trellis else t.Curvature
            gptq = self.gptq(kind=ORDERS.get(variant, kind))
            base = None
            if rate:
                base, _ = self.fit(label.partition(":")[0] if is_trellis else "gptq")
            return Searched(gptq, machine, variant != "grid", rate, base), machine
        if name == "gptq":
            gptq = self.gptq(kind=ORDERS.get(variant, t.Curvature))
        elif name == "sdclip":
            gptq = self.gptq(lambda n, _: self.state[n].std(1, keepdim=True))
        elif name == "flat":
            gptq = self.gptq(lambda _, steps: steps / steps.log().mean().exp())
        else:
            factor = float(number)
            gptq = self.gptq(lambda n, steps: steps * (factor if kind_of(n) == name else 1.0))
        return gptq.draft if variant == "grid" else gptq, Machine(1)

    def fit(self, label: str):
        if label not in self.fitted:
            _, near = self.fitted.get("gptq", (None, 1.0))
            found = fit(self.state, self.hp, self.budget, *self.quantizer(label), near)
            self.fitted[label] = found
        return self.fitted[label]

    def print_row(self, label: str) -> None:
        began = time.perf_counter()
        packed, _ = self.fit(label)
        seconds = time.perf_counter() - began
        back = self.judge.state | packed.back
        kl, _ = self.judge(back)
        self.costs[label] = kl
        gptq = self.costs["gptq"]
        percent = 100 / float(gptq.mean())
        more, error = mean_and_error(kl - gptq)
        print(
            f"  {self.label} {label:22} {packed.size:>10,} bytes  KL {kl.mean():.6f} bpb "
            f"({kl.mean() / self.judge.per_byte:.6f} nats)  vs gptq "
            f"{more * percent:+.1f} +- {error * percent:.1f} %  "
            f"predicted {self.judge.predicted(back):.6f}  {seconds:.1f} s",
            flush=True,
        )


ROWS = [
    *("gptq-natural", "gptq-grid", "sdclip", "sdclip-grid", "flat", "beam1:0.03", "beam1:0.06"),
    *("beam8", "beam8:0.06", "trellis4", "trellis8", "trellis8-grid", "trellis8-natural"),
    *("trellis4:0.05", "trellis8:0.05", "trellis16:0.05"),
]


def main() -> None:
    parser = quantizers.options("roundings", __doc__.split("\n\n")[0])
    parser.set_defaults(bits=[4, 5], targets=40_000)
    parser.add_argument("--rows", nargs="+", default=ROWS, help="as above; gptq always comes first")
    parser.add_argument("--only", default="", help="round only what this pattern finds in a name")
    parser.add_argument("--coarsen", type=float, help="bytes of gptq so coarse, instead of --bits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for label, judge in quantizers.judges(args):
        quantizers.introduce(label, judge)
        for bits in args.bits:
            study = Study(judge, args.only, bits, args.coarsen)
            for row in dict.fromkeys(["gptq", *args.rows]):
                study.print_row(row)


if __name__ == "__main__":
    main()
