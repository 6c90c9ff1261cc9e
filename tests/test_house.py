"""The rules of the house (CONTRIBUTING.md), read from the sources."""

import ast
import re
import sys

from conftest import ROOT

import pytest

SCRIPTS = {"train_gpt2", "fineweb", "hellaswag", "sample", "plot"}
ROOMS = sorted(ROOT.glob("support/**/*.py"))
ALL = sorted(ROOT.glob("*.py")) + ROOMS
# Scripts that a script may import at its top, and inside its main().
AT_THE_TOP = {"train_gpt2": {"hellaswag"}}
INSIDE_MAIN = {"hellaswag": {"train_gpt2"}, "sample": {"train_gpt2"}, "plot": {"train_gpt2"}}


def imports(node):
    """The modules that the statements under `node` import, as (module, names)."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, []) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module, [alias.name for alias in child.names]


def top_and_inner(file):
    """What a file imports when it is imported, and what its functions import."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {module for function in functions for module, _ in imports(function)}
    everything = {module for module, _ in imports(tree)}
    top = {module for statement in tree.body for module, _ in imports(statement)
           if not isinstance(statement, ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    return top, inner, everything


def test_five_scripts_stand_at_the_door():
    assert {file.stem for file in ROOT.glob("*.py")} == SCRIPTS
    assert not [file for file in ALL if file.stem in ("utils", "common", "misc", "helpers")]


@pytest.mark.parametrize("file", ROOMS, ids=lambda file: file.stem)
def test_support_imports_no_script(file):
    _, _, everything = top_and_inner(file)
    assert not {module.split(".")[0] for module in everything} & SCRIPTS


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_import_one_another_only_where_the_rules_say(script):
    file = ROOT / f"{script}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS and node in tree.body:
            assert node.module in AT_THE_TOP.get(script, set())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    in_main = {module: names for module, names in imports(main) if module in SCRIPTS}
    assert in_main.keys() == INSIDE_MAIN.get(script, set())
    assert all(names == ["GPT"] for names in in_main.values())
    anywhere = {module for module, _ in imports(tree)} & SCRIPTS
    assert anywhere == AT_THE_TOP.get(script, set()) | INSIDE_MAIN.get(script, set())


def test_the_rooms_form_no_circle():
    """Each room can be read after those that it imports."""
    needs = {}
    for file in ROOMS:
        _, _, everything = top_and_inner(file)
        needs[f"support.{file.stem}"] = {m for m in everything if m.startswith("support.")}
    while needs:
        free = {room for room, others in needs.items() if not others & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {room: others for room, others in needs.items() if room not in free}


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_heavy_libraries_are_imported_where_they_are_used(file):
    heavy = {"transformers", "datasets", "matplotlib", "huggingface_hub", "pyarrow", "tokenizers"}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    at_import = [
        node for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]  # fmt: skip
    modules = {module.split(".")[0] for node in at_import for module, _ in imports(node)}
    assert not modules & heavy


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_only_definitions_at_the_top(file):
    """Imports, constants, classes and functions; the exceptions are named."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    for node in tree.body[1:]:
        if isinstance(node, allowed):
            continue
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ast.unparse(node)
        environment = (
            re.fullmatch(r"(sys\.platform == 'linux' and )?'[A-Z_]+' not in os\.environ", test)
            and file.stem == "__init__"
        )
        assert environment or test in ("__name__ == '__main__'", "TYPE_CHECKING")
    assert isinstance(ast.get_docstring(tree), str), "every file says what it is"


def lines_of(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def test_what_is_read_in_one_sitting_stays_so():
    assert lines_of(ROOT / "train_gpt2.py") <= 750
    assert lines_of(ROOT / "fineweb.py") <= 450
    assert lines_of(ROOT / "README.md") <= 160
    tree = ast.parse((ROOT / "train_gpt2.py").read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno + 1 <= 110


def test_openmp_is_told_before_torch_is_imported():
    """Our imports come first in every file that is a program: support/__init__.py sets the variable."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        order = [module.split(".")[0] for node in tree.body for module, _ in imports(node)]
        if "torch" in order:
            ours = [i for i, module in enumerate(order) if module in {"support", *SCRIPTS}]
            assert ours, file
            assert min(ours) < order.index("torch"), file


def test_the_version_stands_in_one_place():
    from support import VERSION

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {VERSION}" in changelog or f"## [{VERSION}]" in changelog
    places = [file for file in ALL if f'"{VERSION}"' in file.read_text(encoding="utf-8")]
    assert places == [ROOT / "support/__init__.py"]
    assert sys.version_info >= (3, 11)


def test_fsdp_is_loaded_where_it_is_used():
    """It takes most of a second, which every start of every script would pay."""
    for file in ALL:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {module for node in top for module, _ in imports(node)}
        assert not {
            m for m in modules if m.startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))
        }
