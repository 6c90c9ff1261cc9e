"""The card in a checkpoint, read by the Hub's own library."""

import io
import json
import os
import re
import shutil
import threading
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from conftest import TINY, call
from support.data.shards import Shards
from support.files import sha256
from support.machine.processes import World
from support.model.huggingface import list_checkpoints
from support.run.card import run_card
from support.run.curves import read_log
from support.run.folder import RunFolder, check_sums
from train_gpt2 import GPT, GPTConfig, TrainConfig, configure_optimizer

import pytest
import torch
from huggingface_hub import ModelCard

EDU = "HuggingFaceFW/fineweb-edu"


def facts_of(dataset=EDU, encoding="gpt2", optimizer="AdamW", changed=None, **changes):
    """A run's facts, as run.json has them."""
    return {
        "train_config": asdict(replace(TrainConfig(), **changes)),
        "model_config": asdict(GPTConfig(encoding=encoding)),
        "parameters": 124_439_808,
        "changed": changed,
        "encoding": encoding,
        "val_tokens": 10_485_760,
        "hellaswag_items": 10_042,
        "world_size": 8,
        "data": {"dataset": dataset, "fingerprint": "5eed" * 16, "train_tokens": 9_853_989_344},
        "device": "NVIDIA A100-SXM4-80GB",
        "optimizer": optimizer,
        "precision": "bfloat16, torch.compile on",
        "interruptions": 2,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "commit": None},
    }


EVENTS = {
    "train": [(0, 11.0)],
    "val": [(250 * i, 11.0 - 0.1 * i) for i in range(77)] + [(19073, 3.0581)],
    "hella": [(0, 0.2501), (19073, 0.3052)],
}
SPENT = {"training": 7200.0, "other": 600.0, "tokens": 1}


def card_of(step=19073, samples=None, picture=True, **facts):
    text = run_card(facts_of(**facts), step, SPENT, EVENTS, samples=samples, picture=picture)
    return text, ModelCard(text).data


@pytest.fixture(scope="module")
def finished(text_shards, tmp_path_factory):
    """The newest checkpoint of a short run that scored HellaSwag."""
    folder = tmp_path_factory.mktemp("card")
    item = {"ctx": "9 green", "endings": [" bottles", " cats", " dogs", " b"], "label": 0}
    lines = [json.dumps({"ind": i, **item}) for i in range(6)]
    (folder / "items.jsonl").write_text("\n".join(lines))
    flags = [flag for flag in TINY if "hellaswag" not in flag]
    flags += ["--max_steps=12", "--val_every=12", "--sample_every=12", "--hellaswag_every=12"]
    flags += ["--checkpoint_every=6", f"--hellaswag_data={folder}/items.jsonl"]
    call("train_gpt2.py", *flags, f"--data_dir={text_shards}", f"--log_dir={folder}/log")
    return list_checkpoints(folder / "log")


def test_a_checkpoints_card_says_what_was_measured_of_it(finished):
    between, last = finished
    card, events = ModelCard.load(last / "README.md"), read_log(last.parent / "log.txt")
    loss, score = card.data.eval_results
    assert (loss.metric_type, loss.metric_value) == ("loss", events["val"][-1][1])
    assert (loss.dataset_name, loss.dataset_type) == ("a rhyme", "text")
    assert "nats per byte, on 1,024 tokens" in loss.metric_name
    assert (score.dataset_type, score.metric_value) == ("Rowan/hellaswag", events["hella"][-1][1])
    assert score.metric_name.endswith("6 items")
    assert card.data.pipeline_tag == "text-generation"
    assert {"license", "language", "datasets", "base_model"}.isdisjoint(card.data.to_dict())
    for fact in (
        "from scratch on a rhyme: 3,072 tokens in 12 steps.",
        "| 12 | 3,072 |",
        "| recipe | `--recipe tutorial`",
        "| optimizer | AdamW, beta1 0.9; weight decay 0.1,",
        "| hardware | cpu",
        "](loss.png)",
        " of training, ",
        "Written at step 12, not selected:\n\n    Hello",
        f"The lowest was {loss.metric_value:.4f}, at step 12, that of this checkpoint.",
    ):
        assert fact in card.text
    # Nobody has measured the weights of step 6: their card has the run's earlier values, not as theirs.
    card = ModelCard.load(between / "README.md")
    assert not card.data.eval_results
    assert "| 0 | 0 |" in card.text
    assert "| 12 |" not in card.text
    assert re.search(r"The lowest was \d\.\d{4}, at step 0\.", card.text)
    assert "Training was to go on until step 12." in card.text
    assert "Written at step 0" in card.text


def test_all_files_have_sums_but_those_that_may_be_edited(finished, tmp_path):
    folder = shutil.copytree(finished[-1], tmp_path / "checkpoint")
    lines = (folder / "SHA256SUMS").read_text()
    sums = dict(line.split("  ")[::-1] for line in lines.splitlines())
    assert {path.name for path in folder.iterdir()} == sums.keys() | {"README.md", "loss.png", "SHA256SUMS"}
    (folder / "SHA256SUMS").write_text(f"{lines}{sha256(folder / 'README.md')}  README.md\n")  # before 1.2
    (folder / "README.md").write_text("mine")
    (folder / "loss.png").unlink()
    check_sums(folder)
    (folder / "README.md").unlink()
    check_sums(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        check_sums(folder)


def run_code_of(folder, monkeypatch):
    """Execute the Python in a folder's card, there; returns what it prints."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    with redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def test_the_cards_code_runs(finished, tmp_path, monkeypatch):
    """As it stands, in the folder: of a model of bytes, and of one with GPT-2's tokens."""
    assert run_code_of(finished[-1], monkeypatch).startswith("Hello, I'm a language model,")
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    assert run_code_of(tmp_path, monkeypatch).startswith("Hello, I'm a language model,")


def test_a_full_run_on_fineweb_edu():
    text, data = card_of(samples=(19073, ["Hello\nworld", "```\n\n{name}"]))
    assert data.to_dict() | {"model-index": 0} == {
        "datasets": [EDU],
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "model-index": 0,
    }
    results = [(result.dataset_type, result.metric_value) for result in data.eval_results]
    assert results == [(EDU, 3.0581), ("Rowan/hellaswag", 0.3052)]
    assert data.model_name == "GPT-2, 124M parameters"
    assert "A GPT-2 of 124,439,808 parameters, trained from scratch on [HuggingFaceFW/fineweb-edu](" in text
    assert "9,999,745,024 tokens in 19,073 steps.\n" in text
    assert "| OpenAI's GPT-2 (124M) |  | 3.2924 | 0.2955 |" in text
    assert "is under ODC-By 1.0" in text
    assert "NVIDIA A100-SXM4-80GB; 8 processes (of the part after the last interruption)" in text
    assert (
        "| learning rate | a warm-up to 0.0006 until step 715, then a cosine down to a tenth at step 19,073 |"
        in text
    )
    assert "2 h 00 min of training, 10 min of evaluation" in text
    assert "    Hello\n    world\n    --------------------\n    ```\n    \n    {name}\n" in text
    table = re.findall(r"^\| ([\d,]+) \| ", text, re.MULTILINE)
    assert len(table) == 10
    assert table[-1] == "19,073"
    headings = ["Results", "Training", "Samples", "How to use it", "Limits", "License"]
    assert re.findall(r"(?<=\n\n)## (.*)\n\n(?=\S|    Hello)", text) == headings


ONLY_WHAT_IS_KNOWN = [  # facts, what the card must not say, what it must
    ({"dataset": None}, ["language:", "datasets:", "3.2924", "ODC-By"], ["its shards do not record"]),
    ({"dataset": "someone/other"}, ["language:", "3.2924"], ["- someone/other"]),
    ({"init_from": "gpt2"}, ["from scratch"], ["base_model: openai-community/gpt2"]),
    ({"init_from": "log/checkpoint_00001"}, ["base_model", "checkpoint_00001"], ["of an earlier run"]),
    ({"init_from": "mine"}, ["base_model", "mine"], ["of an earlier run"]),
    ({"step": 19_073 * 3, "max_steps": 19_073 * 4}, [], ["read its training text 3.0 times", "until step"]),
    ({"grad_clip": 0.0}, ["clipped"], ["no clipping"]),
    ({"optimizer": "AdamW", "momentum": 0.8}, ["Muon", "word for word"], ["| AdamW, beta1 0.8; "]),
    ({"optimizer": "Muon"}, [], ["matrices, momentum 0.95; AdamW for the rest, at 2 times the rate; "]),
    ({"schedule": "trapezoid", "cooldown": 0.4}, ["cosine"], ["then constant until step 11,444, then down"]),
    ({"shuffle": False}, [], ["times in file order; "]),
    ({"optimizer": "SGD"}, ["AdamW", "Muon"], ["| SGD; "]),
]


@pytest.mark.parametrize(("facts", "missing", "present"), ONLY_WHAT_IS_KNOWN)
def test_only_what_is_known(facts, missing, present, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("log/checkpoint_00001")
    os.makedirs("mine")
    text, data = card_of(**facts)
    assert "license" not in data.to_dict()
    assert not [words for words in missing if words in text]
    assert all(words in text for words in present)


def test_a_model_that_is_no_gpt2_says_so():
    text, data = card_of(changed="its ln_1 has no bias", max_steps=20_000)
    first = next(line for line in text.splitlines() if line.startswith("A "))
    assert first.startswith("A model of 124,439,808 parameters, trained from scratch")
    assert "19,073 steps. It is not a GPT-2: its ln_1 has no bias. Training was to go on" in first
    usage = re.search(r"## How to use it\n\n(.*?)\n\n## Limits", text, re.DOTALL)[1]
    assert "transformers can't load it" in usage
    assert "`sample.py`" in usage
    assert "library_name" not in data.to_dict()
    assert "```python" not in text
    assert data.model_name == "Changed GPT-2, 124M parameters"


def test_a_run_without_evaluations_has_no_table():
    events = {"train": [(0, 11.0)], "val": [], "hella": []}
    text = run_card(facts_of(), 5, SPENT, events, samples=None, picture=True)
    assert "## Results" not in text
    assert "## Samples" not in text
    assert not ModelCard(text).data.eval_results


def test_no_path_of_the_trainers_gets_into_a_card(tmp_path):
    facts = facts_of(data_dir=tmp_path / "secret", log_dir=tmp_path / "secret", init_from=str(tmp_path))
    files = [[f"{tmp_path}/secret/{folder}/index.txt", 5] for folder in "ab"]  # of one name: their paths tell
    described = Shards(Path(), {}, {}, "bytes", {"files": files}, "").describe()
    assert described == "the text of 2 files (index.txt, index.txt)"
    latin = Shards(Path(), {}, {}, "bytes", {"files": [["caf\udce9.txt", 5]]}, "").describe()
    assert latin == "the text of 1 file (caf?.txt)"  # a name that is not UTF-8 can't be written
    facts["data"] |= {"dataset": None, "text": described}
    facts["precision"] += f" off: it failed (CalledProcessError: {tmp_path}/secret/main.c | 1)"
    text = run_card(facts, 19073, SPENT, EVENTS, samples=None, picture=True)
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "index.txt" in text


def test_losses_on_other_tokens_do_not_compare():
    """--val_tokens was changed at step 5,000: no loss before that is in the table, or is the lowest."""
    events = EVENTS | {"val": [(0, 11.0), (4750, 1.5), (5000, 4.0), (19073, 3.0581)]}
    text = run_card(facts_of() | {"val_since": 5000}, 19073, SPENT, events, samples=None, picture=True)
    assert "1.5000" not in text
    assert "The lowest was 3.0581, at step 19,073, that of this checkpoint." in text
    facts = facts_of() | {"hella_since": 5000}  # so was --hellaswag_limit
    text = run_card(facts, 19073, SPENT, EVENTS, samples=None, picture=True)
    assert "0.2501" not in text
    assert "0.3052" in text


def test_a_mix_is_read_as_often_as_its_parts():
    """...which differ: 6 epochs of one, and hardly anything of the other."""
    facts = facts_of()
    tokens = 19_073 * 524_288
    facts["data"] |= {"parts": {"a": 0.3, "b": 0.7}, "epochs_a_token": {"a": 6 / tokens, "b": 0.01 / tokens}}
    text = run_card(facts, 19073, SPENT, EVENTS, samples=None, picture=True)
    assert "9,853,989,344 training tokens, read at most 6.00 times;" in text
    assert "It has read some of its training text 6.0 times, and may" in text
    assert "The validation loss is the mean of the parts' losses by their shares, on 10,485,760 " in text


def test_a_model_saved_outside_a_run_has_a_short_card(tmp_path):
    model = GPT(GPTConfig(64, 257, 1, 1, 8, encoding="bytes"))
    model.pad_vocabulary().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert f"{model.config.n_parameters:,} parameters. Its training is not recorded" in card.text
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    (tmp_path / "README.md").write_text("my own")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


def test_the_card_is_of_the_moment_of_the_save(tmp_path, monkeypatch):
    """What happens before the thread has written it does not enter. And a card that fails costs nothing."""
    gate, said, config = threading.Event(), [], TrainConfig(log_dir=tmp_path)
    folder = RunFolder(config, World(), said.append)
    model = GPT(GPTConfig(16, 257, 1, 1, 8, encoding="bytes"))
    optimizer, scaler = configure_optimizer(model, config), torch.amp.GradScaler("cpu")
    original = GPT.save_pretrained
    monkeypatch.setattr(GPT, "save_pretrained", lambda *arguments: (gate.wait(30), original(*arguments)))
    folder.write_facts(facts_of(encoding="bytes"))
    folder.append(5, {"val": "3.2500"})
    folder.append(5, {"ema": "1.5"})  # no obstacle
    (tmp_path / "loss.png").write_bytes(b"then")
    folder.samples = 5, ["as it was"]
    folder.save(5, model, optimizer, scaler, loss=0.5, spent=SPENT)
    folder.append(6, {"val": "2.7500"})
    folder.samples = 6, ["as it is"]
    folder.facts["device"] = "another"
    (tmp_path / "loss.png").write_bytes(b"now")
    gate.set()
    folder.wait_for_save(5)
    card = ModelCard.load(tmp_path / "checkpoint_00005/README.md")
    assert [result.metric_value for result in card.data.eval_results] == [3.25]
    assert "as it was" in card.text
    assert not {"2.7500", "as it is", "another"} & set(card.text.split(" "))
    assert (tmp_path / "checkpoint_00005/loss.png").read_bytes() == b"then"
    del folder.facts["data"]
    folder.save(6, model, optimizer, scaler, loss=0.5, spent=SPENT)
    folder.wait_for_save(6)
    assert any("step 6: the model card could not be written" in text for text in said)
    assert "not recorded" in (tmp_path / "checkpoint_00006/README.md").read_text()
