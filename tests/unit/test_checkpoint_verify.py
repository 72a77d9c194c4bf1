"""`slipway verify` and `verify --deep`: what they say of sound, damaged and deceptive checkpoints, and what lies beside
them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from launcher.checkpoint import deep
from launcher.checkpoint.deep import trained_shapes
from launcher.checkpoint.lease import Attempt, acquire, begin
from launcher.checkpoint.shards import FlatShard
from launcher.cli.app import main
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from tests.checkpoints import FIRST, checkpoint_at, opened, values, write_checkpoint
from tests.distributed.tiny import tiny_plan

PARAMETERS = 12
"""Of the model below: embedding, head, norm, and nine of its layer."""
Write = Callable[..., Any]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A run in the folder `run`, whose model has a configuration and no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    plan = tiny_plan(tmp_path / "run", zero=2)
    model = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model.save_pretrained(plan.trajectory.model.path)
    # As of any run: the trajectory's hash holds what the model is, and not where it lies.
    pinned = plan.trajectory.model.model_copy(update={"fingerprint": "f"})
    plan = plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"model": pinned})})
    plan.save(tmp_path / "run" / "plan.json")
    return plan


@pytest.fixture
def write(plan: Plan) -> Write:
    """Write a checkpoint of the run."""
    run = {"shapes": trained_shapes(plan), "trajectory": plan.trajectory.hash()}
    return lambda step, **changes: write_checkpoint(FolderStore(Path(plan.run_dir)), step, **(run | changes))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run


Said = Callable[..., tuple[int, str, str]]


def test_sound_checkpoints_have_a_line_each(write: Write, said: Said) -> None:
    assert said("verify", "run")[:2] == (0, "0 checkpoints are sound\n")
    write(100)
    write(200, ranks=5)
    lines = "step-00000100  sound\nstep-00000200  sound\n2 checkpoints are sound\n"
    assert said("verify", "run")[:2] == (0, lines)


def test_deep_says_what_was_loaded_and_compared(write: Write, said: Said) -> None:
    sizes = [sum(file.stat().st_size for file in files(write(step, ranks=step // 100))) for step in (100, 300)]
    code, out, _ = said("verify", "run", "--deep")
    assert code == 0
    assert out.splitlines() == [
        *(
            f"step-{step:08d}  sound, {size / 1024:.1f} KiB, {PARAMETERS} parameters loaded"
            for step, size in zip((100, 300), sizes, strict=True)
        ),
        "2 checkpoints are sound",
        "parameters compared with the model of the run's plan.json",
    ]


def files(checkpoint: Any) -> list[Path]:
    return sorted((checkpoint.store.root / checkpoint.staging(FIRST)).glob("*.safetensors"))


@pytest.mark.parametrize("how", [(), ("--deep",)])
def test_a_damaged_one_is_named_and_the_exit_code_is_1(write: Write, said: Said, how: tuple[str, ...]) -> None:
    write(100)
    shard = files(write(200))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    write(300)
    code, out, err = said("verify", "run", *how)
    assert code == 1
    rows = out.splitlines()
    assert [row.split()[0] for row in rows] == ["step-00000100", "step-00000200", "step-00000300"]
    assert rows[1].endswith(f"step-00000200 is damaged: {shard.name}: content changed")
    assert "error: 1 of 3 checkpoints are damaged" in err
    assert "hint: a resume takes the newest sound one" in err


def spoiled(key: str, change: Callable[[torch.Tensor], object]) -> Callable[[str, int, int], torch.Tensor]:
    """As a broken optimizer would leave them: the values of one tensor changed before they are hashed and written."""

    def fill(name: str, numel: int, step: int) -> torch.Tensor:
        tensor = values(name, numel, step)
        if name == key:
            change(tensor)
        return tensor

    return fill


def cut(edges: Callable[[int, int, int], tuple[int, int]]) -> Callable[[FlatShard, int, int], FlatShard]:
    """A writer whose ranks cut a tensor of so many values at these places."""

    def share(shard: FlatShard, rank: int, ranks: int) -> FlatShard:
        first, last = edges(shard.full_numel, rank, ranks)
        return FlatShard(shard.held[first:last], first, shard.full_numel)

    return share


NORM, HEAD = "model.norm.weight", "lm_head.weight"
DECEPTIVE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "not a number": (
        {"fill": spoiled(f"master.{HEAD}", lambda t: t[3:5].fill_(math.nan))},
        [f"master.{HEAD}: 2 values are not finite"],
    ),
    "infinite moments": (
        {"fill": spoiled(f"exp_avg.{NORM}", lambda t: t[-1:].fill_(-math.inf))},
        [f"exp_avg.{NORM}: 1 values are not finite"],
    ),
    "negative second moments": (
        {"fill": spoiled(f"exp_avg_sq.{NORM}", lambda t: t[:3].neg_())},
        [f"exp_avg_sq.{NORM}: 3 values are negative"],
    ),
    "negative first moments": ({"fill": spoiled(f"exp_avg.{NORM}", lambda t: t.neg_())}, []),
    "a gap": (
        {"share": cut(lambda n, rank, ranks: (n * rank // ranks + (rank > 0), n * (rank + 1) // ranks))},
        ["embed_tokens.weight: values 320 to 321 are missing", "and 31 more"],
    ),
    "an end that is missing": (
        {"share": cut(lambda n, rank, ranks: (n * rank // (2 * ranks), n * (rank + 1) // (2 * ranks)))},
        ["embed_tokens.weight: values 320 to 640 are missing"],
    ),
    "values stored twice": (
        {"share": cut(lambda n, rank, ranks: (n * rank // ranks - rank, n * (rank + 1) // ranks))},
        ["embed_tokens.weight: values 319 to 320 are stored twice"],
    ),
    "another step": ({"progress": {"step": 199}}, ["its progress is of step 199"]),
    "no step": ({"progress": {}}, ["its progress is of step None"]),
    "another trajectory": ({"trajectory": "t"}, ["it belongs to another trajectory"]),
}


@pytest.mark.parametrize("name", DECEPTIVE)
def test_deep_finds_what_hashes_cannot(write: Write, said: Said, name: str) -> None:
    changes, wrong = DECEPTIVE[name]
    write(100)
    write(200, **changes)
    assert said("verify", "run")[0] == 0
    code, out, err = said("verify", "run", "--deep")
    row = out.splitlines()[1]
    assert row.startswith("step-00000200  ")
    if not wrong:
        assert code == 0
        return
    assert code == 1
    assert "step-00000200 is damaged: " in row
    assert all(words in row for words in wrong), row
    assert "hint: a resume compares hashes and nothing else: move step-00000200 out of checkpoints" in err


def test_deep_compares_shapes_with_what_the_model_trains(plan: Plan, write: Write, said: Said) -> None:
    shapes = trained_shapes(plan)
    first, second = (key for key in shapes if "up_proj" in key or "down_proj" in key)
    swapped = shapes | {first: shapes[second], second: shapes[first]}
    fewer = {key: shape for key, shape in shapes.items() if key != NORM}
    write(100, shapes=swapped)
    write(200, shapes=fewer)
    write(300, shapes=shapes | {"model.old.weight": (2,)})
    code, out, _ = said("verify", "run", "--deep")
    assert code == 1
    rows = out.splitlines()
    assert f"{first} has the shape {swapped[first]}, not {shapes[first]}" in rows[0]
    assert rows[1].endswith(f"is damaged: {NORM} is not in it")
    assert rows[2].endswith("is damaged: model.old.weight is not trained by the run")


def test_deep_without_the_model_compares_with_the_oldest_and_says_so(plan: Plan, write: Write, said: Said) -> None:
    write(100)
    write(200)
    write(300, shapes={NORM: (16,)})
    shutil.rmtree(plan.trajectory.model.path)
    code, out, _ = said("verify", "run", "--deep", "--json")
    assert code == 1
    found = json.loads(out)
    assert found["compared_with"].startswith("step-00000100, as the model cannot be built here: cannot load ")
    assert [one["problem"] is None for one in found["checkpoints"]] == [True, True, False]
    assert f"{HEAD} is not in it" in found["checkpoints"][2]["problem"]
    shutil.rmtree(Path(plan.run_dir) / "checkpoints" / "step-00000300")
    assert "parameters compared with step-00000100, as the model" in said("verify", "run", "--deep")[1]


def test_deep_reads_large_parameters_piece_by_piece(write: Write, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "MOST_VALUES", 100)
    write(100, ranks=3)
    assert said("verify", "run", "--deep")[0] == 0
    write(200, ranks=3, fill=spoiled(f"exp_avg_sq.{HEAD}", lambda t: t[[0, 99, 100, -1]].fill_(0)))
    assert said("verify", "run", "--deep")[0] == 0

    def change(tensor: torch.Tensor) -> None:
        tensor[[99, 100, -1]] = math.nan

    write(300, ranks=3, fill=spoiled(f"exp_avg_sq.{HEAD}", change))
    code, out, _ = said("verify", "run", "--deep")
    assert code == 1
    assert sum(int(part.split()[-5]) for part in out.splitlines()[2].split("; ")) == 3


def test_what_is_no_checkpoint_is_listed_and_counts_for_nothing(plan: Plan, write: Write, said: Said) -> None:
    store = FolderStore(Path(plan.run_dir))
    with acquire(store) as lease:
        for _ in range(2):
            latest = begin(store, lease.launch)
    assert latest == Attempt(1, 2)
    write(100, attempt=Attempt(1, 1))
    write(100, attempt=Attempt(0, 1), commit=False)
    write(200, attempt=Attempt(1, 1), commit=False)
    write(200, attempt=latest, commit=False)
    code, out, _ = said("verify", "run")
    assert code == 0
    assert out.splitlines() == [
        "step-00000100  sound",
        "step-00000100  not committed (left by attempt 0.1)",
        "step-00000200  not committed (left by attempt 1.1)",
        "step-00000200  not committed (being written, or left by attempt 1.2)",
        "1 checkpoints are sound",
    ]
    found = json.loads(said("verify", "run", "--json")[1])
    assert found["run"] == plan.run_dir
    assert [(one["step"], one["attempt"], one["latest"]) for one in found["uncommitted"]] == [
        (100, "0.1", False),
        (200, "1.1", False),
        (200, "1.2", True),
    ]
    assert [(one["step"], one["problem"]) for one in found["checkpoints"]] == [(100, None)]


def test_json_of_a_damaged_run_is_whole_and_the_exit_code_still_1(plan: Plan, write: Write, said: Said) -> None:
    write(100)
    (Path(plan.run_dir) / checkpoint_at(Path(plan.run_dir), 100).commit).write_bytes(b"")
    code, out, err = said("verify", "run", "--deep", "--json")
    assert code == 1
    [one] = json.loads(out)["checkpoints"]
    assert one["problem"].endswith("step-00000100 is damaged: COMMIT: content changed")
    assert one["loaded"] is False
    assert "1 of 1 checkpoints are damaged" in err


def test_a_folder_without_a_run_is_no_sound_run(said: Said, tmp_path: Path) -> None:
    code, out, err = said("verify", str(tmp_path))
    assert (code, out) == (2, "")
    assert "holds no run" in err


def test_a_run_in_an_object_store(plan: Plan, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_SPOOL", str(tmp_path / "spool"))
    with opened("s3", tmp_path) as store:
        store.write("plan.json", plan.model_copy(update={"location": str(store)}).model_dump_json().encode())
        run = {"shapes": trained_shapes(plan), "trajectory": plan.trajectory.hash()}
        for step in (100, 200):
            checkpoint = write_checkpoint(store, step, **run)  # type: ignore[arg-type]
        assert said("verify", str(store))[:2] == (
            0,
            "step-00000100  sound\nstep-00000200  sound\n2 checkpoints are sound\n",
        )
        shard = f"{checkpoint.staging(FIRST)}/shard-00001.safetensors"
        store.write(shard, store.read(shard)[:-1] + b"\1")
        code, out, err = said("verify", str(store), "--deep")
        assert code == 1
        assert out.splitlines()[0].startswith("step-00000100  sound, ")
        assert "step-00000200 is damaged: shard-00001.safetensors: content changed" in out.splitlines()[1]
    code, out, err = said("verify", str(store))
    assert code == 2
    assert "hint: " in err
