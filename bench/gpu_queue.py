"""The parts of bench/gpu_queue.sh that are easier to say in Python.

python -m bench.gpu_queue unpack DATA OUT [--tiny]   text of data/gpu as the loader expects it
python -m bench.gpu_queue shorten IN OUT             the first tokens of a validation stream
python -m bench.gpu_queue attention                  ms of torch's attention, FlashAttention 4's
python -m bench.gpu_queue summary STATE              a table of all finished runs
"""

import argparse
import json
import lzma
import re
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HEADER = 1024  # bytes
SHORT = 65_536  # tokens
TINY_TRAIN, TINY_VAL = 200_000, 20_000  # tokens of each shard


# --- text -----------------------------------------------------------------------------------------


def write_shard(path: Path, shard: bytes, most: int | None) -> None:
    """The first `most` tokens of `shard`, or all, with a header that says how many."""
    header = np.frombuffer(shard[:HEADER], "<i4").copy()
    header[2] = min(header[2], most or header[2])
    path.write_bytes(header.tobytes() + shard[HEADER : HEADER + 2 * int(header[2])])


def read(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def unpack(data: Path, out: Path, tiny: bool = False) -> None:
    """OUT/docs and OUT/fineweb: fineweb_{train,val}_*.bin. OUT appears when all is there."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    sources = {"docs": data / "docs", "fineweb": data / "fineweb_sample"}
    tasks = []
    for name, source in sources.items():
        (part / name).mkdir(parents=True)
        for path in sorted(source.glob("*_[0-9]*.bin*")):
            kind, number = re.search(r"_(train|val)_(\d+)\.bin", path.name).groups()
            most = (TINY_TRAIN if kind == "train" else TINY_VAL) if tiny else None
            tasks.append((path, part / name / f"fineweb_{kind}_{number}.bin", most))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda task: write_shard(task[1], read(task[0]), task[2]), tasks))
    part.rename(out)


def shorten(source: Path, out: Path) -> None:
    """OUT/fineweb_val_000000.bin: the beginning of that of SOURCE."""
    out.mkdir(parents=True, exist_ok=True)
    name = "fineweb_val_000000.bin"
    write_shard(out / name, (source / name).read_bytes(), SHORT)


# --- attention ------------------------------------------------------------------------------------


def attention() -> None:
    """Print ms of causal attention in the shape of one GPU's eighth of a batch, forward alone and
    with backward: torch's own and, where it is installed, FlashAttention 4's."""
    import torch

    from bench.step import flash_attention_4, timed
    from tools.common import t

    on_gpu = torch.cuda.is_available()
    B, T, H, G, K = (48, 2048, 8, 4, 64) if on_gpu else (1, 64, 2, 1, 8)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    q, k, v = (
        torch.randn(B, T, heads, K, device=device, dtype=dtype, requires_grad=True)
        for heads in (H, G, G)
    )
    upstream = torch.randn_like(q)
    found = {"torch's own": None, "FlashAttention 4": flash_attention_4()}
    found = {name: flash for name, flash in found.items() if flash or name == "torch's own"}

    def both(flash):
        return torch.autograd.grad(t.causal_attention(q, k, v, flash), (q, k, v), upstream)

    exact = both(None)
    print(f"causal attention, ({B}, {T}, {H}/{G}, {K}), {dtype}, medians of 5\n")
    print(f"{'':20} {'forward ms':>11} {'and backward':>13} {'gradients differ by':>20}")
    for name, flash in found.items():
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(both(flash), exact))
        calls = (lambda f=flash: t.causal_attention(q, k, v, f)), (lambda f=flash: both(f))
        forward, whole = (
            1e3 * statistics.median(timed(call, 10) for _ in range(5)) for call in calls
        )
        print(f"{name:20} {forward:>11.3f} {whole:>13.3f} {error:>20.4f}")


# --- results --------------------------------------------------------------------------------------


def summary(state: Path) -> None:
    """Print a row for each run whose log has a result: a resumed run's last log has it."""
    print(
        f"{'run':26} {'steps':>6} {'ms/step':>8} {'no overlap':>11} {'stride':>7} {'neural':>9} "
        f"{'mixed':>9}   bits per byte, file read back"
    )
    for folder in sorted(state.glob("*/logs")):
        logs = sorted(folder.glob(f"{folder.parent.name}*.txt"), key=lambda path: len(path.name))
        text = "\n".join(path.read_text(errors="replace").split("=" * 100, 1)[-1] for path in logs)
        result = re.search(r"^result (.*)", text, re.M)
        if not result:
            continue
        facts = json.loads(result[1])
        speed = re.findall(r"step_avg:([\d.]+)ms", text)
        whole = re.findall(r"^final_int\d_roundtrip_exact .*val_bpb:([\d.]+)", text, re.M)
        print(
            f"{folder.parent.name:26} {facts['steps']:>6} {speed[-1] if speed else '-':>8} "
            f"{whole[-1][:9]:>11} {facts['stride_tokens']:>7} "
            f"{facts['neural_bits_per_byte']:>9.5f} {facts.get('mixed_bits_per_byte', '-')!s:>9.9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_queue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, places in dict(
        unpack="data out", shorten="source out", attention="", summary="state"
    ).items():
        command = commands.add_parser(name)
        for place in places.split():
            command.add_argument(place, type=Path)
        if name == "unpack":
            command.add_argument("--tiny", action="store_true")
    given = vars(parser.parse_args())
    command = given.pop("command")
    globals()[command](**given)


if __name__ == "__main__":
    main()
