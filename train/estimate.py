"""What a run would take, before anything is begun: parameters, memory, work and the read rate it needs."""

from typing import Any

from gsae.store import Site

from .config import RunConfig

# Products with W_enc or W_dec in a step, in units of 2 * rows * d_in * d_sae flops: forward and backward.
PRODUCTS = {"gated": 7, "relu": 5}
VECTORS = {"gated": 3, "relu": 1}


def estimate(site: Site, run: RunConfig) -> dict[str, Any]:
    """Return the figures of `--dry-run` for a run on `site`, in bytes, flops and rows."""
    summary = site.moments.within(run.max_norm_multiple)
    saes = run.named_saes()
    weights = {str(sae.name): 2 * sae.d_sae * site.d_in for sae in saes}
    parameters = {str(sae.name): weights[str(sae.name)] + VECTORS[sae.arch] * sae.d_sae + site.d_in for sae in saes}
    widest_stack = sum(sae.d_sae for sae in saes)
    return {
        "site": site.name,
        "store_digest": site.store.digest,
        "rows": summary.rows,
        "rows_skipped": summary.skipped,
        "batch_size": run.batch_size,
        "steps": run.steps,
        "epochs": run.steps * run.batch_size / summary.rows,
        "parameters": parameters,
        # Weights, second moments and a gradient in float32, and two (rows, d_sae) buffers a step.
        "memory_bytes": 12 * sum(parameters.values()) + 8 * run.batch_size * widest_stack,
        "reading_memory_bytes": site.batches(
            run.batch_size, epochs=None
        ).memory,  # buffers; files are mapped beside them
        "flops_per_step": sum(PRODUCTS[sae.arch] * run.batch_size * weights[str(sae.name)] for sae in saes),
        "bytes_read_per_step": run.batch_size * site.raw_bytes // site.rows,
    }
