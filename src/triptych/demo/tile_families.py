"""Small models whose images are tiles of one size, as many as follow from the image's shape."""

from __future__ import annotations

from triptych.demo.family import TEXT, TOWER, Family, Json, Template

SIGLIP: Json = {
    **TOWER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
CLIP: Json = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
IDEFICS_PIXELS: Json = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}

TILE_FAMILIES: dict[str, Family] = {
    "llava_onevision": Family(
        template=Template(
            image="<image>", video="<video>", after_role=" ", after_turn="", images_first=True
        ),
        special={"image_token": "<image>", "video_token": "<video>"},
        text={**TEXT, "model_type": "qwen2"},
        vision={
            **TOWER,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 84,
            "patch_size": 14,
            "vision_use_head": False,
        },
        outer={
            "image_grid_pinpoints": [[84, 168], [168, 84], [168, 168], [84, 252], [252, 84]],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        token_ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        processor_class="LlavaOnevisionProcessor",
        image_processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 84, "width": 84},
            "image_grid_pinpoints": [[84, 168], [168, 84], [168, 168], [84, 252], [252, 84]],
        },
        video_processor={
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": {"height": 84, "width": 84},
        },
        processor={
            "num_image_tokens": 36,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    ),
    "internvl": Family(
        template=Template(image="<IMG_CONTEXT>\\n", video="<video>\\n"),
        special={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        text={**TEXT, "model_type": "qwen2"},
        vision={
            **TOWER,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [112, 112],
            "patch_size": [14, 14],
        },
        outer={"downsample_ratio": 0.5, "image_seq_length": 16},
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        processor_class="InternVLProcessor",
        image_processor={
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 112, "width": 112},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
        },
        video_processor={
            "video_processor_type": "InternVLVideoProcessor",
            "size": {"height": 112, "width": 112},
        },
        processor={"image_seq_length": 16},
    ),
    "llava": Family(
        template=Template(image="<image>\\n"),
        special={"image_token": "<image>"},
        text={**TEXT, "model_type": "llama"},
        vision=CLIP,
        outer={"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        token_ids={"image_token_index": "<image>"},
        processor_class="LlavaProcessor",
        image_processor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
        },
        processor={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
    ),
    "llava_next": Family(
        template=Template(image="<image>\\n"),
        special={"image_token": "<image>"},
        text={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision=CLIP,
        outer={
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        token_ids={"image_token_index": "<image>"},
        processor_class="LlavaNextProcessor",
        image_processor={
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": PINPOINTS,
        },
        processor={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
    ),
    "idefics3": Family(
        template=Template(image="<image>"),
        special={},
        tokens=("<image>", *IDEFICS_TOKENS),
        text={**TEXT, "model_type": "llama"},
        vision=SIGLIP,
        outer={"scale_factor": 2},
        token_ids={"image_token_id": "<image>"},
        processor_class="Idefics3Processor",
        image_processor={"image_processor_type": "Idefics3ImageProcessor", **IDEFICS_PIXELS},
        processor={"image_seq_len": 4},
    ),
    "smolvlm": Family(
        template=Template(image="<image>", video="<video>"),
        special={"image_token": "<image>", "video_token": "<video>"},
        tokens=IDEFICS_TOKENS,
        text={**TEXT, "model_type": "llama"},
        vision=SIGLIP,
        outer={"scale_factor": 2},
        token_ids={"image_token_id": "<image>"},
        processor_class="SmolVLMProcessor",
        image_processor={"image_processor_type": "SmolVLMImageProcessor", **IDEFICS_PIXELS},
        video_processor={
            "video_processor_type": "SmolVLMVideoProcessor",
            **IDEFICS_PIXELS,
            "fps": 2,
            "num_frames": 16,
        },
        processor={"image_seq_len": 4},
    ),
    "gemma3": Family(
        template=Template(image="<start_of_image>"),
        special={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        text={
            **TEXT,
            "sliding_window": 3,  # less than an image
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        vision={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        outer={"mm_tokens_per_image": 4},
        token_ids={
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        processor_class="Gemma3Processor",
        image_processor={
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 56, "width": 56},
        },
        processor={"image_seq_length": 4},
    ),
}
