"""The order of the parts, and what each may not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [
    *("errors", "units", "recipe", "plan", "store", "data", "model", "checkpoint", "audit", "evaluate"),
    *("train", "export", "driver", "cluster", "tune", "report", "bench", "cli", "job"),
]
FRONT = ("recipe", "plan", "store", "driver", "cluster", "report", "cli")
WORKER = ("store", "data", "model", "checkpoint", "audit", "evaluate", "train", "export")
LATE = {"launcher.driver.network", "launcher.driver.ray_train"}
"""Subclass classes of Ray that need torch, so they are imported only inside functions."""
BRINGS_TORCH = {"torch", "deepspeed", "transformers", "peft", "bitsandbytes", "accelerate", "launcher_kernels"}

MODULES = sorted((ROOT / "launcher").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "launcher_kernels").rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in MODULES} | {f"launcher.{part}" for part in ROOMS}
"""What an import may name that is a file or a part, and not something in one."""


def room(module: str) -> str | None:
    """The part that `launcher.<part>...` belongs to; None for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "launcher" and len(parts) > 1 else None


def statements(tree: ast.AST, only_at_import: bool) -> Iterator[ast.AST]:
    """Every statement, or only those that run when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if only_at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if only_at_import and typing_only:
            continue
        yield child
        yield from statements(child, only_at_import)


def imports(path: Path, only_at_import: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of each module (or name in a module) that a file imports."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), only_at_import):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in NAMES else node.module) for name in inner)


def test_a_part_imports_only_from_parts_above_it() -> None:
    wrong = []
    for path in MODULES:
        own = room(dotted(path))
        if own is None or own == "__main__":
            continue
        assert own in ROOMS, f"{path}: a new part has its place in the order above"
        for line, name in imports(path):
            other = room(name)
            if other in ROOMS and ROOMS.index(other) > ROOMS.index(own):
                wrong.append(f"{path}:{line}: {own} imports {other}")
    assert not wrong


def test_no_files_import_each_other() -> None:
    """Not even inside functions, and not around corners."""
    order = TopologicalSorter({dotted(path): {name for _, name in imports(path)} & NAMES for path in MODULES})
    try:
        order.prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


def test_a_worker_runs_without_ray() -> None:
    """These parts also run under plain torchrun."""
    paths = [path for path in MODULES if room(dotted(path)) in WORKER]
    assert not [f"{path}:{line}" for path in paths for line, name in imports(path) if name.split(".")[0] == "ray"]


def test_the_front_rooms_name_no_torch() -> None:
    paths = [path for path in MODULES if room(dotted(path)) in (*FRONT, "errors", "units")]
    found = [(path, line, name) for path in paths for line, name in imports(path, only_at_import=True)]
    assert not [f"{path}:{line}: {name}" for path, line, name in found if name.split(".")[0] in BRINGS_TORCH]


@pytest.mark.parametrize("part", FRONT)
def test_the_front_rooms_load_no_torch(part: str) -> None:
    """The same at run time: what they import from other parts brings none either."""
    names = [dotted(path) for path in MODULES if room(dotted(path)) == part and dotted(path) not in LATE]
    code = f"import sys, importlib\nfor n in {names}: importlib.import_module(n)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", f"importing {part} imports torch"


def test_the_kernels_stand_alone() -> None:
    assert not [str(path) for path in KERNELS for _, name in imports(path) if name.split(".")[0] == "launcher"]


def test_no_module_named_kernels() -> None:
    """transformers looks for a package of that name; ours must never be taken for it."""
    for folder in ("kernels", "tests/kernels"):
        assert not (ROOT / folder / "__init__.py").exists()
    spec = find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_every_verb_has_its_line_and_every_line_its_verb() -> None:
    from launcher.cli.app import VERBS

    files = {path.stem for path in (ROOT / "launcher/cli").glob("*.py")}
    written = {path.stem for path in (ROOT / "launcher/cli").glob("*.py") if defines_a_verb(path)}
    assert set(VERBS) <= files
    assert set(VERBS) == written


def defines_a_verb(path: Path) -> bool:
    top = ast.parse(path.read_text(encoding="utf-8")).body
    functions = {node.name for node in top if isinstance(node, ast.FunctionDef)}
    assigned = {ast.unparse(t) for node in top if isinstance(node, ast.Assign) for t in node.targets}
    return "command" in functions or "commands" in assigned


def test_a_file_is_one_idea() -> None:
    """Past about 400 lines it is two."""
    assert not [str(path) for path in [*MODULES, *KERNELS] if path.stem in ("utils", "common", "helpers", "misc")]
    assert not [str(path) for path in [*MODULES, *KERNELS] if len(path.read_text("utf-8").splitlines()) > 450]
