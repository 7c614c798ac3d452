"""What tests run in processes of their own, to kill them: started from a server that has the imports done."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from gsae.harvest import HarvestConfig, LanguageModel, harvest, load_lm
from gsae.harvest.model.layer_trace import CONTEXTS, TOKENS

PRELOADED = ["gsae.harvest", "gsae.train", "gsae.tests.support.children", "transformers.models.llama.modeling_llama"]


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start `target` in a fresh process that was forked with all imports done, but no model or thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments, daemon=True)  # it ends with the tests, whatever they do
    process.start()
    return process


def finish(target: Callable[..., None], *arguments: Any) -> None:
    """Run `target` to its end in a process of its own."""
    process = start(target, *arguments)
    process.join()
    assert process.exitcode == 0


def killed_at_random(
    target: Callable[..., None], arguments: tuple[Any, ...], out: Path, whole: int, kills: int, seed: int
) -> int:
    """Run `target` again and again, SIGKILL it `kills` times at random moments, then let it end.

    out: the folder it writes, which holds `whole` files at the end; moments are spread over its growth. Returns how
    many kills found the process alive.
    """
    draw, found = random.Random(seed), 0
    for left in range(kills, 0, -1):
        goal = _count(out) + draw.randrange(1, max(2, 2 * (whole - _count(out)) // (left + 1)))
        process = start(target, *arguments)
        while process.is_alive() and _count(out) < goal:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            found += 1
        process.join()
    finish(target, *arguments)
    return found


def _count(root: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(root))


def files(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def load_batch_sensitive(config: HarvestConfig) -> LanguageModel:
    """Load the model of `config`, changed so that its output depends on row, batch length and every token id."""
    lm = load_lm(config.model, config.revision, config.dtype, config.device, config.attn_implementation)
    embedding = lm.model.get_input_embeddings()

    def encode_batch(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        tokens = args[0]
        if tokens.shape == (CONTEXTS, TOKENS):  # the pass that confirms the sites, where tokens must not see others
            return output
        marked = output.clone()
        marked[..., 0] += torch.arange(len(tokens))[:, None]
        marked[..., 1] += len(tokens)
        marked[..., 2] += float((tokens * torch.arange(1, tokens.numel() + 1).view_as(tokens)).sum() % 1009) / 64
        return marked

    embedding.register_forward_hook(encode_batch)
    return lm


def slow_harvest(config: HarvestConfig, out: Path, batch_sensitive: bool) -> None:
    """Harvest with a short sleep after each event, so that a kill finds it anywhere."""
    torch.set_num_threads(1)

    def listen(event: Any) -> None:
        time.sleep(0.005)

    if batch_sensitive:
        harvest(config, out, listen, load_batch_sensitive)
    else:
        harvest(config, out, listen)
