"""The import graph, drawn from the sources: imports go down only, and no file or folder is in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = {"alignment": ROOT / "alignment-handbook/src", "trl_nca": ROOT / "trl/src"}
#: Modules and folders of `alignment`: each imports those before it only.
ORDER = (
    "errors files recipe models input_limits launch output resumable data configs plan sampling evaluation report "
    "sweep checks job serving merge"
).split()

#: All of the losses but the loader of a user's.
PURE = ("losses", *(f"losses.{name}" for name in ("contrastive", "pairs", "ranking", "regression", "targets")))


def module_name(file: Path) -> str:
    base = next((folder for folder in PACKAGES.values() if folder in file.parents), ROOT)
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, Path]:
    """Every Python file of the project but the scripts', by its module's name."""
    files = [*PACKAGES["alignment"].rglob("*.py"), *PACKAGES["trl_nca"].rglob("*.py"), *ROOT.glob("*.py")]
    files += [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("data/*.py")]
    return {module_name(file): file for file in files}


def imports(file: Path) -> set[str]:
    """Full names of what a file imports, wherever the import stands; of `from a import b` both a and a.b.

    What stands under `if TYPE_CHECKING:` is for editors and never runs.
    """
    found, tree = set(), ast.parse(file.read_text())
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    never_run = {node for check in checks for node in ast.walk(check)}
    for node in {*ast.walk(tree)} - never_run:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """By module the modules of this project that it imports. (A folder's own name stands for its `__init__`.)"""
    files = sources()
    found = {name: imports(file) & files.keys() - {name} for name, file in files.items()}
    # `from package import module` needs the module; that the package is passed on the way is no arrow.
    return {
        name: {other for other in others if not any(o.startswith(f"{other}.") for o in others)}
        for name, others in found.items()
    }


def place(name: str) -> str:
    """The module or folder of `alignment` that a module is or lies in."""
    return name.split(".")[1]


def test_every_place_has_a_level(graph):
    places = {place(name) for name in graph if name.startswith("alignment.")}
    assert places == set(ORDER)
    modules = [path for path in (PACKAGES["alignment"] / "alignment").glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= 10


def test_alignment_imports_down_only(graph):
    upward = [
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others
        if name.startswith("alignment.") and other.startswith("alignment.") and place(name) != place(other)
        if ORDER.index(place(other)) >= ORDER.index(place(name))
    ]
    assert not upward


def test_no_file_is_in_a_circle(graph):
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


@pytest.mark.parametrize(
    ("of", "may_import"),
    [
        ("trl_nca", {"trl_nca"}),
        ("nca_trainer", {"trl_nca"}),
        ("alignment", {"alignment", "trl_nca"}),
        ("run_reward", {"alignment", "nca_trainer", "trl_nca"}),
        ("run_preference", {"alignment", "nca_trainer", "run_reward"}),
        ("nca", {"alignment"}),
        ("benchmarks", {"benchmarks", "alignment", "nca_trainer", "trl_nca"}),
    ],
)
def test_each_part_imports_what_is_below_it(graph, of, may_import):
    found = {other.split(".")[0] for name, others in graph.items() if name.split(".")[0] == of for other in others}
    assert found <= may_import


@pytest.mark.parametrize("name", [*PURE, "metrics", "collate", "layout"])
def test_the_pure_modules_import_torch_alone(graph, name):
    file = sources()[f"trl_nca.{name}"]
    roots = {other.split(".")[0] for other in imports(file)}
    assert roots <= {"torch", "trl_nca", "collections", "dataclasses", "functools", "itertools", "math", "typing"}


def test_no_test_takes_helpers_from_another(graph):
    tests = {name for name in graph if name.startswith("tests.test_")}
    assert not {(name, other) for name in tests for other in graph[name] & tests}


def test_a_folder_names_all_its_files():
    """In its docstring, in the order in which they meet the data."""
    folders = [PACKAGES["trl_nca"] / "trl_nca", *(PACKAGES["alignment"] / "alignment" / name for name in ORDER)]
    for folder in filter(Path.is_dir, folders):
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        for file in folder.glob("*.py"):
            assert file.stem == "__init__" or f"`{file.stem}`" in docstring, file
