"""A Llama with our kernels on a GPU: loss and every gradient by E9, over packed documents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from launcher.bench.step_setting import Setting, documents, micro_batch
from launcher.model import attention
from launcher.model.fuse import fuse
from launcher.train.loss import SupervisedLoss
from launcher_kernels import dispatch
from tests.fused import assert_e9

pytestmark = pytest.mark.gpu
CONFIG: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32003,
    "tie_word_embeddings": False,
    "use_cache": False,
}


def llama(device: torch.device, kind: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, attn_implementation=attention.NAMES[kind])
    return LlamaForCausalLM(config).to(device, torch.bfloat16)


def loss_and_gradients(model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    setting = Setting("8b", "full", tokens=1500, warmup=0, steps=1, rank=0, checkpointing=False, device="cuda")
    row = [[token % CONFIG["vocab_size"] for token in document] for document in documents(setting, 0)]
    loss, _ = SupervisedLoss(model, model, True, device)(micro_batch(row))
    model.zero_grad()
    (loss / 500).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("kind", ["varlen", "triton"])
def test_llama(kind: str, device: torch.device) -> None:
    """Truth and yardstick attend with torch's SDPA document by document, which float64 has too."""
    model = llama(device, "sdpa")
    eager = loss_and_gradients(model, device)
    exact = loss_and_gradients(copy.deepcopy(model).double(), device)
    fused = llama(device, kind)
    fusion = fuse(fused)
    before = dispatch.launches.total()
    found = loss_and_gradients(fused, device)
    assert dispatch.launches.total() > before
    assert not fusion.left, str(fusion)
    for name, value in found.items():
        assert_e9(value, eager[name], exact[name].double(), name)
    fusion.undo()
    again = loss_and_gradients(fused, device)
    assert again.keys() == found.keys()
