"""README and docs: every command parses, every link leads somewhere."""

import ast
import json
import os
import re
import shlex

import fineweb
import hellaswag
import plot
import sample
import train_gpt2
from conftest import ROOT
from support.cli import check_first_word, parse

import pytest

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/*.ipynb"))]
CONFIGS = {
    "train_gpt2.py": (train_gpt2.TrainConfig, "--help"),
    "fineweb.py": (fineweb.ShardConfig, "--input"),
    "hellaswag.py": (hellaswag.ScoreConfig, "--model"),
    "sample.py": (sample.SampleConfig, "--model"),
    "plot.py": (plot.Run | plot.Positions | plot.Watch, "run"),
}


def text_of(page):
    """A page's text; of a notebook, its cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands():
    """(page, command) for each line in a fenced block, and each span of code, that calls a script."""
    for page in PAGES:
        text = text_of(page)
        fenced = [
            line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
        ]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [*fenced, *inline]:
            for command in line.split("&&"):
                command = command.strip().removeprefix("!")  # of a notebook's cell
                found = re.search(r"(?:^|\s)(\w+\.py)(\s.*)?$", command.split(" #")[0].strip())
                calls = command.startswith(("python", "torchrun", "OMP_", "TORCH_"))
                if found and calls and found[1] in CONFIGS:
                    yield page, found[1], re.split("[<&]", found[2] or "")[0]


COMMANDS = sorted({(page.name, script, rest.strip()) for page, script, rest in commands()})


@pytest.mark.parametrize(("page", "script", "rest"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_of_the_documentation_parses(page, script, rest):
    config, usual_flag = CONFIGS[script]
    arguments = shlex.split(rest)
    check_first_word(config, arguments, usual_flag)
    if "--help" in arguments or "--version" in arguments:
        return
    options = {"default": train_gpt2.choose_defaults(arguments)} if script == "train_gpt2.py" else {}
    parse(config, options, arguments)


def test_there_are_commands():
    assert len(COMMANDS) > 40
    assert {script for _, script, _ in COMMANDS} == set(CONFIGS)


def test_every_link_leads_somewhere():
    for page in PAGES:
        text = text_of(page)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings]
                assert anchor in slugs, f"{page.name}: {target}"


def test_every_file_and_test_that_is_named_exists():
    tests = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*.py"))
    for page in PAGES:
        text = text_of(page)
        for name in re.findall(r"`((?:support|tests|benchmarks|docs)/[\w./]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in tests, f"{page.name}: {name}"


def test_every_test_that_the_fault_table_names_exists():
    """`-k NAME` must find something."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*.py"))
    tests = re.findall(r"^def test_(\w+)", sources, re.MULTILINE)
    page = (ROOT / "docs/recovery.md").read_text(encoding="utf-8")
    rows = page.split("## How each row is tested")[1]
    names = [name for name in re.findall(r"`(\w+)`", rows) if "_" in name]
    assert len(names) > 30
    for name in names:
        assert any(name in test for test in tests), name


def test_every_room_is_on_the_map_and_every_file_says_what_it_is_for():
    """The README names the rooms; a file's docstring is its entry."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("support/         ")[1].split("```")[0]
    assert re.findall(r"(\w+)/", tree) == ["data", "model", "machine", "run"]
    for file in ROOT.glob("support/**/*.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_no_page_knows_this_machine():
    for page in PAGES:
        text = text_of(page)
        assert not re.search(r"(^|[\s`(])/(home|root|tmp|work|Users)/|\.\./shared|PLACEHOLDER", text), (
            page.name
        )


def test_the_tests_run_as_the_readme_says():
    """CI calls the README's two commands, to the letter."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(pip install -r requirements\.txt && (.+))\n```", readme)
    assert [command for _, command in blocks] == ["python train_gpt2.py --demo", "python -m pytest"]
    assert "README.md" in ci
    assert os.access(ROOT / ".ci/run", os.X_OK)
