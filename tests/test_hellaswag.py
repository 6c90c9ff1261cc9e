"""HellaSwag: the protocol by hand, padding, batching, ranks, and bad items."""

import json
import math
import random
from dataclasses import replace

import hellaswag
from conftest import call, run, torchrun
from hellaswag import LIMITS, Item, batches, evaluate, load_items, render, score_batch
from hub import serve
from support.cli import InputError
from support.data.encodings import get_encoding
from train_gpt2 import GPT, GPTConfig

import pytest
import torch

BYTES, GPT2 = get_encoding("bytes"), get_encoding("gpt2")
ITEMS = [
    Item(
        i,
        f"The cat number {i} sat",
        (f"on mat {i}.", "down", "and then it said so " * (i % 3 + 1), "."),
        i % 4,
    )
    for i in range(23)
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=257, n_layer=2, n_head=2, n_embd=32, encoding="bytes"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that endings differ
    return model


def by_hand(model, item, encoding=BYTES):
    """The tutorial's way: one ending at a time, no padding, the loss of each of its tokens from the
    logits."""
    sums, means = [], []
    for ending in item.endings:
        context, continuation = encoding.encode_ordinary(item.ctx), encoding.encode_ordinary(" " + ending)
        logits = model(torch.tensor([(context + continuation)[:-1]]))[0].detach()
        log_probabilities = torch.log_softmax(logits, dim=-1)
        losses = [
            -log_probabilities[len(context) + i - 1, token].item() for i, token in enumerate(continuation)
        ]
        sums.append(sum(losses))
        means.append(sum(losses) / len(losses))
    return sums, means


def test_scores_are_those_worked_out_by_hand(model):
    score = evaluate(model, ITEMS, BYTES)
    assert [p["ind"] for p in score.predictions] == [item.ind for item in ITEMS]
    right = right_norm = 0
    for item, prediction in zip(ITEMS, score.predictions, strict=True):
        sums, means = by_hand(model, item)
        assert prediction["loss_sum"] == pytest.approx(sums, rel=1e-5)
        assert prediction["loss_mean"] == pytest.approx(means, rel=1e-5)
        assert prediction["pred"] == sums.index(min(sums))
        assert prediction["pred_norm"] == means.index(min(means))
        right += sums.index(min(sums)) == item.label
        right_norm += means.index(min(means)) == item.label
    assert (score.acc, score.acc_norm, score.n) == (right / 23, right_norm / 23, 23)
    assert score.standard_error(0.25) == pytest.approx(math.sqrt(0.25 * 0.75 / 22))
    assert "tutorial protocol" in str(score)


def test_the_mask_covers_the_ending_and_its_space():
    rendered = render(Item(0, "A man is", ("sitting.", "up", "x y z", "!"), 0), GPT2)
    assert GPT2.decode(rendered.context) == "A man is"
    assert [GPT2.decode(ending) for ending in rendered.endings] == [" sitting.", " up", " x y z", " !"]
    assert rendered.lengths == [len(ending) for ending in rendered.endings]


def test_padding_never_changes_a_score(model):
    item = render(ITEMS[5], BYTES)
    longer = render(Item(0, ITEMS[5].ctx, ("a", "b", "c", "d " * 40), 0), BYTES)
    alone = score_batch(model, [item], LIMITS["cpu"])
    together = score_batch(model, [longer, item, longer], LIMITS["cpu"])
    assert torch.allclose(alone[0], together[1], atol=1e-5)
    one_token = render(Item(0, ITEMS[5].ctx, ("", "", "", ""), 0), BYTES)
    assert torch.allclose(
        score_batch(model, [one_token], LIMITS["cpu"])[0],
        score_batch(model, [one_token, longer], LIMITS["cpu"])[0],
        atol=1e-5,
    )


def test_an_item_longer_than_the_block_loses_the_beginning_of_its_context(model):
    """...so much of it that its longest ending fits."""
    ctx, endings = "x" * 500 + " the end of it", ("one", "two", "three", "four")
    score = evaluate(model, [Item(0, ctx, endings, 1)], BYTES)
    assert score.truncated == 1
    assert "1 cut to fit" in str(score)
    cut = Item(0, ctx[-(129 - len(" three")) :], endings, 1)
    assert score.predictions[0]["loss_sum"] == pytest.approx(by_hand(model, cut)[0], abs=1e-4)
    assert evaluate(model, [cut], BYTES).truncated == 0
    endless = Item(
        0, ctx, ("a" * 200, "b", "c", "d"), 1
    )  # no room: one token of context, the ending's beginning
    score = evaluate(model, [endless], BYTES)
    assert score.truncated == 1
    expected = by_hand(model, Item(0, "t", ("a" * 127, "b", "c", "d"), 1))
    assert score.predictions[0]["loss_sum"] == pytest.approx(expected[0], abs=1e-3)
    assert score.predictions[0]["loss_mean"] == pytest.approx(expected[1], abs=1e-4)


@torch.no_grad()
def as_the_harness_cuts(model, rendered, block_size):
    """The summed losses of the endings, each with as much of the context before it as fits."""
    sums = []
    for ending in rendered.endings:
        tokens = (rendered.context + ending)[-(block_size + 1) :]
        log_probabilities = torch.log_softmax(model(torch.tensor([tokens[:-1]]))[0], dim=-1)[-len(ending) :]
        sums.append(-log_probabilities[range(len(ending)), ending].sum().item())
    return sums


def test_the_harness_protocol_cuts_each_ending_for_itself(model, monkeypatch):
    """Items that fit, that are cut for some endings, and for all; with the batches of either device."""
    generator, items = random.Random(3), []
    for ind in range(24):
        endings = tuple("e" * generator.randint(1, 40) for _ in range(4))
        context = "".join(generator.choices("abc ", k=generator.randint(60, 150)))
        items.append(Item(ind, context, endings, 0, harness_ctx=context))
    rendered = [render(item, BYTES, "harness") for item in items]
    cut = [hellaswag.fit(one, 128, "harness") for one in rendered]
    kinds = [sum(len(one.context) + len(e) > 129 for e in one.endings) for one in rendered]
    assert {0, 4} < set(kinds), "some of all kinds"
    for limits in (LIMITS["cpu"], LIMITS["gpu"], hellaswag.Limits(tokens=900, rows=3, spread=9, logits=5)):
        monkeypatch.setitem(LIMITS, "cpu", limits)
        score = evaluate(model, items, BYTES, protocol="harness")
        for one, prediction in zip(rendered, score.predictions, strict=True):
            expected = as_the_harness_cuts(model, one, 128)
            assert prediction["loss_sum"] == pytest.approx(expected, abs=2e-4)
        assert score.truncated == sum(kind > 0 for kind in kinds)
    # Where all endings keep the same context, it is shared, and read once.
    kept = [{min(129 - len(e), len(one.context)) for e in one.endings} for one in rendered]
    assert [any(one.starts) for one in cut] == [len(lengths) > 1 for lengths in kept]
    tutorial = evaluate(model, items, BYTES)
    assert any(a["loss_sum"] != pytest.approx(b["loss_sum"], abs=1e-2)
               for a, b in zip(tutorial.predictions, score.predictions, strict=True))  # fmt: skip


def test_a_gpus_large_batches_score_the_same(model, monkeypatch):
    """The limits of either kind of device, on the same items; and tiny ones, which cut everywhere."""
    on_cpu = evaluate(model, ITEMS, BYTES)
    for limits in (LIMITS["gpu"], hellaswag.Limits(tokens=200, rows=3, spread=1, logits=5)):
        monkeypatch.setitem(LIMITS, "cpu", limits)
        other = evaluate(model, ITEMS, BYTES)
        assert (other.acc, other.acc_norm) == (on_cpu.acc, on_cpu.acc_norm)
        for a, b in zip(on_cpu.predictions, other.predictions, strict=True):
            assert a["loss_sum"] == pytest.approx(b["loss_sum"], abs=1e-4)
            assert (a["pred"], a["pred_norm"]) == (b["pred"], b["pred_norm"])


def test_a_card_too_small_for_large_batches_scores_the_same(model, monkeypatch):
    """Once a GPU's batch is out of memory, all items are scored in small ones, in the same order."""
    expected = evaluate(model, ITEMS, BYTES)
    large, tried, whole = replace(LIMITS["gpu"], tokens=600), [], hellaswag.score_batch

    def out_of_memory(model, batch, limits):
        tried.append(limits)
        if limits == large:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(model, batch, limits)

    monkeypatch.setattr(hellaswag, "score_batch", out_of_memory)
    monkeypatch.setattr(hellaswag, "limits_for", lambda _, kind=None: LIMITS[kind] if kind else large)
    found = evaluate(model, ITEMS, BYTES)
    assert tried.count(large) == 1
    assert len(list(batches([render(item, BYTES) for item in ITEMS], large))) > 3
    assert (found.acc, found.acc_norm) == (expected.acc, expected.acc_norm)
    for a, b in zip(expected.predictions, found.predictions, strict=True):
        assert a["loss_sum"] == pytest.approx(b["loss_sum"], abs=1e-4)


def test_a_larger_model_gets_fewer_tokens_at_once():
    small = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8))
    assert hellaswag.limits_for(small) == LIMITS["cpu"]
    with torch.device("meta"):
        xl = GPT(GPTConfig(n_layer=48, n_head=25, n_embd=1600))
    assert hellaswag.limits_for(xl) == hellaswag.Limits(65_536 * 12 * 768 // (48 * 1600), 512, 16, 4_096)


def passes(items, kind):
    """How often the model is called for these items, and how many tokens it reads, padding included."""
    rendered = [render(item, GPT2) for item in items]
    n_passes = n_tokens = 0
    for batch in batches(rendered, LIMITS[kind]):
        contexts = [len(one.context) for one in batch]
        n_read = min(contexts) - 1
        rows = sorted(len(one.context) - n_read + len(e) - 1 for one in batch for e in one.endings)
        groups = [rows[i : i + LIMITS[kind].rows] for i in range(0, len(rows), LIMITS[kind].rows)]
        n_passes += (n_read > 0) + len(groups)
        n_tokens += n_read * len(batch) + sum(len(group) * group[-1] for group in groups)
    return n_passes, n_tokens


def test_a_gpu_scores_in_few_passes(gpt2_data):
    """The 3,243 items of ActivityNet."""
    items = load_items(gpt2_data / "hellaswag_val_activitynet.jsonl")
    (few, padded), (many, tight) = passes(items, "gpu"), passes(items, "cpu")
    print(f"gpu: {few} passes, {padded:,} tokens; cpu: {many} passes, {tight:,} tokens")
    assert few <= 60
    assert many > 500
    assert padded < 1.5 * tight


def test_items_with_one_ind_are_kept_apart(model):
    items = [Item(0, item.ctx, item.endings, item.label) for item in ITEMS]
    together = evaluate(model, items, BYTES).predictions
    assert [prediction["label"] for prediction in together] == [item.label for item in items]


def test_real_items_load_and_score(gpt2_data):
    items = load_items(gpt2_data / "hellaswag_val_activitynet.jsonl")
    assert len(items) == 3243
    assert {item.label for item in items} == {0, 1, 2, 3}
    assert len(load_items(gpt2_data / "hellaswag_val_activitynet.jsonl", limit=7)) == 7
    model = GPT(GPTConfig(block_size=256, n_layer=1, n_head=2, n_embd=16))
    score = evaluate(model, items[:12], GPT2)
    for item, prediction in zip(items, score.predictions, strict=False):
        sums, means = by_hand(model, item, GPT2)
        assert prediction["loss_sum"] == pytest.approx(sums, abs=1e-3)
        assert prediction["loss_mean"] == pytest.approx(means, abs=1e-4)


GOOD = {"ind": 3, "ctx": "c", "endings": ["a", "b", "c", "d"], "label": 1}


@pytest.mark.parametrize(
    "bad",
    [
        "not json",
        "[1, 2]",
        json.dumps({**GOOD, "endings": ["a", "b", "c"]}),
        json.dumps({**GOOD, "label": 7}),
        json.dumps({**GOOD, "label": ""}),
        json.dumps({**GOOD, "ctx": None}),
        json.dumps({"ind": 1}),
        json.dumps({**GOOD, "endings": "abcd"}),
        json.dumps({**GOOD, "label": 1.7}),
        json.dumps({**GOOD, "label": True}),
        json.dumps({**GOOD, "label": False}),
        json.dumps({**GOOD, "ind": 1}).replace("1,", "1e999,", 1),
        "[" * 100_000,
    ],
)
def test_a_bad_item_is_named_by_file_and_line(bad, tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "label": "2"}) + "\n" + bad + "\n")
    with pytest.raises(InputError, match=r"items\.jsonl, line 3"):
        load_items(file)
    file.write_text("".join(json.dumps({**GOOD, "label": i % 4, "ind": i}) + "\n" for i in range(10)))
    assert [item.ind for item in load_items(file, limit=4)] == [0, 2, 5, 7]  # spread over all
    assert len(load_items(file, limit=99)) == 10


def test_the_hubs_items_load_with_labels_that_are_strings(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "hub/datasets/Rowan/hellaswag/data"
    folder.mkdir(parents=True)
    rows = [
        {"ind": i, "ctx": f"context {i}", "endings": ["a", "b", "c", "d"], "label": str(i % 4)}
        for i in range(10_042)
    ]
    for split in ("train", "validation", "test"):
        table = pyarrow.Table.from_pylist(rows if split == "validation" else rows[:3])
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    code = "import hellaswag; items = hellaswag.load_items(); print(len(items), items[7])"
    with serve(tmp_path / "hub") as (env, _):
        done = run("-c", code, env=env)
    assert "10042 Item(ind=7, ctx='context 7', endings=('a', 'b', 'c', 'd'), label=3," in done.stdout
    with pytest.raises(InputError, match="expected 10,042"):
        hellaswag.check_complete(rows[:-1])


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("hellaswag")
    model.save_pretrained(folder / "model")
    (folder / "items.jsonl").write_text("".join(json.dumps({**item.__dict__}) + "\n" for item in ITEMS))
    return folder


def test_the_script(files, model):
    done = run(
        "hellaswag.py",
        f"--model={files}/model",
        f"--data={files}/items.jsonl",
        f"--save_predictions={files}/predictions.jsonl",
        "--device=cpu",
    )
    score = evaluate(model, ITEMS, BYTES)
    assert str(score) in done.stdout
    predictions = [json.loads(line) for line in (files / "predictions.jsonl").read_text().splitlines()]
    assert [list(p) for p in predictions] == [
        ["ind", "label", "pred", "pred_norm", "loss_sum", "loss_mean"]
    ] * 23
    assert [p["pred_norm"] for p in predictions] == [p["pred_norm"] for p in score.predictions]
    few = call(
        "hellaswag.py", f"--model={files}/model", f"--data={files}/items.jsonl", "--limit=5", "--device=cpu"
    )
    assert "(5 items" in few.stdout


HARNESS = {
    "activity_label": "Making tea",
    "ctx_a": "[header] How to make tea [title] Boil  water.",
    "ctx_b": "the CAT",
    "endings": ["sits [step] down.", "is a cat [title] It is", " sleeps ", "x"],
}


def test_the_harness_protocol_by_hand(files, model):
    """Its own text, cleaned; losses divided by the ending's characters. `test_the_harness_scores_as_we_do`
    asks the harness itself."""
    item = hellaswag.to_item({**GOOD, **HARNESS}, "")
    context = "Making tea: How to make tea. Boil water. The cat"
    assert item.harness_ctx == "Making tea:  How to make tea. Boil water. The cat".replace("  ", " ")
    endings = ["sits down.", "is a cat. It is", "sleeps", "x"]
    spaced = hellaswag.to_item({**GOOD, **HARNESS, "ctx_b": "the cat [step]"}, "")
    assert spaced.harness_ctx.endswith("The cat ")
    rendered = hellaswag.render(spaced, GPT2, "harness")
    assert GPT2.decode(rendered.context) == spaced.harness_ctx.rstrip()
    whole = GPT2.encode_ordinary(spaced.harness_ctx + " x")
    assert rendered.context + rendered.endings[3] == whole
    score = evaluate(model, [item], BYTES, protocol="harness")
    sums, _ = by_hand(model, Item(3, context, tuple(endings), 1))
    assert score.predictions[0]["loss_sum"] == pytest.approx(sums, rel=1e-5)
    means = [loss / len(ending) for loss, ending in zip(sums, endings, strict=True)]
    assert score.predictions[0]["loss_mean"] == pytest.approx(means, rel=1e-5)
    assert "harness protocol" in str(score)
    flags = f"--model={files}/model", f"--data={files}/items.jsonl", "--protocol=harness", "--device=cpu"
    lacking = call("hellaswag.py", *flags, check=False)
    assert lacking.returncode == 2
    assert "item 0 has no activity_label, ctx_a and ctx_b" in lacking.stderr


def test_several_models_make_a_table(files, model, tmp_path):
    torch.manual_seed(5)
    other = GPT(model.config)
    other.save_pretrained(tmp_path / "other")
    names = f"{files}/model", f"{tmp_path}/other"
    table = call("hellaswag.py", "--model", *names, f"--data={files}/items.jsonl", "--device=cpu").stdout
    rows = table.splitlines()
    assert len(rows) == 2
    for name, row, scored in zip(names, rows, (model, other), strict=True):
        assert row.startswith(name)
        assert row.endswith(str(evaluate(scored, ITEMS, BYTES)))
    assert rows[0].index("HellaSwag acc") == rows[1].index("HellaSwag acc")


@pytest.mark.slow
def test_training_scores_the_same_on_one_process_and_on_two(files, text_shards, tmp_path):
    command = (
        "train_gpt2.py",
        f"--init_from={files}/model",
        f"--data_dir={text_shards}",
        "--sequence_length=32",
        "--total_batch_size=256",
        "--micro_batch_size=2",
        "--max_steps=0",
        "--val_every=0",
        "--sample_every=0",
        "--device=cpu",
        f"--hellaswag_data={files}/items.jsonl",
        "--hellaswag_limit=17",
    )
    one = call(*command, f"--log_dir={tmp_path}/one")
    two = torchrun(2, *command, f"--log_dir={tmp_path}/two")
    assert "(17 items, tutorial protocol)" in one.stdout
    assert " of evaluation, saving and start-up" in one.stdout
    line = "step 0: HellaSwag acc "
    assert line in one.stdout
    assert one.stdout[one.stdout.index(line) :].splitlines()[0] in two.stdout
    assert (tmp_path / "one/log.txt").read_text() == (tmp_path / "two/log.txt").read_text()


def test_training_goes_on_without_hellaswag(text_shards, tmp_path):
    with serve(tmp_path) as (env, _):  # a Hub that has nothing
        done = run(
            "train_gpt2.py",
            "--n_layer=1",
            "--n_head=1",
            "--n_embd=8",
            f"--data_dir={text_shards}",
            "--sequence_length=32",
            "--total_batch_size=64",
            "--max_steps=3",
            "--val_tokens=64",
            "--device=cpu",
            "--hellaswag_every=1",
            f"--log_dir={tmp_path}/log",
            env=env,
        )
    assert done.stdout.count("training without HellaSwag: could not fetch Rowan/hellaswag") == 1
    assert "done: 3 steps" in done.stdout


def test_predictions_never_take_the_place_of_the_items(tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(GOOD))
    flags = f"--data={file}", f"--save_predictions={tmp_path}/../{tmp_path.name}/items.jsonl"
    done = call("hellaswag.py", *flags, "--device=cpu", check=False)
    assert done.returncode == 2
    assert "items.jsonl: that file holds the items; choose another" in done.stderr
    assert file.read_text() == json.dumps(GOOD)


def test_predictions_that_could_not_be_saved_are_found_before_scoring(tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(GOOD))
    flags = f"--data={file}", f"--save_predictions={tmp_path}", f"--model={tmp_path}/none", "--device=cpu"
    done = call("hellaswag.py", *flags, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: {tmp_path}: Is a directory")
