"""DeepSpeed's hostfile: a machine a line, `user@worker-1:22 slots=8`; the first one becomes Ray's head."""

from __future__ import annotations

import difflib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ClusterError, HostsError, Problem

# Nothing that a shell or ssh reads as more than a name: no blank, quote, $ or ;, and no - at the start.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_ADDRESS = re.compile(r"(?:(?P<user>[^@]*)@)?(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:]*))(?::(?P<port>.*))?")
_SLOTS = "slots"
MAX_SLOTS = 1024
FORM = "a line is a name or address and its number of GPUs, such as worker-1 slots=8 or admin@10.0.0.7:2222 slots=4"


@dataclass(frozen=True)
class Host:
    """A machine that ssh reaches. `slots` is its number of GPUs as the user states it; `where` is file:line."""

    name: str
    user: str | None = None
    port: int | None = None
    slots: int | None = None
    where: str = ""

    @property
    def destination(self) -> str:
        """What ssh is given: `user@name`."""
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def url(self) -> str:
        """What `parse_host` takes: `ssh://user@name:22`."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"ssh://{f'{self.user}@' if self.user else ''}{name}{f':{self.port}' if self.port else ''}"


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts in the order of the file.

    Raises:
        ClusterError: the file cannot be read.
        HostsError: every mistake in it at once, each with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClusterError(f"{path}: no such file", hint=f"--hostfile takes a list of machines: {FORM}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ClusterError(f"{path}: {reason}", hint="--hostfile takes a text file, a machine a line") from None
    hosts: dict[str, Host] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        host, found = _host(words, where)
        problems += found
        if host is None:
            continue
        if host.name in hosts:
            hint = "a machine has one line, with all of its GPUs as slots"
            problems.append(Problem(where, "", f"{host.name} is already on {hosts[host.name].where}", hint))
        hosts.setdefault(host.name, host)
    if not hosts and not problems:
        problems.append(Problem(str(path), "", "names no machine", FORM))
    if problems:
        raise HostsError(problems)
    return tuple(hosts.values())


def parse_host(text: str) -> Host:
    """One host as a command line names it: `user@head:2222`, `[fd00::7]:22` or `ssh://user@head:2222`.

    Raises:
        ClusterError: it is none.
    """
    user, name, port, problem = _address(text.removeprefix("ssh://").removesuffix("/"))
    if problem is not None:
        raise ClusterError(problem, hint="a host is written as head, admin@head:2222 or ssh://admin@head:2222")
    return Host(name, user, port)


def _host(words: list[str], where: str) -> tuple[Host | None, list[Problem]]:
    """One line: the host unless its address is wrong, and what is wrong with the line."""
    problems = []
    slots: int | None = None
    user, name, port, problem = _address(words[0])
    if problem is not None:
        problems.append(Problem(where, "", problem, FORM))
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key != _SLOTS or not equals:
            near = difflib.get_close_matches(key, [_SLOTS], cutoff=0.5)
            hint = f"did you mean {_SLOTS}=N?" if near else FORM
            problems.append(Problem(where, "", f"{key!r}: unknown key", hint))
        elif not re.fullmatch(r"[0-9]{1,4}", value) or int(value) > MAX_SLOTS:
            hint = f"slots is the machine's number of GPUs, 0 to {MAX_SLOTS}"
            problems.append(Problem(where, "", f"slots={value}: not a number of GPUs", hint))
        elif slots is not None:
            problems.append(Problem(where, "", "slots is there twice", FORM))
        else:
            slots = int(value)
    return (None if problem else Host(name, user, port, slots, where)), problems


def _address(text: str) -> tuple[str | None, str, int | None, str | None]:
    """User, name, port and what is wrong with them, of `user@name:port`."""
    user, at, rest = text.rpartition("@")
    if _is_ipv6(rest):  # bare, so without a port
        rest = f"[{rest}]"
    match = _ADDRESS.fullmatch(rest)
    if match is None:
        return None, "", None, f"{text!r}: not a name or address"
    name = match["v6"] if match["v6"] is not None else match["name"]
    if match["v6"] is not None and not _is_ipv6(name):
        return None, "", None, f"{name!r}: not an IPv6 address"
    if match["v6"] is None and not _NAME.fullmatch(name):
        return None, "", None, f"{name!r}: not a name or address"
    if at and not _NAME.fullmatch(user):
        return None, "", None, f"{user!r}: not a user's name"
    port = match["port"]
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        return None, "", None, f"{port!r}: not a port, which is a number from 1 to 65535"
    return user or None, name, int(port) if port else None, None


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return re.fullmatch(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?", text) is not None
