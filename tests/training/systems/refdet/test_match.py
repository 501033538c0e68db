"""Matching, held against plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.tensors import Array
from engineworks.training.systems.refdet.config import (
    EncoderConfig,
    FollowConfig,
    KindConfig,
    MatchConfig,
    RelationConfig,
)
from engineworks.training.systems.refdet.match import (
    DetectMatch,
    Maps,
    Matcher,
    follower,
    quadratic_peak,
)
from engineworks.training.systems.refdet.relation import resampled

pytestmark = pytest.mark.train

FRAME = PreprocessSpec(size=(64, 96), resize="letterbox", mean=(0.5,) * 3, std=(0.5,) * 3)
CONFIG = MatchConfig(
    cells=3, scales=(2, 1), smallest=12.0, step=1.5, num_sizes=4, score=(1.0, 0.5, 0.3, 0.2, 0.1)
)


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    torch.set_num_threads(1)
    encoder = EncoderConfig(name="test_resnet", stages=(1, 2), weights="none")
    return Matcher(encoder, CONFIG, preprocess=FRAME, object_size=40.0).eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_between_cells_is_linear_and_beside_them_nothing() -> None:
    row = np.random.default_rng(1).normal(size=7)
    places = np.array([-2.0, -0.25, 0.0, 1.3, 5.999, 6.5, 9.0])
    got = resampled(torch.tensor(places), 7).numpy() @ row
    beside = np.concatenate([[0.0], row, [0.0]])
    np.testing.assert_allclose(got, np.interp(places, np.arange(-1, 8), beside), atol=1e-12)


def test_the_peak_of_a_parabola_is_where_it_is() -> None:
    place, steep = 0.3, 40.0  # the flatness that is added is a 1600th of its curvature
    values = [torch.tensor(-steep * (x - place) ** 2) for x in (-1.0, 0.0, 1.0)]
    assert quadratic_peak(*values).item() == pytest.approx(place, abs=1e-3)
    assert quadratic_peak(*(torch.tensor(v) for v in (1.0, 1.0, 1.0))).item() == 0
    assert quadratic_peak(*(torch.tensor(v) for v in (0.0, 1.0, 5.0))).item() == 0.5


def _at(plane_HW: Array, y: float, x: float) -> float:
    """A plane between its cells; beside it is nothing."""
    total = 0.0
    for i in (int(np.floor(y)), int(np.floor(y)) + 1):
        for j in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < plane_HW.shape[0] and 0 <= j < plane_HW.shape[1]:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * plane_HW[i, j]
    return total


def test_similarities_are_those_of_cells_laid_over_boxes(matcher: Matcher) -> None:
    maps = random(1, matcher.channels, 4, 6)
    prototypes = random(2, matcher.width, seed=1)
    prototypes[:, -1] = torch.tensor([0.5, -0.2])
    with torch.no_grad():
        got = matcher.similarities(matcher.cosines(maps, prototypes), prototypes).numpy()
    cells, stride = CONFIG.cells, matcher.stride
    for n in range(2):
        ratio = float(prototypes[n, -1])
        shape = (len(CONFIG.scales), cells, cells, matcher.channels)
        templates = prototypes[n, :-1].double().numpy().reshape(shape)
        for s, size in enumerate(CONFIG.sizes):
            # objects are 40 pixels in reference pictures, 20 in those half as large
            level = int(abs(np.log(40 / size)) < abs(np.log(20 / size)))
            wide, high = size * np.exp(min(ratio, 0)), size * np.exp(min(-ratio, 0))
            cosines = np.einsum("ijc,chw->ijhw", templates[level], maps[0].double().numpy())
            for y, x in ((0, 0), (1, 4), (3, 5)):
                want = np.mean(
                    [
                        _at(
                            cosines[i, j],
                            y + (i - 1) * high / cells / stride,
                            x + (j - 1) * wide / cells / stride,
                        )
                        for i in range(cells)
                        for j in range(cells)
                    ]
                )
                # sums of nine products of 100 float32 numbers
                assert got[0, n, s, y, x] == pytest.approx(want, abs=2e-4)


def test_scores_are_deviations_from_what_is_usual_in_the_frame(matcher: Matcher) -> None:
    similar, seen = random(2, 1, 4, 4, 6), torch.ones(2, 4, 6)
    seen[1, :, 4:] = 0
    with torch.no_grad():
        got, _ = matcher.judged(similar, seen)
    weights = np.array(CONFIG.score)
    for b, columns in ((0, 6), (1, 4)):
        for s, size in enumerate(CONFIG.sizes):
            values = similar[b, 0, s].double().numpy()
            inside = values[:, :columns]
            mean, spread = inside.mean(), inside.std()
            above = (values - mean) / (spread + CONFIG.softening)
            same = np.full_like(values, 1.0)
            features = [above, values, mean * same, spread * same, np.log(size / 80) * same]
            want = np.tensordot(weights, np.stack(features), 1)
            np.testing.assert_allclose(got[b, 0, s].numpy(), want, atol=1e-4)


def test_cells_of_a_template_are_means_over_its_box(matcher: Matcher) -> None:
    maps = torch.arange(8.0)[None, None, None].expand(1, matcher.channels, 8, 8)
    low, high = 1.5 * matcher.stride, 7.5 * matcher.stride
    with torch.no_grad():
        cells = matcher._template(maps, torch.tensor([[low, low, high, high]]))
    # the value of a place is its column: a third of the box is two columns
    assert cells[0, :, 0].reshape(3, 3)[0].tolist() == pytest.approx([2.0, 4.0, 6.0])
    assert cells[0, :, 0].reshape(3, 3)[2].tolist() == pytest.approx([2.0, 4.0, 6.0])


def test_grey_around_a_frame_is_no_part_of_it(matcher: Matcher) -> None:
    frames = random(1, 3, 64, 96)
    grey = (FRAME.pad_value / 255 - 0.5) / 0.5
    frames[:, :, :, 64:] = grey
    columns = 64 // matcher.stride
    seen = matcher.seen(frames)
    assert seen[0, :, :columns].min() == 1
    assert seen[0, :, columns:].max() == 0


def scene(seed: int) -> tuple[Array, Array]:
    """A frame of noise (3, 64, 96) with a pattern in it, and the pattern's box."""
    rng = np.random.default_rng(seed)
    frame = rng.normal(0, 0.3, (3, 64, 96)).astype(np.float32)
    y, x = int(rng.integers(4, 36)), int(rng.integers(4, 68))
    frame[:, y : y + 24, x : x + 24] = pattern()
    return frame, np.array([x, y, x + 24, y + 24], np.float32)


def pattern() -> Array:
    quarters = np.zeros((3, 24, 24), np.float32)
    quarters[0, :12], quarters[1, 12:, :12], quarters[2, :, 12:] = 1.5, 1.5, -1.5
    return quarters


def test_a_pattern_is_found_where_it_lies(matcher: Matcher) -> None:
    picture = np.zeros((3, 64, 64), np.float32)
    picture[:, 12:52, 12:52] = pattern().repeat(2, 1).repeat(2, 2)[:, 4:44, 4:44]
    box = torch.tensor([[12.0, 12.0, 52.0, 52.0]])
    detect = DetectMatch(matcher, 10).eval()
    with torch.no_grad():
        row = matcher.encode(torch.from_numpy(picture)[None], box)
        for seed in range(4):
            frame, truth = scene(seed)
            boxes, scores, classes = detect(torch.from_numpy(frame)[None], row)
            best = boxes[0, scores[0].argmax()].numpy()
            centre, wanted = (best[:2] + best[2:]) / 2, (truth[:2] + truth[2:]) / 2
            assert np.abs(centre - wanted).max() < 8  # a cell of its finest map
            assert classes.max() == 0


def test_candidates_are_peaks(matcher: Matcher) -> None:
    detect = DetectMatch(matcher, 1000).eval()
    rows = random(2, matcher.width, seed=3)
    with torch.no_grad():
        logits = matcher(random(1, 3, 64, 96), rows).logits
        _, scores, _ = detect(random(1, 3, 64, 96), rows)
    planes = logits[0].flatten(0, 1).numpy()
    peaks = [
        plane[y, x]
        for plane in planes
        for y in range(plane.shape[0])
        for x in range(plane.shape[1])
        if plane[y, x] == plane[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max()
    ]
    kept = scores[0][scores[0] > 0]
    wanted = sorted(1 / (1 + np.exp(-np.float64(peaks))))
    np.testing.assert_allclose(sorted(kept.tolist()), wanted, rtol=1e-5)


def test_a_followed_object_has_boxes_about_its_size() -> None:
    config = FollowConfig(size=(96, 64), share=0.5, num_sizes=3, step=2.0)
    assert config.sizes == pytest.approx((16.0, 32.0, 64.0))  # half of 64 in the middle


def test_following_looks_at_its_own_sizes_with_its_own_score(matcher: Matcher) -> None:
    config = FollowConfig(size=(64, 64), num_sizes=3, score=(0.0, 2.0, 0.0, 0.0, 0.0), bias=-1.0)
    frames, rows = random(1, 3, 64, 64), random(1, matcher.width, seed=3)
    with torch.no_grad():
        boxes, scores, _ = follower(matcher, config)(frames, rows)
        cosines = matcher.cosines(matcher.maps(frames).fine, rows)
        similar = matcher.similarities(cosines, rows, config.sizes)
    assert boxes.shape == (1, 16, 4)
    assert scores.max() == pytest.approx(float(torch.sigmoid(2 * similar.max() - 1)), rel=1e-4)


@pytest.fixture(scope="module")
def told() -> Matcher:
    """As ``matcher``, and a deeper stage of the same net tells kinds."""
    encoder = EncoderConfig(name="test_resnet", stages=(1, 2), weights="none")
    config = CONFIG.model_copy(update={"kind": KindConfig(stage=3, factor=4.0, usual=0.25)})
    return Matcher(encoder, config, preprocess=FRAME, object_size=40.0).eval()


class TestTheKind:
    def test_is_the_mean_of_the_deepest_map_over_a_box(self, told: Matcher) -> None:
        deep = random(2, told.num_kinds, 4, 6)
        boxes = torch.tensor([[[8.0, 4.0, 70.0, 60.0], [40.0, 30.0, 44.0, 38.0]]] * 2)
        got = told.kinds(deep, boxes).numpy()
        for b, plane_KHW in enumerate(deep.double().numpy()):
            for m, (x0, y0, x1, y1) in enumerate(boxes[b].double().numpy() / told.deep_stride):
                shares = (np.arange(8) + 0.5) / 8  # four parts, each at two places
                want = np.array(
                    [
                        np.mean(
                            [
                                _at(plane_HW, y0 + (y1 - y0) * i - 0.5, x0 + (x1 - x0) * j - 0.5)
                                for i in shares
                                for j in shares
                            ]
                        )
                        for plane_HW in plane_KHW
                    ]
                )
                np.testing.assert_allclose(got[b, m], want / np.linalg.norm(want), atol=1e-5)

    def test_of_a_candidate_is_compared_with_its_own_object(self, told: Matcher) -> None:
        deep, rows = random(1, told.num_kinds, 4, 6), random(2, told.width, seed=1)
        maps = Maps(torch.zeros(1, told.channels, 8, 12), deep)
        boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [32.0, 0.0, 64.0, 32.0]] * 2])
        got = told.kind_cosines(maps, boxes, torch.tensor([[0, 0, 1, 1]]), rows).numpy()
        kinds = told.kinds(deep, boxes)[0].double().numpy()
        wanted = rows[:, told.num_templates : -1].double().numpy()
        want = [kinds[0] @ wanted[0], kinds[1] @ wanted[0], kinds[2] @ wanted[1]]
        np.testing.assert_allclose(got[0, :3], want, atol=1e-4)

    def test_is_compared_without_what_the_ground_is_like(self, told: Matcher) -> None:
        encoder = EncoderConfig(name="test_resnet", stages=(1, 2), weights="none")
        kind = KindConfig(stage=3, factor=4.0, usual=0.25, ground=1)
        config = CONFIG.model_copy(update={"kind": kind})
        grounded = Matcher(encoder, config, preprocess=FRAME, object_size=40.0).eval()
        deep, rows = random(1, told.num_kinds, 4, 6), random(2, told.width, seed=1)
        maps = Maps(torch.zeros(1, told.channels, 8, 12), deep)
        boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [32.0, 0.0, 64.0, 32.0]]])
        whose = torch.tensor([[1, 0]])
        # of nothing it is the same
        torch.testing.assert_close(
            grounded.kind_cosines(maps, boxes, whose, rows),
            told.kind_cosines(maps, boxes, whose, rows),
        )
        ground = 0.1 * random(told.num_kinds, seed=2)
        assert grounded.ground_K is not None
        grounded.ground_K.copy_(ground)
        (got,) = grounded.kind_cosines(maps, boxes, whose, rows).numpy()
        kinds = told.kinds(deep, boxes)[0].double().numpy() - ground.double().numpy()
        wanted = rows[:, told.num_templates : -1].double().numpy()
        apart = wanted - ground.double().numpy()
        for m, n in enumerate((1, 0)):
            cosine = kinds[m] @ apart[n] / np.linalg.norm(kinds[m]) / np.linalg.norm(apart[n])
            np.testing.assert_allclose(got[m], cosine * np.linalg.norm(wanted[n]), atol=1e-4)

    def test_changes_scores_alone_and_the_more_the_less_usual(
        self, told: Matcher, matcher: Matcher
    ) -> None:
        frames = random(1, 3, 64, 96)
        pictures, boxes = random(2, 3, 64, 64, seed=2), torch.tensor([[12.0, 12.0, 52.0, 52.0]] * 2)
        with torch.no_grad():
            rows, plain_rows = told.encode(pictures, boxes), matcher.encode(pictures, boxes)
            torch.testing.assert_close(rows[:, : told.num_templates], plain_rows[:, :-1])
            found, scores, classes = DetectMatch(told, 5)(frames, rows)
            plain, plain_scores, plain_classes = DetectMatch(matcher, 5)(frames, plain_rows)
            cosines = told.kind_cosines(told.maps(frames), found, classes, rows)
        torch.testing.assert_close(found, plain)
        assert (classes == plain_classes).all()
        there = plain_scores > 0
        moved = torch.logit(scores[there].double()) - torch.logit(plain_scores[there].double())
        # a logit of float32 scores near 1 is known to four digits
        torch.testing.assert_close(moved, 4 * (cosines[there].double() - 0.25), atol=2e-3, rtol=0)

    def test_is_calibrated_with_the_score(self) -> None:
        encoder = EncoderConfig(name="test_resnet", stages=(1, 2), weights="none")
        config = CONFIG.model_copy(update={"kind": KindConfig(stage=3, factor=4.0)})
        told = Matcher(encoder, config, preprocess=FRAME, object_size=40.0).eval()
        frames = random(1, 3, 64, 96)
        with torch.no_grad():
            rows = told.encode(random(1, 3, 64, 64), torch.tensor([[12.0, 12.0, 52.0, 52.0]]))
            detect = DetectMatch(told, 3)
            before = torch.logit(detect(frames, rows)[1].double())
            told.calibrate(0.5, -1.0)
            after = torch.logit(detect(frames, rows)[1].double())
        torch.testing.assert_close(after, 0.5 * before - 1, atol=2e-3, rtol=0)


def learner(share: float | None) -> Matcher:
    """The same net and learned numbers, whatever their share."""
    encoder = EncoderConfig(name="test_resnet", stages=(1, 2), weights="none")
    relation = RelationConfig(parts=3, width=8, share=share)
    update = {"kind": KindConfig(stage=3, factor=4.0), "relation": relation}
    made = Matcher(encoder, CONFIG.model_copy(update=update), preprocess=FRAME, object_size=40.0)
    assert made.relation is not None
    generator = torch.Generator().manual_seed(1)
    for each in made.relation.parameters():
        each.data = 0.1 * torch.randn(each.shape, generator=generator)
    return made.eval()


class TestWhatIsLearned:
    def test_is_added_in_its_share_to_what_matching_says(self) -> None:
        frames = random(1, 3, 64, 96)
        found, logits = {}, {}
        for share in (None, 0.0, 0.5):
            matcher = learner(share)
            with torch.no_grad():
                rows = matcher.encode(
                    random(2, 3, 64, 64, seed=2), torch.tensor([[12.0, 12.0, 52.0, 52.0]] * 2)
                )
                found[share], scores, _ = DetectMatch(matcher, 5)(frames, rows)
            logits[share] = torch.logit(scores[scores > 0].double())
        # a logit of float32 scores near 1 is known to three digits
        want = logits[0.0] + 0.5 * logits[None]
        torch.testing.assert_close(logits[0.5], want, atol=5e-3, rtol=0)
        for share in (0.0, 0.5):
            torch.testing.assert_close(found[share], found[None])

    def test_is_calibrated_with_the_rest(self) -> None:
        matcher, frames = learner(0.5), random(1, 3, 64, 96)
        with torch.no_grad():
            rows = matcher.encode(random(1, 3, 64, 64), torch.tensor([[12.0, 12.0, 52.0, 52.0]]))
            detect = DetectMatch(matcher, 3)
            before = torch.logit(detect(frames, rows)[1].double())
            matcher.calibrate(0.5, -1.0)
            matcher.calibrate(1.5, 0.25)
            after = torch.logit(detect(frames, rows)[1].double())
        torch.testing.assert_close(after, 0.75 * before - 1.25, atol=5e-3, rtol=0)
