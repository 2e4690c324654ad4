"""One half of a model: the class that Transformers knows, with the other half left out.

The half is an ordinary model class, so that Transformers' own loader does everything it does for
the whole: renamed keys of old checkpoints, shards, tied heads, fused experts, dtypes. The weights
of the other half are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from triptych.errors import UnsupportedModel

Half = Literal["encoder", "language"]
LANGUAGE_CHILDREN = ("language_model", "text_model")


def half_config(config: PreTrainedConfig, half: Half) -> PreTrainedConfig:
    """A copy of ``config`` with which the half can be loaded."""
    config = deepcopy(config)
    if half == "encoder":  # there is no head to tie
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    return config


def half_class(
    config: PreTrainedConfig, half: Half, constructed: Callable[[Any], object] | None = None
) -> Any:
    """Subclass of the model class for ``config`` that has only the children of ``half``.

    ``constructed`` is called with each new model, on the meta device. The constructor raises
    UnsupportedModel for a model whose children are not told apart.
    """
    base = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]

    def construct(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # The loader constructs on the meta device: what is dropped here has cost no memory.
        base.__init__(self, config, *args, **kwargs)
        _drop_other_half(self, half)
        if constructed is not None:
            constructed(self)

    # The name and module stay the base's: the loader finds its key conversions by them.
    members: dict[str, Any] = {
        "__init__": construct,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_keys_to_ignore_on_load_unexpected": [r".*"],
    }
    if half == "encoder":
        members |= {
            "_tied_weights_keys": {},
            "get_input_embeddings": lambda self: None,
            "get_output_embeddings": lambda self: None,
        }
    return type(base.__name__, (base,), members)


def _drop_other_half(model: Any, half: Half) -> None:
    inner = getattr(model, "model", None)
    children = [] if inner is None else [name for name, _ in inner.named_children()]
    if inner is None or not any(name in LANGUAGE_CHILDREN for name in children):
        raise UnsupportedModel(
            f"{type(model).__name__} has no child named {' or '.join(LANGUAGE_CHILDREN)}"
        )
    # Bare parameters (image_newline) stay in both halves: the initialiser touches them.
    for name in children:
        if (name in LANGUAGE_CHILDREN) == (half == "encoder"):
            inner._modules[name] = None
    if half == "encoder":
        model._modules["lm_head"] = None
