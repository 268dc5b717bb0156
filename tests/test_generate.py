"""With Exact, every way of generating gives DynamicCache's tokens on the real model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kvpack
import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, pipeline

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village far away from the sea, there lived an old man who",
    "Water boils at",
]
REPETITIVE = "1 apple, 2 apples, 3 apples, 4 apples, 5 apples, 6 apples, 7 apples,"
TIE = 0.1  # bfloat16 resolves logits of about 20 to 0.125


class WatchedCache(kvpack.PackedCache):
    """Notes how many tokens each crop removed."""

    def crop(self, tokens: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens)
        self.__dict__.setdefault("removed", []).append(before - self.get_seq_length())


class Run:
    """One model with one kind of cache: what a mode below needs, whichever cache it is."""

    def __init__(self, model: Any, new_cache: Callable[[], Any], tokenizer: Any, draft: Any) -> None:
        self.model, self.new_cache, self.tokenizer, self.draft = model, new_cache, tokenizer, draft
        self.caches: list[Any] = []
        self.logits: list[torch.Tensor] = []

    def cache(self) -> Any:
        self.caches.append(self.new_cache())
        return self.caches[-1]

    def encode(self, text: str | list[str], **options: Any) -> Any:
        return self.tokenizer(text, return_tensors="pt", padding=isinstance(text, list), **options)

    def generate(self, inputs: Any, cache: Any = None, **options: Any) -> torch.Tensor:
        options = {"max_new_tokens": 24, "do_sample": False, **options}
        cache = self.cache() if cache is None else cache
        out = self.model.generate(
            **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
        )
        self.logits.append(torch.stack(out.logits).float())
        return out.sequences


def plain(run: Run) -> torch.Tensor:
    return run.generate(run.encode(PROMPTS[1]))


def padded_batch(run: Run) -> torch.Tensor:
    return run.generate(run.encode(PROMPTS))


def beams(run: Run) -> torch.Tensor:
    return run.generate(run.encode(PROMPTS), num_beams=3, max_new_tokens=16)


def beams_returned(run: Run) -> torch.Tensor:
    return run.generate(run.encode(PROMPTS), num_beams=3, num_return_sequences=3, max_new_tokens=12)


def sampling(run: Run) -> torch.Tensor:
    torch.manual_seed(7)
    return run.generate(run.encode(PROMPTS[1]), do_sample=True)


def returned_sequences(run: Run) -> torch.Tensor:
    torch.manual_seed(7)
    return run.generate(run.encode(PROMPTS), do_sample=True, num_return_sequences=3, max_new_tokens=12)


def prompt_lookup(run: Run) -> torch.Tensor:
    return run.generate(run.encode(REPETITIVE), prompt_lookup_num_tokens=5, max_new_tokens=40)


def assisted(run: Run) -> torch.Tensor:
    return run.generate(run.encode(PROMPTS[1]), assistant_model=run.draft, max_new_tokens=32)


def chunked_prefill(run: Run) -> torch.Tensor:
    return run.generate(run.encode(PROMPTS[1]), prefill_chunk_size=5)


def multi_turn(run: Run) -> torch.Tensor:
    cache = run.cache()
    question = run.encode(" Then the king said:", add_special_tokens=False)["input_ids"]
    ids = run.encode(PROMPTS[1])["input_ids"]
    for _ in range(3):
        ids = run.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, max_new_tokens=10)
        ids = torch.cat([ids, question], dim=-1)
    return ids


def manual_loop(run: Run) -> torch.Tensor:
    cache = run.cache()
    ids = run.encode(PROMPTS[1])["input_ids"]
    out = run.model(ids, past_key_values=cache, use_cache=True)
    tokens = [ids]
    for _ in range(20):
        run.logits.append(out.logits[:, -1].float())
        tokens.append(out.logits[:, -1:].argmax(-1))
        out = run.model(tokens[-1], past_key_values=out.past_key_values, use_cache=True)
    assert out.past_key_values is cache
    return torch.cat(tokens, dim=-1)


def pipelined(run: Run) -> torch.Tensor:
    generator = pipeline("text-generation", model=run.model, tokenizer=run.tokenizer)
    options = {"do_sample": False, "max_new_tokens": 24, "return_tensors": True}
    out = generator(PROMPTS[1], past_key_values=run.cache(), **options)
    return torch.tensor([out[0]["generated_token_ids"]])


def deepcopied_prefix(run: Run) -> torch.Tensor:
    prefix = run.cache()
    ids = run.encode(PROMPTS[1])["input_ids"]
    run.model(ids, past_key_values=prefix, use_cache=True)
    rows = []
    for ending in (" had", " was"):
        branch = copy.deepcopy(prefix)
        run.caches.append(branch)
        whole = torch.cat([ids, run.encode(ending, add_special_tokens=False)["input_ids"]], dim=-1)
        rows.append(run.generate({"input_ids": whole, "attention_mask": torch.ones_like(whole)}, branch))
    assert prefix.get_seq_length() == ids.shape[-1]
    return torch.cat(rows)


GREEDY = [
    plain,
    padded_batch,
    prompt_lookup,
    assisted,
    chunked_prefill,
    multi_turn,
    manual_loop,
    pipelined,
    deepcopied_prefix,
]
OTHERS = [beams, beams_returned, sampling, returned_sequences]


def run_of(models: SimpleNamespace, tokenizer: Any, which: str, cache_class: Any) -> Run:
    model = getattr(models, which)
    if cache_class is DynamicCache:
        return Run(model, lambda: DynamicCache(config=model.config), tokenizer, models.draft)
    return Run(model, lambda: cache_class(model), tokenizer, models.draft)


def assert_path(run: Run, path: str) -> None:
    """Of the two ways of reading a packed cache, every cache of the run was read by `path` alone."""
    other = {"fused": "materialised", "materialised": "fused"}[path]
    read = [cache.info() for cache in run.caches]
    assert sum(info[path] for info in read) > 0
    assert [info[other] for info in read] == [0] * len(read)


def logit_difference(one: Run, other: Run) -> float:
    assert [x.shape for x in one.logits] == [x.shape for x in other.logits]
    return max((x - y).abs().max().item() for x, y in zip(one.logits, other.logits, strict=True))


@pytest.mark.parametrize("mode", GREEDY + OTHERS, ids=lambda mode: mode.__name__)
def test_float32_tokens_equal_the_full_caches(
    mode: Callable[[Run], torch.Tensor], float32_models: Any, tokenizer: Any, record_property: Any
) -> None:
    full = run_of(float32_models, tokenizer, "reference", DynamicCache)
    packed = run_of(float32_models, tokenizer, "packed", kvpack.PackedCache)
    expected = mode(full)
    assert torch.equal(mode(packed), expected)
    assert_path(packed, "fused")
    if full.logits:
        difference = logit_difference(packed, full)
        record_property("max logit difference", difference)
        assert difference < 1e-3


@pytest.mark.parametrize("mode", GREEDY, ids=lambda mode: mode.__name__)
def test_bfloat16_tokens_equal_the_full_caches_up_to_ties(
    mode: Callable[[Run], torch.Tensor], bfloat16_models: Any, tokenizer: Any
) -> None:
    full = run_of(bfloat16_models, tokenizer, "reference", DynamicCache)
    packed = run_of(bfloat16_models, tokenizer, "packed", kvpack.PackedCache)
    expected, tokens = mode(full), mode(packed)
    assert_path(packed, "fused")
    for row, wanted in zip(tokens, expected, strict=True):
        assert_equal_up_to_a_tie(bfloat16_models.reference, row, wanted, tokenizer.pad_token_id)


def assert_equal_up_to_a_tie(model: Any, tokens: torch.Tensor, expected: torch.Tensor, pad: int) -> None:
    length = min(len(tokens), len(expected))
    different = (tokens[:length] != expected[:length]).nonzero()
    if not len(different):
        assert len(tokens) == len(expected)
        return
    first = int(different[0])
    prefix = expected[:first][None]
    prefix = prefix[:, int((prefix[0] != pad).nonzero()[0]) :]
    best = model(prefix).logits[0, -1].float().topk(2)
    gap = (best.values[0] - best.values[1]).item()
    if gap > TIE:
        # The CPU decides which of two neighbours in bfloat16 a logit becomes: how near they are, float32 says.
        one, other = copy.deepcopy(model).float()(prefix).logits[0, -1, best.indices].tolist()
        gap = abs(one - other)
    assert gap <= TIE
    assert {int(tokens[first]), int(expected[first])} == set(best.indices.tolist())


class BeamRecorder(LogitsProcessor):
    """Keeps the running beams of every step, with the log probabilities of what may follow each."""

    def __init__(self) -> None:
        self.steps: list[dict[tuple[int, ...], torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beams = map(tuple, input_ids.tolist())
        self.steps.append(dict(zip(beams, scores.float(), strict=True)))
        return scores

    def score(self, beam: tuple[int, ...], prompt: int) -> float:
        """The sum of log probabilities of the generated tokens of `beam`, as this search saw them."""
        return sum(self.steps[at - prompt][beam[:at]][beam[at]].item() for at in range(prompt, len(beam)))


def test_bfloat16_beams_equal_the_full_caches_up_to_ties(bfloat16_models: Any, tokenizer: Any) -> None:
    full = run_of(bfloat16_models, tokenizer, "reference", DynamicCache)
    packed = run_of(bfloat16_models, tokenizer, "packed", kvpack.PackedCache)
    for prompt in PROMPTS:
        searches = {}
        for run in (full, packed):
            searches[run] = BeamRecorder()
            processors = LogitsProcessorList([searches[run]])
            run.generate(run.encode(prompt), num_beams=3, max_new_tokens=16, logits_processor=processors)
        assert_beams_equal_up_to_a_tie(searches[packed], searches[full], run.encode(prompt)["input_ids"].shape[1])
    assert_path(packed, "fused")


def assert_beams_equal_up_to_a_tie(search: BeamRecorder, expected: BeamRecorder, prompt: int) -> None:
    for beams, wanted in zip(search.steps, expected.steps, strict=False):
        if beams.keys() != wanted.keys():
            # The first step that differs kept a beam that in the full cache's eyes is as good as the worst kept:
            # a beam's score is a sum over its tokens, each of them as uncertain as one logit.
            worst = min(expected.score(beam, prompt) for beam in wanted)
            tokens = len(next(iter(beams))) - prompt
            assert all(expected.score(beam, prompt) >= worst - TIE * tokens for beam in beams)
            return
        for beam, following in beams.items():
            best = wanted[beam].topk(5).indices
            assert torch.allclose(following[best], wanted[beam][best], atol=4 * TIE)
    assert len(search.steps) == len(expected.steps)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", [plain, padded_batch, beams, prompt_lookup], ids=lambda mode: mode.__name__)
def test_other_attention_functions_read_a_materialised_copy(
    attention: str, mode: Callable[[Run], torch.Tensor], float32_models: Any, tokenizer: Any
) -> None:
    model = float32_models.reference
    model.set_attn_implementation(attention)
    try:
        expected = mode(run_of(float32_models, tokenizer, "reference", DynamicCache))
        packed = run_of(float32_models, tokenizer, "reference", kvpack.PackedCache)
        assert torch.equal(mode(packed), expected)
    finally:
        model.set_attn_implementation("sdpa")
    assert_path(packed, "materialised")


def test_the_paths_taken_are_counted_call_by_call(float32_models: Any, tokenizer: Any) -> None:
    run = run_of(float32_models, tokenizer, "packed", kvpack.PackedCache)
    run.generate(run.encode(PROMPTS[1]), max_new_tokens=9)
    layers = float32_models.packed.config.num_hidden_layers
    info = run.caches[0].info()
    assert {path: info[path] for path in ("prefill", "fused", "materialised")} == {
        "prefill": layers,
        "fused": 8 * layers,
        "materialised": 0,
    }
    assert info["tokens"] == run.caches[0].get_seq_length() == run.encode(PROMPTS[1])["input_ids"].shape[1] + 8


@pytest.mark.parametrize("mode", [prompt_lookup, assisted], ids=lambda mode: mode.__name__)
def test_speculation_is_both_accepted_and_rejected(
    mode: Callable[[Run], torch.Tensor], float32_models: Any, tokenizer: Any
) -> None:
    run = run_of(float32_models, tokenizer, "packed", WatchedCache)
    generated = mode(run).shape[1] - run.encode(PROMPTS[1] if mode is assisted else REPETITIVE)["input_ids"].shape[1]
    removed = run.caches[0].removed
    assert any(removed)
    assert len(removed) < generated


def document_prompt(tokenizer: Any, document: str) -> Any:
    question = "Summarize this speech in one paragraph."
    chat = [{"role": "user", "content": f"{document}\n\n{question}"}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_a_long_document_gives_the_full_caches_tokens(
    float32_models: Any, tokenizer: Any, document: str, record_property: Any
) -> None:
    inputs = document_prompt(tokenizer, document)
    prompt = inputs["input_ids"].shape[1]
    assert prompt >= 3000
    full = DynamicCache(config=float32_models.reference.config)
    options = {"do_sample": False, "max_new_tokens": 48}
    expected = float32_models.reference.generate(**inputs, past_key_values=full, **options)
    # The same prompt again, packed: what is tested is the reading of it.
    full.crop(-(full.get_seq_length() - prompt + 1))
    for codec in (kvpack.Exact(), kvpack.KIVI(bits=8)):
        cache = kvpack.PackedCache.from_cache(full, float32_models.packed, quantize=codec)
        tokens = float32_models.packed.generate(**inputs, past_key_values=cache, **options)
        assert torch.equal(tokens, expected), codec
        record_property(f"{codec}, bytes as a part of the full cache's", full_share(cache, full))


def full_share(cache: kvpack.PackedCache, full: Any) -> float:
    tokens = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers) / full.get_seq_length()
    return cache.memory().total / (tokens * cache.get_seq_length())
