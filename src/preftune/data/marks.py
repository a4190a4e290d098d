"""Marks of chat templates: in the text of a row they are left over from another template, or an attack."""

from __future__ import annotations

MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>"),
    *("<extra_id_1>", "<|start_of_role|>", "<|turn>", "<\uff5cUser\uff5c>"),
)
