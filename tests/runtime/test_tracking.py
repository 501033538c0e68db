from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest

from engineworks.runtime.errors import BackendError
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.tracking import Tracks


def at(x: float, y: float, name: str = "cup", side: float = 20.0) -> Detection:
    """A detection with its centre there."""
    half = side / 2
    return Detection(name, 0.9, (x - half, y - half, x + half, y + half))


def numbers(tracks: Tracks, *frames: list[Detection]) -> list[list[int | None]]:
    return [[found.track for found in tracks.update(Detections(tuple(f))).objects] for f in frames]


class TestATrack:
    def test_gets_its_number_when_it_was_seen_three_times(self) -> None:
        found = numbers(Tracks(), *([at(50 + 3 * i, 40)] for i in range(5)))
        assert found == [[None], [None], [1], [1], [1]]

    def test_follows_objects_that_pass_each_other_in_any_order(self) -> None:
        """One walks right in a row, the other left in the next row; lists change their order."""
        tracks = Tracks()
        seen: dict[float, set[int | None]] = {40.0: set(), 90.0: set()}
        for i in range(30):
            both = [at(10 + 6 * i, 40), at(190 - 6 * i, 90)]
            result = tracks.update(Detections(tuple(both[:: 1 if i % 2 else -1])))
            if i >= 2:
                for found in result.objects:
                    seen[(found.box[1] + found.box[3]) / 2].add(found.track)
        assert sorted(len(each) for each in seen.values()) == [1, 1]
        assert seen[40.0] != seen[90.0]

    def test_survives_being_unseen_for_a_while(self) -> None:
        tracks = Tracks()
        way = [[at(20 + 4 * i, 50)] for i in range(40)]
        before = numbers(tracks, *way[:20])[-1]
        hidden = numbers(tracks, *([[]] * 8))

        assert before == [1]
        assert hidden == [[]] * 8
        assert numbers(tracks, *way[28:])[-1] == [1]

    def test_ends_when_it_is_unseen_for_long(self) -> None:
        tracks = Tracks()
        still = [[at(50, 50)]] * 4
        assert numbers(tracks, *still)[-1] == [1]
        numbers(tracks, *([[]] * 80))
        assert numbers(tracks, *still)[-1] == [2]

    def test_has_its_number_again_after_thirty_frames(self) -> None:
        tracks = Tracks()
        assert numbers(tracks, *([[at(50, 50)]] * 4))[-1] == [1]
        numbers(tracks, *([[]] * 30))
        assert numbers(tracks, *([[at(110, 50)]] * 4))[-1] == [1]

    @pytest.mark.parametrize("back", [at(200, 50), at(110, 50, "jar")])
    def test_is_not_another_far_away_or_of_another_name(self, back: Detection) -> None:
        tracks = Tracks()
        numbers(tracks, *([[at(50, 50)]] * 4))
        numbers(tracks, *([[]] * 30))
        assert numbers(tracks, *([[back]] * 4))[-1] == [2]

    def test_is_not_guessed_where_two_could_be_meant(self) -> None:
        tracks = Tracks()
        numbers(tracks, *([[at(50, 50), at(120, 50)]] * 4))
        numbers(tracks, *([[]] * 30))
        assert numbers(tracks, *([[at(85, 50)]] * 4))[-1] == [3]

    def test_of_a_small_object_follows_jumps_longer_than_it(self) -> None:
        """Under a moving camera its box never overlaps the one before."""
        found = numbers(Tracks(), *([at(30 + 11 * i, 50, side=10)] for i in range(8)))
        assert found[-1] == [1]

    def test_is_never_continued_by_an_object_of_another_name(self) -> None:
        tracks = Tracks()
        assert numbers(tracks, *([[at(50, 50)]] * 4))[-1] == [1]
        assert numbers(tracks, *([[at(50, 50, "jar")]] * 4)) == [[None], [None], [2], [2]]

    def test_changes_neither_boxes_nor_scores_nor_their_order(self) -> None:
        tracks = Tracks()
        frame = Detections((at(50, 50), at(80, 20, "jar"), at(120, 90)))
        for _ in range(5):
            result = tracks.update(frame)
        assert [(f.name, f.score, f.box) for f in result.objects] == [
            (f.name, f.score, f.box) for f in frame.objects
        ]
        assert sorted(str(f.track) for f in result.objects) == ["1", "2", "3"]

    def test_of_another_video_begins_at_one(self) -> None:
        still = [[at(50, 50)]] * 4
        assert numbers(Tracks(), *still)[-1] == numbers(Tracks(), *still)[-1] == [1]


def test_nothing_is_logged_and_nothing_kept_of_what_is_gone(
    caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    """Short tracks everywhere, some of boxes that shrink: their predictions turn inside out."""
    tracks = Tracks()
    with caplog.at_level(logging.DEBUG):
        for i in range(300):
            x, y = rng.uniform(50, 500, 2)
            tracks.update(Detections((at(x, y, side=max(1.0, 40.0 - 12 * (i % 4))),)))
    assert caplog.records == []
    assert len(tracks._tracker.tracked_objects) < 30


def test_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="norfair-enough") as caught:
        Tracks()
    assert "engineworks[refdet]" in str(caught.value.fix)
    assert "--no-track" in str(caught.value.fix)
