"""Which tokens end a generation: those that the checkpoint declares, and those that llama.cpp knows by their spelling.

GGUF has fields for three of them, and fine-tunes often declare one and write another. Source of the spellings:
llama.cpp, src/llama-vocab.cpp, `special_eog_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken

END_SPELLINGS = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "</s>", "<end_of_turn>",
    "<eos>", "<EOT>", "_<EOT>", "▁<EOT>", "[EOT]", "[EOS]", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# A spelling is ignored where the others show a format that uses it inside an answer.
EXCEPT = (
    ("<|end|>", ("<|return|>", "<|call|>")),  # o200k_harmony
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("<|end|>", ("<|call|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
)


def spelled_ends(backend: tokenizers.Tokenizer) -> list[int]:
    """Ids of the added tokens that end a generation by their spelling, in the order of `END_SPELLINGS`."""
    ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    excluded = {text for text, others in EXCEPT if all(other in ids for other in others)}
    return [ids[text] for text in END_SPELLINGS if text in ids and text not in excluded]


def end_of_answer(text: str, answer: str, added: Mapping[int, AddedToken]) -> int | None:
    """The id of the added token that a rendered conversation has behind its last `answer`, None for anything else."""
    behind = text.rpartition(answer)[2].lstrip()
    fits = [(len(token.content), index) for index, token in added.items() if behind.startswith(token.content or "\0")]
    return max(fits)[1] if fits else None
