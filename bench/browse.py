"""Can 65,536 latents be browsed: how long is the folder in the making, and how soon is the table there?

Run as `.venv/bin/python bench/browse.py [--latents N]`. Synthetic features as `gsae features` lays them out with its
default settings: 45 examples a latent, each in a context of 256 tokens with 8 rows that fire, 4,096 contexts, a
vocabulary of 50,000. The folder is made in a process of its own; its peak resident size beyond what it had before
is compared with that for an eighth of the latents. In headless Chromium, on pages that were never loaded before: time
from the address to the first rows, to sort, to filter, and to a latent's page. Met when the table is there in under
2 seconds (the median of 5) and eight times the latents take less than twice the memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

SECONDS, TIMES, GROUP = 2.0, 5, 1024
CONTEXTS, CONTEXT_SIZE, WORDS, EXAMPLES, FIRING = 4096, 256, 50_000, 45, 8
ROWS = CONTEXTS * CONTEXT_SIZE
TYPED = "const f = document.querySelector('[name=find]'); f.value = 'word1234'; f.dispatchEvent(new Event('input'))"


def main() -> int:
    """Print one JSON line a size and for Chromium, and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    with tempfile.TemporaryDirectory() as name:
        built = []
        for latents in (options.latents // 8, options.latents):
            run = Path(name) / str(latents)
            write_features(run / "features" / "wide", latents)
            command = [sys.executable, __file__, "--child", str(run)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            built.append({"latents": latents} | json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(built[-1]), flush=True)
        seen = look(run / "browser", options.latents)
    print(json.dumps(seen), flush=True)
    growth = round(built[1]["peak_bytes"] / built[0]["peak_bytes"], 2)
    met = seen["seconds_to_table"] < SECONDS and growth < 2
    print(json.dumps({"bench": "browse", "met": met, "memory_growth": growth, **built[1], **seen}))
    return 0 if met else 1


def child(run: Path) -> int:
    """Make the browser of a run's features, and print what it took."""
    from gsae.features.browse.site import build_browser
    from gsae.tests.support.peak import forget_peak, peak_bytes

    forget_peak()
    before, start = peak_bytes(), time.perf_counter()
    out = build_browser(run)
    seconds = time.perf_counter() - start
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    found = {"build_seconds": round(seconds, 1), "peak_bytes": peak_bytes() - before}
    print(json.dumps(found | {"files": len(sizes), "bytes": sum(sizes), "largest_file_bytes": max(sizes)}))
    return 0


def look(folder: Path, latents: int) -> dict[str, Any]:
    """Return medians of what a reader waits for, in seconds."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    from gsae.features.browse.serving import Server
    from gsae.tests.support.chromium import chromium

    driver = chromium(folder.parent / "profile")

    def waited(start: float, selector: str) -> float:
        found = lambda b: b.find_elements(By.CSS_SELECTOR, selector)  # noqa: E731
        WebDriverWait(driver, 60, poll_frequency=0.01).until(found)
        return time.perf_counter() - start

    def acted(script: str) -> float:
        """Seconds until the page is drawn again after a script."""
        drawn = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 0))"
        start = time.perf_counter()
        driver.execute_script(script)
        driver.execute_async_script(drawn)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {}
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for i in range(TIMES):
            driver.get("about:blank")
            driver.execute_cdp_cmd("Network.clearBrowserCache", {})
            start = time.perf_counter()
            driver.get(server.url)
            times.setdefault("table", []).append(waited(start, ".body .row"))
            sort = acted("document.querySelector('.head .max button').click()")
            times.setdefault("sort", []).append(sort)
            times.setdefault("filter", []).append(acted(TYPED))
            start = time.perf_counter()
            driver.execute_script(f"location.hash = '#/0/f/{(i + 1) * latents // (TIMES + 1)}'")
            times.setdefault("latent", []).append(waited(start, ".example"))
        server.shutdown()
    driver.quit()
    return {f"seconds_to_{name}": round(statistics.median(each), 3) for name, each in times.items()}


def write_features(folder: Path, latents: int) -> None:
    """Write features of random figures."""
    import pyarrow as pa

    from gsae.features.find.parquet import (
        examples_schema,
        latents_schema,
        ragged,
        write_contexts,
        write_vocabulary,
        writing,
    )

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def listed(values: Any, each: int, kind: Any) -> Any:
        flat = np.asarray(values).reshape(-1)
        return ragged([each] * (len(flat) // each), flat, kind)

    i32, f32 = pa.int32(), pa.float32()
    with (
        writing(folder / "latents.parquet", latents_schema()) as latents_file,
        writing(folder / "examples.parquet", examples_schema()) as examples_file,
    ):
        for first in range(0, latents, GROUP):
            n = min(GROUP, latents - first)
            rows = rng.integers(1, 5000, n)
            figures: dict[str, Any] = {"latent": np.arange(first, first + n, dtype=np.int32), "rows": rows}
            figures |= {"density": rows / ROWS, "max": rng.random(n, np.float32) + 5, "mean": rng.random(n, np.float32)}
            figures["histogram"] = listed(rng.integers(0, 100, (n, 50)), 50, pa.int64())
            figures["quantile_edges"] = listed(np.sort(rng.random((n, 6), np.float32) * 5), 6, f32)
            figures["top_token"] = rng.integers(0, WORDS, n).astype(np.int32)
            for ids, values, each, below in (
                ("neighbours", "cosines", 8, latents),
                ("promoted", "promoted_logits", 10, WORDS),
                ("suppressed", "suppressed_logits", 10, WORDS),
            ):
                figures[ids] = listed(rng.integers(0, below, (n, each)), each, i32)
                figures[values] = listed(rng.random((n, each), np.float32), each, f32)
            latents_file.write_table(pa.table(figures, schema=latents_schema()))
            at = np.sort(rng.integers(0, CONTEXT_SIZE, (n * EXAMPLES, FIRING)), axis=1)
            kinds = ["top"] * 20 + ["sample"] * 25
            shown: dict[str, Any] = {"latent": np.repeat(figures["latent"], EXAMPLES), "kind": kinds * n}
            shown["quantile"] = ([None] * 20 + [q for q in range(5) for _ in range(5)]) * n
            shown["rank"] = ([*range(20)] + [*range(5)] * 5) * n
            shown["context"] = rng.integers(0, CONTEXTS, n * EXAMPLES)
            shown["position"] = at[:, 0].astype(np.int32)
            values = rng.random((n * EXAMPLES, FIRING), np.float32) * 5
            shown |= {
                "value": values[:, 0],
                "positions": listed(at, FIRING, i32),
                "values": listed(values, FIRING, f32),
            }
            examples_file.write_table(pa.table(shown, schema=examples_schema()))
    tokens = rng.integers(0, WORDS, (CONTEXTS, CONTEXT_SIZE)).astype(np.int32)
    write_contexts(folder / "contexts.parquet", [(np.arange(CONTEXTS), tokens)])
    write_vocabulary(folder / "vocabulary.parquet", [f" word{i}" for i in range(WORDS)])
    facts = {"schema": 1, "sae": "wide", "architecture": "gated", "d_in": 512, "d_sae": latents, "rows": ROWS}
    facts |= {"site": "mlp.1", "hook_name": "h", "model": "synthetic", "dataset": "synthetic", "store_digest": "d"}
    facts |= {"weights_sha256": "w", "context_size": CONTEXT_SIZE, "split": "heldout", "contexts": CONTEXTS}
    (folder / "features.json").write_text(json.dumps(facts | {"has_tokens": True, "has_logits": True}))


if __name__ == "__main__":
    sys.exit(main())
