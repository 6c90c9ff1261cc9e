"""
Read and write transformers' model folders: config.json, model.safetensors, the tokenizer's files.

Sizes and tensors are plain values here; `GPT.from_pretrained` and `GPT.save_pretrained` give them meaning.
"""

import difflib
import functools
import json
import operator
import os
import sys
from pathlib import Path
from typing import Any, TypedDict

from support.cli import InputError
from support.data.encodings import END_OF_TEXT, get_encoding, letters, merges
from support.data.hub import model_files
from support.files import to_json

import safetensors
import safetensors.torch
import torch

CARD = "README.md"  # the model card
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names that work without an owner
ARCHITECTURE = {  # the entries of config.json that define a GPT-2
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,  # 4 * n_embd
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


class Sizes(TypedDict):
    """The architecture of a GPT-2: the fields of GPTConfig."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    encoding: str


# -----------------------------------------------------------------------------
# finding and reading


def find_model(name_or_folder: str | Path) -> tuple[Path, Path]:
    """Find config.json and model.safetensors: in a folder, in a run's newest checkpoint, or on the Hub.

    Raises InputError if there is no such model, with a suggestion where possible.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            if checkpoints := list_checkpoints(folder):
                folder = checkpoints[-1]
            elif runs := [path for path in sorted(folder.iterdir()) if list_checkpoints(path)]:
                raise InputError(f"{folder} is not a model; did you mean {' or '.join(map(str, runs[:3]))}?")
            elif (folder / "log.txt").exists():
                raise InputError(f"{folder} is a run without a checkpoint: there is no model in it")
        for file in (folder / "config.json", folder / "model.safetensors"):
            if not file.exists():
                raise InputError(f"{folder} is not a model: it has no {file.name}")
        return folder / "config.json", folder / "model.safetensors"
    name = str(name_or_folder)
    if name.startswith((".", "/", "~", "log/")) or name.count("/") > 1:
        similar = difflib.get_close_matches(name, map(str, Path("log").glob("*")), n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise InputError(f"there is no folder {name}{hint}")
    if folder.exists():
        raise InputError(f"{name} is a file; a model is a folder, or a name on the Hub")
    repository = f"openai-community/{name}" if name in OPENAI_MODELS else name
    if os.environ.get("RANK", "0") == "0":
        print(f"looking for {repository} on the Hugging Face Hub", file=sys.stderr)
    runs = [run for run in (Path("log", name), Path("log"), Path("log/demo")) if list_checkpoints(run)]
    hint = f"; did you mean {runs[0]}?" if runs else ""
    return model_files(repository, f"the model {name!r} (no folder here has that name{hint})")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint_"))


def list_checkpoints(log_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in log_dir.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdigit()]
    return sorted(found, key=step_of)


def read_sizes(config_file: Path) -> Sizes:
    """The sizes in a Hugging Face config.json. Raises InputError if it does not describe a GPT-2."""
    try:
        stored = json.loads(config_file.read_text(encoding="utf-8"))
        sizes: Sizes = {
            "block_size": operator.index(stored["n_positions"]),
            "vocab_size": operator.index(stored["vocab_size"]),
            "n_layer": operator.index(stored["n_layer"]),
            "n_head": operator.index(stored["n_head"]),
            "n_embd": operator.index(stored["n_embd"]),
            "encoding": stored.get("encoding", "gpt2"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{config_file}: not the configuration of a GPT-2 ({type(error).__name__}: {error})"
        ) from error
    for key, value in ARCHITECTURE.items():
        if stored.get(key, value) not in (value, 4 * sizes["n_embd"] if key == "n_inner" else value):
            raise InputError(f"{config_file}: {key} is {stored[key]!r}, a GPT-2 has {value!r}")
    return sizes


def read_tensors(weights_file: Path) -> dict[str, torch.Tensor]:
    """The weights in a safetensors file, under transformers' names.

    The tied head is left out, and so are the masks that old releases stored. Raises InputError for any other
    file; pickles are never opened.
    """
    try:
        tensors = safetensors.torch.load_file(weights_file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{weights_file}: not a sound safetensors file ({error})") from error
    return {
        "transformer." + name.removeprefix("transformer."): tensor  # OpenAI's own files lack the prefix
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))
    }


# -----------------------------------------------------------------------------
# writing


def write_model(folder: Path, sizes: Sizes, tensors: dict[str, torch.Tensor]) -> None:
    """Write config.json, generation_config.json, model.safetensors, for the gpt2 encoding the tokenizer, and
    a short model card unless there is one.

    Args:
        tensors: float32, under transformers' names and in its layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    end_of_text = sizes["vocab_size"] - 1  # the last id in both encodings
    special_tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    texts = {"config.json": to_json({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["block_size"], "n_ctx": sizes["block_size"], "n_embd": sizes["n_embd"],
        "n_layer": sizes["n_layer"], "n_head": sizes["n_head"], "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "scale_attn_weights": True,
        "tie_word_embeddings": True, "torch_dtype": "float32", **special_tokens,
        "encoding": sizes["encoding"],
    })}  # fmt: skip
    texts["generation_config.json"] = to_json({**special_tokens, "_from_model_config": True})
    if sizes["encoding"] == "gpt2":
        texts |= tokenizer_files(sizes["block_size"])
    if not (folder / CARD).exists():
        n_parameters = sum(tensor.numel() for tensor in tensors.values())
        texts[CARD] = short_card(n_parameters, sizes["encoding"], sizes["block_size"])
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@functools.cache
def tokenizer_files(model_max_length: int) -> dict[str, str]:
    """GPT-2's tokenizer in the files (name to text) that `AutoTokenizer.from_pretrained` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letter_of = letters()
    ranks = get_encoding("gpt2")._mergeable_ranks  # token bytes to id
    vocabulary = {"".join(letter_of[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its pattern is GPT-2's
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model_max_length, **special_tokens,
                "add_prefix_space": False, "clean_up_tokenization_spaces": False}  # fmt: skip
    stored = json.loads(tokenizer.to_str())
    stored["model"]["merges"] = [" ".join(pair) for pair in merges()]  # the only form that old releases read
    return {"tokenizer.json": to_json(stored), "tokenizer_config.json": to_json(settings)}


# -----------------------------------------------------------------------------
# the model card of a model of whose training nothing is known; support/run/card.py has that of a run

WITH_TOKENIZER = """\
```python
from transformers import pipeline

write = pipeline("text-generation", ".")  # this folder; or the model's name on the Hub
print(write("Hello, I'm a language model,", max_new_tokens=NEW)[0]["generated_text"])
```
"""
WITH_BYTES = """\
Its tokens are bytes: ids 0 to 255, and 256 ends a text. There is no tokenizer to load.

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # this folder; or the model's name on the Hub
tokens = model.generate(torch.tensor([list(b"Hello")]), max_new_tokens=NEW, do_sample=True)[0].tolist()
print(bytes(token for token in tokens if token < 256).decode(errors="replace"))
```
"""


def short_card(n_parameters: int, encoding: str, block_size: int) -> str:
    """The card of a model of whose training nothing is known."""
    name = model_name(n_parameters)
    first = f"A GPT-2 of {n_parameters:,} parameters. Its training is not recorded here."
    return "\n".join([
        metadata(encoding), f"# {name}\n", f"{first}\n",
        "## How to use it\n", how_to_use(encoding, block_size),
        "## Limits\n", limits(block_size),
    ])  # fmt: skip


def metadata(encoding: str, **known: Any) -> str:
    """The block at the top, which the Hub reads."""
    from huggingface_hub import ModelCardData

    library = "transformers" if encoding == "gpt2" else None  # its pipelines need a tokenizer
    data = ModelCardData(library_name=library, pipeline_tag="text-generation", **known)
    return f"---\n{data.to_yaml()}\n---\n"


def model_name(n_parameters: int) -> str:
    millions = n_parameters / 1e6
    return f"GPT-2, {f'{millions:,.0f}' if millions >= 10 else f'{millions:.2g}'}M parameters"


def how_to_use(encoding: str, block_size: int) -> str:
    """Code that runs as it stands in the folder."""
    code = WITH_TOKENIZER if encoding == "gpt2" else WITH_BYTES
    return code.replace("NEW", f"{min(100, block_size // 2)}")


def limits(block_size: int, epochs: float = 0) -> str:
    lines = [
        f"It continues text, and sees at most the last {block_size:,} tokens. It was not taught to follow "
        "instructions.",
        "It may write what is false, biased or offensive, as its training text may; nothing was done "
        "against that.",
    ]
    if epochs >= 1.5:
        lines.append(f"It has read its training text {epochs:.1f} times, and may repeat parts word for word.")
    return "".join(f"- {line}\n" for line in lines)
