"""The importers of Ray: starting or joining it, running work on it, hearing its progress."""

import os

if "RAY_ADDRESS" not in os.environ:
    # A Ray on one machine needs no other address than 127.0.0.1, and then listens on it alone. Ray
    # reads this when it is imported; the name says what it does on Linux too.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
