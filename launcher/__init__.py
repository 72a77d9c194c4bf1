"""Slipway: recipe-driven fine-tuning of language models on Ray and DeepSpeed."""

__version__ = "0.1.0"
