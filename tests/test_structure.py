"""The house: imports point down only, the kernels' folder shadows nobody, files stay readable in one sitting."""

import ast
import graphlib
import os
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT / "lavender_min"
# From the ground up; a module may import from its own room and from floors below. (`toy` hangs from `data` as one more data set,
# and the ledger is filled with what evaluation measures.)
FLOORS = [
    {"kernels", "failing"},
    {"words", "geometry", "hub", "cli"},
    {"reference", "draw", "page", "data", "toy"},
    {"ops", "maps"},
    {"teachers", "hosts"},
    {"align"},
    {"tuning"},
    {"evaluation", "ledger"},
]
SAME_FLOOR = {("toy", "data"), ("ledger", "evaluation")}


def floor_of(room: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lavender_min":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("lavender_min.")]


def test_imports_point_down():
    assert len(FLOORS) <= 8
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imported_rooms(path):
            seen += 1
            allowed = other == room or (room, other) in SAME_FLOOR or floor_of(other) < floor_of(room)
            assert allowed, f"{path.relative_to(ROOT)} imports {other}"
    assert seen > 20


def test_no_file_imports_itself_through_others():
    """Imports inside functions count too."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in names.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = f"{package}.{node.module}" if node.level else node.module or ""
                found = {f"{module}.{alias.name}" for alias in node.names} & names.keys()
                wanted |= found or {module}
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        graph[name] = (wanted & names.keys()) - {name}
    assert sum(map(len, graph.values())) > 100
    # Raises CycleError, which names the circle.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_scripts_are_a_docstring_and_a_call():
    for name in ("extract.py", "train.py", "evaluate.py"):
        assert len((ROOT / name).read_text().splitlines()) <= 60


def test_kernels_import_nothing_of_the_package_but_each_other():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert set(imported_rooms(path)) <= {"kernels"}, path.name


def test_a_package_named_kernels_is_not_shadowed(tmp_path):
    """transformers and diffusers import the Hugging Face package `kernels`; from the repository root it must stay theirs."""
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("whose = 'theirs'\n")
    code = "import kernels; print(kernels.whose); import lavender_min.kernels.shapes as ours; print(ours.__name__)"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["theirs", "lavender_min.kernels.shapes"], done.stderr


def test_files_are_short_enough_to_read():
    long = {}
    for folder in ("lavender_min", "kernels", "tests", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = len(path.read_text().splitlines())
            if lines > 350:
                long[path.name] = lines
    assert not long


def test_shipped_weights_are_small():
    weights = list((PACKAGE / "toy" / "models").rglob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) < 25e6
