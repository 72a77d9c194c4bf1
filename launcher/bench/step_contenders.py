"""One contender of `step`, in a process of its own: builds the model, takes the steps, prints one JSON line.

`python -m launcher.bench.step_contenders KIND SETTING` with a Setting as JSON. KIND is `slipway`; `transformers`, plain
with peft; `liger`, the same under Liger's patch; `trl` and `trl-liger`, TRL's SFTTrainer without and with it. Where a
package is missing the line says which. Everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from launcher.bench.step_setting import RATE, Setting, documents, labels, micro_batch, plan_of
from launcher.train.throughput import memory_bytes

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "deepspeed", "trl", "liger-kernel", "flash-attn")
Step = Callable[[list[list[int]]], float]
"""Takes an optimizer step on a row of documents; returns its loss."""


class Timed:
    """Steps with their seconds; waits for the device before and after each."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, torch.device(setting.device)
        self.steps: list[dict[str, float]] = []

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def begin(self) -> None:
        self.wait()
        if len(self.steps) == self.setting.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # from here on it is a step's, not the model's making
        self.began = time.perf_counter()

    def end(self, tokens: int, supervised: int, loss: float | None = None) -> None:
        self.wait()
        seconds = time.perf_counter() - self.began
        self.steps.append({"seconds": seconds, "tokens": tokens, "supervised_tokens": supervised} | (
            {"loss": loss} if loss is not None else {}
        ))  # fmt: skip


def empty_model(setting: Setting, attention: str | None) -> Any:
    """A model of random weights, made on the device in the training dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**setting.config), dtype=torch.bfloat16, **options
        )
    model.config.use_cache = False
    if setting.method == "qlora":
        quantize(model)
    return model


def quantize(model: Any) -> None:
    """Linear layers but the head to 4 bits, one after another, as transformers would have loaded them for QLoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    linear = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    for name, layer in linear:
        if layer is head:
            continue
        made = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.bfloat16,
            device="meta",
        )
        device, weight = layer.weight.device, layer.weight.data
        made.weight = Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.bfloat16,
            module=made,
        ).to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # peft asks for it


def slipway(setting: Setting, timed: Timed) -> dict[str, Any]:
    """Our own: what `train.run` puts together, around a model that was made here."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    from launcher.bench.step_ours import our_step

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    if setting.device == "cuda":
        torch.cuda.set_device(0)
    store = TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    dist.init_process_group("nccl" if setting.device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    with TemporaryDirectory() as folder:
        plan = plan_of(setting, Path(folder))
        step, facts = our_step(plan, timed.device, lambda attention: empty_model(setting, attention))
        for number in range(setting.warmup + setting.steps):
            batch = micro_batch(documents(setting, number))
            timed.begin()
            loss = step(number, batch)
            timed.end(batch.num_tokens, len(batch.targets), loss)
    dist.destroy_process_group()
    return facts


def their_attention(setting: Setting) -> str:
    """What a user of transformers would choose, of what is there."""
    return "flash_attention_2" if setting.device == "cuda" and find_spec("flash_attn") else "sdpa"


def adapted(setting: Setting, model: Any) -> Any:
    """peft's wrapper around the model, or the model."""
    if setting.method == "full":
        return model
    from peft import get_peft_model

    model.requires_grad_(False)
    return get_peft_model(model, adapter_config(setting), autocast_adapter_dtype=False)


def adapter_config(setting: Setting) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def patch_with_liger() -> None:
    """Before the model is made: it replaces transformers' classes."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()


def transformers(setting: Setting, timed: Timed, liger: bool) -> dict[str, Any]:
    """Plain transformers: packed rows by their positions, bf16 weights, torch's fused AdamW, clipping at 1."""
    if liger:
        patch_with_liger()
    attention = their_attention(setting)
    model = adapted(setting, empty_model(setting, attention))
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    for number in range(setting.warmup + setting.steps):
        row = documents(setting, number)
        ids = torch.tensor([[token for document in row for token in document]])
        positions = torch.tensor([[place for document in row for place in range(len(document))]])
        targets = torch.tensor([[label for document in row for label in labels(document)]])
        timed.begin()
        given = {"input_ids": ids, "position_ids": positions, "labels": targets}
        loss = model(**{name: x.to(timed.device) for name, x in given.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        timed.end(ids.numel(), int((targets != -100).sum()), loss.item())
    return {"attention": attention, "optimizer": "AdamW on bf16 weights, no masters"}


def trl(setting: Setting, timed: Timed, liger: bool) -> dict[str, Any]:
    """TRL's SFTTrainer on the same documents, packed its way (best fit, isolated)."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if liger:
        import liger_kernel  # noqa: F401
    words = {"<pad>": 0, "<end>": 1, "<unknown>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unknown>")), pad_token="<pad>", eos_token="<end>"
    )
    total = setting.warmup + setting.steps
    rows = [
        {"input_ids": document, "labels": labels(document)}
        for number in range(2 * total)
        for document in documents(setting, number)
    ]
    attention = their_attention(setting)
    sizes: deque[tuple[int, int]] = deque()

    class Clock(TrainerCallback):
        """Times forward, backward, clipping and the optimizer."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            timed.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            timed.end(*sizes.popleft())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                timed.steps[-1]["loss"] = float(logs["loss"])

    with TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            use_cpu=setting.device == "cpu",
            bf16=False,  # the weights are: autocast would only cast them
            packing=True,
            packing_strategy="bfd",
            max_length=setting.tokens,
            per_device_train_batch_size=1,
            gradient_checkpointing=setting.checkpointing,
            max_steps=total,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            use_liger_kernel=liger,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=adapted(setting, empty_model(setting, attention)),
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counted(examples: list[Any]) -> dict[str, Any]:
            batch: dict[str, Any] = collate(examples)
            sizes.append((batch["input_ids"].numel(), int((batch["labels"][..., 1:] != -100).sum())))
            return batch

        trainer.data_collator = counted
        trainer.train()
    return {"attention": attention, "optimizer": "AdamW on bf16 weights, no masters"}


def matmul_rate(device: torch.device) -> float | None:
    """FLOP/s of a large bf16 product on random numbers, on this very device; None on a CPU."""
    if device.type != "cuda":
        return None
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        a @ b
    start.record()
    for _ in range(20):
        a @ b
    stop.record()
    stop.synchronize()
    return 20 * 2 * size**3 / (start.elapsed_time(stop) / 1000)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


CONTENDERS: dict[str, Callable[[Setting, Timed], dict[str, Any]]] = {
    "slipway": slipway,
    "transformers": lambda setting, timed: transformers(setting, timed, liger=False),
    "liger": lambda setting, timed: transformers(setting, timed, liger=True),
    "trl": lambda setting, timed: trl(setting, timed, liger=False),
    "trl-liger": lambda setting, timed: trl(setting, timed, liger=True),
}


def main(kind: str, setting_json: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for the answer
    setting = Setting(**json.loads(setting_json))
    timed = Timed(setting)
    said: dict[str, Any] = {"kind": kind, "versions": versions(), "matmul_flops_per_s": matmul_rate(timed.device)}
    try:
        facts = CONTENDERS[kind](setting, timed)
    except ImportError as error:
        said["missing"] = str(error)
    else:
        warmup, steps = timed.steps[: setting.warmup], timed.steps[setting.warmup :]
        said |= {"facts": facts, "warmup": warmup, "steps": steps, "memory_bytes": memory_bytes(timed.device)}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(timed.device)
        said["device"] = {"name": properties.name, "memory_bytes": properties.total_memory}
    answers.write(json.dumps(said) + "\n")
    answers.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
