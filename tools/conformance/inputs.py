"""What models need beside tokens: images, sounds, boxes; and prompts with an image in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


def _noise(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(5))


def _pixels(config: Any) -> Tensor:
    """An image `[1, 3, S, S]` for the part of a model that sees."""
    seeing = next((getattr(config, name) for name in ("vision_config", "encoder") if hasattr(config, name)), config)
    size = seeing.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return _noise(1, 3, height, width)


def _blip(config: Any) -> Inputs:
    return {"pixel_values": _pixels(config)}


def _instructed(config: Any) -> Inputs:
    return {"pixel_values": _pixels(config), "qformer_input_ids": torch.full((1, 4), 5)}


def _video(config: Any) -> Inputs:
    return {"pixel_values": _pixels(config)[:, None].repeat(1, 4, 1, 1, 1), "qformer_input_ids": torch.full((1, 4), 5)}


def _idefics(config: Any) -> Inputs:
    return {"pixel_values": _pixels(config)[:, None]}


def _boxes(config: Any) -> Inputs:
    return {"input_ids": torch.full((1, 9), 7), "bbox": torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).repeat(1, 9, 1)}


def _patches(config: Any) -> Inputs:
    vision = config.vision_config
    places = torch.tensor([[row, column] for row in range(1, 4) for column in range(1, 4)])
    values = _noise(1, 9, vision.patch_size**2 * vision.num_channels)
    return {"flattened_patches": torch.cat([places[None].float(), values], 2)}


def _sound(config: Any) -> Inputs:
    return {"input_features": _noise(1, config.num_mel_bins, 2 * config.max_source_positions)}


# By model type, or by class where a type has several: what each forward needs.
NEEDED: dict[str, Callable[[Any], Inputs]] = {
    "blip": _blip,
    "blip-2": _blip,
    "idefics": _idefics,
    "instructblip": _instructed,
    "instructblipvideo": _video,
    "kosmos-2": _blip,
    "pix2struct": _patches,
    "pp_formulanet": _blip,
    "udop": _boxes,
    "vision-encoder-decoder": _blip,
    "WhisperForConditionalGeneration": _sound,
}


def _whole(config: Any) -> Inputs:
    return {"pixel_values": _pixels(config)}


def _tiles(config: Any) -> Inputs:
    return {"pixel_values": _pixels(config)[:, None]}


def _grid(config: Any) -> Inputs:
    vision = config.vision_config
    channels = getattr(vision, "in_channels", 3)
    patches = _noise(16, channels * vision.temporal_patch_size * vision.patch_size**2)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}


# By model type: an image of families that are common.
PICTURES: dict[str, Callable[[Any], Inputs]] = {
    "gemma3": _whole,
    "idefics3": _tiles,
    "internvl": _whole,
    "llava": _whole,
    "paligemma": _whole,
    "qwen2_5_vl": _grid,
    "qwen2_vl": _grid,
    "qwen3_vl": _grid,
    "smolvlm": _tiles,
}


def picture_of(model: Any, text: Tensor) -> tuple[Tensor, Inputs] | None:
    """A prompt `[1, n]` with an image in it, and the image, for the families that have one.

    Args:
        model: any model.
        text: ordinary tokens `[1, n]`, of which the fourth and some after it become the image's.

    Raises:
        ValueError: the model takes no number of tokens for this image.
    """
    config = model.config
    if config.model_type not in PICTURES or not hasattr(config, "vision_config"):
        return None
    inputs = PICTURES[config.model_type](config)
    token = next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))
    for n in (1, 4, 16):
        ids = text.clone()
        ids[:, 3 : 3 + n] = token
        own = {**inputs, **({"mm_token_type_ids": (ids == token).long()} if "qwen" in config.model_type else {})}
        try:
            model(input_ids=ids, **own)
        except ValueError:
            continue
        return ids, own
    raise ValueError(f"{config.model_type} takes neither 1, 4 nor 16 tokens for its image")


def inputs_of(model: Any) -> Inputs:
    """What a model's forwards need beside tokens, for one row."""
    needed = NEEDED.get(type(model).__name__) or NEEDED.get(str(model.config.model_type))
    return needed(model.config) if needed else {}
