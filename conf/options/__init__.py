"""One file for each group of options; an option's default, range and help stand at its field."""
