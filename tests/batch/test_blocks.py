"""A folder of blocks: which are missing, what they are made of, and that each is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engineworks.batch.blocks import RECORD_NAME, Blocks, attempt, block_path, write
from engineworks.batch.rows import schema_of, table_of
from engineworks.runtime.errors import InputError, ResourceError, UsageError

SOURCES = tuple(f"{i}.png" for i in range(7))
SETTINGS = {"bundle": "4f", "precision": "int8"}
SCHEMA = schema_of("noising")


def table(sources: tuple[str, ...], error: str | None = None) -> Any:
    return table_of([{"source": source, "error": error} for source in sources], SCHEMA)


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    made = Blocks(tmp_path, SOURCES, 3)
    made.begin(SETTINGS)
    return made


class TestShares:
    def test_hold_every_source_once_and_in_order(self, blocks: Blocks) -> None:
        shares = [blocks.share(number) for number in range(len(blocks))]
        assert [len(share) for share in shares] == [3, 3, 1]
        assert sum(shares, ()) == SOURCES

    def test_are_missing_until_they_are_written(self, blocks: Blocks) -> None:
        assert blocks.missing() == [0, 1, 2]
        write(block_path(blocks.out, 1), SCHEMA, [table(blocks.share(1))])
        assert blocks.missing() == [0, 2]

    def test_are_missing_where_writing_failed(self, blocks: Blocks) -> None:
        def broken() -> Any:
            yield table(blocks.share(0))
            raise ResourceError("no more")

        with pytest.raises(ResourceError):
            write(block_path(blocks.out, 0), SCHEMA, broken())
        assert [path.name for path in blocks.out.iterdir()] == [RECORD_NAME]

    def test_are_counted(self, blocks: Blocks) -> None:
        tables = [table(SOURCES[:2]), table(SOURCES[2:3], "broken")]
        write(block_path(blocks.out, 0), SCHEMA, tables)
        write(block_path(blocks.out, 2), SCHEMA, [table(SOURCES[6:])])
        assert blocks.counts() == (3, 1)

    def test_that_are_damaged_are_told(self, blocks: Blocks) -> None:
        block_path(blocks.out, 0).write_bytes(b"PAR1")
        with pytest.raises(InputError, match=r"block-000000.parquet is damaged"):
            blocks.counts()


class TestARecord:
    def test_lets_the_same_job_go_on(self, blocks: Blocks) -> None:
        Blocks(blocks.out, SOURCES, 3).begin(SETTINGS)

    @pytest.mark.parametrize(
        ("sources", "size", "settings", "told"),
        [
            (SOURCES, 3, {**SETTINGS, "bundle": "90"}, "bundle: 4f, now 90"),
            (SOURCES, 3, {**SETTINGS, "precision": "float"}, "precision: int8, now float"),
            (SOURCES, 3, {**SETTINGS, "maps": True}, "maps: None, now True"),
            (SOURCES, 4, SETTINGS, "block: 3, now 4"),
            (SOURCES[1:], 3, SETTINGS, "num_sources: 7, now 6"),
            ((*SOURCES[:-1], "x.png"), 3, SETTINGS, "sources: "),
        ],
    )
    def test_refuses_another_one(
        self,
        sources: tuple[str, ...],
        size: int,
        settings: dict[str, Any],
        told: str,
        blocks: Blocks,
    ) -> None:
        before = (blocks.out / RECORD_NAME).read_bytes()
        with pytest.raises(UsageError, match="made otherwise") as refused:
            Blocks(blocks.out, sources, size).begin(settings)
        assert told in str(refused.value)
        assert (blocks.out / RECORD_NAME).read_bytes() == before

    def test_tells_names_apart_that_are_joined_alike(self, tmp_path: Path) -> None:
        Blocks(tmp_path, ("ab", "c\udcff"), 3).begin(SETTINGS)
        with pytest.raises(UsageError, match="sources: "):
            Blocks(tmp_path, ("a", "bc\udcff"), 3).begin(SETTINGS)

    @pytest.mark.parametrize("content", ["", "[]", '{"format": "x"}', "[" * 100_000])
    def test_that_is_damaged_is_refused(self, content: str, blocks: Blocks) -> None:
        (blocks.out / RECORD_NAME).write_text(content)
        with pytest.raises(InputError, match="is not the record of a batch"):
            blocks.begin(SETTINGS)

    def test_is_not_made_in_a_folder_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(UsageError, match="is not empty"):
            Blocks(tmp_path, SOURCES, 3).begin(SETTINGS)


class TestAnAttempt:
    def test_is_forgotten_when_it_ends(self, blocks: Blocks) -> None:
        for _ in range(5):
            with attempt(blocks.out, 1, 2):
                pass
        assert [path.name for path in blocks.out.iterdir()] == [RECORD_NAME]

    def test_is_not_made_again_and_again(self, blocks: Blocks) -> None:
        for _ in range(2):
            attempt(blocks.out, 1, 2).__enter__()  # and dies
        with pytest.raises(ResourceError, match="2 processes died over block 1"):
            attempt(blocks.out, 1, 2).__enter__()
        blocks.begin(SETTINGS)  # by the next command
        attempt(blocks.out, 1, 2).__enter__()
