"""The tokenizer of a run: loaded, or trained on the recipe's own text, always with a chat template in effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.conversation import Conversation
from launcher.data.masks.encoder import adds_bos, without_end_markers
from launcher.errors import ModelError
from launcher.plan.plan import ModelPlan

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
OF_ENCODERS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}

DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
{%- if message['role'] == 'user' -%}{{ '### Instruction:\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ '### Response:\\n' }}
{%- elif message['role'] not in ('system', 'developer') -%}{{ '### ' + message['role'] | capitalize + ':\\n' }}
{%- endif -%}
{{ message['content'] }}
{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages -%}{{ '\\n\\n' }}{%- endif -%}{{ '### Response:\\n' }}
{%- endif -%}
"""
"""For tokenizers without a template of their own. It adds no token: under LoRA the embedding of an added one would stay
random for ever. A turn ends with the end-of-text token that the base model already knows."""

MIN_VOCAB_SIZE = 256 + 2
"""Every byte, the end of text and the padding."""


def load_tokenizer(model: ModelPlan) -> PreTrainedTokenizerFast:
    """The tokenizer that `model` names, from a folder or the hub (HF_HUB_OFFLINE is honoured), its template set.

    Raises ModelError where it cannot be loaded, is not a fast one, or has no end-of-text token.
    """
    return with_template(own_tokenizer(model), model.chat_template, model.template_kwargs, model.add_tokens)


def own_tokenizer(model: ModelPlan) -> PreTrainedTokenizerFast:
    """The tokenizer that `model` names, as it is. Raises ModelError where it cannot be loaded or is not a fast one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name, revision = tokenizer_name(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=model.trust_remote_code, use_fast=True
        )
    except Exception as error:  # the hub, the file system, the parser and remote code each raise their own
        raise ModelError(f"{name}: the tokenizer cannot be loaded: {_first_line(error)}", hint=_hint(name)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{name}: its tokenizer {type(tokenizer).__name__} is written in Python, without a tokenizer.json",
            hint="convert it once with transformers and save_pretrained, and give that folder as model.tokenizer",
        )
    return tokenizer


def tokenizer_name(model: ModelPlan) -> tuple[str, str | None]:
    """Folder or hub id, and the revision of a hub id, that the tokenizer comes from; not for a trained one."""
    assert not is_trained(model), "a scratch model without a tokenizer trains its own"
    if model.tokenizer is not None and model.tokenizer != model.path:
        return model.tokenizer, None
    return model.path, model.revision


def is_trained(model: ModelPlan) -> bool:
    """True where the tokenizer is trained on the recipe's text."""
    return model.source == "scratch" and model.tokenizer is None


def trained_vocab_size(model: ModelPlan) -> int:
    """Size of the vocabulary to train for a scratch model. Raises ModelError where it is missing or too small."""
    size = (model.scratch or {}).get("vocab_size")
    if not isinstance(size, int) or size < MIN_VOCAB_SIZE:
        raise ModelError(
            f"model.scratch.vocab_size is {size!r}, and a byte-level vocabulary has at least {MIN_VOCAB_SIZE} entries",
            hint="set model.scratch.vocab_size, for instance 4096, or give model.tokenizer",
        )
    return size


def train_tokenizer(texts: Iterable[str], vocab_size: int, encoder: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Radford et al., 2019) of at most `vocab_size` entries, the same for the same texts.

    Every byte is in it, so that any text can be written; `<|endoftext|>` ends and `<|pad|>` fills. For an `encoder` it
    has BERT's control tokens instead, and puts `[CLS]` and `[SEP]` around every text. Short texts give a smaller
    vocabulary. It has no chat template yet: see `with_template`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = OF_ENCODERS if encoder else {"eos_token": EOS, "pad_token": PAD}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if encoder:
        ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def is_encoder(model_type: str) -> bool:
    """Whether models of this type read a text in both directions, as BERT does: those that fill masked words in."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def training_text(conversation: Conversation) -> str:
    """What a vocabulary is trained on: the words, and the default template's headers, without the control tokens."""
    words, _ = without_end_markers(conversation, EOS)
    if words.text is not None:
        return words.text
    messages = [{"role": message.role, "content": message.content} for message in words.messages]
    return _compiled_default().render(messages=messages, eos_token="")


def with_template(
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str | None,
    variables: Mapping[str, Any] | None = None,
    add_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """`tokenizer` with `chat_template` in effect; None keeps its own, or sets the default where it has none.

    `variables` become defaults of the template, so that whoever is given the tokenizer later writes as in training.
    Those of `add_tokens` that it does not have become control tokens of it, in their order, with the next ids.
    Raises ModelError where there is no end-of-text token: a model could not learn to stop.
    """
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no eos_token, so no answer would ever end",
            hint="name one of its tokens as eos_token in tokenizer_config.json",
        )
    known = tokenizer.added_tokens_encoder
    tokenizer.add_tokens([text for text in dict.fromkeys(add_tokens) if text not in known], special_tokens=True)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif tokenizer.chat_template is None:
        # A base model that was pretrained with a first token (Llama, Gemma) needs it in every document.
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos(tokenizer) + DEFAULT_CHAT_TEMPLATE
    if variables:
        own = tokenizer.chat_template
        named = {item["name"]: item["template"] for item in own} if isinstance(own, list) else own
        if isinstance(named, dict):
            tokenizer.chat_template = {name: with_defaults(text, variables) for name, text in named.items()}
        else:
            tokenizer.chat_template = with_defaults(named, variables)
    return tokenizer


def with_defaults(template: str, variables: Mapping[str, Any]) -> str:
    """`template` with a value for each of `variables` where nobody gives another."""
    lines = (
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    # What follows a block loses its line break; a template may begin with one.
    return "".join(lines) + "{{ '' }}" + template


@cache
def _compiled_default() -> jinja2.Template:
    import jinja2

    return jinja2.Environment().from_string(DEFAULT_CHAT_TEMPLATE)


def _hint(name: str) -> str:
    if Path(name).is_dir():
        return "the folder needs tokenizer.json and tokenizer_config.json"
    if name.startswith(("/", ".")):
        return "there is no such folder"
    return "check the id and the network; a gated model needs HF_TOKEN; with HF_HUB_OFFLINE=1 it must be cached already"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
