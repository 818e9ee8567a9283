"""From words of a command line to a typed, checked config; the only place that knows Hydra."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from conf.options.pretrain import PretrainConfig
from conf.options.teach import TeachJobConfig
from conf.options.tokenize import TokenizeJobConfig
from conf.schema import ALIASES, Config, to_dict
from jobs.cli.options import CONF_DIR, Override, config_class, parse_overrides
from sparsify.errors import InputError

if TYPE_CHECKING:
    pass

AnyConfig = Config | PretrainConfig | TokenizeJobConfig | TeachJobConfig

_TYPE_WORDS = {
    "int": "a whole number such as 8 or 1_000_000",
    "float": "a number such as 0.5 or 1e-4",
    "bool": "true or false",
    "list[str]": "a list in brackets such as [a,b] or []",
}


def load_config(job: str, overrides: list[str]) -> AnyConfig:
    """The checked config of a job: its YAML, then the cluster's, then the overrides.

    Args:
        job: one of the jobs.
        overrides: `key=value` words, and at most one `+cluster=NAME` (without one: local).

    Raises:
        InputError: an unknown key, cluster or stage, a wrong type, or a rule that is broken.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cluster, parsed = parse_overrides(job, overrides)
    words = [_to_hydra(override) for override in parsed]
    if job != "pretrain":
        words.append(f"+cluster={cluster or 'local'}")
    schema = config_class(job)
    try:
        with initialize_config_dir(str(CONF_DIR.resolve()), job_name=job, version_base="1.3"):
            composed: Any = OmegaConf.to_container(
                compose(job, overrides=words), resolve=True, throw_on_missing=True
            )
        if schema in (
            TokenizeJobConfig,
            TeachJobConfig,
        ):  # presets and prune.yaml set other groups too
            used = {field.name for field in fields(schema)}
            composed = {key: value for key, value in composed.items() if key in used}
        typed = OmegaConf.merge(OmegaConf.structured(schema), _field_names(composed))
        config: AnyConfig = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"config of {job}: {one_line(error)}") from error
    except InputError:
        raise
    except ValueError as error:  # the rules of ClusterSpec, which does not know sparsify's errors
        raise InputError(one_line(error)) from error
    return config


def _to_hydra(override: Override) -> str:
    """The override with its value checked against the option's type, in Hydra's grammar.

    Text is quoted, so that Hydra keeps it as it was typed: 007 stays 007, a path may hold spaces
    and parentheses. Everything else is parsed here, because later `yes` would pass for true.
    """
    option, text = override.option, override.text
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if option.type == "str" and text != "null" and not quoted:
        escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text)
        return f'{option.key}="{escaped}"'
    value = _parse(option.key, text)
    if _fits(value, option.type) or (value is None and option.optional):
        return f"{option.key}={text}"
    if isinstance(value, float) and option.type == "int" and value.is_integer():
        return f"{option.key}={int(value)}"  # 1e9 is a whole number, spelled shortly
    wanted = _TYPE_WORDS.get(option.type, "text") + (" or null" if option.optional else "")
    fix = ""
    if option.type == "list[str]" and re.fullmatch(r"[\w.*/,-]+", text):
        fix = f"; write '{option.key}=[{text}]'"
    raise InputError(f"{option.key}={text}: must be {wanted}{fix}")


def _fits(value: Any, type_name: str) -> bool:
    if isinstance(value, str) and value.startswith("${"):
        return True  # an interpolation: OmegaConf checks what it becomes
    if type_name == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if type_name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if type_name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if type_name == "bool" else str)


def _parse(key: str, text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
        value = parsed.value()
    except (HydraException, ValueError) as error:
        raise InputError(
            f"{key}={text}: cannot be read ({one_line(error)}); put double quotes around text "
            f"with special signs, such as '{key}=[\"a(b)\"]'"
        ) from error
    return value.text if isinstance(value, QuotedString) else value


def _field_names(node: Any) -> Any:
    """Nested values with the names of YAML turned into the names of the dataclass fields."""
    if isinstance(node, dict):
        return {ALIASES.get(key, key): _field_names(value) for key, value in node.items()}
    return node


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def print_config(config: AnyConfig) -> None:
    """Print every value as YAML."""
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), end="")
