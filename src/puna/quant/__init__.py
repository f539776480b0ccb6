"""Quantisation schemes: how a linear layer's weight is stored and multiplied, one record each."""
