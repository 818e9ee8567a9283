"""The loops in which the time goes: sweeps, searches, refits, sums of products, a head's softmax.

Each module has one function per operation, which runs on any device. The modules whose names
start with an underscore hold Triton kernels; they import without Triton, and say so when called.
"""
