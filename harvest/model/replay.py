"""Passes that differ from one before from some block on: the blocks up to there return what they returned then."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from gsae.store import SiteSpec

from .module_values import skipping

NUMBERED = re.compile(r"(.+?)\.(\d+)(?:\.|$)")  # the list of blocks and a number in it, as in model.layers.10.mlp


def blocks_around(model: nn.Module, site: SiteSpec) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks that run before the one of a site, and the others; none where the site is in no block."""
    found = NUMBERED.match(site.module)
    blocks = list(model.get_submodule(found[1]).children()) if found else []
    number = int(found[2]) if found else 0
    return blocks[:number], blocks[number:]


@contextmanager
def recording(blocks: Sequence[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Put what each block returns into `outputs` meanwhile."""
    with ExitStack() as hooks:
        for block in blocks:
            handle = block.register_forward_hook(lambda module, args, output: outputs.__setitem__(module, output))
            hooks.callback(handle.remove)
        yield


@contextmanager
def replaying(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let blocks return their recorded outputs meanwhile, without computing anything."""
    with ExitStack() as skipped:
        for block in outputs:
            skipped.enter_context(skipping(block, partial(outputs.__getitem__, block)))
        yield
