"""How deep in the model each parameter is."""

from __future__ import annotations

from typing import Any

from torch import nn

from launcher.model.adapters import decoder_layers


def layers_above(model: nn.Module) -> dict[str, int]:
    """{parameter's name: how many layers come after its own}, adapters with the layer that they are on.

    0 for the last of n layers, for the final norm and for a head of its own; n - 1 for the first, n for what is below
    it: embeddings, of a tied head too, and what has `emb` in its name, such as BERT's norm of them.

    Raises:
        ModelError: the model has no list of layers.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    layers = decoder_layers(base)
    depths = {id(parameter): i for i, layer in enumerate(layers) for parameter in layer.parameters()}
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    embeddings = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    above = {}
    for name, parameter in model.named_parameters():
        below_all = id(parameter) in embeddings or ("emb" in name and id(parameter) not in of_head)
        above[name] = len(layers) - 1 - depths.get(id(parameter), -1 if below_all else len(layers) - 1)
    return above
