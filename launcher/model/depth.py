"""How deep in the model each parameter is."""

from __future__ import annotations

from typing import Any

from torch import nn

from launcher.model.adapters import decoder_layers, last_parameters


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
    # LFM2's final norm is named embedding_norm, GPT-NeoX's head embed_out.
    top = {id(parameter) for parameter in last_parameters(base, 1, "optimizer.layer_decay")}
    embeddings = {
        id(parameter)
        for module in base.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    above = {}
    for name, parameter in model.named_parameters():
        below_all = id(parameter) in embeddings or ("emb" in name and id(parameter) not in top)
        above[name] = len(layers) - 1 - depths.get(id(parameter), -1 if below_all else len(layers) - 1)
    return above
