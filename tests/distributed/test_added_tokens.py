"""Tokens added on request are trained and exported, rows of the embedding and of the head, under adapters too.

Two bases: one of untied matrices that have no row to spare, so that rows are appended, and a tied one of a padded
vocabulary. ZeRO-3 partitions the rows here, which it would keep whole because they are few and short. Two ranks are
trained first, one rank resumes some of their runs.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.checkpoint.deep import check, expected_of
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import read, verify
from launcher.data.prepare import prepare
from launcher.export.folder import export, write_folder
from launcher.export.merge import merged_model, trained_model
from launcher.model.scratch import create_scratch
from launcher.plan.deepspeed import deepspeed_config
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.probe import probe_file, read_probe
from tests.checkpoints import checkpoint_at, copy_checkpoint
from tests.distributed.group import run_group
from tests.distributed.runs import METHODS, curve, open_folder, tiny_run, variant, worst
from tests.distributed.test_export import PLAIN
from tests.distributed.tiny import quiet

pytestmark = pytest.mark.distributed

STEPS, MIDDLE = 12, 6
FP32, BF16 = 1e-5, 1e-3
ADDED = ("<|user|>", "<|assistant|>", "<|end|>")
IDS = [300, 301, 302]  # after the 300 that the base's tokenizer has
OTHERS = {"untied": list(range(300)), "tied": [*range(300), *range(303, 320)]}
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{%- if message['role'] == 'assistant' -%}<|end|>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
MESSAGES = [{"role": "user", "content": "Say 3 of stone"}, {"role": "assistant", "content": "stone stone stone"}]
LIFE = {"max_steps": STEPS, "total_steps": STEPS, "checkpoint_every_steps": MIDDLE, "keep_last": 9}

Matrices = dict[str, Tensor]
"""Everything of the embedding and the head in a trained engine, whole, by the model's names."""


def base_without_rows(root: Path) -> Plan:
    """A folder whose embedding is full, and data whose template writes tokens that it does not have."""
    return adding(tiny_run(root), root / "base")


def tied_base_with_rows_to_spare(root: Path) -> Plan:
    plan = tiny_run(root, tie_word_embeddings=True)
    model = plan.trajectory.model
    padded = model.model_copy(update={"scratch": (model.scratch or {}) | {"vocab_size": 320}})
    create_scratch(padded, Path(plan.data.folder) / "tokenizer", 3, root / "padded")
    return adding(plan, root / "padded")


def adding(plan: Plan, base: Path) -> Plan:
    changes = {"source": "folder", "path": str(base), "scratch": None}
    changes |= {"add_tokens": ADDED, "chat_template": TEMPLATE}
    model = plan.trajectory.model.model_copy(update=changes)
    facts = prepare(model, plan.trajectory.data, seed=3, cache_dir=base.parent / "prepared")
    trajectory = plan.trajectory.model_copy(update={"model": model, "data_content_hash": facts.content_hash})
    return plan.model_copy(update={"trajectory": trajectory, "data": facts})


def on_two_ranks(plan: Plan) -> Plan:
    return plan.model_copy(update={"layout": plan.layout.model_copy(update={"workers": 2, "micro_batch_size": 2})})


def train_and_look(plans: dict[str, Plan]) -> dict[str, Matrices]:
    """What `train_run` does, each from its newest checkpoint, with a look at the matrices after the last step."""
    import torch.distributed as dist

    from launcher.plan.batch import batch_layout
    from launcher.train.loop import train
    from launcher.train.metrics import MetricsLog
    from launcher.train.run import begin_together, build_parts, resume_point, use_device

    quiet()
    found = {}
    for name, plan in plans.items():
        open_folder(plan)
        batch = batch_layout(plan.trajectory.global_batch_size, plan.layout.micro_batch_size, dist.get_world_size())
        with rows_partitioned():
            store = FolderStore(Path(plan.run_dir))
            attempt = begin_together(store, 0)
            log = MetricsLog(Path(plan.run_dir), str(attempt), writes=dist.get_rank() == 0)
            parts = build_parts(plan, batch, use_device(plan), log, store, attempt, lambda: False)
            assert train(parts, resume_point(parts)).kind == "finished"
        if plan.layout.zero == 3:
            assert not any(parameter.numel() for parameter in of_embedding_and_head(parts.engine.module).values())
        found[name] = matrices(parts.engine.module)
    return found


@contextmanager
def rows_partitioned() -> Iterator[None]:
    """Under ZeRO-3 the embedding, the head and their rows are gathered for each use, as in a larger model."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    mark = DeepSpeedZeRoOffload.mark_persistent_parameters

    def mark_others(self: Any, *thresholds: Any) -> list[Any]:
        kept: list[Any] = mark(self, *thresholds)
        of_matrices = {id(parameter) for parameter in of_embedding_and_head(self.module).values()}
        for parameter in kept:
            parameter.ds_persist = id(parameter) not in of_matrices
        return [parameter for parameter in kept if parameter.ds_persist]

    def released_at_once(*args: Any) -> dict[str, Any]:
        written = deepspeed_config(*args)
        written["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
        return written

    with (
        mock.patch.object(DeepSpeedZeRoOffload, "mark_persistent_parameters", mark_others),
        mock.patch("launcher.train.engine.deepspeed_config", released_at_once),
        mock.patch("launcher.train.network.deepspeed_config", released_at_once),
    ):
        yield


def of_embedding_and_head(model: torch.nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}


def matrices(model: torch.nn.Module) -> Matrices:
    import deepspeed

    found = of_embedding_and_head(model)
    with deepspeed.zero.GatheredParameters(list(found.values())):
        return {name: parameter.detach().clone() for name, parameter in found.items()}


@dataclass(frozen=True)
class Runs:
    plans: dict[str, Plan]
    matrices: dict[str, Matrices]

    def agree(self, name: str, with_: str, tolerance: float, from_step: int = 0) -> None:
        found, expected = curve(self.plans[name]), curve(self.plans[with_])[from_step:]
        error = worst(found, expected)
        print(f"{name} = {with_}: {error:.1e}")
        assert len(found) == STEPS - from_step
        assert error <= tolerance, (found, expected)


# Gradient checkpointing at stage 3 as well: the references have none. The rest of the stages is in the long test.
TWO_RANKS = {
    f"{base} {kind} zero {zero}": (
        base,
        {"method": METHODS[kind], "zero": zero, "gradient_checkpointing": zero == 3},
    )
    for base, kind, zero in [
        ("untied", "lora", 0),
        ("untied", "lora", 2),
        ("untied", "lora", 3),
        ("untied", "qlora", 3),
        ("tied", "lora", 3),
        ("tied", "qlora", 0),
    ]
}
ONE_RANK: dict[str, tuple[str, dict[str, Any]]] = {
    f"{base} {kind}": (base, {"method": METHODS[kind]})
    for base, kind in itertools.product(("untied", "tied"), ("lora", "qlora"))
}
RESUMED = {"untied lora zero 3": 2, "tied qlora zero 0": 3}
"""Runs of two ranks that one rank goes on with, at another stage."""


def named(cases: dict[str, tuple[str, dict[str, Any]]], bases: dict[str, Plan], kind: str) -> dict[str, Plan]:
    return {
        name: variant(bases[base], f"{kind}-{name.replace(' ', '-')}", **LIFE, **changes)
        for name, (base, changes) in cases.items()
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    root = tmp_path_factory.mktemp("added")
    return {
        "untied": base_without_rows(root / "untied"),
        "tied": tied_base_with_rows_to_spare(root / "tied"),
    }


@pytest.fixture(scope="module")
def runs(bases: dict[str, Plan]) -> Runs:
    two = named(TWO_RANKS, {name: on_two_ranks(plan) for name, plan in bases.items()}, "two")
    found = run_group(2, train_and_look, two, timeout_s=600)[0]
    one = named(ONE_RANK, bases, "one")
    for name, zero in RESUMED.items():
        plan = variant(two[name], f"{Path(two[name].run_dir).name}-resumed", zero=zero, workers=1, micro_batch_size=6)
        copy_checkpoint(Path(two[name].run_dir), MIDDLE, Path(plan.run_dir))
        one[f"{name} resumed"] = plan
    found |= run_group(1, train_and_look, one, timeout_s=600)[0]
    return Runs(one | two, found)


def test_ranks_and_stages_change_nothing(runs: Runs) -> None:
    for name in TWO_RANKS:
        runs.agree(name, name.rpartition(" zero ")[0], FP32)


def test_resumed_at_another_world_size_and_stage(runs: Runs) -> None:
    for name in RESUMED:
        runs.agree(f"{name} resumed", name, FP32, from_step=MIDDLE)
        ended, expected = (
            load_weights(checkpoint_at(Path(runs.plans[n].run_dir), STEPS)) for n in (f"{name} resumed", name)
        )
        for key, tensor in expected.items():
            assert torch.allclose(ended[key], tensor, rtol=1e-3, atol=1e-5), key


def test_the_added_rows_moved_and_no_other(runs: Runs, bases: dict[str, Plan]) -> None:
    for name, found in runs.matrices.items():
        kind = name.split()[0]
        base = AutoModelForCausalLM.from_pretrained(bases[kind].trajectory.model.path)
        for layer in ("embed_tokens", "lm_head") if kind == "untied" else ("embed_tokens",):
            [frozen] = [tensor for key, tensor in found.items() if layer in key and "base_layer" in key]
            [rows] = [tensor for key, tensor in found.items() if layer in key and "trainable_tokens_delta" in key]
            before = base.state_dict()[f"{'model.' * (layer == 'embed_tokens')}{layer}.weight"]
            assert torch.equal(frozen[OTHERS[kind]], before[OTHERS[kind]]), (name, layer)
            assert rows.shape == (3, 64)
            assert frozen.shape == (303 if kind == "untied" else 320, 64)
            assert (rows != frozen[IDS]).any(1).all(), (name, layer)
            assert (rows - frozen[IDS]).norm() > 0.1 * frozen[IDS].norm(), (name, layer)


def test_checkpoints_hold_the_rows_and_their_moments(runs: Runs) -> None:
    for name in ("untied lora zero 3", "tied lora zero 3"):
        checkpoint = checkpoint_at(Path(runs.plans[name].run_dir), STEPS)
        rows = {key: shape for key, shape in read(checkpoint).parameters.items() if "trainable_tokens_delta" in key}
        assert list(rows.values()) == [(3, 64)] * (2 if name.startswith("untied") else 1)
        weights = load_weights(checkpoint)
        for key in rows:
            assert torch.equal(weights[key], runs.matrices[name][key])


def test_a_deep_check_knows_the_rows_from_the_plan_alone(runs: Runs) -> None:
    for plan in runs.plans.values():
        checkpoint = checkpoint_at(Path(plan.run_dir), STEPS)
        expected = expected_of(plan, [])
        assert expected.source == "the model of the run's plan.json"
        check(checkpoint, verify(checkpoint), expected)


EXPORTED = ("untied lora zero 3", "untied qlora zero 3", "tied lora zero 3", "tied qlora zero 0")


@pytest.fixture(scope="module")
def folders(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Any]]:
    """Adapters and merged models of some runs, and what plain transformers and peft make of them in a fresh process."""
    root = tmp_path_factory.mktemp("folders")
    made: dict[str, Path] = {}
    request = {}
    for name, merged in itertools.product(EXPORTED, (False, True)):
        plan = runs.plans[name]
        tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
        model: Any = trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS))
        model = merged_model(plan, model) if merged else model
        folder = made[f"{name} merged" if merged else name] = root / f"{name.replace(' ', '-')}-{merged}"
        write_folder(plan, model, tokenizer, folder, merged)
        request[str(folder)] = {
            "probe": str(probe_file(Path(plan.run_dir), STEPS)),
            "dtype": "float32",
            "adapters": not merged,
            "quantized": "qlora" in name and not merged,
        }
    said = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps({"folders": request, "messages": MESSAGES}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=root,
    ).stdout.splitlines()[-1]
    return made, {name: json.loads(said)[str(folder)] for name, folder in made.items()}


def test_exported_folders_give_the_trained_models_logits(
    runs: Runs, folders: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    for name, folder in folders[0].items():
        found = read_probe(Path(runs.plans[name.removesuffix(" merged")].run_dir), STEPS)
        assert found is not None
        ids, trained = found
        assert set(IDS) <= set(ids.tolist())
        exact = load_file(folder / "logits.safetensors")["exact"]
        assert exact.shape == trained.shape
        assert trained[:, IDS].abs().max() > 0.1 * trained.abs().max()
        error = ((exact - trained).abs().max() / trained.abs().max()).item()
        of_added = ((exact - trained)[:, IDS].abs().max() / trained.abs().max()).item()
        print(f"{name}: {error:.1e}, of the added tokens {of_added:.1e}")
        assert error <= FP32, name


def test_exported_tokenizers_have_the_tokens(folders: tuple[dict[str, Path], dict[str, Any]]) -> None:
    for name, folder in folders[0].items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.convert_tokens_to_ids(list(ADDED)) == IDS
        assert len(tokenizer) == 303
        ids = folders[1][name]["ids"]
        assert [i for i in ids if i in IDS] == IDS
        assert folders[1][name]["text"] == "<|user|>Say 3 of stone<|assistant|>stone stone stone<|end|>"


def test_exported_files_hold_the_rows_and_nothing_else_of_the_matrices(
    runs: Runs, bases: dict[str, Plan], folders: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    for name in EXPORTED:
        kind = name.split()[0]
        rows = {key: t for key, t in runs.matrices[name].items() if "trainable_tokens_delta" in key}
        adapters = load_file(folders[0][name] / "adapter_model.safetensors")
        of_matrices = {key: t for key, t in adapters.items() if "lora" not in key}
        assert of_matrices.keys() == {key.removesuffix(".default") for key in rows}
        for key, tensor in rows.items():
            assert torch.equal(of_matrices[key.removesuffix(".default")], tensor)
        merged = AutoModelForCausalLM.from_pretrained(folders[0][f"{name} merged"])
        base = AutoModelForCausalLM.from_pretrained(bases[kind].trajectory.model.path)
        for key, tensor in rows.items():
            of = "get_input_embeddings" if "embed_tokens" in key else "get_output_embeddings"
            after, before = (getattr(model, of)().weight for model in (merged, base))
            assert torch.equal(after[IDS], tensor)
            assert torch.equal(after[OTHERS[kind]], before[OTHERS[kind]])
        assert merged.config.vocab_size == len(after)


@pytest.mark.long
def test_export_checks_itself_and_says_what_was_added(runs: Runs, tmp_path: Path) -> None:
    report = export(runs.plans["untied lora zero 3"], tmp_path / "model", merge=False)
    assert report.agreement is not None
    assert report.agreement.within("fp32")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "3 tokens were added to the base model's" in card
    assert "base.resize_token_embeddings(len(tokenizer))" in card


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_method_at_every_stage(bases: dict[str, Plan], world_size: int) -> None:
    """And what the methods without adapters export: a model whose matrices have the rows.

    At a quarter of the rate: in bf16 QLoRA at the other tests' rate differs by 4e-3 on three ranks, with rows trained
    or without.
    """
    slower = {"optimizer": bases["tied"].trajectory.optimizer.model_copy(update={"lr": 5e-4})}
    cases = list(itertools.product(bases, METHODS, ("fp32", "bf16")))
    alone = {
        f"{base} {kind} {dtype}": (
            base,
            {"method": METHODS[kind], "dtype": dtype, "zero": int(dtype == "bf16"), **slower},
        )
        for base, kind, dtype in cases
    }
    shared = {
        f"{base} {kind} {dtype} zero {zero}": (
            base,
            {
                "method": METHODS[kind],
                "dtype": dtype,
                "zero": zero,
                "workers": world_size,
                "micro_batch_size": 2,
                "gradient_checkpointing": zero > 1,
                **slower,
            },
        )
        for (base, kind, dtype), zero in itertools.product(cases, range(4))
        if (dtype, zero) != ("bf16", 0)
    }
    one, many = named(alone, bases, f"alone-{world_size}"), named(shared, bases, f"of-{world_size}")
    found = run_group(1, train_and_look, one, timeout_s=900)[0]
    found |= run_group(world_size, train_and_look, many, timeout_s=1800)[0]
    runs = Runs(one | many, found)
    for name in many:
        runs.agree(name, name.rpartition(" zero ")[0], BF16 if "bf16" in name else FP32)
    for name, plan in many.items():
        if plan.trajectory.method.rank is not None:
            continue
        model: Any = trained_model(plan, checkpoint_at(Path(plan.run_dir), STEPS))
        probe = read_probe(Path(plan.run_dir), STEPS)
        assert probe is not None
        with torch.no_grad():
            logits = model(input_ids=probe[0][None]).logits[0].float()
        assert not [key for key in model.state_dict() if "trainable_tokens" in key]
        tolerance = 4e-2 if "bf16" in name else FP32
        assert (logits - probe[1]).abs().max() <= tolerance * probe[1].abs().max(), name
