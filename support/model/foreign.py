"""
Weights in all the forms that others give them, brought into one, without running any code of a file.

That one form is transformers': its names, one tensor for the tied embedding and head, and the layout of
OpenAI's "Conv1D".
"""

import re
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from support.cli import InputError, brief, in_words, speaks_for_host
from support.data.hub import parts_of
from support.files import check_not_pointer

import safetensors
import safetensors.torch
import torch

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
MASKS = (".attn.bias", ".attn.masked_bias")  # which old releases and nanoGPT stored
# What PyTorch's wrappers add to names.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LINEAR = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # matrices that nn.Linear has transposed
# Where a training script's checkpoint has its weights, and where its sizes; the first that is there.
WEIGHTS_IN = ("model", "model_state_dict", "state_dict")
SIZES_IN = ("model_args", "model_config", "config", "hyper_parameters")
SIZES = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}
HARMLESS = {"bias", "dropout"}  # `read_tensors` deals with the first; the second acts in training alone
# Classes whose objects are read as plain values: settings, and the numbers, paths and dates among them.
SETTINGS = re.compile(r"(Config|Args|Arguments|Namespace|Path|Version)$|^(numpy|datetime)\.")
REFUSED = "refused: it names code, {}; only tensors and plain values are read, such as a state_dict()"


class Settings:
    """Takes the place of a class that a checkpoint names, and only keeps the values."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


# -----------------------------------------------------------------------------
# reading


def unpickle(file: Path) -> dict[str, Any]:
    """What torch.save wrote. PyTorch's reader builds tensors and plain values only; tensors stay on the disk
    until they are used. Raises InputError for anything else, and for damage."""
    check_not_pointer(file)
    zipped = zipfile.is_zipfile(file)  # since PyTorch 1.6
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipped else []
        settings: list[Any] = [(Settings, name) for name in unknown if SETTINGS.search(name)]
        if others := sorted(name for name in unknown if not SETTINGS.search(name)):
            raise InputError(f"{file}: {REFUSED.format(', '.join(others[:3]))}")
        with torch.serialization.safe_globals(settings):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (InputError, OSError):
        raise
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = REFUSED.format(found[1]) if found else "damaged, or not written by torch.save"
        raise InputError(f"{file}: {what}") from error
    except Exception as error:  # damage shows in many ways
        raise InputError(f"{file}: damaged, or not written by torch.save ({brief(error)})") from error
    if not isinstance(saved, dict):
        raise InputError(f"{file}: holds no model, but a {type(saved).__name__}")
    return saved


def read_sizes(file: Path) -> dict[str, Any]:
    """The sizes in a training script's checkpoint, as entries of config.json. Raises InputError if there are
    none, or others beside them: they may change the model."""
    saved = unpickle(file)
    for key in SIZES_IN:
        sizes = getattr(saved.get(key), "__dict__", saved.get(key))  # of an object, or a dictionary
        if isinstance(sizes, dict) and sizes.keys() >= SIZES:
            break
    else:
        raise InputError(
            f"{file}: holds no sizes of a GPT-2 ({', '.join(map(str, [*saved][:5]))}); weights alone belong "
            "into a folder, as pytorch_model.bin beside a config.json"
        )
    for name, value in sizes.items():
        if name not in SIZES | HARMLESS and not (value is None or (isinstance(value, int) and not value)):
            raise InputError(
                f"{file}: {key} has {name} = {value!r}, which GPT-2 has not; if it does not change the "
                "model, put the weights into a folder, as pytorch_model.bin beside a config.json"
            )
    if key == "model_args" and speaks_for_host():
        note = "today's nanoGPT computes GELU exactly, GPT-2 and this program by tanh (0.0005 apart at most)"
        print(f"note: {file}: {note}", file=sys.stderr)
    return {**sizes, "n_positions": sizes["block_size"]}


def read_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of weights, or in the parts that an index names, as they are."""
    try:
        check_not_pointer(file)
        if file.suffix == ".json":
            parts = [read_file(file.with_name(name)) for name in parts_of(file)]
            return {name: tensor for part in parts for name, tensor in part.items()}
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a sound safetensors file ({error})") from error
    except OSError as error:
        raise InputError(in_words(error)) from error
    saved = unpickle(file)
    weights = next((saved[key] for key in WEIGHTS_IN if isinstance(saved.get(key), dict)), saved)
    if not all(isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in weights.items()):
        raise InputError(f"{file}: holds no weights ({', '.join(map(str, [*saved][:5]))})")
    return weights


# -----------------------------------------------------------------------------
# the one form


def read_tensors(weights_file: Path, vocab_size: int) -> dict[str, torch.Tensor]:
    """The weights of a GPT-2, whatever their form, under transformers' names and in its layout.

    What says nothing new is left out: a head that is the embedding's copy, causal masks, what wrappers add to
    names, and rows that only pad the vocabulary. The logits of the real tokens stay as they are. In a model
    that was trained with its padding, as the tutorial's is, the softmax leaves padding the little probability
    that training did not drive out; here the real tokens share it. A model without biases gets zeros.

    Raises InputError for a file of another kind, a head of its own, or weights that are not finite.
    """
    tensors = {plain_name(name): tensor for name, tensor in read_file(weights_file).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(MASKS)}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise InputError(f"{weights_file}: {name} is {tensor.dtype}; quantized weights are refused")
        total = tensor.sum(dtype=torch.float64)
        if not total.isfinite():  # a sum is finite only if all are; quicker than to ask each
            raise InputError(
                f"{weights_file}: {name} is not finite: its training diverged; take an earlier checkpoint"
            )
    head = tensors.pop(HEAD, None)
    if head is not None:
        embedding = tensors.setdefault(EMBEDDING, head)  # of two equal tensors, some keep the first name
        head, embedding = without_padding(head, vocab_size), without_padding(embedding, vocab_size)
        if not torch.equal(head.float(), embedding.float()):
            raise InputError(f"{weights_file}: lm_head.weight is not the embedding's copy, as in GPT-2")
    if EMBEDDING in tensors:
        tensors[EMBEDDING] = without_padding(tensors[EMBEDDING], vocab_size)
    first = tensors.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and len(first) > first.size(-1):  # (3 * n_embd, n_embd), as nn.Linear has it
        tensors = {name: t.t() if name.endswith(LINEAR) else t for name, t in tensors.items()}
    if not any(name.endswith(".bias") for name in tensors):
        inner = [name for name in tensors if name.startswith(("transformer.h.", "transformer.ln_f."))]
        for name in inner:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(tensors[name].size(-1))
    return tensors


def plain_name(name: str) -> str:
    """transformers' name of a tensor. OpenAI's own files lack the prefix."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("model.")
    return name if name == HEAD else "transformer." + name.removeprefix("transformer.")


def is_padding(rows: int, vocab_size: int) -> bool:
    """Whether a vocabulary of so many rows is one of `vocab_size`, padded for the sake of speed: up to a
    multiple of 8, 64, 128 or more. A row or two are tokens that someone has added."""
    return vocab_size < rows <= vocab_size + 1024 and rows % 8 == 0


def without_padding(rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return rows[:vocab_size] if is_padding(len(rows), vocab_size) else rows
