"""The loops in which the time goes: the sweep over a weight's columns, the sums of products, and
the softmax work of a head.

Each module has one function per operation, which runs on any device. The modules whose names
start with an underscore hold Triton kernels; they are imported when a tensor on a GPU needs them.
"""
