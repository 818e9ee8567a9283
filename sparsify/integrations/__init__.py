"""Other libraries that load packed folders: importing this makes transformers one of them.

After `import sparsify.integrations`, `AutoModelForCausalLM.from_pretrained(PACKED)` gives a model
whose linear layers hold the packed tensors. A library that wants to be told is told here, on
purpose by an import: that is the only door transformers has.
"""

from sparsify.integrations import quantizer as quantizer
