"""E9 of whole models: our kernels, put in by `fuse`, beside eager PyTorch, in 22 families of transformers."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from launcher.data.loader import MicroBatch
from launcher.model.adapters import enable_gradient_checkpointing
from launcher.model.fuse import Fusion, fuse
from launcher.model.fused_head import takes_targets
from launcher_kernels import dispatch
from launcher_kernels.reference import ulp
from tests import interpreter
from tests.model_families import FAMILIES, VOCABULARY, loss_of, pack, tiny_model

LLAMA = {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "glu": 2}
GEMMA = {"rms_norm": 7, "add_rms_norm": 2, "glu": 2}
HEAD = {"linear_cross_entropy": 1}
COUNTS: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {"rms_norm": 3, "add_rms_norm": 2, "qk_norm_rope": 2, "glu": 2},
    "mistral": LLAMA,
    "mixtral": {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "glu_packed": 2},
    "gemma2": GEMMA | {"rope": 2},
    "gemma3_text": GEMMA | {"qk_norm_rope": 2},
    "phi3": {"rms_norm": 3, "add_rms_norm": 2, "rope": 2, "glu_packed": 2},
    "gpt2": {"layer_norm": 3, "add_layer_norm": 2},
    "gpt_neox": {"layer_norm": 5, "rope": 2},
    "gptj": {"layer_norm": 3},
    "opt": {"layer_norm": 5},
    "falcon": {"layer_norm": 3, "rope": 2},
    "bloom": {"layer_norm": 6},
    "olmo2": {"rms_norm": 9, "rope": 2, "glu": 2},
    "granite": LLAMA,
    "starcoder2": {"layer_norm": 3, "add_layer_norm": 2, "rope": 2},
    "smollm3": LLAMA | {"rope": 1},
    "glm4": {"rms_norm": 7, "add_rms_norm": 2, "rope": 2, "glu_packed": 2},
    "gpt_oss": {"rms_norm": 3, "add_rms_norm": 2, "rope": 2},
    "deepseek_v3": {"rms_norm": 7, "add_rms_norm": 2, "rope": 2, "glu": 2, "glu_packed": 1},
    "cohere2": {"layer_norm": 3, "rope": 1, "glu": 2},
}
"""How many modules of each two-layer model use which op; all of them the head's."""
LEFT: dict[str, set[str]] = {
    "gpt2": {"rope", "GPT2MLP"},
    "gpt_neox": {"GPTNeoXMLP", "GPTNeoXLayer"},
    "gptj": {"rope", "GPTJMLP", "GPTJBlock"},
    "opt": {"rope", "OPTDecoderLayer"},
    "falcon": {"FalconMLP", "FalconDecoderLayer"},
    "bloom": {"rope", "BloomMLP", "BloomBlock"},
    "olmo2": {"Olmo2DecoderLayer"},
    "starcoder2": {"Starcoder2MLP"},
    "smollm3": {"rope of some SmolLM3Attention"},
    "gpt_oss": {"GptOssExperts"},
    "cohere2": {"rope of some Cohere2Attention", "Cohere2DecoderLayer"},
}
IN_CI = {"llama", "qwen3", "gemma2", "phi3", "gpt2", "glm4", "deepseek_v3", "cohere2", "granite"}
"""One for each thing there is to recognize; the others are `long`."""


class Wide(TorchFunctionMode):
    """Everything in float64, also what models compute in fp32 whatever their dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    interpreter.mend()


Result = tuple[Tensor, Tensor, dict[str, Tensor]]


def step(model: Any, batch: MicroBatch) -> Result:
    """Loss, correct tokens and the gradient of each parameter that is trained."""
    model.zero_grad()
    loss, correct = loss_of(model)(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.detach(), correct, {name: gradient.clone() for name, gradient in gradients.items()}


def exact_step(model: Any, batch: MicroBatch) -> Result:
    """In float64 by the models' own code."""
    wide = copy.deepcopy(model).double()
    causal_lm = getattr(wide, "get_base_model", lambda: wide)()
    if getattr(causal_lm.config, "_experts_implementation", None):
        causal_lm.config._experts_implementation = "eager"  # grouped products know no float64
    with Wide():
        return step(wide, batch)


def assert_step(fused: Result, eager: list[Result], exact: list[Result], what: str) -> None:
    """E9 of whole tensors: of root mean squares, since a single number of a model's gradient may come close by chance.

    `fused` is of the first batch; the others, of the same form, say as well how far from the truth eager gets.
    """
    assert fused[1] == exact[0][1]
    assert fused[2].keys() == exact[0][2].keys()
    found, *rest = ({"the loss": loss} | gradients for loss, _, gradients in (fused, *eager, *exact))
    by_eager, truths = rest[: len(eager)], rest[len(eager) :]
    for name, truth in truths[0].items():
        assert found[name].dtype == by_eager[0][name].dtype, name
        error = off(found[name], truth)
        eager_error = max(off(a[name], b[name]) for a, b in zip(by_eager, truths, strict=True))
        allowed = 2 * eager_error + ulp(truth.abs().max().item(), found[name].dtype)
        assert error <= allowed, f"{what}, {name}: error {error:.3e}, allowed {allowed:.3e} (eager {eager_error:.3e})"


def off(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference."""
    return (found - truth).square().mean().sqrt().item()


def forwards(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if {"forward", "_apply_gate"} & vars(module).keys()]


def check(model: Any, what: str, batch: MicroBatch | None = None) -> tuple[Fusion, Counter[str]]:
    """E9 of `model` fused; afterwards it is fused still. Also the kernels' launches."""
    batches = [pack() if batch is None else batch, *(pack(seed=seed) for seed in (2, 3, 4))]
    eager, exact = [step(model, b) for b in batches], [exact_step(model, b) for b in batches]
    fusion, added = fuse(model), Counter[str]()
    hooks = [
        module.register_forward_pre_hook(lambda *given: added.update(list(given[2])), with_kwargs=True)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
    ]
    with dispatch.interpreted() as launched:
        fused = step(model, batches[0])
    for hook in hooks:
        hook.remove()
    # What was counted is what was run, and not the models' own forwards behind ours.
    counts = Counter(fusion.counts)
    assert added["residual"] == counts["add_rms_norm"] + counts["add_layer_norm"]
    assert launched["rope_turn"] >= counts["rope"] + counts["qk_norm_rope"]
    assert launched["glu_forward"] == counts["glu"] + counts["glu_packed"]
    norms = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
    assert launched["norm_forward"] == sum(counts[op] for op in norms)
    assert launched["cross_entropy"] == counts["linear_cross_entropy"]
    assert_step(fused, eager, exact, what)
    return fusion, launched


def family_cases() -> list[Any]:
    return [pytest.param(name, marks=() if name in IN_CI else pytest.mark.long) for name in FAMILIES]


def test_the_page_says_what_is_fused_where() -> None:
    page = (Path(__file__).parents[2] / "kernels/README.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- families -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    said = {}
    for row in rows:
        families, fused, _ = (cell.strip() for cell in row.strip("|").split("|"))
        counts = dict(each.split() for each in fused.split(", "))
        said |= {family: {op: int(count) for op, count in counts.items()} for family in families.split(", ")}
    assert said == COUNTS


def test_there_is_an_expectation_for_every_family() -> None:
    assert COUNTS.keys() == FAMILIES.keys()
    assert len(FAMILIES) >= 22


@pytest.mark.parametrize("family", family_cases())
def test_loss_and_gradients_in_fp32(family: str) -> None:
    model = tiny_model(family).train()
    names, batch = [name for name, _ in model.named_parameters()], pack()
    before = step(model, batch)
    fusion, launched = check(model, family, batch)
    assert fusion.counts == COUNTS[family] | HEAD
    assert fusion.left.keys() == LEFT.get(family, set())
    assert sum(launched.values()) > 5
    assert [name for name, _ in model.named_parameters()] == names
    fusion.undo()
    assert not forwards(model)
    assert not takes_targets(model)
    after = step(model, batch)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[2][name], before[2][name]) for name in before[2])


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=() if f == "gemma2" else pytest.mark.long)
        for f in ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2", "granite", "glm4", "cohere2")
    ],
)
def test_loss_and_gradients_in_bf16(family: str) -> None:
    check(tiny_model(family, torch.bfloat16).train(), family)


class Unknown(nn.Module):
    """Looks like nothing that there is a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.outer(torch.relu(self.inner(x)))
        return x + self.scale * hidden


def test_a_model_like_no_other_is_left_alone() -> None:
    model = Unknown()
    fusion = fuse(model)
    assert fusion.counts == {}
    assert not forwards(model)
    assert str(fusion).startswith("no kernel was fused (left: ")
    assert fusion.left["Unknown"] == "it has parameters of its own"
    assert fusion.left["head"] == "it has no head of its own"


class Turned(LlamaForCausalLM):
    """Its logits are turned by something that few numbers do not show."""

    change = "padding"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        match self.change:
            case "padding":
                output.logits = output.logits[..., : VOCABULARY - 3]
            case "token":
                output.logits = output.logits.index_fill(-1, torch.tensor(VOCABULARY - 1), -1e4)
            case "training":
                output.logits = output.logits * (2.0 if self.training else 1.0)
        return output


class Called(LlamaForCausalLM):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class Repeating(LlamaDecoderLayer):
    """It has an option that training leaves as it is, and whose default is no None."""

    def forward(self, hidden_states: Tensor, repeat: bool = False, scale: float = 1.0, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden = hidden_states + attended
        made = self.mlp(self.post_attention_layernorm(hidden))
        if repeat:
            made = self.mlp(made)
        return hidden + made


@pytest.mark.parametrize("change", ["padding", "token", "training"])
def test_a_head_whose_logits_are_changed_is_left_alone(change: str) -> None:
    model = tiny_model("llama")
    model.__class__, model.change = Turned, change
    assert_left("head", model)


def test_a_model_with_a_call_of_its_own_keeps_its_head() -> None:
    model = tiny_model("llama")
    model.__class__ = Called
    assert_left("head", model)


def test_an_option_of_a_layer_keeps_its_default() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.__class__ = Repeating
    assert_left(None, model)


def assert_left(what: str | None, model: Any) -> None:
    """Only that is left, and what is computed stays what it was in training."""
    before = loss_of(model.train())(pack())[0].detach()
    fusion = fuse(model)
    assert set(fusion.left) == ({what} if what else set())
    assert torch.allclose(loss_of(model)(pack())[0].detach(), before, rtol=1e-5)


def test_what_is_said_in_one_line() -> None:
    said = str(fuse(tiny_model("gpt2")))
    assert said == (
        "kernels fused: add_layer_norm 2, layer_norm 3, linear_cross_entropy 1 (left: rope: nothing turns queries and "
        "keys; GPT2MLP: it has no gate, or one that is computed in another way)"
    )


def test_a_second_fuse_replaces_nothing() -> None:
    model = tiny_model("llama")
    fuse(model)
    assert fuse(model).counts == {}


def test_a_copy_of_a_fused_model_has_its_own_weights() -> None:
    """qwen3's rotation reads the weights of two norms beside it."""
    model = tiny_model("qwen3")
    fuse(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = pack()
    expected, found = step(tiny_model("qwen3"), batch), step(other, batch)
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    assert all(torch.allclose(found[2][name], expected[2][name], atol=1e-4) for name in expected[2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "cohere2", "bloom"])
def test_without_targets_a_fused_model_gives_logits_and_words(family: str) -> None:
    model, ids = tiny_model(family).eval(), torch.tensor([[5, 9, 17, 4], [8, 15, 16, 23]])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": VOCABULARY + 1}
    with torch.no_grad():
        logits, words = model(input_ids=ids).logits, model.generate(ids, attention_mask=ids > 0, **settings)
        fuse(model)
        assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-5)
        assert torch.equal(model.generate(ids, attention_mask=ids > 0, **settings), words)


def test_the_head_takes_weights_and_says_what_it_does_not_take() -> None:
    model, batch = tiny_model("llama"), pack(seed=3)
    assert batch.weights is not None
    before = step(model, batch)
    fuse(model)
    after = step(model, batch)
    assert torch.allclose(after[0], before[0], rtol=1e-6)
    assert after[1] == before[1]
    with pytest.raises(TypeError, match="takes input_ids, attention_mask, position_ids by name, and not"):
        model(input_ids=batch.input_ids, targets=batch.targets, supervised_index=batch.targets, use_cache=True)


def test_tied_embeddings() -> None:
    model = tiny_model("llama", tie_word_embeddings=True).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fusion, _ = check(model, "tied")
    assert fusion.counts["linear_cross_entropy"] == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_in_layers(dropout: float) -> None:
    """phi3's are modules, which are called; starcoder2's are in the attention and the MLP."""
    for family, name in (("phi3", "resid_pdrop"), ("starcoder2", "residual_dropout")):
        model, batch = tiny_model(family, **{name: dropout}).train(), pack()
        torch.manual_seed(1)
        before = step(model, batch)
        assert fuse(model).counts == COUNTS[family] | HEAD
        torch.manual_seed(1)
        after = step(model, batch)
        assert torch.allclose(after[0], before[0], rtol=1e-5), family


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradient_checkpointing(family: str) -> None:
    model, batch = tiny_model(family).train(), pack()
    before = step(model, batch)
    for first in (enable_gradient_checkpointing, fuse):
        first(model)
    called: Counter[str] = Counter()
    # Not behind its forward: the second computation ends with the last tensor that is needed.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: called.update(["mlp"]))
    after = step(model, batch)
    assert called["mlp"] == 2, "the layer was computed once more in the backward pass"
    assert torch.allclose(after[0], before[0], rtol=1e-6)
    assert all(torch.allclose(after[2][name], before[2][name], atol=1e-4) for name in before[2])


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4"])
def test_compiled(family: str) -> None:
    model = tiny_model(family).eval()
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[5, 9, 17, 4]])
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)


def lora(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted.train()


def test_adapters() -> None:
    fusion, _ = check(lora(tiny_model("qwen3")), "lora")
    assert fusion.counts == COUNTS["qwen3"] | HEAD | {"lora_linear": 14}


def test_a_head_that_is_trained_beside_adapters() -> None:
    model = lora(tiny_model("llama"), modules_to_save=["lm_head"], target_modules=["q_proj", "gate_proj"])
    fusion, launched = check(model, "modules_to_save")
    assert fusion.counts["linear_cross_entropy"] == 1
    assert launched["cross_entropy"] == 1
    fusion.undo()
    assert not forwards(model)


def test_an_adapter_on_the_head_leaves_it_as_it_is() -> None:
    model, batch = lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"]), pack()
    before = step(model, batch)
    fusion = fuse(model)
    assert fusion.left["head"] == "an adapter is on it"
    assert "linear_cross_entropy" not in fusion.counts
    assert torch.allclose(step(model, batch)[0], before[0], rtol=1e-6)


def test_single_rows_of_the_head_leave_it_as_it_is() -> None:
    from launcher.model.adapters import apply_method
    from tests.plans import method_plan

    method = method_plan("lora", rank=4, alpha=8.0)
    for tied in (False, True):
        model, batch = apply_method(tiny_model("llama", tie_word_embeddings=tied), method, 0, [59, 60]), pack()
        before = step(model, batch)
        fusion = fuse(model)
        assert fusion.left["head"] == "single rows of it are trained"
        after = step(model, batch)
        assert torch.allclose(after[0], before[0], rtol=1e-6)
        assert all(torch.allclose(after[2][name], before[2][name], atol=1e-4) for name in before[2])


def test_quantized_layers() -> None:
    """Neither recognized by their weights nor kept from being: 4 bits in the projections, an adapter on each."""
    import bitsandbytes

    model = tiny_model("llama", hidden_size=64, intermediate_size=192)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, packed.to("cpu"))
    assert fuse(model).counts == LLAMA | HEAD
