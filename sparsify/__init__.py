"""Maths, models and formats of sparse language models; torch, transformers, safetensors alone."""
