"""The prefix cache: full pages of computed tokens, found again by what they hold.

A page's key is a hash chain over the adapter version's digest and every token up to the page's end, so equal keys
mean equal KV. Names never enter a key: a new version under an old name shares nothing. An owner's name does, unless
owners share: how many tokens of a prompt were cached, and how soon it was answered, would tell one what another had
asked. Knows no sequences.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

PageKey = bytes


def root_key(digest: str | None, owner: str | None = None) -> PageKey:
    """Start of the chain for one adapter version, or for the bare base, and for one owner's prompts (None: shared)."""
    whose = b"" if owner is None else b"\0" + owner.encode()
    return blake2b((digest or "").encode() + whose, digest_size=16, person=b"onebase-kv").digest()


def extend_keys(keys: list[PageKey], root: PageKey, ids: Sequence[int], page_size: int) -> None:
    """Append to `keys` until every full page of `ids` has one."""
    start = len(keys) * page_size
    parent = keys[-1] if keys else root
    for begin in range(start, len(ids) - page_size + 1, page_size):
        parent = blake2b(array("i", ids[begin : begin + page_size]).tobytes(), digest_size=16, key=parent).digest()
        keys.append(parent)


class PrefixCache:
    """Page keys and the page that holds each. Which pages may be evicted is the pool's business."""

    def __init__(self) -> None:
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    def find(self, keys: Sequence[PageKey], limit: int) -> list[int]:
        """Pages of the longest cached prefix, at most `limit` of them."""
        pages = []
        page_of = self._page_of
        for index in range(min(limit, len(keys))):
            page = page_of.get(keys[index])
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, page: int, key: PageKey) -> None:
        """Offer a computed page. The first page of a key keeps it; a later twin stays private."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, page: int) -> None:
        """The page is about to hold something else."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def clear(self) -> list[int]:
        """Forget everything; the pages that were cached."""
        pages = list(self._key_of)
        self._page_of.clear()
        self._key_of.clear()
        return pages
