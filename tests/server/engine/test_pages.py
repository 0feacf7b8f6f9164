"""Pages are held, shared, kept for the prefix cache and evicted oldest first; keys tell versions apart."""

from onebase_server.engine.pages import PagePool
from onebase_server.engine.prefix_cache import PageKey, extend_keys, root_key


def keys_of(digest: str | None, ids: list[int], page_size: int = 4) -> list[PageKey]:
    keys: list[PageKey] = []
    extend_keys(keys, root_key(digest), ids, page_size)
    return keys


def fill(pool: PagePool, keys: list[PageKey]) -> list[int]:
    """Pages computed by one sequence, which then ends."""
    pages = []
    for key in keys:
        page = pool.take()
        assert page is not None
        pool.publish(page, key)
        pages.append(page)
    pool.release(pages)
    return pages


def test_a_key_stands_for_the_version_and_every_token_up_to_the_page_s_end() -> None:
    base = keys_of("a@1", list(range(12)))
    assert len(base) == 3
    assert keys_of("a@1", list(range(11))) == base[:2]
    assert not set(base) & set(keys_of("a@2", list(range(12))))
    assert not set(base) & set(keys_of(None, list(range(12))))
    changed = keys_of("a@1", [9, *range(1, 12)])
    assert not set(base) & set(changed)


def test_keys_grow_the_same_in_any_number_of_calls() -> None:
    keys: list[PageKey] = []
    for length in (3, 4, 9, 20):
        extend_keys(keys, root_key("a"), list(range(length)), 4)
    assert keys == keys_of("a", list(range(20)))


def test_a_prefix_is_found_up_to_the_first_page_that_differs() -> None:
    pool = PagePool(8)
    pages = fill(pool, keys_of("a", list(range(12))))
    assert pool.find(keys_of("a", [*range(8), 99, 99, 99, 99]), 10) == pages[:2]
    assert pool.find(keys_of("a", list(range(12))), 1) == pages[:1]
    assert pool.find(keys_of("b", list(range(12))), 10) == []


def test_idle_pages_are_evicted_least_recently_used_first_and_a_prefix_from_its_end() -> None:
    pool = PagePool(4)
    old = fill(pool, keys_of("a", list(range(8))))
    new = fill(pool, keys_of("b", list(range(8))))
    pool.share(old)
    pool.release(old)  # used again: now younger than `new`
    assert [pool.take() for _ in range(4)] == [new[1], new[0], old[1], old[0]]
    assert pool.take() is None
    assert pool.find(keys_of("a", list(range(8))), 10) == []
    assert pool.num_evicted == 4


def test_a_shared_page_is_free_only_when_its_last_holder_leaves() -> None:
    pool = PagePool(2)
    page = pool.take()
    assert page is not None
    pool.share([page])
    pool.release([page])
    assert pool.num_held == 1
    pool.release([page])
    assert pool.num_held == 0


def test_the_first_page_of_a_key_keeps_it_and_its_twin_is_private() -> None:
    pool = PagePool(4)
    keys = keys_of("a", list(range(4)))
    first, twin = pool.take(), pool.take()
    assert first is not None
    assert twin is not None
    pool.publish(first, keys[0])
    pool.publish(twin, keys[0])
    assert pool.find(keys, 1) == [first]
    pool.release([twin])
    assert pool.find(keys, 1) == [first]
    pool.release([first])
    assert pool.num_idle == 1


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = PagePool(4, prefix_cache=False)
    fill(pool, keys_of("a", list(range(8))))
    assert pool.num_idle == 0
    assert pool.find(keys_of("a", list(range(8))), 10) == []


def test_clearing_the_cache_frees_what_was_idle_and_leaves_what_is_held() -> None:
    pool = PagePool(4)
    keys = keys_of("a", list(range(8)))
    held = fill(pool, keys)
    pool.share(held[:1])
    pool.clear_cache()
    assert (pool.num_idle, pool.num_held, pool.num_available) == (0, 1, 3)
    pool.release(held[:1])
    assert pool.num_available == 4
