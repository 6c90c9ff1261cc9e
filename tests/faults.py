"""
Not a test: `train_gpt2.py` with the faults named in $FAULTS, "name=value" separated by spaces.

    gradients=FILE        write the gradients that the optimizer is given to FILE + rank
    tokens=FILE           write a line per step and window to FILE + rank: the step, and a hash of the tokens
    nan=RANK:STEP         the loss of that rank is NaN from that step on
    nan_gradient=STEP     the gradients are NaN from that step on, the loss is not
    oom=ROWS[:CHUNKED]    more rows at once are out of memory (more than CHUNKED with the loss in chunks)
    oom_step=STEP         there is too little memory from that step on
    oom_rank=RANK         only there
    slow=SECONDS          every step takes so much longer
    slow_evaluation=SECONDS  every batch of an evaluation does
    slow_flush=SECONDS    every file of a checkpoint takes so much longer to be flushed to disk
    step_file=FILE        FILE holds the number of steps begun
    kill_at=N             SIGKILL at the N-th time that something is flushed to disk or renamed (status.json,
                          which the clock decides on, does not count)
    disk=BYTES            no file may grow beyond so many bytes: a full disk
    bytes=FILE            write the bytes of weights, gradients and moments in this process to FILE + rank
    backend=NAME          torch.compile is used on a CPU too, with this backend; "fails" is one that fails
    backend_rank=RANK     it fails only there
    hosts=N               the processes of this machine take themselves for those of N hosts
    unsharded_gradients=SHARE  see support/machine/sharding.py
    scale=SCALE           float16's first scale
"""

import hashlib
import os
import resource
import signal
import time
from pathlib import Path

import train_gpt2
from support.cli import run_command
from support.machine import device, sharding
from support.run import folder as run_folder

import torch
from torch.distributed.tensor import DTensor

faults = dict(fault.split("=", 1) for fault in os.environ["FAULTS"].split())
rank = os.environ.get("RANK", "0")

if "gradients" in faults:
    configure_optimizer = train_gpt2.configure_optimizer

    def dumping_optimizer(model, config, *more):
        optimizer = configure_optimizer(model, config, *more)

        def dump(*_):
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            torch.save(gradients, faults["gradients"] + rank)

        optimizer.register_step_pre_hook(dump)
        return optimizer

    train_gpt2.configure_optimizer = dumping_optimizer

if "bytes" in faults:
    plain_optimizer = train_gpt2.configure_optimizer

    def weighed_optimizer(model, config, *more):
        optimizer = plain_optimizer(model, config, *more)

        def weigh(*_):
            tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
            own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            Path(faults["bytes"] + rank).write_text(str(sum(t.numel() * t.element_size() for t in own)))

        optimizer.register_step_post_hook(weigh)
        return optimizer

    train_gpt2.configure_optimizer = weighed_optimizer

batch = train_gpt2.TokenLoader.batch


def faulty_batch(self, step, micro_step, B):
    x, y = batch(self, step, micro_step, B)
    fetched.append((step, x, y))  # ahead of use
    return x, y


train_gpt2.TokenLoader.batch = faulty_batch
fetched = []
forward = train_gpt2.GPT.forward
OOM = "CUDA out of memory. Tried to allocate 20.00 MiB"


def begin_micro_step(step, x, y):
    """What happens when these rows are used; returns whether the loss is to be NaN."""
    if "tokens" in faults:
        with open(faults["tokens"] + rank, "a") as file:
            for row in torch.cat((x, y[:, -1:]), dim=1):
                file.write(f"{step} {hashlib.sha256(row.numpy().tobytes()).hexdigest()}\n")
    if "step_file" in faults and rank == "0":
        Path(faults["step_file"]).write_text(str(step))
    time.sleep(float(faults.get("slow", 0)))
    if step >= int(faults.get("oom_step", 2**31)) and faults.get("oom_rank", rank) == rank:
        raise torch.OutOfMemoryError(OOM)
    bad_rank, bad_step = faults.get("nan", ":").split(":")
    return rank == bad_rank and step >= int(bad_step)


def faulty_forward(self, idx, targets=None):
    poisoned = False
    if torch.is_grad_enabled() and fetched:
        poisoned = begin_micro_step(*fetched.pop(0))
    if not torch.is_grad_enabled() and fetched:
        time.sleep(float(faults.get("slow_evaluation", 0)))
    if "oom" in faults and faults.get("oom_rank", rank) == rank:
        plain, chunked = map(int, (faults["oom"] + ":0").split(":")[:2])
        if len(idx) > (chunked if self.loss_chunks > 1 else plain):
            raise torch.OutOfMemoryError(OOM)
    loss = forward(self, idx, targets)
    return loss * float("nan") if poisoned else loss


train_gpt2.GPT.forward = faulty_forward

if "nan_gradient" in faults:
    clip = torch.nn.utils.clip_grad_norm_

    def clip_nan(parameters, largest):
        norm = clip(parameters, largest)
        return (
            norm * float("nan")
            if int(Path(faults["step_file"]).read_text()) >= int(faults["nan_gradient"])
            else norm
        )

    torch.nn.utils.clip_grad_norm_ = clip_nan

if "kill_at" in faults:
    left = [int(faults["kill_at"])]

    def killing(function):
        def wrapped(*arguments):
            left[0] -= "status.json" not in str(arguments[-1])
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapped

    run_folder.flush_to_disk = killing(run_folder.flush_to_disk)
    run_folder.os.rename = killing(os.rename)
    run_folder.os.replace = killing(os.replace)

if "slow_flush" in faults:
    flush = run_folder.flush_to_disk

    def slow_flush(path):
        time.sleep(float(faults["slow_flush"]))
        flush(path)

    run_folder.flush_to_disk = slow_flush
    run_folder.free_host_memory = lambda: 2**40  # also where the system does not report it

if "backend" in faults:
    compile_ = torch.compile

    def failing(*_):
        raise ValueError("the compiler is at a loss")

    backend = failing if faults["backend"] == "fails" else faults["backend"]
    if faults.get("backend_rank", rank) != rank:
        backend = "eager"
    torch.compile = lambda module, **options: compile_(module, **{**options, "backend": backend})
    device.choose_compile = lambda wanted, _: (wanted, "on")

if "hosts" in faults:
    on_host = int(os.environ["WORLD_SIZE"]) // int(faults["hosts"])
    os.environ["LOCAL_WORLD_SIZE"] = str(on_host)
    os.environ["LOCAL_RANK"] = str(int(rank) % on_host)

if "unsharded_gradients" in faults:
    sharding.UNSHARDED_GRADIENTS = float(faults["unsharded_gradients"])

if "scale" in faults:
    make_scaler = torch.amp.GradScaler

    def scaler(*arguments, **options):
        return make_scaler(*arguments, **{**options, "init_scale": float(faults["scale"])})

    torch.amp.GradScaler = scaler

if "disk" in faults:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(faults["disk"]), resource.RLIM_INFINITY))

if __name__ == "__main__":
    run_command(train_gpt2.main, train_gpt2.TrainConfig)
