from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engineworks.runtime.bench import (
    DeviceTime,
    ForeignLoad,
    Row,
    Timing,
    Turn,
    environment,
    inputs_hash,
    interleave,
    ratio,
    render,
    to_json,
)
from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Evaluation, decide


class Machine:
    """A clock that only moves while a contender works, and the load of other processes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.foreign = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def foreign_seconds(self) -> float:
        return self.foreign

    def contender(
        self, name: str, *seconds: float, busy: Callable[[], float] = lambda: 0.0
    ) -> Callable[[], None]:
        """Takes the given times in turn; others use `busy()` of a core meanwhile."""
        calls = 0

        def call() -> None:
            nonlocal calls
            took = seconds[calls % len(seconds)]
            calls += 1
            self.now += took
            self.foreign += took * busy()
            self.log.append(name)

        return call

    def measure(self, contenders: dict[str, Callable[[], None]], **options) -> dict[str, Timing]:
        return interleave(
            contenders, clock=self.clock, foreign_seconds=self.foreign_seconds, **options
        )


class TestOnAGpu:
    def test_counts_the_devices_own_time_where_a_contender_gives_it(self) -> None:
        machine = Machine()
        wall = machine.contender("a", 0.1)

        def call() -> DeviceTime:
            wall()
            return DeviceTime(2.5)

        assert set(machine.measure({"a": call})["a"].samples_ms) == {2.5}

    def test_shares_out_what_the_device_used_among_calls_and_images(self) -> None:
        machine = Machine()
        used = 0.0

        def joules() -> float:
            return used

        def call() -> None:
            nonlocal used
            machine.now += 0.1
            used += 3.0

        found = machine.measure({"a": call}, joules=joules)["a"]
        # the untimed call of each turn is not in it
        assert found.joules_per_call == pytest.approx(3.0)
        row = Row("a", "int8", 6, 1, "network", found)
        assert row.joules_per_image == row.to_json()["joules_per_image"] == pytest.approx(0.5)
        assert "J/image" in render([row])
        assert "0.5000" in render([row])

    def test_leaves_energy_out_where_nothing_counts_it(self) -> None:
        row = Row("a", "int8", 6, 1, "network", timing([1.0] * 15))
        assert row.to_json()["joules_per_image"] is None
        assert "J/image" not in render([row])


def timing(*turns: list[float], foreign: tuple[float, ...] = ()) -> Timing:
    loads = foreign or (0.0,) * len(turns)
    return Timing(tuple(Turn(tuple(t), load) for t, load in zip(turns, loads, strict=True)))


class TestInterleaving:
    def test_warms_up_before_it_counts(self) -> None:
        machine = Machine()

        timings = machine.measure({"a": machine.contender("a", 9.0, 9.0, 0.1)}, warmup=1)

        # the warm-up call and the untimed one of the first turn took the two slow times
        assert timings["a"].samples_ms[0] == pytest.approx(100)

    def test_lets_the_contenders_take_turns(self) -> None:
        machine = Machine()
        names = {name: machine.contender(name, 0.1) for name in "ab"}

        machine.measure(names, warmup=0, max_seconds=0)

        runs = [name for i, name in enumerate(machine.log) if i == 0 or machine.log[i - 1] != name]
        assert runs == list("ab" * (len(runs) // 2))
        assert len(runs) >= 10

    def test_never_stops_before_fifteen_calls_and_five_turns(self) -> None:
        machine = Machine()

        timings = machine.measure(
            {"slow": machine.contender("slow", 3.0), "fast": machine.contender("fast", 0.01)},
            max_seconds=0,
        )

        assert timings["slow"].num_runs >= 15
        assert len(timings["slow"].turns) == len(timings["fast"].turns) >= 5

    def test_stops_when_the_time_is_over(self) -> None:
        machine = Machine()

        machine.measure({"a": machine.contender("a", 0.05)}, max_seconds=4)

        assert 4 <= machine.now < 5  # one turn takes 0.25 s, the warm-up 0.15 s

    def test_stops_after_the_largest_number_of_calls(self) -> None:
        machine = Machine()

        timings = machine.measure({"a": machine.contender("a", 0.001)}, max_runs=100)

        assert 100 <= timings["a"].num_runs <= 5 * 100

    def test_times_each_call(self) -> None:
        machine = Machine()

        found = machine.measure({"a": machine.contender("a", 0.08)})["a"]

        assert found.samples_ms == pytest.approx([80.0] * found.num_runs)
        assert found.verdict == "stable"

    def test_sets_turns_aside_in_which_others_were_busy(self) -> None:
        machine = Machine()
        call = machine.contender("a", 0.1, busy=lambda: float(1 < machine.now < 2))

        found = machine.measure({"a": call}, max_seconds=10)["a"]

        assert found.num_disturbed > 0
        assert found.stable
        assert sum(not turn.quiet for turn in found.turns) * 3 == found.num_disturbed

    def test_counts_all_calls_where_others_never_rest_and_says_so(self) -> None:
        machine = Machine()

        found = machine.measure({"a": machine.contender("a", 0.1, busy=lambda: 0.5)})["a"]

        assert found.num_disturbed == 0
        assert found.num_runs >= 15
        assert found.verdict == "others busy"


class TestATiming:
    def test_has_the_percentiles_of_its_calls(self) -> None:
        found = timing([float(i) for i in range(101)])

        figures = [found.percentile(q) for q in (50, 90, 95, 99)]
        assert figures == pytest.approx((50, 90, 95, 99))
        assert found.p50_ms == found.percentile(50)
        assert (found.mean_ms, found.min_ms, found.num_runs) == (50, 0, 101)

    def test_counts_only_quiet_turns(self) -> None:
        found = timing([1.0] * 20, [50.0] * 3, [2.0] * 20, foreign=(0.0, 0.2, 0.15))

        assert found.samples_ms == (1.0,) * 20 + (2.0,) * 20
        assert found.num_disturbed == 3

    def test_with_a_wide_spread_is_not_stable(self) -> None:
        found = timing([1.0, 2.0, 3.0] * 10)

        # median 2, absolute deviations 1 or 0: their median is 1
        assert found.spread == 0.5
        assert found.verdict == "spread 50%"

    def test_that_becomes_slower_is_not_stable(self) -> None:
        found = timing([1.0] * 15, [1.2] * 15)

        assert found.drift == pytest.approx(0.2)
        assert not found.stable
        assert "drift +20%" in found.verdict

    def test_goes_into_json_without_its_samples(self) -> None:
        plain = json.loads(json.dumps(timing([1.0] * 20).to_json()))

        assert plain["p50_ms"] == 1
        assert plain["stable"] is True
        assert "samples_ms" not in plain


class TestARatio:
    def test_is_that_of_the_medians_turn_by_turn(self) -> None:
        slow = timing([4.0, 4.0, 9.0], [8.0, 8.0, 8.0], [6.0, 6.0, 6.0])
        fast = timing([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 9.0])

        assert ratio(slow, fast).median == 3

    def test_does_not_see_what_slows_both_in_the_same_turn(self) -> None:
        slow = timing([3.0] * 5, [30.0] * 5, [6.0] * 5)
        fast = timing([1.0] * 5, [10.0] * 5, [2.0] * 5)

        found = ratio(slow, fast)

        assert (found.median, found.low, found.high) == (3, 3, 3)

    def test_leaves_out_turns_that_do_not_count_for_both(self) -> None:
        slow = timing([2.0] * 15, [90.0] * 15, [2.0] * 15, foreign=(0, 1, 0))
        fast = timing([1.0] * 15, [1.0] * 15, [1.0] * 15)

        assert ratio(slow, fast).high == 2

    def test_is_the_same_for_the_same_seed(self, rng: np.random.Generator) -> None:
        slow = timing(*rng.uniform(2, 4, (9, 5)).tolist())
        fast = timing(*rng.uniform(1, 2, (9, 5)).tolist())

        assert ratio(slow, fast, seed=3) == ratio(slow, fast, seed=3)
        assert ratio(slow, fast).low <= ratio(slow, fast).median <= ratio(slow, fast).high

    def test_covers_the_truth_about_as_often_as_it_says(self, rng: np.random.Generator) -> None:
        hits = 0
        for _ in range(100):
            slow = timing(*(3 * rng.lognormal(0, 0.1, (25, 4))).tolist())
            fast = timing(*rng.lognormal(0, 0.1, (25, 4)).tolist())
            found = ratio(slow, fast, rounds=300)
            hits += found.low <= 3 <= found.high

        # 95 of 100 expected; four binomial standard deviations (2.2 each) below
        assert hits >= 86

    def test_of_timings_without_common_turns_is_refused(self) -> None:
        with pytest.raises(InputError, match="not taken in turns"):
            ratio(timing([1.0]), timing([1.0], [1.0]))


class TestTheTable:
    judged = Evaluation(
        {"image_auroc": 0.98765, "x_f1max": 0.5},
        (
            decide(
                "image", 0.5, "shipped", np.array([0.1, 0.2, 0.3]), np.array([0, 1, 1]), list("abb")
            ),
        ),
    )

    def rows(self) -> list[Row]:
        network = {"float": timing([6.0] * 20), "int8": timing([2.0] * 20)}
        path = {"float": timing([10.0] * 20), "int8": timing([8.0] * 20)}
        return [
            Row("ort", precision, 4, 2, covers, found, self.judged)
            for covers, timings in (("network", network), ("images to results", path))
            for precision, found in timings.items()
        ]

    def test_has_one_part_per_thing_that_the_clock_covers(self) -> None:
        text = render(self.rows())

        assert "network, batch 4, 2 threads" in text
        assert "images to results, batch 4, 2 threads" in text
        assert text.count("0.9877") == 4
        assert "x_f1max" not in text

    def test_has_the_metrics_that_it_is_asked_for(self) -> None:
        text = render(self.rows(), {"x_f1max": 0.01, "absent": 0.01})

        assert "x_f1max" in text and text.count("0.5000") == 4
        assert "image_auroc" not in text and "absent" not in text

    def test_has_what_goes_wrong_at_the_border_that_is_shipped(self) -> None:
        text = " ".join(render(self.rows()).split())

        assert "false rejects" in text and "misses" in text
        assert text.count("0 of 1") == text.count("2 of 2") == 4
        decisions = self.rows()[0].to_json()["decisions"]
        assert decisions[0]["rates"]["misses"]["count"] == 2

    def test_compares_with_the_first_row_of_its_part(self) -> None:
        plain = to_json(self.rows())

        assert [row["speedup"]["median"] for row in plain] == [1, 3, 1, 1.25]
        assert [row["images_per_second"] for row in plain] == pytest.approx(
            [4000 / 6, 2000, 400, 500]
        )
        assert json.loads(json.dumps(plain)) == plain


class TestForeignLoad:
    def test_is_what_is_busy_and_not_our_own(self, tmp_path: Path) -> None:
        stat = tmp_path / "stat"
        # user nice system idle iowait irq softirq steal guest guest_nice
        stat.write_text("cpu  1000 20 300 99999 888 4 5 6 70 80\ncpu0 1 1 1 1 1 1 1 1 1 1\n")

        load = ForeignLoad(stat=stat, own=lambda: 3.0, hertz=100)

        assert load.seconds() == pytest.approx(13.35 - 3.0)

    def test_is_none_where_the_kernel_does_not_tell(self, tmp_path: Path) -> None:
        assert ForeignLoad(stat=tmp_path / "absent").seconds() == 0


class TestProvenance:
    def test_the_environment_goes_into_json(self) -> None:
        plain = json.loads(json.dumps(environment(threads=2)))

        assert plain["threads"] == 2
        assert plain["packages"]["numpy"] == np.__version__
        assert plain["memory_bytes"] > plain["peak_rss_bytes"] > 1 << 20

    def test_the_hash_of_inputs_knows_values_shape_and_dtype(self) -> None:
        image = np.arange(12, dtype=np.uint8).reshape(3, 4)
        others = [image.T.reshape(3, 4), image.reshape(4, 3), image.astype(np.int8), image + 1]

        hashes = {inputs_hash([other]) for other in [image, *others]}

        assert len(hashes) == 5
        assert inputs_hash([image.T]) == inputs_hash([np.ascontiguousarray(image.T)])

    def test_peak_memory_is_that_of_this_process_alone(self) -> None:
        # in a process of its own: this one may have used much more already
        program = (
            "import numpy as np\n"
            "from engineworks.runtime.bench import peak_rss_bytes\n"
            "before = peak_rss_bytes()\n"
            "np.ones(before + (64 << 20), np.uint8)\n"
            "print(before, peak_rss_bytes())"
        )
        found = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )

        before, after = map(int, found.stdout.split())
        assert 10 << 20 < before < 1 << 30
        assert after >= before + (32 << 20)
