"""E7: an exported folder, loaded by plain transformers in a fresh process, is the trained model.

The logits to compare with are those the training engine wrote down at its last step; the folders are made from the
checkpoints, as `slipway export` makes them. All folders are loaded in one fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.export.folder import export, write_folder
from launcher.export.merge import merged_model, trained_model
from launcher.export.verify import verify
from launcher.plan.plan import Plan
from launcher.train.probe import probe_file, read_probe
from tests.checkpoints import checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.runs import FREEZE, LORA, QLORA, tiny_run, train_all, variant
from tests.plans import optimizer_plan

pytestmark = pytest.mark.distributed

LAST = 3
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2}
"""Largest difference of a logit as a share of the largest logit; bf16 keeps 8 bits, over two layers and the head."""
BF16_KERNEL = 8e-2
"""The same of 4-bit layers that bitsandbytes evaluates in bf16, as it does on CPUs with AVX512-BF16 in any dtype."""
KIN = LORA.model_copy(update={"rslora": True, "alpha": 16.0, "dora": True, "init": "pissa"})
MESSAGES = [{"role": "user", "content": "Say 3 of stone"}, {"role": "assistant", "content": "stone stone stone"}]

PLAIN = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from peft import AutoPeftModelForCausalLM

request = json.load(sys.stdin)
answers = {}
for folder, case in request["folders"].items():
    dtype = getattr(torch, case["dtype"])
    settings = {"dtype": dtype if case["adapters"] else "auto"}
    if case["quantized"]:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    kind = AutoPeftModelForCausalLM if case["adapters"] else AutoModelForCausalLM
    model = kind.from_pretrained(folder, **settings).eval()
    found = {}
    for kernel in ("plain", "exact"):
        if kernel == "exact":
            model = kind.from_pretrained(folder, **settings).eval()
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            logits = model(input_ids=load_file(case["probe"])["input_ids"][None]).logits[0].float()
        found[kernel] = logits.contiguous()
    save_file(found, folder + "/logits.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers[folder] = {
        "text": tokenizer.apply_chat_template(request["messages"], tokenize=False),
        "ids": tokenizer.apply_chat_template(request["messages"], tokenize=True, return_dict=False),
        "prompt": tokenizer.apply_chat_template(request["messages"][:1], tokenize=False, add_generation_prompt=True),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "use_cache": model.config.use_cache,
    }
assert not [name for name in sys.modules if name.split(".")[0] in ("launcher", "launcher_kernels")]
json.dump(answers, sys.stdout)
"""
"""What a user does with a folder, and nothing of ours in it."""


@dataclass(frozen=True)
class Folder:
    """One export."""

    plan: Plan
    path: Path
    merged: bool
    logits: Mapping[str, Tensor]
    """[T, V] by plain transformers, and with bitsandbytes' bf16 kernel for evaluation on CPUs switched off."""
    said: Mapping[str, Any]

    def error(self, kernel: str) -> float:
        """Largest difference from the trained model's logits, as a share of the largest."""
        _, trained = probe(self.plan)
        return ((self.logits[kernel] - trained).abs().max() / trained.abs().max()).item()


def probe(plan: Plan) -> tuple[Tensor, Tensor]:
    found = read_probe(Path(plan.run_dir), LAST)
    assert found is not None
    return found


def plans_of(untied: Plan, tied: Plan) -> dict[str, Plan]:
    """Three steps with a rate that moves the weights far; small shards, so that there are several."""
    fast = optimizer_plan(lr=1e-2, betas=(0.9, 0.99), max_grad_norm=0.0)
    rates = {"fp32": fast, "bf16": fast.model_copy(update={"lr": 4e-3})}  # its rounding grows with the adapters
    life = {"max_steps": LAST, "total_steps": LAST, "checkpoint_every_steps": LAST, "max_shard_size": "100KB"}
    cases: dict[str, tuple[Plan, dict[str, Any]]] = {
        "full": (untied, {}),
        "full-tied": (tied, {}),
        "full-bf16": (tied, {"dtype": "bf16", "zero": 1}),
        "freeze": (untied, {"method": FREEZE}),
        "lora": (untied, {"method": LORA}),
        "lora-tied-bf16": (tied, {"method": LORA, "dtype": "bf16", "zero": 2}),
        "qlora": (untied, {"method": QLORA, "zero": 3}),
        "qlora-tied-bf16": (tied, {"method": QLORA, "dtype": "bf16", "zero": 3}),
        "dora": (untied, {"method": LORA.model_copy(update={"dora": True})}),
        "qlora-dora-bf16": (untied, {"method": QLORA.model_copy(update={"dora": True}), "dtype": "bf16", "zero": 3}),
        "pissa": (untied, {"method": LORA.model_copy(update={"init": "pissa"}), "zero": 3}),
        "kin-tied-bf16": (tied, {"method": KIN, "dtype": "bf16", "zero": 2}),
    }
    return {
        name: variant(base, name, optimizer=rates[changes.get("dtype", "fp32")], **life, **changes)
        for name, (base, changes) in cases.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    root = tmp_path_factory.mktemp("export")
    plans = plans_of(tiny_run(root / "untied"), tiny_run(root / "tied", tie_word_embeddings=True))
    run_group(1, train_all, list(plans.values()), timeout_s=300)
    made: dict[str, tuple[Plan, bool]] = {}
    for name, plan in plans.items():
        adapters = plan.trajectory.method.rank is not None
        tokenizer = AutoTokenizer.from_pretrained(Path(plan.data.folder) / "tokenizer")
        for merged in (False, True) if adapters else (False,):
            model: Any = trained_model(plan, checkpoint_at(Path(plan.run_dir), LAST))
            model = merged_model(plan, model) if merged else model
            made[f"{name}-merged" if merged else name] = plan, merged
            write_folder(plan, model, tokenizer, root / (f"{name}-merged" if merged else name), merged)
    request = {
        str(root / name): {
            "probe": str(probe_file(Path(plan.run_dir), LAST)),
            "dtype": "bfloat16" if plan.trajectory.dtype == "bf16" else "float32",
            "adapters": plan.trajectory.method.rank is not None and not merged,
            "quantized": plan.trajectory.method.kind == "qlora" and not merged,
        }
        for name, (plan, merged) in made.items()
    }
    said = json.loads(
        subprocess.run(
            [sys.executable, "-c", PLAIN],
            input=json.dumps({"folders": request, "messages": MESSAGES}),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=root,
        ).stdout.splitlines()[-1]
    )
    return {
        name: Folder(plan, root / name, merged, load_file(root / name / "logits.safetensors"), said[str(root / name)])
        for name, (plan, merged) in made.items()
    }


def test_e7_every_folder_gives_the_trained_models_logits(folders: dict[str, Folder]) -> None:
    assert len(folders) == 12 + 8
    for name, folder in folders.items():
        dtype, quantized = folder.plan.trajectory.dtype, folder.plan.trajectory.method.kind == "qlora"
        plain, exact = folder.error("plain"), folder.error("exact")
        print(f"{name}: {plain:.1e}, and {exact:.1e} without bitsandbytes' bf16 kernel")
        assert folder.said["dtype"] == ("bfloat16" if dtype == "bf16" else "float32")
        assert exact <= TOLERANCE[dtype], name
        # That kernel repacks a layer's bytes when it is called, and peft then measures DoRA's rows in what they are by
        # then: 13% off, by no fault of the folder.
        measured_after = quantized and folder.plan.trajectory.method.dora and not folder.merged
        if not measured_after:
            assert plain <= (BF16_KERNEL if quantized and not folder.merged else TOLERANCE[dtype]), name


def test_e7_training_moved_the_logits_much_further(folders: dict[str, Folder]) -> None:
    """Or an export of the base would pass."""
    for name, folder in folders.items():
        base = AutoModelForCausalLM.from_pretrained(folder.plan.trajectory.model.path).eval()
        ids, trained = probe(folder.plan)
        with torch.no_grad():
            before = base(input_ids=ids[None]).logits[0]
        moved = ((before - trained).abs().max() / trained.abs().max()).item()
        assert moved > 10 * TOLERANCE[folder.plan.trajectory.dtype], (name, moved)


def test_e7_tokenizer_template_and_ends_are_the_runs(folders: dict[str, Folder]) -> None:
    for folder in folders.values():
        tokenizer = AutoTokenizer.from_pretrained(Path(folder.plan.data.folder) / "tokenizer")
        assert folder.said["text"] == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert folder.said["ids"] == tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
        assert folder.said["prompt"] == tokenizer.apply_chat_template(
            MESSAGES[:1], tokenize=False, add_generation_prompt=True
        )
        assert folder.said["use_cache"]
        generation = json.loads((folder.path / "generation_config.json").read_text())
        assert generation["eos_token_id"] == tokenizer.eos_token_id
        assert generation["pad_token_id"] == tokenizer.pad_token_id


def test_e7_what_is_in_the_folders(folders: dict[str, Folder]) -> None:
    for name, folder in folders.items():
        files = {path.name for path in folder.path.iterdir()}
        adapters = folder.plan.trajectory.method.rank is not None and not folder.merged
        assert ("adapter_model.safetensors" in files) == adapters, name
        assert ("config.json" in files) == (not adapters), name
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))], name
        if not adapters:
            index = json.loads((folder.path / "model.safetensors.index.json").read_text())
            tied = json.loads((folder.path / "config.json").read_text())["tie_word_embeddings"]
            assert ("lm_head.weight" in index["weight_map"]) == (not tied), name
            assert len(set(index["weight_map"].values())) > 1, name
            assert not [key for key in index["weight_map"] if "lora" in key or "base_layer" in key], name


def test_e7_freeze_and_adapters_leave_the_rest_as_it_was(folders: dict[str, Folder]) -> None:
    base, frozen = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (folders["freeze"].plan.trajectory.model.path, folders["freeze"].path)
    )
    moved = {name for name in base if not torch.equal(base[name], frozen[name])}
    last = {name for name in base if name.startswith(("model.layers.1.", "model.norm.", "lm_head."))}
    assert moved == last


def test_e7_export_checks_itself_and_a_merged_qlora_states_its_drift(
    folders: dict[str, Folder], tmp_path: Path
) -> None:
    folder = folders["qlora-tied-bf16"]
    _, trained = probe(folder.plan)
    report = export(folder.plan, tmp_path / "model", merge=True)
    assert (report.step, report.merged) == (LAST, True)
    assert report.drift is not None
    assert report.agreement is not None
    # The two differ only in the adapted model's attention kernel: ours in training, transformers' own here.
    merged = (folders["qlora-tied-bf16-merged"].logits["plain"] - trained).abs().max().item()
    assert report.agreement.largest == pytest.approx(merged, rel=1e-3)
    assert 0 < report.drift <= TOLERANCE["bf16"] * report.agreement.scale
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Merging changed a logit by at most {report.drift:.2e}." in card
    assert f"differ from the trained model's by at most {report.agreement.largest:.2e}" in card


def test_e7_the_check_of_4_bit_adapters_is_as_sharp_as_of_any_other(folders: dict[str, Folder]) -> None:
    """bitsandbytes' bf16 kernel would fail a sound fp32 folder, or call for a tolerance that lets a wrong one pass."""
    folder = folders["qlora"]
    agreement = verify(folder.path, probe_file(Path(folder.plan.run_dir), LAST))
    assert agreement.within("fp32")
    assert agreement.same_token == 1.0
