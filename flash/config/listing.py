"""Every field of a configuration by its dotted name, for help and for errors."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flash.config.run import Config


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name, sections before what they hold.

    Of a section with variants, each of which has fields of its own: the fields of all.
    """
    for name, info in model.model_fields.items():
        yield prefix + name, info
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        elif info.discriminator is not None:
            yield from _fields_of_variants(variants(info), f"{prefix}{name}.")


def variants(info: Any) -> dict[str, type[BaseModel]]:
    """The models that a section with variants may be, by the name that chooses them."""
    return {kind.model_fields["name"].default: kind for kind in get_args(info.annotation)}


def _fields_of_variants(
    kinds: Mapping[str, type[BaseModel]], prefix: str
) -> Iterator[tuple[str, Any]]:
    """Each once, with the variants that have it in its description; no default if they differ."""
    name = FieldInfo(annotation=str, description=f"one of {', '.join(sorted(kinds))}")
    yield f"{prefix}name", name
    owners: dict[str, list[str]] = {}
    for kind, model in kinds.items():
        for field in model.model_fields:
            owners.setdefault(field, []).append(kind)
    for field in sorted(owners.keys() - {"name"}):
        infos = [kinds[kind].model_fields[field] for kind in owners[field]]
        merged = FieldInfo(annotation=infos[0].annotation)
        meanings: dict[str, list[str]] = {}
        for kind, info in zip(owners[field], infos, strict=True):
            meanings.setdefault(str(info.description), []).append(kind)
        merged.description = "; ".join(f"{', '.join(of)}: {what}" for what, of in meanings.items())
        if len({repr(info.default) for info in infos}) == 1:
            merged.default = infos[0].default
        yield prefix + field, merged
