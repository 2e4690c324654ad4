"""Small models whose images are grids of patches, of a size that follows the image's."""

from __future__ import annotations

from dataclasses import replace

from triptych.demo.family import HIDDEN, MROPE, TEXT, TOWER, Family, Json, Template

QWEN_SPECIAL = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
QWEN_TEMPLATE = Template(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
)
QWEN_TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TOWER: Json = {
    **TOWER,
    "depth": 4,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
PIXTRAL_TOWER: Json = {
    **TOWER,
    "model_type": "pixtral",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 168,
    "patch_size": 14,
}
PIXTRAL_PIXELS: Json = {
    "image_processor_type": "PixtralImageProcessor",
    "size": {"longest_edge": 168},
    "patch_size": {"height": 14, "width": 14},
}
MISTRAL_TEXT: Json = {**TEXT, "model_type": "mistral", "sliding_window": None}


def _qwen_pixels(patch_size: int) -> Json:
    return {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448},
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


GRID_FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        template=Template(
            image=QWEN_TEMPLATE.image,
            video=QWEN_TEMPLATE.video,
            system="You are a helpful assistant.",
        ),
        special=QWEN_SPECIAL,
        text={**TEXT, "rope_parameters": MROPE},
        vision={
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        token_ids=QWEN_TOKEN_IDS,
        processor_class="Qwen2VLProcessor",
        image_processor={"image_processor_type": "Qwen2VLImageProcessor", **_qwen_pixels(14)},
        video_processor={"video_processor_type": "Qwen2VLVideoProcessor", **_qwen_pixels(14)},
    ),
    "qwen2_5_vl": Family(
        template=Template(
            image=QWEN_TEMPLATE.image,
            video=QWEN_TEMPLATE.video,
            system="You are a helpful assistant.",
        ),
        special=QWEN_SPECIAL,
        text={**TEXT, "rope_parameters": MROPE},
        vision={
            **QWEN_TOWER,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        token_ids=QWEN_TOKEN_IDS,
        processor_class="Qwen2_5_VLProcessor",
        image_processor={"image_processor_type": "Qwen2VLImageProcessor", **_qwen_pixels(14)},
        video_processor={"video_processor_type": "Qwen2VLVideoProcessor", **_qwen_pixels(14)},
    ),
    "qwen3_vl": Family(
        template=QWEN_TEMPLATE,
        special=QWEN_SPECIAL,
        text={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision={
            **QWEN_TOWER,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        token_ids=QWEN_TOKEN_IDS,
        processor_class="Qwen3VLProcessor",
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            **_qwen_pixels(16),
        },
        video_processor={"video_processor_type": "Qwen3VLVideoProcessor", **_qwen_pixels(16)},
    ),
    "glm4v": Family(
        template=Template(
            image="<|begin_of_image|><|image|><|end_of_image|>",
            video="<|begin_of_video|><|video|><|end_of_video|>",
        ),
        special={"image_token": "<|image|>", "video_token": "<|video|>"},
        tokens=(
            "<|begin_of_image|>",
            "<|end_of_image|>",
            "<|begin_of_video|>",
            "<|end_of_video|>",
        ),
        text={**TEXT, "rope_parameters": MROPE},
        vision={
            **TOWER,
            "depth": 3,
            "num_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "out_hidden_size": HIDDEN,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        token_ids={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
        processor_class="Glm4vProcessor",
        image_processor={
            "image_processor_type": "Glm4vImageProcessor",
            **_qwen_pixels(14),
            "size": {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 336 * 336},
        },
        video_processor={
            "video_processor_type": "Glm4vVideoProcessor",
            **_qwen_pixels(14),
            "size": {"shortest_edge": 2 * 56 * 56, "longest_edge": 8 * 112 * 112},
        },
    ),
    "pixtral": Family(
        model_type="llava",
        template=Template(image="[IMG]"),
        special={},
        tokens=PIXTRAL_TOKENS,
        text=MISTRAL_TEXT,
        vision=PIXTRAL_TOWER,
        outer={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        token_ids={"image_token_index": "[IMG]"},
        processor_class="PixtralProcessor",
        image_processor=PIXTRAL_PIXELS,
        processor={"patch_size": 14, "spatial_merge_size": 1},
    ),
    "mistral3": Family(
        template=Template(image="[IMG]"),
        special={},
        tokens=PIXTRAL_TOKENS,
        text=MISTRAL_TEXT,
        vision=PIXTRAL_TOWER,
        outer={"vision_feature_layer": -1, "spatial_merge_size": 2},
        token_ids={"image_token_index": "[IMG]"},
        processor_class="PixtralProcessor",
        image_processor=PIXTRAL_PIXELS,
        processor={"patch_size": 14, "spatial_merge_size": 2},
    ),
}
_EXPERTS: Json = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GRID_FAMILIES |= {
    "qwen3_vl_moe": replace(
        GRID_FAMILIES["qwen3_vl"],
        text={**GRID_FAMILIES["qwen3_vl"].text, **_EXPERTS, "num_experts": 4},
    ),
    "glm4v_moe": replace(
        GRID_FAMILIES["glm4v"],
        text={
            **GRID_FAMILIES["glm4v"].text,
            **_EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
    ),
}
