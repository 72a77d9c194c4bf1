"""One contender of `against_trl`, in a process of its own: takes an optimizer step each time it is told to.

`python -m launcher.bench.contenders KIND PLAN DTYPE` prints a JSON line when it is ready and one after each step; a
line on its standard input asks for the next, the end of the input ends it. Everything else it prints goes to stderr.
KIND is `slipway`, `trl-isolated` (best-fit packing, each document attends to itself) or `trl-leaking` (documents cut
and laid end to end, each row attends to all that is in it). DTYPE is TRL's: `fp32`; `bf16`, its own way, fp32 weights
under autocast; or `bf16-weights`, everything in bf16 and no fp32 masters.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from launcher.plan.plan import Plan


def peak_resident_bytes() -> int:
    """The most memory this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Starter:
    """The parent's side of the clock: when to take a step, and where to say how long it took."""

    def __init__(self) -> None:
        self.orders: TextIO = sys.stdin
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print must not be taken for an answer

    def ordered(self, **said: Any) -> bool:
        """Answer, then wait: True where another step is asked for."""
        self.answers.write(json.dumps(said | {"memory_bytes": peak_resident_bytes()}) + "\n")
        return bool(self.orders.readline())


def slipway(plan: Plan, starter: Starter) -> None:
    """Our own step, exactly as `slipway bench` takes it."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from launcher.bench.throughput import bench_parts, timed_steps

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parts = bench_parts(plan)
    said: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in parts.engine.module.parameters()),
        "optimizer": type(parts.engine.optimizer).__name__,
    }
    steps = timed_steps(parts)
    while starter.ordered(**said):
        step = next(steps)
        said = {
            "seconds": step.seconds["total"],
            "cpu_s": step.cpu_s,
            "tokens": step.tokens,
            "supervised_tokens": step.supervised_tokens,
            "loss": step.loss,
            "parts_s": step.seconds,
        }
    dist.destroy_process_group()


def trl(plan: Plan, starter: Starter, leaking: bool, dtype: str) -> None:
    """TRL's SFTTrainer on the same documents with the same supervised tokens, packed its way."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    trajectory, layout = plan.trajectory, plan.layout
    torch.set_num_threads(layout.cpus_per_worker)
    weights = torch.bfloat16 if dtype == "bf16-weights" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(trajectory.model.path, dtype=weights)
    settings = SFTConfig(
        output_dir=str(Path(plan.run_dir) / "trl"),
        use_cpu=True,
        bf16=dtype == "bf16",
        packing=True,
        packing_strategy="wrapped" if leaking else "bfd",
        max_length=trajectory.data.max_length,
        per_device_train_batch_size=trajectory.global_batch_size,
        gradient_checkpointing=layout.gradient_checkpointing,
        max_steps=plan.lifecycle.total_steps,
        learning_rate=trajectory.optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=trajectory.optimizer.weight_decay,
        adam_beta1=trajectory.optimizer.betas[0],
        adam_beta2=trajectory.optimizer.betas[1],
        max_grad_norm=trajectory.optimizer.max_grad_norm,
        optim="adamw_torch_fused",
        seed=trajectory.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    sizes: deque[dict[str, int]] = deque()

    class Clock(TrainerCallback):
        """Waits outside the step, times inside: forward, backward, clipping and the optimizer, not the data."""

        said: dict[str, Any]

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not starter.ordered(**self.said):
                sys.exit(0)
            self.cpu_s, self.began = time.process_time(), time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds, cpu_s = time.perf_counter() - self.began, time.process_time() - self.cpu_s
            self.said = {"seconds": seconds, "cpu_s": cpu_s} | sizes.popleft()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            self.said["loss"] = logs.get("loss")

    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_generator(labelled_documents, gen_kwargs={"plan": plan}),
        processing_class=AutoTokenizer.from_pretrained(trajectory.model.path),
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def counted(examples: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(examples)
        supervised = int((batch["labels"][..., 1:] != -100).sum())
        sizes.append({"tokens": batch["input_ids"].numel(), "supervised_tokens": supervised})
        return batch

    trainer.data_collator = counted
    clock.said = {"parameters": model.num_parameters(), "attention": model.config._attn_implementation}
    trainer.train()


def labelled_documents(plan: Plan) -> Iterator[dict[str, Any]]:
    """Our prepared documents as TRL takes tokenized rows: labels are -100 where nothing is learned."""
    from launcher.data.store import Documents, Set

    documents = Documents(plan.data.folder)
    for index in (documents.sets == Set.TRAIN).nonzero()[0].tolist():
        ids, supervised = documents.input_ids(index), documents.supervised(index)
        labels = [int(token) if taught else -100 for token, taught in zip(ids, supervised, strict=True)]
        yield {"input_ids": ids.tolist(), "labels": labels}


def main(kind: str, plan_file: str, dtype: str) -> None:
    plan, starter = Plan.load(Path(plan_file)), Starter()
    if kind == "slipway":
        slipway(plan, starter)
    else:
        trl(plan, starter, leaking=kind == "trl-leaking", dtype=dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
