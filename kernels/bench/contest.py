"""One operation at one shape: its contenders, whether each computes the right thing, and how long each takes.

E9 decides what is right: outputs and gradients at most twice as far from the float64 truth as eager's in the same
dtype, plus one ulp of the largest value. Memory that a contender does not write holds NaN meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from floors import Work
from timing import Deadline, Timer
from torch import Tensor

from launcher_kernels.reference import ulp

Inputs = Mapping[str, Tensor]
Function = Callable[..., Any]
"""Takes a contest's inputs by name; returns a tensor or several."""
Build = Callable[[Inputs], Function]
"""Makes a contender, which is not timed. Raises ImportError where something is missing."""

COMPILED, FLEX = "torch.compile", "flex_attention"
OURS = "slipway"
NEAR = 0.02
"""Relative distance in bf16 beyond which a result is wrong and not only rounded more often than eager rounds."""
_CHUNK = 2**26
_FEWEST_ROUNDS = 5
_WARMUP_ROUNDS = 2
_COMPILE_S = 5.0
"""What Inductor compiles is not begun with less than this of the contest's share left."""


class Draw:
    """Random inputs on a device, the same for the same seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, device=self.device, dtype=torch.float32, generator=self.generator)
        return (drawn * scale).to(self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """From 0 to `high` - 1."""
        return torch.randint(high, shape, device=self.device, dtype=dtype, generator=self.generator)

    def some(self, count: int, of: int) -> Tensor:
        """`count` different numbers below `of`, in order."""
        return torch.randperm(of, device=self.device, generator=self.generator)[:count].sort().values


@dataclass(frozen=True)
class Target:
    """What issue 5 asks of ours."""

    floor: float | None = None
    """Fraction of the measured floor."""
    over: dict[str, float] = field(default_factory=dict)
    """{contender: times as fast as it}; `best` is the fastest of all."""


@dataclass(frozen=True)
class Part:
    """What is timed on its own."""

    work: Work
    targets: dict[str, Target] = field(default_factory=dict)
    """{contender: what is asked of it}."""


@dataclass(frozen=True)
class Contest:
    """See above."""

    op: str
    name: str
    inputs: Callable[[Draw], dict[str, Tensor]]
    eager: Function
    """The operation as models write it."""
    differentiable: tuple[str, ...]
    contenders: dict[str, Build]
    parts: dict[str, Part]
    """Of `forward`, `backward`, and `both` together."""
    exact: Function | None = None
    """`eager` for float64 in pieces, where the whole would not fit."""
    compiles: bool = True
    """Whether torch.compile of `eager` is a contender."""

    @property
    def key(self) -> str:
        return f"{self.op}: {self.name}"


def contenders(contest: Contest) -> dict[str, Build]:
    """All of them, ours first and the slowest to build last."""
    found: dict[str, Build] = dict(contest.contenders)
    found["eager"] = lambda _: contest.eager
    if contest.compiles:
        found[COMPILED] = lambda inputs: torch.compile(
            contest.eager, dynamic=False, backend="inductor" if _on_gpu(inputs) else "aot_eager"
        )
    return found


def _on_gpu(inputs: Inputs) -> bool:
    return any(x.is_cuda for x in inputs.values())


class Pass:
    """A forward and a backward pass over fresh copies of the inputs: some contenders write into what they are given."""

    def __init__(self, contest: Contest, function: Function, inputs: Inputs, slopes: list[Tensor] | None) -> None:
        """`slopes` are the outputs' gradients; None: drawn, see `slopes_of`."""
        trained = contest.differentiable
        self.given = {name: x.clone().requires_grad_(name in trained) for name, x in inputs.items()}
        self.leaves = [self.given[name] for name in trained]
        self.function = function
        self.slopes = [slope.clone() for slope in slopes] if slopes is not None else None

    def forward(self) -> list[Tensor]:
        returned = self.function(**self.given)
        self.outputs = [returned] if isinstance(returned, Tensor) else list(returned)
        return self.outputs

    def backward(self) -> list[Tensor]:
        if not self.leaves:
            return []
        if self.slopes is None:
            self.slopes = slopes_of(self.outputs)
        return list(torch.autograd.grad(self.outputs, self.leaves, self.slopes))

    def both(self) -> list[Tensor]:
        """Outputs and gradients, detached."""
        self.forward()
        return [x.detach() for x in [*self.outputs, *self.backward()]]


def slopes_of(outputs: list[Tensor]) -> list[Tensor]:
    """Random numbers; 1 for a loss, so that no contender has to multiply its gradients by it."""
    draw = torch.Generator(outputs[0].device).manual_seed(7)
    return [
        torch.randn(y.shape, generator=draw, device=y.device).to(y.dtype) if y.dim() else torch.ones_like(y)
        for y in outputs
    ]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN. (Not so what Inductor allocates.)"""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def farthest(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where anything is not finite. Piece by piece, to save memory."""
    most = 0.0
    pieces = zip(found.reshape(-1).split(_CHUNK), exact.reshape(-1).split(_CHUNK), strict=True)
    for ours, theirs in pieces:
        if ours.numel():
            distance = (ours.double() - theirs).abs().max().item()
            most = max(most, distance if math.isfinite(distance) else math.inf)
    return most


def distance(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    pieces = list(zip(found.reshape(-1).split(_CHUNK), exact.reshape(-1).split(_CHUNK), strict=True))
    squares = sum((ours.double() - theirs).square().sum().item() for ours, theirs in pieces)
    return math.sqrt(squares / max(sum(theirs.square().sum().item() for _, theirs in pieces), 1e-300))


@dataclass(frozen=True)
class Verdict:
    """Whether a contender computes the right thing."""

    state: str
    """`right` by E9; `inexact`: another's that is not, but near, which is timed and marked; `wrong`: not timed."""
    why: str
    errors: dict[str, list[float]]
    """{tensor: [largest error, what E9 allows, eager's error]}."""


class Truth:
    """What a contest's outputs and gradients are, and how far from that a contender may be."""

    def __init__(self, contest: Contest, inputs: Inputs) -> None:
        first = Pass(contest, contest.eager, inputs, None)
        outputs = first.forward()
        self.slopes = slopes_of([y.detach() for y in outputs])
        eager = [y.detach() for y in [*outputs, *first.backward()]]
        self.names = [f"output {i}" for i in range(len(outputs))]
        self.names += [f"gradient of {name}" for name in contest.differentiable]
        self.dtypes = [x.dtype for x in eager]
        widened = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        slopes = [slope.double() for slope in self.slopes]
        self.exact = Pass(contest, contest.exact or contest.eager, widened, slopes).both()
        self.eager_errors = [farthest(x, exact) for x, exact in zip(eager, self.exact, strict=True)]

    def verdict(self, found: list[Tensor], ours: bool) -> Verdict:
        """E9 of all tensors. Only ours must also have eager's dtypes."""
        errors: dict[str, list[float]] = {}
        worst, off = "right", []
        if len(found) != len(self.exact):
            return Verdict("wrong", f"{len(found)} tensors for {len(self.exact)}", {})
        for name, x, exact, eager_error, dtype in zip(
            self.names, found, self.exact, self.eager_errors, self.dtypes, strict=True
        ):
            if x.shape != exact.shape or (ours and x.dtype != dtype):
                return Verdict(
                    "wrong", f"{name} is {x.dtype} {tuple(x.shape)}, not {dtype} {tuple(exact.shape)}", errors
                )
            bound = 2 * eager_error + (ulp(exact.abs().max().item(), x.dtype) if exact.numel() else 0.0)
            error = farthest(x, exact)
            errors[name] = [error, bound, eager_error]
            if not error <= bound:
                near = not ours and distance(x, exact) < NEAR
                worst = "inexact" if near and worst != "wrong" else "wrong"
                off.append(f"{name} is off by {error:.2e}, {bound:.2e} allowed")
        return Verdict(worst, "; ".join(off), errors)


def check(contest: Contest, name: str, function: Function, inputs: Inputs, truth: Truth) -> Verdict:
    """Of one pass of a contender."""
    with contextlib.nullcontext() if name in (COMPILED, FLEX) else poisoned():
        return truth.verdict(Pass(contest, function, inputs, truth.slopes).both(), ours=name.startswith(OURS))


def hold(contest: Contest, device: torch.device, deadline: Deadline, rounds: int) -> dict[str, Any]:
    """Check every contender and time those that are right, in turns, until the deadline or so many rounds.

    Returns the contest's line of the results: {contender: state, errors, seconds of each part of each round}.
    """
    torch._dynamo.reset()  # its limit is eight shapes a function, then it goes on in eager without a word
    inputs = contest.inputs(Draw(device, torch.bfloat16))
    truth = Truth(contest, inputs)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Function] = {}
    for name, build in contenders(contest).items():
        if name in (COMPILED, FLEX) and rounds > 1 and deadline.left < _COMPILE_S:
            found[name] = {"state": "no time left"}
            continue
        try:
            function = build(inputs)
            verdict = check(contest, name, function, inputs, truth)
        except ImportError as error:
            found[name] = {
                "state": "not there" if name.startswith(OURS) else "not installed",
                "why": _first_line(error),
            }
        except Exception as error:  # a contender that fails is a result
            found[name] = {"state": "failed", "why": _first_line(error)}
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost: nothing after it can be trusted
        else:
            found[name] = asdict(verdict)
            if verdict.state != "wrong":
                ready[name] = function
    slopes = truth.slopes
    del truth
    timer = Timer(device)
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in contest.parts} for name in ready}
    names = list(ready)
    warmup = _WARMUP_ROUNDS if rounds > 1 else 0
    for number in range(warmup + rounds):
        if number >= warmup + _FEWEST_ROUNDS and deadline.left < 0:
            break
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            run = Pass(contest, ready[name], inputs, slopes)
            forward, _ = timer(run.forward)
            backward, _ = timer(run.backward)
            taken = {"forward": forward, "backward": backward, "both": forward + backward}
            if number >= warmup:
                for part in contest.parts:
                    seconds[name][part].append(taken[part])
    for name, parts in seconds.items():
        found[name]["seconds"] = parts
    return {"key": contest.key, "op": contest.op, "name": contest.name, "contenders": found}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
