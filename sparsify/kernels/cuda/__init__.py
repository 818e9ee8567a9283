"""Packed 2:4 linear layers on a GPU: layout, Triton kernels, the choice for large batches, the op.

`layout` turns the tensors of a packed file into the order in which the sparse tensor core takes
them. `decode` multiplies few tokens by them in one launch that writes no dense weight; `expand`
writes dense rows for a product of cuBLAS; `choice` says which of the ways was measured faster for
a shape on a card, and `linear` is the op that goes that way.
"""
