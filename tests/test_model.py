"""The model against Hugging Face's GPT-2."""

import itertools
import json
import math
from dataclasses import replace

from support.cli import InputError
from support.data.encodings import get_encoding
from support.machine.device import autocast_to
from support.model import sampling
from support.model.huggingface import read_config
from support.model.sampling import COMPILE_FROM, FixedKVCache, choose_token
from train_gpt2 import GPT, MODEL_SHAPES, GPTConfig

import pytest
import safetensors.torch
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

GPT2 = get_encoding("gpt2")
TINY = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=32)


def huggingface_model(config: GPTConfig) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        bos_token_id=0,
        eos_token_id=config.vocab_size - 1,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2LMHeadModel(shape)
    with torch.no_grad():  # biases and norms are drawn too: at their initial values they hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("demo", False),
        ("gpt2", False),
        ("gpt2", True),
        pytest.param("gpt2-medium", False, marks=pytest.mark.slow),
        pytest.param("gpt2-large", False, marks=pytest.mark.slow),
        pytest.param("gpt2-xl", False, marks=pytest.mark.slow),
    ],
)
def test_logits_loss_and_gradients_are_hugging_faces(name, padded, tmp_path):
    shape = {**MODEL_SHAPES[name], "n_layer": 2 if name == "gpt2" else 1}  # the real widths and heads
    oracle = huggingface_model(GPTConfig(block_size=32, vocab_size=1001, **shape))
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    if padded:
        model.pad_vocabulary(128)
    idx = torch.randint(0, 1001, (2, 32))
    logits, loss = model(idx[:, :-1]), model(idx[:, :-1], idx[:, 1:])
    expected = oracle(idx, labels=idx)
    assert torch.allclose(logits, expected.logits[:, :-1], atol=1e-4, rtol=0)
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    loss.backward()
    expected.loss.backward()
    gradients = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        want, got = gradients[name].grad, parameter.grad
        want = want.t() if name.endswith(GPT.TRANSPOSED) else want
        if name == "transformer.wte.weight":
            assert padded == (len(got) > 1001)
            assert (got[1001:] == 0).all(), "padding got a gradient"
            got = got[:1001]
        assert torch.allclose(got, want, atol=1e-4, rtol=0), name


def test_saved_folder_is_a_hugging_face_model(tmp_path):
    model = GPT(TINY).pad_vocabulary(128).eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.transformer.wte.weight.shape == (300, 32)
    idx = torch.randint(0, 300, (3, 64))
    assert torch.allclose(model(idx), loaded.eval()(idx).logits, atol=1e-5, rtol=0)


def test_what_goes_through_us_is_unchanged_to_hugging_face(tmp_path):
    """Hugging Face's model, loaded and saved by us, loaded by Hugging Face: bit-identical logits."""
    oracle = huggingface_model(TINY)
    oracle.save_pretrained(tmp_path / "theirs")
    GPT.from_pretrained(tmp_path / "theirs").pad_vocabulary(128).save_pretrained(tmp_path / "ours")
    idx = torch.randint(0, 300, (3, 64))
    returned = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(returned(idx).logits, oracle(idx).logits)


def test_load_save_load_gives_identical_tensors(tmp_path):
    huggingface_model(TINY).save_pretrained(tmp_path / "a")
    first = GPT.from_pretrained(tmp_path / "a")
    first.pad_vocabulary(128).save_pretrained(tmp_path / "b")
    second = GPT.from_pretrained(tmp_path / "b")
    first = GPT.from_pretrained(tmp_path / "a")
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert first.config == second.config


def test_vllm_finds_every_weight_in_its_layout(tmp_path):
    """What vLLM's GPT-2 (model_executor/models/gpt2.py) asks of a folder: these names, transposed back from
    Conv1D, fill its parameters, nothing is missing, and the config has none of what it refuses."""
    from transformers import GPT2Config

    C, L, V, T = 48, 3, 50257, 64
    GPT(GPTConfig(block_size=T, n_layer=L, n_head=2, n_embd=C)).pad_vocabulary().save_pretrained(tmp_path)
    expected = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(L):
        for norm in ("ln_1", "ln_2"):
            expected |= {f"h.{i}.{norm}.weight": (C,), f"h.{i}.{norm}.bias": (C,)}
        for name, rows, columns in (("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C), ("mlp.c_fc", 4 * C, C),
                                    ("mlp.c_proj", C, 4 * C)):  # fmt: skip
            expected |= {f"h.{i}.{name}.weight": (rows, columns), f"h.{i}.{name}.bias": (rows,)}
    loaded = {}
    for name, tensor in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        if name.endswith(".weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc")):
            tensor = tensor.t()
        loaded[name.removeprefix("transformer.")] = tuple(tensor.shape)
    assert loaded == expected
    config = GPT2Config.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (C, 2, L)
    assert config.max_position_embeddings == T
    assert config.n_inner is None
    assert config.activation_function == "gelu_new"
    assert config.tie_word_embeddings
    refused = (
        config.add_cross_attention,
        config.scale_attn_by_inverse_layer_idx,
        config.reorder_and_upcast_attn,
    )
    assert not any(refused)


def test_a_pipeline_writes_from_the_folder_what_we_write(tmp_path):
    from transformers import pipeline

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=48))
    model.save_pretrained(tmp_path)
    prompt = GPT2.encode_ordinary("Hello, I'm a language model,")
    ours = model.generate(torch.tensor([prompt]), 10, temperature=0)[0].tolist()
    write = pipeline("text-generation", str(tmp_path))
    theirs = write("Hello, I'm a language model,", max_new_tokens=10, do_sample=False)[0]["generated_text"]
    assert theirs == GPT2.decode(ours)


def test_saved_tokenizer_is_gpt2s(tmp_path):
    GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert len(stored["merges"]) == 50_000  # OpenAI's merges.txt, one pair each
    assert stored["merges"][:4] == ["Ġ t", "Ġ a", "h e", "i n"]
    assert all("".join(pair.split()) in stored["vocab"] for pair in stored["merges"])
    for text in (
        "Hello, I'm a language model,",
        "  many   spaces\n\n\ttabs ",
        "naïve café 東京 🙂",
        "x = 10**23;",
    ):
        assert tokenizer(text)["input_ids"] == GPT2.encode_ordinary(text)
        assert tokenizer.decode(GPT2.encode_ordinary(text)) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [50256] == [tokenizer.eos_token_id]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == 64
    assert (config["bos_token_id"], config["eos_token_id"]) == (50256, 50256)


def test_everybody_may_read_what_config_json_lets_them_read(tmp_path):
    GPT(replace(TINY, n_layer=1)).save_pretrained(tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_the_encoding_travels(tmp_path):
    """...by its name, and with a tokenizer for other programs."""
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8, encoding="bytes")
    GPT(config).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("h\u00e9llo  w\u00f6rld\n\t \u20ac", "", "\0 \x7f \U0001f600"):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [256] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_is_hugging_faces(padded, tmp_path):
    oracle = huggingface_model(replace(TINY, block_size=256))
    with torch.no_grad():  # else every row repeats one token
        for name, parameter in oracle.named_parameters():
            if ".h." in name and parameter.dim() == 2:
                parameter.mul_(20)
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    if padded:
        model.pad_vocabulary(128)
    idx = torch.randint(0, 299, (10, 8))
    ours = model.generate(idx, 200, temperature=0)
    theirs = oracle.generate(
        idx,
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        attention_mask=torch.ones_like(idx),
    )
    assert torch.equal(ours, theirs)
    assert min(len(set(row)) for row in ours.tolist()) > 10


def sharp_model() -> GPT:
    """Tiny, with weights so large that a wrong position or mask shows."""
    torch.manual_seed(0)
    model = GPT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def test_a_cache_changes_no_logit():
    """Read in parts of every size, rows that go on in several ways included, against all at once; 1e-4."""
    model = sharp_model()
    with torch.no_grad():
        idx = torch.randint(0, 300, (3, TINY.block_size))
        whole = model(idx)
        for sizes in (
            [1] * TINY.block_size,
            [5, 1, 17, 2, 1, 1],
            [TINY.block_size],
            [TINY.block_size - 1, 1],
        ):
            caches, start = model.new_caches(TINY.block_size), 0
            for size in sizes:
                logits = model(idx[:, start : start + size], caches=caches)
                assert torch.allclose(logits, whole[:, start : start + size], atol=1e-4)
                start += size
        with pytest.raises(ValueError, match="a cache for 64 tokens is given 65"):
            model(idx[:, :1], caches=caches)
        with pytest.raises(ValueError, match="longer than the model's block size"):
            model(idx[:, :1], caches=model.new_caches(65))
        caches = model.new_caches(10)
        model(idx[:, :10], caches=caches)
        with pytest.raises(ValueError, match="a cache for 10 tokens is given 11"):
            model(idx[:, 10:11], caches=caches)
        caches = model.new_caches(30)
        model(idx[:, :20], caches=caches)
        ways = torch.randint(0, 300, (6, 10))
        logits = model(ways, caches=[cache.select(torch.arange(6) // 2, 30) for cache in caches])
        for row in range(6):
            alone = model(torch.cat((idx[row // 2, :20], ways[row])).unsqueeze(0))
            assert torch.allclose(logits[row], alone[0, 20:], atol=1e-4)


def test_fixed_shapes_change_no_logit():
    """A prompt read at once, then token by token: against the growing cache and against none."""
    model, idx = sharp_model(), torch.randint(0, 300, (3, TINY.block_size))
    with torch.no_grad():
        whole = model(idx)
        for n_prompt, length in ((1, 64), (10, 40), (39, 40)):
            growing = model.new_caches(length)
            model(idx[:, :n_prompt], caches=growing)
            position = torch.tensor([n_prompt])
            fixed = [FixedKVCache(cache, length, position) for cache in growing]
            for t in range(n_prompt, length):
                logits = model(idx[:, t : t + 1], caches=fixed)
                for expected in (model(idx[:, t : t + 1], caches=growing), whole[:, t : t + 1]):
                    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)
                position += 1


@pytest.fixture
def compilations(monkeypatch):
    """Compile on the CPU too, quickly, and count. A stance is undone in the end."""
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile
    torch.compiler.reset()

    def quickly(function, *, mode, **options):
        assert mode == "reduce-overhead"  # CUDA graphs
        return compile(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", quickly)
    monkeypatch.setattr(sampling, "choose_compile", lambda wanted, _: (wanted, ""))
    yield counter
    torch.compiler.set_stance("default")


def test_a_compiled_step_serves_all_positions_and_the_next_text(compilations):
    """Without a break in the graph (fullgraph), so without a wait for the device; past the block size too."""
    model, sampled = sharp_model(), {"seed": 5, "top_p": 0.9}
    for rows, n_prompt, n_new, options, n_compiled in (
        (3, 5, 50, {"temperature": 0}, 1),
        (3, 7, 80, sampled, 1),
        (2, 70, 9, sampled, 1),  # no room for a cache
        (2, 5, COMPILE_FROM // 2, sampled, 1),  # would not pay
        (2, 5, 50, sampled, 2),  # another number of rows
    ):
        idx = torch.randint(0, 300, (rows, n_prompt))
        expected = model.generate(idx, n_new, **options)
        assert torch.equal(model.generate(idx, n_new, compile=True, **options), expected)
        assert compilations.frame_count == n_compiled
    # CUDA graphs are not made of a step that writes into tensors at unknown addresses.
    for graph in compilations.graphs:
        writes = [node.args[0].meta for node in graph.graph.nodes if node.target == "index_copy_"]
        assert len(writes) == 2 * TINY.n_layer
        assert all(meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded" for meta in writes)


def test_texts_of_a_shape_share_the_memory_that_a_graph_knows(compilations, monkeypatch):
    """CUDA graphs are recorded for addresses: new ones for every text would be a graph for every text. Two
    texts that are written in turns have one each. What a text leaves behind, even NaN, is gone."""
    model, idx = sharp_model(), torch.randint(0, 300, (2, 9))
    expected = model.generate(idx, 50, temperature=0)
    made, new = [], sampling.CompiledStep
    monkeypatch.setattr(sampling, "CompiledStep", lambda *given: made.append(new(*given)) or made[-1])
    model.generate(idx[:, :5], 50, compile=True)
    for tensor in (made[0].caches[0].keys, made[0].caches[1].values):
        tensor.fill_(math.nan)
    for _ in range(2):
        assert torch.equal(model.generate(idx, 50, temperature=0, compile=True), expected)
        next(itertools.islice(sampling.stream(model, idx, 50, compile=True), 3, None))  # and no further
    assert len(made) == 1
    in_turns = [sampling.stream(model, idx, 50, temperature=0, compile=True) for _ in range(2)]
    for token, first, second in zip(expected[:, 9:].split(1, dim=1), *in_turns, strict=True):
        assert torch.equal(first, token)
        assert torch.equal(second, token)
    assert len(made) == 2
    assert compilations.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_are_converted_once_for_the_same_logits(dtype):
    """Under autocast, read at once and compiled token by token: the same bits. The graph for a token converts
    no weight; before, it converts every matrix and its bias."""
    torch.compiler.reset()
    idx, found = torch.randint(0, 300, (3, 20)), []
    for convert in (False, True):
        model, graphs = sharp_model(), []
        if convert:
            sampling.convert_matrices(model, dtype)
        backend = aot_autograd(fw_compiler=lambda graph, _, graphs=graphs: graphs.append(graph) or graph)
        with torch.no_grad(), autocast_to(torch.device("cpu"), dtype):
            caches = model.new_caches(20)
            logits = [model(idx), model(idx[:, :19], caches=caches)]
            fixed = [FixedKVCache(cache, 20, torch.tensor([19])) for cache in caches]
            logits.append(torch.compile(sampling.next_logits, backend=backend)(model, idx[:, 19:], fixed))
            logits.append(sampling.next_logits(model, idx[:, 19:], caches))
        casts = [node for graph in graphs for node in graph.graph.nodes if "_to_copy" in str(node.target)]
        found.append((logits, sum(node.args[0].op == "placeholder" for node in casts)))
    (plain, before), (converted, after) = found
    assert all(map(torch.equal, plain, converted))
    assert (before, after) == (8 * TINY.n_layer + 1, 0)  # four layers with a bias in a block, and the head


def test_where_compilation_fails_sampling_goes_on(compilations, monkeypatch, capsys):
    """And says so once: the next text is not compiled either."""

    def fail(*_):
        raise RuntimeError("no such luck\nand more")

    model, idx = sharp_model(), torch.randint(0, 300, (2, 5))
    expected = model.generate(idx, 50, temperature=0)
    monkeypatch.setattr(CompileCounterWithBackend, "__call__", fail)
    for _ in range(2):
        assert torch.equal(model.generate(idx, 50, temperature=0, compile=True), expected)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("torch.compile failed, sampling goes on without it (BackendCompilerFailed: ")
    assert "raised: RuntimeError: no such luck" in said


class Operations(TorchDispatchMode):
    """Notes what PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split(".")[0].removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def test_sampling_runs_nothing_that_waits_for_a_gpu(compilations):
    """No value is read, no shape depends on one, and no number comes from the host."""
    waits = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
             "multinomial", "_to_copy", "lift_fresh"}  # fmt: skip
    model, idx = sharp_model(), torch.zeros(2, 5, dtype=torch.long)
    for compile, options in itertools.product(
        (False, True), ({"temperature": 0}, {"top_k": 9, "top_p": 0.9, "seed": 1}, {"top_k": None})
    ):
        with Operations() as operations:
            list(sampling.stream(model, idx, 70, compile=compile, **options))
        assert {"addmm", "index_copy_" if compile else "select"} <= operations.names
        assert not operations.names & waits


def test_the_training_graph_knows_nothing_of_the_cache():
    """One compiled graph, in which attention is one causal call: no mask, no copy."""
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    model = GPT(TINY)
    idx = torch.randint(0, 300, (2, 16))
    torch.compile(model, backend=backend)(idx, idx).backward()
    assert len(graphs) == 1
    assert sum("scaled_dot_product_attention" in target for target in graphs[0]) == TINY.n_layer
    assert not [target for target in graphs[0] if any(name in target for name in ("tril", "ones", "setitem"))]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.6), (20, 0.8), (1, 0.5), (500, 0.999)]
)
def test_tokens_are_drawn_with_hugging_faces_probabilities(top_k, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = torch.softmax(warpers(None, logits), dim=-1)[0]
    n = 40_000
    drawn = choose_token(logits.expand(n, -1), 0.8, top_k, top_p, torch.Generator().manual_seed(1))
    frequencies = torch.bincount(drawn.flatten(), minlength=50) / n
    assert not frequencies[expected == 0].any()
    # four standard deviations of a binomial
    assert ((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


def test_generation_goes_on_past_the_block_size_and_never_samples_padding():
    model = GPT(TINY).pad_vocabulary(1024)
    text = model.generate(torch.zeros(4, 60, dtype=torch.long), 30, top_k=None, temperature=10.0, seed=0)
    assert text.shape == (4, 90)
    assert text.max() < 300
    again = model.generate(torch.zeros(4, 60, dtype=torch.long), 30, top_k=None, temperature=10.0, seed=0)
    assert torch.equal(text, again)
    best = model.generate(torch.zeros(1, 4, dtype=torch.long), 5, top_k=1, seed=3)
    assert torch.equal(best, model.generate(torch.zeros(1, 4, dtype=torch.long), 5, temperature=0))


def test_a_later_token_never_changes_an_earlier_logit():
    model = GPT(TINY)
    idx = torch.randint(0, 300, (1, 64))
    changed = idx.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 300
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40], after[:, 40])


def test_loss_at_initialisation_is_that_of_a_guess():
    model = GPT(GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128)).pad_vocabulary()
    idx = torch.randint(0, 50257, (4, 65))
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(50257)) < 0.1


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.05, name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_parameters_are_counted_as_openai_counts():
    counts = {name: GPTConfig(**shape).n_parameters for name, shape in MODEL_SHAPES.items() if name != "demo"}
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


def test_padding_stays_zero_and_changes_nothing_in_training():
    def train(padded: bool) -> GPT:
        torch.manual_seed(0)
        model = GPT(TINY)
        if padded:
            model.pad_vocabulary(128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        idx = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            model(idx[:, :-1], idx[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    plain, padded = train(False), train(True)
    assert padded.transformer.wte.weight.shape == (384, 32)
    assert (padded.transformer.wte.weight[300:] == 0).all()
    assert torch.allclose(padded.transformer.wte.weight[:300], plain.transformer.wte.weight, atol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="a sequence of 65 tokens is longer than the model's block size, 64"):
        GPT(TINY)(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="n_embd 30 can't be divided among n_head 4"):
        GPT(GPTConfig(n_embd=30, n_head=4))


def test_folders_that_are_no_gpt2_are_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder \./nowhere"):
        GPT.from_pretrained("./nowhere")
    with pytest.raises(InputError, match=r"is not a model: it has no config\.json"):
        GPT.from_pretrained(tmp_path)
    GPT(TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"n_inner": 7}, "n_inner is 7"),
        ({"n_embd": 64}, "is .*, its config.json means"),
        ({"n_layer": 3}, "tensors missing"),
        ({"n_layer": "x"}, "not the configuration of a GPT-2"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json", GPTConfig)["n_embd"] == 32
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04garbage that might be a pickle")
    with pytest.raises(InputError, match="not a sound safetensors file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: damaged, or not written by torch\.save"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"it has no model\.safetensors"):
        GPT.from_pretrained(tmp_path)


def test_openais_own_files_load(tmp_path):
    """OpenAI's files on the Hub lack the "transformer." prefix and store the causal masks."""
    import safetensors.torch

    GPT(TINY).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    wte = GPT.from_pretrained(tmp_path).transformer.wte.weight
    assert torch.equal(wte, tensors["transformer.wte.weight"])
    old["lm_head.weight"] = old["wte.weight"].clone()  # a copy of the embedding says nothing new
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, wte)
    old["lm_head.weight"][3, 5] += 1  # another head is another model: nothing is dropped that differs
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight is not the embedding's copy"):
        GPT.from_pretrained(tmp_path)
