"""Sources: where a site's data came from and how the files were read, kept in its folder for later readings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from client.private_files import write_private
from common.events.layout import Layout

SOURCES = "sources.json"


@dataclass(frozen=True)
class Sources:
    """Where a site's data come from.

    Attributes:
        logs, catalog: files, as for `read_log` and `read_catalog`.
        format, catalog_format: of each; "auto" goes by the name.
        columns, catalog_columns: field -> column name or place, where names are not known ones.
        time_format: of the log's times, where they have no form that is known by itself.
        sure: whether times are taken as they are read, however odd.
        layout, catalog_layout: separator, quotes and encoding of text.
    """

    logs: Path
    catalog: Path
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    layout: Layout = field(default_factory=Layout)
    catalog_format: str = "auto"
    catalog_columns: Mapping[str, str] | None = None
    catalog_layout: Layout = field(default_factory=Layout)
    time_format: str | None = None
    sure: bool = False

    def save(self, folder: Path) -> None:
        """Writes `sources.json`, mode 0600."""
        fields = asdict(self)
        for name in ("logs", "catalog"):
            fields[name] = str(Path(fields[name]).expanduser().absolute())
        write_private(folder / SOURCES, (json.dumps(fields, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Sources:
        """What `save` wrote.

        Raises:
            FileNotFoundError: a site made before there was such a file has none.
        """
        fields = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
        for name in ("logs", "catalog"):
            fields[name] = Path(fields[name])
        for name in ("layout", "catalog_layout"):
            fields[name] = Layout(**fields[name])
        return cls(**fields)
