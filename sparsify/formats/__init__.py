"""Files and folders of sparse models: written, read, checked."""
