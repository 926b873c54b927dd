"""Which part of the package imports which: arrows point down, there is no circle, and help needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import blsam

PACKAGE = Path(blsam.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOOR = {"blsam.options", "blsam.files", "blsam.distributed"}
# of the package itself the version alone; the names of runtimes stand on those of types
LEAVES = {"blsam", "blsam.config", "blsam.precision", "blsam.runtimes.choice"}
METRICS = {"blsam.evaluation.prompted", "blsam.evaluation.imagenet"}  # of evaluation, for training


def imports(name):
    """Modules of the package that a module imports anywhere in its text, for type checkers alone left out."""
    tree, found = ast.parse(MODULES[name].read_text()), set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES and MODULES[inner].name != "build_sam.py" else source)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {one for one in found if one in MODULES} - {name}


GRAPH = {name: imports(name) for name in MODULES}


def arrows(sources, targets):
    """Imports from modules below one prefix into modules below another, in words."""
    return [
        f"{name} imports {one}"
        for name, found in GRAPH.items()
        for one in found
        if name.startswith(sources) and one.startswith(targets)
    ]


def test_the_graph_is_read():
    assert "blsam.modeling.windows" in GRAPH["blsam.modeling.macs"]
    assert "blsam.checkpoint" in GRAPH["blsam.training.calibrate"]
    assert "blsam.build_sam" in GRAPH["blsam.commands.segment"]


def test_there_is_no_circle():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for one in sorted(GRAPH[name]):
                visit(one, [*path, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


def test_the_floor_imports_nothing_of_what_stands_on_it():
    for name in FLOOR:
        assert GRAPH[name] <= LEAVES, f"{name} imports {sorted(GRAPH[name] - LEAVES)}"
    for name in LEAVES - {"blsam"}:
        assert GRAPH[name] <= LEAVES - {"blsam"}, f"{name} imports {sorted(GRAPH[name])}"


def test_arrows_point_down():
    top = ("blsam.cli", "blsam.commands")
    up = [arrow for arrow in arrows("blsam", top) if not arrow.startswith(("blsam.__main__", *top))]
    assert not up, up
    up = [arrow for arrow in arrows("blsam.training", "blsam.evaluation") if arrow.split()[-1] not in METRICS]
    assert not up, up
    assert not arrows("blsam.evaluation", ("blsam.training", "blsam.demo"))
    assert not arrows(("blsam.modeling", "blsam.data"), ("blsam.training", "blsam.evaluation", "blsam.demo"))


@pytest.mark.parametrize(
    "command", [[], ["segment"], ["demo"], ["models"]], ids=lambda command: " ".join(["blsam", *command])
)
def test_help_needs_neither_torch_nor_sam(command):
    program = (
        "import sys; from blsam.cli import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\n"
        "except SystemExit:\n    sys.exit(', '.join({'torch', 'segment_anything'} & set(sys.modules)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: blsam"), done.stderr


def test_names_of_the_package_come_when_asked_for():
    import blsam.build_sam  # which would otherwise hide the function

    assert blsam.build_sam is blsam.build_sam.__globals__["build_sam"] and callable(blsam.build_sam)
    assert blsam.__version__ and set(blsam.__all__) <= set(dir(blsam))
    assert all(getattr(blsam, name) for name in blsam.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        blsam.nothing  # noqa: B018
    tree = ast.parse(MODULES["blsam"].read_text())
    typed = [node for node in tree.body if isinstance(node, ast.If)][0]
    names = {alias.name for node in typed.body for alias in node.names}
    assert names == set(blsam.__all__), "what type checkers see is not what there is"
