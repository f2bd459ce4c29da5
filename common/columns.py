"""`field=column,...` on the command line: which column of a file holds what."""

from __future__ import annotations

from common.cli import UserError


def column_mapping(text: str | None, option: str) -> dict[str, str]:
    """Field -> column.

    Raises:
        UserError: the text reads otherwise.
    """
    found = {}
    for each in text.split(",") if text else ():
        field, equals, column = each.partition("=")
        if not equals or not column:
            raise UserError(f"{option} {each!r} must read field=column, such as item=Sku,text=Title")
        found[field.strip()] = column.strip()
    return found
