"""Compile kernels for GPUs that are not here: what a launch would run, its registers, spills and instructions.

An op is called on CPU tensors whose memory nobody touches; its launches are recorded with their real arguments and each
is compiled as Triton's own just-in-time compiler would for them (numbers divisible by 16 marked, ones folded in).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from launcher_kernels.dispatch import Launch, recorded

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), (8, 0), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), (9, 0), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), (10, 0), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), (9, 4), 64 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), (8, 6), 99 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), (12, 0), 99 * 1024),
}
"""{name: what Triton calls it, its compute capability, bytes of shared memory a program may have}."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    name: str
    """Such as `rms_norm bf16 H=4096`."""
    call: Callable[[], Any]
    """Forward and backward on uninitialized CPU tensors."""
    expects: dict[str, Sequence[str]] = field(default_factory=dict)
    """{kernel: instructions that its sm_90 code must hold}, as in `LDG.E.128` or `HGMMA`."""


@dataclass(frozen=True)
class Report:
    """One kernel, compiled for one GPU."""

    case: str
    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    """{instruction: how many}, of those that say which path the code takes."""
    missing: tuple[str, ...]
    """Expected and not there."""

    @property
    def sound(self) -> bool:
        return not self.spill_bytes and not self.missing and self.shared_bytes <= TARGETS[self.target][2]


def compiled(case: Case, target: str) -> list[Report]:
    """Each different launch of a case, compiled for `target`. Raises what Triton raises."""
    gpu, capability, _ = TARGETS[target]
    with recorded(capability) as launches:
        case.call()
    assert launches, f"{case.name} launched no kernel"
    found: dict[str, Report] = {}
    for launch in launches:
        key = repr((launch.kernel.__name__, signature(launch), sorted(launch.meta.items(), key=repr)))
        if key not in found:
            found[key] = _compile(case, launch, target, gpu)
    return list(found.values())


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and divisibility of a launch's arguments, as Triton's compiler takes them."""
    names = [parameter.name for parameter in launch.kernel.params]
    given = dict(zip(names, launch.arguments, strict=False)) | {k: v for k, v in launch.meta.items() if k in names}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = given.get(parameter.name, parameter.default)
        kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value)
        types[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _compile(case: Case, launch: Launch, target: str, gpu: GPUTarget) -> Report:
    types, constants, attributes = signature(launch)
    options = {name: value for name, value in launch.meta.items() if name not in types}
    source = ASTSource(launch.kernel, types, constants, attributes)
    code = triton.compile(source, target=gpu, options=options)
    name = launch.kernel.__name__
    if target.startswith("gfx"):
        assembly = code.asm["amdgcn"]
        registers, spills = (
            _number(r"\.vgpr_count:\s*(\d+)", assembly),
            _number(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        )
        counts = {word: len(re.findall(word, assembly)) for word in ("v_mfma", "dwordx4")}
        missing: tuple[str, ...] = ()
    else:
        registers, spills, sass = _disassembled(code.asm["cubin"])
        words = ("HGMMA", "HMMA", "UTCHMMA", "UTCMMA", r"LDG\.E\S*128", r"STG\.E\S*128", "LDGSTS", "UTMALDG")
        counts = {word.replace(r"\.E\S*", "."): len(re.findall(word, sass)) for word in words}
        wanted = case.expects.get(name, ()) if target == "sm_90" else ()
        missing = tuple(word for word in wanted if not counts[word])
    counts = {word: count for word, count in counts.items() if count}
    return Report(case.name, name, target, registers, spills, code.metadata.shared, counts, missing)


def _disassembled(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of its stack and local memory (spills), and the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    local = _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage)
    return _number(r"REG:(\d+)", usage), local, sass


@cache
def _tool() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _cuobjdump(option: str, path: str) -> str:
    done = subprocess.run([_tool(), option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in what the compiler says"
    return int(found[1])
