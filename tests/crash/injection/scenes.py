"""The scenes that a victim plays: between them they have the package make every system call that it makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.crash.injection import kernel_scenes, pager_scenes, protocol_scenes, region_scenes, writing_scenes
from tests.crash.injection.region_scenes import PATTERN, change, files, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.injection.trial import Trial

__all__ = ["SCENES", "afterwards", "prepare"]


def afterwards(trial: Trial) -> None:
    """What must work again when nothing fails any more."""
    files(trial)
    for region in trial.region("pattern", lambda: PATTERN, "c"):
        change(trial, "pattern", region)


SCENES: dict[str, Callable[[Trial], None]] = {
    scene.__name__: scene
    for scene in (
        *(region_scenes.first, region_scenes.files, region_scenes.others, region_scenes.failing),
        region_scenes.crowded,
        *(pager_scenes.kill_worker, pager_scenes.kill_supervisor, pager_scenes.suspect, pager_scenes.fork),
        *(protocol_scenes.protocol, protocol_scenes.reserve, protocol_scenes.export),
        *(writing_scenes.write_back, writing_scenes.kill_writer),
        *(kernel_scenes.probe, kernel_scenes.kernel),
        *(pager_scenes.crash, pager_scenes.flap, pager_scenes.stop_worker, pager_scenes.stop_supervisor),
    )
}
"""By name; those that take long come last."""
