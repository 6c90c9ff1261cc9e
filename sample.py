"""
Let a GPT-2 write.

    python sample.py --model gpt2 --prompt "Hello, I'm a language model,"
    python sample.py --model log --num_samples 3 --max_new_tokens 100      # the newest checkpoint of a run
"""

from dataclasses import dataclass
from typing import Literal

import torch

from shards import InputError, get_encoding, run_command
from train_gpt2 import GPT, PROMPT, check_vocabulary, choose_device


@dataclass(frozen=True)
class SampleConfig:
    """Print text that a GPT-2 writes after a prompt."""

    model: str = "gpt2"  # a Hub name (gpt2, gpt2-medium, ...), a checkpoint folder, or a run's folder
    prompt: str = PROMPT  # what the text begins with; empty: a new document
    num_samples: int = 5
    max_new_tokens: int = 30  # tokens after the prompt
    top_k: int = 50  # sample among the k most likely tokens; 0: among all
    temperature: float = 1.0  # below 1 safer, above 1 wilder; 0 always takes the most likely token
    seed: int = 42  # same seed, same text
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(config: SampleConfig) -> None:
    for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("top_k", 0), ("temperature", 0)):
        if getattr(config, name) < least:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least {least}")
    device = choose_device(config.device)
    model = GPT.from_pretrained(config.model).to(device)
    encoding = get_encoding(model.config.encoding)
    check_vocabulary(model.config, encoding)
    prompt = encoding.encode_ordinary(config.prompt) or [encoding.eot_token]
    idx = torch.tensor([prompt] * config.num_samples, device=device)
    dtype = getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        rows = model.generate(idx, config.max_new_tokens, temperature=config.temperature,
                              top_k=config.top_k or None, seed=config.seed).tolist()  # fmt: skip
    for row in rows:
        written = row[len(prompt) :]
        if encoding.eot_token in written:  # the document ends here
            written = written[: written.index(encoding.eot_token)]
        print("> " + config.prompt + encoding.decode(written))


if __name__ == "__main__":
    run_command(main, SampleConfig)
