"""Tokenizer and language model of the demo, made from nothing but the corpus and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def build_tokenizer(corpus: Sequence[str], vocab_size: int = 800) -> Any:
    """Trains a byte-level BPE tokenizer that puts BOS in front of every text.

    Args:
        corpus: Texts to train on.
        vocab_size: Upper limit of the vocabulary; 256 bytes and three special tokens are always in it.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with pad, bos and eos tokens; every text survives a round trip.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, seed: int, hidden_size: int = 128, num_layers: int = 2) -> Any:
    """A small Llama with random weights; the global random state is left as it was.

    Args:
        tokenizer: Gives vocabulary size and special ids.
        seed: Of the weights.
        hidden_size: Width; heads have 32 dimensions.
        num_layers: Depth.

    Returns:
        A `transformers.LlamaForCausalLM` in fp32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # A narrow model starts to learn sooner from larger weights than the default of 0.02.
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
