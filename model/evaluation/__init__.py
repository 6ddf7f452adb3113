"""Measures a model's pictures: held-out prompts, a checker that reads pictures, scores with confidence intervals."""
