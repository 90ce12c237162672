"""The layering of the subpackages: a module imports only from its own subpackage and lower ones, without cycles.

All imports count, including those in functions and for type checkers: a late import may save time, but not hide a
cycle.
"""

import ast
from pathlib import Path

import pytest

import ssmcompress

PACKAGE = Path(ssmcompress.__file__).parent
GROUND = {"_version", "errors", "extras", "files", "hub_names", "openmp", "processes", "progress", "suffixes"}
# From the lowest layer up; subpackages on the same floor do not import each other.
FLOORS = (
    {"ground"},
    {"ops", "tasks"},
    {"pruning", "data"},
    {"models"},
    {"evaluation"},
    {"compression", "export"},
    {"jobs"},
    {"cli"},
    {"ssmcompress"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def room_of(module: str) -> str:
    """The room (subpackage) of a module: the folder below the package, "ground", or the package itself."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return "ssmcompress"
    return "ground" if parts[1] in GROUND else parts[1]


def imports(module: str, source: str, is_package: bool) -> set[str]:
    """The modules of this package that a module's source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if is_package else module.split(".")[:-1]
            base = base[: len(base) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in MODULES else origin for alias in node.names
            ]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == PACKAGE.name}
    return found - {module}


GRAPH = {m: imports(m, path.read_text(encoding="utf-8"), path.name == "__init__.py") for m, path in MODULES.items()}


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(importing module, imported module) pairs that violate the layering."""
    return sorted(
        (module, imported)
        for module, others in graph.items()
        for imported in others
        if room_of(module) != room_of(imported) and FLOOR_OF[room_of(imported)] >= FLOOR_OF[room_of(module)]
    )


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strong components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in MODULES} <= set(FLOOR_OF)


def test_imports_go_down_only():
    assert upward(GRAPH) == []


def test_no_two_modules_import_each_other():
    assert circles(GRAPH) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..jobs import prune",
        "from ..models.base import TokenModel",
        "import ssmcompress.models.base",
        "if TYPE_CHECKING:\n    from ..models.base import TokenModel",
        "def late():\n    from ssmcompress.data.images import Images",
    ],
)
def test_an_upward_import_is_found(line):
    module = "ssmcompress.pruning.tokens"
    found = imports(module, line, is_package=False)
    assert [importing for importing, _ in upward({module: found})] == [module]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
