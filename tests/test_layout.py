"""The shape of the project, held by tests: who imports whom, what stays small."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "switchx"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# In the order of the data: a file imports only from its own line and those above it.
ORDER = (
    ("errors", "batch", "process", "reconstruction", "run_directory", "distributed"),
    ("data",),
    ("sharding",),
    ("moe",),
    ("models",),
    ("training",),
    ("inference",),
    ("interop",),
    ("experiment",),
    ("overview",),
    ("run", "trained", "scorecard", "predictions", "harness", "command_line", "configuration"),
    ("regime",),
    ("report",),
    ("research",),
)


def rank(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return next((number for number, names in enumerate(ORDER) if part in names), -1)


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_file_imports_only_from_above(path):
    assert rank(name(path)) >= 0, f"{name(path)} has no place in ORDER"
    for module in imports(path):
        if module.startswith("switchx."):
            assert rank(module) <= rank(name(path)), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_file_has_its_tests(path):
    relative = path.relative_to(PACKAGE)
    assert (ROOT / "tests" / relative.parent / f"test_{relative.name}").exists()


def test_gin_is_imported_in_one_file():
    assert {name(path) for path in MODULES if "gin" in imports(path)} == {"switchx.configuration"}


def test_tensorflow_is_named_only_in_the_data_folder():
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] != "data":
            tops = {module.split(".")[0] for module in imports(path)}
            assert not tops & {"tensorflow", "seqio", "tensorflow_datasets", "clu"}, name(path)


def test_importing_switchx_imports_no_tensorflow():
    code = (
        "import sys, switchx.run, switchx.configuration\n"
        "import switchx.inference.decoding\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'seqio')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_nothing_asks_for_the_wall_clock():
    # It may jump. Rates are measured by the monotonic clock; TensorBoard's events have the time.
    for path in set(MODULES) - {PACKAGE / "training" / "metrics.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("time.time", "time.time_ns", "datetime.now"), path


def test_scripts_are_short():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert scripts
    for script in scripts:
        assert len(script.read_text().splitlines()) <= 25, script.name


def test_no_grab_bags():
    for path in MODULES:
        assert path.stem not in ("utils", "util", "common", "helpers", "misc"), name(path)
