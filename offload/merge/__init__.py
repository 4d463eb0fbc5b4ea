"""The flagship: many growing files in, one packet file out, and out of it again.

`offload.merge(sources, output, …)` is an `EmbeddedMerge`: a merge beside a block of your program. As the room has the
name that the function would have, the room itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedded import EmbeddedMerge


class _Room(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> EmbeddedMerge:
        from .embedded import EmbeddedMerge

        return EmbeddedMerge(*args, **options)


sys.modules[__name__].__class__ = _Room
