"""Two hosts, imitated by two network namespaces with a cable between them: one is cut off for a while, and a
model is divided within each.

Needs Linux, root and iproute2 (`apt-get install iproute2`).
"""

import os
import shutil
import subprocess
import sys
import time

from conftest import ROOT, TINY, run
from support.files import sha256
from support.model.huggingface import list_checkpoints
from support.run.curves import read_log

import pytest

HOSTS = tuple(f"gpt2-{os.getpid()}-{name}" for name in "ab")  # other tests may run at the same time
ADDRESSES = ("10.79.31.1", "10.79.31.2")


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture
def two_hosts():
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs root and iproute2 to make network namespaces")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip(
            "link",
            "add",
            "gpt2-a",
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            "name",
            "gpt2-b",
            "netns",
            HOSTS[1],
        )
        for host, address, cable in zip(HOSTS, ADDRESSES, ("gpt2-a", "gpt2-b"), strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", host, "link", "set", cable, "up")
            ip("-n", host, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for host in HOSTS:
            ip("netns", "del", host, check=False)
        pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
    yield
    for host in HOSTS:
        ip("netns", "del", host, check=False)


def start_hosts(flags, faults="", processes=1):
    """torchrun on both hosts; returns the two launchers."""
    launchers = []
    for host, cable in zip(HOSTS, ("gpt2-a", "gpt2-b"), strict=True):
        command = [
            "ip",
            "netns",
            "exec",
            host,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--nproc_per_node={processes}",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={ADDRESSES[0]}:29471",
            f"--rdzv_conf=is_host={int(host == HOSTS[0])}",
            "--rdzv_id=test",
            f"--local_addr={ADDRESSES[HOSTS.index(host)]}",
            ROOT / "tests/faults.py",
            *flags,
        ]
        env = {
            **os.environ,
            "FAULTS": faults,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": cable,
        }
        launchers.append(
            subprocess.Popen(
                list(map(str, command)), env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return launchers


@pytest.mark.slow
def test_one_of_two_hosts_is_cut_off_and_the_run_goes_on_later(two_hosts, text_shards, tmp_path):
    common = (
        *TINY,
        f"--data_dir={text_shards}",
        "--max_steps=30",
        "--val_every=10",
        "--sample_every=0",
        "--checkpoint_every=5",
        "--micro_batch_size=4",
    )
    run("train_gpt2.py", *common, f"--log_dir={tmp_path / 'one'}")
    flags = (*common, f"--log_dir={tmp_path / 'two'}", "--timeout_minutes=0.25")
    steps = tmp_path / "steps"
    hosts = start_hosts(flags, f"slow=0.1 step_file={steps}")
    while not (steps.exists() and int(steps.read_text() or 0) >= 8):
        time.sleep(0.05)
        assert all(host.poll() is None for host in hosts), [host.communicate()[1][-2000:] for host in hosts]
    ip("-n", HOSTS[1], "link", "set", "gpt2-b", "down")
    cut_off = time.monotonic()
    errors = [hosts[0].communicate(timeout=120)[1]]
    print(f"the host with the store ended {time.monotonic() - cut_off:.0f} s after the cut")
    time.sleep(10)  # the other's launcher waits for its network, its worker does not
    ip("-n", HOSTS[1], "link", "set", "gpt2-b", "up")
    errors.append(hosts[1].communicate(timeout=200)[1])
    print(f"the other ended {time.monotonic() - cut_off:.0f} s after the cut")
    assert all(host.returncode != 0 for host in hosts)
    assert all("lost contact with another process" in error for error in errors), errors
    assert list_checkpoints(tmp_path / "two")
    hosts = start_hosts((*flags, "--resume"))
    outputs = [host.communicate(timeout=240) for host in hosts]
    assert all(host.returncode == 0 for host in hosts), outputs
    assert sum(out.count("resuming at step") for out, _ in outputs) == 1
    one, two = read_log(tmp_path / "one/log.txt"), read_log(tmp_path / "two/log.txt")
    for kind in ("train", "val"):
        assert [step for step, _ in one[kind]] == [step for step, _ in two[kind]]
        for (_, a), (_, b) in zip(one[kind], two[kind], strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1.01e-6), ("muon", 1e-5)])
def test_a_model_divided_within_two_hosts(optimizer, tolerance, two_hosts, text_shards, tmp_path):
    """Two processes on each: the losses are those of DDP, the main process saves, and --resume goes on."""
    flags = (*TINY, f"--data_dir={text_shards}", "--max_steps=20", "--val_every=10", "--sample_every=10",
             "--checkpoint_every=10", "--micro_batch_size=1", f"--optimizer={optimizer}")  # fmt: skip

    def go(way, *more):
        hosts = start_hosts((*flags, f"--log_dir={tmp_path / way}", *more), processes=2)
        outputs = [host.communicate(timeout=300) for host in hosts]
        assert all(host.returncode == 0 for host in hosts), outputs
        return "".join(out for out, _ in outputs)

    go("ddp")
    assert "divided among 2 processes" in go("shard", "--shard")
    ddp, shard = (read_log(tmp_path / way / "log.txt") for way in ("ddp", "shard"))
    assert len(shard["train"]) == 20
    for (_, a), (_, b) in zip(ddp["train"], shard["train"], strict=True):
        assert a == pytest.approx(b, abs=tolerance)  # log.txt has six digits
    last = list_checkpoints(tmp_path / "shard")[-1]
    whole = sha256(last / "model.safetensors"), (tmp_path / "shard/log.txt").read_bytes()
    shutil.rmtree(last)
    assert "resuming at step 10" in go("shard", "--shard", "--resume")
    assert (sha256(last / "model.safetensors"), (tmp_path / "shard/log.txt").read_bytes()) == whole


@pytest.mark.slow
def test_two_hosts_are_checked_in_step(two_hosts, text_shards, tmp_path):
    """--check runs phase after phase on both; no phase meets what the one before left in the store."""
    flags = (*TINY, f"--data_dir={text_shards}", f"--log_dir={tmp_path}/log", "--max_steps=40", "--check")
    hosts = start_hosts(flags, processes=2)
    outputs = [host.communicate(timeout=240) for host in hosts]
    assert all(host.returncode == 0 for host in hosts), outputs
    assert sum(out.count("resumed: the same digits") for out, _ in outputs) == 1
    assert sum("4 processes" in out for out, _ in outputs) == 1
    assert list(tmp_path.iterdir()) == []
