"""The rules of the layout, checked on every import, also those inside functions.

A rule is a function from the import graph to a list of violations. Each is tested twice: the
repository has no violation, and a planted one is found.
"""

import ast
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

Graph = dict[str, set[str]]  # module -> modules that it imports, ours and others'

LESSONS = {  # each with the lessons that it builds on
    "tokenizer": {"bpe"}, "bpe": set(), "gpt": {"generate"}, "generate": set(), "compiled": set(),
    "batching": {"generate"}, "speculative": {"generate", "batching"}, "quantize": set(),
    "vit": set(), "clip": {"vit"}, "autoencoder": set(), "unet": set(), "ddpm": {"unet"},
    "encoder": set(), "beam": {"generate"}, "seq2seq": {"encoder", "generate", "beam"},
    "retrieval": set(), "xlnet": set(), "vq": {"autoencoder"}, "codec": {"vq"},
    "musicgen": {"gpt", "generate", "codec"}, "vision_gpt": {"gpt", "vit", "generate"},
    "dalle": {"vq", "gpt", "generate", "tokenizer"},
    "text2image": {"clip", "autoencoder", "ddpm", "unet", "tokenizer"},
}  # fmt: skip
ROOMS = {"adapt", "batches", "calc", "evaluate", "hub", "serve", "training"}
# What starts a program may import anything. Nothing imports it.
ENTRIES = {"train", "sample", "data.prepare", "tinyfm.evaluate.harness"}
LIBRARIES = {"torch", "einops", "numpy"}
TOKENIZER_LIBRARIES = {"sentencepiece", "regex"}


# ---- the import graph ---------------------------------------------------------------------------


def module_name(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


@cache
def sources() -> dict[str, ast.Module]:
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tinyfm/**/*.py"), *ROOT.glob("data/*.py")]
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports_of(tree: ast.Module, modules: set[str], importer: str = "") -> set[str]:
    """All modules that a file imports, at its top or inside functions, or names in a string."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("tinyfm.recipes."):
            found.add(node.value)  # the registry imports recipes by name
    # Importing a.b.c runs a/__init__.py and a/b/__init__.py as well, for importers outside of them.
    for name in list(found & modules):
        parts = name.split(".")
        packages = {".".join(parts[:i]) for i in range(1, len(parts))} & modules
        found |= {package for package in packages if not importer.startswith(f"{package}.")}
    return found


@cache
def import_graph() -> Graph:
    trees = sources()
    return {name: imports_of(tree, set(trees), name) - {name} for name, tree in trees.items()}


def reachable(graph: Graph, start: str) -> set[str]:
    """Our modules that are imported by `start`, directly or not, itself included."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name] & graph.keys()
    return seen


def is_entry(module: str) -> bool:
    return module in ENTRIES or module.endswith("__main__")


def layer(module: str) -> str:
    """data, common, lesson, a room, recipes, or entry."""
    parts = module.split(".")
    if is_entry(module):
        return "entry"
    if parts[0] == "data":
        return "data"
    if len(parts) == 2 and parts[1] in LESSONS:
        return "lesson"
    return parts[1] if len(parts) > 1 else "common"


# ---- the rules ----------------------------------------------------------------------------------

MAY_IMPORT = {
    "data": {"data"},
    "common": {"common", "data"},
    "lesson": {"lesson", "common", "hub"},  # which lessons: see lessons_stand_alone
    "hub": {"hub", "common", "lesson"},  # which lesson: see hub_imports_no_model
    **{room: ROOMS | {"lesson", "common", "data"} for room in ROOMS - {"hub"}},
    "recipes": ROOMS | {"recipes", "lesson", "common", "data"},
}


def no_circles(graph: Graph) -> list[str]:
    """No module imports itself, by whatever way."""
    problems = []
    for name in graph:
        for other in graph[name] & graph.keys():
            if name in reachable(graph, other):
                problems.append(f"{name} and {other} import each other")
    return problems


def one_way(graph: Graph) -> list[str]:
    """Entries -> recipes -> rooms -> lessons -> common; nothing imports an entry."""
    problems = []
    for name in graph:
        if is_entry(name):
            continue
        for other in graph[name] & graph.keys():
            if layer(other) not in MAY_IMPORT[layer(name)]:
                problems.append(f"{name} imports {other}")
    return problems


def lessons_stand_alone(graph: Graph) -> list[str]:
    """A lesson imports torch, einops, numpy, the standard library and the lessons it builds on;
    hub/ for from_pretrained and save_pretrained; common/ nowhere but for a device."""
    problems = []
    for lesson, built_on in LESSONS.items():
        libraries = LIBRARIES | sys.stdlib_module_names
        if lesson in ("tokenizer", "bpe"):
            libraries |= TOKENIZER_LIBRARIES
        for other in graph[f"tinyfm.{lesson}"]:
            ours = other in graph
            if ours and layer(other) == "lesson":
                fine = other.removeprefix("tinyfm.") in built_on
            elif ours:
                fine = other == "tinyfm" or layer(other) in ("hub", "common")
            else:
                fine = other.split(".")[0] in libraries and "torch.distributed" not in other
            if not fine:
                problems.append(f"tinyfm.{lesson} imports {other}")
    return problems


def hub_imports_no_model(graph: Graph) -> list[str]:
    """Models are handed to hub/. Of the lessons it may read bpe's split pattern alone."""
    return [
        f"{name} imports {other}"
        for name in graph
        if layer(name) == "hub"
        for other in graph[name]
        if layer(other) == "lesson" and other.startswith("tinyfm.") and other != "tinyfm.bpe"
    ]


def training_knows_no_family(graph: Graph) -> list[str]:
    """The trainer trains any model: training/ imports no lesson."""
    return [
        f"{name} imports {other}"
        for name in graph
        if layer(name) == "training"
        for other in graph[name] & graph.keys()
        if layer(other) == "lesson"
    ]


RULES = {  # each with an import that breaks it
    no_circles: ("tinyfm.common.files", "tinyfm.training.checkpoint"),
    one_way: ("tinyfm.training.trainer", "tinyfm.recipes.registry"),
    lessons_stand_alone: ("tinyfm.gpt", "tinyfm.unet"),
    hub_imports_no_model: ("tinyfm.hub.layout", "tinyfm.gpt"),
    training_knows_no_family: ("tinyfm.training.optim", "tinyfm.clip"),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_holds(rule: Callable[[Graph], list[str]]):
    assert rule(import_graph()) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_violation_is_found(rule: Callable[[Graph], list[str]]):
    importer, imported = RULES[rule]
    graph = dict(import_graph())
    graph[importer] = graph[importer] | {imported}
    assert any(importer in problem for problem in rule(graph))


def test_an_import_inside_a_function_counts():
    tree = ast.parse("def f():\n    from tinyfm import gpt\n    import tinyfm.clip as c\n")
    modules = {"tinyfm", "tinyfm.gpt", "tinyfm.clip"}
    assert imports_of(tree, modules) == modules


# ---- what can be seen ---------------------------------------------------------------------------


def test_the_folder_shows_the_lessons_alone():
    files = {path.stem for path in ROOT.glob("tinyfm/*.py")}
    assert files - {"__init__", "__main__"} == LESSONS.keys()
    rooms = {path.parent.name for path in ROOT.glob("tinyfm/*/__init__.py")}
    assert rooms == ROOMS | {"common", "recipes"}


@pytest.mark.parametrize(("start", "most"), [("tinyfm.gpt", 9), ("tinyfm.training.trainer", 15)])
def test_little_is_needed_to_read_one_file(start, most):
    files = {name for name in reachable(import_graph(), start) if name not in PACKAGES}
    assert len(files) <= most, sorted(files)


PACKAGES = {  # an empty __init__.py is nothing to read
    module_name(path) for path in ROOT.glob("*/**/__init__.py") if path.stat().st_size < 300
}


ONE_MEANING = ("fit", "find", "Memory", "Report", "Run")


def test_these_names_mean_one_thing_each():
    """Among functions and classes of tinyfm/; a method's meaning is clear from its class."""
    trees = sources()
    for name in ONE_MEANING:
        places = [
            module
            for module, tree in trees.items()
            if module.startswith("tinyfm.")
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        assert len(places) <= 1, f"{name}: {places}"


def test_a_gpt_loads_no_picture_models():
    """`train.py`, its options and its --help for a GPT: no CLIP, no fonts, no diffusion."""
    code = """
import contextlib
import io
import sys
import train
train.read_arguments(["gpt", "--train.steps", "3"])
with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
    train.read_arguments(["--help"])
assert "gpt2-124m: " in help.getvalue() and "clip" in help.getvalue()
unwanted = ("tinyfm.clip", "tinyfm.vit", "tinyfm.unet", "tinyfm.ddpm", "tinyfm.autoencoder",
            "tinyfm.text2image", "tinyfm.recipes.pictures", "data.glyphs", "fontTools", "PIL",
            "matplotlib", "transformers")
print([name for name in unwanted if name in sys.modules])
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_checking_the_size_of_a_model_does_not_load_the_compiler():
    """Every command that opens a run would start a second later."""
    code = """
import sys
from tinyfm.common import files
from tinyfm.recipes import registry
for preset in registry.all_presets().values():
    files.build_shapes(preset.run.build_model, 10_000)
print("torch._dynamo" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


PYTHON = [*ROOT.glob("*.py")]
for room in ("tinyfm", "data", "tests", "benchmarks"):
    PYTHON += sorted((ROOT / room).glob("**/*.py"))


@pytest.mark.parametrize("path", PYTHON, ids=module_name)
def test_every_text_file_is_opened_as_utf8(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        text = called in ("read_text", "write_text")
        if called == "open":
            inner = [n.value for a in node.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
            binary = {"rb", "wb", "ab"} & {value for value in inner if isinstance(value, str)}
            module = getattr(getattr(node.func, "value", None), "id", "")
            text = not binary and module not in ("os", "tarfile", "Image")
        if called == "write_text" and isinstance(node.func, ast.Name):
            text = False  # common/files.py has its own
        if text:
            keywords = {k.arg for k in node.keywords}
            assert "encoding" in keywords, f"{module_name(path)}:{node.lineno}"
