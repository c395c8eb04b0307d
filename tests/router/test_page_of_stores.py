"""The page shows each of several stores and their total. A store that does not answer is shown as such."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from antefix_router.page.prefix_forest import PrefixForest
from antefix_router.page.view import View
from tests.store.many_embedded import rack_of


async def test_each_store_is_shown_and_their_sum(tmp_path: Path) -> None:
    config = SimpleNamespace(store_address="", store_dir="", stores=("a=h:1", "b=h:2"), near_stores=())
    identity = SimpleNamespace(geometry=SimpleNamespace(block_size=8))
    router = SimpleNamespace(config=config, identity=identity, fingerprint=b"F" * 32)
    async with rack_of(tmp_path, names="ab") as rack:
        await rack.fill("a", 0, 4)
        await rack.fill("b", 0, 12)
        view = View(router, rack.many, None, PrefixForest())  # type: ignore[arg-type]
        await view._read_store()
        shown = view._store_data()
        assert [(row["name"], row["records"], row["answers"]) for row in shown["stores"]] == [
            ("a", 4, True),
            ("b", 12, True),
        ]
        assert next(row["num_records"] for row in shown["kinds"] if row["kind"] == "block") == 16
        assert shown["used_bytes"] == sum(row["used_bytes"] for row in shown["stores"])
        rack.stores["b"].dead = True
        view._store_read_at = -1e9
        await view._read_store()
        assert [row["answers"] for row in view._store_data()["stores"]] == [True, False]
