"""Fast forms of the model's operations, each beside the plain torch form that it must equal."""
