"""The planner: every `auto` decided with its reason, layouts that fit the cluster, and slots that cover a batch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.driver.resume import existing_plan, rebased, resumed_plan
from launcher.errors import ClusterError, DataError, RunFolderError
from launcher.plan import earlier
from launcher.plan.batch import batch_layout
from launcher.plan.deepspeed import deepspeed_config
from launcher.plan.facts import ClusterFacts, NodeFacts, this_machine
from launcher.plan.plan import LayoutPlan, Plan
from launcher.plan.resolve import resolve, resolve_model
from launcher.plan.resolve_data import resolve_data
from launcher.recipe.load import load
from launcher.store.location import local_folder
from tests.distributed.tiny import tiny_plan
from tests.plans import data_facts

LAPTOP = ClusterFacts((NodeFacts("laptop", cpus=8, gpus=0),))
UNEVEN = ClusterFacts((NodeFacts("a", cpus=4, gpus=0), NodeFacts("b", cpus=2, gpus=0)))
TAKEN = ClusterFacts((NodeFacts("a", cpus=16, gpus=0, used_gpus=4),))
GPUS = ClusterFacts((NodeFacts("a", cpus=16, gpus=4), NodeFacts("b", cpus=16, gpus=4)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "x.yaml").write_text("model: {scratch: {model_type: gpt2}}\ndata:\n  train: [{path: rows.jsonl}]\n")
    return tmp_path


def plan(here: Path, *overrides: str, cluster: ClusterFacts = LAPTOP, parameters: int = 10**6, **facts: Any) -> Plan:
    loaded, run_dir = load("x.yaml", overrides), here / "runs" / "x"
    model, data = resolve_model(loaded, run_dir), resolve_data(loaded)
    return resolve(loaded, cluster, model, data, data_facts(**facts), parameters, "x", run_dir, str(run_dir))


def leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything inside nested mappings and lists."""
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{key}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [leaf for i, inner in enumerate(value) for leaf in leaves(inner, f"{key}.{i}")]
    return [(key, value)]


@pytest.mark.parametrize("cluster", [LAPTOP, GPUS], ids=["laptop", "gpus"])
def test_every_auto_is_decided_and_says_why(here: Path, cluster: ClusterFacts) -> None:
    decided = plan(here, cluster=cluster)
    # The one exception tells itself apart row by row; what was found is in the data's facts.
    left = {key for key, value in leaves(decided.model_dump()) if value == "auto"}
    assert left == {"trajectory.data.train.0.format"}
    # Where the data is prepared decides nothing of it, so the Plan does not say.
    autos = {key for key, value in leaves(load("x.yaml").recipe.model_dump()) if value == "auto"} - {
        *("data.train.0.format", "data.workers", "data.prepare_on"),
    }
    assert len(autos) == 11
    for key in autos | {"evaluate.every_steps", "checkpoint.every_steps"}:
        assert decided.origins[key].startswith("planner: "), key
        assert decided.origins[key].removeprefix("planner: "), key


def test_every_value_knows_where_it_comes_from(here: Path) -> None:
    origins = plan(here, "optimizer.lr=3e-4", "parallel.zero=2").origins
    assert origins["model.scratch.model_type"] == "x.yaml:1"
    assert origins["data.train.0.path"] == "x.yaml:3"
    assert origins["optimizer.lr"].startswith("command line")
    assert origins["parallel.zero"].startswith("command line")
    assert origins["optimizer.eps"] == "default"
    assert plan(here, "cluster.workers={min: 2, max: 8}").origins["cluster.workers"].startswith("command line")
    sections = {name: part for name, part in load("x.yaml").recipe.model_dump().items() if isinstance(part, dict)}
    assert origins.keys() >= {f"{name}.{key}" for name, part in sections.items() for key in part}


def test_a_plan_comes_back_from_its_file_and_keeps_its_hashes(here: Path) -> None:
    first = plan(here)
    first.save(here / "plan.json")
    again = Plan.load(here / "plan.json")
    assert again == first
    assert again.trajectory.hash() == first.trajectory.hash()
    assert json.loads((here / "plan.json").read_text())["run_dir"] == str(here / "runs" / "x")
    for path in (first.run_dir, first.trajectory.model.path, first.trajectory.data.train[0].path):
        assert Path(path).is_absolute()


def test_the_hashes_tell_what_changes_the_numbers_from_what_does_not(here: Path) -> None:
    first = plan(here)
    for override in ("train.seed=1", "optimizer.lr=1e-3", "train.global_batch_size=7", "schedule.warmup=9"):
        assert plan(here, override).trajectory.hash() != first.trajectory.hash(), override
    assert plan(here, content_hash="4567").trajectory.hash() != first.trajectory.hash()
    for override in ("parallel.zero=3", "cluster.workers=2", "train.micro_batch_size=1"):
        other = plan(here, override)
        assert other.trajectory.hash() == first.trajectory.hash(), override
        assert other.layout.hash() != first.layout.hash(), override
    assert plan(here, "train.epochs=5").trajectory.hash() == first.trajectory.hash()


def with_model(plan: Plan, **changes: Any) -> Plan:
    model = plan.trajectory.model.model_copy(update=changes)
    return plan.model_copy(update={"trajectory": plan.trajectory.model_copy(update={"model": model})})


def test_a_trajectory_is_what_is_trained_on_and_not_where_it_lies(here: Path) -> None:
    sources = "data.test.sources=[{path: rows.jsonl}]", "data.clean.contamination=[{path: rows.jsonl}]"
    first = with_model(plan(here, *sources), fingerprint="abc")
    hash = first.trajectory.hash()
    assert with_model(first, path="/elsewhere/base").trajectory.hash() == hash
    assert with_model(first, fingerprint="abd").trajectory.hash() != hash
    nameless = with_model(first, fingerprint=None)
    assert with_model(nameless, path="/elsewhere/base").trajectory.hash() != nameless.trajectory.hash()
    values = first.trajectory.model_dump(mode="json")
    assert str(here / "rows.jsonl") in json.dumps(values)
    moved = json.loads(json.dumps(values).replace(str(here / "rows.jsonl"), "/elsewhere/rows.jsonl"))
    moved["data"]["augment"]["function_file"] = "/elsewhere/mine.py"
    moved = type(first.trajectory).model_validate(moved)
    assert moved != first.trajectory
    assert moved.hash() == hash
    for key, other in (("limit", 3), ("format", "alpaca"), ("weight", 2.0)):
        source = first.trajectory.data.train[0].model_copy(update={key: other})
        data = first.trajectory.data.model_copy(update={"train": (source,)})
        assert first.trajectory.model_copy(update={"data": data}).hash() != hash, key


def test_a_run_that_was_moved_is_found_where_it_is_now(here: Path) -> None:
    """With the folder that it lies in, so that the prepared data beside it has moved too; and then alone."""
    prepared = here / "runs" / ".prepared" / "0123"
    prepared.mkdir(parents=True)
    began = with_model(plan(here, folder=str(prepared)), fingerprint="abc")
    Path(began.run_dir).mkdir()
    began.save(Path(began.run_dir) / "plan.json")
    assert existing_plan(began.run_dir) == began
    assert existing_plan("runs/x") == began
    (here / "runs").rename(here / "archive")
    moved, place = existing_plan(here / "archive" / "x"), here / "archive"
    assert (moved.run_dir, moved.location) == (str(place / "x"), str(place / "x"))
    assert moved.trajectory.model.path == str(place / "x" / "base")
    assert moved.data.folder == str(place / ".prepared" / "0123")
    assert moved.trajectory.hash() == began.trajectory.hash()
    assert (
        moved.model_copy(update={name: getattr(began, name) for name in ("run_dir", "location", "trajectory", "data")})
        == began
    )
    (place / "x").rename(here / "x")
    assert existing_plan("x").data.folder == str(prepared), "named, for whoever has to bring it back"


def test_a_run_in_a_store_has_its_spool_on_every_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_SPOOL", str(here / "one"))
    url = "s3://bucket/runs/x"
    spool = local_folder(url)
    loaded = load("x.yaml")
    facts = data_facts(folder=str(spool / "data"))
    model = resolve_model(loaded, spool)
    began = resolve(loaded, LAPTOP, model, resolve_data(loaded), facts, 10**6, "x", spool, url)
    monkeypatch.setenv("SLIPWAY_SPOOL", str(here / "two"))
    moved, other = rebased(began, url), local_folder(url)
    assert other == here / "two" / spool.name
    assert (moved.run_dir, moved.location) == (str(other), url)
    assert moved.trajectory.model.path == str(other / "base")
    assert moved.data.folder == str(other / "data")


def test_a_plan_of_another_version_is_refused(here: Path) -> None:
    (here / "plan.json").write_text('{"name": "x"}')
    with pytest.raises(RunFolderError, match="cannot be understood") as caught:
        existing_plan(here)
    assert caught.value.hint is not None
    with pytest.raises(RunFolderError, match="holds no run"):
        existing_plan(here / "x.yaml")


def test_a_run_begun_before_there_were_kernels_and_an_audit_goes_on_without_kernels(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, zero=1)
    values = json.loads(plan.model_dump_json())
    del values["layout"]["kernels"], values["lifecycle"]["audit"]
    (tmp_path / "plan.json").write_text(json.dumps(values))
    found = existing_plan(tmp_path)
    assert (found.layout.kernels, found.lifecycle.audit) == ("eager", "strict")
    assert found.trajectory.hash() == plan.trajectory.hash()


def layout(here: Path, *overrides: str, **settings: Any) -> LayoutPlan:
    return plan(here, *overrides, **settings).layout


def test_a_laptop_is_one_fp32_process_with_all_its_cpus(here: Path) -> None:
    decided = plan(here)
    found = decided.layout
    assert (found.workers, found.device, found.cpus_per_worker, found.zero) == (1, "cpu", 8, 0)
    assert (found.offload, found.gradient_checkpointing, found.attention) == (False, False, "sdpa")
    assert decided.trajectory.dtype == "fp32"
    assert found.micro_batch_size == 2  # 4,096 tokens of rows of 2,048


def test_gpus_are_a_bf16_worker_each(here: Path) -> None:
    decided = plan(here, cluster=GPUS, parameters=8 * 10**9)
    found = decided.layout
    assert (found.workers, found.device, found.cpus_per_worker, found.zero) == (8, "cuda", 1, 3)
    assert found.gradient_checkpointing
    assert decided.trajectory.dtype == "bf16"
    assert found.micro_batch_size == 4  # 8,192 tokens of rows of 2,048, and a share of the 32 rows


def test_the_stage_follows_size_method_and_ranks(here: Path) -> None:
    large = 8 * 10**9
    for overrides, cluster, parameters, zero in (
        ((), GPUS, large, 3),
        (("method.kind=freeze",), GPUS, large, 3),
        (("method.kind=lora",), GPUS, large, 1),
        (("method.kind=qlora",), GPUS, large, 1),
        ((), GPUS, 10**8, 1),
        (("cluster.workers=1",), GPUS, large, 1),
        (("cluster.workers=2",), LAPTOP, 10**6, 1),
        (("train.dtype=bf16",), LAPTOP, 10**6, 1),
        (("parallel.zero=2",), GPUS, large, 2),
        ((), LAPTOP, 10**6, 0),
        (("parallel.offload=cpu",), LAPTOP, 10**6, 1),  # stage 0 would leave the wish aside in silence
    ):
        assert layout(here, *overrides, cluster=cluster, parameters=parameters).zero == zero, overrides


def test_betas_follow_the_optimizer_and_adafactor_stays_at_stage_0(here: Path) -> None:
    for name, betas in (("adamw", (0.9, 0.999)), ("lion", (0.9, 0.99))):
        found = plan(here, f"optimizer.name={name}")
        assert found.trajectory.optimizer.betas == betas
        assert found.origins["optimizer.betas"] == "planner: as the optimizer's paper has them"
    assert plan(here, "optimizer.betas=[0.8, 0.9]").trajectory.optimizer.betas == (0.8, 0.9)
    found = plan(here, "optimizer.name=adafactor", cluster=GPUS, parameters=10**10)
    assert found.layout.zero == 0
    assert found.origins["parallel.zero"] == "planner: adafactor keeps sums over the rows and columns of whole matrices"


def test_the_micro_batch_is_never_larger_than_a_ranks_share_or_the_budget(here: Path) -> None:
    for length, batch, workers, micro in ((64, 32, 1, 32), (64, 32, 5, 7), (1024, 32, 1, 4), (100_000, 32, 1, 1)):
        overrides = (f"data.max_length={length}", f"train.global_batch_size={batch}", f"cluster.workers={workers}")
        assert layout(here, *overrides).micro_batch_size == micro, overrides
    assert layout(here, "train.micro_batch_size=9").micro_batch_size == 9


def test_the_cpus_are_shared_out_and_no_worker_spans_machines(here: Path) -> None:
    for cluster, workers, cpus in (
        (LAPTOP, 1, 8),
        (LAPTOP, 2, 4),
        (LAPTOP, 3, 2),
        (LAPTOP, 8, 1),
        (UNEVEN, 1, 4),
        (UNEVEN, 2, 2),
        (UNEVEN, 3, 2),
        (UNEVEN, 4, 1),
        (UNEVEN, 6, 1),
    ):
        assert layout(here, f"cluster.workers={workers}", cluster=cluster).cpus_per_worker == cpus, (cluster, workers)


@pytest.mark.parametrize(
    ("overrides", "cluster", "message", "hint"),
    [
        (("cluster.workers=9",), LAPTOP, "needs 9 workers of 1 CPU; there is room for 8", "at most 8"),
        (("cluster.workers=9",), GPUS, "needs 9 GPUs; free are 8: a 4 of 4, b 4 of 4", "at most 8"),
        (("cluster.workers={min: 9, max: 12}",), GPUS, "needs 9 GPUs; free are 8", "at most 8"),
        ((), TAKEN, "needs 1 GPU; free are 0: a 0 of 4 (4 in use)", "free the cluster"),
        (
            ("cluster.workers=2", "cluster.cpus_per_worker=3"),
            UNEVEN,
            "needs 2 workers of 3 CPUs; there is room for 1: CPUs free are a 4 of 4, b 2 of 2",
            "at most 1",
        ),
        (
            ("cluster.workers=8", "cluster.cpus_per_worker=8"),
            GPUS,
            "needs 8 GPUs with 8 CPUs each; there is room for 4: GPUs free are a 4 of 4, b 4 of 4",
            "at most 4",
        ),
        (("cluster.cpus_per_worker=9",), LAPTOP, "needs 1 worker of 9 CPUs; there is room for 0", "add nodes"),
    ],
)
def test_too_many_workers_are_refused_with_what_there_is(
    here: Path, overrides: tuple[str, ...], cluster: ClusterFacts, message: str, hint: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        plan(here, *overrides, cluster=cluster)
    assert message in caught.value.message
    for node in cluster.nodes:
        assert f" {node.host} {node.gpus if cluster.has_gpus else node.cpus} of " in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_what_is_decided_for_a_run_of_many_sizes_is_right_for_each(here: Path) -> None:
    three = ClusterFacts(tuple(NodeFacts(host, cpus=4, gpus=0) for host in "abc"))
    for override, cluster, sizes, cpus, micro in (
        ("{min: 2, max: 3}", three, (2, 3), 4, 8),  # one on each machine
        ("{min: 2, max: 16}", three, (2, 16), 4, 8),
        ("{min: 4, max: 16}", three, (4, 16), 2, 8),  # the least must fit
        ("{min: 1, max: 16}", LAPTOP, (1, 16), 8, 8),
        ("{min: 2, max: 16}", GPUS, (2, 16), 1, 16),  # the share of one of the least, within the budget
        ("{min: 8, max: 8}", GPUS, (8, 8), 1, 4),
    ):
        found = layout(here, f"cluster.workers={override}", "data.max_length=512", cluster=cluster)
        assert (found.min_workers, found.workers) == sizes, override
        assert (found.cpus_per_worker, found.micro_batch_size, found.zero) == (cpus, micro, 1), override
    assert layout(here, "cluster.workers={min: 1, max: 2}", cluster=GPUS, parameters=8 * 10**9).zero == 3


def test_a_plan_of_before_there_were_sizes_keeps_its_own(here: Path) -> None:
    values = json.loads(plan(here, "cluster.workers=2").model_dump_json())
    del values["layout"]["min_workers"], values["lifecycle"]["wait_s"], values["lifecycle"]["hang_timeout_s"]
    found = Plan.model_validate_json(json.dumps(values))
    assert (found.layout.min_workers, found.layout.workers, found.lifecycle.wait_s) == (2, 2, 600)
    assert found.lifecycle.hang_timeout_s == 600


def test_how_long_a_run_is(here: Path) -> None:
    for overrides, steps in (
        ((), 32),  # 1,000 rows in batches of 32, one epoch
        (("train.epochs=2",), 64),
        (("train.epochs=0.5",), 16),
        (("train.max_steps=10",), 10),
        (("train.max_steps=1000",), 1000),
        (("train.epochs=1", "train.max_steps=1000"), 32),
        (("train.epochs=3", "train.max_steps=50"), 50),
    ):
        life = plan(here, *overrides).lifecycle
        assert life.total_steps == steps, overrides
        assert life.eval_every_steps == life.checkpoint_every_steps == -(-steps // 10)
        assert life.checkpoint_within_s == 1800
    assert plan(here, "checkpoint.every_steps=7").lifecycle.checkpoint_within_s is None
    assert plan(here, "train.max_time=90s").lifecycle.max_time_s == 90


def test_answers_need_test_rows(here: Path) -> None:
    with pytest.raises(DataError, match="data.test has no usable row"):
        plan(here, "evaluate.generate.rows=5", "data.test.sources=[{path: rows.jsonl}]", test_documents=0)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 17), st.data())
def test_slots_cover_every_row_once(global_batch: int, micro: int, world_size: int, data: st.DataObject) -> None:
    cut = batch_layout(global_batch, micro, world_size)
    num_rows = data.draw(st.integers(1, global_batch), label="the last batch of an epoch is short")
    slots = [cut.slot(num_rows, step, rank) for step in range(cut.num_micro_steps) for rank in range(world_size)]
    assert sorted(row for slot in slots for row in slot) == list(range(num_rows))
    assert cut.slot(num_rows, 0, 0)[0] == 0, "the slot that is never empty"
    # Rows come sorted by cost: those of a micro step are neighbours.
    steps = [slots[start : start + world_size] for start in range(0, len(slots), world_size)]
    assert [row for step in steps for row in sorted(row for slot in step for row in slot)] == list(range(num_rows))
    assert all(len(slot) <= cut.micro_batch_size <= micro for slot in slots)
    # No micro step but the ones needed, and no larger micro batch than the ranks can fill.
    assert (cut.num_micro_steps - 1) * world_size * cut.micro_batch_size < global_batch
    assert world_size * (cut.micro_batch_size - 1) < global_batch


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deepspeeds_numbers_fit_together(here: Path, zero: int, offload: bool, dtype: Any) -> None:
    found = layout(here, f"parallel.zero={zero}", "cluster.workers=3")
    found = found.model_copy(update={"offload": offload})
    cut = batch_layout(32, 4, 3)
    config = deepspeed_config(found, cut, dtype, 1.0)
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == micro * accumulation * 3
    assert config["zero_optimization"]["stage"] == zero
    assert ("offload_optimizer" in config["zero_optimization"]) == offload
    assert ("offload_param" in config["zero_optimization"]) == (offload and zero == 3)
    assert ("bf16" in config) == (dtype == "bf16")
    # fp32 sums of bf16 gradients wherever DeepSpeed has them; without them E1 and E2 do not hold.
    assert ("data_types" in config) == (dtype == "bf16" and zero > 0)
    assert "auto" not in json.dumps(config)


def test_a_resume_remembers_what_the_last_one_was_told(tmp_path: Path) -> None:
    """Three epochs on the first resume are three on the second, which names none; the trajectory never changes."""
    plan = tiny_plan(tmp_path, zero=0)
    run_dir = Path(plan.run_dir)
    recipe = "model: {scratch: {model_type: llama}}\ndata: {train: [{path: rows.jsonl}]}\n"
    (run_dir / "recipe.yaml").write_text(recipe)
    plan.save(run_dir / "plan.json")
    longer = resumed_plan(run_dir, ["train.epochs=3", "checkpoint.keep_last=5"], this_machine())
    again = resumed_plan(run_dir, [], this_machine())
    assert (again.lifecycle.epochs, again.lifecycle.keep_last) == (3, 5)
    assert again.lifecycle == longer.lifecycle
    assert again.trajectory.hash() == plan.trajectory.hash()
    assert longer.origins["train.epochs"] == "command line"
    fused = resumed_plan(run_dir, ["model.kernels=fused", "model.attention=triton"], this_machine())
    assert fused.layout == plan.layout.model_copy(update={"kernels": "fused", "attention": "triton"})
    assert resumed_plan(run_dir, ["model.kernels=auto"], this_machine()).layout == fused.layout


def test_a_plan_of_an_earlier_version_keeps_its_hash(here: Path) -> None:
    """What came since is at what it did without it, and counts in no hash."""
    decided = plan(here)
    values = decided.model_dump(mode="json")
    for part, added in (*earlier.PARTS.items(), *((f"trajectory.{name}", a) for name, a in earlier.TRAJECTORY.items())):
        section: Any = values
        for name in filter(None, part.split(".")):
            section = section[name]
        for key in added:
            del section[key]
    old = json.dumps(values)
    assert "classes" not in values["data"]
    assert "momentum" not in values["trajectory"]["optimizer"]
    found = Plan.model_validate_json(old)
    assert found.trajectory == decided.trajectory
    del values["trajectory"]["model"]["fingerprint"]
    trajectory = values["trajectory"]
    for source in trajectory["data"]["train"]:
        del source["path"]
    del trajectory["data"]["augment"]["function_file"]
    trajectory["model"]["fingerprint"] = None
    canonical = json.dumps(trajectory, sort_keys=True, separators=(",", ":"))
    assert found.trajectory.hash() == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    smoothed = found.trajectory.model_copy(update={"label_smoothing": 0.1})
    assert smoothed.hash() != found.trajectory.hash()
