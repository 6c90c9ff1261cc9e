"""
The rules of the house (CONTRIBUTING.md), read from the sources.

They are rules of this project, not of Python: if one of these tests fails after a change of yours, nothing is
broken. Each message says what the rule is for.
"""

import ast
import io
import re
import sys
import tokenize

from conftest import ROOT

import pytest

SCRIPTS = {"train_gpt2", "fineweb", "hellaswag", "sample", "plot"}
FILES = sorted(ROOT.glob("support/**/*.py"))
ALL = sorted(ROOT.glob("*.py")) + FILES
# Scripts that a script may import at its top, and inside its main().
AT_THE_TOP = {"train_gpt2": {"hellaswag"}}
INSIDE_MAIN = {"hellaswag": {"train_gpt2"}, "sample": {"train_gpt2"}, "plot": {"train_gpt2"}}
# Each room of support/, and the rooms that it may use; every room may use cli.py and files.py.
ROOMS = {
    "run": {"run", "model", "machine", "data"},
    "model": {"model", "machine", "data"},
    "machine": {"machine"},
    "data": {"data"},
}
VERBS = (
    "F.scaled_dot_product_attention(",
    "F.cross_entropy(",
    "torch.compile(",
    "DistributedDataParallel(",
    "torch.autocast(",
    "torch.set_float32_matmul_precision(",
    "torch.optim.AdamW(",
    ".require_backward_grad_sync =",
    ".backward()",
    "clip_grad_norm_(",
    "optimizer.step()",
    "optimizer.zero_grad(",
    "dist.all_reduce(",
    "model.eval()",
    "model.train()",
)


def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def is_for_types(node):
    """Whether a statement is read by type checkers alone."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def without_types(tree):
    """The tree without what stands under `if TYPE_CHECKING:`."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not is_for_types(statement)]
    return tree


def imports(node):
    """The modules that the statements under `node` import, as (module, names)."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, []) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module, [alias.name for alias in child.names]


def modules_of(node):
    """The same, each as its own module: `from support.machine import device` is support.machine.device."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}
    for module, names in imports(node):
        inside = [f"{module}.{name}" for name in names if f"{module}.{name}" in files]
        yield from inside or [module]


def main_of(file):
    (main,) = (node for node in tree_of(file).body if getattr(node, "name", "") == "main")
    return main


# ------------------------------------------------------------------ the lecture


@pytest.mark.parametrize("verb", VERBS)
def test_the_verbs_are_in_the_lecture(verb):
    """Whoever followed the lecture finds its steps in train_gpt2.py, as literal calls."""
    script = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    assert verb in script, "a step of the lecture has left the script: put the call back"


def test_what_is_read_in_one_sitting_stays_so():
    """A little more is no harm; far more means that a part of it belongs behind the script."""
    length = len((ROOT / "train_gpt2.py").read_text(encoding="utf-8").splitlines())
    main = main_of(ROOT / "train_gpt2.py")
    rule = (
        "a rule of this project: the script is read in one sitting. Packing is no cure; a longer one may be"
    )
    assert length <= 850, rule
    assert main.end_lineno - main.lineno <= 170, rule
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160, "README.md is one page"


def test_few_names_come_in():
    """Of our own, into train_gpt2.py: a reader has to keep them in mind."""
    names = [
        name
        for module, names in imports(tree_of(ROOT / "train_gpt2.py"))
        for name in names
        if module.split(".")[0] in {"support", *SCRIPTS}
    ]
    assert len(names) <= 25, "a rule of this project: import a module, or let a name do more"


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_nothing_is_packed(file):
    """Readers pay for what is packed to keep a limit of lines."""
    text = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    assert not any(token.type == tokenize.OP and token.string == ";" for token in tokens), (
        "one statement a line"
    )
    if file.parent == ROOT:
        assert "fmt: skip" not in text, "a script is laid out by ruff alone"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            assert len(node.args) <= 5, f"line {node.lineno}: name some arguments"


def test_few_exceptions_from_the_layout():
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    assert sum(text.count("fmt: skip") for text in texts) <= 5


# ------------------------------------------------------------------ the walls


def test_five_scripts_stand_at_the_door():
    assert {file.stem for file in ROOT.glob("*.py")} == SCRIPTS
    assert not [file for file in ALL if file.stem in ("utils", "common", "misc", "helpers", "words")]
    assert {file.parent.name for file in FILES} == {"support", *ROOMS}
    assert {file.stem for file in ROOT.glob("support/*.py")} == {"__init__", "cli", "files"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_point_one_way(file):
    """Scripts, run, model, then machine and data; and cli and files below all. For types, anything goes."""
    room = file.parent.name
    for module in modules_of(without_types(tree_of(file))):
        first, *rest = module.split(".")
        assert first not in SCRIPTS, "support imports no script: take what you need as an argument"
        if first == "support" and len(rest) > 1:
            assert room in ROOMS, f"{module}: cli.py and files.py use no room"
            assert rest[0] in ROOMS[room], f"{room} may use {ROOMS[room]}, not {module}"


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_import_one_another_only_where_the_rules_say(script):
    tree = without_types(tree_of(ROOT / f"{script}.py"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            assert node.module in AT_THE_TOP.get(script, set())
    (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
    in_main = {module: names for module, names in imports(main) if module in SCRIPTS}
    assert in_main.keys() == INSIDE_MAIN.get(script, set())
    assert all(names == ["GPT"] for names in in_main.values())
    anywhere = {module for module, _ in imports(tree)} & SCRIPTS
    assert anywhere == AT_THE_TOP.get(script, set()) | INSIDE_MAIN.get(script, set())


def test_the_files_form_no_circle():
    """Each file can be read after those that it imports."""
    needs = {}
    for file in FILES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        needs[name] = {m for m in modules_of(without_types(tree_of(file))) if m.startswith("support.")}
    while needs:
        free = {file for file, others in needs.items() if not others & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {file: others for file, others in needs.items() if file not in free}


def test_one_name_is_one_thing():
    """No two files define a class or function of the same name, methods apart."""
    places = {}
    for file in ALL:
        for node in tree_of(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
                places.setdefault(node.name, []).append(file.name)
    assert not {name: files for name, files in places.items() if len(files) > 1}


# ------------------------------------------------------------------ importing does nothing


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_heavy_libraries_are_imported_where_they_are_used(file):
    heavy = {"transformers", "datasets", "matplotlib", "huggingface_hub", "pyarrow", "tokenizers"}
    body = without_types(tree_of(file)).body
    at_import = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    modules = {module for node in at_import for module, _ in imports(node)}
    assert not {module.split(".")[0] for module in modules} & heavy
    # FSDP takes most of a second, which every start of every script would pay.
    assert not [m for m in modules if m.startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))]


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_only_definitions_at_the_top(file):
    """Imports, constants, classes and functions; the exceptions are named."""
    tree = tree_of(file)
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


def test_openmp_is_told_before_torch_is_imported():
    """Our imports come first in every file that is a program: support/__init__.py sets the variable."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        order = [module.split(".")[0] for node in tree_of(file).body for module, _ in imports(node)]
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
