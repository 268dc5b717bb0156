"""What tests of models of many kinds share."""

from __future__ import annotations

from typing import Any

import torch

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(4, 120, (2, 24), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def shaken(model: Any, seed: int = 1) -> Any:
    """The model with weights that make attention peaked, so that a misplaced token shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15, generator=generator)
    return model.eval().float()


def logits(model: Any, cache: Any) -> torch.Tensor:
    """Of two rows, the first left-padded: a prompt's last, a step's, a chunk's and a step's."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    outputs = []
    for new in (24, 1, 4, 1):
        outputs.append(model(IDS[:, :new], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        mask = torch.cat([mask, torch.ones(2, 4 if new == 1 else 1, dtype=torch.long)], 1)
    return torch.cat([outputs[0][:, -1:], *outputs[1:]], 1)
