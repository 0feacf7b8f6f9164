"""KV pages: who holds each, which are free, which may be evicted. Numbers only; the tensors are the runner's.

A page is free, held (references > 0), or idle: held by nobody but still in the prefix cache, and evicted oldest
first when the free ones run out.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from onebase_server.engine.prefix_cache import PageKey, PrefixCache


class PagePool:
    """All pages of one runner. Engine thread only."""

    def __init__(self, num_pages: int, *, prefix_cache: bool = True) -> None:
        self.num_pages = num_pages
        self.num_evicted = 0
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._cache = PrefixCache() if prefix_cache else None

    @property
    def is_caching(self) -> bool:
        return self._cache is not None

    @property
    def num_available(self) -> int:
        """Pages that `take` can give now."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def take(self) -> int | None:
        """A page for one holder, evicting the page idle longest if need be; None if all are held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self.num_evicted += 1
        else:
            return None
        self._references[page] = 1
        return page

    def find(self, keys: Sequence[PageKey], limit: int) -> list[int]:
        """Cached pages of a prefix, not held yet: `share` them before anything else is taken."""
        return self._cache.find(keys, limit) if self._cache is not None else []

    def count_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` would stop being available if they were shared."""
        return sum(1 for page in pages if self._references[page] == 0)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. The end of a prefix becomes idle first, so that it is evicted before its start."""
        references, cache = self._references, self._cache
        for page in reversed(pages):
            references[page] -= 1
            assert references[page] >= 0, f"page {page} released too often"
            if references[page] == 0:
                if cache is not None and page in cache:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: PageKey) -> None:
        """The page is full and computed: others may share it."""
        if self._cache is not None:
            self._cache.insert(page, key)

    def clear_cache(self) -> None:
        """Forget all cached prefixes; idle pages become free."""
        if self._cache is not None:
            self._cache.clear()
            self._free.extend(self._idle)
            self._idle.clear()

    def _forget(self, page: int) -> None:
        assert self._cache is not None
        self._cache.forget(page)
