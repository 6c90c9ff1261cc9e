"""
Generate text with a GPT-2.

    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"
    python sample.py --model log --stream --max_new_tokens 200   # a run's newest checkpoint, word by word
    python sample.py --model log --prompt - < beginning.txt      # the prompt from standard input
"""

import codecs
import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

from support.cli import InputError, RunFault, run_command
from support.data.encodings import get_encoding
from support.machine.device import DeviceName, autocast_to, choose_device
from support.machine.processes import faults_in_one_line
from support.model.sampling import NOT_FINITE, PROMPT, convert_matrices, stream

import torch


@dataclass(frozen=True)
class SampleConfig:
    """Print text that a GPT-2 writes after a prompt. A text ends at <|endoftext|>, or after
    max_new_tokens."""

    model: str = "gpt2"
    """a Hub name (gpt2, gpt2-medium, ...), a checkpoint's or a run's folder, or a file such as ckpt.pt"""
    prompt: str = PROMPT
    """what the text begins with; -: read it from standard input; empty: a new document; <|endoftext|> in it
    is the token"""
    num_samples: int | None = None
    """how many texts; default: 5; 1 with --stream, and with --temperature 0, where all would be alike"""
    max_new_tokens: int | None = None  # tokens after the prompt; default: 30, of bytes 120
    top_k: int = 50  # sample among the k most likely tokens; 0: among all
    top_p: float = 1.0  # sample among the fewest tokens that have this probability together; 1: among all
    temperature: float = 1.0  # below 1 safer, above 1 wilder; 0 always takes the most likely token
    seed: int = 42  # same seed, same text
    stream: bool = False  # print the words of one sample as they come
    compile: bool = False  # on a GPU, compile the step for one token: starts slowly, then is faster
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    device: DeviceName = "auto"


@faults_in_one_line()
def main(config: SampleConfig) -> None:
    from train_gpt2 import GPT

    for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("top_k", 0), ("temperature", 0)):
        if (value := getattr(config, name)) is not None and value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    if not math.isfinite(config.temperature):
        raise InputError(f"--temperature {config.temperature}: must be a number")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"--seed {config.seed}: must be from 0 to {2**63 - 1}")
    if not 0 < config.top_p <= 1:
        raise InputError(f"--top_p {config.top_p}: must be above 0 and at most 1")
    n_texts = config.num_samples or (1 if config.stream or not config.temperature else 5)
    if config.stream and n_texts > 1:
        raise InputError(f"--stream with --num_samples {n_texts}: it shows one text as it is written")
    device = choose_device(config.device)
    model = GPT.from_pretrained(config.model).to(device).eval()
    encoding = get_encoding(model.config.encoding, model.config.vocab_size)
    n_new = config.max_new_tokens
    if n_new is None:
        n_new = 120 if encoding.name == "bytes" else 30  # about the same length of text

    prompt = config.prompt
    if prompt == "-":
        data = sys.stdin.buffer.read()
        encoded = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        prompt = data.decode(encoded, "replace").replace("\r\n", "\n")
    if prompt.endswith(" ") and encoding.name == "gpt2":
        print(
            "note: the prompt ends in a space; GPT-2's words begin with theirs: leave it out", file=sys.stderr
        )
    tokens = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    if len(tokens) > model.config.block_size:
        print(
            f"the prompt has {len(tokens):,} tokens; the model sees the last {model.config.block_size:,}",
            file=sys.stderr,
        )
    rows: list[list[int]] = [[] for _ in range(n_texts)]
    words = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
    if config.stream:
        print("> " + prompt, end="", flush=True)
    dtype = getattr(torch, config.dtype)
    convert_matrices(model, dtype)
    started, n_steps = time.perf_counter(), 0
    with autocast_to(device, dtype):
        for step in stream(
            model,
            torch.tensor([tokens] * n_texts, device=device),
            n_new,
            temperature=config.temperature,
            top_k=config.top_k or None,
            top_p=config.top_p,
            seed=config.seed,
            compile=config.compile,
        ):
            n_steps += 1
            for row, token in zip(rows, step.flatten().tolist(), strict=True):
                if token < 0:
                    raise RunFault(f"the logits are not finite; {NOT_FINITE}")
                if encoding.eot_token not in row[-1:]:  # an ended text stays as it is
                    row.append(token)
            if all(row[-1] == encoding.eot_token for row in rows):
                break
            if config.stream:
                print(words.decode(encoding.decode_single_token_bytes(rows[0][-1])), end="", flush=True)
    seconds = time.perf_counter() - started
    if config.stream:
        print(words.decode(b"", final=True))
    else:
        for row in rows:
            print("> " + prompt + encoding.decode([token for token in row if token != encoding.eot_token]))
    rate = f"{n_steps * n_texts / seconds:,.0f} tokens/s" if n_steps else "nothing to write"
    texts = f"{n_texts} text{'s' if n_texts > 1 else ''} of up to {n_steps} tokens"
    print(f"{texts} in {seconds:.2f} s: {rate}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main, SampleConfig, usual_flag="--model")
