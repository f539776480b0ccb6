"""Text in and out of a checkpoint: tokenizer, BOS rule, chat template and stop list as one object."""

from puna.tokenizer.tokenizer import Stream, Tokenizer

__all__ = ["Stream", "Tokenizer"]
