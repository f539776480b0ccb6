"""Text in and out of a checkpoint: tokenizer, BOS rule, chat template and stop list as one object."""

from puna.tokenizer.tokenizer import IncrementalDetokenizer, Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
