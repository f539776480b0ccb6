"""Megatron-LM's checkpoints: AscendSpeed's, Megatron-LM's and Megatron-core's names."""
