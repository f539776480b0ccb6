"""The LLaMA model: its configuration, its layers, and the rule by which it is split over ranks."""
