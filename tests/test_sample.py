"""sample.py as a user runs it."""

import pytest
import torch
from conftest import call, run
from hub import serve

from train_gpt2 import GPT, GPTConfig


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    GPT(
        GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=16, encoding="bytes")
    ).save_pretrained(folder)
    return folder


def test_samples_are_printed_and_a_seed_repeats_them(model_folder):
    command = (
        "sample.py",
        f"--model={model_folder}",
        "--prompt=Once upon",
        "--num_samples=3",
        "--device=cpu",
    )
    first = run(*command, "--max_new_tokens=20").stdout
    assert first.count("> Once upon") == 3
    assert call(*command, "--max_new_tokens=20").stdout == first
    assert call(*command, "--max_new_tokens=20", "--seed=1").stdout != first
    greedy = call(*command, "--max_new_tokens=20", "--temperature=0").stdout
    assert greedy != first
    texts = [text.strip() for text in greedy.split("> Once upon")[1:]]
    assert len(texts) == 3
    assert len(set(texts)) == 1


def test_prompts_of_any_length(model_folder):
    for prompt in ("", "x" * 100, "naïve"):
        done = call(
            "sample.py", f"--model={model_folder}", f"--prompt={prompt}", "--num_samples=1", "--device=cpu"
        )
        assert done.stdout.startswith(f"> {prompt}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_samples=0",), "--num_samples 0: must be at least 1"),
        (("--temperature=-1",), "--temperature -1"),
        (("--model=/no/where",), "there is no folder /no/where"),
    ],
)
def test_bad_input_gets_one_line(flags, message, model_folder):
    done = call("sample.py", f"--model={model_folder}", *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_openais_weights_come_from_the_hub_by_name(tmp_path, gpt2_encoding):
    """`--model gpt2` as on a machine with a network; the Hub here has random weights under OpenAI's name."""
    torch.manual_seed(0)
    folder = tmp_path / "hub/models/openai-community/gpt2"
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)
    flags = ("--device=cpu", "--num_samples=1")
    with serve(tmp_path / "hub") as (env, requests):
        by_name = run("sample.py", "--model=gpt2", *flags, env=env).stdout
        missing = run("sample.py", "--model=gpt2-medium", *flags, env=env, check=False)
    assert by_name == call("sample.py", f"--model={folder}", *flags).stdout
    assert not any("pytorch_model.bin" in path for _, path, _ in requests)
    assert missing.returncode == 2
    assert "could not fetch the model 'gpt2-medium'" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_model_with_another_vocabulary_is_refused(tmp_path, gpt2_encoding):
    GPT(
        GPTConfig(block_size=16, vocab_size=999, n_layer=1, n_head=1, n_embd=8, encoding="bytes")
    ).save_pretrained(tmp_path)
    done = call("sample.py", f"--model={tmp_path}", check=False)
    assert done.returncode == 2
    assert "the model has 999 tokens, its encoding 'bytes' 257" in done.stderr
