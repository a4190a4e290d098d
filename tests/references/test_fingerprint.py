"""Content keys: every change that matters misses, every change that does not hits."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.errors import DataError, StoreError
from preftune.references.fingerprint import (
    canonical_json,
    model_weights_key,
    normalise_names,
    sequence_key,
    sequence_keys,
    stable_config,
    weights_key,
)
from preftune.references.store import ReferenceStore

FP32 = {"dtype": torch.float32, "autocast": None}


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def with_adapter(model: LlamaForCausalLM, name: str = "default", **changes: Any) -> Any:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**(settings | changes)), adapter_name=name)


class TestSequenceKey:
    def test_is_blake2b_of_the_documented_records(self) -> None:
        ids, mask = [1, 70000, 3], [0, 1, 1]
        records = b"".join(struct.pack("<iB", token, scored) for token, scored in zip(ids, mask, strict=True))
        assert sequence_key(ids, mask) == hashlib.blake2b(records, digest_size=16, person=b"preftune-seq-1").digest()

    @pytest.mark.parametrize(
        "as_container",
        [list, tuple, np.array, torch.tensor]
        + [lambda x, t=t: np.array(x, dtype=t) for t in ("int16", "<i4", ">i4", "uint32", ">i8")]
        + [lambda x: torch.tensor(x, dtype=torch.int32), lambda x: torch.tensor([x, x]).T[:, 0]],
    )
    def test_containers_and_types_do_not_matter(self, as_container: Callable[[Any], Any]) -> None:
        expected = sequence_key([5, 6, 7, 8], [False, False, True, True])
        assert sequence_key(as_container([5, 6, 7, 8]), as_container([0, 0, 1, 1])) == expected
        assert sequence_key(as_container([5, 6, 7, 8]), torch.tensor([0, 0, 1, 1]).bool()) == expected

    @given(st.data())
    def test_differs_whenever_tokens_or_mask_differ(self, data: st.DataObject) -> None:
        sequence = st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=6)
        one, two = data.draw(sequence), data.draw(sequence)
        keys = [sequence_key([t for t, _ in rows], [m for _, m in rows]) for rows in (one, two)]
        assert (keys[0] == keys[1]) == (one == two)

    def test_batched_equals_one_by_one(self) -> None:
        rng = np.random.default_rng(0)
        lengths = np.array([3, 0, 7, 1, 0])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids, mask = rng.integers(0, 2**31 - 1, 11), rng.integers(0, 2, 11)
        expected = [sequence_key(ids[a:b], mask[a:b]) for a, b in itertools.pairwise(offsets)]
        assert sequence_keys(ids, mask, offsets) == expected
        assert sequence_keys(torch.tensor(ids), mask.tolist(), offsets.tolist()) == expected

    @pytest.mark.parametrize(
        ("ids", "mask", "match"),
        [
            ([1, 2], [1], "one entry per token"),
            ([1, -100], [1, 1], "out of range"),
            ([1, 2**31], [1, 1], "out of range"),
            ([1, 2], [1, 2], "neither 0 nor 1"),
            ([1.0, 2.0], [1, 1], "integers"),
            ([[1, 2]], [[1, 1]], "one-dimensional"),
        ],
    )
    def test_bad_input_is_refused(self, ids: Any, mask: Any, match: str) -> None:
        with pytest.raises(DataError, match=match):
            sequence_key(ids, mask)

    @pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], []])
    def test_offsets_must_partition(self, offsets: list[int]) -> None:
        with pytest.raises(DataError, match="offsets"):
            sequence_keys([1, 2, 3], [0, 1, 1], offsets)


class TestWeightsKey:
    def test_is_stable_across_processes_and_versions(self) -> None:
        # A changed constant means that every user's store goes cold: raise SCHEME on purpose, then this number.
        tensors = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
        assert weights_key(tensors, {"x": 1}) == weights_key(reversed(list(tensors.items())), {"x": 1})
        assert weights_key(tensors, {"x": 1}) == "c756eb52aba96e349dc78b41cb4e99a2"

    def test_every_single_bit_counts(self) -> None:
        weight = torch.zeros(3, 5)
        keys = {weights_key({"w": weight}, {})}
        for element in range(15):
            for bit in (0, 13, 31):
                changed = weight.clone()
                changed.view(-1).view(torch.int32)[element] ^= torch.tensor(1 << bit).to(torch.int32)
                keys.add(weights_key({"w": changed}, {}))
        assert len(keys) == 1 + 15 * 3

    def test_name_dtype_and_shape_count(self) -> None:
        weight = torch.zeros(4, 6)
        variants = [
            {"w": weight},
            {"v": weight},
            {"w": weight.T.contiguous()},
            {"w": weight.reshape(-1)},
            {"w": weight.half()},
            {"w": weight.bfloat16()},
            {"w": weight.to(torch.int32)},
            {"w": weight, "v": torch.zeros(0)},
            {"w": weight, "v": torch.zeros(())},
        ]
        assert len({weights_key(variant, {}) for variant in variants}) == len(variants)

    def test_memory_layout_does_not_count(self) -> None:
        weight = torch.randn(6, 10)
        assert weights_key({"w": weight.T.contiguous().T}, {}) == weights_key({"w": weight}, {})
        assert weights_key({"w": torch.cat([weight, weight])[3:9].roll(3, 0)}, {}) == weights_key({"w": weight}, {})

    def test_chunks_of_large_tensors_are_all_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.arange(1000, dtype=torch.float32)
        whole = weights_key({"w": weight}, {})
        monkeypatch.setattr("preftune.references.fingerprint._CHUNK_BYTES", 256)
        assert weights_key({"w": weight}, {}) == whole
        weight[-1] += 1
        assert weights_key({"w": weight}, {}) != whole

    def test_tied_tensors_count_once(self) -> None:
        tied = tiny_llama(tie_word_embeddings=True)
        assert len(tied.state_dict()) == len(list(tied.named_parameters())) + 1
        assert weights_key(tied.state_dict(), {}) == weights_key(tied.named_parameters(), {})

    def test_unusable_tensors_are_refused(self) -> None:
        with pytest.raises(StoreError, match="w: A reference tensor holds no data"):
            weights_key({"w": torch.zeros(2, device="meta")}, {})

    def test_extra_counts_by_content(self) -> None:
        assert weights_key({}, {"a": 1, "b": [1, 2]}) == weights_key({}, {"b": (1, 2), "a": 1})
        assert weights_key({}, {"a": torch.float32}) != weights_key({}, {"a": torch.bfloat16})


class TestPeftNames:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"target_modules": "all-linear"},
            {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
            {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
            {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]},
            {"use_dora": True},
            {"target_modules": ["embed_tokens", "v_proj"]},
        ],
        ids=str,
    )
    def test_adapter_off_is_the_plain_model(self, changes: dict[str, Any]) -> None:
        plain = model_weights_key(tiny_llama(), FP32)
        wrapped = with_adapter(tiny_llama(), **changes)
        assert model_weights_key(wrapped, FP32) == plain

    def test_adapter_off_is_the_plain_model_when_tied(self) -> None:
        plain = model_weights_key(tiny_llama(tie_word_embeddings=True), FP32)
        wrapped = with_adapter(tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", "o_proj"])
        assert model_weights_key(wrapped, FP32) == plain

    def test_training_the_adapter_does_not_change_the_base(self) -> None:
        wrapped = with_adapter(tiny_llama(), modules_to_save=["lm_head"], target_modules=["q_proj"])
        before = model_weights_key(wrapped, FP32)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        assert model_weights_key(wrapped, FP32) == before

    def test_an_adapter_that_belongs_to_the_reference_counts(self) -> None:
        wrapped = with_adapter(tiny_llama())
        on = model_weights_key(wrapped, FP32, adapter="default")
        assert on != model_weights_key(wrapped, FP32)
        # A copy of it under another name, as a frozen reference, is the same model ...
        assert model_weights_key(with_adapter(tiny_llama(), name="ref"), FP32, adapter="ref") == on
        # ... and a second adapter beside it, switched off, does not matter.
        wrapped.add_adapter("other", LoraConfig(r=4, target_modules=["v_proj", "q_proj"]))
        assert model_weights_key(wrapped, FP32, adapter="default") == on
        with torch.no_grad():
            wrapped.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight")[0, 0] += 1
        assert model_weights_key(wrapped, FP32, adapter="default") != on

    def test_adapter_settings_count(self) -> None:
        keys = {
            model_weights_key(with_adapter(tiny_llama(), **changes), FP32, adapter="default")
            for changes in ({}, {"lora_alpha": 99}, {"use_rslora": True}, {"lora_dropout": 0.5})
        }
        assert len(keys) == 3  # dropout is off while scoring

    def test_saved_modules_replace_the_original_only_with_their_adapter(self) -> None:
        names = [
            "base_model.model.lm_head.original_module.weight",
            "base_model.model.lm_head.modules_to_save.default.weight",
            "base_model.model.model.layers.0.q_proj.base_layer.weight",
            "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
            "base_model.model.model.layers.0.q_proj.lora_A.other.weight",
            "base_model.model.model.norm.weight",
        ]
        layer = "model.layers.0.q_proj"
        assert list(normalise_names(names).values()) == ["lm_head.weight", f"{layer}.weight", "model.norm.weight"]
        assert list(normalise_names(names, "default").values()) == [
            *("lm_head.weight", f"{layer}.weight", f"{layer}.lora_A.weight", "model.norm.weight")
        ]
        assert normalise_names(names, "default")[names[1]] == "lm_head.weight"
        assert list(normalise_names(names, "other").values()) == [
            *("lm_head.weight", f"{layer}.weight", f"{layer}.lora_A.weight", "model.norm.weight")
        ]
        assert normalise_names(names, "other")[names[0]] == "lm_head.weight"

    def test_other_wrappers_are_stripped(self) -> None:
        names = ["module._orig_mod.model.norm.weight", "model._fsdp_wrapped_module.embed.weight"]
        assert list(normalise_names(names).values()) == ["model.norm.weight", "model.embed.weight"]

    def test_merged_or_unknown_adapters_are_refused(self) -> None:
        wrapped = with_adapter(tiny_llama())
        with pytest.raises(StoreError, match="'ref'"):
            model_weights_key(wrapped, FP32, adapter="ref")
        wrapped.merge_adapter()
        with pytest.raises(StoreError, match="merged"):
            model_weights_key(wrapped, FP32)


class TestModelConfig:
    def test_path_versions_and_run_settings_do_not_count(self, tmp_path: Path) -> None:
        model = tiny_llama()
        key = model_weights_key(model, FP32)
        for name in ("one", "two"):
            model.save_pretrained(tmp_path / name)
            loaded = LlamaForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
            loaded.config.use_cache = False
            loaded.config.pad_token_id = 7  # trainers align special tokens with the tokenizer
            loaded.gradient_checkpointing_enable()
            assert model_weights_key(loaded, FP32) == key

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            {"rms_norm_eps": 1e-5},
            {"hidden_act": "gelu"},
            {"num_attention_heads": 4, "num_key_value_heads": 4},
        ],
        ids=str,
    )
    def test_architecture_counts(self, changes: dict[str, Any]) -> None:
        one, two = tiny_llama(), tiny_llama(**changes)
        two.load_state_dict(one.state_dict())
        assert model_weights_key(one, FP32) != model_weights_key(two, FP32)

    def test_compute_dtype_counts(self) -> None:
        model = tiny_llama()
        autocast = {"dtype": torch.float32, "autocast": torch.bfloat16}
        assert model_weights_key(model, FP32) != model_weights_key(model, autocast)

    def test_nested_configurations_are_cleaned_too(self) -> None:
        config = {"text_config": {"dtype": "float32", "rope_theta": 1.0}, "_name_or_path": "x", "new_option": 3}
        assert stable_config(config) == {"text_config": {"rope_theta": 1.0}, "new_option": 3}


class TestCanonicalJson:
    def test_one_text_per_content(self) -> None:
        class Mode(Enum):
            """A setting with names."""

            FAST = "fast"

        value = {"b": {3, 1, 2}, "a": (1, 2.5, None, True), "c": np.float32(0.5), "d": Path("x/y"), "e": Mode.FAST}
        assert canonical_json(value) == '{"a":[1,2.5,null,true],"b":[1,2,3],"c":0.5,"d":"x/y","e":"fast"}'

    def test_objects_without_a_stable_text_are_refused(self) -> None:
        with pytest.raises(StoreError, match=r"extra\.inner\.hook: .*'function'"):
            canonical_json({"inner": {"hook": lambda: None}})


class FakePreferences:
    """A tokenised preference set, and a reference pass over it that counts what it has to score."""

    def __init__(self, store: ReferenceStore) -> None:
        self.store = store
        self.num_scored = 0

    def logps(self, model: LlamaForCausalLM, pairs: list[tuple[list[int], list[int]]]) -> list[npt.NDArray[np.float32]]:
        """Return per-token log-probs of each (prompt, completion), scoring only what the store lacks."""
        weights = model_weights_key(model, FP32)
        keys = [sequence_key(p + c, [0] * len(p) + [1] * len(c)) for p, c in pairs]
        known = dict(self.store.get_many(weights, keys))
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        self.num_scored += len(missing)
        new = {key: self.score(model, *pair) for key, pair in missing.items()}
        self.store.put_many(weights, new)
        return [(known | new)[key] for key in keys]

    @staticmethod
    def score(model: LlamaForCausalLM, prompt: list[int], completion: list[int]) -> npt.NDArray[np.float32]:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        values: npt.NDArray[np.float32] = logps[len(prompt) - 1 :].numpy()
        return values


class TestReuseAcrossRuns:
    """What TRL's precomputed reference log-probs get wrong, in both directions."""

    pairs: ClassVar[list[tuple[list[int], list[int]]]] = [
        ([1, 2, 3], [4, 5, 6, 7]),
        ([1, 2, 3], [8, 9]),
        ([3, 1], [2, 2, 2]),
    ]

    def test_nothing_known_is_scored_again(self, tmp_path: Path) -> None:
        # A new beta, learning rate or output folder is a new run over the same model and rows: it asks the same
        # question of the store, in whatever order, from whatever process.
        with ReferenceStore(tmp_path) as store:
            run = FakePreferences(store)
            first = run.logps(tiny_llama(), self.pairs)
            assert run.num_scored == 3
        with ReferenceStore(tmp_path) as store:
            run = FakePreferences(store)
            again = run.logps(tiny_llama(), self.pairs[::-1])
            assert run.num_scored == 0
            for one, two in zip(first, again[::-1], strict=True):
                np.testing.assert_array_equal(one, two)
            run.logps(tiny_llama(), [([9, 9], [1]), *self.pairs])
            assert run.num_scored == 1  # the row that was added

    def test_truncation_never_hits_values_of_the_longer_row(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            run = FakePreferences(store)
            (whole,) = run.logps(tiny_llama(), [([1, 2, 3], [4, 5, 6, 7])])
            for prompt, completion in (
                ([1, 2, 3], [4, 5, 6]),  # max_length cuts the end
                ([3], [4, 5, 6, 7]),  # keep_end cuts the start: the same completion after another prompt
                ([1, 2], [3, 4, 5, 6, 7]),  # the same tokens, one more of them scored
            ):
                before = run.num_scored
                (cut,) = run.logps(tiny_llama(), [(prompt, completion)])
                assert run.num_scored == before + 1
                np.testing.assert_array_equal(cut, run.score(tiny_llama(), prompt, completion))
                assert cut.shape != whole.shape or not np.array_equal(cut, whole)

    def test_length_weighting_can_change_without_scoring_again(self, tmp_path: Path) -> None:
        # LD-DPO weighs tokens beyond the shorter completion by alpha: any alpha follows from values per token.
        with ReferenceStore(tmp_path) as store:
            run = FakePreferences(store)
            for alpha in (1.0, 0.5, 0.0):
                long, short = run.logps(tiny_llama(), self.pairs[:2])
                direct = run.score(tiny_llama(), *self.pairs[0])
                expected = direct[: len(short)].sum() + alpha * direct[len(short) :].sum()
                assert long[: len(short)].sum() + alpha * long[len(short) :].sum() == expected
            assert run.num_scored == 2

    def test_other_weights_never_hit(self, tmp_path: Path) -> None:
        with ReferenceStore(tmp_path) as store:
            run = FakePreferences(store)
            run.logps(tiny_llama(0), self.pairs)
            run.logps(tiny_llama(1), self.pairs)
            assert run.num_scored == 6
