"""Packed folders in vLLM: a quantisation method that vLLM finds by its entry point.

`pip install twofour` beside vLLM is all: vLLM then calls `plugin.register` in each of its
processes. `plugin` is the one module that imports vLLM; `shares` is the arithmetic of who holds
what, and imports nothing of it.
"""
