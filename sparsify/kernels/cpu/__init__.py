"""Packed 2:4 linear layers on a CPU, computed from their survivors without a dense copy.

`layout` turns the tensors of a packed file into what the kernels read, `linear` multiplies, and
`library` compiles and loads the C++ of `source`. Where that cannot be done, `reference` computes
the same in PyTorch, slower.
"""
