"""Training: one loop for pretraining, fine-tuning and LoRA; its loss, optimizers, checkpoints and reports."""
