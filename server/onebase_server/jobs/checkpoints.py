"""The trainer's checkpoints as models: each whole one is published as a version that clients can name, three are kept.

The order is publish, record, and only once the record has forgotten an old one, remove: what is listed can be called.
Done again after a crash it changes nothing: a checkpoint is known by its alias in the store. Writes no record.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from onebase.adapter import CONFIG, WEIGHTS
from onebase.bases import BaseSpec
from onebase.errors import Conflict, ModelNotFound, OnebaseError
from onebase.store import AdapterStore, Version
from onebase_server.jobs.names import checkpoint_name
from onebase_server.jobs.run_folder import RunFolder
from onebase_server.records.jobs import NewCheckpoint
from onebase_server.records.tables import JobRow

logger = logging.getLogger(__name__)

KEPT = 3
FindBase = Callable[[str], BaseSpec]
"""A base by the path or id that a recipe names. Raises OnebaseError."""
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


class Checkpoints:
    """Of one run. `known`: step -> `name@version` of those that are recorded already."""

    def __init__(
        self, job: JobRow, folder: RunFolder, store: AdapterStore, find_base: FindBase, known: Mapping[int, str]
    ) -> None:
        self._job = job
        self._work = folder.work
        self._store = store
        self._find_base = find_base
        self._served = dict(known)
        self._done: set[int] = set()
        """Steps not to look at again: too old, or can't be served."""
        self._clean = False
        """Whether the store holds none but those that are served: a crash may have left more."""

    def find_new(self) -> list[tuple[int, Path]]:
        """The step and folder of those that the trainer has finished and that are not published yet, oldest first."""
        found = finished_checkpoints(self._work)
        return [(step, path) for step, path in found if step not in self._served and step not in self._done]

    async def publish(
        self,
        found: Sequence[tuple[int, Path]],
        metrics: Mapping[int, Mapping[str, float]],
        published: Callable[[NewCheckpoint], None],
    ) -> None:
        """Publish what was found, and tell of each."""
        for step, path in found:
            alias = checkpoint_name(self._job.fine_tuned_model or "", step)
            try:
                version = await asyncio.to_thread(self._publish, path, alias)
            except FileNotFoundError:  # the trainer has rotated it away meanwhile
                continue
            except OnebaseError as error:
                logger.warning("checkpoint %d of %s can't be served: %s", step, self._job.id, error)
                self._done.add(step)
                continue
            self._served[step] = version.id
            published(NewCheckpoint(step, alias, version.id, {"step": float(step), **metrics.get(step, {})}))

    @property
    def outdated(self) -> list[int]:
        """Steps that no record may name any more, before `remove_outdated`."""
        return sorted(self._served)[:-KEPT]

    async def remove_outdated(self) -> None:
        """Take all but the newest out of the store, and what a crash has left there between record and removal."""
        for step in self.outdated:
            self._done.add(step)
            del self._served[step]
            self._clean = False
        if not self._clean:
            await asyncio.to_thread(self._remove_all_but, set(self._served))
            self._clean = True

    def _remove_all_but(self, steps: set[int]) -> None:
        entry = self._store.get(self._job.adapter)
        kept = {checkpoint_name(self._job.fine_tuned_model or "", step) for step in steps}
        all_of_them = checkpoint_name(self._job.fine_tuned_model or "", "")
        for alias in entry.aliases if entry is not None else ():
            if alias.startswith(all_of_them) and alias not in kept:
                try:
                    self._store.remove(alias)
                except (ModelNotFound, Conflict):  # removed by hand, or somebody serves it: then it stays
                    continue

    def _publish(self, path: Path, alias: str) -> Version:
        try:
            return self._store.resolve(alias)  # published before a crash
        except ModelNotFound:
            base = self._find_base(self._job.recipe["base"])
        return self._store.publish(
            path,
            self._job.adapter,
            base=base.identity,
            prompt_format=self._job.recipe["data"].get("prompt_format", "human_response"),
            training={"job": self._job.id},
            aliases=[alias],
            base_shapes=base.linear_shapes,
            make_current=False,
            same_base=True,
        )


def finished_checkpoints(work: Path) -> Iterator[tuple[int, Path]]:
    """The step and folder of every whole checkpoint, oldest first."""
    if not work.is_dir():
        return
    found = [(int(match[1]), path) for path in work.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    for step, path in sorted(found):
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            yield step, path
