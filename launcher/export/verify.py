"""Does an exported folder give the trained model's logits? Asked in a process of its own, of plain transformers and
peft.

`python -m launcher.export.verify FOLDER PROBE` prints the differences as JSON and imports nothing else of ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2}
"""Largest difference of a logit, as a share of the largest logit: rounding of another attention kernel, and nothing
more."""


@dataclass(frozen=True)
class Agreement:
    """A folder's logits beside the trained model's."""

    largest: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute logit of the trained model."""
    same_token: float
    """Share of positions with the same most likely token."""

    def within(self, dtype: str) -> bool:
        """Whether the folder is the trained model, up to rounding."""
        return self.largest <= TOLERANCE[dtype] * self.scale


def verify(folder: Path, probe: Path) -> Agreement:
    """Load `folder` in a fresh process and compare it with the probe, a file of `train.probe`.

    Raises:
        RuntimeError: plain transformers cannot load the folder.
    """
    result = subprocess.run(
        [sys.executable, "-m", "launcher.export.verify", str(folder), str(probe)], capture_output=True, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no output")
    return Agreement(**json.loads(result.stdout.splitlines()[-1]))


def main(folder: str, probe: str) -> None:
    """In the fresh process: load, compare, print."""
    import torch
    from safetensors.torch import load_file

    model: Any
    if (Path(folder) / "adapter_config.json").exists():
        model = adapted_model(Path(folder))
    else:
        model = auto_class(Path(folder)).from_pretrained(folder, dtype="auto")
    tensors = load_file(probe)
    with torch.no_grad():
        logits = model.eval()(input_ids=tensors["input_ids"][None]).logits[0].float()
    expected = tensors["logits"]
    json.dump(
        {
            "largest": (logits - expected).abs().max().item(),
            "scale": expected.abs().max().item(),
            "same_token": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        },
        sys.stdout,
    )


def classifies(folder: Path) -> bool:
    """Whether the model of a folder, whoever wrote it, is a sequence classification."""
    for name, key in (("adapter_config.json", "task_type"), ("config.json", "architectures")):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            return "SEQ_CLS" in str(found) or "ForSequenceClassification" in str(found)
    return False


def auto_class(folder: Path) -> Any:
    """The class of transformers that a model folder is for."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classifies(folder) else AutoModelForCausalLM


def adapted_model(folder: Path) -> Any:
    """Exported adapters over their base, by peft."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    kind = AutoPeftModelForSequenceClassification if classifies(folder) else AutoPeftModelForCausalLM
    model: Any = kind.from_pretrained(folder, **adapter_arguments(folder))
    # On CPUs with AVX512-BF16 bitsandbytes evaluates 4-bit layers in bf16, whatever dtype was asked for, and repacks
    # their bytes for it: a logit moves by 1e-3 of the largest, which is no fault of the folder, and would hide one that
    # is; by 1e-1 with DoRA, which dequantizes those bytes as if they were as before.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapter_arguments(folder: Path) -> dict[str, Any]:
    """How the base under exported adapters was loaded: its dtype, 4-bit for QLoRA, and the classes of the head that
    lies beside them. Kept in slipway.json; of adapters that are not ours nobody says."""
    import torch

    if not (folder / "slipway.json").exists():
        return {"dtype": "auto"}
    settings = json.loads((folder / "slipway.json").read_text(encoding="utf-8"))
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    arguments: dict[str, Any] = {"dtype": dtype}
    if settings["method"] == "qlora":
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=json.loads((folder / "adapter_config.json").read_text())["modules_to_save"],
        )
    if classes := settings.get("classes"):
        arguments |= {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
        arguments |= {"label2id": {name: number for number, name in enumerate(classes)}}
        arguments |= {"pad_token_id": settings["pad_token_id"], "ignore_mismatched_sizes": True}
    return arguments


if __name__ == "__main__":
    main(*sys.argv[1:])
