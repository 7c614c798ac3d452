"""What an exporter gets: where an SAE, its features and its store are. Each exporter opens only what it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsae.store import Store, StoreSet, open_stores
from gsae.train import stores_of


@dataclass(frozen=True)
class ExportSource:
    """An SAE to export.

    sae: the folder of the saved SAE. features: its folder of `gsae features`, which may not exist. run: the run's
    folder. stores: where its stores are, if they have moved.
    """

    sae: Path
    features: Path
    run: Path
    stores: Sequence[str | Path] = ()

    @classmethod
    def find(cls, path: Path, stores: Sequence[str | Path] = ()) -> "ExportSource":
        """Return the source that RUN/NAME names, or the folder of any saved SAE."""
        in_run = path.parent / "saes" / path.name
        sae = in_run if in_run.is_dir() else path
        return cls(sae, path.parent / "features" / path.name, path.parent, stores)

    def open_store(self) -> Store | StoreSet:
        """Open the store that the SAE was trained from."""
        return open_stores(list(self.stores) or stores_of(self.run))
