"""The SAEs of a run, what each was trained on, and whether they can share one pass over the rows of a store.

A pass over rows is shared by SAEs of one site and one norm limit that were trained from this store. Everything else is
refused here, before a pass begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from gsae.errors import IncompatibleError, NotFoundError, UsageError
from gsae.store import Site, Split, Store, StoreSet
from gsae.train import SAE, SAEMetadata, load_sae

NEEDED = ("architecture", "site", "store_digest", "max_norm_multiple")  # fields of metadata.gsae


@dataclass(frozen=True)
class Input:
    """Which rows an SAE was trained on. norm_limit: rows of this norm or more are left out; inf for no limit."""

    site: str
    max_norm_multiple: float
    norm_limit: float

    def __str__(self) -> str:
        return f"site {self.site}, norm limit {self.norm_limit:.6g}"


@dataclass(frozen=True)
class RunSAE:
    """One SAE of a run, and how it was trained."""

    folder: Path
    sae: SAE
    trained: SAEMetadata
    architecture: str
    input: Input
    store_digest: str

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "RunSAE":
        """Load the SAE in `folder`. Raises IncompatibleError where its cfg.json does not say how it was trained."""
        sae = load_sae(folder).to(device)
        trained = SAEMetadata.model_validate(dict(sae.metadata))
        architecture, site, digest = trained.architecture, trained.site, trained.store_digest
        multiple = trained.max_norm_multiple
        if architecture is None or site is None or digest is None or multiple is None:
            missing = next(name for name in NEEDED if getattr(trained, name) is None)
            raise IncompatibleError(
                f"{folder / 'cfg.json'} does not say how its SAE was trained: metadata.gsae.{missing} is missing."
            )
        limit = inf if trained.norm_limit is None else trained.norm_limit
        return cls(folder, sae, trained, architecture, Input(site, multiple, limit), digest)


@dataclass(frozen=True)
class RunSAEs:
    """SAEs of a run by name, and the rows that they all take."""

    saes: Mapping[str, RunSAE]
    input: Input

    def loaded(self) -> dict[str, SAE]:
        """Return the SAEs alone, by name."""
        return {name: each.sae for name, each in self.saes.items()}


def sae_folders(run: Path, names: Sequence[str] = ()) -> list[Path]:
    """Return the folders of a run's SAEs (of `names`, if given), by name.

    Raises NotFoundError where the run has no SAEs, or none of a name in `names`.
    """
    folders = {path.parent.name: path.parent for path in sorted(run.glob("saes/*/cfg.json"))}
    if not folders:
        raise NotFoundError(f"{run} has no SAEs under saes/. Run `gsae train` with --out {run} first.")
    for name in names:
        if name not in folders:
            raise NotFoundError(f"{run} has no SAE {name!r}. It has {', '.join(folders)}.")
    return [folder for name, folder in folders.items() if not names or name in names]


def load_saes(run: Path, store: Store | StoreSet, names: Sequence[str] = (), device: str = "cpu") -> RunSAEs:
    """Load a run's SAEs (of `names`, if given) that share the passes over the rows of `store`.

    Raises NotFoundError as `sae_folders` does, and IncompatibleError where the SAEs take different rows, were trained
    from another store, or the store has several context sizes.
    """
    saes = {folder.name: RunSAE.load(folder, device) for folder in sae_folders(run, names)}
    return RunSAEs(saes, _common_input(run, saes, store))


def _common_input(run: Path, saes: Mapping[str, RunSAE], store: Store | StoreSet) -> Input:
    for name, each in saes.items():
        if each.store_digest != store.digest:
            raise IncompatibleError(
                f"{name} of {run} was trained from a store with digest {each.store_digest}, but {store.name} has "
                f"digest {store.digest}.\nPass the store that the SAE was trained from."
            )
    sizes = {each.plan.context_size for each in (store.stores if isinstance(store, StoreSet) else [store])}
    if len(sizes) > 1:
        raise IncompatibleError(
            f"Only stores of one context size can be evaluated together. {store.name} have {sorted(sizes)}."
        )
    inputs = {each.input: name for name, each in saes.items()}
    if len(inputs) > 1:
        (a, first), (b, second) = list(inputs.items())[:2]
        raise IncompatibleError(
            f"The SAEs of one run need the same site and norm limit. {first} of {run} has {a}; {second} has {b}."
        )
    return next(iter(inputs))


def rows_of_split(store: Store | StoreSet, site: str, split: Split) -> Site:
    """Return a site's rows of a split. Raises NotFoundError without the site, UsageError where the split is empty."""
    found = store.site(site, split=split)
    if found.rows == 0:
        remedy = " Harvest with --heldout above 0." if split == "heldout" else ""
        name = "held-out" if split == "heldout" else "train"
        raise UsageError(f"{store.name} has no {name} rows.{remedy}")
    return found


def site_of(run: Path) -> str:
    """Return the site that a run's SAEs were trained on, which the caller needs to load the language model."""
    return RunSAE.load(sae_folders(run)[0]).input.site


def check_run(run: Path, store: Store | StoreSet, names: Sequence[str] = (), split: Split = "heldout") -> str:
    """Return the site of a run's SAEs (of `names`, if given), after checking that they can run on a split of `store`.

    Call it before the language model is loaded. Raises what `load_saes` and `rows_of_split` raise.
    """
    site = load_saes(run, store, names).input.site
    rows_of_split(store, site, split)
    return site
