"""Completion of `python -m jobs.<name> ...` in a shell: Hydra's own script knows only files."""

from __future__ import annotations

import os
import re

_BASH_COMPLETION = """\
_twofour_complete() {
    [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == jobs.* ]] || return
    local choices
    choices=$(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT \\
        "${COMP_WORDS[0]}" -m "${COMP_WORDS[2]}" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _twofour_complete python"""


def completed(words: list[str]) -> bool:
    """Print the script for bash, if asked for it; else make Hydra's answer fit `python -m`."""
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = re.sub(r"^\S+ +-m +jobs\.\w+", "jobs", line)
    if words == ["install=bash"]:
        print(_BASH_COMPLETION)
    return words == ["install=bash"]
