"""What Pixtral's processor class writes, where Transformers' own cannot be imported: its module
needs torchvision, for a function that nothing here calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.processing_utils import ProcessorMixin


@dataclass(frozen=True)
class PixtralText:
    """As much of ``PixtralProcessor`` as is used. Fields by their names in its settings file."""

    image_processor: Any
    tokenizer: Any
    patch_size: int = 16
    spatial_merge_size: int = 1
    image_token: str = "[IMG]"
    image_break_token: str = "[IMG_BREAK]"
    image_end_token: str = "[IMG_END]"

    @classmethod
    def load(cls, image_processor: Any, tokenizer: Any, source: dict[str, Any]) -> PixtralText:
        """``source``: arguments of ``from_pretrained``."""
        settings, _ = ProcessorMixin.get_processor_dict(**source)
        known = set(cls.__dataclass_fields__) - {"image_processor", "tokenizer"}
        settings = {name: value for name, value in settings.items() if name in known}
        return cls(image_processor, tokenizer, **settings)

    def replace_image_token(self, facts: dict[str, Any], index: int) -> str:
        """A token for each merged patch; after each row of them a break, after the last the end."""
        height, width = facts["image_sizes"][index]
        side = self.patch_size * self.spatial_merge_size
        row = self.image_token * (width // side)
        return self.image_break_token.join([row] * (height // side)) + self.image_end_token
