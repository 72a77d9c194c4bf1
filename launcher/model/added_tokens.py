"""Which tokens the base model has no knowledge of: those that the recipe adds to its tokenizer."""

from __future__ import annotations

from pathlib import Path

from launcher.data.tokenizer import is_trained, tokenizer_name
from launcher.model.load import load_config, readable_errors
from launcher.plan.plan import ModelPlan, Plan


def new_tokens(model: ModelPlan, tokenizer_folder: Path) -> dict[str, int]:
    """{token: id} of those of `model.add_tokens` that the tokenizer does not come with.

    Args:
        model: the base, and what is to be added
        tokenizer_folder: the run's tokenizer, which has them all

    Raises:
        ModelError: the tokenizer that the run started from cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not model.add_tokens:
        return {}
    vocabulary = AutoTokenizer.from_pretrained(tokenizer_folder).get_vocab()
    known = known_vocabulary(model, tokenizer_folder)
    return {token: vocabulary[token] for token in model.add_tokens if token not in known}


def known_vocabulary(model: ModelPlan, tokenizer_folder: Path) -> set[str]:
    """Every token of the tokenizer before any was added."""
    from transformers import AutoTokenizer

    if is_trained(model):
        trained = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
        return set(trained.get_vocab(with_added_tokens=False))
    name, revision = tokenizer_name(model)
    with readable_errors(model):
        return set(
            AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=model.trust_remote_code
            ).get_vocab()
        )


def added_ids(plan: Plan) -> tuple[int, ...]:
    """Ids, ascending, whose rows in the embedding and the head are given a start and trained, whatever the method.

    Those of the new tokens, and of any other token that the base has no row for. Empty where nothing is added.
    """
    model = plan.trajectory.model
    new = set(new_tokens(model, Path(plan.data.folder) / "tokenizer").values())
    if not new:
        return ()
    rows: int = load_config(model).get_text_config().vocab_size
    return tuple(sorted(new | set(range(rows, max(new)))))


def notes(model: ModelPlan, tokenizer_folder: Path) -> list[str]:
    """What the user should know of `model.add_tokens`: a sentence each."""
    new = new_tokens(model, tokenizer_folder)
    known = [repr(token) for token in model.add_tokens if token not in new]
    if not known:
        return []
    return [
        f"model.add_tokens: the tokenizer comes with {', '.join(known)}, so no row is added; adapters leave such rows "
        "as they are"
    ]
