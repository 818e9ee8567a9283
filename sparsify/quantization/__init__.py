"""Integers for weights, every zero left in place."""
