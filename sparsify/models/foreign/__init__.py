"""Checkpoints of compressed-tensors, also of formats that nothing else reads, as dense tensors.

One file = one way in which a layer is stored: drop a module with READER in here. The folder is
listed, not a registry kept by hand; modules with an underscore belong to all of them.
"""

from sparsify.models.foreign._config import KEYS, ForeignConfig, find_config
from sparsify.models.foreign._folder import ForeignFolder

__all__ = ["KEYS", "ForeignConfig", "ForeignFolder", "find_config"]
