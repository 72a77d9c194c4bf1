"""The only writer of DeepSpeed's JSON."""

from __future__ import annotations

from typing import Any

from launcher.plan.batch import BatchLayout
from launcher.plan.plan import Dtype, LayoutPlan


def deepspeed_config(layout: LayoutPlan, batch: BatchLayout, dtype: Dtype, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration for one layout.

    The optimizer and the learning rate are ours and not named here: the optimizer is handed over as an object, the
    rate is written into its groups before each step.
    """
    # At stage 0 in fp32 the engine clips without telling the norm: `train.engine.clip` does it there.
    clipping = 0.0 if layout.zero == 0 and dtype == "fp32" else max_grad_norm
    zero: dict[str, Any] = {
        "stage": layout.zero,
        # The overlapping reducer runs on side streams, which only CUDA has.
        "overlap_comm": layout.device == "cuda" and layout.zero > 0,
        "contiguous_gradients": True,
    }
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": layout.device == "cuda"}
        if layout.zero == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": layout.device == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.num_micro_steps,
        "train_batch_size": batch.world_size * batch.num_micro_steps * batch.micro_batch_size,
        "gradient_clipping": clipping,
        "zero_optimization": zero,
        # torch's AdamW is good enough where DeepSpeedCPUAdam cannot be compiled (no C++ compiler on the machine).
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
        if layout.zero > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
