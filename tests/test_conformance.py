"""One model of each kind of `make conformance`, tiny and random: right in every mode, or refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from conformance import table
from conformance.compare import TOLERANCE
from conformance.examine import examine
from conformance.models import all_models

# By what is particular about a model.
KINDS: dict[str, list[str]] = {
    "grouped queries": ["llama", "qwen3", "gpt2"],
    "one KV head": ["gpt_bigcode", "gemma"],
    "sliding windows": ["mistral", "gemma3_text", "cohere2"],
    "chunked attention": ["llama4_text"],
    "softcap": ["gemma2"],
    "sink logits": ["gpt_oss", "mimo_v2_flash"],
    "latent attention": ["deepseek_v3", "minicpm3", "longcat_flash"],
    "an index": ["deepseek_v32", "minimax_m3_vl_text"],
    "compressed": ["deepseek_v4"],
    "shared keys and values": ["gemma4_text"],
    "recurrences": ["qwen3_next", "lfm2", "falcon_h1", "zamba2", "jamba"],
    "attention of its own": ["diffllama", "doge", "git", "gpt_neo", "xglm"],
    "ALiBi": ["bloom", "mpt"],
    "relative positions": ["inkling_text"],
    "loops": ["dory", "hrm_text"],
    "no attention": ["mamba"],
    "images": ["llava", "qwen2_vl", "mllama", "idefics3"],
    "an encoder": ["t5", "bart", "moshi", "blip"],
    "refused": ["openai-gpt", "minimax", "xlnet"],
}
PREFERRED = {"t5": "seq2seq", "bart": "seq2seq", "mllama": "image"}
AVAILABLE = all_models()
MODELS = [
    pytest.param(*job, what, id=job[0])
    for what, names in KINDS.items()
    for name in names
    for job in [next((job for job in AVAILABLE if job[0] == name and job[1] == PREFERRED.get(name, job[1])), None)]
    if job is not None
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "kind", "what"), MODELS)
def test_one_of_each_kind(model_type: str, kind: str, what: str, record_property: object) -> None:
    row = examine(model_type, kind)
    assert row["verdict"] == ("refused" if what == "refused" else "right"), table.told(row)
    if what != "refused":
        assert row["sees"] > 10 * TOLERANCE, "a mistake would not show"


def test_every_model_type_is_examined_once_a_class() -> None:
    assert len(set(AVAILABLE)) == len(AVAILABLE) > 200
