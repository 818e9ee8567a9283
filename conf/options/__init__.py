"""One file for each group of options; an option's default, range and help are at its field."""
