"""The packed format, version 2: what it holds, how one layer is packed, and folders of it.

docs/formats.md describes the files to the byte.
"""
