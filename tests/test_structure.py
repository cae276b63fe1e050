"""The structure of the package: order and cost of imports, length of files and functions."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dmjd"
FILES = sorted(PACKAGE.rglob("*.py"))
# Data flows one way: a file may import only from files before it in this list. Each folder is one entry.
ORDER = [
    "text",
    "regular",
    "streams",
    "suggest",
    "warning",
    "checked_json",
    "config",
    "system",
    "files",
    "hub",
    "result_files",
    "rng",
    "nn",
    "images",
    "encoders",
    "targets",
    "masking",
    "branches",
    "model",
    "data",
    "engine",
    "similarity",
    "whitening",
    "runs",
    "figures",
    "evaluation",
    "interop",
    "reports",
    "pretraining",
    "cli",
]


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: under TYPE_CHECKING and inside functions too."""
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            inside = {f"{source}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inside
            if len(inside) < len(node.names):  # some of the names are not modules, but defined in the module itself
                found.add(source)
    return {name for name in found if name == "dmjd" or name.startswith("dmjd.")}


def rank_of(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def test_every_file_is_in_the_order():
    entries = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert not entries - {*ORDER, "__init__", "__main__"}, "add new files to ORDER"


def test_imports_follow_the_flow_of_data():
    upwards = [
        f"{module} imports {name}"
        for module in MODULES
        if module not in ("dmjd", "dmjd.__main__")
        for name in sorted(imports_of(MODULES[module]) - {"dmjd"})
        if rank_of(name) > rank_of(module)
    ]
    assert not upwards, "imports of what comes later in ORDER:\n" + "\n".join(upwards)


def test_slow_libraries_are_imported_where_they_are_used():
    """Every command would wait for them."""
    slow = {"datasets", "onnx", "onnxruntime", "pandas", "plotly", "scipy", "sklearn", "tensorboard", "transformers"}
    found = []
    for file in FILES:
        top = parsed(file).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        found += [f"{file}: {name}" for name in sorted(names) if name.partition(".")[0] in slow]
    assert not found


def test_no_circles():
    graph = {name: imports_of(file) - {"dmjd", name} for name, file in MODULES.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(MODULES)


def test_the_walk_sees_hidden_imports(tmp_path, monkeypatch):
    """Imports inside functions and under TYPE_CHECKING count too."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "dmjd")
    file = tmp_path / "dmjd" / "targets" / "ema.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from dmjd.engine import Engine\n"
        "def late():\n    import dmjd.cli\n    from dmjd import model\n"
        "    from ..encoders import vit\n    from . import hog\n"
    )
    found = imports_of(file)
    assert found >= {"dmjd.engine", "dmjd.cli", "dmjd.model", "dmjd.targets.hog", "dmjd.encoders.vit"}


@pytest.mark.parametrize("module", ["dmjd", "dmjd.config"])
def test_import_is_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'timm', 'numpy', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        *("disjoint_masks", "Masks", "hog", "create_encoder", "MaskedImageModel", "load_encoder"),
        *("embed", "export", "compare", "show", "DMJDWarning"),
    ],
)
def test_lazy_names_resolve(name):
    import dmjd

    assert callable(getattr(dmjd, name))
    assert name in dir(dmjd)


def test_an_unknown_name_is_an_attribute_error():
    import dmjd

    with pytest.raises(AttributeError, match="nonsense"):
        _ = dmjd.nonsense


MOST_LINES, MOST_FUNCTION_LINES = 400, 60
EVERYWHERE = sorted(
    file for folder in ("src", "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")
)


def test_files_and_functions_stay_short():
    long = []
    for file in EVERYWHERE:
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MOST_LINES:
            long.append(f"{file}: {lines} lines")
        functions = (n for n in ast.walk(parsed(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        sizes = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
        long += [f"{file}: {name}, {size} lines" for name, size in sizes.items() if size > MOST_FUNCTION_LINES]
    assert not long


def test_init_files_only_export():
    """``__init__.py`` holds imports, ``__all__`` and lazy loading, but no classes or other functions."""
    allowed = {"__getattr__", "__dir__"}
    for file in PACKAGE.rglob("__init__.py"):
        defined = {n.name for n in parsed(file).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert defined <= allowed, file


def test_no_private_names_cross_files():
    """Names with a leading underscore are private to their file."""
    crossing = []
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dmjd"):
                crossing += [
                    f"{file}: {a.name}" for a in node.names if a.name.startswith("_") and a.name != "__version__"
                ]
    assert not crossing


def test_warnings_are_of_one_class():
    """So that a user can filter all of them."""
    others = [
        f"{file}:{node.lineno}"
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and "warnings.warn" in (ast.unparse(part) for part in (node.func, *node.args))
        if "DMJDWarning" not in ast.unparse(node)
    ]
    assert not others


def test_tests_mirror_the_package():
    """Each test folder has the name of a package folder."""
    tests = ROOT / "tests"
    own = {"golden", "benchmarks", "cuda", "docs", "examples", "storm"}
    for file in tests.rglob("test_*.py"):
        folder = file.relative_to(tests).parent
        if folder.parts and folder.parts[0] not in own:
            assert (PACKAGE / folder).is_dir(), f"{file}: the package has no folder {folder}"
    for name in ("engine/test_loop.py", "test_branches.py", "runs/test_build.py", "pretraining/test_callbacks.py"):
        assert (tests / name).exists(), name
