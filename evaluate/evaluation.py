"""The eval.json of every SAE of a run: two passes over the held-out rows and one over their text.

All SAEs of a run share each batch of rows, and the clean and ablated passes of the language model. Everything in the
file follows from the SAE, the store and the model, so evaluating twice writes the same bytes.
"""

from math import isfinite
from pathlib import Path

from gsae.errors import UsageError
from gsae.store import Site, Store, StoreSet

from .eval_json import (
    EVAL,
    AllPositions,
    AllRows,
    Evaluation,
    LanguageModelLosses,
    WithoutLargest,
    write_evaluation,
)
from .events import Listen, Progress, ignore
from .heldout_documents import HeldoutDocuments
from .measurement import Measurement, NormBands
from .norms_pass import read_norms
from .per_document import per_document
from .ratio_errors import Estimate, ratio_of_sums
from .run_saes import RunSAE, RunSAEs, load_saes, rows_of_split
from .splice import EVERYWHERE, MEAN, Effects, Replacements, Spliced
from .spliced_documents import SplicedDocuments, choose_contexts, splice_documents

BATCH_ROWS = 4096
SCORES = ("ce_loss_score", "ce_loss_score_mean", "ce_loss_score_all_positions", "kl_div_score")


def evaluate(
    run: Path,
    store: Store | StoreSet,
    effects: Effects | None,
    contexts: int | None,
    listen: Listen = ignore,
    device: str = "cpu",
) -> list[Evaluation]:
    """Evaluate every SAE of a run on the held-out rows of `store`; write and return their eval.json.

    effects: the language model with the run's site, or None to leave out what needs it. contexts: the largest number of
    held-out contexts to run through it, or None for all. device: where the SAEs run.

    Raises NotFoundError (no SAEs, or the store lacks their site), IncompatibleError (the SAEs were trained from another
    store, or cannot share one pass) and UsageError (no held-out rows, or contexts below 1).
    """
    if contexts is not None and contexts < 1:
        raise UsageError(f"contexts is {contexts}: at least 1 held-out context is needed.")
    saes = load_saes(run, store, device=device)
    site = rows_of_split(store, saes.input.site, "heldout")
    heldout = HeldoutDocuments.of(store)
    measured = _measure(saes, site, heldout, store.plan.context_size, listen, device)
    spliced = None
    if effects is not None:
        mean = store.site(saes.input.site).moments.within(saes.input.max_norm_multiple).mean
        replacements = Replacements(saes.loaded(), mean, saes.input.norm_limit, device)
        chosen = choose_contexts(heldout.contexts, store.plan.seed, contexts)
        spliced = splice_documents(effects, replacements, store, heldout, chosen, listen)
    results = []
    for name, each in saes.saes.items():
        results.append(_evaluation(name, each, measured, spliced))
        write_evaluation(each.folder / EVAL, results[-1])
    return results


def _measure(
    saes: RunSAEs, site: Site, heldout: HeldoutDocuments, context_size: int, listen: Listen, device: str
) -> Measurement:
    """Count every held-out row."""
    limit = saes.input.norm_limit
    first = read_norms(site, limit, BATCH_ROWS, lambda done: listen(Progress("norms", done, site.rows)))
    measured = Measurement(saes.loaded(), first.mean, heldout.count, NormBands(limit, first.norm_cut), device)
    done = 0
    for sources, x in site.in_order(BATCH_ROWS):
        measured.add(x, heldout.of_contexts(sources // context_size))
        done += len(x)
        listen(Progress("rows", done, site.rows))
    return measured


def _evaluation(name: str, one: RunSAE, measured: Measurement, spliced: SplicedDocuments | None) -> Evaluation:
    """Return the contents of an SAE's eval.json."""
    found, cut = measured.saes[name], measured.norms.cut
    estimates = _row_estimates(name, measured) | (_model_estimates(name, spliced.sums) if spliced else {})
    return Evaluation(
        sae=name,
        architecture=one.architecture,
        d_in=one.sae.d_in,
        d_sae=one.sae.d_sae,
        l1_coefficient=one.trained.l1_coefficient,
        lr=one.trained.lr,
        seed=one.trained.seed,
        site=one.input.site,
        store_digest=one.store_digest,
        rows=found.kept.rows,
        rows_skipped=found.all.rows - found.kept.rows,
        max_norm_multiple=one.input.max_norm_multiple,
        steps=one.trained.steps,
        diverged=one.trained.diverged,
        diverged_because=one.trained.diverged_because,
        stopped=one.trained.stopped,
        **vars(found.kept.metrics()),
        dead=one.trained.dead,
        dead_rows=one.trained.dead_rows,
        silent=found.silent,
        dense=found.dense,
        density=found.density(),
        all_rows=AllRows(rows=found.all.rows, **vars(found.all.metrics())),
        without_largest=WithoutLargest(
            rows=found.below_cut.rows,
            norm_cut=cut if isfinite(cut) else None,
            **vars(found.below_cut.metrics()),
        ),
        **{key: estimates[key].value for key in SCORES if key in estimates},
        language_model=_losses(name, spliced) if spliced else None,
        standard_errors={key: estimate.error for key, estimate in estimates.items()},
        heldout_documents=int((measured.inputs.columns["rows"] > 0).sum()),
        per_document=per_document(name, measured, spliced),
    )


def _row_estimates(name: str, measured: Measurement) -> dict[str, Estimate]:
    """Return the metrics of the kept rows that are ratios of sums by document."""
    inputs, sums = measured.inputs.columns, measured.saes[name].sums.columns
    return {
        "l0": ratio_of_sums(sums["l0"], inputs["rows"]),
        "explained_variance": ratio_of_sums(sums["sse"], inputs["sst"]).complement(),
        "mse": ratio_of_sums(sums["sse"], inputs["rows"]),
        "gamma": ratio_of_sums(sums["square"], sums["cross"]),
    }


def _model_estimates(name: str, spliced: Spliced) -> dict[str, Estimate]:
    """Return scores, losses and divergences of an SAE in the language model, in the order of `standard_errors`."""
    scores = {
        "ce_loss_score": spliced.score(name),
        "ce_loss_score_mean": spliced.score(name, MEAN),
        "ce_loss_score_all_positions": spliced.score(name, EVERYWHERE),
        "kl_div_score": spliced.divergence_score(name),
    }
    return scores | spliced.means(name)


def _losses(name: str, spliced: SplicedDocuments) -> LanguageModelLosses:
    """Return mean losses and divergences of the language model with an SAE."""
    sums = spliced.sums
    return LanguageModelLosses(
        contexts=spliced.contexts,
        documents=len(spliced.documents),
        tokens=int(sums.tokens.sum()),
        **{key: estimate.value for key, estimate in sums.means(name).items()},
        all_positions=AllPositions(
            tokens=int(sums.tokens_after.sum()),
            **{key: estimate.value for key, estimate in sums.means_after(name).items()},
        ),
    )
