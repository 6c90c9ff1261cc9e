"""Models in the forms that others give them, against transformers: the same function, or a refusal."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from conftest import call, run
from hellaswag import evaluate, to_item
from hub import serve
from support.cli import InputError, RunFault
from support.data.encodings import END_OF_TEXT, get_encoding
from support.model import sampling
from support.model.huggingface import change_from_gpt2, find_model, read_config, tokenizer_files
from train_gpt2 import GPT, GPTConfig, TrainConfig, choose_model_config

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

SIZES = {"block_size": 32, "vocab_size": 50304, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDX = torch.arange(60).view(2, 30) * 800  # token ids up to 47,200
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def draw(config: GPT2Config, std: float = 0.2) -> GPT2LMHeadModel:
    """transformers' model with random weights, biases and norms included, large enough to show a mistake."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def oracle():
    """With a padded vocabulary, whose extra rows are not zero: as in the tutorial's checkpoints."""
    sizes = {name: size for name, size in SIZES.items() if name != "block_size"}
    return draw(GPT2Config(**sizes, n_positions=32, **NO_DROPOUT))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDX)
        return getattr(found, "logits", found)[..., :50257]


def linear_layout(oracle) -> dict[str, torch.Tensor]:
    """The state dictionary of the tutorial's GPT, and of nanoGPT's."""
    tensors = {name: tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    for name in tensors:
        if name.endswith(GPT.TRANSPOSED):
            tensors[name] = tensors[name].t().contiguous()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # tied
    return tensors


def save_as_main(saved, file, monkeypatch, **classes):
    """torch.save, as a script does whose classes stand in `__main__`."""
    for name, made in classes.items():
        made.__module__, made.__qualname__ = "__main__", name
        monkeypatch.setattr(sys.modules["__main__"], name, made, raising=False)
    torch.save(saved, file)
    for name in classes:
        monkeypatch.delattr(sys.modules["__main__"], name)


def settings_of(**values):
    """An object of a class GPTConfig, as a dataclass makes it."""
    made = type("GPTConfig", (), {})
    config = made()
    config.__dict__.update(values)
    return config, made


def tutorial(oracle, folder, monkeypatch):
    """build-nanogpt's: https://github.com/karpathy/build-nanogpt, train_gpt2.py."""
    config, made = settings_of(**SIZES)
    saved = {"model": linear_layout(oracle), "config": config, "step": 19072, "val_loss": 3.07}
    save_as_main(saved, folder / "model_19072.pt", monkeypatch, GPTConfig=made)
    return folder / "model_19072.pt"


def tutorial_with_masks_and_numpy(oracle, folder, monkeypatch):
    """Old PyTorch without scaled_dot_product_attention; a loss of numpy's, arguments, a path."""
    config, made = settings_of(**SIZES)
    tensors = linear_layout(oracle)
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    saved = {"model": tensors, "config": config, "val_loss": np.float32(3.07), "losses": np.zeros(3)}
    saved |= {"args": argparse.Namespace(lr=1e-3), "out": Path("a/b"), "torch": torch.__version__}
    save_as_main(saved, folder / "m.pth", monkeypatch, GPTConfig=made)
    return folder / "m.pth"


def nanogpt(oracle, folder, monkeypatch, prefix="_orig_mod."):
    """https://github.com/karpathy/nanoGPT, train.py; with the optimizer's moments."""
    tensors = {prefix + name: tensor for name, tensor in linear_layout(oracle).items()}
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    saved = {
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "model_args": {**SIZES, "bias": True, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.1),
        "config": {"out_dir": "out", "n_layer": 99, "always_save_checkpoint": True},
    }
    torch.save(saved, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def nanogpt_under_ddp(oracle, folder, monkeypatch):
    return nanogpt(oracle, folder, monkeypatch, prefix="module._orig_mod.")


def in_a_folder(oracle, folder, monkeypatch):
    """The newest of a folder; by number, since copies have any date."""
    tutorial(oracle, folder, monkeypatch)
    (folder / "model_05000.pt").write_bytes(b"an older one")
    (folder / "log.txt").write_text("0 val 10.9\n")
    return folder


def padded_safetensors(oracle, folder, monkeypatch):
    oracle.save_pretrained(folder)
    return folder


def padded_only_in_the_tensor(oracle, folder, monkeypatch):
    oracle.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50257}))
    return folder


def sharded_safetensors(oracle, folder, monkeypatch):
    oracle.save_pretrained(folder, max_shard_size="2MB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    return folder


def bin_of(oracle, folder, **options):
    oracle.config.save_pretrained(folder)
    torch.save(oracle.state_dict(), folder / "pytorch_model.bin", **options)
    return folder


def pytorch_bin(oracle, folder, monkeypatch):
    return bin_of(oracle, folder)


def pytorch_bin_of_2019(oracle, folder, monkeypatch):
    return bin_of(oracle, folder, _use_new_zipfile_serialization=False) / "pytorch_model.bin"


def sharded_bin(oracle, folder, monkeypatch):
    oracle.config.save_pretrained(folder)
    parts = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    names = {name: [*parts]["h.1" in name] for name in oracle.state_dict()}
    for name, tensor in oracle.state_dict().items():
        parts[names[name]][name] = tensor.clone()
    for part, tensors in parts.items():
        torch.save(tensors, folder / part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def head_without_embedding(oracle, folder, monkeypatch):
    """safetensors.torch.save_model keeps the first name of tied tensors: the head's. nn.Linear's layout."""
    oracle.config.save_pretrained(folder)
    tensors = linear_layout(oracle)
    del tensors["transformer.wte.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


FORMS = [
    tutorial,
    tutorial_with_masks_and_numpy,
    nanogpt,
    nanogpt_under_ddp,
    in_a_folder,
    padded_safetensors,
    padded_only_in_the_tensor,
    sharded_safetensors,
    pytorch_bin,
    pytorch_bin_of_2019,
    sharded_bin,
    head_without_embedding,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_has_transformers_logits(form, oracle, tmp_path, monkeypatch, capsys):
    """...of the real tokens; and it is converted by being saved."""
    model = GPT.from_pretrained(form(oracle, tmp_path, monkeypatch))
    assert model.config == GPTConfig(**{**SIZES, "vocab_size": 50257})
    assert torch.allclose(logits_of(model), logits_of(oracle), atol=1e-4, rtol=0)
    said = capsys.readouterr().err
    assert ("nanoGPT computes GELU exactly" in said) == form.__name__.startswith("nanogpt")
    if form is tutorial:
        model.save_pretrained(tmp_path / "new")
        converted = GPT2LMHeadModel.from_pretrained(tmp_path / "new").eval()
        assert converted.config.vocab_size == 50257
        assert torch.allclose(logits_of(converted), logits_of(oracle), atol=1e-4, rtol=0)


def test_no_biases_are_biases_of_zero(oracle, tmp_path):
    """nanoGPT's bias=False."""
    biases = {n: torch.zeros_like(t) for n, t in oracle.state_dict().items() if n.endswith(".bias")}
    plain = GPT2LMHeadModel(oracle.config).eval()
    plain.load_state_dict(oracle.state_dict() | biases)
    tensors = {name: tensor for name, tensor in linear_layout(oracle).items() if name not in biases}
    args = {**SIZES, "bias": False, "dropout": 0.2}
    torch.save({"model": tensors, "model_args": args}, tmp_path / "ckpt.pt")
    model = GPT.from_pretrained(tmp_path)
    assert torch.allclose(logits_of(model), logits_of(plain), atol=1e-4, rtol=0)
    tensors["transformer.h.0.ln_1.bias"] = torch.zeros(16)  # one of many is damage
    torch.save({"model": tensors, "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(
        InputError, match=r"tensors missing or too many: transformer\.h\.0\.attn\.c_attn\.bias"
    ):
        GPT.from_pretrained(tmp_path)


def test_every_script_takes_a_file(oracle, tmp_path, monkeypatch):
    file = tutorial(oracle, tmp_path, monkeypatch)
    GPT.from_pretrained(file).save_pretrained(tmp_path / "same")
    flags = "--prompt=Hello", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"
    expected = call("sample.py", f"--model={tmp_path / 'same'}", *flags).stdout
    assert call("sample.py", f"--model={file}", *flags).stdout == expected
    item = {"ind": 0, "ctx": "A man", "endings": ["sits", "flies", "reads", "is"], "label": 0}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    models = "--model", str(tmp_path / "same"), str(file)
    lines = call("hellaswag.py", *models, f"--data={tmp_path / 'items.jsonl'}", "--device=cpu").stdout
    first, second = (line.split("HellaSwag")[1] for line in lines.splitlines())
    assert first == second
    call("plot.py", "positions", file, "--out", tmp_path / "wpe.png")
    assert (tmp_path / "wpe.png").exists()
    assert "transformer.wte.weight" in call("train_gpt2.py", f"--init_from={file}", "--describe").stdout
    config = choose_model_config(TrainConfig(init_from=str(file), sequence_length=32), get_encoding("gpt2"))
    assert config.vocab_size == 50257
    monkeypatch.chdir(tmp_path)
    Path("log").mkdir()
    file.rename("log/model_19072.pt")
    with pytest.raises(InputError, match=r"did you mean log/model_19072\.pt\?"):
        find_model("log/model_1907.pt")


LOAD = """
import sys
from train_gpt2 import GPT
from support.cli import CommandError
from support.data.hub import model_files
from huggingface_hub import constants
import torch
for offline in (False, True):
    constants.HF_HUB_OFFLINE = offline
    model_files.cache_clear()
    for name in sys.argv[1:-2] if offline else sys.argv[1:]:
        try:
            with torch.no_grad():
                logits = GPT.from_pretrained(name)(torch.arange(60).view(2, 30) * 800)
                print(name, *logits[1, -1, :5].tolist())
        except CommandError as error:
            print(name, error)
"""


def test_every_form_comes_from_the_hub_too(oracle, tmp_path, monkeypatch):
    """...and once it has come, from the disk; what is missing there is named, with what there is."""
    forms = [tutorial, nanogpt, padded_safetensors, sharded_safetensors, pytorch_bin, sharded_bin]
    models = tmp_path / "hub/models/some"
    for form in forms:
        (models / form.__name__).mkdir(parents=True)
        form(oracle, models / form.__name__, monkeypatch)
    for name, files in (("gguf", ["config.json", "a.gguf", "README.md"]), ("lora", ["adapter.safetensors"])):
        (models / name).mkdir()
        for file in files:
            (models / name / file).write_text("{}")
    other = models / "padded_safetensors/vocab.json"
    other.write_text(json.dumps({f"t{i}": i for i in range(50257)}))
    names = [f"some/{form.__name__}" for form in forms]
    with serve(tmp_path / "hub") as (env, requests):
        lines = run("-c", LOAD, *names, "some/gguf", "some/lora", env=env).stdout.splitlines()
    done, again = lines[: len(names)], lines[len(names) + 2 :]
    asked = {path.rsplit("/", 1)[1] for kind, path, _ in requests if kind == "GET" and "padded" in path}
    assert "model.safetensors" in asked
    assert not any("pytorch_model" in name for name in asked)
    expected = logits_of(oracle)[1, -1, :5]
    for name, line in zip(names, done, strict=True):
        first, *values = line.split()
        assert first == name
        if "padded" in name:
            assert "vocab.json: another tokenizer than the encoding 'gpt2'" in line
            continue
        assert torch.allclose(torch.tensor([float(value) for value in values]), expected, atol=1e-4)
    gguf, lora = lines[len(names) : len(names) + 2]
    assert gguf.endswith(
        "it has no model.safetensors or pytorch_model.bin, only README.md, a.gguf, config.json"
    )
    assert lora.endswith("it has no config.json, only adapter.safetensors")
    assert again == done


# -----------------------------------------------------------------------------
# refusals


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_runs(name, zipped, oracle, tmp_path):
    saved = {"model_args": SIZES, "model": linear_layout(oracle), "x": Bomb(tmp_path / "gone off")}
    oracle.config.save_pretrained(tmp_path)
    torch.save(saved, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"refused: it names code, posix\.mkdir; only") as error:
        GPT.from_pretrained(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "gone off").exists()


def test_a_class_of_settings_is_not_run_either(oracle, tmp_path, monkeypatch):
    ran = []
    made = type("TrapConfig", (), {"__reduce__": lambda self: (made, ("an argument",))})
    saved = {"model_args": SIZES, "model": linear_layout(oracle), "x": made()}
    save_as_main(saved, tmp_path / "ckpt.pt", monkeypatch, TrapConfig=made)
    monkeypatch.setattr(sys.modules["__main__"], "TrapConfig", lambda *_: ran.append(1), raising=False)
    GPT.from_pretrained(tmp_path)
    assert not ran


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def change(saved, **entries):
    saved["model"] |= {name.replace("__", "."): tensor for name, tensor in entries.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["model_args"].update(use_rmsnorm=True), "model_args has use_rmsnorm = True"),
        (lambda s: s.pop("model_args"), "holds no sizes of a GPT-2 (model)"),
        (lambda s: s.pop("model"), "holds no weights (model_args)"),
        (lambda s: s["model_args"].update(vocab_size=40000), "wte.weight is [50304, 16], its"),
        (lambda s: s["model_args"].update(n_embd="x"), "not the configuration of a GPT-2"),
        (lambda s: change(s, lm_head__weight=torch.ones(50304, 16)), "is not the embedding's copy"),
        (lambda s: change(s, lm_head__bias=torch.ones(50304)), "tensors missing or too many"),
        (lambda s: s["model"].pop("transformer.h.1.ln_1.bias"), "transformer.h.1.ln_1.bias"),
        (lambda s: s["model"]["transformer.h.0.ln_1.bias"].fill_(torch.nan), "ln_1.bias is not finite"),
        (lambda s: s["model"]["transformer.wpe.weight"][3].fill_(-torch.inf), "wpe.weight is not finite"),
        (lambda s: s["model"]["lm_head.weight"][3].fill_(torch.nan), "is not finite"),
        (
            lambda s: change(s, transformer__ln_f__bias=torch.ones(16, dtype=torch.int8)),
            "transformer.ln_f.bias is torch.int8; quantized",
        ),
    ],
)
def test_what_is_another_function_is_refused(spoil, message, oracle, tmp_path):
    saved = {"model_args": dict(SIZES), "model": linear_layout(oracle)}
    spoil(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert str(error.value).startswith(f"{tmp_path / 'ckpt.pt'}: ")
    assert "\n" not in str(error.value)


def test_a_whole_model_and_other_objects_are_refused(tmp_path, monkeypatch):
    made = type("GPT", (torch.nn.Module,), {})
    save_as_main(made(), tmp_path / "ckpt.pt", monkeypatch, GPT=made)
    with pytest.raises(InputError, match=r"it names code, __main__\.GPT; only tensors and plain values"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "gpt2_124M.bin").write_bytes(b"llm.c")
    with pytest.raises(InputError, match=r"gpt2_124M\.bin needs a config\.json beside it"):
        GPT.from_pretrained(tmp_path / "gpt2_124M.bin")
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="holds no model, but a list"):
        GPT.from_pretrained(tmp_path)
    torch.save({"model_args": SIZES}, tmp_path / "ckpt.pt")
    whole = (tmp_path / "ckpt.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x80\x02."):
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged, or not written by torch\.save"):
            GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (padded_safetensors, "model.safetensors"),
        (padded_safetensors, "config.json"),
        (sharded_safetensors, "model-00002-of-00002.safetensors"),
        (sharded_safetensors, "model.safetensors.index.json"),
        (pytorch_bin, "pytorch_model.bin"),
        (tutorial, "model_19072.pt"),
        (padded_safetensors, "tokenizer.json"),
    ],
)
def test_a_git_lfs_pointer_is_named(form, name, oracle, tmp_path, monkeypatch):
    form(oracle, tmp_path, monkeypatch)
    (tmp_path / name).write_text(POINTER)
    message = f"{tmp_path / name}: a Git LFS pointer, not the file; fetch it with `git lfs pull`"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        GPT.from_pretrained(tmp_path)


def test_an_index_leads_nowhere_else(oracle, tmp_path, monkeypatch):
    sharded_safetensors(oracle, tmp_path, monkeypatch)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: No such file"):
        GPT.from_pretrained(tmp_path)
    for text in ('{"weight_map": {"a": "../../secret.bin"}}', "{}", "[", '{"weight_map": ["a"]}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index\.json: not an index of weights"):
            GPT.from_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# transformers' switches

TINY = {"vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
OTHER_VALUES = {  # for every entry of transformers' config.json
    **{name: [number // 2] for name, number in TINY.items()},
    "activation_function": [*ACT2FN],
    "add_cross_attention": [True],
    "attn_pdrop": [0.5],
    "embd_pdrop": [0.5],
    "resid_pdrop": [0.5],
    "bos_token_id": [3],
    "eos_token_id": [3],
    "pad_token_id": [3],
    "initializer_range": [0.5],
    "layer_norm_epsilon": [1e-6, 1e-3, 0.0],
    "n_inner": [64, 32, 17],
    "reorder_and_upcast_attn": [True],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "summary_activation": ["tanh"],
    "summary_first_dropout": [0.5],
    "summary_proj_to_labels": [False],
    "summary_type": ["mean"],
    "summary_use_proj": [False],
    "tie_word_embeddings": [False],
    "use_cache": [False],
    "is_decoder": [True],
    "is_encoder_decoder": [True],
    "chunk_size_feed_forward": [4],
}
REFUSED = {
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "tie_word_embeddings",
}
HONOURED = {"gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"}


def test_every_switch_of_transformers_is_honoured_or_refused(tmp_path):
    """Each by itself; those that change no logit are not refused."""
    stored = json.loads(GPT2Config(**TINY).to_json_string(use_diff=False))
    about_the_file = {"transformers_version", "model_type", "architectures", "dtype", "_name_or_path"}
    of_other_tasks = {"id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states",
                      "return_dict"}  # fmt: skip
    assert not stored.keys() - OTHER_VALUES.keys() - about_the_file - of_other_tasks
    idx, outcomes = torch.arange(30).view(2, 15), {}
    plain = draw(GPT2Config(**TINY, **NO_DROPOUT))
    for name, values in OTHER_VALUES.items():
        for value in values:
            config = GPT2Config(**{**TINY, name: value})
            oracle = draw(config)
            if oracle.state_dict().keys() == plain.state_dict().keys():  # one that was made otherwise
                tensors = plain.state_dict() | {"lm_head.weight": oracle.lm_head.weight}
                with torch.no_grad():
                    for key, tensor in oracle.state_dict().items():
                        if tensor.shape == tensors[key].shape:
                            tensor.copy_(tensors[key])
            oracle.save_pretrained(tmp_path)
            try:
                ours = GPT.from_pretrained(tmp_path)
            except InputError:
                outcomes[name, value] = "refused"
                continue
            with torch.no_grad():
                difference = (ours(idx) - oracle(idx).logits).abs().max().item()
                changed = (oracle(idx).logits.shape != plain(idx).logits.shape) or not torch.allclose(
                    oracle(idx).logits, plain(idx).logits, atol=1e-4
                )
            assert difference < 1e-4, (name, value)
            outcomes[name, value] = "honoured" if changed else "the same"
    refused = {pair for pair, outcome in outcomes.items() if outcome == "refused"}
    expected = {("activation_function", name) for name in ACT2FN if name not in HONOURED}
    expected |= {(name, value) for name in REFUSED for value in OTHER_VALUES[name]}
    assert refused == expected | {("n_inner", 32), ("n_inner", 17)}
    assert all(outcomes[name, number // 2] == "honoured" for name, number in TINY.items())


# -----------------------------------------------------------------------------
# tokenizers


def test_another_tokenizer_of_as_many_tokens_is_refused(tmp_path):
    """...whatever its form; GPT-2's own is not, nor is a token beyond the model's rows."""
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)  # as transformers writes it
    texts = {name: (tmp_path / name).read_text() for name in ("tokenizer.json", "vocab.json")}
    config = tmp_path / "config.json"
    assert read_config(config, GPTConfig)["vocab_size"] == 50257

    def swapped(vocab):
        return vocab | {"Ġthe": vocab["Ġa"], "Ġa": vocab["Ġthe"]}

    stored = json.loads(texts["tokenizer.json"])
    with_padding = {**stored, "added_tokens": [*stored["added_tokens"], {"content": "[PAD]", "id": 50257}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(with_padding))
    assert read_config(config, GPTConfig)["vocab_size"] == 50257
    rules = stored["model"]["merges"]
    other_rules = {**stored, "model": {**stored["model"], "merges": [rules[1], rules[0], *rules[2:]]}}
    stored["model"]["vocab"] = swapped(stored["model"]["vocab"])
    for name, contents in (
        ("vocab.json", swapped(json.loads(texts["vocab.json"]))),
        ("vocab.json", {token: i for token, i in json.loads(texts["vocab.json"]).items() if i}),
        ("vocab.json", []),
        ("tokenizer.json", stored),
        ("tokenizer.json", other_rules),
        ("tokenizer.json", with_padding | {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer.json", with_padding | {"pre_tokenizer": {"type": "Whitespace"}}),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": []}),
    ):
        for file, text in texts.items():
            (tmp_path / file).write_text(json.dumps(contents) if file == name else text)
        with pytest.raises(InputError, match=rf"/{name}: another tokenizer than the encoding 'gpt2'"):
            read_config(config, GPTConfig)
    for name in texts:
        for file, text in texts.items():
            (tmp_path / file).write_text(text[:1000] if file == name else text)
        with pytest.raises(InputError, match=rf"/{name}: damaged \("):
            read_config(config, GPTConfig)
    for file, text in tokenizer_files("bytes", 32).items():
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match="another tokenizer than the encoding 'gpt2'"):
        read_config(config, GPTConfig)


def test_added_tokens_are_no_padding(tmp_path):
    """A chat's two tokens in rows that would look like padding; and a vocabulary of one more."""
    GPT(GPTConfig(block_size=32, vocab_size=50264, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json", GPTConfig)["vocab_size"] == 50257
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert END_OF_TEXT in {token["content"] for token in stored["added_tokens"]}
    stored["added_tokens"].append({"content": "<|im_start|>", "id": 50257})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="another tokenizer than the encoding 'gpt2'"):
        read_config(tmp_path / "config.json", GPTConfig)
    GPT(GPTConfig(block_size=32, vocab_size=50258, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    done = call("sample.py", f"--model={tmp_path}", check=False)
    assert done.returncode == 2


# -----------------------------------------------------------------------------
# logits that are not finite


def test_logits_that_overflow_end_in_one_line(tmp_path):
    """...while float32 holds them: sample.py, hellaswag.py and the same in training."""
    config = GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=1, n_embd=8, encoding="bytes")
    model = GPT(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1e6)
    model.save_pretrained(tmp_path)
    item = {"ind": 0, "ctx": "A man", "endings": ["sits", "flies", "reads", "is"], "label": 0}
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    for script, flags, message in (
        ("sample.py", ("--max_new_tokens=3",), "error: the logits are not finite; try --dtype float32"),
        ("sample.py", ("--max_new_tokens=3", "--stream", "--temperature=0"), "the logits are not finite"),
        (
            "hellaswag.py",
            (f"--data={tmp_path / 'items.jsonl'}",),
            "the losses of 1 of 1 items are not finite",
        ),
    ):
        flags = (f"--model={tmp_path}", "--device=cpu", *flags)
        done = call(script, *flags, "--dtype=float16", check=False)
        assert (done.returncode, message in done.stderr.splitlines()[-1]) == (1, True), done.stderr
        assert "acc" not in done.stdout
    assert call("sample.py", f"--model={tmp_path}", "--device=cpu").returncode == 0
    encoding, autocast = get_encoding("bytes"), torch.autocast("cpu", dtype=torch.float16)
    assert sampling.write_samples(model, encoding, autocast)[0] == "(no text: the logits are not finite)"
    with pytest.raises(RunFault, match="not finite"), autocast:
        evaluate(model, [to_item(item, "")], encoding)


def test_a_process_that_gets_its_weights_from_another_loads_none(oracle, tmp_path, monkeypatch):
    """`--shard --init_from`: the model is made without weights, from any form."""
    change_from_gpt2.cache_clear()
    with torch.device("meta"):
        model = GPT.from_pretrained(nanogpt(oracle, tmp_path, monkeypatch))
    assert all(parameter.is_meta for parameter in model.parameters())
