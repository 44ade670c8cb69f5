"""Two hosts: two torchrun agents on this machine's loopback, one rank each, each in a folder of its
own, are the run of two ranks under one agent."""

import contextlib
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from helpers import SCRIPT, finish, start_script


@contextlib.contextmanager
def reserved_port():
    """A port that nobody else is given: it is taken here, yet free for torchrun's store to listen
    on, since both allow its reuse."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def start_host(cwd: Path, number: int, port: int, env: dict) -> subprocess.Popen:
    """README's launch line on host `number` of 0 and 1. What torchrun would find out by the hosts'
    names it is told: host 0, the endpoint, keeps the store; ranks follow the addresses."""
    arguments = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-conf=is_host={number == 0}",
        f"--local-addr=127.0.0.{number + 1}",
        str(SCRIPT),
    ]
    torchrun = cwd.with_suffix(".py")
    torchrun.write_text(f"from torch.distributed.run import main\nmain({arguments})\n")
    return start_script(cwd, 0, torchrun, **env)


def run_on_two_hosts(folder: Path, **env) -> list[subprocess.CompletedProcess]:
    """What the agents in `folder`/0 and `folder`/1 came to; none outlives the call."""
    with reserved_port() as port:
        agents = []
        try:
            for number in (0, 1):
                cwd = folder / str(number)
                cwd.mkdir(exist_ok=True)
                agents.append(start_host(cwd, number, port, env))
            return [finish(agent) for agent in agents]
        finally:
            for agent in agents:
                if agent.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        finish(agent, 0)


def log_of(cwd: Path) -> str:
    """The log without the source at its beginning."""
    return (cwd / "logs/test.txt").read_text().split("=" * 100 + "\n")[-1]


def files(cwd: Path) -> list[str]:
    return sorted(str(path.relative_to(cwd)) for path in cwd.rglob("*") if path.is_file())


# ---- the same run


@pytest.fixture(scope="module")
def hosts(corpus, tmp_path_factory):
    """A run on two hosts: (their folders, what they said)."""
    folder = tmp_path_factory.mktemp("hosts")
    done = run_on_two_hosts(folder, **corpus)
    assert [host.returncode for host in done] == [0, 0], done[0].stderr[-3000:]
    return [folder / "0", folder / "1"], done


def test_two_hosts_give_the_scores_of_two_ranks_on_one(hosts, runs):
    """Every digit of every final line."""

    def scores(cwd):
        return re.sub(r" \w+_time:\S+", "", "\n".join(re.findall("^final_.*", log_of(cwd), re.M)))

    (first, _), _ = hosts
    expected = scores(runs[2][0])
    assert expected.count("val_bpb:") == 4
    assert scores(first) == expected


def test_two_hosts_give_the_losses_of_two_ranks_on_one(hosts, runs):
    def losses(cwd):
        return re.findall(r"^step:\S+ train_loss:\S+", log_of(cwd), re.M)

    (first, _), _ = hosts
    expected = losses(runs[2][0])
    assert len(expected) == 12
    assert losses(first) == expected


def test_two_hosts_give_the_artifact_of_two_ranks_on_one(hosts, runs):
    (first, _), _ = hosts
    expected = (runs[2][0] / "logs/test.int6.ptz").read_bytes()
    assert (first / "logs/test.int6.ptz").read_bytes() == expected


def test_the_first_host_has_the_log_and_the_artifact(hosts):
    (first, _), _ = hosts
    assert files(first) == ["final_model.int6.ptz", "logs/test.int6.ptz", "logs/test.txt"]


def test_the_second_host_needs_and_writes_no_file(hosts):
    """Its rank scored the artifact's weights, which it got from the first."""
    (_, second), _ = hosts
    assert list(second.iterdir()) == []


def test_the_second_host_says_nothing(hosts):
    _, (_, second) = hosts
    # torch 2.9's gloo says on stdout who is connected
    assert [line for line in second.stdout.splitlines() if not line.startswith("[Gloo]")] == []


# ---- another data file


@pytest.fixture(scope="module")
def unequal(corpus, tmp_path_factory):
    """A run in which one token of a shard is another on the second host."""
    folder = tmp_path_factory.mktemp("unequal")
    for number in (0, 1):
        shutil.copytree(corpus["DATA_PATH"], folder / str(number) / "data")
    with (folder / "1/data/fineweb_train_000001.bin").open("r+b") as shard:
        shard.seek(2000)
        token = shard.read(1)[0]
        shard.seek(2000)
        shard.write(bytes([token ^ 1]))
    done = run_on_two_hosts(folder, **{**corpus, "DATA_PATH": "data"})
    return [folder / "0", folder / "1"], done


def test_the_rank_whose_data_file_is_another_is_named_in_one_line(unequal):
    _, (first, _) = unequal
    assert re.findall("^train_gpt.py: error: .*", first.stderr, re.M) == [
        "train_gpt.py: error: rank 1: data files differ from rank 0's: "
        "use the same files and settings everywhere"
    ]


def test_after_another_data_file_both_hosts_fail(unequal):
    """Neither waits for the other."""
    _, done = unequal
    assert [host.returncode for host in done] == [1, 1]


def test_after_another_data_file_no_host_has_an_artifact(unequal):
    folders, _ = unequal
    assert [path for cwd in folders for path in cwd.rglob("*.ptz")] == []
