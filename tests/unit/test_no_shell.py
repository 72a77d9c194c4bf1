"""What a hostfile, a recipe or a command line says never reaches a shell of ours unquoted: read in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "launcher"
MODULES = sorted(ROOT.rglob("*.py"))

THROUGH_A_SHELL = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "pty.spawn", "commands.getoutput"),
}
STARTS = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
UNSAFE = {
    *("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open"),
    "tempfile.mktemp",
}
ALLOWED = {
    "driver/prepare.py": "pickle.loads",  # between our own process and our own workers
    "data/user_code.py": "exec",  # the function that the user's recipe names, which is asked for
}
SHELL_WORDS = ("export ", "exec ", "$(", "&& ", "|| ", ">> ", "ray start", "ray stop", 'case "$')
"""An f-string with one of them in it is a shell line."""
MADE_QUOTED = {"_path", "_environment", "folder", "_gpus", "_worker_gpus"}
"""Functions of cluster/ray_yaml.py that return shell, which tests/unit/test_secrets_stay_secret.py runs."""
NUMERIC = {
    *("addresses[0]", "address", "' '.join(cases)"),
    "' '.join((f'{key}={value}' for key, value in values.items()))",
}
"""Addresses that the resolver gave, with numbers of GPUs; settings of ours."""


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def calls(path: Path) -> Iterator[ast.Call]:
    yield from (node for node in nodes(path) if isinstance(node, ast.Call))


def place(path: Path, node: ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_nothing_goes_through_a_shell() -> None:
    wrong = []
    for path in MODULES:
        for call in calls(path):
            shell = any(word.arg == "shell" for word in call.keywords)
            if shell or ast.unparse(call.func) in THROUGH_A_SHELL:
                wrong.append(place(path, call))
    assert not wrong


def test_processes_are_started_from_lists_of_words() -> None:
    """One string would be a program's name; with `shell` it would be a shell line."""
    wrong = [
        place(path, call)
        for path in MODULES
        for call in calls(path)
        if ast.unparse(call.func) in STARTS
        and (not call.args or isinstance(call.args[0], ast.JoinedStr | ast.Constant | ast.BinOp))
    ]
    assert not wrong


def test_what_a_shell_is_told_is_written_here() -> None:
    """After `sh -c` comes a text of ours as it stands; what differs goes on stdin, or after it."""
    wrong = []
    for path in MODULES:
        for node in nodes(path):
            if not isinstance(node, ast.List | ast.Tuple):
                continue
            words = [word.value if isinstance(word, ast.Constant) else None for word in node.elts]
            if {"sh", "bash"} & set(words) and "-c" in words:
                script = node.elts[words.index("-c") + 1]
                if not (isinstance(script, ast.Constant) or (isinstance(script, ast.Name) and script.id.isupper())):
                    wrong.append(place(path, script))
    assert not wrong


def test_shell_lines_quote_what_is_put_into_them() -> None:
    wrong = []
    for path in [*sorted((ROOT / "cluster").glob("*.py")), *sorted((ROOT / "cli").glob("cluster*.py"))]:
        for node in nodes(path):
            if not isinstance(node, ast.JoinedStr):
                continue
            text = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
            if any(word in text for word in SHELL_WORDS):
                parts = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
                wrong += [place(path, part) for part in parts if not is_quoted(part)]
    assert not wrong


def is_quoted(value: ast.expr) -> bool:
    """Whether what is put into a shell line is quoted, a constant of ours, or cannot hold anything to be quoted."""
    if ast.unparse(value) in NUMERIC:
        return True
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func)
        return name in MADE_QUOTED or name in ("shlex.quote", "shlex.join") or is_quoted(value.func)
    if isinstance(value, ast.Attribute):
        return is_quoted(value.value)
    return isinstance(value, ast.Name) and value.id.strip("_").isupper()


def test_nothing_from_outside_is_run_or_unpickled() -> None:
    wrong = []
    for path in MODULES:
        for call in calls(path):
            name = ast.unparse(call.func)
            pickled = name.startswith(("pickle.load", "cloudpickle.load", "dill.load"))
            if (name in UNSAFE or pickled) and ALLOWED.get(path.relative_to(ROOT).as_posix()) != name:
                wrong.append(place(path, call))
            if name == "torch.load" and not any(
                word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords
            ):
                wrong.append(place(path, call))
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(f'ssh {host} ls', check=True)",
        "subprocess.run(words, shell=True)",
        "os.system(line)",
        "ssh.run(host, ['sh', '-c', f'rm {file}'])",
        "command = f'export PATH={python}:$PATH'",
        "pickle.loads(content)",
    ],
)
def test_the_checks_find_such_lines(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster" / "some.py"
    file.parent.mkdir()
    file.write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr("tests.unit.test_no_shell.ROOT", tmp_path)
    monkeypatch.setattr("tests.unit.test_no_shell.MODULES", [file])
    found = 0
    for check in (
        test_nothing_goes_through_a_shell,
        test_processes_are_started_from_lists_of_words,
        test_what_a_shell_is_told_is_written_here,
        test_shell_lines_quote_what_is_put_into_them,
        test_nothing_from_outside_is_run_or_unpickled,
    ):
        try:
            check()
        except AssertionError:
            found += 1
    assert found == 1
