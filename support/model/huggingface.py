"""
Find models, and read and write transformers' folders: config.json, weights, the tokenizer's files.

Sizes and tensors are plain values here; `GPT.from_pretrained` and `GPT.save_pretrained` give them meaning.
The folder is GPT-2's, so a model whose code was changed into something else is marked as changed.
"""

import difflib
import functools
import json
import operator
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.cli import InputError, brief, speaks_for_host
from support.data.encodings import END_OF_TEXT, get_encoding, letters, merges
from support.data.hub import PICKLES, WEIGHTS, model_files, newest_pickle
from support.files import check_not_pointer, to_json
from support.model.foreign import is_padding, read_sizes
from support.model.foreign import read_tensors as read_tensors  # for GPT.from_pretrained

import safetensors.torch
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from train_gpt2 import GPT, GPTConfig

CARD = "README.md"  # the model card
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names that work without an owner
CHANGED = "changed-gpt2"  # the model_type of a model whose code is not GPT-2's any more
# The switches of transformers' GPT2Config that change the function, with the values that a GPT-2 may have.
ARCHITECTURE: dict[str, tuple[Any, ...]] = {
    # all of them GELU by tanh; without a name, transformers takes the first
    "activation_function": (
        "gelu_new",
        "gelu_pytorch_tanh",
        "gelu_python_tanh",
        "gelu_fast",
        "gelu_accurate",
    ),
    "layer_norm_epsilon": (1e-5,),
    "n_inner": (None,),  # or 4 * n_embd
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


# -----------------------------------------------------------------------------
# finding and reading


def find_model(name_or_folder: str | Path) -> tuple[Path, Path]:
    """Find the files with a model's configuration and weights: a file of weights itself, in a folder, in a
    run's newest checkpoint, or on the Hub. What another training script saved (ckpt.pt, model_19072.pt) is
    both files in one.

    Raises InputError if there is no such model, with a suggestion where possible.
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            folder = [folder, *list_checkpoints(folder)][-1]
        names = {path.name for path in folder.iterdir()}
        weights = [file for file in WEIGHTS if file in names]
        if "config.json" in names and weights:
            return folder / "config.json", folder / weights[0]
        if pickle := newest_pickle(names):
            return folder / pickle, folder / pickle
        missing = "model.safetensors" if "config.json" in names else "config.json"
        what = "a run without a checkpoint" if "log.txt" in names else f"not a model: it has no {missing}"
        raise InputError(f"{folder} is {what}{hint_at_runs(name, folder.iterdir())}")
    if folder.exists():
        if name.endswith(PICKLES):
            return folder, folder
        if name.endswith((".safetensors", ".bin", ".index.json")):
            config = folder.with_name("config.json")
            if not config.exists():
                raise InputError(f"{name} needs a config.json beside it, which says how many heads it has")
            return config, folder
        raise InputError(f"{name} is a file; a model is a folder, a file of weights, or a name on the Hub")
    hint = hint_at_runs(name, [Path("log"), *Path("log").glob("*")])
    is_file = name.endswith(PICKLES)
    if is_file or name.startswith((".", "/", "~", "log/")) or name.count("/") > 1:
        raise InputError(f"there is no {'file' if is_file else 'folder'} {name}{hint}")
    repository = f"openai-community/{name}" if name in OPENAI_MODELS else name
    if speaks_for_host():
        print(f"looking for {repository} on the Hugging Face Hub", file=sys.stderr)
    return model_files(repository, f"the model {name!r} (no folder here has that name{hint})")


def hint_at_runs(name: str, folders: Iterable[Path]) -> str:
    """A question: up to three of the folders that have checkpoints, or of the checkpoints of other scripts,
    the most similar name first."""
    runs = [str(path) for path in folders if list_checkpoints(path) or path.name.endswith(PICKLES)]
    closest = difflib.get_close_matches(name, runs, n=3, cutoff=0.0)
    return f"; did you mean {' or '.join(closest)}?" if closest else ""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint_"))


def list_checkpoints(log_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in log_dir.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdigit()]
    return sorted(found, key=step_of)


def tensor_table(tensors: dict[str, torch.Tensor]) -> str:
    """A table of a model's state dictionary: names, shapes, numbers of elements."""
    rows = [f"{name:36} {list(t.shape)!s:16} {t.numel():>12,}" for name, t in tensors.items()]
    total = sum(t.numel() for name, t in tensors.items() if name != "lm_head.weight")
    return "\n".join([*rows, f"{total:,} parameters; lm_head.weight is transformer.wte.weight"])


def read_config(config_file: Path, config_class: type["GPTConfig"]) -> dict[str, Any]:
    """The fields of GPTConfig that a Hugging Face config.json, or another script's checkpoint, has: the sizes
    of a GPT-2, and fields that were added to the class. Rows that pad the vocabulary are not counted.

    Raises InputError if it does not describe a GPT-2, or if the tokenizer beside it has other tokens.
    """
    is_pickle = config_file.name.endswith(PICKLES)
    try:
        stored = read_sizes(config_file) if is_pickle else read_json(config_file)
        same = ("vocab_size", "n_layer", "n_head", "n_embd")
        sizes: dict[str, Any] = {name: operator.index(stored[name]) for name in same}
        sizes["block_size"] = operator.index(stored["n_positions"])
        sizes["encoding"] = str(stored.get("encoding", "gpt2"))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{config_file}: not the configuration of a GPT-2 ({brief(error)})") from error
    if stored.get("model_type", "gpt2") not in ("gpt2", CHANGED):
        raise InputError(f"{config_file}: model_type is {stored['model_type']!r}, a GPT-2 has 'gpt2'")
    for key, values in ARCHITECTURE.items():
        value = stored.get(key, values[0])
        if value not in values and not (key == "n_inner" and value == 4 * sizes["n_embd"]):
            raise InputError(f"{config_file}: {key} is {value!r}, a GPT-2 has {values[0]!r}")
    if not is_pickle:
        check_tokenizer(config_file.parent, sizes["encoding"], sizes["vocab_size"])
    n_vocab = get_encoding(sizes["encoding"]).n_vocab
    if is_padding(sizes["vocab_size"], n_vocab):
        sizes["vocab_size"] = n_vocab
    added = {field.name for field in fields(config_class)} - sizes.keys()
    return sizes | {name: stored[name] for name in added & stored.keys()}


def read_json(file: Path) -> Any:
    """The contents of a JSON file. Raises OSError or ValueError, or for a Git LFS pointer InputError."""
    check_not_pointer(file)
    return json.loads(file.read_text(encoding="utf-8"))


def check_tokenizer(folder: Path, encoding: str, rows: int) -> None:
    """Raises InputError if the tokenizer in `folder` has another token than the encoding at one of the ids
    below `rows`: the model would be fed ids that mean something else to it."""
    for name in ("tokenizer.json", "vocab.json"):
        file = folder / name
        if not file.exists():
            continue
        try:
            theirs = read_json(file)
            if name == "tokenizer.json":
                check_rules(theirs, encoding)
                added = {token["content"]: token["id"] for token in theirs["added_tokens"]}
                theirs = theirs["model"]["vocab"] | added
            theirs = {token: i for token, i in theirs.items() if i < rows}
        except InputError:
            raise
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: damaged ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError):
            theirs = None  # another kind of tokenizer
        if theirs != {token: i for token, i in vocabulary(encoding).items() if i < rows}:
            raise InputError(f"{file}: another tokenizer than the encoding {encoding!r}, which is used here")


def check_rules(tokenizer: dict[str, Any], encoding: str) -> None:
    """Raises ValueError unless the rules of a tokenizer.json are the encoding's: with the same tokens, others
    would cut a text elsewhere."""
    own = [" ".join(pair) for pair in merges()] if encoding == "gpt2" else []
    rules = [rule if isinstance(rule, str) else " ".join(rule) for rule in tokenizer["model"]["merges"]]
    same = len(rules) != len(own) or rules == own  # before version 1.0, more rules had the same effect
    if tokenizer.get("normalizer") or tokenizer["pre_tokenizer"]["type"] != "ByteLevel" or not same:
        raise ValueError("other rules")


# -----------------------------------------------------------------------------
# a model whose code was changed


@functools.cache
def change_from_gpt2(model_class: type["GPT"], config: "GPTConfig") -> str | None:
    """What makes models of this class and configuration other than GPT-2, as a phrase; None if nothing does.

    A tiny model with random weights tells: its tensors need GPT-2's names, and its logits must be those of
    the paper's formulas. So a change of the code, such as RMSNorm, never passes for a GPT-2.
    """
    config = replace(config, block_size=8, vocab_size=17, n_layer=2, n_head=2, n_embd=8)
    generator = torch.Generator().manual_seed(0)
    idx = torch.arange(8, device="cpu").view(1, 8)
    # With --shard, most processes call this while they make a model on the device "meta", without weights.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        model = model_class(config).eval()
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
        weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        unused = weights.copy()
        try:
            expected = gpt2_logits(unused, config, idx)
        except KeyError as error:
            return f"it has no {error.args[0]}"
        except RuntimeError:
            return "its tensors have other shapes than GPT-2's"
        if weights["transformer.h.0.mlp.c_fc.weight"].size(0) != 4 * config.n_embd:
            return "its MLPs are not four times as wide as the residual stream"
        if unused:
            return f"it has {next(iter(unused))}, which GPT-2 has not"
        logits = model(idx)
    same = logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
    return None if same else "with the same weights, GPT-2 has other logits"


def gpt2_logits(weights: dict[str, torch.Tensor], config: "GPTConfig", idx: torch.Tensor) -> torch.Tensor:
    """The logits of GPT-2 (GPT-2 paper, section 2.3), written out: (B, T) token ids to (B, T, vocab_size).

    Takes out of `weights` what it uses; raises KeyError with the name of what is missing.
    """
    (B, T), C = idx.shape, config.n_embd
    take = weights.pop

    def both(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return take(f"{name}.weight"), take(f"{name}.bias")

    wte = take("transformer.wte.weight")
    x = wte[idx] + take("transformer.wpe.weight")[:T]
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        qkv = F.linear(F.layer_norm(x, (C,), *both(f"{block}.ln_1")), *both(f"{block}.attn.c_attn"))
        q, k, v = (t.view(B, T, config.n_head, -1).transpose(1, 2) for t in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, C), *both(f"{block}.attn.c_proj"))
        hidden = F.linear(F.layer_norm(x, (C,), *both(f"{block}.ln_2")), *both(f"{block}.mlp.c_fc"))
        x = x + F.linear(F.gelu(hidden, approximate="tanh"), *both(f"{block}.mlp.c_proj"))
    return F.layer_norm(x, (C,), *both("transformer.ln_f")) @ wte.t()


def check_change(config_file: Path, change: str | None) -> None:
    """Raises InputError if the model was trained by changed code, and the code here is GPT-2's."""
    stored = {} if config_file.name.endswith(PICKLES) else read_json(config_file)
    if stored.get("model_type") == CHANGED and change is None:
        advice = "load it with the train_gpt2.py that trained it"
        raise InputError(f"{config_file}: not a GPT-2: {stored.get('change')}; {advice}")


# -----------------------------------------------------------------------------
# writing


def write_model(
    folder: Path, config: "GPTConfig", tensors: dict[str, torch.Tensor], change: str | None
) -> None:
    """Write config.json, generation_config.json, model.safetensors, the tokenizer's files, and a short model
    card unless there is one.

    Args:
        tensors: float32, under transformers' names and in its layout.
        change: what `change_from_gpt2` says. The config.json of a changed model names no architecture of
            transformers, so that nothing loads it as what it is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    end_of_text = config.vocab_size - 1  # the last id in both encodings
    special_tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    stored = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **special_tokens,
        "encoding": config.encoding,
    }
    # Fields that were added to GPTConfig, for `read_config`.
    known = {"block_size", "n_layer", "n_head", "n_embd", "vocab_size", "encoding"}
    stored |= {name: value for name, value in asdict(config).items() if name not in known}
    if change:
        stored |= {"architectures": [], "model_type": CHANGED, "change": change}
    texts = {
        "config.json": to_json(stored),
        "generation_config.json": to_json({**special_tokens, "_from_model_config": True}),
    }
    texts |= tokenizer_files(config.encoding, config.block_size)
    if not (folder / CARD).exists():
        texts[CARD] = short_card(sum(tensor.numel() for tensor in tensors.values()), config, change)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only you read it


@functools.cache
def vocabulary(encoding: str) -> dict[str, int]:
    """All tokens of an encoding, in the characters of `letters`, and their ids."""
    letter_of = letters()
    ranks = get_encoding(encoding)._mergeable_ranks  # token bytes to id
    tokens = {"".join(letter_of[byte] for byte in token): rank for token, rank in ranks.items()}
    return {**tokens, END_OF_TEXT: len(tokens)}


@functools.cache
def tokenizer_files(encoding: str, model_max_length: int) -> dict[str, str]:
    """The tokenizer of an encoding in the files (name to text) that `AutoTokenizer.from_pretrained` reads;
    the older tokenizers read vocab.json and merges.txt. That of bytes is GPT-2's without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = vocabulary(encoding)
    pairs = merges() if encoding == "gpt2" else []
    without_special = {token: i for token, i in tokens.items() if token != END_OF_TEXT}
    tokenizer = Tokenizer(models.BPE(vocab=without_special, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its pattern is GPT-2's
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        **special_tokens,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    merge_lines = [" ".join(pair) for pair in pairs]
    stored = json.loads(tokenizer.to_str())
    stored["model"]["merges"] = merge_lines  # the only form that old releases read
    return {
        "tokenizer.json": to_json(stored),
        "tokenizer_config.json": to_json(settings),
        "vocab.json": json.dumps(tokens),
        "merges.txt": "\n".join(["#version: 0.2", *merge_lines, ""]),
    }


# -----------------------------------------------------------------------------
# the model card of a model of whose training nothing is known; support/run/card.py has that of a run

WITH_PIPELINE = """\
```python
from transformers import pipeline

write = pipeline("text-generation", ".")  # this folder; or the model's name on the Hub
print(write("Hello, I'm a language model,", max_new_tokens=NEW)[0]["generated_text"])
```
"""


def short_card(n_parameters: int, config: "GPTConfig", change: str | None) -> str:
    name, what = model_name(n_parameters), f"A GPT-2 of {n_parameters:,} parameters."
    if change:
        name, what = f"Changed {name}", f"A model of {n_parameters:,} parameters, not a GPT-2: {change}."
    return f"""\
{metadata(loadable=not change)}
# {name}

{what} Its training is not recorded here.

## How to use it

{how_to_use(config.block_size, change)}
## Limits

{limits(config.block_size)}"""


def metadata(loadable: bool = True, **known: Any) -> str:
    """The block at the top, which the Hub reads. transformers is named for what it can load."""
    from huggingface_hub import ModelCardData

    library = "transformers" if loadable else None
    data = ModelCardData(library_name=library, pipeline_tag="text-generation", **known)
    return f"---\n{data.to_yaml()}\n---\n"


def model_name(n_parameters: int) -> str:
    millions = n_parameters / 1e6
    return f"GPT-2, {f'{millions:,.0f}' if millions >= 10 else f'{millions:.2g}'}M parameters"


def how_to_use(block_size: int, change: str | None = None) -> str:
    """Code that runs as it stands in the folder; for a changed model, a sentence."""
    if change:
        return "transformers can't load it. `sample.py` beside the `train_gpt2.py` that trained it can.\n"
    prompt = 28  # tokens, if they are bytes
    return WITH_PIPELINE.replace("NEW", f"{max(1, min(100, block_size - prompt))}")


def limits(block_size: int, epochs: float = 0, what: str = "its training text") -> str:
    text = (
        f"- It continues text, and sees at most the last {block_size:,} tokens. It was not taught to follow "
        "instructions.\n"
        "- It may write what is false, biased or offensive, as its training text may; nothing was done "
        "against that.\n"
    )
    if epochs >= 1.5:
        text += f"- It has read {what} {epochs:.1f} times, and may repeat parts word for word.\n"
    return text
