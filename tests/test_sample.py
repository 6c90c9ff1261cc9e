"""sample.py as a user runs it."""

import io
import re
import shutil
from pathlib import Path

import sample
from conftest import call, run
from hub import serve
from sample import SampleConfig, main
from support.cli import InputError, RunFault
from support.data.encodings import get_encoding
from support.model import sampling
from support.model.huggingface import find_model
from train_gpt2 import GPT, GPTConfig

import pytest
import torch
import tyro


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
    first = call(*command, "--max_new_tokens=20").stdout
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


def test_an_empty_prompt_begins_a_document_and_a_cold_one_is_greedy(model_folder):
    model = GPT.from_pretrained(model_folder)
    expected = model.generate(torch.tensor([[256]]), 5, temperature=0)[0, 1:].tolist()
    flags = f"--model={model_folder}", "--device=cpu", "--num_samples=1", "--max_new_tokens=5"
    for cold in ("0", "1e-38"):
        done = call("sample.py", *flags, "--prompt=", f"--temperature={cold}")
        assert done.stdout == "> " + get_encoding("bytes").decode([t for t in expected if t != 256]) + "\n"


def test_a_stream_shows_the_same_text(model_folder, monkeypatch):
    """...as it comes; a prompt may come from standard input; the rate goes to standard error."""
    flags = f"--model={model_folder}", "--device=cpu", "--num_samples=1", "--max_new_tokens=25"
    whole = call("sample.py", *flags, "--prompt=naïve text")
    assert call("sample.py", *flags, "--prompt=naïve text", "--stream").stdout == whole.stdout
    assert "1 text of up to 25 tokens in " in whole.stderr
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("naïve text".encode())))
    piped = call("sample.py", *flags, "--prompt", "-")
    assert piped.stdout == whole.stdout
    long = call("sample.py", *flags, f"--prompt={'x' * 40}")
    assert "the prompt has 40 tokens; the model sees the last 32" in long.stderr


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A tiny model with GPT-2's tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (b"\xef\xbb\xbfHello", [15496]),
        (b"a\r\nb\r\n", [64, 198, 65, 198]),
        (b"<|endoftext|>", [50256]),
        (b"a<|endoftext|>b<|endoftext|>", [64, 50256, 65, 50256]),
        (b"<|endoftext |>", None),  # what ordinary text is
        (b"\xff", [4210]),
    ],
)
def test_what_a_prompt_becomes(prompt, tokens, gpt2_folder, monkeypatch):
    """Of a piped prompt, the mark at its beginning and Windows' ends of lines are not text; <|endoftext|> is
    the token."""
    asked = []
    monkeypatch.setattr(sampling, "stream", lambda _, idx, *__, **___: asked.append(idx[0].tolist()) or ())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    call("sample.py", f"--model={gpt2_folder}", "--device=cpu", "--prompt=-")
    encoding = get_encoding("gpt2")
    assert asked == [tokens or encoding.encode_ordinary(prompt.decode())]


def test_a_space_at_the_end_of_a_prompt_is_remarked(model_folder, gpt2_folder):
    """GPT-2's tokens begin with the space; a byte is a byte."""
    for prompt, folder, noted in (
        ("Hello ", gpt2_folder, True),
        ("Hello", gpt2_folder, False),
        ("Hello\n", gpt2_folder, False),
        ("", gpt2_folder, False),
        ("Hello ", model_folder, False),
    ):
        done = call(
            "sample.py", f"--model={folder}", f"--prompt={prompt}", "--max_new_tokens=1", "--device=cpu"
        )
        assert ("note: the prompt ends in a space" in done.stderr) == noted
        assert "note:" not in done.stdout


def test_a_text_ends_at_the_end_of_text_token(model_folder, tmp_path):
    """A model that always says <|endoftext|>: nothing is printed of it, and nothing is computed after it."""
    model = GPT.from_pretrained(model_folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[256])
    model.save_pretrained(tmp_path)
    flags = ("--device=cpu", "--prompt=Hello", "--num_samples=1", "--temperature=0")
    for more in ((), ("--stream",)):
        done = call("sample.py", f"--model={tmp_path}", *flags, *more)
        assert done.stdout == "> Hello\n"
        assert "1 text of up to 1 tokens" in done.stderr


def test_the_likeliest_text_is_written_once(model_folder):
    flags = (f"--model={model_folder}", "--device=cpu", "--temperature=0", "--max_new_tokens=4")
    done = call("sample.py", *flags)
    assert "1 text of up to 4 tokens" in done.stderr
    done = call("sample.py", *flags, "--num_samples=3")
    assert "3 texts of up to 4 tokens" in done.stderr


def test_generation_leaves_the_model_alone(model_folder):
    """...finished, closed or failed."""
    model, idx = GPT.from_pretrained(model_folder), torch.randint(0, 257, (3, 20))
    before = list(model.modules()), list(model.state_dict())
    model.generate(idx, 40, temperature=0)
    texts = sampling.stream(model, idx, 40)
    next(texts)
    texts.close()
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 3), 999), 40)  # not a token
    assert (list(model.modules()), list(model.state_dict())) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--top_p=0",), "--top_p 0.0: must be above 0 and at most 1"),
        (("--top_p=1.5",), "--top_p 1.5"),
        (("--stream", "--num_samples=5"), "--stream with --num_samples 5"),
        (("--temperature=nan",), "--temperature nan: must be"),
        (("--seed=18446744073709551616",), "--seed 18446744073709551616"),
        (("--num_samples=0",), "--num_samples 0: must be at least 1"),
        (("--temperature=-1",), "--temperature -1"),
        (("--model=/no/where",), "there is no folder /no/where"),
    ],
)
def test_bad_input_gets_one_line(flags, message, model_folder):
    done = call("sample.py", f"--model={model_folder}", "--device=cpu", *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_model_that_is_elsewhere_is_pointed_out(model_folder, tmp_path, monkeypatch):
    """The demo's run is log/demo: neither log nor demo."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "log/demo/checkpoint_00010")
    Path("log/empty").mkdir()
    Path("log/empty/log.txt").touch()
    Path("README").touch()
    for name, message in (
        ("log", "log is not a model: it has no config.json; did you mean log/demo?"),
        ("log/dmo", "there is no folder log/dmo; did you mean log/demo?"),
        ("log/empty", "log/empty is a run without a checkpoint"),
        ("README", "README is a file"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            find_model(name)
    assert find_model("log/demo")[0] == Path("log/demo/checkpoint_00010/config.json")
    asked = []

    def offline(*names, **_):
        asked.append(names[0])
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr("support.data.hub.hub_answers", lambda: True)
    with pytest.raises(RunFault, match=re.escape("no folder here has that name; did you mean log/demo?)")):
        find_model("demo")
    Path("log/demo").rename("log/gpt2")  # OpenAI's weights stay what the name means
    with pytest.raises(RunFault):
        find_model("gpt2")
    assert asked == ["demo", "openai-community/gpt2"]


def test_the_defaults_suit_the_encoding(model_folder, monkeypatch):
    """120 bytes are about 30 of GPT-2's tokens; a stream is one text."""
    asked = []

    def stream(model, idx, max_new_tokens, **_):
        asked.append((len(idx), max_new_tokens))
        return iter(())

    monkeypatch.setattr(sample, "stream", stream)
    for flags in ((), ("--stream",), ("--num_samples=2", "--max_new_tokens=7")):
        main(tyro.cli(SampleConfig, args=[f"--model={model_folder}", "--device=cpu", *flags]))
    assert asked == [(5, 120), (1, 120), (2, 7)]


def test_openais_weights_come_from_the_hub_by_name(tmp_path):
    """`--model gpt2` as on a machine with a network; the Hub here has random weights under OpenAI's name."""
    torch.manual_seed(0)
    folder = tmp_path / "hub/models/openai-community/gpt2"
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder)
    flags = ("--device=cpu", "--num_samples=1")
    with serve(tmp_path / "hub") as (env, requests):
        by_name = run("sample.py", "--model=gpt2", *flags, env=env).stdout
    assert by_name == call("sample.py", f"--model={folder}", *flags).stdout
    assert not any("pytorch_model.bin" in path for _, path, _ in requests)


@pytest.mark.slow
def test_a_model_that_the_hub_does_not_have(tmp_path):
    (tmp_path / "models").mkdir()
    with serve(tmp_path) as (env, _):
        missing = run("sample.py", "--model=gpt2-medium", "--device=cpu", env=env, check=False)
    assert missing.returncode == 2
    assert "could not fetch the model 'gpt2-medium'" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_model_with_another_vocabulary_is_refused(tmp_path):
    GPT(
        GPTConfig(block_size=16, vocab_size=999, n_layer=1, n_head=1, n_embd=8, encoding="bytes")
    ).save_pretrained(tmp_path)
    done = call("sample.py", f"--model={tmp_path}", "--device=cpu", check=False)
    assert done.returncode == 2
    assert "the model has 999 tokens, its encoding 'bytes' 257" in done.stderr


def test_a_narrow_dtype_converts_the_matrices_before_the_first_token(model_folder, monkeypatch, capsys):
    """And writes the text that autocast writes without."""
    seen, stream = [], sample.stream

    def look(model, *given, **options):
        seen.append((model.lm_head.weight.dtype, model.transformer.wte.weight.dtype))
        return stream(model, *given, **options)

    config = SampleConfig(str(model_folder), "Once", temperature=0, dtype="bfloat16", device="cpu")
    monkeypatch.setattr(sample, "stream", look)
    main(config)
    converted = capsys.readouterr().out
    monkeypatch.setattr(sample, "convert_matrices", lambda *_: None)
    main(config)
    assert capsys.readouterr().out == converted
    assert seen == [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
