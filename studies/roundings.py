"""Roundings beyond GPTQ, at equal bytes: what each costs compared with the script's own.

    python -m studies.roundings [--seeds 1337 42 7] [--bits 4 5] [--rows gptq trellis8 ...]
    python -m studies.roundings --weights W0.npz W1.npz --data DIR [--held-out DIR]

Models, options and bytes are those of studies.quantizers: the bytes of the container that `rows`
makes with codes of --bits bits. Here each container is within 1/5000 of that size. A line shows the
KL divergence from the float model's predictions, and by how many percent it differs from that of
`gptq`, with the standard error of the difference. The rows:

    gptq       the script's: step sizes by the curvature; later columns compensate for errors
    sdclip     each row's step size is in proportion to its standard deviation
    flat       all matrices have the same geometric mean of step sizes; rows differ as in gptq
    KIND:F     the step sizes of the matrices of this kind times F (embed, bigram, value_embed, q,
               k, v, proj, fc, down)
    beamN[:L]  the N best paths of each row survive each column, by error + L * bits in the coder's
               tables. beam1 is GPTQ, beam1:L is rate-distortion rounding. The file's format is as
               before
    trellisN[:L]  trellis-coded (dependent) quantisation with N = 4, 8 or 16 states, by the Viterbi
               algorithm. In each surviving path later columns compensate for its own errors

and with an ending, after gptq, sdclip, beamN or trellisN: `-grid`, no column compensates; after
gptq, beamN or trellisN: `-natural`, the columns in their own order instead of by falling moment (so
that a trellis's file need not hold the order); `-rising`, by rising moment; `-columns`, natural,
with step sizes by column too, except in tables.

A trellis has two grids with the same step size, one shifted by half of it. The parities of the
earlier codes of a row say which of the grids a code belongs to. So the points lie twice as close,
and yet a code selects among half of them only. Bytes are real: each of the two grids has its own
frequency tables.
"""

import lzma
import re
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from studies import quantizers
from tools.common import mean_and_error, t

# Parity-check polynomials (h0, h1) of Ungerboeck's best codes in one dimension (1982), in octal
CODES = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4)}
BLOCK = 64  # columns that are decided at a time; then all later columns compensate for their errors
AHEAD = 24  # columns beyond a block that the search looks at before it decides


class Machine:
    """The states of a trellis. A state says which grid the next code belongs to (0, or 1, which is
    shifted by half a step size), and which state follows a code of each parity. One state: no
    trellis and one grid; then the best `survivors` paths survive, whatever their states."""

    def __init__(self, states: int, survivors: int = 1):
        self.is_trellis = states > 1
        self.survivors = max(states, survivors)
        self.grid_S = torch.zeros(states, dtype=torch.long)
        self.next_SP = torch.zeros(states, 2, dtype=torch.long)
        if states > 1:
            self.fill(*CODES[states])
        ways = [[] for _ in range(states)]
        for state in range(states):
            for parity in (0, 1):
                ways[self.next_SP[state, parity]].append(2 * state + parity)
        self.into_S2 = torch.tensor(ways)  # the two ways into a state: 2 * state + parity

    def survive(self, price_WR):
        """(S, R) each: the costs of the paths that are kept, and which of the 2 S ways they are."""
        if not self.is_trellis:
            cost_SR, way_SR = price_WR.topk(self.survivors, dim=0, largest=False)
            return cost_SR, way_SR
        cost_SR, chosen_SR = price_WR[self.into_S2.T].min(0)
        return cost_SR, self.into_S2.gather(1, chosen_SR)

    def fill(self, h0: int, h1: int):
        """Set the tables of a shift register that holds the syndrome. Its lowest bit is the grid of
        the next code. `h0`, `h1`: the parity-check polynomials."""
        states = len(self.grid_S)
        for state in range(states):
            grid = state & 1
            self.grid_S[state] = grid
            for parity in (0, 1):
                added = (h0 if grid else 0) ^ (h1 if parity else 0)
                self.next_SP[state, parity] = (state ^ added) >> 1

    def grids(self, codes_RC, rank_C):
        """(R, C): the grid of each code, as a decoder finds it: column after column, by falling
        `rank`."""
        state_R = torch.zeros(len(codes_RC), dtype=torch.long)
        grids_RC = torch.empty(codes_RC.shape, dtype=torch.long)
        for c in rank_C.argsort(descending=True, stable=True):
            grids_RC[:, c] = self.grid_S[state_R]
            state_R = self.next_SP[state_R, codes_RC[:, c].long() & 1]
        return grids_RC


class Prices:
    """How many bits a code takes, by the coder's own frequency tables."""

    def __init__(self, freqs: list):
        """One array of `table_frequencies` per grid."""
        freq = np.stack(freqs).astype(np.float32)
        bits = t.SCALE - np.log2(np.maximum(freq, 1))
        bits[freq == 0] = t.SCALE + 2
        self.bits = torch.from_numpy(bits.astype(np.float32).ravel())

    def __call__(self, grid_S11, tables_R, codes_SPR):
        pair = (grid_S11 * t.TABLES + tables_R) * t.SYMBOLS + 128
        return self.bits[pair + codes_SPR.long()]


def search(w_CR, delta_R, error_cost_R, factor_CC, machine, price=None, tables_CR=None, rate=0.0):
    """Codes (C, R) of the columns in their order: for each row the path of least error_cost *
    error^2 + rate * bits, by the Viterbi algorithm. In each surviving path later columns compensate
    for its own errors, by `factor`. With one state and no rate it is GPTQ."""
    survivors = machine.survivors
    w_CR = w_CR.clone()
    codes_CR = torch.empty_like(w_CR)
    d_C = factor_CC.diagonal().double().pow(-2)
    d_C = (d_C / d_C.mean()).float()
    grid_S11 = machine.grid_S[:, None, None].expand(survivors, 1, 1)
    cost_SR = torch.full((survivors, w_CR.size(1)), torch.inf)
    cost_SR[0] = 0.0
    compensates = bool(factor_CC.triu(1).any())

    for start in range(0, len(w_CR), BLOCK):
        seen = slice(start, start + BLOCK + AHEAD)
        factor = factor_CC[seen, seen]
        w_cSR = w_CR[seen, None].repeat(1, survivors, 1)
        paths = []
        for c in range(len(w_cSR)):
            x_SR = w_cSR[c] / delta_R - grid_S11[:, 0] / 2
            low_SR = x_SR.floor().clamp(-t.LARGEST_CODE, t.LARGEST_CODE - 1)
            is_odd_SR = low_SR.remainder(2)
            codes_SPR = torch.stack([low_SR + is_odd_SR, low_SR + 1 - is_odd_SR], 1)
            off_SPR = x_SR[:, None] - codes_SPR
            price_SPR = off_SPR.square() * (error_cost_R * d_C[start + c])
            if rate:
                price_SPR += rate * price(grid_S11, tables_CR[start + c], codes_SPR)
            price_SPR += cost_SR[:, None]

            cost_SR, way_SR = machine.survive(price_SPR.flatten(0, 1))
            codes_SR = codes_SPR.flatten(0, 1).gather(0, way_SR)
            error_SR = off_SPR.flatten(0, 1).gather(0, way_SR) * (delta_R / factor[c, c])
            paths.append((way_SR >> 1, codes_SR, error_SR))
            if compensates and c + 1 < len(w_cSR):
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
        if compensates:
            end = start + BLOCK
            w_CR[end:] -= factor_CC[start:end, end:].T @ errors_cR[:BLOCK]
    return codes_CR


# ---- codes <-> bytes


@dataclass
class Packed:
    """A container, but for its bytes."""

    size: int  # bytes of the container
    num_coded: int  # how many weights are coded
    back: dict  # the state dict that a decoder gets
    freqs: list  # `table_frequencies` of each grid
    tables: dict  # name -> the frequency table of each code, (R, C)


def pack(state, hp, coarsen: float, quantizer, machine) -> Packed:
    """As t.pack, but with frequency tables and rANS words for each grid. With one state it has as
    many bytes."""
    entries, codes, numbers, _ = t.quantize_state(state, hp, coarsen, quantizer.quantize)
    classes = [t.spread_classes(matrix) for matrix in codes]
    coded = [entry.name for entry in entries if entry.is_coded]
    curvature = [quantizer.curvature[name] for name in coded]
    tables = {name: t.tables_of(*both) for name, both in zip(coded, classes)}
    grids = {}
    for name, matrix, c in zip(coded, codes, curvature):
        grids[name] = torch.zeros(matrix.shape, dtype=torch.long)
        if machine.is_trellis:
            grids[name] = machine.grids(torch.from_numpy(matrix), c.rank_C)
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
            delta = torch.from_numpy(part).view(torch.bfloat16).float()
            values = torch.from_numpy(symbols[entry.name]) - 128 + grids[entry.name] / 2
            back[entry.name] = values * delta / quantizer.curvature[entry.name].scale_C
        else:
            back[entry.name] = torch.from_numpy(part).float().view(entry.shape)
    rows_first = [rows for rows, _ in classes] + [columns for _, columns in classes]
    rows_first += [c.exponents_C.numpy().astype("<i2") for c in curvature if type(c) is Columns]
    if machine.is_trellis:
        rows_first += [c.rank_C.numpy().astype("<i2") for c in curvature]
    by_byte = np.frombuffer(b"".join([*freqs, *rows_first, *numbers]), np.uint8).reshape(-1, 2).T
    text = "".join(entry.line() for entry in entries).encode()
    side = lzma.compress(text + b"\0" + by_byte.tobytes(), **t.LZMA)
    size = t.CHECKSUM_PLACE.stop + 4 + len(side) + sum(map(len, words))
    return Packed(size, sum(matrix.size for matrix in codes), back, freqs, tables)


def fit(state, hp, budget: int, quantizer, machine, coarsen: float = 1.0) -> tuple[Packed, float]:
    """(a Packed within 1/5000 of the budget, its factor of the step sizes). The search is Newton's
    method; it assumes that a bit less per weight doubles the step size."""
    for _ in range(10):
        packed = pack(state, hp, coarsen, quantizer, machine)
        excess = packed.size - budget
        if abs(excess) <= max(50, budget / 5000):
            break
        coarsen *= 2 ** (8 * excess / packed.num_coded)
    return packed, coarsen


# ---- the quantisers


class Falling(t.Curvature):
    """The curvature `like` with other step sizes. The columns are sorted by falling moment, as
    `like` sorts them."""

    scale_C = 1.0  # what the columns are multiplied by before they are rounded

    def __init__(self, like: t.Curvature, deltas):
        super().__init__(like.inputs_CC, like.outputs_R)
        self.like = like
        self.given_deltas = deltas

    @property
    def deltas(self):
        return self.given_deltas

    @property
    def factors(self):
        return self.like.factors  # which keeps them for all rows of the table


class Ranked(Falling):
    """The columns are sorted by falling `rank`, a whole number that a file can hold: here twice the
    logarithm of the moment."""

    @property
    def rank_C(self):
        return (2 * self.inputs_CC.diagonal().clamp_min(1e-30).log2()).round()

    @cached_property
    def factors(self):
        H_CC = self.inputs_CC.double()
        perm_C = self.rank_C.argsort(descending=True, stable=True)
        H_CC = H_CC[perm_C][:, perm_C]
        H_CC = H_CC + 0.01 * H_CC.diagonal().mean() * torch.eye(len(H_CC))
        inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(H_CC))
        return perm_C, torch.linalg.cholesky(inverse_CC, upper=True).float()


class Natural(Ranked):
    """The columns in their own order."""

    @property
    def rank_C(self):
        return torch.zeros(len(self.inputs_CC))


class Rising(Ranked):
    """The columns are sorted by rising moment."""

    @property
    def rank_C(self):
        return (-2 * self.inputs_CC.diagonal().clamp_min(1e-30).log2()).round()


class Columns(Natural):
    """A step size per column too, a power of 2^(1/4), at which an error of one step costs equally
    in every column."""

    def __init__(self, like: t.Curvature, deltas):
        super().__init__(like, deltas)
        self.natural = Natural(like, deltas)

    @cached_property
    def exponents_C(self):
        _, factor_CC = self.natural.factors
        cost_C = -factor_CC.diagonal().log2()  # half the log of what an error of 1 costs
        return (4 * (cost_C - cost_C.mean())).round()

    @cached_property
    def scale_C(self):
        return torch.exp2(self.exponents_C / 4)

    @cached_property
    def factors(self):
        perm_C, factor_CC = self.natural.factors
        return perm_C, factor_CC * self.scale_C

    @cached_property
    def deltas(self):
        """The given ones, corrected: the scaled columns change what an error of 1 costs on
        average."""
        before, now = (c.factors[1].diagonal().pow(-2).mean() for c in (self.like, self))
        return self.given_deltas * (before / now).sqrt()


ORDERS = {"natural": Natural, "rising": Rising, "columns": Columns}


class Searched(t.GPTQ):
    """GPTQ's step sizes, codes by `search`. Without `compensates` the columns are independent.
    `base`: what `gptq` gives at the same bytes, whose frequency tables tell how many bits a code
    takes; needed with a `rate`."""

    def __init__(self, state, hp, curvature, machine, compensates=True, rate=0.0, base=None):
        super().__init__(state, hp, curvature)
        self.machine = machine
        self.compensates = compensates
        self.rate = rate
        self.tables = base.tables if rate else {}
        self.price = Prices(base.freqs) if rate else None

    def quantize(self, name: str, w_RC, coarsen: float):
        c = self.curvature[name]
        w_RC = w_RC * c.scale_C
        delta = self.delta(name, w_RC, coarsen)
        wanted = c.deltas * (self.scale * coarsen)
        error_cost_R = (delta / wanted)[:, 0].square()
        perm_C, factor_CC = c.factors
        if not self.compensates:
            d_C = c.inputs_CC.diagonal()[perm_C]
            factor_CC = (d_C + 0.01 * d_C.mean()).rsqrt().diag()
        tables = None
        if self.rate:
            tables = torch.from_numpy(self.tables[name].T[perm_C.numpy()].astype(np.int64))
        codes_CR = torch.empty_like(w_RC.T)
        codes_CR[perm_C] = search(
            w_RC.T[perm_C],
            delta[:, 0],
            error_cost_R,
            factor_CC,
            self.machine,
            self.price,
            tables,
            self.rate,
        )
        return codes_CR.T.contiguous(), delta


def kind_of(name: str) -> str:
    """The KIND of a row `KIND:F` that means this matrix."""
    if not name.startswith("blocks"):
        return name.split(".")[0]
    return "down" if name.endswith("mlp.proj.weight") else name.split(".")[3]


class Study:
    """All rows of one model at one number of bytes. Only matrices whose names match `only` are
    rounded."""

    def __init__(self, judge, only: str, bits: int, coarsen: float | None):
        self.judge = judge
        self.state = {name: w for name, w in judge.state.items() if re.search(only, name)}
        self.hp, self.budget = quantizers.budget_of(bits, self.state, judge.model.hp)
        self.curvature = {name: c for name, c in judge.curvature.items() if name in self.state}
        self.label = f"{bits} bits"
        if coarsen:
            self.budget = pack(self.state, self.hp, coarsen, *self.quantizer("gptq")).size
            self.label = f"coarsen {coarsen}"
        self.fitted = {}  # label -> (Packed, coarsen)
        self.costs = {}  # label -> KL of each target

    def changed(self, kind=Falling, change=lambda name, deltas: deltas) -> dict[str, Falling]:
        """The curvature of `kind`, with its step sizes changed up to a common factor. Tables get no
        step sizes by column, as 8 bits are the most they can have."""
        found = {}
        for name, c in self.curvature.items():
            is_table = t.parameter_row(name).kind == "table"
            own_kind = Natural if kind is Columns and is_table else kind
            found[name] = own_kind(c, change(name, c.deltas))
        return found

    def quantizer(self, label: str) -> tuple[t.GPTQ, Machine]:
        """The quantiser of a row, and the machine that goes with it."""
        if label == "gptq-columns":
            label = "beam1-columns"  # only a search scales the columns
        name, _, number = label.partition(":")
        name, _, ending = name.partition("-")
        found = re.fullmatch(r"(beam|trellis)(\d+)", name)
        if found:
            rate = float(number or 0)
            is_trellis = found[1] == "trellis"
            machine = Machine(int(found[2])) if is_trellis else Machine(1, int(found[2]))
            curvature = self.changed(ORDERS.get(ending, Ranked if is_trellis else Falling))
            base = None
            if rate:
                base, _ = self.fit(label.partition(":")[0] if is_trellis else "gptq")
            options = (machine, ending != "grid", rate, base)
            return Searched(self.state, self.hp, curvature, *options), machine
        if name == "gptq":
            curvature = self.changed(ORDERS.get(ending, Falling))
        elif name == "sdclip":
            curvature = self.changed(change=lambda n, _: self.state[n].std(1, keepdim=True))
        elif name == "flat":
            curvature = self.changed(change=lambda _, deltas: deltas / deltas.log().mean().exp())
        else:
            factor = float(number)
            curvature = self.changed(
                change=lambda n, deltas: deltas * (factor if kind_of(n) == name else 1.0)
            )
        quantizer = quantizers.Grid if ending == "grid" else t.GPTQ
        return quantizer(self.state, self.hp, curvature), Machine(1)

    def fit(self, label: str) -> tuple[Packed, float]:
        """What `fit` gives for a row, found once."""
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
    parser.add_argument("--only", default="", help="round only names that match this pattern")
    parser.add_argument("--coarsen", type=float, help="bytes of gptq at this factor, not of --bits")
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
